//! A group as it stands on this node.

use std::time::Duration;

use openraft::async_runtime::{Instant as _, WatchReceiver};

use super::member::{ELECTION_MS, Group};
use super::types::TypeConfig;
use crate::GroupId;
use crate::mvcc::digest::Digests;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Leader,
    Follower,
    Candidate,
    Learner,
    Stopped,
}

/// A group as it stands on this node.
#[derive(Clone, Debug)]
pub struct GroupStatus {
    pub group: GroupId,
    pub role: Role,
    pub term: u64,
    pub leader: Option<u64>,
    pub voters: Vec<u64>,
    pub applied: u64,
    pub archived: u64,
    pub revision: i64,
    pub bytes: u64,
    pub digests: Digests,
    /// Age in milliseconds of the oldest acknowledged write that is not archived.
    pub rpo_ms: u64,
}

impl Group {
    pub fn status(&self) -> GroupStatus {
        let metrics = self.raft().metrics().borrow_watched().clone();
        let state = self.store().state();
        let role = match metrics.state {
            openraft::ServerState::Leader if has_quorum(&metrics) => Role::Leader,
            // It leads in name only: it can neither commit nor confirm a read.
            openraft::ServerState::Leader => Role::Candidate,
            openraft::ServerState::Follower => Role::Follower,
            openraft::ServerState::Candidate => Role::Candidate,
            openraft::ServerState::Learner => Role::Learner,
            openraft::ServerState::Shutdown => Role::Stopped,
        };
        let role = if metrics.running_state.is_err() {
            Role::Stopped
        } else {
            role
        };
        let membership = metrics.membership_config.membership().clone();
        GroupStatus {
            group: self.id(),
            role,
            term: metrics.current_term,
            leader: match role {
                Role::Candidate => None,
                _ => metrics.current_leader,
            },
            voters: membership.voter_ids().collect(),
            applied: state.applied.map_or(0, |at| at.index),
            archived: self.shared().archived(),
            revision: state.revision,
            bytes: state.bytes,
            digests: state.digests,
            rpo_ms: self.shared().ledger.age().as_millis() as u64,
        }
    }
}

/// Whether a majority answered this leader within the election time-out. Before its first round it
/// is given the benefit of the doubt.
fn has_quorum(metrics: &openraft::RaftMetrics<TypeConfig>) -> bool {
    let limit = Duration::from_millis(ELECTION_MS.1);
    let acked = metrics.last_quorum_acked.as_ref();
    let alone = metrics.membership_config.voter_ids().count() == 1;
    alone || acked.is_none_or(|at| at.elapsed() <= limit)
}
