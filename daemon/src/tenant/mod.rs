//! Tenants on this node: opened when the directory places them here, found by name.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kms::secret::Secret;
use kms::{Providers, WrappedKeyStore};
use object_store::ObjectStore;
use parking_lot::RwLock;
use replication::GroupId;
use replication::archive::archiver::{self, Report};
use replication::archive::chain::Chain;
use replication::engine::Budget;
use replication::group::replica::{is_fenced, is_quarantined};
use replication::group::{Group, GroupConfig, GroupError, Groups};
use replication::log::NodeLog;
use replication::network::Peers;

use crate::directory::records::TenantRecord;

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

impl Parts {
    pub fn replica_dir(&self, group: GroupId) -> PathBuf {
        self.data_dir.join("tenants").join(group.to_string())
    }

    /// Unwraps the tenant's key, opens its group here and starts its archiver. `fresh`: the key is
    /// taken from the bucket even if this node has a copy.
    pub async fn open(
        &self,
        id: GroupId,
        rpo: Duration,
        archive_key: Option<Secret>,
        report: Report,
        min_voters: usize,
    ) -> Result<Arc<Group>, String> {
        if is_fenced(&self.replica_dir(id)) {
            return Err(GroupError::Fenced(id).to_string());
        }
        if is_quarantined(&self.replica_dir(id)) {
            return Err(GroupError::Quarantined(id).to_string());
        }
        let wrapped = self.keys.load(id.tenant).await.map_err(|e| e.to_string())?;
        let keys = wrapped
            .unwrap(&self.providers)
            .await
            .map_err(|e| e.to_string())?;
        let keys = Arc::new(keys);
        let archive_key = archive_key.unwrap_or_else(|| keys.archive_key());
        let group = Group::open(GroupConfig {
            id,
            node: self.peers.own_id(),
            dir: self.replica_dir(id),
            keys,
            budget: self.budget.clone(),
            log: self.log.clone(),
            peers: self.peers.clone(),
            rpo_zero: rpo.is_zero(),
            min_voters,
            max_log_bytes: self.max_log_bytes,
        })
        .await
        .map_err(|e| e.to_string())?;
        let chain = Chain::new(self.bucket.clone(), archive_key, id);
        group.spawn(archiver::run(group.clone(), chain, rpo, report));
        self.groups.insert(group.clone());
        Ok(group)
    }
}

/// A tenant as this node knows it.
pub struct Tenant {
    record: RwLock<TenantRecord>,
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

    pub fn all(&self) -> Vec<Arc<Tenant>> {
        self.tenants.read().values().cloned().collect()
    }

    /// Notes a record. Answers the tenant, and whether it is new here or of another incarnation.
    pub fn note(&self, record: TenantRecord) -> (Arc<Tenant>, bool) {
        let mut tenants = self.tenants.write();
        match tenants.get(&record.name) {
            Some(known) => {
                let other = known.record.read().group() != record.group();
                *known.record.write() = record;
                (known.clone(), other)
            }
            None => {
                let tenant = Arc::new(Tenant {
                    group: RwLock::new(Err("the tenant is being opened on this node".into())),
                    record: RwLock::new(record.clone()),
                });
                tenants.insert(record.name, tenant.clone());
                (tenant, true)
            }
        }
    }
}
