//! Between nodes: one mutually authenticated TLS connection per peer and direction, on which the
//! messages of all groups go, each with the group that it is for.
//!
//! Invariants. A peer of another region is refused by its certificate before a byte of a tenant
//! moves. A connection is to one node id: a wiped node that comes back under its old name and
//! address is not taken for the old one. Messages of one stream arrive in order; a lost connection
//! ends every call and stream on it with an error, and outcomes are unknown then.

pub mod append;
mod connection;
pub mod frame;
mod peer;
mod server;
pub mod tls;

pub use connection::{CallError, Connection, StreamReplies};
pub use peer::{Peer, Peers};
pub use server::{Handler, serve};
pub use tls::{Identity, NodeTls, TlsError};

use serde::{Deserialize, Serialize};

/// The version of the protocol between nodes.
pub const PROTOCOL: u32 = 3;

/// The dialling side asks so often for a sign of life, and either side gives a connection up after
/// such a silence: a peer that hangs, or a network that swallows everything, must not hold what
/// waits on the connection, the purge of the log included.
const PING: std::time::Duration = std::time::Duration::from_secs(1);
const SILENCE: std::time::Duration = std::time::Duration::from_secs(6);

/// What each side says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    pub protocol: u32,
    /// The newest format of entries that this node can apply.
    pub format: u32,
    pub node: u64,
    pub name: String,
}

/// Which service of a node a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Service {
    Append = 1,
    Vote = 2,
    PreVote = 3,
    TransferLeader = 4,
    SnapshotBegin = 5,
    SnapshotChunk = 6,
    SnapshotEnd = 7,
    Propose = 8,
    ReadIndex = 9,
    /// Questions of the daemon above the groups.
    Daemon = 10,
    /// The group's chain was closed by a restore.
    Fence = 11,
}

impl Service {
    pub fn from_code(code: u8) -> Option<Service> {
        use Service::*;
        [
            Append,
            Vote,
            PreVote,
            TransferLeader,
            SnapshotBegin,
            SnapshotChunk,
            SnapshotEnd,
            Propose,
            ReadIndex,
            Daemon,
            Fence,
        ]
        .into_iter()
        .find(|s| *s as u8 == code)
    }
}
