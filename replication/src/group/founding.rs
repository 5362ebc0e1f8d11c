//! Founding the group of a restored tenant: one member, at the state of a checkpoint.
//!
//! Invariants. The replica and the term that it begins in are on the disk before its group is opened. Its
//! directory is new: an incarnation is founded once, so what a crash leaves of one is never opened.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use openraft::BasicNode;
use openraft::storage::RaftLogStorage;

use super::replica::ReplicaDir;
use super::types::{self, SnapshotMeta, StoredMembership, Vote};
use crate::Position;
use crate::log::NodeLog;
use crate::restore::Restored;

/// The node that restores a tenant.
#[derive(Clone, Debug)]
pub struct Founder {
    pub node: u64,
    /// Where its peers reach it.
    pub address: String,
}

impl Founder {
    /// What the group begins with: this node alone.
    fn meta(&self, at: Position) -> SnapshotMeta {
        let last = types::log_id(at);
        let alone = openraft::Membership::new(
            vec![BTreeSet::from([self.node])],
            BTreeMap::from([(self.node, BasicNode::new(&self.address))]),
        );
        let alone = alone.expect("the only voter is a known node");
        SnapshotMeta {
            last_log_id: Some(last),
            last_membership: StoredMembership::new(Some(last), alone),
        }
    }

    /// The row that says who is of the group.
    pub(crate) fn membership(&self, at: Position) -> Vec<u8> {
        types::encode_membership(&self.meta(at).last_membership)
    }

    /// Lays the replica of `restored` down in `dir`, where there must be none.
    pub async fn lay_down(
        &self,
        dir: &Path,
        log: &Arc<NodeLog>,
        restored: &Restored,
    ) -> io::Result<()> {
        let meta = self.meta(restored.position);
        let (checkpoint, state) = (restored.checkpoint.clone(), restored.state.clone());
        let path = dir.to_path_buf();
        let laid = tokio::task::spawn_blocking(move || {
            let replica = ReplicaDir::open(&path)?;
            replica.put_checkpoint(&checkpoint, &meta, &state)?;
            // Its own entry, and that of the directory of all replicas, which may be new too.
            let mut above = path.ancestors().skip(1).take(2);
            above.try_for_each(|dir| std::fs::File::open(dir)?.sync_all())
        });
        laid.await.map_err(io::Error::other)??;
        // Above every term of before. Another's id: a vote of its own would make openraft take this node
        // for the leader.
        let vote = Vote::new_committed(restored.position.term + 1, u64::MAX);
        log.group(restored.group).save_vote(&vote).await
    }
}
