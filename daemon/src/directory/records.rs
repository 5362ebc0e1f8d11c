//! Records of the directory, JSON under `/nodes/`, `/tenants/` and `/links/`.

use kms::{KeyUri, TenantId};
use replication::GroupId;
use serde::{Deserialize, Serialize};

/// A node: its name is its certificate's, its id its data directory's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    pub name: String,
    pub id: u64,
    pub zone: String,
    pub peer_address: String,
    pub client_url: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Enhanced,
    Standard,
}

impl Tier {
    pub fn name(self) -> &'static str {
        match self {
            Tier::Enhanced => "enhanced",
            Tier::Standard => "standard",
        }
    }

    /// RPO and RTO in milliseconds where the contract names none.
    pub fn defaults(self) -> (u64, u64) {
        match self {
            Tier::Enhanced => (5_000, 15 * 60_000),
            Tier::Standard => (15 * 60_000, 24 * 3_600_000),
        }
    }
}

impl std::str::FromStr for Tier {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "enhanced" => Ok(Tier::Enhanced),
            "standard" => Ok(Tier::Standard),
            _ => Err(format!("\"{s}\" is not a tier; use enhanced or standard")),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantRecord {
    pub name: String,
    pub id: TenantId,
    pub incarnation: u32,
    pub tier: Tier,
    pub rpo_ms: u64,
    pub rto_ms: u64,
    pub key: KeyUri,
    /// Newest key generation and its fingerprint.
    pub generation: u32,
    pub fingerprint: String,
    pub quota_bytes: u64,
    /// Names of the nodes that hold a replica, one a zone. The first forms the group, once.
    pub placement: Vec<String>,
    /// The group was formed. It is never formed again: on empty disks that would be an empty
    /// tenant in the place of one that has to be restored.
    pub formed: bool,
}

impl TenantRecord {
    pub fn group(&self) -> GroupId {
        GroupId {
            tenant: self.id,
            incarnation: self.incarnation,
        }
    }
}

/// The newest archive link of a tenant that the region knows of: a chain that is older is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkRecord {
    pub tenant: TenantId,
    pub incarnation: u32,
    pub link: u64,
}
