//! Making a new tenant of one as it was at a moment, under a key of its own.
//!
//! Invariants. The tenant that it is made of is only read. The new one is recorded, as one that is not
//! made yet (incarnation 0), before anything of it is in the bucket or on a disk: whatever a crash
//! leaves goes when it is deleted by its name. It is served once its state, counted anew from its
//! rows, is in the bucket as a checkpoint, so that its archive needs no other tenant's key.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kms::{TenantId, TenantKeys, WrappedKey};
use replication::GroupId;
use replication::archive::chain::Chain;
use replication::clock::utc;
use replication::failpoint::failpoint;
use replication::group::Group;
use replication::mvcc::digest::Digest;
use replication::restore::{self, Point, Rebuilt, plan};

use super::tenant::find;
use super::{Run, Wanted, came};
use crate::admin::creation::New;
use crate::directory::records::{EventKind, TenantRecord};
use crate::directory::{Directory, Found, controller};
use crate::proto::admin::RestoreEvent;
use crate::tenant;
use crate::tenant::key::now_ms;
use crate::tenant::rewriting::room;

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

impl Run {
    pub(super) async fn copy(&self, name: &str, point: Point, new: New) -> Result<(), String> {
        let (directory, source) = self.of_a_tenant(name, point).await?;
        if let Some(why) = source.withheld() {
            return Err(format!("tenant {name}: {why}"));
        }
        let settled = self.settle(&source).await?;
        let known = directory.newest_link(&source).map_err(text)?;
        let keys = tenant::wrapped(&self.node.parts, &source).await;
        let keys = Arc::new(keys.map_err(text)?);
        let served = self.node.parts.groups.get(source.group());
        let served = served.ok_or("this node has not opened the tenant yet")?;
        // Sealing that tenant waits for them; it may have been sealed by now.
        served.replica().lend(&keys);
        if let Some(why) = served.sealed() {
            return Err(format!("tenant {name} is sealed: {why}"));
        }
        let archive_key = self.node.archive_key();
        let archive_key = archive_key.ok_or("the archive key is not known yet")?;
        let from = Wanted {
            name: &new.name,
            first: source.group(),
            keys,
            archive_key: &archive_key,
            known,
            majority: source.placement.len() / 2 + 1,
            rpo: Duration::from_millis(source.rpo_ms),
            point,
            settled,
            served: Some(served),
            told: self.node.report(),
        };
        let (chain, end) = self.current(&from).await.map_err(text)?;
        let mut plan = plan::at(&chain, &end, point).await.map_err(text)?;
        let dir = self.scratch(chain.group());
        let rebuilt = self.rebuild(&chain, &mut plan, &dir.0, &from).await?;
        came(&rebuilt, &plan, &chain, &from)?;
        let data_dir = &self.node.parts.data_dir;
        room(data_dir, plan.checkpoint_bytes() + 2 * plan.log_bytes())?;

        let record = self.recorded(&source, &new).await;
        let (record, keys) = record.map_err(|why| {
            let name = &new.name;
            format!("{why}; if tenant {name} is recorded, delete it with 'holdfast tenant delete {name} --grace 0s'")
        })?;
        let keys = Arc::new(keys);
        failpoint("copy-recorded");
        let made = self.made(&directory, &record, keys, from, rebuilt, &dir.0);
        let ((revision, time_ms), digest) = made.await.map_err(|why| {
            let name = &new.name;
            format!("{why}; tenant {name} is recorded and not made: delete it with 'holdfast tenant delete {name} --grace 0s' before you try again")
        })?;
        let said = format!(
            "tenant {} is tenant {name} as it was at revision {revision}, effective time {}; its digest under its own key is {digest}",
            new.name,
            utc(time_ms)
        );
        tracing::info!(tenant = %record.id, "{said}");
        self.node.event(&record, EventKind::Restored, said.clone());
        let event = RestoreEvent {
            tenant: new.name,
            phase: "serving".into(),
            message: said,
            ..RestoreEvent::default()
        };
        let _ = self.events.send(Ok(event)).await;
        Ok(())
    }

