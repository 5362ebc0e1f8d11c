//! Rebuilding a damaged replica from its peers, while they serve the tenant.
//!
//! Invariants. What a damaged replica has acknowledged, and its votes, count until the others have
//! taken it out of the group, by a change that a majority has committed; it takes part in nothing
//! until then, also after a restart. Only then its log goes, and then its files; it comes back as an
//! empty replica, which the leader fills and lets vote again, as any that is new. Whoever dies on the
//! way begins again.

use std::sync::Arc;
use std::time::Duration;

use replication::GroupId;
use replication::failpoint::failpoint;
use replication::group::replica::{is_quarantined, replace_empty};
use replication::group::{Group, GroupError};
use tokio::time::sleep;

use super::{RESTORE, Tenant};
use crate::directory::records::EventKind;
use crate::node::Node;
use crate::question::Question;

const LOOK: Duration = Duration::from_secs(1);
const NOT_THE_LEADER: &str = "it does not lead";

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Lets go of a replica that was found damaged while it served.
pub async fn let_go(node: &Node, tenant: &Tenant, group: &Arc<Group>) {
    let id = group.id();
    if tenant.record().group() == id {
        tenant.set_group(Err(GroupError::Quarantined(id).to_string()));
    }
    node.parts.groups.remove(id);
    group.shutdown().await;
    // Its engine is closed before another takes its place.
    while !group.replica().end("this replica is damaged").await {
        tracing::warn!(group = %id, "the damaged replica is still being read");
    }
}

/// Takes a damaged replica's files and log away, once it is out of its group; none if it is not
/// damaged.
pub async fn rebuild(node: &Arc<Node>, tenant: &Arc<Tenant>) -> Option<Result<(), String>> {
    let id = tenant.record().group();
    let parts = &node.parts;
    let dir = parts.replica_dir(id);
    if !is_quarantined(&dir) || parts.groups.get(id).is_some() {
        return None;
    }
    Some(match out_of_the_group(node, tenant, id).await {
        Ok(()) => empty(node, tenant, id).await,
        Err(why) => Err(why),
    })
}

async fn empty(node: &Arc<Node>, tenant: &Arc<Tenant>, id: GroupId) -> Result<(), String> {
    let (parts, dir) = (&node.parts, node.parts.replica_dir(id));
    failpoint("replica-removed");
    if !parts.log.drop_group_synced(id).await {
        return Err("the log has stopped".into());
    }
    failpoint("replica-log-dropped");
    // At once: half of a replica must not be taken for one. What a crash leaves there goes at start.
    let tag = hex::encode(kms::secret::random_bytes::<4>());
    let gone = parts.data_dir.join(RESTORE).join(format!("{id}-{tag}"));
    replace_empty(&dir, &gone).map_err(text)?;
    let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(gone));
    if let Ok(Err(e)) = removed.await {
        tracing::warn!(group = %id, error = %e, "the damaged files are removed when the node starts again");
    }
    tracing::info!(group = %id, "the damaged replica is gone; its peers fill a new one");
    let (own, tenant) = (node.clone(), tenant.clone());
    node.spawn(async move { tell(own, tenant, id).await });
    Ok(())
}

/// Whether a tenant goes on in another incarnation, or not at all.
pub fn has_ended(node: &Node, tenant: &Tenant, id: GroupId) -> bool {
    let record = tenant.record();
    record.group() != id || record.is_destroying() || node.tenants.find(id.tenant).is_none()
}

/// Has the leader take this node out of the group.
async fn out_of_the_group(node: &Node, tenant: &Tenant, id: GroupId) -> Result<(), String> {
    let mut why = "no node leads it now".to_string();
    for other in node.placed(&tenant.record()) {
        if other.id == node.id {
            continue;
        }
        let question = Question::RemoveMember(id, node.id);
        let removed = match node.ask(&other.peer_address, &question).await {
            Some(answer) => serde_json::from_slice(&answer).map_err(text)?,
            None => Err("it does not answer".to_string()),
        };
        match removed {
            Ok(()) => return Ok(()),
            // Whoever leads says more than who does not.
            Err(e) if e.contains(NOT_THE_LEADER) => {}
            Err(e) => why = format!("node {}: {e}", other.name),
        }
    }
    Err(why)
}

/// Records that the replica is whole again, when it is.
async fn tell(node: Arc<Node>, tenant: Arc<Tenant>, id: GroupId) {
    loop {
        sleep(LOOK).await;
        if has_ended(&node, &tenant, id) {
            return;
        }
        if let Ok(group) = tenant.group()
            && group.has_joined()
        {
            let detail = "its peers have filled it, and it votes again".to_string();
            return node.event(&tenant.record(), EventKind::ReplicaRebuilt, detail);
        }
    }
}

impl Node {
    /// Takes a member out of a group that is led here, if the others are there.
    pub(crate) async fn remove_member(&self, id: GroupId, member: u64) -> Result<(), String> {
        let group = self.parts.groups.get(id).ok_or("it is not open here")?;
        if !group.is_leader() {
            return Err(NOT_THE_LEADER.into());
        }
        let tenant = self.tenants.find(id.tenant).ok_or("it is not known here")?;
        for other in self.placed(&tenant.record()) {
            if other.id != member && self.holds(&other, id).await != Some(true) {
                return Err(format!("node {} does not hold it", other.name));
            }
        }
        group.remove_member(member).await.map_err(text)
    }
}
