//! What nodes ask each other above the groups, and what they answer.

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use kms::{KeyUri, Probe, TenantId};
use replication::GroupId;
use replication::group::DaemonCalls;
use replication::group::replica::{is_fenced, is_quarantined};
use replication::network::Service;
use serde::{Deserialize, Serialize};

use crate::directory::records::{KeyTask, NodeRecord, TenantRecord};
use crate::node::Node;
use crate::tenant::key::{KeyReport, KeyStanding};

pub(crate) const PEER_CALL: Duration = Duration::from_secs(5);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// What a node asks of another above the groups.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// Which group is the directory?
    Directory,
    Register(NodeRecord),
    /// Digests of recent positions of a group.
    Digests(GroupId),
    /// Whether this node's replica of a group holds anything.
    Holds(GroupId),
    /// Ask for a tenant's key now.
    ProveKey(TenantId),
    /// How a tenant's key stands there.
    Key(TenantId),
    /// Whether that node can use a KMS key for a tenant.
    TryKey(TenantId, KeyUri),
    /// Destroy what that node holds of a tenant that is being destroyed.
    Erase(TenantId),
    /// Destroy its copies of a tenant's generations before this one.
    Forget(TenantId, u32),
    /// If you lead this group, take a member out whose replica is damaged.
    RemoveMember(GroupId, u64),
    /// If you lead the tenant, or the directory, upload a checkpoint; whether you do.
    Checkpoint(TenantId),
}

impl Node {
    pub(crate) async fn ask(&self, address: &str, question: &Question) -> Option<Bytes> {
        let peer = self.parts.peers.address(address);
        let connection = peer.connected(Duration::from_millis(200)).await?;
        let body = serde_json::to_vec(question).ok()?;
        let nobody = GroupId {
            tenant: TenantId::default(),
            incarnation: 0,
        };
        connection
            .call(Service::Daemon, nobody, &body, PEER_CALL)
            .await
            .ok()
    }

    /// Whether a node's replica of a group holds anything; `None` if it does not answer or say.
    pub async fn holds(&self, node: &NodeRecord, group: GroupId) -> Option<bool> {
        if node.id == self.id {
            return self.holds_here(group);
        }
        let question = Question::Holds(group);
        let answer = self.ask(&node.peer_address, &question).await?;
        serde_json::from_slice(&answer).ok()?
    }

    fn holds_here(&self, group: GroupId) -> Option<bool> {
        if let Some(open) = self.parts.groups.get(group) {
            let ended = open.is_quarantined() || open.is_fenced();
            let empty = open.status().voters.is_empty() || open.is_filling();
            return Some(!ended && !empty);
        }
        // A replica that is not open yet may hold everything.
        let dir = self.parts.replica_dir(group);
        let ended = is_fenced(&dir) || is_quarantined(&dir);
        (ended || !dir.exists()).then_some(false)
    }

    /// How a tenant's key stands on each node of its placement that answers.
    pub async fn key_reports(&self, record: &TenantRecord) -> Vec<(NodeRecord, KeyReport)> {
        let asked = self.placed(record).into_iter().map(|node| async move {
            if node.id == self.id {
                let report = self.key_report(record.id).await;
                return Some((node, report));
            }
            let answer = self
                .ask(&node.peer_address, &Question::Key(record.id))
                .await?;
            let report = serde_json::from_slice(&answer).ok()?;
            Some((node, report))
        });
        let answered = futures::future::join_all(asked).await;
        answered.into_iter().flatten().collect()
    }

    /// Proves that this node can use a KMS key for a tenant.
    pub async fn try_key(&self, tenant: TenantId, key: &KeyUri) -> Result<(), String> {
        let (providers, region) = (&self.parts.providers, self.config.region);
        let probe = Probe::make(providers, key, tenant, region).await;
        let asked = probe.map_err(text)?.ask(providers).await;
        asked.map(drop).map_err(text)
    }

