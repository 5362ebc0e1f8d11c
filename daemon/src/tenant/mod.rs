//! Tenants on this node: opened when the directory places them here, found by name.

pub mod deletion;
pub mod keeper;
pub mod key;
pub mod rebuilding;
pub mod rewriting;
pub mod rotation;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kms::secret::Secret;
use kms::{
    KmsError, Providers, TenantId, TenantKeys, WrappedKey, WrappedKeyError, WrappedKeyStore,
};
use object_store::ObjectStore;
use parking_lot::RwLock;
use replication::GroupId;
use replication::archive::archiver::{self, Report};
use replication::archive::chain::{Chain, Tail};
use replication::engine::Budget;
use replication::group::replica::{is_fenced, is_quarantined};
use replication::group::{Group, GroupConfig, GroupError, Groups};
use replication::log::NodeLog;
use replication::network::Peers;
use tokio::sync::Notify;

use crate::directory::records::TenantRecord;
use key::KeyStanding;

/// Where restores are tried, below the data directory.
pub const DRILL: &str = "drill";
/// Where a restore is made, below the data directory.
pub const RESTORE: &str = "restore";

/// What opening a tenant needs of its node.
pub struct Parts {
    pub data_dir: PathBuf,
    pub log: Arc<NodeLog>,
    pub peers: Arc<Peers>,
    pub groups: Arc<Groups>,
    pub budget: Arc<Budget>,
    pub providers: Providers,
    pub keys: WrappedKeyStore,
    pub bucket: Arc<dyn ObjectStore>,
    /// Above this the log is purged although it is not archived.
    pub max_log_bytes: u64,
}

/// What a tenant's group is opened with.
pub struct Opening {
    pub id: GroupId,
    /// Or why it is opened sealed.
    pub keys: Result<Arc<TenantKeys>, String>,
    pub rpo: Duration,
    pub archive_key: Secret,
    pub report: Report,
    /// Writes are refused while fewer members vote.
    pub min_voters: usize,
    /// The end of its chain, if that was begun just now.
    pub begun: Option<Tail>,
}

impl Parts {
    pub fn replica_dir(&self, group: GroupId) -> PathBuf {
        self.data_dir.join("tenants").join(group.to_string())
    }

    /// Where restores of a group are tried.
    pub fn drill_dir(&self, group: GroupId) -> PathBuf {
        self.data_dir.join(DRILL).join(group.to_string())
    }

    /// Opens a tenant's group here and starts its archiver.
    pub async fn open(&self, opening: Opening) -> Result<Arc<Group>, String> {
        let id = opening.id;
        if self.keys.is_shredded(id.tenant) {
            return Err("the tenant was deleted, and its keys are destroyed here".into());
        }
        if is_fenced(&self.replica_dir(id)) {
            return Err(GroupError::Fenced(id).to_string());
        }
        if is_quarantined(&self.replica_dir(id)) {
            return Err(GroupError::Quarantined(id).to_string());
        }
        let group = Group::open(GroupConfig {
            id,
            node: self.peers.own_id(),
            dir: self.replica_dir(id),
            keys: opening.keys,
            budget: self.budget.clone(),
            log: self.log.clone(),
            peers: self.peers.clone(),
            rpo_zero: opening.rpo.is_zero(),
            min_voters: opening.min_voters,
            max_log_bytes: self.max_log_bytes,
        })
        .await
        .map_err(|e| e.to_string())?;
        let chain = Chain::new(self.bucket.clone(), opening.archive_key, id);
        let (rpo, report, begun) = (opening.rpo, opening.report, opening.begun);
        group.spawn(archiver::run(group.clone(), chain, rpo, report, begun));
        self.groups.insert(group.clone());
        Ok(group)
    }
}

/// Unwraps the keys that a tenant's replica needs.
pub async fn wrapped(parts: &Parts, record: &TenantRecord) -> Result<TenantKeys, WrappedKeyError> {
    let mut wrapped = Vec::new();
    for generation in record.needed() {
        wrapped.push(parts.keys.load(record.id, generation, &record.key).await?);
    }
    let keys = WrappedKey::unwrap(&wrapped, &parts.providers).await?;
    // Kept only now that each is known to open.
    wrapped.iter().try_for_each(|key| parts.keys.keep(key))?;
    keys.begin_under(record.generation);
    match wrapped.iter().all(|key| key.key == record.key) {
        true => Ok(keys),
        false => Ok(keys.unproven()),
    }
}

