//! Records of the directory, JSON under `/nodes/`, `/tenants/`, `/links/`, `/drills/`,
//! `/scrubs/`, `/deleted/`
//! and `/events/`.

use std::time::Duration;

use kms::{KeyUri, TenantId};
use replication::GroupId;
use replication::clock::utc;
use serde::{Deserialize, Serialize};

use crate::limits::{DEFAULT_GRACE, KEEP_CHECKPOINTS};
use crate::tenant::key::now_ms;

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

    /// Seconds between drills where the tenant does not say.
    pub fn drill_every_s(self) -> u64 {
        match self {
            Tier::Enhanced => 24 * 3600,
            Tier::Standard => 7 * 24 * 3600,
        }
    }

    /// How far back every moment can be restored where the tenant does not say, in milliseconds.
    pub fn keep_ms(self) -> u64 {
        match self {
            Tier::Enhanced => 35 * 24 * 3_600_000,
            Tier::Standard => 7 * 24 * 3_600_000,
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
    /// The key generation that seals, and its fingerprint.
    pub generation: u32,
    pub fingerprint: String,
    pub quota_bytes: u64,
    /// Names of the nodes that hold a replica, one a zone. The first forms the group, once.
    pub placement: Vec<String>,
    /// The group was formed. It is never formed again: on empty disks that would be an empty
    /// tenant in the place of one that has to be restored.
    pub formed: bool,
    /// How long the tenant is served while its KMS does not answer, in seconds.
    #[serde(default = "default_grace")]
    pub key_grace_s: u64,
    /// Generations besides the one that seals which something may be sealed under.
    #[serde(default)]
    pub other_generations: Vec<u32>,
    /// What is being done with the key. It is gone on with until it is done.
    #[serde(default)]
    pub key_task: Option<KeyTask>,
    /// When the generation that seals was made, milliseconds since 1970.
    #[serde(default)]
    pub rotated_ms: u64,
    /// Days between scheduled rotations; 0: none.
    #[serde(default)]
    pub rotate_days: u32,
    #[serde(default)]
    pub deletion: Option<Deletion>,
    /// Why it is withheld while it is restored in place.
    #[serde(default)]
    pub restoring: Option<String>,
    /// Seconds between drills, 0 for none; the tier's if not given.
    #[serde(default)]
    pub drill_every_s: Option<u64>,
    /// Writes are refused while the oldest one that is not archived is older, milliseconds; 0: never.
    #[serde(default)]
    pub max_unarchived_ms: u64,
    /// How far back every moment can be restored, milliseconds; the tier's if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_ms: Option<u64>,
    /// The newest checkpoints, so many, stay in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_checkpoints: Option<u32>,
}

/// The newest drill of a tenant. Times are milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillRecord {
    pub tenant: TenantId,
    pub at_ms: u64,
    /// Why it failed; empty if it did not.
    pub problem: String,
    pub rpo_ms: u64,
    pub rto_ms: u64,
    /// How much was fetched and replayed, and how long that took.
    pub fetched_bytes: u64,
    pub fetched_in_ms: u64,
    pub replayed_bytes: u64,
    pub replayed_in_ms: u64,
    /// Where its evidence lies in the bucket.
    pub evidence: String,
}

/// A day of a tenant's objectives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveRecord {
    pub tenant: TenantId,
    /// Days since 1970.
    pub day: u64,
    pub hours: Vec<HourRecord>,
}

/// The worst of an hour, in milliseconds, beside what was contracted then. An estimate of 0 was not made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HourRecord {
    /// Of the day, UTC.
    pub hour: u8,
    pub rpo_ms: u64,
    pub rpo_contract_ms: u64,
    pub rto_ms: u64,
    pub rto_contract_ms: u64,
}

impl HourRecord {
    /// Takes what is worse in `other`, and its contract: the newer one.
    pub fn take_worse(&mut self, other: &HourRecord) {
        self.rpo_ms = self.rpo_ms.max(other.rpo_ms);
        self.rto_ms = self.rto_ms.max(other.rto_ms);
        self.rpo_contract_ms = other.rpo_contract_ms;
        self.rto_contract_ms = other.rto_contract_ms;
    }
}

/// The newest scrub of a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRecord {
    pub tenant: TenantId,
    /// When it ended, milliseconds since 1970.
    pub at_ms: u64,
    pub objects: u64,
    pub bytes: u64,
    /// Objects that were damaged or missing.
    pub damages: u64,
}

/// A tenant that is being deleted. Times are milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deletion {
    pub asked_ms: u64,
    /// From then on its keys are destroyed.
    pub due_ms: u64,
    /// It is past bringing back.
    pub destroying: bool,
}

/// A tenant that was deleted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletedRecord {
    pub name: String,
    pub id: TenantId,
    pub at_ms: u64,
    /// Where its certificate lies in the bucket.
    pub certificate: String,
}

/// Something that is being done with a tenant's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyTask {
    /// A new data key is made.
    Rotate {
        generation: u32,
        /// Then everything is rewritten under it.
        #[serde(default)]
        rewrite: bool,
    },
    /// Everything older is rewritten under this generation, and those before it are destroyed.
    Rewrite { generation: u32 },
    /// Every generation is wrapped anew under another KMS key, and a new one made.
    Change { key: KeyUri, generation: u32 },
}

impl KeyTask {
    /// The generation that seals once it is done.
    pub fn generation(&self) -> u32 {
        match self {
            KeyTask::Rotate { generation, .. }
            | KeyTask::Rewrite { generation }
            | KeyTask::Change { generation, .. } => *generation,
        }
    }
}

