//! Peers: who is dialled where, and the connection to each, kept up in the background.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio_rustls::TlsConnector;

use super::connection::Connection;
use super::frame::{self, Kind};
use super::tls::{Identity, NodeTls};
use super::{Hello, PROTOCOL};

const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(1);

/// A peer that is dialled. Its node id is learned from its greeting when not known before.
pub struct Peer {
    address: Mutex<String>,
    connection: RwLock<Option<Arc<Connection>>>,
    changed: Notify,
    hello: RwLock<Option<Hello>>,
}

impl Peer {
    /// The live connection, if there is one.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.read().clone().filter(|c| !c.is_closed())
    }

    /// As `connection`, waiting for one for at most `within`.
    pub async fn connected(&self, within: Duration) -> Option<Arc<Connection>> {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if let Some(connection) = self.connection() {
                    return connection;
                }
                changed.await;
            }
        };
        tokio::time::timeout(within, wait).await.ok()
    }

    /// What the peer said of itself when it was last connected.
    pub fn hello(&self) -> Option<Hello> {
        self.hello.read().clone()
    }
}

/// Why a peer was not connected.
enum Refused {
    Now(String),
    Replaced(String),
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Refused::Now(why)
    }
}

/// All peers of a node, by node id, or by address while the id is not known.
pub struct Peers {
    tls: NodeTls,
    hello: Hello,
    by_id: RwLock<HashMap<u64, Arc<Peer>>>,
    by_address: RwLock<HashMap<String, Arc<Peer>>>,
}

impl Peers {
    pub fn new(tls: NodeTls, hello: Hello) -> Arc<Self> {
        Arc::new(Peers {
            tls,
            hello,
            by_id: RwLock::default(),
            by_address: RwLock::default(),
        })
    }

    pub fn own_id(&self) -> u64 {
        self.hello.node
    }

    /// The peer with this node id, dialled at `address`.
    pub fn node(self: &Arc<Self>, id: u64, address: &str) -> Arc<Peer> {
        if let Some(peer) = self.by_id.read().get(&id) {
            let mut known = peer.address.lock();
            if *known != address {
                *known = address.to_string();
            }
            return peer.clone();
        }
        let mut by_id = self.by_id.write();
        let peer = by_id
            .entry(id)
            .or_insert_with(|| self.dial(address, Some(id)));
        peer.clone()
    }

    /// Whoever answers at `address`.
    pub fn address(self: &Arc<Self>, address: &str) -> Arc<Peer> {
        let mut by_address = self.by_address.write();
        let peer = by_address
            .entry(address.to_string())
            .or_insert_with(|| self.dial(address, None));
        peer.clone()
    }

    fn dial(self: &Arc<Self>, address: &str, expected: Option<u64>) -> Arc<Peer> {
        let peer = Arc::new(Peer {
            address: Mutex::new(address.to_string()),
            connection: RwLock::new(None),
            changed: Notify::new(),
            hello: RwLock::new(None),
        });
        let (peers, weak) = (Arc::downgrade(self), Arc::downgrade(&peer));
        tokio::spawn(async move {
            let mut retry = RETRY;
            let mut told = String::new();
            while let (Some(peers), Some(peer)) = (peers.upgrade(), weak.upgrade()) {
                let address = peer.address.lock().clone();
                let dialled =
                    tokio::time::timeout(DIAL_TIMEOUT, peers.connect(&address, expected)).await;
                drop(peers);
                match dialled {
                    Ok(Ok((connection, hello, closed))) => {
                        *peer.hello.write() = Some(hello);
                        *peer.connection.write() = Some(connection);
                        peer.changed.notify_waiters();
                        drop(peer);
                        let _ = closed.await;
                        retry = RETRY;
                        told.clear();
                    }
                    Ok(Err(Refused::Replaced(why))) => {
                        // A node id never comes back.
                        tracing::info!(%address, %why, "peer is no more");
                        return;
                    }
                    Ok(Err(Refused::Now(why))) => {
                        // Once per reason: an absent peer is dialled every second.
                        if why != told {
                            tracing::info!(%address, %why, "peer is not reachable");
                            told = why;
                        }
                        retry = (retry * 2).min(MAX_RETRY);
                    }
                    Err(_) => retry = (retry * 2).min(MAX_RETRY),
                }
                tokio::time::sleep(retry).await;
            }
        });
        peer
    }

    async fn connect(
        &self,
        address: &str,
        expected: Option<u64>,
    ) -> Result<(Arc<Connection>, Hello, oneshot::Receiver<()>), Refused> {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        // Nodes are known by the identity in their certificates, not by host names.
        let name = ServerName::try_from("holdfast.internal").map_err(|e| e.to_string())?;
        let mut tls = TlsConnector::from(self.tls.client.clone())
            .connect(name, tcp)
            .await
            .map_err(|e| e.to_string())?;
        let certificate = tls.get_ref().1.peer_certificates().and_then(|c| c.first());
        let certificate = certificate.ok_or_else(|| "the peer shows no certificate".to_string())?;
        let identity = Identity::of(certificate).map_err(|e| e.to_string())?;
        identity
            .check_region(self.tls.identity.region())
            .map_err(|e| e.to_string())?;
        let Identity::Node { name, .. } = &identity else {
            return Err(Refused::Now("the peer is an operator, not a node".into()));
        };
        let greeting = serde_json::to_vec(&self.hello).map_err(|e| e.to_string())?;
        tokio::io::AsyncWriteExt::write_all(&mut tls, &frame::encode(Kind::Hello, 0, &greeting))
            .await
            .map_err(|e| e.to_string())?;
        let (read, write) = tokio::io::split(tls);
        let mut reader = frame::Reader::new(read);
        let first = reader.next().await.map_err(|e| e.to_string())?;
        let hello: Hello = match first {
            Some(f) if f.kind == Kind::Hello => {
                serde_json::from_slice(&f.payload).map_err(|e| e.to_string())?
            }
            _ => {
                return Err(Refused::Now(
                    "the peer closed the connection before greeting".into(),
                ));
            }
        };
        if hello.protocol != PROTOCOL {
            return Err(Refused::Now(format!(
                "the peer speaks protocol {}, this node {PROTOCOL}",
                hello.protocol
            )));
        }
        if &hello.name != name {
            return Err(Refused::Now(
                "the peer's name is not its certificate's".into(),
            ));
        }
        if let Some(expected) = expected.filter(|id| *id != hello.node) {
            return Err(Refused::Replaced(format!(
                "node {name} is now {:x}, not {expected:x}",
                hello.node
            )));
        }
        let (tell, closed) = oneshot::channel();
        Ok((Connection::start(reader, write, tell), hello, closed))
    }
}
