//! Proposals: commands gather while earlier batches are under way, and become one entry.
//!
//! On a follower the same batch goes to the leader as one message. Every proposal is answered: by
//! replies after it was applied here (and archived, where the tenant's RPO is 0), or by an error
//! that says whether it may have happened. What was certainly not proposed is tried again within
//! the time limit; what may have been is not.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use prost::Message;
use thiserror::Error;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::gather::gather;
use super::member::Shared;
use super::network::ask_member;
use super::types::{Sealed, TypeConfig};
use crate::network::{CallError, Service};
use crate::proto::command::{Command, Commands, Replies, Reply};

/// Requests in one entry, and their bytes.
const MAX_COMMANDS: usize = 256;
const MAX_BYTES: usize = 1 << 20;
/// Entries under way at once. Each costs an fsync and a message a member, and many small ones cost
/// more than they win: a second one waits until it is half full, or the first is done.
const IN_FLIGHT: usize = 2;
const HALF_FULL: usize = MAX_BYTES / 2;
/// Turns given to other tasks while fewer requests are there than last time: those who were just
/// answered are about to ask again.
const TURNS: usize = 16;
/// Batches on their way to the leader at once.
const FORWARDS: usize = 4;
const QUEUE: usize = 8192;
/// How long a proposal may look for a leader, and wait for its outcome.
const FIND_LEADER: Duration = Duration::from_secs(5);
/// How long a write with RPO 0 may take to be archived: below what a forwarding member waits.
const ARCHIVED: Duration = Duration::from_secs(7);
const OUTCOME: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(25);

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProposeError {
    /// Certainly not done.
    #[error("etcdserver: no leader")]
    NoLeader,
    #[error("etcdserver: too many requests")]
    Overloaded,
    #[error("etcdserver: server stopped")]
    Stopped,
    #[error("holdfast: the tenant is sealed where its leader is: its key may not be used now")]
    Sealed,
    /// Perhaps done.
    #[error("etcdserver: leader changed")]
    LeaderChanged,
    #[error("etcdserver: request timed out")]
    TimedOut,
    #[error(
        "holdfast: outcome unknown: the write is not in the bucket yet, which its RPO of 0 asks for"
    )]
    Unarchived,
}

const NOT_LEADER: &str = "not the leader";
const SEALED: &str = "sealed";
const UNARCHIVED: &str = "unarchived";

type Answer = Result<Vec<Reply>, ProposeError>;

pub struct Proposal {
    commands: Vec<Command>,
    bytes: usize,
    /// Forwarded by another member: it is not forwarded again.
    forwarded: bool,
    tell: oneshot::Sender<Answer>,
}

#[derive(Clone)]
pub struct Proposer {
    queue: mpsc::Sender<Proposal>,
}

impl Proposer {
    pub(super) fn start(shared: Arc<Shared>) -> Self {
        let (queue, proposals) = mpsc::channel(QUEUE);
        tokio::spawn(run(shared, proposals));
        Proposer { queue }
    }

    /// Proposes commands, which are applied together and in order; answers a reply to each.
    pub async fn propose(&self, commands: Vec<Command>, forwarded: bool) -> Answer {
        let bytes = commands.iter().map(Message::encoded_len).sum();
        let (tell, told) = oneshot::channel();
        let proposal = Proposal {
            commands,
            bytes,
            forwarded,
            tell,
        };
        self.queue.try_send(proposal).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ProposeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ProposeError::Stopped,
        })?;
        told.await.map_err(|_| ProposeError::Stopped)?
    }
}

