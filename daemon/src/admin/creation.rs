//! Making a tenant: its key before anything is sealed under it, its record, its first user.

use std::sync::Arc;
use std::time::Duration;

use kms::{KeyUri, TenantId, WrappedKey};
use replication::proto::command::command::Op;
use replication::proto::command::{Command, PutUser};
use tonic::Status;

use super::{AdminService, keys};
use crate::directory::controller;
use crate::directory::records::{TenantRecord, Tier};
use crate::gateway::auth::hash_password;
use crate::limits;
use crate::proto::admin::{CreateTenantRequest, Tenant as TenantMessage};
use crate::tenant::Tenant;
use crate::tenant::key::now_ms;

const PLACE_WITHIN: Duration = Duration::from_secs(10);
const OPEN_WITHIN: Duration = Duration::from_secs(20);

fn plain_name(what: &str, name: &str) -> Result<(), Status> {
    let plain = name
        .bytes()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
    if plain && !name.is_empty() && name.len() <= limits::MAX_NAME {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{what} \"{name}\": use 1 to 63 lower-case letters, digits or '-'"
    )))
}

/// The name and the KMS key of a tenant that is to be made.
pub struct New {
    pub name: String,
    pub key: KeyUri,
}

impl AdminService {
    /// A tenant that can be made here.
    pub(super) async fn checked(&self, name: String, key: &str) -> Result<New, Status> {
        plain_name("tenant", &name)?;
        let invalid = |e: kms::KmsError| Status::invalid_argument(e.to_string());
        let key: KeyUri = key.parse().map_err(invalid)?;
        self.check_residency(&name, &key).await?;
        let directory = self.directory()?;
        let known = directory
            .tenants()
            .map_err(|e| Status::unavailable(e.to_string()))?;
        if known.iter().any(|t| t.record.name == name) {
            let why = format!("there is a tenant {name} already");
            return Err(Status::already_exists(why));
        }
        Ok(New { name, key })
    }

    /// Makes a tenant, with its key, placement and first user.
    pub(super) async fn create(
        &self,
        request: CreateTenantRequest,
    ) -> Result<TenantMessage, Status> {
        if request.user.is_empty()
            || request.user.len() > limits::MAX_NAME
            || request.user.contains('@')
        {
            return Err(Status::invalid_argument(
                "user: use 1 to 63 characters without '@'",
            ));
        }
        if request.password.len() < 8 {
            return Err(Status::invalid_argument(
                "password: use eight characters or more",
            ));
        }
        let tier: Tier = request.tier.parse().map_err(Status::invalid_argument)?;
        let (rpo, rto) = tier.defaults();
        let region = self.0.config.region;
        let grace = keys::checked_grace(request.key_grace_s)?;
        let providers = &self.0.parts.providers;
        let New { name, key } = self.checked(request.name, &request.key).await?;
        let directory = self.directory()?;
        let placement = self.place(&directory).await?;
        let id = TenantId::random();
        let (wrapped, _) = WrappedKey::create(providers, &key, id, region)
            .await
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        // The key is durable before anything is sealed under it.
        self.0
            .parts
            .keys
            .create(&wrapped)
            .await
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let record = TenantRecord {
            name: name.clone(),
            id,
            incarnation: 1,
            tier,
            rpo_ms: request.rpo_ms.unwrap_or(rpo),
            rto_ms: if request.rto_ms == 0 {
                rto
            } else {
                request.rto_ms
            },
            key,
            generation: wrapped.generation,
            fingerprint: wrapped.fingerprint.clone(),
            quota_bytes: if request.quota_bytes == 0 {
                limits::DEFAULT_QUOTA
            } else {
                request.quota_bytes
            },
            placement,
            formed: false,
            key_grace_s: grace,
            other_generations: Vec::new(),
            key_task: None,
            rotated_ms: now_ms(),
            rotate_days: 0,
            deletion: None,
            restoring: None,
            drill_every_s: None,
            max_unarchived_ms: 0,
            keep_ms: None,
            keep_checkpoints: None,
        };
        directory
            .put_tenant(&record, 0)
            .await
            .map_err(|e| Status::aborted(e.to_string()))?;
        let tenant = self.opened(&name).await?;
        let group = tenant.group().map_err(Status::unavailable)?;
        let password = request.password;
        let password_hash = tokio::task::spawn_blocking(move || hash_password(&password))
            .await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(Status::internal)?;
        let command = Command {
            op: Some(Op::PutUser(PutUser {
                name: request.user,
                password_hash,
                root: true,
            })),
            ..Command::default()
        };
        group
            .propose(vec![command])
            .await
            .map_err(|e| Status::unavailable(format!("the first user: {e}")))?;
        self.formed(&directory, record.id).await?;
        Ok(self.message(&tenant))
    }

    /// Records that the tenant's group was formed.
    async fn formed(
        &self,
        directory: &crate::directory::Directory,
        id: TenantId,
    ) -> Result<(), Status> {
        // This node's replica of the directory may be a moment behind the leader's.
        directory
            .group()
            .read_barrier()
            .await
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let known = directory
            .tenants()
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let found = known.into_iter().find(|t| t.record.id == id);
        let mut found = found.ok_or_else(|| Status::aborted("the tenant's record is gone"))?;
        found.record.formed = true;
        directory
            .put_tenant(&found.record, found.modified)
            .await
            .map_err(|e| Status::aborted(e.to_string()))
    }

    /// Places a tenant; nodes of a region that was just founded may still be registering.
    async fn place(&self, directory: &crate::directory::Directory) -> Result<Vec<String>, Status> {
        let deadline = tokio::time::Instant::now() + PLACE_WITHIN;
        loop {
            match controller::place(directory) {
                Ok(placement) => return Ok(placement),
                Err(why) if tokio::time::Instant::now() >= deadline => {
                    return Err(Status::failed_precondition(why));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Waits until a tenant is open here and has a leader.
    async fn opened(&self, name: &str) -> Result<Arc<Tenant>, Status> {
        let deadline = tokio::time::Instant::now() + OPEN_WITHIN;
        loop {
            if let Some(tenant) = self.0.tenants.get(name)
                && let Ok(group) = tenant.group()
                && group.wait_leader(Duration::from_millis(100)).await
            {
                return Ok(tenant);
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(Status::deadline_exceeded(format!(
                    "tenant {name} is recorded, but has no leader yet; look with 'holdfast tenant show {name}'"
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
