//! Deleting a tenant, bringing it back within its grace, and the certificate of its destruction.

use std::time::Duration;

use object_store::ObjectStoreExt;
use object_store::path::Path;
use tokio::time::Instant;
use tonic::Status;

use super::AdminService;
use crate::directory::records::{Deletion, EventKind};
use crate::limits;
use crate::proto::admin::{
    DeleteTenantRequest, DeleteTenantResponse, Statement, Tenant as TenantMessage,
};
use crate::tenant::key::now_ms;

/// Who asks for a deletion without grace waits this long for the certificate.
const DESTROYED_WITHIN: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(200);

impl AdminService {
    pub(super) async fn delete(
        &self,
        request: DeleteTenantRequest,
    ) -> Result<DeleteTenantResponse, Status> {
        let grace = request.grace_s.unwrap_or(limits::DELETION_GRACE.as_secs());
        let mut found = self.record(&request.name).await?;
        if found.record.deletion.is_some() {
            let why = found.record.deleted().unwrap_or_default();
            return Err(Status::failed_precondition(format!(
                "tenant {}: {why}",
                request.name
            )));
        }
        let asked_ms = now_ms();
        let due_ms = asked_ms.saturating_add(grace.saturating_mul(1000));
        found.record.deletion = Some(Deletion {
            asked_ms,
            due_ms,
            destroying: false,
        });
        self.put(&found).await?;
        let detail = format!("destroyed after a grace of {grace} s");
        self.0.event(&found.record, EventKind::Deleted, detail);
        let mut answer = DeleteTenantResponse {
            due_ms,
            certificate: String::new(),
        };
        if grace == 0 {
            answer.certificate = self.destroyed(&request.name).await?.json;
        }
        Ok(answer)
    }

    async fn destroyed(&self, name: &str) -> Result<Statement, Status> {
        let deadline = Instant::now() + DESTROYED_WITHIN;
        loop {
            match self.record(name).await {
                Err(e) if e.code() == tonic::Code::NotFound => return self.certificate(name).await,
                _ if Instant::now() >= deadline => {
                    return Err(Status::deadline_exceeded(format!(
                        "tenant {name} is being destroyed and that goes on; a node of the region may be down, or an object locked: look in the log of the node that leads the directory, and with 'holdfast certificate show {name}'"
                    )));
                }
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    pub(super) async fn undelete(&self, name: &str) -> Result<TenantMessage, Status> {
        let mut found = self.record(name).await?;
        match &found.record.deletion {
            None => {
                return Err(Status::failed_precondition(format!(
                    "tenant {name} is not deleted"
                )));
            }
            Some(deletion) if deletion.destroying => {
                return Err(Status::failed_precondition(format!(
                    "tenant {name} is past bringing back: its keys are being destroyed"
                )));
            }
            Some(_) => found.record.deletion = None,
        }
        self.put(&found).await?;
        self.0
            .event(&found.record, EventKind::Undeleted, String::new());
        self.shown(name)
    }

    /// The newest certificate of a tenant of this name.
    pub(super) async fn certificate(&self, name: &str) -> Result<Statement, Status> {
        let unavailable = |e: &dyn std::fmt::Display| Status::unavailable(e.to_string());
        let deleted = self.directory()?.deleted().map_err(|e| unavailable(&e))?;
        let of_name = deleted.into_iter().filter(|d| d.record.name == name);
        let newest = of_name.max_by_key(|d| d.record.at_ms);
        let newest = newest.ok_or_else(|| {
            Status::not_found(format!("no tenant {name} was destroyed in this region"))
        })?;
        let path = Path::from(newest.record.certificate);
        let found = self.0.parts.bucket.get(&path).await;
        let found = found.map_err(|e| unavailable(&e))?;
        let bytes = found.bytes().await.map_err(|e| unavailable(&e))?;
        let json = String::from_utf8(bytes.to_vec()).map_err(|e| unavailable(&e))?;
        Ok(Statement { json })
    }
}
