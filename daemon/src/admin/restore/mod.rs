//! Restores onto this node, from the bucket alone: a region (`region`), a tenant back to an earlier
//! moment (`tenant`), or as a new one beside it (`copy`).
//!
//! Each tenant ends as a group of one member, this node; the other nodes then join through the
//! controllers, as any node does that comes back empty. The work goes on if the operator's
//! connection is lost; its outcome is in the log then.
//!
//! Invariants. The newest state is restored only once the chain that it is on is closed, so that
//! nothing is added behind it. An earlier moment is restored and verified before the chain is closed:
//! a tenant that cannot go back there goes on as it is.

mod copy;
mod region;
mod report;
mod tenant;

pub use report::{Recovered, Report};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kms::{Secret, TenantKeys};
use replication::GroupId;
use replication::archive::archiver::Report as Told;
use replication::archive::chain::{Chain, End, Tail};
use replication::failpoint::failpoint;
use replication::group::Group;
use replication::group::founding::Founder;
use replication::mvcc::digest::Digests;
use replication::restore::{self, Plan, Point, Progress, Rebuilt, RestoreError, Restored, plan};
use tokio::sync::{Semaphore, mpsc};
use tonic::Status;
use tonic::codegen::BoxStream;

use super::creation::New;
use crate::directory::records::TenantRecord;
use crate::directory::{Directory, DirectoryError};
use crate::limits;
use crate::node::{Node, NodeState};
use crate::proto::admin::RestoreEvent;
use crate::tenant::key::now_ms;
use crate::tenant::rewriting::room;
use crate::tenant::{Opening, RESTORE};

/// What is asked for.
pub enum Asked {
    /// Every tenant of the region that is lost, as it was at a moment.
    Region {
        /// When the region was lost, milliseconds since 1970; 0: now.
        lost_at_ms: u64,
        point: Point,
    },
    /// One tenant of a region that serves, back to a moment.
    Tenant { name: String, point: Point },
    /// A new tenant, made of one as it was at a moment.
    Copy {
        name: String,
        point: Point,
        new: New,
    },
}

type Events = mpsc::Sender<Result<RestoreEvent, Status>>;

pub fn start(node: Arc<Node>, asked: Asked) -> Result<BoxStream<RestoreEvent>, Status> {
    if *node.state.read() == NodeState::Starting {
        return Err(Status::failed_precondition(format!(
            "node {} is starting: try again",
            node.config.name
        )));
    }
    let (events, stream) = mpsc::channel(256);
    tokio::spawn(async move {
        let one = match &asked {
            Asked::Region { .. } => &node.restoring,
            Asked::Tenant { .. } | Asked::Copy { .. } => &node.going_back,
        };
        let Ok(_one) = one.try_acquire() else {
            let busy = Status::already_exists("a restore is under way on this node");
            let _ = events.send(Err(busy)).await;
            return;
        };
        let run = Arc::new(Run {
            started: Instant::now(),
            asked_ms: now_ms(),
            id: hex::encode(kms::secret::random_bytes::<8>()),
            node: node.clone(),
            events: events.clone(),
            recovered: parking_lot::Mutex::default(),
            replays: Semaphore::new(limits::REPLAYS),
        });
        let done = match asked {
            Asked::Region { lost_at_ms, point } => run.region(lost_at_ms, point).await,
            Asked::Tenant { name, point } => run.go_back(&name, point).await,
            Asked::Copy { name, point, new } => run.copy(&name, point, new).await,
        };
        if let Err(why) = done {
            tracing::error!(%why, "not restored");
            let _ = events.send(Err(Status::failed_precondition(why))).await;
        }
    });
    Ok(Box::pin(tokio_stream::wrappers::ReceiverStream::new(
        stream,
    )))
}

struct Run {
    started: Instant,
    /// Milliseconds since 1970.
    asked_ms: u64,
    /// Random id of this restore.
    id: String,
    node: Arc<Node>,
    events: Events,
    recovered: parking_lot::Mutex<Vec<Recovered>>,
    replays: Semaphore,
}

/// What a group is restored from and to.
struct Wanted<'a> {
    name: &'a str,
    /// The newest incarnation that is known.
    first: GroupId,
    keys: Arc<TenantKeys>,
    archive_key: &'a Secret,
    /// The newest link of it that is known.
    known: u64,
    /// Voters without which it does not write.
    majority: usize,
    rpo: Duration,
    point: Point,
    /// All that was acknowledged is in the archive.
    settled: bool,
    /// What is served of it: its key must not be held in memory any longer than there.
    served: Option<Arc<Group>>,
    /// Told of each link of its new chain.
    told: Told,
}

