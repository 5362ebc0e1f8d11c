//! A checkpoint that is asked for: by an operator, or because the archive is damaged.

use std::time::Duration;

use kms::TenantId;
use replication::archive::chain::Chain;
use replication::archive::checkpoint::{list_with_times, read};
use replication::archive::survey::Kept;
use tokio::time::Instant;

use crate::directory::records::TenantRecord;
use crate::node::Node;
use crate::question::Question;

/// How long a checkpoint may take to be made and uploaded.
const MADE_WITHIN: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(200);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Node {
    /// The newest chain of a tenant.
    pub fn chain(&self, record: &TenantRecord) -> Result<Chain, String> {
        let key = self.archive_key();
        let key = key.ok_or("the archive key is not known yet")?;
        Ok(Chain::new(self.parts.bucket.clone(), key, record.group()))
    }

    /// Has a checkpoint of a tenant uploaded, and waits for it.
    pub async fn checkpoint(&self, record: &TenantRecord) -> Result<Kept, String> {
        let (chain, name) = (self.chain(record)?, &record.name);
        let list = || list_with_times(chain.bucket(), chain.group());
        let before = list().await.map_err(text)?;
        if !self.want_checkpoint(record).await {
            return Err(format!(
                "nobody leads tenant {name}, or it is sealed there; look with 'holdfast tenant show {name}'"
            ));
        }
        let deadline = Instant::now() + MADE_WITHIN;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = list().await.map_err(text)?;
            if let Some((object, at_ms)) = now.into_iter().find(|found| !before.contains(found)) {
                let manifest = read(&chain, &object).await.map_err(text)?;
                return Ok(Kept { manifest, at_ms });
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "no checkpoint of tenant {name} has come to the bucket within {} s: is the bucket away?",
                    MADE_WITHIN.as_secs()
                ));
            }
        }
    }

    /// Has whoever leads a tenant upload a checkpoint; answers whether anybody does.
    async fn want_checkpoint(&self, record: &TenantRecord) -> bool {
        let asked = self.placed(record).into_iter().map(|node| async move {
            if node.id == self.id {
                return self.want_checkpoint_here(record.id);
            }
            let question = Question::Checkpoint(record.id);
            let answer = self.ask(&node.peer_address, &question).await;
            answer.is_some_and(|answer| serde_json::from_slice(&answer).unwrap_or(false))
        });
        futures::future::join_all(asked).await.contains(&true)
    }

    pub(crate) fn want_checkpoint_here(&self, tenant: TenantId) -> bool {
        let group = self.tenants.find(tenant).and_then(|t| t.group().ok());
        let Some(group) = group.filter(|g| g.is_leader() && g.sealed().is_none()) else {
            return false;
        };
        group.want_checkpoint();
        true
    }
}
