//! The answering side: accepts peers, checks who they are, hands requests to a handler.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::connection::write_loop;
use super::frame::{self, Kind};
use super::tls::{Identity, NodeTls};
use super::{Hello, PROTOCOL, SILENCE, Service};
use crate::GroupId;

const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_QUEUE: usize = 256;
/// Appends of a stream that have arrived and are not taken yet.
const STREAM_QUEUE: usize = 64;

/// What a node does for its peers.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    async fn call(&self, service: Service, group: GroupId, body: Bytes) -> Result<Bytes, String>;

    /// A peer was refused, since it lies in another jurisdiction.
    fn refused(&self, why: String);

    /// Runs a stream of appends until it ends; each reply goes to `replies`.
    async fn stream(
        &self,
        group: GroupId,
        items: mpsc::Receiver<Bytes>,
        replies: mpsc::Sender<Bytes>,
    ) -> Result<(), String>;
}

/// Serves peers on `listener` until the task is dropped.
pub async fn serve(listener: TcpListener, tls: NodeTls, hello: Hello, handler: Arc<dyn Handler>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((tcp, address)) => {
                let (tls, hello, handler) = (tls.clone(), hello.clone(), handler.clone());
                connections.spawn(async move {
                    if let Err(why) = connection(tcp, tls, hello, handler).await {
                        tracing::debug!(%address, %why, "a peer's connection was refused or lost");
                    }
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    tcp: TcpStream,
    tls: NodeTls,
    hello: Hello,
    handler: Arc<dyn Handler>,
) -> Result<(), String> {
    tcp.set_nodelay(true).map_err(|e| e.to_string())?;
    let ours = tls.identity.region();
    let greet = async {
        let tls = TlsAcceptor::from(tls.server)
            .accept(tcp)
            .await
            .map_err(|e| e.to_string())?;
        let certificate = tls.get_ref().1.peer_certificates().and_then(|c| c.first());
        let certificate = certificate.ok_or("the peer shows no certificate")?;
        let identity = Identity::of(certificate).map_err(|e| e.to_string())?;
        identity.check_region(ours).map_err(|e| {
            tracing::error!(peer = %identity.uri(), "a peer of another jurisdiction is refused");
            handler.refused(format!("{}: {e}", identity.uri()));
            e.to_string()
        })?;
        let Identity::Node { name, .. } = identity else {
            return Err("an operator's certificate is not a node's".to_string());
        };
        let (read, write) = tokio::io::split(tls);
        let mut reader = frame::Reader::new(read);
        let first = reader.next().await.map_err(|e| e.to_string())?;
        let theirs: Hello = match first {
            Some(f) if f.kind == Kind::Hello => {
                serde_json::from_slice(&f.payload).map_err(|e| e.to_string())?
            }
            _ => return Err("it did not greet".into()),
        };
        if theirs.protocol != PROTOCOL || theirs.name != name {
            return Err(format!(
                "protocol {} and name {:?} are not expected of {name}",
                theirs.protocol, theirs.name
            ));
        }
        Ok((reader, write))
    };
    let greeted = tokio::time::timeout(GREETING_TIMEOUT, greet).await;
    let (mut reader, write) = greeted.map_err(|_| "it did not greet in time".to_string())??;

    let (out, queue) = mpsc::channel::<Bytes>(WRITE_QUEUE);
    let greeting = serde_json::to_vec(&hello).map_err(|e| e.to_string())?;
    let _ = out.send(frame::encode(Kind::Hello, 0, &greeting)).await;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let _ = write_loop(write, queue).await;
    });
    let mut streams: HashMap<u64, mpsc::Sender<Bytes>> = HashMap::new();
    loop {
        let frame = tokio::select! {
            frame = tokio::time::timeout(SILENCE, reader.next()) => {
                frame.map_err(|_| "the peer has fallen silent".to_string())?
            }
            Some(_) = tasks.join_next() => continue,
        };
        let Some(mut frame) = frame.map_err(|e| e.to_string())? else {
            return Ok(());
        };
        match frame.kind {
            Kind::Request => {
                let request = split_request(&mut frame.payload);
                let (out, handler) = (out.clone(), handler.clone());
                tasks.spawn(async move {
                    let answer = match request {
                        Some((service, group, body)) => handler.call(service, group, body).await,
                        None => Err("the request does not parse".into()),
                    };
                    let (ok, body) = match &answer {
                        Ok(body) => (1, body.as_ref()),
                        Err(why) => (0, why.as_bytes()),
                    };
                    let mut response = frame::begin(Kind::Response, frame.id, 1 + body.len());
                    response.push(ok);
                    response.extend_from_slice(body);
                    let _ = out.send(frame::finish(response)).await;
                });
            }
            Kind::StreamOpen => {
                let Ok(group) = <[u8; 20]>::try_from(frame.payload.as_ref()) else {
                    return Err("a stream's group does not parse".into());
                };
                let (items, input) = mpsc::channel(STREAM_QUEUE);
                streams.retain(|_, s| !s.is_closed());
                streams.insert(frame.id, items);
                let (out, handler) = (out.clone(), handler.clone());
                tasks.spawn(stream(
                    GroupId::from_bytes(group),
                    frame.id,
                    input,
                    out,
                    handler,
                ));
            }
            Kind::StreamItem => {
                if let Some(stream) = streams.get(&frame.id)
                    && stream.send(frame.payload).await.is_err()
                {
                    streams.remove(&frame.id);
                }
            }
            Kind::StreamEnd => drop(streams.remove(&frame.id)),
            // What fills the queue is a sign of life too.
            Kind::Ping => drop(out.try_send(frame::encode(Kind::Pong, 0, &[]))),
            _ => return Err("a frame of this kind is not expected here".into()),
        }
    }
}

async fn stream(
    group: GroupId,
    id: u64,
    input: mpsc::Receiver<Bytes>,
    out: mpsc::Sender<Bytes>,
    handler: Arc<dyn Handler>,
) {
    let (replies, mut made) = mpsc::channel::<Bytes>(STREAM_QUEUE);
    let forward = async {
        while let Some(reply) = made.recv().await {
            if out
                .send(frame::encode(Kind::StreamReply, id, &reply))
                .await
                .is_err()
            {
                break;
            }
        }
    };
    let (result, ()) = tokio::join!(handler.stream(group, input, replies), forward);
    let why = result.err().unwrap_or_default();
    let _ = out
        .send(frame::encode(Kind::StreamClosed, id, why.as_bytes()))
        .await;
}

fn split_request(payload: &mut Bytes) -> Option<(Service, GroupId, Bytes)> {
    let service = Service::from_code(*payload.first()?)?;
    let group = GroupId::from_bytes(payload.get(1..21)?.try_into().ok()?);
    Some((service, group, payload.split_off(21)))
}
