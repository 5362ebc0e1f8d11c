//! Linearizable reads: all that wait at a moment share one ReadIndex round, on the leader or asked
//! of it by a follower, and then read locally once that index is applied here.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::ReadPolicy;
use tokio::sync::{mpsc, oneshot};

use super::gather::gather;
use super::member::Shared;
use super::network::ask_member;
use super::propose::ProposeError;
use crate::network::Service;

const QUEUE: usize = 8192;
const ROUND: Duration = Duration::from_secs(2);
const LIMIT: Duration = Duration::from_secs(7);
const RETRY: Duration = Duration::from_millis(25);

type Waiter = oneshot::Sender<Result<(), ProposeError>>;
/// How long a barrier may take that does not wait for the archive.
const CURRENT: Duration = Duration::from_secs(2);

/// Returns whether this replica has applied everything that was committed before the call, be it
/// archived or not.
pub(super) async fn is_current(shared: &Shared) -> bool {
    match position(shared).await {
        Some(index) => shared.wait_applied(index, CURRENT).await,
        None => false,
    }
}

/// The index to wait for, from the leader.
async fn position(shared: &Shared) -> Option<u64> {
    match shared.raft.is_leader() {
        true => read_index(shared).await,
        false => ask_leader(shared).await,
    }
}

#[derive(Clone)]
pub struct Reads {
    queue: mpsc::Sender<Waiter>,
}

impl Reads {
    pub(super) fn start(shared: Arc<Shared>) -> Self {
        let (queue, mut waiters) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut round: Vec<Waiter> = Vec::new();
            while gather(&mut waiters, &mut round, QUEUE, |_: &Waiter| 1).await {
                let outcome = barrier(&shared).await;
                for waiter in round.drain(..) {
                    let _ = waiter.send(outcome.clone());
                }
            }
        });
        Reads { queue }
    }

    /// Returns once this replica holds everything that was acknowledged before the call.
    pub async fn barrier(&self) -> Result<(), ProposeError> {
        let (tell, told) = oneshot::channel();
        self.queue.try_send(tell).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ProposeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ProposeError::Stopped,
        })?;
        told.await.map_err(|_| ProposeError::Stopped)?
    }
}

async fn barrier(shared: &Shared) -> Result<(), ProposeError> {
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        if let Some(index) = position(shared).await {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let archived = !shared.rpo_zero || shared.wait_archived(index, left).await;
            if archived && shared.wait_applied(index, left).await {
                return Ok(());
            }
            return Err(ProposeError::TimedOut);
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(ProposeError::NoLeader);
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The leader's side: confirms that it still leads, and answers the index to wait for.
async fn read_index(shared: &Shared) -> Option<u64> {
    let round = shared.raft.get_read_linearizer(ReadPolicy::ReadIndex);
    match tokio::time::timeout(ROUND, round).await {
        Ok(Ok(linearizer)) => Some(linearizer.read_log_id().index()),
        _ => None,
    }
}

async fn ask_leader(shared: &Shared) -> Option<u64> {
    let (leader, address) = shared.leader()?;
    let member = (leader, address.as_str());
    let body = ask_member(
        &shared.peers,
        member,
        Service::ReadIndex,
        shared.group,
        &[],
        ROUND,
    )
    .await
    .ok()?;
    Some(u64::from_be_bytes(body.as_ref().try_into().ok()?))
}

/// Serves a follower's question.
pub(super) async fn serve(shared: &Shared) -> Result<Bytes, String> {
    match read_index(shared).await {
        Some(index) => Ok(Bytes::copy_from_slice(&index.to_be_bytes())),
        None => Err("not the leader".into()),
    }
}