impl std::fmt::Display for KeyTask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeyTask::Rotate { generation, .. } => write!(f, "rotating to generation {generation}"),
            KeyTask::Rewrite { generation } => {
                write!(f, "rewriting everything under generation {generation}")
            }
            KeyTask::Change { key, generation } => {
                write!(f, "changing to key {key}, generation {generation}")
            }
        }
    }
}

fn default_grace() -> u64 {
    DEFAULT_GRACE.as_secs()
}

impl TenantRecord {
    /// Why a tenant that is being deleted is not served; none if it is not.
    pub fn deleted(&self) -> Option<String> {
        let deletion = self.deletion.as_ref()?;
        Some(match deletion.destroying {
            true => "it was deleted, and its keys are being destroyed".into(),
            false => format!(
                "it is deleted; 'holdfast tenant undelete {}' brings it back until its grace ends, {}",
                self.name,
                utc(deletion.due_ms)
            ),
        })
    }

    /// Why a tenant is not served, whatever its key; none if it is.
    pub fn withheld(&self) -> Option<String> {
        self.deleted().or_else(|| self.restoring.clone())
    }

    /// Whether the grace of its deletion has passed.
    pub fn is_due(&self) -> bool {
        let due = self.deletion.as_ref().map(|d| d.due_ms);
        due.is_some_and(|due| now_ms() >= due)
    }

    pub fn is_destroying(&self) -> bool {
        self.deletion.as_ref().is_some_and(|d| d.destroying)
    }

    /// A generation that was never used.
    pub fn next_generation(&self) -> u32 {
        self.needed().last().map_or(1, |newest| newest + 1)
    }

    /// Seconds between drills; 0: none.
    pub fn drill_every_s(&self) -> u64 {
        let given = self.drill_every_s;
        given.unwrap_or_else(|| self.tier.drill_every_s())
    }

    /// How far back every moment can be restored, in milliseconds.
    pub fn keep_ms(&self) -> u64 {
        self.keep_ms.unwrap_or_else(|| self.tier.keep_ms())
    }

    /// The newest checkpoints that stay in any case.
    pub fn keep_checkpoints(&self) -> usize {
        self.keep_checkpoints.unwrap_or(KEEP_CHECKPOINTS) as usize
    }

    pub fn key_grace(&self) -> Duration {
        Duration::from_secs(self.key_grace_s)
    }

    /// Key generations that a replica must hold, oldest first.
    pub fn needed(&self) -> Vec<u32> {
        let mut needed = self.other_generations.clone();
        needed.push(self.generation);
        needed.sort_unstable();
        needed.dedup();
        needed
    }

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The KMS does not answer; the grace runs.
    KeyUnproven,
    Sealed,
    Resumed,
    Rotated,
    KeyChanged,
    /// The archive begins at a newer checkpoint: what is before it is destroyed.
    ArchiveShortened,
    /// Everything is under the newest generation, and the older ones are destroyed.
    Rewritten,
    /// Something outside the jurisdiction was refused.
    ResidencyRefused,
    /// It was taken back to an earlier moment.
    Restored,
    /// A node's replica is damaged; it is rebuilt from its peers, and is whole again.
    ReplicaDamaged,
    ReplicaRebuilt,
    /// An object of its archive is damaged or missing; the archive is whole from a checkpoint on again.
    ArchiveDamaged,
    ArchiveHealed,
    /// Nothing of its history goes since a moment, until that is released.
    HoldPlaced,
    HoldReleased,
    /// A recovery objective will be missed unless something changes, is missed, is met again.
    ObjectiveNear,
    ObjectiveBreached,
    ObjectiveMet,
    /// A restore from the bucket was tried, and proven.
    DrillPassed,
    DrillFailed,
    /// The grace before its destruction began.
    Deleted,
    Undeleted,
    /// Keys and data are gone, and certified so.
    Destroyed,
}

impl EventKind {
    pub fn name(self) -> &'static str {
        match self {
            EventKind::KeyUnproven => "key-unproven",
            EventKind::Sealed => "sealed",
            EventKind::Resumed => "resumed",
            EventKind::Rotated => "rotated",
            EventKind::KeyChanged => "key-changed",
            EventKind::ArchiveShortened => "archive-shortened",
            EventKind::Rewritten => "rewritten",
            EventKind::ResidencyRefused => "residency-refused",
            EventKind::Restored => "restored",
            EventKind::ReplicaDamaged => "replica-damaged",
            EventKind::ReplicaRebuilt => "replica-rebuilt",
            EventKind::ArchiveDamaged => "archive-damaged",
            EventKind::ArchiveHealed => "archive-healed",
            EventKind::HoldPlaced => "hold-placed",
            EventKind::HoldReleased => "hold-released",
            EventKind::ObjectiveNear => "objective-near",
            EventKind::ObjectiveBreached => "objective-breached",
            EventKind::ObjectiveMet => "objective-met",
            EventKind::DrillPassed => "drill-passed",
            EventKind::DrillFailed => "drill-failed",
            EventKind::Deleted => "deleted",
            EventKind::Undeleted => "undeleted",
            EventKind::Destroyed => "destroyed",
        }
    }
}

/// Something that happened to a tenant on a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventRecord {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub node: String,
    pub tenant: String,
    pub kind: EventKind,
    pub detail: String,
}
