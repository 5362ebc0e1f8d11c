//! Who is of a group.
//!
//! Invariant. Whoever left was taken out by a committed change: nothing that it has acknowledged, and
//! no vote of its own, counts any more.

use std::collections::{BTreeMap, BTreeSet};

use openraft::async_runtime::WatchReceiver;
use openraft::{BasicNode, ChangeMembers};

use super::member::{Group, GroupError};

impl Group {
    /// Makes the voters be `members`: adds who is missing as a learner first, then changes.
    pub async fn set_members(&self, members: BTreeMap<u64, String>) -> Result<(), GroupError> {
        for (id, address) in &members {
            let metrics = self.raft().metrics().borrow_watched().clone();
            let known = metrics
                .membership_config
                .membership()
                .get_node(id)
                .is_some();
            if !known {
                self.raft()
                    .add_learner(*id, BasicNode::new(address), true)
                    .await
                    .map_err(|e| self.error(e))?;
            }
        }
        let voters: BTreeSet<u64> = members.keys().copied().collect();
        let change = self.raft().change_membership(voters, false).await;
        change.map(drop).map_err(|e| self.error(e))
    }

    /// Takes `node` out of the group, on its leader.
    pub async fn remove_member(&self, node: u64) -> Result<(), GroupError> {
        if !self.is_leader() {
            return Err(self.error("this node does not lead"));
        }
        // What this node knows of the members is then no older than the question.
        if !self.is_current().await {
            return Err(self.error("this node does not know whether it leads"));
        }
        let metrics = self.raft().metrics().borrow_watched().clone();
        let members = &metrics.membership_config;
        let voters: BTreeSet<u64> = members.voter_ids().filter(|id| *id != node).collect();
        let is_voter = voters.len() < members.voter_ids().count();
        let settled = *members.log_id() <= metrics.last_applied;
        let is_known = members.membership().get_node(&node).is_some();
        let change = match (is_voter, is_known, settled) {
            (false, false, true) => return Ok(()),
            (false, false, false) => return Err(self.error("a change of the members is under way")),
            (true, ..) if voters.len() < self.shared().min_voters => {
                return Err(self.error("too few members would be left"));
            }
            (true, ..) => ChangeMembers::ReplaceAllVoters(voters),
            (false, true, _) => ChangeMembers::RemoveNodes(BTreeSet::from([node])),
        };
        let changed = self.raft().change_membership(change, false).await;
        changed.map(drop).map_err(|e| self.error(e))
    }
}
