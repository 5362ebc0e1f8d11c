//! A group as the daemon uses it.
//!
//! Invariants. Nothing is acknowledged before a majority has synced it and this node has applied
//! it. A fenced group (its chain was closed by a restore) neither writes nor leads. The log is
//! purged only behind this node's own durable checkpoint and the archived index, whichever is
//! less; over the cap of the node's log, and with the archive stalled, behind the checkpoint alone.
//! While the tenant is sealed nothing is purged, and no command is proposed (`sealing`).

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kms::TenantKeys;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::SnapshotResponse;
use openraft::{BasicNode, Config, Raft, SnapshotPolicy};
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::network::{Network, ask_member};
use super::propose::{ProposeError, Proposer};
use super::read::{Reads, is_current};
use super::replica::{ReplicaDir, is_fenced, is_quarantined, open_files};
use super::sealing::Replica;
use super::state_machine::{SnapshotDir, StateMachine};
use super::types::{SnapshotMeta, TypeConfig, Vote};
use super::upkeep::{maintain, watch_applied};
use crate::GroupId;
use crate::archive::ledger::Ledger;
use crate::engine::{Budget, EngineError};
use crate::log::{LogReader, NodeLog};
use crate::machine::{Standing, State, Store};
use crate::mvcc::digest::Digests;
use crate::network::{Peers, Service};
use crate::proto::command::{Command, Reply};

/// Heartbeats are one per group: at 500 ms, 200 idle groups cost 5% of a core.
const HEARTBEAT_MS: u64 = 500;
/// Well above the worst fsync seen (over 100 ms), and above two lost heartbeats.
pub(super) const ELECTION_MS: (u64, u64) = (1500, 2500);
/// How long another member may take to hear that the group has ended.
const TELL_FENCED: Duration = Duration::from_secs(2);
/// How often a replica that is being filled looks whether it is.
const FILLING: Duration = Duration::from_millis(200);

#[derive(Debug, Error)]
pub enum GroupError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("replica directory {path}: {cause}")]
    Io { path: String, cause: std::io::Error },
    #[error("group {group}: {cause}")]
    Raft { group: GroupId, cause: String },
    #[error("group {0} was restored elsewhere: this copy has stopped for good")]
    Fenced(GroupId),
    #[error("this node's replica of group {0} is damaged")]
    Quarantined(GroupId),
}

/// What a group is opened with.
pub struct GroupConfig {
    pub id: GroupId,
    pub node: u64,
    /// The replica's own directory.
    pub dir: PathBuf,
    /// The tenant's keys, or why it is opened sealed.
    pub keys: Result<Arc<TenantKeys>, String>,
    pub budget: Arc<Budget>,
    pub log: Arc<NodeLog>,
    pub peers: Arc<Peers>,
    /// Answer writes only once they are archived.
    pub rpo_zero: bool,
    /// Writes are refused while fewer members vote: a majority of the placement.
    pub min_voters: usize,
    /// Above this the node's log is purged although it is not archived.
    pub max_log_bytes: u64,
}

/// A checkpoint: where it stands, and its files, open.
pub struct Checkpoint {
    pub state: State,
    pub files: Vec<(String, std::fs::File)>,
}

/// What the parts of a group share.
pub struct Shared {
    pub raft: Raft<TypeConfig, StateMachine>,
    pub store: Arc<Store>,
    pub replica: Arc<Replica>,
    pub peers: Arc<Peers>,
    pub group: GroupId,
    pub rpo_zero: bool,
    pub ledger: Ledger,
    pub log: LogReader,
    archived: watch::Sender<u64>,
    /// What goes out with appends.
    archived_out: Arc<AtomicU64>,
    pub(super) min_voters: usize,
    fenced: AtomicBool,
    pub(super) quarantined: AtomicBool,
    /// How often a checkpoint in the bucket was asked for, and up to which time one was made since.
    pub wanted: AtomicU64,
    pub served: AtomicU64,
    /// Told when one is.
    pub asked: Notify,
    /// This node was a voter at some time: its replica was filled.
    joined: AtomicBool,
    /// It was a voter before as well: that says nothing until it is current again.
    filling: AtomicBool,
    /// The term in which this node's archiver has looked whether the chain is closed, or has begun it.
    cleared: AtomicU64,
}

impl Shared {
    pub fn may_write(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let voters = metrics.membership_config.voter_ids().count();
        !self.fenced.load(Ordering::Acquire)
            && voters >= self.min_voters
            && self.cleared.load(Ordering::Acquire) >= metrics.current_term
    }

    /// Lets this node write as the leader of `term`: its chain was looked at, or cannot be.
    pub fn clear_writes(&self, term: u64) {
        self.cleared.fetch_max(term, Ordering::AcqRel);
    }

