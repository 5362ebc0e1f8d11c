//! Restoring a region onto this node, from its bucket alone.
//!
//! The directory first, then tenants in the order of their deadlines, a few at a time. Each ends as
//! a group of one member, this node; the other nodes then join through the controllers, as any node
//! does that comes back empty. A tenant that is refused does not hold up the others. The work goes
//! on if the operator's connection is lost; its outcome is in the log then.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kms::TenantKeys;
use kms::secret::Secret;
use object_store::ObjectStoreExt;
use replication::GroupId;
use replication::archive::bucket::Bootstrap;
use replication::archive::chain::Chain;
use replication::group::Group;
use replication::restore::{self, Plan, Progress, REVISION_JUMP, Restored, plan};
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::codegen::BoxStream;

use crate::directory::records::{LinkRecord, TenantRecord};
use crate::directory::{Directory, Found};
use crate::limits;
use crate::node::{Node, NodeState};
use crate::proto::admin::{Outcome, RestoreEvent};

type Events = mpsc::Sender<Result<RestoreEvent, Status>>;

pub fn start(node: Arc<Node>, lost_at_ms: u64) -> Result<BoxStream<RestoreEvent>, Status> {
    if *node.state.read() != NodeState::AwaitingRestore {
        return Err(Status::failed_precondition(format!(
            "node {} is {}: a region is restored onto nodes whose data directories are empty",
            node.config.name,
            node.state.read().name()
        )));
    }
    let (events, stream) = mpsc::channel(256);
    tokio::spawn(async move {
        let Ok(_one) = node.restoring.try_lock() else {
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

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64
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
        let node = &self.node;
        let got = node
            .parts
            .bucket
            .get(&Bootstrap::path())
            .await
            .map_err(|e| e.to_string())?;
        let bytes = got.bytes().await.map_err(|e| e.to_string())?;
        let bootstrap: Bootstrap =
            serde_json::from_slice(&bytes).map_err(|e| format!("bootstrap.json: {e}"))?;
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
        let keys = self.keys(first).await?;
        let archive_key = keys.archive_key();
        let (group, _, _) = self
            .restore_group("directory", first, keys, &archive_key, 0, 1)
            .await?;
        node.save_region(group.id())?;
        node.open_directory(group.id()).await?;
        let directory = node.directory().ok_or("the directory is not open")?;
        self.event("directory", "serving", String::new()).await;

        let mut tenants = directory.tenants().map_err(|e| e.to_string())?;
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
        let restored = async {
            let keys = self.keys(record.group()).await?;
            let (group, restored, plan) = self
                .restore_group(&name, record.group(), keys, archive_key, known, majority)
                .await?;
            record.incarnation = group.id().incarnation;
            record.formed = true;
            directory
                .put_tenant(&record, found.modified)
                .await
                .map_err(|e| e.to_string())?;
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

    async fn keys(&self, group: GroupId) -> Result<Arc<TenantKeys>, String> {
        let parts = &self.node.parts;
        let wrapped = parts
            .keys
            .fetch(group.tenant)
            .await
            .map_err(|e| e.to_string())?;
        let keys = wrapped
            .unwrap(&parts.providers)
            .await
            .map_err(|e| e.to_string())?;
        Ok(Arc::new(keys))
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
        });
        let dir = parts.data_dir.join("restore").join(group.to_string());
        let restored = restore::rebuild(
            &chain,
            &plan,
            group,
            keys,
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
                rpo,
                Some(archive_key.clone()),
                self.node.report(),
                min_voters,
            )
            .await?;
        self.node.set_archive_key(archive_key.clone());
        opened
            .found_from(
                restored.checkpoint.clone(),
                restored.position,
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
