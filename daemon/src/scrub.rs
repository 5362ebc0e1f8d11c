//! Scrub by itself: everything that is kept of a tenant is read back within a period, by a node that does
//! not lead it; what is damaged is an alarm, and healed from the live replicas.
//!
//! A damaged checkpoint is retired first, so that its files are not referred to again, and then another
//! one made: until that is there a restore replays more. A damaged link stays: the moments that it
//! leads to are lost, and said to be. The directory is read back by the node that leads it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kms::TenantId;
use replication::archive::bucket::Bootstrap;
use replication::archive::chain::Chain;
use replication::archive::holds;
use replication::archive::lock::Locks;
use replication::archive::scrub::{self, Scope, Scrubbed};
use replication::archive::survey::Kept;
use tokio::time::Instant;

use crate::directory::Directory;
use crate::directory::records::{EventKind, ScrubRecord, TenantRecord};
use crate::drill;
use crate::limits;
use crate::node::Node;
use crate::retention::{keep_directory, refusal};
use crate::tenant::key::now_ms;

const LOOK: Duration = Duration::from_secs(10);
/// After one that did not come to its end.
const AGAIN: Duration = Duration::from_secs(600);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Why a tenant is not scrubbed now. In the grace of its deletion it is: it may be brought back, and its locks
/// must not lapse.
fn not_now(record: &TenantRecord) -> Option<String> {
    match record.is_destroying() || record.is_due() {
        true => record.deleted(),
        false => refusal(&TenantRecord {
            deletion: None,
            ..record.clone()
        }),
    }
}

impl Node {
    /// Reads everything back, and heals what can be: the newest state can be restored then.
    pub async fn scrub(&self, record: &TenantRecord) -> Result<Scrubbed, String> {
        let Ok(_one) = self.scrubbing.try_acquire() else {
            return Err("a scrub is under way on this node: try again once it is done".into());
        };
        if let Some(why) = not_now(record) {
            return Err(format!("tenant {} is not scrubbed: {why}", record.name));
        }
        let chain = self.chain(record)?;
        let go_on = || !self.is_restoring();
        let directory = self.directory().ok_or("the directory is not open")?;
        let known = directory.newest_link(record).map_err(text)?;
        let locks = Locks::of(&self.config.bucket);
        let held = holds::entries(chain.bucket(), chain.key(), record.id).await;
        let held = holds::standing(&held.map_err(text)?);
        let held = held.iter().map(|hold| hold.since_ms).min();
        let window = now_ms().saturating_sub(record.keep_ms());
        let scope = Scope {
            rate: limits::SCRUB_RATE,
            locks: locks.as_ref(),
            since_ms: window.min(held.unwrap_or(u64::MAX)),
            checkpoints: None,
            go_on: &go_on,
        };
        let scrubbed = scrub::scrub(&chain, known, &scope).await.map_err(text)?;
        let scrubbed = scrubbed.ok_or("it was stopped by a restore")?;
        self.unchanged(record).await?;
        not_renewed(&record.name, &scrubbed);
        for damage in &scrubbed.damages {
            tracing::error!(tenant = %record.id, %damage, "ALARM: the archive is damaged");
            self.event(record, EventKind::ArchiveDamaged, damage.to_string());
        }
        let deleted = record.deleted();
        if !scrubbed.damages.is_empty() && deleted.is_none() {
            let healed = self.heal(record, &scrubbed).await;
            healed.map_err(|why| unhealed(&scrubbed, &why))?;
        }
        self.scrubbed(&directory, record.id, &scrubbed).await?;
        match deleted.filter(|_| !scrubbed.damages.is_empty()) {
            // Should it be brought back, the next scrub heals it.
            Some(why) => Err(unhealed(&scrubbed, &why)),
            None => Ok(scrubbed),
        }
    }

    /// As `scrub`, of the directory, and the object that a restore of the region begins with.
    pub async fn scrub_directory(&self, directory: &Directory) -> Result<Scrubbed, String> {
        let Ok(_one) = self.scrubbing.try_acquire() else {
            return Err("a scrub is under way on this node: try again once it is done".into());
        };
        let chain = self.chain_of(directory.group().id())?;
        let locks = Locks::of(&self.config.bucket);
        let scope = Scope {
            rate: limits::SCRUB_RATE,
            locks: locks.as_ref(),
            since_ms: now_ms().saturating_sub(keep_directory().as_millis() as u64),
            checkpoints: Some(limits::KEEP_CHECKPOINTS as usize),
            go_on: &|| !self.is_restoring(),
        };
        let known = self.newest_directory_link(chain.group());
        let scrubbed = scrub::scrub(&chain, known, &scope).await.map_err(text)?;
        let mut scrubbed = scrubbed.ok_or("it was stopped by a restore")?;
        if let Some(locks) = &locks {
            let bootstrap = Bootstrap::path();
            let refused = locks.renew(&bootstrap).await.map_err(text)?;
            scrubbed
                .unlocked
                .extend(refused.map(|why| format!("{bootstrap}: {why}")));
        }
        not_renewed("directory", &scrubbed);
        for damage in &scrubbed.damages {
            tracing::error!(%damage, "ALARM: the directory's archive is damaged");
            self.event_of("directory", EventKind::ArchiveDamaged, damage.to_string());
        }
        if !scrubbed.damages.is_empty() {
            let healed = async {
                scrub::retire(&chain, &scrubbed).await.map_err(text)?;
                let made = self.directory_checkpoint(directory).await?;
                is_whole(&chain, &made).await
            };
            let said = healed.await.map_err(|why| unhealed(&scrubbed, &why))?;
            self.event_of("directory", EventKind::ArchiveHealed, said);
        }
        self.scrubbed(directory, chain.group().tenant, &scrubbed)
            .await?;
        Ok(scrubbed)
    }

