//! Where in a group's log something stands, and which group that is.

use kms::TenantId;
use serde::{Deserialize, Serialize};

/// A Raft log id: the term, the leader that made the entry, the index.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position {
    pub term: u64,
    pub node: u64,
    pub index: u64,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:x}-{}", self.term, self.node, self.index)
    }
}

impl Position {
    pub const LENGTH: usize = 24;

    pub fn to_bytes(self) -> [u8; 24] {
        let mut out = [0u8; 24];
        out[..8].copy_from_slice(&self.term.to_be_bytes());
        out[8..16].copy_from_slice(&self.node.to_be_bytes());
        out[16..].copy_from_slice(&self.index.to_be_bytes());
        out
    }

    pub fn from_bytes(bytes: [u8; 24]) -> Self {
        let int = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Position {
            term: int(0),
            node: int(8),
            index: int(16),
        }
    }
}

/// A Raft group: a tenant and its incarnation, which changes at every restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GroupId {
    pub tenant: TenantId,
    pub incarnation: u32,
}

impl GroupId {
    pub const LENGTH: usize = 20;

    pub fn to_bytes(self) -> [u8; 20] {
        let mut out = [0u8; 20];
        out[..16].copy_from_slice(&self.tenant.0);
        out[16..].copy_from_slice(&self.incarnation.to_be_bytes());
        out
    }

    pub fn from_bytes(bytes: [u8; 20]) -> Self {
        let mut tenant = [0u8; 16];
        tenant.copy_from_slice(&bytes[..16]);
        GroupId {
            tenant: TenantId(tenant),
            incarnation: u32::from_be_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]),
        }
    }

    /// The tenant's incarnation after this one.
    pub fn next(self) -> Self {
        GroupId {
            incarnation: self.incarnation + 1,
            ..self
        }
    }
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.tenant, self.incarnation)
    }
}