    /// The leader's id and address, as this node knows it.
    pub fn leader(&self) -> Option<(u64, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|id| *id != metrics.id)?;
        let node = metrics.membership_config.membership().get_node(&leader)?;
        Some((leader, node.addr.clone()))
    }

    pub fn archived(&self) -> u64 {
        *self.archived.borrow()
    }

    pub fn note_archived(&self, index: u64) {
        let moved = self.archived.send_if_modified(|known| {
            let moved = index > *known;
            *known = index.max(*known);
            moved
        });
        if moved {
            self.archived_out.fetch_max(index, Ordering::Relaxed);
            self.ledger.archived(index);
        }
    }

    pub async fn wait_archived(&self, index: u64, within: Duration) -> bool {
        let mut archived = self.archived.subscribe();
        let wait = archived.wait_for(|known| *known >= index);
        matches!(tokio::time::timeout(within, wait).await, Ok(Ok(_)))
    }

    pub async fn wait_applied(&self, index: u64, within: Duration) -> bool {
        let reached = |at: &Standing| {
            let applied = at.state.as_ref().and_then(|state| state.applied);
            applied.is_some_and(|at| at.index >= index)
        };
        let mut applied = self.store.watch();
        if index == 0 || reached(&applied.borrow()) {
            return true;
        }
        let wait = applied.wait_for(reached);
        matches!(tokio::time::timeout(within, wait).await, Ok(Ok(_)))
    }
}

/// One tenant's group on this node.
pub struct Group {
    shared: Arc<Shared>,
    proposer: Proposer,
    reads: Reads,
    dir: PathBuf,
    recent: Arc<Mutex<VecDeque<(u64, Digests)>>>,
    tasks: Mutex<JoinSet<()>>,
}

fn config(name: String) -> Result<Arc<Config>, String> {
    let config = Config {
        cluster_name: name,
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS.0,
        election_timeout_max: ELECTION_MS.1,
        install_snapshot_timeout: 600_000,
        max_payload_entries: 64,
        replication_lag_threshold: u64::MAX,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        purge_batch_size: 1,
        api_channel_size: Some(4096),
        notification_channel_size: Some(4096),
        enable_pre_vote: Some(true),
        // A leader that applied before its own fsync and died must not resume its term.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    config.validate().map(Arc::new).map_err(|e| e.to_string())
}

/// Waits until a replica that began empty votes and holds what is committed.
async fn fill(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(FILLING).await;
        let metrics = shared.raft.metrics().borrow_watched().clone();
        let mut voters = metrics.membership_config.voter_ids();
        if voters.any(|id| id == metrics.id) && is_current(&shared).await {
            break;
        }
    }
    if let Err(e) = shared.replica.dir.filled() {
        tracing::warn!(group = %shared.group, error = %e, "that the replica is filled is not recorded: it is found out again after a restart");
    }
    shared.filling.store(false, Ordering::Release);
}

fn is_damage(e: &std::io::Error) -> bool {
    let engine = e.get_ref().and_then(|e| e.downcast_ref::<EngineError>());
    engine.is_some_and(EngineError::is_damage)
}

