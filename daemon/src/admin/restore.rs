//! Restoring a region onto this node, from its bucket alone.
//!
//! The directory first, then tenants in the order of their deadlines, a few at a time. Each ends as
//! a group of one member, this node; the other nodes then join through the controllers, as any node
//! does that comes back empty. A tenant that is refused does not hold up the others. The work goes
//! on if the operator's connection is lost; its outcome is in the log then.
//!
//! Asked again of a node that serves the directory, it restores the tenants that are still lost:
//! those that were refused, and those that a restore which died had not come to. A tenant is lost
//! if its group was formed and no node of its placement holds anything of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kms::{Secret, TenantKeys, WrappedKey};
use object_store::ObjectStoreExt;
use replication::GroupId;
use replication::archive::bucket::Bootstrap;
use replication::archive::chain::Chain;
use replication::group::{Group, SnapshotDir};
use replication::restore::{self, Plan, Progress, REVISION_JUMP, Restored, plan};
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::codegen::BoxStream;

use crate::directory::records::{LinkRecord, TenantRecord};
use crate::directory::{Directory, DirectoryError, Found};
use crate::limits;
use crate::node::{Node, NodeState};
use crate::proto::admin::{Outcome, RestoreEvent};
use crate::tenant;
use crate::tenant::key::now_ms;

/// How long a node may take to say whether it holds anything of a tenant.
const SAY_WITHIN: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_millis(200);

type Events = mpsc::Sender<Result<RestoreEvent, Status>>;

pub fn start(node: Arc<Node>, lost_at_ms: u64) -> Result<BoxStream<RestoreEvent>, Status> {
    if *node.state.read() == NodeState::Starting {
        return Err(Status::failed_precondition(format!(
            "node {} is starting: try again",
            node.config.name
        )));
    }
    let (events, stream) = mpsc::channel(256);
    tokio::spawn(async move {
        let Ok(_one) = node.restoring.try_acquire() else {
            let busy = Status::already_exists("a restore is under way on this node");
            let _ = events.send(Err(busy)).await;
            return;
        };
        let run = Arc::new(Run {
            started: Instant::now(),
            lost_at_ms: if lost_at_ms == 0 {
                now_ms()
            } else {
                lost_at_ms
            },
            id: hex::encode(kms::secret::random_bytes::<8>()),
            node: node.clone(),
            events: events.clone(),
        });
        if let Err(why) = run.region().await {
            tracing::error!(%why, "the region is not restored");
            let _ = events.send(Err(Status::failed_precondition(why))).await;
        }
    });
    Ok(Box::pin(tokio_stream::wrappers::ReceiverStream::new(
        stream,
    )))
}

struct Run {
    started: Instant,
    lost_at_ms: u64,
    /// Random id of this restore.
    id: String,
    node: Arc<Node>,
    events: Events,
}

impl Run {
    async fn event(&self, tenant: &str, phase: &str, message: String) {
        let event = RestoreEvent {
            tenant: tenant.into(),
            phase: phase.into(),
            message,
            ..RestoreEvent::default()
        };
        let _ = self.events.send(Ok(event)).await;
    }

