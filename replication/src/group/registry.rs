//! The groups of a node, and the handler that gives peers' messages to them.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use parking_lot::RwLock;
use tokio::sync::mpsc;

use super::member::Group;
use super::types::TypeConfig;
use super::{propose, read, snapshot};
use crate::GroupId;
use crate::network::{Handler, Service, append};

/// What a peer may ask of the daemon above the groups.
#[async_trait]
pub trait DaemonCalls: Send + Sync + 'static {
    async fn call(&self, body: Bytes) -> Result<Bytes, String>;

    /// A peer was refused, since it lies in another jurisdiction.
    fn refused(&self, why: String);
}

/// All groups open on this node.
pub struct Groups {
    open: RwLock<HashMap<GroupId, Arc<Group>>>,
    daemon: RwLock<Option<Arc<dyn DaemonCalls>>>,
}

impl Default for Groups {
    fn default() -> Self {
        Groups {
            open: RwLock::default(),
            daemon: RwLock::new(None),
        }
    }
}

impl Groups {
    pub fn set_daemon(&self, daemon: Arc<dyn DaemonCalls>) {
        *self.daemon.write() = Some(daemon);
    }

    pub fn get(&self, id: GroupId) -> Option<Arc<Group>> {
        self.open.read().get(&id).cloned()
    }

    pub fn insert(&self, group: Arc<Group>) {
        self.open.write().insert(group.id(), group);
    }

    pub fn remove(&self, id: GroupId) -> Option<Arc<Group>> {
        self.open.write().remove(&id)
    }

    pub fn all(&self) -> Vec<Arc<Group>> {
        self.open.read().values().cloned().collect()
    }

    fn find(&self, id: GroupId) -> Result<Arc<Group>, String> {
        self.get(id)
            .ok_or_else(|| format!("group {id} is not open on this node"))
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Bytes, String> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|e| e.to_string())
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

#[async_trait]
impl Handler for Groups {
    fn refused(&self, why: String) {
        if let Some(daemon) = self.daemon.read().as_ref() {
            daemon.refused(why);
        }
    }

    async fn call(&self, service: Service, id: GroupId, body: Bytes) -> Result<Bytes, String> {
        if service == Service::Daemon {
            let daemon = self.daemon.read().clone();
            return daemon.ok_or("the daemon is starting")?.call(body).await;
        }
        let group = self.find(id)?;
        let raft = group.raft();
        match service {
            Service::Append => {
                let (request, archived) =
                    append::decode(&body).ok_or("the append does not parse")?;
                group.note_archived(archived);
                json(
                    &raft
                        .append_entries(request)
                        .await
                        .map_err(|e| e.to_string())?,
                )
            }
            Service::Vote => json(&raft.vote(parse(&body)?).await.map_err(|e| e.to_string())?),
            Service::PreVote => json(
                &raft
                    .pre_vote(parse(&body)?)
                    .await
                    .map_err(|e| e.to_string())?,
            ),
            Service::TransferLeader => {
                let request = parse(&body)?;
                json(
                    &raft
                        .handle_transfer_leader(request)
                        .await
                        .map_err(|e| e.to_string())?,
                )
            }
            Service::SnapshotBegin => {
                snapshot::receive_begin(group.dir(), &body).map_err(|e| e.to_string())?;
                Ok(Bytes::new())
            }
            Service::SnapshotChunk => {
                let dir = group.dir().to_path_buf();
                tokio::task::spawn_blocking(move || snapshot::receive_chunk(&dir, &body))
                    .await
                    .map_err(|e| e.to_string())?
                    .map_err(|e| e.to_string())?;
                Ok(Bytes::new())
            }
            Service::SnapshotEnd => {
                let end: snapshot::End = parse(&body)?;
                let path = group.dir().to_path_buf();
                let (end, received) = tokio::task::spawn_blocking(move || {
                    let received = snapshot::receive_end(&path, &end);
                    received.map(|received| (end, received))
                })
                .await
                .map_err(|e| e.to_string())?
                .map_err(|e| e.to_string())?;
                json(&group.install(end.vote, end.meta, received).await?)
            }
            Service::Propose => propose::serve(group.proposer(), body).await,
            Service::ReadIndex => read::serve(group.shared()).await,
            Service::Fence => {
                group.fence().await;
                Ok(Bytes::new())
            }
            Service::Daemon => Err("not a group's service".into()),
        }
    }

    async fn stream(
        &self,
        id: GroupId,
        items: mpsc::Receiver<Bytes>,
        replies: mpsc::Sender<Bytes>,
    ) -> Result<(), String> {
        let group = self.find(id)?;
        let receiver = group.clone();
        let input = futures::stream::unfold(items, move |mut items| {
            let group = receiver.clone();
            async move {
                // An item that does not parse ends the stream: the sender begins another.
                let (request, archived) = append::decode(&items.recv().await?)?;
                group.note_archived(archived);
                Some((request, items))
            }
        });
        let mut out = Box::pin(group.raft().stream_append(input));
        while let Some(item) = out.next().await {
            let item: openraft::raft::StreamAppendResult<TypeConfig> =
                item.map_err(|e| e.to_string())?;
            let over = item.is_err();
            if replies.send(json(&item)?).await.is_err() || over {
                break;
            }
        }
        Ok(())
    }
}