impl Group {
    /// Opens the replica and starts its part of the group.
    pub async fn open(given: GroupConfig) -> Result<Arc<Self>, GroupError> {
        let id = given.id;
        let io = |cause| GroupError::Io {
            path: given.dir.display().to_string(),
            cause,
        };
        let raft_error = |cause: String| GroupError::Raft { group: id, cause };
        if is_fenced(&given.dir) {
            return Err(GroupError::Fenced(id));
        }
        if is_quarantined(&given.dir) {
            return Err(GroupError::Quarantined(id));
        }
        let dir = ReplicaDir::open(&given.dir).map_err(io)?;
        let log = given.log.group(id);
        let reader = log.reader();
        let (keys, budget, own) = (given.keys, given.budget, reader.clone());
        let open = move || Replica::open(id, dir, budget, own, keys);
        let replica = tokio::task::spawn_blocking(open)
            .await
            .map_err(|e| raft_error(e.to_string()))?;
        let replica = match replica {
            Ok(replica) => replica,
            Err(e) if is_damage(&e) => {
                tracing::error!(group = %id, error = %e, "ALARM: this replica is damaged");
                ReplicaDir::open(&given.dir)
                    .and_then(|dir| dir.quarantine())
                    .map_err(io)?;
                return Err(GroupError::Quarantined(id));
            }
            Err(e) => return Err(io(e)),
        };
        let archived_out = Arc::new(AtomicU64::new(0));
        let network = Network {
            peers: given.peers.clone(),
            group: id,
            archived: archived_out.clone(),
        };
        let config = config(id.to_string()).map_err(raft_error)?;
        let raft = Raft::new(
            given.node,
            config,
            network,
            log,
            StateMachine(replica.clone()),
        )
        .await
        .map_err(|e| raft_error(e.to_string()))?;
        let filling = replica.dir.is_filling();
        let shared = Arc::new(Shared {
            raft,
            store: replica.store.clone(),
            replica,
            peers: given.peers,
            group: id,
            rpo_zero: given.rpo_zero,
            ledger: Ledger::default(),
            log: reader,
            archived: watch::Sender::new(0),
            archived_out,
            min_voters: given.min_voters,
            fenced: AtomicBool::new(false),
            quarantined: AtomicBool::new(false),
            wanted: AtomicU64::new(0),
            served: AtomicU64::new(0),
            asked: Notify::new(),
            joined: AtomicBool::new(false),
            filling: AtomicBool::new(filling),
            cleared: AtomicU64::new(0),
        });
        let group = Arc::new(Group {
            proposer: Proposer::start(shared.clone()),
            reads: Reads::start(shared.clone()),
            dir: given.dir,
            recent: Arc::default(),
            tasks: Mutex::new(JoinSet::new()),
            shared: shared.clone(),
        });
        group.spawn(watch_applied(shared.clone(), group.recent.clone()));
        if filling {
            group.spawn(fill(shared.clone()));
        }
        group.spawn(maintain(shared, given.max_log_bytes));
        Ok(group)
    }