async fn run(shared: Arc<Shared>, mut proposals: mpsc::Receiver<Proposal>) {
    let writes = Arc::new(Semaphore::new(IN_FLIGHT));
    let forwards = Arc::new(Semaphore::new(FORWARDS));
    let ended = Arc::new(Notify::new());
    let mut last = 0;
    loop {
        let leading = shared.raft.is_leader();
        let permits = if leading { &writes } else { &forwards };
        let Ok(permit) = permits.clone().acquire_owned().await else {
            return;
        };
        let slot = Slot {
            permit: Some(permit),
            ended: ended.clone(),
        };
        let mut batch = Vec::new();
        let unit = MAX_BYTES / MAX_COMMANDS;
        let size = |p: &Proposal| p.bytes.max(p.commands.len() * unit);
        if !gather(&mut proposals, &mut batch, MAX_BYTES, size).await {
            return;
        }
        if leading {
            let mut total: usize = batch.iter().map(size).sum();
            while writes.available_permits() + 1 < IN_FLIGHT && total < HALF_FULL {
                tokio::select! {
                    more = proposals.recv() => match more {
                        Some(more) => {
                            total += size(&more);
                            batch.push(more);
                        }
                        None => return,
                    },
                    () = ended.notified() => {}
                }
            }
            for _ in 0..TURNS {
                while total < MAX_BYTES
                    && let Ok(more) = proposals.try_recv()
                {
                    total += size(&more);
                    batch.push(more);
                }
                if batch.len() >= last || total >= MAX_BYTES {
                    break;
                }
                tokio::task::yield_now().await;
            }
            last = batch.len();
        }
        if leading && shared.raft.is_leader() {
            // In this task: entries are proposed in the order in which requests came.
            let mut commands = Vec::with_capacity(batch.len());
            let mut waiting = Vec::with_capacity(batch.len());
            for mut proposal in batch {
                let own = std::mem::take(&mut proposal.commands);
                waiting.push((own.len(), proposal));
                commands.extend(own);
            }
            // Kept for another try, should this node turn out not to lead.
            let (started, again) = start_write(&shared, commands).await;
            let shared = shared.clone();
            tokio::spawn(async move {
                let outcome = finish_write(&shared, started).await;
                drop(slot);
                match outcome {
                    Outcome::Done(replies) => answer_all(waiting, Ok(replies)),
                    Outcome::Failed(e) => answer_all(waiting, Err(e)),
                    Outcome::NotLeader => find_leader(&shared, waiting, again).await,
                }
            });
        } else {
            let shared = shared.clone();
            tokio::spawn(async move {
                let mut commands = Vec::new();
                let mut waiting = Vec::new();
                for mut proposal in batch {
                    let own = std::mem::take(&mut proposal.commands);
                    waiting.push((own.len(), proposal));
                    commands.extend(own);
                }
                find_leader(&shared, waiting, commands).await;
                drop(slot);
            });
        }
    }
}

/// A place under way. Whoever waits for it to end is woken however it ends.
struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    ended: Arc<Notify>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.ended.notify_one();
    }
}

enum Outcome {
    Done(Vec<Reply>),
    NotLeader,
    Failed(ProposeError),
}

type Started = Result<oneshot::Receiver<ClientWriteResult<TypeConfig>>, Outcome>;