    async fn region(self: &Arc<Self>) -> Result<(), String> {
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
                    Err(why) => self.event(&tenant.record.name, "refused", why).await,
                }
            }
            return self.tenants(directory, key, lost).await;
        }
        // Whatever still runs of the old region is fenced by the chains that are closed.
        let (directory, key) = self.directory().await?;
        let all = directory.tenants().map_err(|e| e.to_string())?;
        self.tenants(directory, key, all).await
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
        let (group, _, _) = self
            .restore_group("directory", first, keys, &archive_key, 0, 1)
            .await?;
        node.save_region(group.id(), false)?;
        node.open_directory(group.id()).await?;
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
    ) -> Result<(), String> {
        // Nothing is left of one that is being destroyed, nor should it be brought back.
        tenants.retain(|t| !t.record.is_destroying() && !t.record.is_due());
        tenants.sort_by_key(|t| (t.record.tier, t.record.rto_ms));
        let links = directory.links().map_err(|e| e.to_string())?;
        let links: Vec<LinkRecord> = links.into_iter().map(|found| found.record).collect();
        let at_once = Arc::new(Semaphore::new(limits::RESTORES));
        let mut running = JoinSet::new();
        for tenant in tenants {
            // Taken here: tenants begin in the order of their deadlines.
            let Ok(permit) = at_once.clone().acquire_owned().await else {
                break;
            };
            let (run, directory, key) = (self.clone(), directory.clone(), archive_key.clone());
            let link = links.iter().find(|l| l.tenant == tenant.record.id).cloned();
            running.spawn(async move {
                run.tenant(&directory, &key, link, tenant).await;
                drop(permit);
            });
        }
        while running.join_next().await.is_some() {}
        Ok(())
    }

    /// Records the new incarnation, unless a later one is recorded already.
    async fn record(
        &self,
        directory: &Directory,
        record: &TenantRecord,
        mut modified: i64,
    ) -> Result<(), String> {
        let mut newest = record.clone();
        loop {
            match directory.put_tenant(&newest, modified).await {
                Err(DirectoryError::Conflict(_)) => {}
                done => return done.map_err(|e| e.to_string()),
            }
            let barrier = directory.group().read_barrier().await;
            barrier.map_err(|e| e.to_string())?;
            let tenants = directory.tenants().map_err(|e| e.to_string())?;
            let known = tenants.into_iter().find(|t| t.record.id == record.id);
            let known = known.ok_or("the tenant's record is gone")?;
            if known.record.incarnation >= record.incarnation {
                return Err(format!(
                    "another restore has recorded incarnation {}",
                    known.record.incarnation
                ));
            }
            modified = known.modified;
            // Whatever else was changed meanwhile stays.
            newest = TenantRecord {
                incarnation: record.incarnation,
                formed: record.formed,
                ..known.record
            };
        }
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
    ) {
        let mut record = found.record;
        let name = record.name.clone();
        let known = link
            .filter(|l| l.incarnation == record.incarnation)
            .map_or(0, |l| l.link);
        let majority = record.placement.len() / 2 + 1;
        tracing::info!(tenant = %record.id, "restoring");
        let restored = async {
            // Those that the record names: a node that joins holds no others.
            let keys = tenant::wrapped(&self.node.parts, &record).await;
            let keys = Arc::new(keys.map_err(|e| e.to_string())?);
            let (group, restored, plan) = self
                .restore_group(&name, record.group(), keys, archive_key, known, majority)
                .await?;
            record.incarnation = group.id().incarnation;
            record.formed = true;
            if let Err(why) = self.record(directory, &record, found.modified).await {
                let tenants = directory.tenants().unwrap_or_default();
                let known = tenants.iter().find(|t| t.record.id == record.id);
                if known.is_some_and(|t| t.record.incarnation >= record.incarnation) {
                    // It was not heard that it was, or another restore was faster.
                    return Err(why);
                }
                // Nobody would look after its keys.
                group.seal("it was not restored here").await;
                self.node.parts.groups.remove(group.id());
                group.shutdown().await;
                return Err(why);
            }
            Ok::<_, String>((restored, plan))
        };
        match restored.await {
            Ok((restored, newest_ms)) => {
                let outcome = Outcome {
                    tier: record.tier.name().into(),
                    rpo_ms: record.rpo_ms,
                    actual_rpo_ms: self.lost_at_ms.saturating_sub(newest_ms),
                    rto_ms: record.rto_ms,
                    actual_rto_ms: self.started.elapsed().as_millis() as u64,
                    revision: restored.state.revision,
                    digest_matches: true,
                };
                tracing::info!(tenant = %record.id, rto_ms = outcome.actual_rto_ms, "tenant is restored");
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
                self.event(&name, "refused", why).await;
            }
        }
    }

    /// The chain that a group's newest state is on: past every closed one whose successor began.
    async fn current(
        &self,
        first: GroupId,
        archive_key: &Secret,
        known: u64,
    ) -> Result<(Chain, Plan), String> {
        let chain_of =
            |group| Chain::new(self.node.parts.bucket.clone(), archive_key.clone(), group);
        let mut chain = chain_of(first);
        let mut plan = plan::newest(&chain, known)
            .await
            .map_err(|e| e.to_string())?;
        while let Some(closed) = plan.tail().closed().cloned() {
            let next = chain_of(GroupId {
                incarnation: closed.incarnation,
                ..first
            });
            if next.numbers(0).await.map_err(|e| e.to_string())?.is_empty() {
                break;
            }
            plan = plan::newest(&next, 0).await.map_err(|e| e.to_string())?;
            chain = next;
        }
        Ok((chain, plan))
    }

    /// Plan, close, fetch, replay, verify, found. Answers the group, what was restored and when
    /// its newest write was made.
    async fn restore_group(
        &self,
        name: &str,
        first: GroupId,
        keys: Arc<TenantKeys>,
        archive_key: &Secret,
        known: u64,
        min_voters: usize,
    ) -> Result<(Arc<Group>, Restored, u64), String> {
        let parts = &self.node.parts;
        let (chain, mut plan) = self.current(first, archive_key, known).await?;
        let newest_ms = plan.newest_ms();
        self.event(name, "planned", format!("{} links", plan.total_links()))
            .await;
        // Before anything is served: what still runs of the old region stops here.
        let group = restore::close(&chain, &mut plan, &self.id)
            .await
            .map_err(|e| e.to_string())?;
        let closing = plan.tail().number + u64::from(plan.tail().closed().is_none());
        let (events, tenant) = (self.events.clone(), name.to_string());
        let report = Arc::new(move |progress: Progress| {
            let (phase, done, total) = match progress {
                Progress::Fetched { bytes, total } => ("fetched", bytes, total),
                Progress::Replayed { links, total } => ("replayed", links, total),
                Progress::Counting => return true,
                Progress::Verified => ("verified", 1, 1),
            };
            let event = RestoreEvent {
                tenant: tenant.clone(),
                phase: phase.into(),
                done,
                total,
                ..RestoreEvent::default()
            };
            // A slow terminal does not slow the restore.
            let _ = events.try_send(Ok(event));
            true
        });
        let dir = parts.data_dir.join("restore").join(group.to_string());
        let restored = restore::rebuild(
            &chain,
            &plan,
            group,
            keys.clone(),
            parts.budget.clone(),
            &dir,
            report,
        )
        .await
        .map_err(|e| e.to_string())?;
        debug_assert!(restored.state.revision >= REVISION_JUMP);
        let base = restore::base(&plan, &restored, closing);
        let next = Chain::new(parts.bucket.clone(), archive_key.clone(), group);
        restore::open_chain(&next, &restored, base, &self.id)
            .await
            .map_err(|e| e.to_string())?;
        let rpo = self.rpo_of(name);
        let opened = parts
            .open(
                group,
                Ok(keys),
                rpo,
                archive_key.clone(),
                self.node.report(),
                min_voters,
            )
            .await?;
        self.node.set_archive_key(archive_key.clone());
        opened
            .found_from(
                SnapshotDir {
                    path: restored.checkpoint.clone(),
                    state: restored.state.clone(),
                },
                &self.node.config.peer_address.to_string(),
            )
            .await
            .map_err(|e| e.to_string())?;
        let _ = tokio::fs::remove_dir_all(&dir).await;
        Ok((opened, restored, newest_ms))
    }

    fn rpo_of(&self, name: &str) -> Duration {
        let tenants = self
            .node
            .directory()
            .and_then(|d| d.tenants().ok())
            .unwrap_or_default();
        let found = tenants.iter().find(|t| t.record.name == name);
        found.map_or(Duration::ZERO, |t| Duration::from_millis(t.record.rpo_ms))
    }
}
