//! A checkpoint that is asked for: by an operator, or because the archive is damaged.

use std::time::Duration;

use kms::TenantId;
use replication::GroupId;
use replication::archive::chain::Chain;
use replication::archive::checkpoint::{list_with_times, read};
use replication::archive::survey::Kept;
use tokio::time::Instant;

use crate::directory::Directory;
use crate::directory::records::{NodeRecord, TenantRecord};
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
        self.chain_of(record.group())
    }

    /// The chain of a group, a tenant's or the directory's.
    pub fn chain_of(&self, group: GroupId) -> Result<Chain, String> {
        let key = self.archive_key();
        let key = key.ok_or("the archive key is not known yet")?;
        Ok(Chain::new(self.parts.bucket.clone(), key, group))
    }

    /// Has a checkpoint of a tenant uploaded, and waits for it.
    pub async fn checkpoint(&self, record: &TenantRecord) -> Result<Kept, String> {
        let (chain, name) = (self.chain(record)?, &record.name);
        let made = self.checkpoint_of(&chain, self.placed(record)).await?;
        made.ok_or_else(|| {
            format!("nobody leads tenant {name}, or it is sealed there; look with 'holdfast tenant show {name}'")
        })
    }

    /// As `checkpoint`, of the directory.
    pub async fn directory_checkpoint(&self, directory: &Directory) -> Result<Kept, String> {
        let chain = self.chain_of(directory.group().id())?;
        let nodes = directory.nodes().map_err(text)?;
        let nodes = nodes.into_iter().map(|found| found.record).collect();
        let made = self.checkpoint_of(&chain, nodes).await?;
        made.ok_or_else(|| "nobody leads the directory now; try again".into())
    }

    /// None if no node of `nodes` leads it.
    async fn checkpoint_of(
        &self,
        chain: &Chain,
        nodes: Vec<NodeRecord>,
    ) -> Result<Option<Kept>, String> {
        let list = || list_with_times(chain.bucket(), chain.group());
        let before = list().await.map_err(text)?;
        if !self.want_checkpoint(chain.group().tenant, nodes).await {
            return Ok(None);
        }
        let deadline = Instant::now() + MADE_WITHIN;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = list().await.map_err(text)?;
            if let Some((object, at_ms)) = now.into_iter().find(|found| !before.contains(found)) {
                let manifest = read(chain, &object).await.map_err(text)?;
                return Ok(Some(Kept { manifest, at_ms }));
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "no checkpoint of group {} has come to the bucket within {} s: is the bucket away?",
                    chain.group(),
                    MADE_WITHIN.as_secs()
                ));
            }
        }
    }

    /// Has whoever of `nodes` leads a tenant upload a checkpoint; answers whether anybody does.
    async fn want_checkpoint(&self, tenant: TenantId, nodes: Vec<NodeRecord>) -> bool {
        let asked = nodes.into_iter().map(|node| async move {
            if node.id == self.id {
                return self.want_checkpoint_here(tenant);
            }
            let question = Question::Checkpoint(tenant);
            let answer = self.ask(&node.peer_address, &question).await;
            answer.is_some_and(|answer| serde_json::from_slice(&answer).unwrap_or(false))
        });
        futures::future::join_all(asked).await.contains(&true)
    }

    pub(crate) fn want_checkpoint_here(&self, tenant: TenantId) -> bool {
        let directory = self.directory().map(|d| d.group().clone());
        let group = match directory.filter(|group| group.id().tenant == tenant) {
            Some(group) => Some(group),
            None => self.tenants.find(tenant).and_then(|t| t.group().ok()),
        };
        let Some(group) = group.filter(|g| g.is_leader() && g.sealed().is_none()) else {
            return false;
        };
        group.want_checkpoint();
        true
    }
}