/// Proposes; gives the commands back.
async fn start_write(shared: &Shared, commands: Vec<Command>) -> (Started, Vec<Command>) {
    if !shared.may_write() {
        return (Err(Outcome::NotLeader), commands);
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let Some(machine) = shared.replica.machine() else {
        return (Err(Outcome::Failed(ProposeError::Sealed)), commands);
    };
    let (sealed, commands) = machine.codec().seal(commands, now.as_millis() as u64);
    drop(machine);
    let (responder, outcome) = ProgressResponder::complete_only();
    let entry = Sealed(Bytes::from(sealed));
    let started = match shared.raft.client_write_ff(entry, Some(responder)).await {
        Ok(()) => Ok(outcome),
        Err(_) => Err(Outcome::Failed(ProposeError::Stopped)),
    };
    (started, commands)
}

async fn finish_write(shared: &Shared, started: Started) -> Outcome {
    let receiver = match started {
        Ok(receiver) => receiver,
        Err(outcome) => return outcome,
    };
    match tokio::time::timeout(OUTCOME, receiver).await {
        Err(_) => Outcome::Failed(ProposeError::TimedOut),
        Ok(Err(_)) => Outcome::Failed(ProposeError::LeaderChanged),
        Ok(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => Outcome::NotLeader,
        Ok(Ok(Err(_))) => Outcome::Failed(ProposeError::LeaderChanged),
        Ok(Ok(Ok(written))) => {
            if shared.rpo_zero && !shared.wait_archived(written.log_id.index, ARCHIVED).await {
                return Outcome::Failed(ProposeError::Unarchived);
            }
            Outcome::Done(written.data.replies)
        }
    }
}

/// Tries members as leaders until one takes the batch or time is up.
async fn find_leader(
    shared: &Arc<Shared>,
    waiting: Vec<(usize, Proposal)>,
    mut commands: Vec<Command>,
) {
    // The member that forwarded a batch looks on itself. Requests of this node's own clients in
    // the same round are few, and their clients try again.
    if waiting.iter().any(|(_, proposal)| proposal.forwarded) {
        return answer_all(waiting, Err(ProposeError::NoLeader));
    }
    let deadline = tokio::time::Instant::now() + FIND_LEADER;
    let mut body: Option<Vec<u8>> = None;
    loop {
        let outcome = if shared.raft.is_leader() {
            let (started, again) = start_write(shared, commands).await;
            commands = again;
            finish_write(shared, started).await
        } else {
            if body.is_none() {
                let list = Commands { commands };
                body = Some(list.encode_to_vec());
                commands = list.commands;
            }
            forward(shared, body.as_deref().unwrap_or_default()).await
        };
        match outcome {
            Outcome::Done(replies) => return answer_all(waiting, Ok(replies)),
            Outcome::Failed(e) => return answer_all(waiting, Err(e)),
            Outcome::NotLeader if tokio::time::Instant::now() >= deadline => {
                return answer_all(waiting, Err(ProposeError::NoLeader));
            }
            Outcome::NotLeader => tokio::time::sleep(RETRY).await,
        }
    }
}

async fn forward(shared: &Shared, body: &[u8]) -> Outcome {
    let Some((leader, address)) = shared.leader() else {
        return Outcome::NotLeader;
    };
    let member = (leader, address.as_str());
    match ask_member(
        &shared.peers,
        member,
        Service::Propose,
        shared.group,
        body,
        OUTCOME,
    )
    .await
    {
        Ok(body) => {
            let Ok(replies) = Replies::decode(body) else {
                return Outcome::Failed(ProposeError::LeaderChanged);
            };
            // So that a client reads here what it has just written.
            let index = replies.replies.last().map_or(0, |r| r.index);
            shared.wait_applied(index, Duration::from_millis(200)).await;
            Outcome::Done(replies.replies)
        }
        Err(CallError::Remote(why)) if why == NOT_LEADER => Outcome::NotLeader,
        Err(CallError::Remote(why)) if why == SEALED => Outcome::Failed(ProposeError::Sealed),
        Err(CallError::Remote(why)) if why == UNARCHIVED => {
            Outcome::Failed(ProposeError::Unarchived)
        }
        Err(CallError::Remote(_)) => Outcome::Failed(ProposeError::LeaderChanged),
        Err(CallError::NotConnected) => Outcome::NotLeader,
        Err(CallError::Disconnected) => Outcome::Failed(ProposeError::LeaderChanged),
        Err(CallError::TimedOut) => Outcome::Failed(ProposeError::TimedOut),
    }
}

/// Serves a batch that another member forwarded.
pub(super) async fn serve(proposer: &Proposer, body: Bytes) -> Result<Bytes, String> {
    let commands = Commands::decode(body).map_err(|e| e.to_string())?;
    match proposer.propose(commands.commands, true).await {
        Ok(replies) => Ok(Replies { replies }.encode_to_vec().into()),
        Err(ProposeError::NoLeader | ProposeError::Overloaded) => Err(NOT_LEADER.into()),
        Err(ProposeError::Sealed) => Err(SEALED.into()),
        Err(ProposeError::Unarchived) => Err(UNARCHIVED.into()),
        Err(e) => Err(e.to_string()),
    }
}

fn answer_all(waiting: Vec<(usize, Proposal)>, answer: Answer) {
    match answer {
        Ok(replies) => {
            let mut replies = replies.into_iter();
            for (count, proposal) in waiting {
                let own: Vec<Reply> = replies.by_ref().take(count).collect();
                let complete = own.len() == count;
                let answer = if complete {
                    Ok(own)
                } else {
                    Err(ProposeError::LeaderChanged)
                };
                let _ = proposal.tell.send(answer);
            }
        }
        Err(e) => {
            for (_, proposal) in waiting {
                let _ = proposal.tell.send(Err(e.clone()));
            }
        }
    }
}