/// Where a restore is made; it goes with this.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether a moment was come to, and there was something then.
fn came(rebuilt: &Rebuilt, plan: &Plan, chain: &Chain, wanted: &Wanted<'_>) -> Result<(), String> {
    if rebuilt.state.digests == Digests::default() {
        return Err("nothing was written yet at that moment".into());
    }
    // A later incarnation proves the end of the one before it.
    let ended = rebuilt.ended || plan.group != chain.group();
    if !wanted.settled && matches!(wanted.point, Point::Time(_)) && !ended {
        return Err("the archive ends before that moment, and this node cannot say whether more was acknowledged: ask another node, or name an earlier moment".into());
    }
    Ok(())
}

struct Done {
    group: Arc<Group>,
    restored: Restored,
    /// Revision and effective time of the moment that was restored.
    came_to: (i64, u64),
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
                restoring: None,
                ..known.record
            };
        }
    }

    /// The chain that a group's newest state is on, past every closed one whose successor began, and how
    /// it ends.
    async fn current(&self, wanted: &Wanted<'_>) -> Result<(Chain, End), RestoreError> {
        let (bucket, key) = (self.node.parts.bucket.clone(), wanted.archive_key.clone());
        let mut chain = Chain::new(bucket, key, wanted.first);
        let mut end = chain.end().await?;
        if (1..wanted.known).contains(&end.tail.number) {
            return Err(RestoreError::Older {
                incarnation: wanted.first.incarnation,
                found: end.tail.number,
                known: wanted.known,
            });
        }
        while let Some(closed) = end.tail.closed() {
            let next = chain.of(closed.incarnation);
            let after = next.end().await?;
            if after.tail.number == 0 {
                break;
            }
            (chain, end) = (next, after);
        }
        Ok((chain, end))
    }

    /// Plan, close, fetch, replay, verify, found; to an earlier moment: plan, fetch, replay, verify,
    /// withhold, close, found. `withhold` stops the service of a tenant that may be served.
    async fn restore_group(
        &self,
        wanted: &Wanted<'_>,
        withhold: impl Future<Output = Result<(), String>>,
    ) -> Result<Done, String> {
        let text = |e: RestoreError| e.to_string();
        let (chain, end) = self.current(wanted).await.map_err(text)?;
        // Before anything is closed.
        self.no_replica(chain.group().next())?;
        let plan = plan::at(&chain, &end, wanted.point).await;
        let mut plan = plan.map_err(text)?;
        let dir = self.scratch(chain.group());
        let (rebuilt, closing) = if plan.is_newest() {
            let closing = restore::close(&chain, plan.tail(), &self.id).await;
            let mut closing = closing.map_err(text)?;
            plan.links.append(&mut closing.added);
            (
                self.rebuild(&chain, &mut plan, &dir.0, wanted).await?,
                closing,
            )
        } else {
            let rebuilt = self.rebuild(&chain, &mut plan, &dir.0, wanted).await?;
            came(&rebuilt, &plan, &chain, wanted)?;
            withhold.await?;
            failpoint("restore-withheld");
            // What was added while the earlier state was rebuilt.
            let tail = chain.tail().await.map_err(|e| e.to_string())?;
            let closing = restore::close(&chain, tail, &self.id).await;
            (rebuilt, closing.map_err(text)?)
        };
        failpoint("restore-closed");
        let came_to = (rebuilt.state.revision, rebuilt.state.time_ms);
        let base = restore::base(&plan, &rebuilt, &closing, now_ms());
        let restored = rebuilt.finish(closing.group, &base, &self.founder());
        let restored = restored.map_err(text)?;
        let next = chain.of(closing.group.incarnation);
        let begun = restore::open_chain(&next, &restored, base, &self.id).await;
        let begun = begun.map_err(text)?;
        failpoint("restore-opened");
        let group = self.found(&restored, begun, wanted).await?;
        Ok(Done {
            group,
            restored,
            came_to,
        })
    }

    fn scratch(&self, group: GroupId) -> Scratch {
        let dir = self.node.parts.data_dir.join(RESTORE);
        Scratch(dir.join(format!("{group}-{}", self.id)))
    }

    /// Rebuilds what is planned; where a file of its checkpoint is missing or damaged, from an older
    /// checkpoint.
    async fn rebuild(
        &self,
        chain: &Chain,
        plan: &mut Plan,
        dir: &Path,
        wanted: &Wanted<'_>,
    ) -> Result<Rebuilt, String> {
        let mut unusable = Vec::new();
        loop {
            let links = format!("{} links", plan.total_links());
            self.event(wanted.name, "planned", links).await;
            let data_dir = &self.node.parts.data_dir;
            room(data_dir, plan.checkpoint_bytes() + 2 * plan.log_bytes())?;
            let failed = match self.rebuild_once(chain, plan, dir, wanted).await {
                Err(e @ RestoreError::File { .. }) => e,
                done => return done.map_err(|e| e.to_string()),
            };
            tracing::error!(group = %chain.group(), error = %failed, "ALARM: a checkpoint cannot be used; an older one is looked for");
            unusable.extend(plan.first_manifest().cloned());
            let end = chain.end().await.map_err(|e| e.to_string())?;
            let older = plan::without(chain, &end, wanted.point, &unusable).await;
            *plan = older.map_err(|e| format!("{failed}; without that checkpoint: {e}"))?;
        }
    }

    /// Fetches, replays and verifies, saying how it goes.
    async fn rebuild_once(
        &self,
        chain: &Chain,
        plan: &Plan,
        dir: &Path,
        wanted: &Wanted<'_>,
    ) -> Result<Rebuilt, RestoreError> {
        let (events, tenant) = (self.events.clone(), wanted.name.to_string());
        let served = wanted.served.clone();
        let goes_on = move || served.as_ref().is_none_or(|group| group.sealed().is_none());
        let report = Arc::new(move |progress: Progress| {
            let (phase, done, total) = match progress {
                Progress::Fetched { bytes, total } => ("fetched", bytes, total),
                Progress::Replayed { links, total } => ("replayed", links, total),
                Progress::Counting => return goes_on(),
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
            goes_on()
        });
        restore::fetch(chain, plan, dir, report.clone()).await?;
        let _turn = self.replays.acquire().await;
        let budget = match plan.log_bytes() < limits::BRIEF_REPLAY {
            true => self.node.parts.budget.briefly(),
            false => self.node.parts.budget.clone(),
        };
        restore::replay(plan, wanted.keys.clone(), budget, dir, report)
    }

    fn founder(&self) -> Founder {
        Founder {
            node: self.node.id,
            address: self.node.config.peer_address.to_string(),
        }
    }

    /// What is on this disk of the incarnation to come may be what the bucket has lost.
    fn no_replica(&self, id: GroupId) -> Result<(), String> {
        let dir = self.node.parts.replica_dir(id);
        match dir.exists() {
            true => Err(format!(
                "there is a replica of group {id} in {} already: the bucket is older than it; move it away, and restore again",
                dir.display()
            )),
            false => Ok(()),
        }
    }

    /// Forms the restored group, of this node alone; `begun` is how its chain ends. Nothing is left of one
    /// that could not be formed.
    async fn found(
        &self,
        restored: &Restored,
        begun: Tail,
        wanted: &Wanted<'_>,
    ) -> Result<Arc<Group>, String> {
        let (parts, id) = (&self.node.parts, restored.group);
        if parts.keys.is_shredded(id.tenant) {
            return Err("it was deleted, and its keys are destroyed here".into());
        }
        self.no_replica(id)?;
        let dir = parts.replica_dir(id);
        let founded = async {
            let laid = self.founder().lay_down(&dir, &parts.log, restored).await;
            laid.map_err(|e| e.to_string())?;
            failpoint("restore-laid");
            let opening = Opening {
                id,
                keys: Ok(wanted.keys.clone()),
                rpo: wanted.rpo,
                archive_key: wanted.archive_key.clone(),
                report: wanted.told.clone(),
                min_voters: wanted.majority,
                begun: Some(begun),
            };
            let opened = parts.open(opening).await?;
            self.node.set_archive_key(wanted.archive_key.clone());
            if let Err(e) = opened.lead_alone().await {
                self.drop_group(&opened).await;
                return Err(e.to_string());
            }
            Ok(opened)
        };
        let founded = founded.await;
        if founded.is_err() {
            parts.log.drop_group(id);
            let _ = tokio::fs::remove_dir_all(&dir).await;
        }
        founded
    }

    /// Lets go of a group that was restored and is not recorded, unless it is after all: nobody would
    /// look after its keys.
    async fn give_up(&self, directory: &Directory, record: &TenantRecord, group: &Group) {
        let tenants = directory.tenants().unwrap_or_default();
        let known = tenants.iter().find(|t| t.record.id == record.id);
        // It was not heard that it was, or another restore was faster.
        if known.is_none_or(|t| t.record.incarnation < record.incarnation) {
            self.drop_group(group).await;
        }
    }

    async fn drop_group(&self, group: &Group) {
        group.seal("it was not restored here").await;
        self.node.parts.groups.remove(group.id());
        group.shutdown().await;
    }
}
