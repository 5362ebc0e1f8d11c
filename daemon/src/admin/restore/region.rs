//! Restoring a region: the directory first, then tenants in the order of their deadlines, a few at a
//! time. A tenant that is refused does not hold up the others.
//!
//! Asked again of a node that serves the directory, it restores the tenants that are still lost:
//! those that were refused, and those that a restore which died had not come to. A tenant is lost
//! if its group was formed and no node of its placement holds anything of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kms::{Secret, WrappedKey};
use object_store::ObjectStoreExt;
use replication::GroupId;
use replication::archive::bucket::Bootstrap;
use replication::restore::Point;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Recovered, Run, Wanted};
use crate::directory::joins::Hold;
use crate::directory::records::{LinkRecord, TenantRecord};
use crate::directory::{Directory, Found};
use crate::limits;
use crate::proto::admin::{Outcome, RestoreEvent};
use crate::tenant;

/// How long a node may take to say whether it holds anything of a tenant.
const SAY_WITHIN: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What the tenants of a region are restored to.
#[derive(Clone, Copy)]
struct Aim {
    lost_at_ms: u64,
    point: Point,
}

impl Run {
    /// The directory is restored to its newest state, whatever the moment.
    pub(super) async fn region(
        self: &Arc<Self>,
        lost_at_ms: u64,
        point: Point,
    ) -> Result<(), String> {
        let lost_at_ms = match lost_at_ms {
            0 => self.asked_ms,
            given => given,
        };
        self.lost_tenants(Aim { lost_at_ms, point }).await?;
        let point_ms = match point {
            Point::Time(ms) => Some(ms),
            Point::Newest | Point::Revision(_) => None,
        };
        self.report(lost_at_ms, point_ms).await;
        Ok(())
    }

    async fn lost_tenants(self: &Arc<Self>, aim: Aim) -> Result<(), String> {
        if matches!(aim.point, Point::Time(ms) if ms > self.asked_ms) {
            return Err("that moment has not come yet".into());
        }
        if let Some(directory) = self.node.directory() {
            let barrier = directory.group().read_barrier().await;
            barrier.map_err(|e| e.to_string())?;
            let key = self.node.archive_key();
            let key = key.ok_or("the archive key is not known yet")?;
            let mut lost = Vec::new();
            for tenant in directory.tenants().map_err(|e| e.to_string())? {
                match self.is_lost(&directory, &tenant.record).await {
                    Ok(true) => lost.push(tenant),
                    Ok(false) => {}
                    Err(why) => self.refused(&tenant.record, why).await,
                }
            }
            let hold = self.node.joins.hold(false);
            return self.tenants(directory, key, lost, aim, &hold).await;
        }
        let hold = self.node.joins.hold(true);
        // Whatever still runs of the old region is fenced by the chains that are closed.
        let (directory, key) = self.directory().await?;
        let all = directory.tenants().map_err(|e| e.to_string())?;
        self.tenants(directory, key, all, aim, &hold).await
    }

    /// Restores the directory; answers it and the region's archive key.
    async fn directory(&self) -> Result<(Directory, Secret), String> {
        let node = &self.node;
        let got = node
            .parts
            .bucket
            .get(&Bootstrap::path())
            .await
            .map_err(|e| e.to_string())?;
        let bytes = got.bytes().await.map_err(|e| e.to_string())?;
        let bootstrap = Bootstrap::decode(&bytes)?;
        if bootstrap.region != node.config.region {
            return Err(format!(
                "the bucket holds region {}, this node is of region {}: refused",
                bootstrap.region, node.config.region
            ));
        }
        let first = GroupId {
            tenant: bootstrap.directory,
            incarnation: 1,
        };
        let wrapped = node.parts.keys.fetch_all(first.tenant).await;
        let wrapped = wrapped.map_err(|e| e.to_string())?;
        let keys = WrappedKey::unwrap(&wrapped, &node.parts.providers).await;
        let keys = Arc::new(keys.map_err(|e| e.to_string())?);
        let archive_key = keys.archive_key();
        let wanted = Wanted {
            name: "directory",
            first,
            keys,
            archive_key: &archive_key,
            known: 0,
            majority: 1,
            rpo: Duration::ZERO,
            point: Point::Newest,
            settled: true,
            served: None,
            told: node.directory_report(),
        };
        let done = self.restore_group(&wanted, async { Ok(()) }).await?;
        node.save_region(done.group.id(), false)?;
        node.open_directory(done.group.id()).await?;
        let directory = node.directory().ok_or("the directory is not open")?;
        self.event("directory", "serving", String::new()).await;
        Ok((directory, archive_key))
    }

