//! openraft's network traits on the connections between nodes.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, stream_append_sequential};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::snapshot;
use super::state_machine::SnapshotDir;
use super::types::{TypeConfig, Vote};
use crate::GroupId;
use crate::network::{CallError, Connection, Peer, Peers, Service, append};

type C = TypeConfig;
type Snapshot = openraft::alias::SnapshotOf<C, SnapshotDir>;

/// Makes clients of one group's members.
pub struct Network {
    pub peers: Arc<Peers>,
    pub group: GroupId,
    pub archived: Arc<AtomicU64>,
}

impl Network {
    fn client(&self, target: u64, node: &BasicNode, pipelined: bool) -> Client {
        Client {
            peer: self.peers.node(target, &node.addr),
            group: self.group,
            archived: self.archived.clone(),
            pipelined,
        }
    }
}

impl RaftNetworkFactory<C> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Client {
        self.client(target, node, true)
    }

    /// A heartbeat is one request: no stream is opened for it.
    async fn new_heartbeat_client(&mut self, target: u64, node: &BasicNode) -> Client {
        self.client(target, node, false)
    }
}

/// A client of one member.
pub struct Client {
    peer: Arc<Peer>,
    group: GroupId,
    archived: Arc<AtomicU64>,
    pipelined: bool,
}

fn unreachable(e: &CallError) -> RPCError<C> {
    RPCError::Unreachable(Unreachable::new(e))
}

impl Client {
    fn connection(&self) -> Result<Arc<Connection>, RPCError<C>> {
        let live = self.peer.connection();
        live.ok_or_else(|| unreachable(&CallError::NotConnected))
    }

    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        service: Service,
        question: &Q,
        within: Duration,
    ) -> Result<A, RPCError<C>> {
        let network = |e: serde_json::Error| RPCError::Network(NetworkError::new(&e));
        let body = serde_json::to_vec(question).map_err(network)?;
        let answer = self
            .connection()?
            .call(service, self.group, &body, within)
            .await
            .map_err(|e| unreachable(&e))?;
        serde_json::from_slice(&answer).map_err(network)
    }
}

impl RaftNetworkV2<C> for Client {
    type SnapshotData = SnapshotDir;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<C>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<C>, RPCError<C>> {
        let mut body = Vec::new();
        append::encode(&rpc, self.archived.load(Ordering::Relaxed), &mut body);
        let answer = self
            .connection()?
            .call(Service::Append, self.group, &body, option.hard_ttl())
            .await
            .map_err(|e| unreachable(&e))?;
        serde_json::from_slice(&answer).map_err(|e| RPCError::Network(NetworkError::new(&e)))
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<C>, RPCError<C>>>, RPCError<C>>>
    where
        S: Stream<Item = AppendEntriesRequest<C>> + OptionalSend + Unpin + 'static,
    {
        if !self.pipelined {
            return stream_append_sequential(self, input, option);
        }
        Box::pin(async move {
            let connection = self.connection()?;
            let replies = connection
                .open_stream(self.group)
                .await
                .map_err(|e| unreachable(&e))?;
            let ended = Arc::new(AtomicBool::new(false));
            let items = send_items(
                connection,
                replies.id,
                input,
                self.archived.clone(),
                ended.clone(),
            );
            let sender = tokio::spawn(items);
            let state = Replies {
                replies,
                ended,
                _sender: AbortOnDrop(sender),
                over: false,
            };
            let out = futures::stream::unfold(state, |mut state| async move {
                if state.over {
                    return None;
                }
                let item = match state.replies.next().await {
                    Some(body) => serde_json::from_slice::<StreamAppendResult<C>>(&body)
                        .map_err(|e| RPCError::Network(NetworkError::new(&e))),
                    None if state.ended.load(Ordering::Acquire) => return None,
                    None => Err(unreachable(&CallError::Disconnected)),
                };
                state.over = !matches!(item, Ok(Ok(_)));
                Some((item, state))
            });
            let out: BoxStream<'s, _> = Box::pin(out);
            Ok(out)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<C>,
        option: RPCOption,
    ) -> Result<VoteResponse<C>, RPCError<C>> {
        self.ask(Service::Vote, &rpc, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<C>,
        option: RPCOption,
    ) -> Result<VoteResponse<C>, RPCError<C>> {
        self.ask(Service::PreVote, &rpc, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<C>, StreamingError<C>> {
        let connection = self.connection()?;
        tracing::info!(group = %self.group, at = ?snapshot.meta.last_log_id, "sending a snapshot");
        let sent = snapshot::send(
            &connection,
            self.group,
            vote,
            snapshot.meta,
            &snapshot.snapshot,
        );
        let body = tokio::select! {
            sent = sent => sent.map_err(|e| {
                tracing::warn!(group = %self.group, error = %e, "a snapshot was not sent; it is tried again");
                StreamingError::Unreachable(Unreachable::new(&e))
            })?,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        serde_json::from_slice(&body).map_err(|e| StreamingError::Network(NetworkError::new(&e)))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<C>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<C>, RPCError<C>> {
        self.ask(Service::TransferLeader, &req, option.hard_ttl())
            .await
    }
}

struct Replies {
    replies: crate::network::StreamReplies,
    /// The input has ended: so will the replies, and that is no error.
    ended: Arc<AtomicBool>,
    _sender: AbortOnDrop,
    over: bool,
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn send_items<S>(
    connection: Arc<Connection>,
    id: u64,
    mut input: S,
    archived: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
) where
    S: Stream<Item = AppendEntriesRequest<C>> + Unpin,
{
    while let Some(request) = input.next().await {
        let archived = archived.load(Ordering::Relaxed);
        let sent = connection.send_item(id, |out| append::encode(&request, archived, out));
        if sent.await.is_err() {
            return;
        }
    }
    ended.store(true, Ordering::Release);
    connection.end_stream(id).await;
}

/// Calls `Group`-level services of a member: proposals, read positions, fences.
pub async fn ask_member(
    peers: &Arc<Peers>,
    leader: (u64, &str),
    service: Service,
    group: GroupId,
    body: &[u8],
    within: Duration,
) -> Result<bytes::Bytes, CallError> {
    let peer = peers.node(leader.0, leader.1);
    let connection = peer.connection().ok_or(CallError::NotConnected)?;
    connection.call(service, group, body, within).await
}