    /// Records that an archive was scrubbed.
    async fn scrubbed(
        &self,
        directory: &Directory,
        tenant: TenantId,
        scrubbed: &Scrubbed,
    ) -> Result<(), String> {
        let done = ScrubRecord {
            tenant,
            at_ms: now_ms(),
            objects: scrubbed.objects,
            bytes: scrubbed.bytes,
            damages: scrubbed.damages.len() as u64,
        };
        directory.put_scrub(&done).await.map_err(text)
    }

    /// Has the archive begin anew from the live replicas.
    async fn heal(&self, record: &TenantRecord, scrubbed: &Scrubbed) -> Result<(), String> {
        let chain = self.chain(record)?;
        let retired = scrub::retire(&chain, scrubbed).await;
        retired.map_err(text)?;
        let made = self.checkpoint(record).await?;
        let said = is_whole(&chain, &made).await?;
        tracing::info!(tenant = %record.id, "{said}");
        self.event(record, EventKind::ArchiveHealed, said);
        Ok(())
    }
}

/// Reads a new checkpoint back; answers what that means.
async fn is_whole(chain: &Chain, made: &Kept) -> Result<String, String> {
    match scrub::check(chain, &made.manifest).await.map_err(text)? {
        Some(why) => Err(format!("the new checkpoint is damaged too: {why}")),
        None => Ok(format!(
            "a new checkpoint at revision {} is in the bucket and whole: every moment from it on can be restored",
            made.manifest.revision
        )),
    }
}

fn unhealed(scrubbed: &Scrubbed, why: &str) -> String {
    let damages: Vec<String> = scrubbed.damages.iter().map(text).collect();
    format!("{}; it is not healed yet: {why}", damages.join("; "))
}

/// Says which locks the store refuses to renew.
fn not_renewed(name: &str, scrubbed: &Scrubbed) {
    if let Some(first) = scrubbed.unlocked.first() {
        tracing::error!(
            tenant = name,
            objects = scrubbed.unlocked.len(),
            first,
            "ALARM: the store does not renew the Object Locks of these objects"
        );
    }
}

/// Which tenants are due, each once in the period, at a time of its own.
pub async fn keep(node: Arc<Node>) {
    let mut not_before: HashMap<_, Instant> = HashMap::new();
    let every_ms = limits::SCRUB_EVERY.as_millis() as u64;
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(directory) = node.directory() else {
            continue;
        };
        let Ok(scrubs) = directory.scrubs() else {
            continue;
        };
        let id = directory.group().id().tenant;
        let last = scrubs.iter().find(|s| s.record.tenant == id);
        let last_ms = last.map_or(0, |s| s.record.at_ms);
        if directory.group().is_leader()
            && not_before.get(&id).is_none_or(|at| Instant::now() >= *at)
            && now_ms() >= last_ms + every_ms
            && let Err(why) = node.scrub_directory(&directory).await
        {
            tracing::warn!(%why, "the directory's archive is not scrubbed; it is tried again");
            not_before.insert(id, Instant::now() + AGAIN);
        }
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let last = scrubs.iter().find(|s| s.record.tenant == record.id);
            // The first one a while after the tenant was made, or its key.
            let last_ms = last.map_or(record.rotated_ms, |s| s.record.at_ms);
            let held_up = not_before.get(&record.id);
            if not_now(&record).is_some()
                || held_up.is_some_and(|at| Instant::now() < *at)
                || !drill::is_new_period(record.id, every_ms, last_ms, now_ms())
                || !drill::is_ours(&node, &record)
            {
                continue;
            }
            if let Err(why) = node.scrub(&record).await {
                tracing::warn!(tenant = %record.id, %why, "the archive is not scrubbed; it is tried again");
                not_before.insert(record.id, Instant::now() + AGAIN);
            }
        }
    }
}
