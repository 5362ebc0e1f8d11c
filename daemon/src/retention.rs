//! Retention by itself: the archive of the directory and of each tenant that this node leads is swept at
//! intervals.
//!
//! No key of the tenant is needed: a sealed tenant's history goes as its contract says. A sweep is
//! left to later while the tenant is restored, deleted, or moved to another key.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kms::TenantId;
use replication::archive::chain::Chain;
use replication::archive::checkpoint::COLLECT_AFTER;
use replication::archive::retention::{self, Policy, Sweep};
use replication::failpoint::failpoint;
use replication::group::Group;
use tokio::time::Instant;

use crate::directory::Directory;
use crate::directory::records::TenantRecord;
use crate::limits;
use crate::node::Node;
use crate::tenant::key::now_ms;

const LOOK: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_secs(3600);
/// After one that did not come to its end.
const AGAIN: Duration = Duration::from_secs(300);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Why a tenant's archive is left alone now; none if it is not.
pub(crate) fn refusal(record: &TenantRecord) -> Option<String> {
    if let Some(why) = record.withheld() {
        return Some(why);
    }
    if !record.formed {
        return Some("it holds nothing yet".into());
    }
    let task = record.key_task.as_ref();
    task.map(|task| format!("{task} is under way"))
}

/// How long what nothing refers to is left; a test may have less.
fn collect_after() -> Duration {
    let given = std::env::var("HOLDFAST_TEST_COLLECT_AFTER_MS").ok();
    let given = given.and_then(|ms| ms.parse().ok());
    given.map_or(COLLECT_AFTER, Duration::from_millis)
}

/// How much of the directory's history is kept; a test may have less.
pub(crate) fn keep_directory() -> Duration {
    let given = std::env::var("HOLDFAST_TEST_KEEP_DIRECTORY_MS").ok();
    let given = given.and_then(|ms| ms.parse().ok());
    given.map_or(limits::KEEP_DIRECTORY, Duration::from_millis)
}

impl Node {
    /// Decides what of a tenant's archive goes, and deletes it unless this is a dry run. Also answers
    /// what an Object Lock keeps.
    pub async fn sweep(
        &self,
        record: &TenantRecord,
        dry_run: bool,
    ) -> Result<(Sweep, Vec<String>), String> {
        if let Some(why) = refusal(record) {
            return Err(format!("tenant {} is not swept: {why}", record.name));
        }
        let directory = self.directory().ok_or("the directory is not open")?;
        let known = directory.newest_link(record).map_err(text)?;
        let keep = Duration::from_millis(record.keep_ms());
        let chain = self.chain(record)?;
        let sweep = self.decide(&chain, keep, record.keep_checkpoints(), known);
        let sweep = sweep.await?;
        if dry_run {
            return Ok((sweep, Vec::new()));
        }
        self.unchanged(record).await?;
        self.delete(&chain, sweep).await
    }

    /// As `sweep`, of the directory, which is only ever restored to its newest state.
    pub async fn sweep_directory(
        &self,
        directory: &Directory,
        dry_run: bool,
    ) -> Result<(Sweep, Vec<String>), String> {
        let chain = self.chain_of(directory.group().id())?;
        let checkpoints = limits::KEEP_CHECKPOINTS as usize;
        let known = self.newest_directory_link(chain.group());
        let sweep = self.decide(&chain, keep_directory(), checkpoints, known);
        let sweep = sweep.await?;
        if dry_run {
            return Ok((sweep, Vec::new()));
        }
        if self.is_restoring() {
            return Err("a restore is under way".into());
        }
        self.delete(&chain, sweep).await
    }

    async fn decide(
        &self,
        chain: &Chain,
        keep: Duration,
        checkpoints: usize,
        known: u64,
    ) -> Result<Sweep, String> {
        let (bucket, config) = (&self.parts.bucket, &self.config.bucket);
        let store_ms = retention::clock(config, bucket).await.map_err(text)?;
        let policy = Policy {
            keep,
            checkpoints,
            collect_after: collect_after(),
        };
        let at_ms = store_ms.min(now_ms());
        let sweep = retention::decide(config, chain, &policy, known, at_ms);
        let sweep = sweep.await.map_err(text)?;
        for object in &sweep.unreadable {
            tracing::error!(group = %chain.group(), object, "ALARM: a manifest does not read: no file of the group is deleted while it is there");
        }
        Ok(sweep)
    }

    async fn delete(&self, chain: &Chain, sweep: Sweep) -> Result<(Sweep, Vec<String>), String> {
        let left = retention::run(&self.config.bucket, chain, &sweep, &failpoint).await;
        let left = left.map_err(text)?;
        if !sweep.is_empty() {
            tracing::info!(
                group = %chain.group(),
                links = sweep.links.len(),
                checkpoints = sweep.retired.len(),
                files = sweep.collected.len(),
                unfinished = sweep.unfinished.len(),
                bytes = sweep.bytes,
                locked = left.len(),
                "what the window does not need is deleted"
            );
        }
        Ok((sweep, left))
    }

    /// The region must know the tenant as it was when the sweep was decided.
    pub(crate) async fn unchanged(&self, record: &TenantRecord) -> Result<(), String> {
        let directory = self.directory().ok_or("there is no directory yet")?;
        directory.group().read_barrier().await.map_err(text)?;
        let tenants = directory.tenants().map_err(text)?;
        match tenants.iter().any(|t| t.record == *record) {
            true => Ok(()),
            false => Err(format!(
                "the record of tenant {} was changed meanwhile; try again",
                record.name
            )),
        }
    }
}

/// When each archive is swept next.
#[derive(Default)]
struct Turns(HashMap<TenantId, Instant>);

impl Turns {
    /// The first one is at a time of its own, so that not all begin with the node.
    fn is_due(&mut self, id: TenantId) -> bool {
        let spread = EVERY * u32::from(id.0[0]) / 256;
        let first = || Instant::now() + spread;
        Instant::now() >= *self.0.entry(id).or_insert_with(first)
    }

    /// Notes how a sweep went, and has a checkpoint made that it found due.
    fn done(&mut self, group: &Group, swept: Result<(Sweep, Vec<String>), String>) {
        let pause = match swept {
            Ok((sweep, _)) => {
                if sweep.checkpoint_due {
                    group.want_checkpoint();
                }
                EVERY
            }
            Err(why) => {
                tracing::warn!(group = %group.id(), %why, "the archive is not swept; it is tried again");
                AGAIN
            }
        };
        self.0.insert(group.id().tenant, Instant::now() + pause);
    }
}

pub async fn keep(node: Arc<Node>) {
    let mut turns = Turns::default();
    loop {
        tokio::time::sleep(LOOK).await;
        if node.is_restoring() {
            continue;
        }
        if let Some(directory) = node.directory() {
            let group = directory.group();
            if group.is_leader() && turns.is_due(group.id().tenant) {
                let swept = node.sweep_directory(&directory, false).await;
                turns.done(group, swept);
            }
        }
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let Ok(group) = tenant.group() else { continue };
            if group.is_leader() && refusal(&record).is_none() && turns.is_due(record.id) {
                let swept = node.sweep(&record, false).await;
                turns.done(&group, swept);
            }
        }
    }
}