/// Why a key is not there, without what only its owner should read of it.
pub fn reason(e: &WrappedKeyError) -> String {
    match e {
        WrappedKeyError::Kms(KmsError::Refused { refusal, hint, .. }) => {
            format!("its KMS says of its key: {refusal}. {hint}")
        }
        WrappedKeyError::Kms(KmsError::Unreachable { .. }) => "its KMS does not answer".into(),
        WrappedKeyError::Kms(KmsError::WrongCiphertext { .. }) => {
            "its wrapped key does not open: it was swapped or damaged".into()
        }
        WrappedKeyError::Kms(KmsError::Outside(_)) => {
            "its KMS key lies outside the jurisdiction".into()
        }
        WrappedKeyError::Kms(KmsError::Invalid(_)) => "its KMS key cannot be used here".into(),
        WrappedKeyError::Missing(_) => "its wrapped key is missing".into(),
        WrappedKeyError::Store { .. } => "its wrapped key cannot be read now".into(),
        WrappedKeyError::Invalid { .. } => "its wrapped key is not valid".into(),
    }
}

const OPENING: &str = "the tenant is being opened on this node";

/// A tenant as this node knows it.
pub struct Tenant {
    record: RwLock<TenantRecord>,
    pub key: KeyStanding,
    nudge: Notify,
    /// The group, or why there is none.
    group: RwLock<Result<Arc<Group>, String>>,
}

impl Tenant {
    pub fn record(&self) -> TenantRecord {
        self.record.read().clone()
    }

    pub fn quota(&self) -> u64 {
        self.record.read().quota_bytes
    }

    /// Has the tenant's keeper look at its record and ask for its key now.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }

    pub async fn nudged(&self) {
        self.nudge.notified().await;
    }

    /// How old the oldest write that is not archived may be before others are refused; zero: any.
    pub fn max_unarchived(&self) -> Duration {
        Duration::from_millis(self.record.read().max_unarchived_ms)
    }

    /// Whether the group is about to be here.
    pub fn is_opening(&self) -> bool {
        matches!(&*self.group.read(), Err(why) if why == OPENING)
    }

    /// The group on this node, sealed or not.
    pub fn group(&self) -> Result<Arc<Group>, String> {
        let group = self.group.read().clone()?;
        if group.is_fenced() {
            return Err(GroupError::Fenced(group.id()).to_string());
        }
        if group.is_quarantined() {
            return Err(GroupError::Quarantined(group.id()).to_string());
        }
        Ok(group)
    }

    pub fn set_group(&self, group: Result<Arc<Group>, String>) {
        *self.group.write() = group;
    }
}

/// The tenants of the region, by name.
#[derive(Default)]
pub struct Registry {
    tenants: RwLock<HashMap<String, Arc<Tenant>>>,
}

impl Registry {
    pub fn get(&self, name: &str) -> Option<Arc<Tenant>> {
        self.tenants.read().get(name).cloned()
    }

    pub fn find(&self, id: TenantId) -> Option<Arc<Tenant>> {
        let tenants = self.tenants.read();
        tenants.values().find(|t| t.record.read().id == id).cloned()
    }

    /// Forgets the tenants that are not among `ids`.
    pub fn retain(&self, ids: &[TenantId]) {
        let mut tenants = self.tenants.write();
        tenants.retain(|_, tenant| ids.contains(&tenant.record.read().id));
    }

    pub fn all(&self) -> Vec<Arc<Tenant>> {
        self.tenants.read().values().cloned().collect()
    }

    /// Notes a record. Answers the tenant, and whether it is new here or of another incarnation.
    pub fn note(&self, record: TenantRecord) -> (Arc<Tenant>, bool) {
        let mut tenants = self.tenants.write();
        match tenants.get(&record.name) {
            Some(known) => {
                let before = known.record.read().clone();
                let other = before.group() != record.group();
                if other {
                    // What is open is of the incarnation before.
                    known.set_group(Err(OPENING.into()));
                }
                if before != record {
                    known.key.lease.set_grace(record.key_grace());
                    *known.record.write() = record;
                    known.nudge();
                }
                (known.clone(), other)
            }
            None => {
                let tenant = Arc::new(Tenant {
                    group: RwLock::new(Err(OPENING.into())),
                    record: RwLock::new(record.clone()),
                    key: KeyStanding::default(),
                    nudge: Notify::new(),
                });
                tenant.key.lease.set_grace(record.key_grace());
                tenants.insert(record.name, tenant.clone());
                (tenant, true)
            }
        }
    }
}