    /// Runs `task` as long as the group is open.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().spawn(task);
    }

    pub fn id(&self) -> GroupId {
        self.shared.group
    }

    /// Whether this replica was filled: it votes, or has voted.
    pub fn has_joined(&self) -> bool {
        if self.is_filling() {
            return false;
        }
        let joined = &self.shared.joined;
        if !joined.load(Ordering::Relaxed) {
            let metrics = self.raft().metrics();
            let metrics = metrics.borrow_watched();
            let mut voters = metrics.membership_config.voter_ids();
            joined.store(voters.any(|id| id == metrics.id), Ordering::Relaxed);
        }
        joined.load(Ordering::Relaxed)
    }

    /// Whether its peers have not filled this replica yet.
    pub fn is_filling(&self) -> bool {
        self.shared.filling.load(Ordering::Acquire)
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// The tenant's keys; none while it is sealed here.
    pub fn keys(&self) -> Option<Arc<TenantKeys>> {
        self.replica().machine().map(|m| m.keys().clone())
    }

    pub fn replica(&self) -> &Arc<Replica> {
        &self.shared.replica
    }

    /// Why the tenant is sealed on this node; none while it is not.
    pub fn sealed(&self) -> Option<Arc<str>> {
        self.replica().sealed()
    }

    /// Seals the tenant on this node, while the group goes on; answers whether engine and keys are
    /// gone from memory.
    pub async fn seal(&self, why: &str) -> bool {
        self.replica().seal(why).await
    }

    /// Takes the tenant up again with its keys, at everything that was committed meanwhile.
    pub async fn unseal(&self, keys: Arc<TenantKeys>) -> Result<(), GroupError> {
        let opened = self.replica().unseal(keys).await;
        opened.map_err(|cause| GroupError::Io {
            path: self.dir.display().to_string(),
            cause,
        })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn raft(&self) -> &Raft<TypeConfig, StateMachine> {
        &self.shared.raft
    }

    pub(super) fn proposer(&self) -> &Proposer {
        &self.proposer
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Proposes commands; they are applied together and in order.
    pub async fn propose(&self, commands: Vec<Command>) -> Result<Vec<Reply>, ProposeError> {
        self.proposer.propose(commands, false).await
    }

    /// Returns once this replica holds everything acknowledged before the call.
    pub async fn read_barrier(&self) -> Result<(), ProposeError> {
        self.reads.barrier().await
    }

    /// Whether this replica has applied everything that was committed before the call. Unlike the
    /// read barrier of a tenant with RPO 0 it does not need the bucket.
    pub async fn is_current(&self) -> bool {
        is_current(&self.shared).await
    }

    /// Whether the group was ever formed, as far as this replica knows.
    pub async fn is_formed(&self) -> Result<bool, GroupError> {
        self.raft()
            .is_initialized()
            .await
            .map_err(|e| self.error(e))
    }

    /// Forms the group with these members, once, on one of them. Forming it again is no error.
    pub async fn initialize(&self, members: BTreeMap<u64, String>) -> Result<(), GroupError> {
        let members: BTreeMap<u64, BasicNode> = members
            .into_iter()
            .map(|(id, address)| (id, BasicNode::new(address)))
            .collect();
        match self.raft().initialize(members).await {
            Ok(()) => Ok(()),
            Err(e) if e.api_error().is_some() => Ok(()),
            Err(e) => Err(self.error(e)),
        }
    }

    pub(super) fn error(&self, cause: impl std::fmt::Display) -> GroupError {
        GroupError::Raft {
            group: self.id(),
            cause: cause.to_string(),
        }
    }

    pub(super) async fn install(
        &self,
        vote: Vote,
        meta: SnapshotMeta,
        snapshot: SnapshotDir,
    ) -> Result<SnapshotResponse<TypeConfig>, String> {
        tracing::info!(group = %self.id(), "installing a snapshot");
        let snapshot = openraft::alias::SnapshotOf::<TypeConfig, SnapshotDir> { meta, snapshot };
        self.raft()
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(|e| e.to_string())
    }

    /// Has this node, which alone is of a restored group, lead it.
    pub async fn lead_alone(&self) -> Result<(), GroupError> {
        let raft = self.raft();
        raft.trigger()
            .elect(false)
            .await
            .map_err(|e| self.error(e))?;
        raft.wait(Some(Duration::from_secs(10)))
            .state(openraft::ServerState::Leader, "restored")
            .await
            .map(drop)
            .map_err(|e| self.error(e))
    }

    /// Has another voter, which is caught up, lead in this one's place.
    pub async fn give_lead(&self, to: u64) {
        let _ = self.raft().trigger().transfer_leader(to).await;
    }

    /// The archived index that a leader sent along.
    pub fn note_archived(&self, index: u64) {
        self.shared.note_archived(index);
    }

    /// Ends this group for good, here and on the other members: the chain was closed.
    pub async fn fence(&self) {
        if self.shared.fenced.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(group = %self.id(), "the tenant's chain was closed by a restore: this group stops serving");
        if let Err(e) = self.replica().dir.fence() {
            tracing::error!(group = %self.id(), error = %e, "the end of this group is not recorded: it is found out again after a restart");
        }
        // On its own: a peer that asked for it may hang up.
        let shared = self.shared.clone();
        let ending = tokio::spawn(async move {
            let metrics = shared.raft.metrics().borrow_watched().clone();
            let own = shared.peers.own_id();
            for (id, node) in metrics.membership_config.membership().nodes() {
                let member = (*id, node.addr.as_str());
                if *id != own {
                    // Who does not hear it meets the closed chain before it first writes as a leader.
                    let (peers, group) = (&shared.peers, shared.group);
                    let _ =
                        ask_member(peers, member, Service::Fence, group, &[], TELL_FENCED).await;
                }
            }
            let _ = shared.raft.shutdown().await;
        });
        let _ = ending.await;
    }

    pub fn is_fenced(&self) -> bool {
        self.shared.fenced.load(Ordering::Acquire)
    }

    pub fn is_leader(&self) -> bool {
        self.raft().is_leader()
    }

    /// The newest checkpoint here, if there is one.
    pub fn checkpoint(&self) -> std::io::Result<Option<Checkpoint>> {
        let Some(found) = self.replica().dir.snapshot()? else {
            return Ok(None);
        };
        Ok(Some(Checkpoint {
            state: found.state,
            files: open_files(&found.dir)?,
        }))
    }

    /// Age of the oldest acknowledged write that is not archived.
    pub fn unarchived_for(&self) -> Duration {
        self.shared.ledger.age()
    }

    /// Asks for a checkpoint in the bucket: what a restore replays has become too much.
    pub fn want_checkpoint(&self) {
        self.shared.wanted.fetch_add(1, Ordering::Relaxed);
        self.shared.asked.notify_one();
    }

    /// Asks for a checkpoint; it is made in the background, and not while the tenant is sealed.
    pub async fn make_checkpoint(&self) {
        if self.sealed().is_none() {
            let _ = self.raft().trigger().snapshot().await;
        }
    }

    /// Digests of recent positions, oldest first.
    pub fn recent_digests(&self) -> Vec<(u64, Digests)> {
        self.recent.lock().iter().copied().collect()
    }

    pub fn term(&self) -> u64 {
        self.raft().metrics().borrow_watched().current_term
    }

    /// Waits until there is a leader that this node knows.
    pub async fn wait_leader(&self, within: Duration) -> bool {
        let known = self.raft().wait(Some(within));
        known
            .metrics(|m| m.current_leader.is_some(), "leader")
            .await
            .is_ok()
    }

    /// Stops the group's part on this node.
    pub async fn shutdown(&self) {
        self.tasks.lock().abort_all();
        let _ = self.raft().shutdown().await;
    }
}