    /// Proves that every node of a tenant's placement can use a KMS key.
    pub async fn try_key_everywhere(
        &self,
        record: &TenantRecord,
        key: &KeyUri,
    ) -> Result<(), String> {
        for node in self.placed(record) {
            let tried = if node.id == self.id {
                self.try_key(record.id, key).await
            } else {
                let question = Question::TryKey(record.id, key.clone());
                match self.ask(&node.peer_address, &question).await {
                    Some(answer) => serde_json::from_slice(&answer).map_err(text)?,
                    None => Err("it does not answer".into()),
                }
            };
            tried.map_err(|why| format!("node {} cannot use key {key}: {why}", node.name))?;
        }
        Ok(())
    }

    async fn key_report(&self, tenant: TenantId) -> KeyReport {
        let name = &self.config.name;
        let Some(tenant) = self.tenants.find(tenant) else {
            return KeyStanding::default().report(name, None);
        };
        let group = tenant.group().ok();
        let mut report = tenant.key.report(name, group.as_deref());
        let record = tenant.record();
        if let (Some(KeyTask::Rewrite { generation }), Some(group)) = (&record.key_task, group) {
            let generation = *generation;
            let counted =
                tokio::task::spawn_blocking(move || group.replica().older(generation)).await;
            report.older = counted.ok().and_then(Result::ok);
        }
        for generation in record.needed() {
            if let Ok(Some(copy)) = self.parts.keys.copy(record.id, generation) {
                report.copies.push((generation, copy.key.to_string()));
            }
        }
        report
    }

    /// Digests of a group's recent positions on another node.
    pub async fn digests_of(
        &self,
        node: &NodeRecord,
        group: GroupId,
    ) -> Option<Vec<(u64, replication::mvcc::digest::Digests)>> {
        let answer = self
            .ask(&node.peer_address, &Question::Digests(group))
            .await?;
        serde_json::from_slice(&answer).ok()
    }
}

/// Answers other nodes' questions.
pub(crate) struct Calls(Weak<Node>);

impl Calls {
    pub(crate) fn of(node: &Arc<Node>) -> Arc<Self> {
        Arc::new(Calls(Arc::downgrade(node)))
    }
}

#[async_trait]
impl DaemonCalls for Calls {
    fn refused(&self, why: String) {
        if let Some(node) = self.0.upgrade() {
            node.refused_place(why);
        }
    }

    async fn call(&self, body: Bytes) -> Result<Bytes, String> {
        let node = self.0.upgrade().ok_or("the node is stopping")?;
        let question: Question = serde_json::from_slice(&body).map_err(|e| e.to_string())?;
        let answer = match question {
            Question::Directory => {
                let id = node.directory().map(|d| d.group().id());
                let forming = match id {
                    Some(id) => Some(id),
                    None => node.read_region()?.map(|file| file.directory),
                };
                serde_json::to_vec(&forming)
            }
            Question::Register(record) => {
                let directory = node.directory().ok_or("this node has no directory yet")?;
                directory
                    .register(&record)
                    .await
                    .map_err(|e| e.to_string())?;
                serde_json::to_vec(&())
            }
            Question::Holds(group) => serde_json::to_vec(&node.holds_here(group)),
            Question::ProveKey(tenant) => {
                if let Some(tenant) = node.tenants.find(tenant) {
                    tenant.nudge();
                }
                serde_json::to_vec(&())
            }
            Question::TryKey(tenant, key) => serde_json::to_vec(&node.try_key(tenant, &key).await),
            Question::Erase(tenant) => serde_json::to_vec(&node.erase(tenant).await?),
            Question::Forget(tenant, generation) => {
                serde_json::to_vec(&node.forget_before(tenant, generation)?)
            }
            Question::RemoveMember(group, member) => {
                serde_json::to_vec(&node.remove_member(group, member).await)
            }
            Question::Checkpoint(tenant) => serde_json::to_vec(&node.want_checkpoint_here(tenant)),
            Question::Key(tenant) => serde_json::to_vec(&node.key_report(tenant).await),
            Question::Digests(group) => {
                let group = node
                    .parts
                    .groups
                    .get(group)
                    .ok_or("the group is not open here")?;
                serde_json::to_vec(&group.recent_digests())
            }
        };
        answer.map(Bytes::from).map_err(|e| e.to_string())
    }
}
