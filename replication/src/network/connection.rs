//! The dialling side of a connection: calls and streams on it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

use super::frame::{self, Frame, Kind};
use super::{PING, SILENCE, Service};
use crate::GroupId;

/// Frames waiting to be written; a sender waits when it is full.
const WRITE_QUEUE: usize = 256;
/// Replies of a stream waiting to be taken.
const REPLY_QUEUE: usize = 256;

#[derive(Debug, Error)]
pub enum CallError {
    /// Nothing was sent.
    #[error("the peer is not connected")]
    NotConnected,
    /// The connection was lost: the outcome is unknown.
    #[error("the connection to the peer was lost")]
    Disconnected,
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The peer's own words.
    #[error("{0}")]
    Remote(String),
}

enum Pending {
    Call(oneshot::Sender<Result<Bytes, CallError>>),
    Stream(mpsc::Sender<Bytes>),
}

/// One live connection to a peer.
pub struct Connection {
    out: mpsc::Sender<Bytes>,
    pending: Mutex<Option<HashMap<u64, Pending>>>,
    next_id: AtomicU64,
}

/// Replies of a stream. Dropping it ends the stream.
pub struct StreamReplies {
    pub id: u64,
    replies: mpsc::Receiver<Bytes>,
    connection: Arc<Connection>,
}

impl StreamReplies {
    /// The next reply; `None` when the stream or the connection has ended.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.replies.recv().await
    }
}

impl Drop for StreamReplies {
    fn drop(&mut self) {
        if self.connection.take(self.id).is_some() {
            let _ = self
                .connection
                .out
                .try_send(frame::encode(Kind::StreamEnd, self.id, &[]));
        }
    }
}

/// Writes what is queued, flushing when the queue is empty.
pub(super) async fn write_loop<W: AsyncWrite + Unpin>(
    mut io: W,
    mut queue: mpsc::Receiver<Bytes>,
) -> std::io::Result<()> {
    let mut gathered = Vec::with_capacity(128 << 10);
    while let Some(first) = queue.recv().await {
        gathered.clear();
        gathered.extend_from_slice(&first);
        while gathered.len() < (1 << 20) {
            let Ok(more) = queue.try_recv() else { break };
            gathered.extend_from_slice(&more);
        }
        io.write_all(&gathered).await?;
        io.flush().await?;
        if gathered.capacity() > (4 << 20) {
            gathered = Vec::with_capacity(128 << 10);
        }
    }
    io.shutdown().await
}

impl Connection {
    /// Starts a connection after the greeting; `closed` is told when it is over.
    pub(super) fn start<R, W>(
        mut reader: frame::Reader<R>,
        writer: W,
        closed: oneshot::Sender<()>,
    ) -> Arc<Self>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (out, queue) = mpsc::channel(WRITE_QUEUE);
        let connection = Arc::new(Connection {
            out,
            pending: Mutex::new(Some(HashMap::new())),
            next_id: AtomicU64::new(1),
        });
        let own = connection.clone();
        tokio::spawn(async move {
            let mut write = tokio::spawn(write_loop(writer, queue));
            let mut ping = tokio::time::interval(PING);
            ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut heard = Instant::now();
            loop {
                tokio::select! {
                    // What has arrived counts before the clock.
                    biased;
                    frame = reader.next() => match frame {
                        Ok(Some(frame)) => {
                            own.arrived(frame).await;
                            heard = Instant::now();
                        }
                        Ok(None) | Err(_) => break,
                    },
                    _ = ping.tick() => {
                        if heard.elapsed() > SILENCE {
                            break;
                        }
                        // A full queue is a sign of life to come.
                        let _ = own.out.try_send(frame::encode(Kind::Ping, 0, &[]));
                    }
                    _ = &mut write => break,
                }
            }
            write.abort();
            // Every call and stream ends with an error: their senders are dropped here.
            own.pending.lock().take();
            let _ = closed.send(());
        });
        connection
    }

    pub fn is_closed(&self) -> bool {
        self.pending.lock().is_none()
    }

    async fn arrived(&self, frame: Frame) {
        match frame.kind {
            Kind::Response => {
                if let Some(Pending::Call(tell)) = self.take(frame.id) {
                    let _ = tell.send(match frame.payload.first() {
                        Some(1) => Ok(frame.payload.slice(1..)),
                        _ => Err(CallError::Remote(
                            String::from_utf8_lossy(frame.payload.get(1..).unwrap_or_default())
                                .into_owned(),
                        )),
                    });
                }
            }
            Kind::StreamReply => {
                let stream = match self.pending.lock().as_ref().and_then(|p| p.get(&frame.id)) {
                    Some(Pending::Stream(stream)) => Some(stream.clone()),
                    _ => None,
                };
                if let Some(stream) = stream {
                    let _ = stream.send(frame.payload).await;
                }
            }
            Kind::StreamClosed => drop(self.take(frame.id)),
            _ => {}
        }
    }

    fn take(&self, id: u64) -> Option<Pending> {
        self.pending.lock().as_mut()?.remove(&id)
    }

    fn register(&self, pending: Pending) -> Result<u64, CallError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        match self.pending.lock().as_mut() {
            Some(map) => {
                map.insert(id, pending);
                Ok(id)
            }
            None => Err(CallError::Disconnected),
        }
    }

    /// Asks and waits. After a time-out or a lost connection the outcome is unknown.
    pub async fn call(
        &self,
        service: Service,
        group: GroupId,
        body: &[u8],
        within: Duration,
    ) -> Result<Bytes, CallError> {
        let (tell, told) = oneshot::channel();
        let id = self.register(Pending::Call(tell))?;
        let mut out = frame::begin(Kind::Request, id, 21 + body.len());
        out.push(service as u8);
        out.extend_from_slice(&group.to_bytes());
        out.extend_from_slice(body);
        let work = async {
            self.out
                .send(frame::finish(out))
                .await
                .map_err(|_| CallError::Disconnected)?;
            told.await.map_err(|_| CallError::Disconnected)?
        };
        match tokio::time::timeout(within, work).await {
            Ok(answer) => answer,
            Err(_) => {
                self.take(id);
                Err(CallError::TimedOut)
            }
        }
    }

    /// Opens a stream of appends to `group`.
    pub async fn open_stream(self: &Arc<Self>, group: GroupId) -> Result<StreamReplies, CallError> {
        let (stream, replies) = mpsc::channel(REPLY_QUEUE);
        let id = self.register(Pending::Stream(stream))?;
        let open = frame::encode(Kind::StreamOpen, id, &group.to_bytes());
        let replies = StreamReplies {
            id,
            replies,
            connection: self.clone(),
        };
        self.out
            .send(open)
            .await
            .map_err(|_| CallError::Disconnected)?;
        Ok(replies)
    }

    /// Sends an item of a stream.
    pub async fn send_item(
        &self,
        id: u64,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), CallError> {
        let mut out = frame::begin(Kind::StreamItem, id, 4096);
        encode(&mut out);
        self.out
            .send(frame::finish(out))
            .await
            .map_err(|_| CallError::Disconnected)
    }

    pub async fn end_stream(&self, id: u64) {
        let _ = self.out.send(frame::encode(Kind::StreamEnd, id, &[])).await;
    }
}
