//! Taking one tenant of a region that serves back to an earlier moment, in place.
//!
//! Invariants. Until the earlier state is restored and verified the tenant is served as it is. Then
//! its record says that it is being restored, which seals it on every node, and its chain is closed;
//! whoever dies from there on leaves it so, and the same command, given again, goes on. The
//! replicas of before are of another incarnation, and never join.

use std::sync::Arc;
use std::time::Duration;

use kms::Secret;
use replication::archive::chain::Chain;
use replication::clock::utc;
use replication::restore::Point;

use super::{Run, Wanted};
use crate::directory::records::{EventKind, TenantRecord};
use crate::directory::{Directory, Found};
use crate::proto::admin::RestoreEvent;
use crate::tenant::{self, rotation};

/// How long the archive may take to hold everything that was acknowledged.
const ARCHIVED_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Run {
    pub(super) async fn go_back(&self, name: &str, point: Point) -> Result<(), String> {
        let (directory, record) = self.of_a_tenant(name, point).await?;
        // One that was withheld by a restore which died was waited for then.
        let settled = self.settle(&record).await? || record.restoring.is_some();
        let known = directory.newest_link(&record).map_err(text)?;
        let keys = tenant::wrapped(&self.node.parts, &record).await;
        let served = self.node.parts.groups.get(record.group());
        let archive_key = self.node.archive_key();
        let archive_key = archive_key.ok_or("the archive key is not known yet")?;
        let wanted = Wanted {
            name,
            first: record.group(),
            keys: Arc::new(keys.map_err(text)?),
            archive_key: &archive_key,
            known,
            majority: record.placement.len() / 2 + 1,
            rpo: Duration::from_millis(record.rpo_ms),
            point,
            settled,
            // One that is sealed already is restored all the same.
            served: served.filter(|group| group.sealed().is_none()),
            told: self.node.report(),
        };
        let why = match point {
            Point::Newest => "its newest archived state".to_string(),
            Point::Time(ms) => utc(ms),
            Point::Revision(revision) => format!("revision {revision}"),
        };
        let why = format!("it is being restored to {why} (restore {})", self.id);
        // Only the tenant that this was planned for: not one whose keys or archive are others since.
        let withhold = async {
            let changed =
                rotation::change(&self.node, &record, |r| r.restoring = Some(why.clone()));
            let changed = changed.await.map(drop);
            changed.map_err(|e| format!("its record was changed meanwhile ({e}); try again"))
        };
        let done = match self.restore_group(&wanted, withhold).await {
            Ok(done) => done,
            Err(failed) => {
                // The chain may be closed by now: it is served again only if it is not.
                return Err(match self.release(&record, &why, &archive_key).await {
                    Ok(()) => failed,
                    Err(e) => format!("{failed}; and it is not served until it is restored: {e}"),
                });
            }
        };
        let incarnation = done.group.id().incarnation;
        let found = match find(&directory, name) {
            Ok(found) if found.record.incarnation < incarnation => found,
            Ok(newer) => {
                self.drop_group(&done.group).await;
                let newer = newer.record.incarnation;
                return Err(format!("another restore has recorded incarnation {newer}"));
            }
            Err(why) => {
                self.drop_group(&done.group).await;
                return Err(why);
            }
        };
        let current = TenantRecord {
            incarnation,
            restoring: None,
            ..found.record
        };
        if let Err(why) = self.record(&directory, &current, found.modified).await {
            self.give_up(&directory, &current, &done.group).await;
            return Err(why);
        }
        // What it began with may go with the window that it lies in.
        done.group.want_checkpoint();
        let (revision, time_ms) = done.came_to;
        let said = format!(
            "it is as it was at revision {revision}, effective time {}; it goes on at revision {}, as incarnation {}",
            utc(time_ms),
            done.restored.state.revision,
            incarnation
        );
        tracing::info!(tenant = %record.id, "{said}");
        self.node.event(&record, EventKind::Restored, said.clone());
        let event = RestoreEvent {
            tenant: name.into(),
            phase: "serving".into(),
            message: said,
            ..RestoreEvent::default()
        };
        let _ = self.events.send(Ok(event)).await;
        Ok(())
    }

    /// The record of a tenant that can be restored here and now.
    pub(super) async fn of_a_tenant(
        &self,
        name: &str,
        point: Point,
    ) -> Result<(Directory, TenantRecord), String> {
        let directory = self.node.directory().ok_or("there is no directory yet")?;
        directory.group().read_barrier().await.map_err(text)?;
        let record = find(&directory, name)?.record;
        if let Some(why) = refusal(&record, &self.node.config.name) {
            return Err(why);
        }
        match point {
            Point::Time(ms) if ms > self.asked_ms => Err("that moment has not come yet".into()),
            _ => Ok((directory, record)),
        }
    }

    /// Waits until everything that was acknowledged so far is archived; answers whether that is known.
    pub(super) async fn settle(&self, record: &TenantRecord) -> Result<bool, String> {
        let group = self.node.parts.groups.get(record.group());
        let Some(group) = group.filter(|group| group.sealed().is_none()) else {
            return Ok(false);
        };
        if group.read_barrier().await.is_err() {
            tracing::warn!(group = %group.id(), "no majority answers: what is archived is all that is known");
            return Ok(false);
        }
        let applied = group.status().applied;
        let deadline = tokio::time::Instant::now() + ARCHIVED_WITHIN;
        while group.status().archived < applied {
            if tokio::time::Instant::now() >= deadline {
                return Err(format!(
                    "the archive has not come to entry {applied} within {} s: is the bucket away? nothing was changed",
                    ARCHIVED_WITHIN.as_secs()
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(true)
    }

    /// Has a tenant that this restore withholds, or one before it that died, served again, if its chain
    /// is still open.
    async fn release(
        &self,
        before: &TenantRecord,
        why: &str,
        archive_key: &Secret,
    ) -> Result<(), String> {
        let directory = self.node.directory().ok_or("there is no directory yet")?;
        directory.group().read_barrier().await.map_err(text)?;
        let known = find(&directory, &before.name)?.record;
        let ours = known.restoring.as_deref() == Some(why) || known.restoring == before.restoring;
        if known.restoring.is_none() || !ours {
            return Ok(());
        }
        let bucket = self.node.parts.bucket.clone();
        let chain = Chain::new(bucket, archive_key.clone(), known.group());
        if chain.tail().await.map_err(text)?.closed().is_some() {
            return Err("its chain is closed; give the command again".into());
        }
        let changed = rotation::change(&self.node, &known, |r| r.restoring = None);
        changed.await.map(drop).map_err(text)
    }
}

pub(super) fn find(directory: &Directory, name: &str) -> Result<Found<TenantRecord>, String> {
    let mut tenants = directory.tenants().map_err(text)?.into_iter();
    let found = tenants.find(|t| t.record.name == name);
    found.ok_or_else(|| format!("there is no tenant {name}"))
}

/// Why a tenant cannot go back here and now.
fn refusal(record: &TenantRecord, node: &str) -> Option<String> {
    let name = &record.name;
    if let Some(why) = record.deleted() {
        return Some(format!("tenant {name}: {why}"));
    }
    if !record.formed || record.incarnation == 0 {
        return Some(format!("tenant {name} holds nothing yet"));
    }
    if let Some(task) = &record.key_task {
        return Some(format!(
            "tenant {name}: {task} is under way; try again once it is done"
        ));
    }
    let placed = record.placement.iter().any(|placed| placed == node);
    (!placed).then(|| {
        let placement = record.placement.join(", ");
        format!("tenant {name} is placed on nodes {placement}: ask one of them")
    })
}