    /// Makes a tenant that is recorded; answers the revision and moment that it came to, and its digest.
    async fn made(
        &self,
        directory: &Directory,
        record: &TenantRecord,
        keys: Arc<TenantKeys>,
        from: Wanted<'_>,
        rebuilt: Rebuilt,
        dir: &Path,
    ) -> Result<((i64, u64), Digest), String> {
        let group = GroupId {
            tenant: record.id,
            incarnation: 1,
        };
        let is_open = |group: &Arc<Group>| group.sealed().is_none();
        let go_on = || from.served.as_ref().is_none_or(is_open);
        let came_to = (rebuilt.state.revision, rebuilt.state.time_ms);
        let budget = &self.node.parts.budget;
        let (founder, dir) = (self.founder(), dir.join("copy"));
        let copied = rebuilt.copy_to(group, &founder, keys.clone(), budget, &dir, go_on);
        let copied = copied.map_err(text)?;
        failpoint("copy-made");
        let to = Wanted {
            first: group,
            keys,
            known: 0,
            majority: record.placement.len() / 2 + 1,
            point: Point::Newest,
            settled: true,
            served: None,
            ..from
        };
        // The other tenant's are needed no more.
        drop(from.keys);
        let bucket = self.node.parts.bucket.clone();
        let chain = Chain::new(bucket, to.archive_key.clone(), group);
        self.unchanged(directory, record).await?;
        let begun = restore::begin_chain(&chain, &copied, &self.id).await;
        let begun = begun.map_err(text)?;
        failpoint("copy-uploaded");
        self.unchanged(directory, record).await?;
        let opened = self.found(&copied, begun, &to).await?;
        let recorded = async {
            let found = self.unchanged(directory, record).await?;
            let current = TenantRecord {
                incarnation: 1,
                restoring: None,
                ..found.record
            };
            let put = directory.put_tenant(&current, found.modified).await;
            put.map_err(text)
        };
        match recorded.await {
            Ok(()) => Ok((came_to, copied.state.digests.keys)),
            Err(why) => {
                let made = TenantRecord {
                    incarnation: 1,
                    ..record.clone()
                };
                self.give_up(directory, &made, &opened).await;
                Err(why)
            }
        }
    }

    /// The record of a tenant that is being made, as long as nobody has deleted it.
    async fn unchanged(
        &self,
        directory: &Directory,
        record: &TenantRecord,
    ) -> Result<Found<TenantRecord>, String> {
        directory.group().read_barrier().await.map_err(text)?;
        let found = find(directory, &record.name)?;
        let now = &found.record;
        let same = (now.id, now.incarnation, &now.restoring) == (record.id, 0, &record.restoring);
        match same && now.deletion.is_none() {
            true => Ok(found),
            false => Err("it was deleted or changed meanwhile".into()),
        }
    }

    /// Records a tenant that is not made yet, with its key.
    async fn recorded(
        &self,
        source: &TenantRecord,
        new: &New,
    ) -> Result<(TenantRecord, TenantKeys), String> {
        let node = &self.node;
        let directory = node.directory().ok_or("there is no directory yet")?;
        let placement = controller::place_with(&directory, &node.record())?;
        let id = TenantId::random();
        let region = node.config.region;
        let made = WrappedKey::create(&node.parts.providers, &new.key, id, region).await;
        let (wrapped, keys) = made.map_err(text)?;
        let record = TenantRecord {
            name: new.name.clone(),
            id,
            incarnation: 0,
            key: new.key.clone(),
            generation: wrapped.generation,
            fingerprint: wrapped.fingerprint.clone(),
            placement,
            formed: true,
            other_generations: Vec::new(),
            key_task: None,
            rotated_ms: now_ms(),
            deletion: None,
            restoring: Some(format!(
                "it is being made of tenant {} (restore {})",
                source.name, self.id
            )),
            ..source.clone()
        };
        directory.put_tenant(&record, 0).await.map_err(text)?;
        // The key is durable before anything is sealed under it.
        node.parts.keys.create(&wrapped).await.map_err(text)?;
        keys.begin_under(wrapped.generation);
        Ok((record, keys))
    }
}