    /// Restores tenants, in the order of their deadlines.
    async fn tenants(
        self: &Arc<Self>,
        directory: Directory,
        archive_key: Secret,
        mut tenants: Vec<Found<TenantRecord>>,
        aim: Aim,
        hold: &Hold<'_>,
    ) -> Result<(), String> {
        // Nothing is left of one that is being destroyed, nor should it be brought back; a copy that
        // was not made has nothing yet.
        tenants.retain(|t| {
            let record = &t.record;
            record.incarnation > 0 && !record.is_destroying() && !record.is_due()
        });
        tenants.sort_by_key(|t| (t.record.tier, t.record.rto_ms));
        for tenant in &tenants {
            let event = RestoreEvent {
                tenant: tenant.record.name.clone(),
                phase: "waiting".into(),
                deadline_ms: self.asked_ms + tenant.record.rto_ms,
                ..RestoreEvent::default()
            };
            let _ = self.events.send(Ok(event)).await;
        }
        let links = directory.links().map_err(|e| e.to_string())?;
        let links: Vec<LinkRecord> = links.into_iter().map(|found| found.record).collect();
        let at_once = Arc::new(Semaphore::new(limits::RESTORES));
        let mut running = JoinSet::new();
        hold.tenants(tenants.iter().map(|t| (t.record.tier, t.record.id)));
        let mut before = None;
        for tenant in tenants {
            let tier = tenant.record.tier;
            if before.replace(tier).is_some_and(|before| before != tier) {
                // What is less urgent takes no share of the network and disk, but is not held up by one
                // that hangs.
                let all = async { while running.join_next().await.is_some() {} };
                let _ = tokio::time::timeout(limits::TIER_FIRST, all).await;
            }
            // Taken here: tenants begin in the order of their deadlines.
            let Ok(permit) = at_once.clone().acquire_owned().await else {
                break;
            };
            let (run, directory, key) = (self.clone(), directory.clone(), archive_key.clone());
            let link = links.iter().find(|l| l.tenant == tenant.record.id).cloned();
            running.spawn(async move {
                let id = tenant.record.id;
                run.tenant(&directory, &key, link, tenant, aim).await;
                run.node.joins.done(tier, id);
                drop(permit);
            });
        }
        while running.join_next().await.is_some() {}
        Ok(())
    }

    /// Whether nothing of a tenant is left on the nodes that it is placed on.
    async fn is_lost(&self, directory: &Directory, record: &TenantRecord) -> Result<bool, String> {
        if !record.formed {
            return Ok(false);
        }
        let nodes = directory.nodes().map_err(|e| e.to_string())?;
        let placed = nodes
            .iter()
            .filter(|n| record.placement.contains(&n.record.name));
        for node in placed {
            let deadline = Instant::now() + SAY_WITHIN;
            loop {
                match self.node.holds(&node.record, record.group()).await {
                    Some(true) => return Ok(false),
                    Some(false) => break,
                    // It may be opening its replica.
                    None if Instant::now() < deadline => tokio::time::sleep(ASK_AGAIN).await,
                    None => {
                        return Err(format!(
                            "node {} does not answer or has not opened its replica, and may hold the tenant: start it, or replace it by an empty one, and restore again",
                            node.record.name
                        ));
                    }
                }
            }
        }
        Ok(true)
    }

    async fn tenant(
        &self,
        directory: &Directory,
        archive_key: &Secret,
        link: Option<LinkRecord>,
        found: Found<TenantRecord>,
        aim: Aim,
    ) {
        let mut record = found.record;
        let name = record.name.clone();
        let known = link
            .filter(|l| l.incarnation == record.incarnation)
            .map_or(0, |l| l.link);
        tracing::info!(tenant = %record.id, "restoring");
        let restored = async {
            // Those that the record names: a node that joins holds no others.
            let keys = tenant::wrapped(&self.node.parts, &record).await;
            let keys = Arc::new(keys.map_err(|e| e.to_string())?);
            let wanted = Wanted {
                name: &name,
                first: record.group(),
                keys,
                archive_key,
                known,
                majority: record.placement.len() / 2 + 1,
                rpo: Duration::from_millis(record.rpo_ms),
                point: aim.point,
                // Nothing of it is left but the archive.
                settled: true,
                served: None,
                told: self.node.report(),
            };
            let done = self.restore_group(&wanted, async { Ok(()) }).await?;
            let group = &done.group;
            record.incarnation = group.id().incarnation;
            record.restoring = None;
            record.formed = true;
            if let Err(why) = self.record(directory, &record, found.modified).await {
                self.give_up(directory, &record, group).await;
                return Err(why);
            }
            Ok::<_, String>(done)
        };
        match restored.await {
            Ok(done) => {
                let outcome = Outcome {
                    tier: record.tier.name().into(),
                    rpo_ms: record.rpo_ms,
                    actual_rpo_ms: aim.lost_at_ms.saturating_sub(done.came_to.1),
                    rto_ms: record.rto_ms,
                    actual_rto_ms: self.started.elapsed().as_millis() as u64,
                    revision: done.restored.state.revision,
                    digest_matches: true,
                };
                if aim.point != Point::Newest {
                    // What it began with may go with the window that it lies in.
                    done.group.want_checkpoint();
                }
                tracing::info!(tenant = %record.id, rto_ms = outcome.actual_rto_ms, "tenant is restored");
                self.recovered.lock().push(Recovered {
                    rpo_ms: outcome.actual_rpo_ms,
                    rto_ms: outcome.actual_rto_ms,
                    revision: outcome.revision,
                    digest: done.restored.state.digests.keys.to_string(),
                    ..Recovered::refused(&record, "")
                });
                let event = RestoreEvent {
                    tenant: name,
                    phase: "serving".into(),
                    outcome: Some(outcome),
                    ..RestoreEvent::default()
                };
                let _ = self.events.send(Ok(event)).await;
            }
            Err(why) => {
                tracing::error!(tenant = %record.id, %why, "tenant is not restored");
                self.refused(&record, why).await;
            }
        }
    }

    async fn refused(&self, record: &TenantRecord, why: String) {
        self.recovered.lock().push(Recovered::refused(record, &why));
        self.event(&record.name, "refused", why).await;
    }
}
