//! The operators' API: gRPC over mutual TLS, for operator certificates only.

mod deletion;
mod drills;
mod keys;
mod objectives;
pub mod restore;

use std::sync::Arc;
use std::time::Duration;

use kms::{KeyUri, TenantId, WrappedKey};
use replication::network::Identity;
use replication::proto::command::command::Op;
use replication::proto::command::{Command, PutUser};
use replication::restore::Point;
use tonic::codegen::BoxStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::directory::controller;
use crate::directory::records::{TenantRecord, Tier};
use crate::gateway::auth::hash_password;
use crate::limits;
use crate::node::Node;
use crate::proto::admin::admin_server::{Admin, AdminServer};
use crate::proto::admin::{
    Archive, ChangeKeyRequest, CreateTenantRequest, DeleteTenantRequest, DeleteTenantResponse,
    EventList, ListArchiveRequest, ListDrillsRequest, ListEventsRequest, ListObjectivesRequest,
    ListTenantsRequest, NodeStatusRequest, NodeStatusResponse, ObjectiveList, ResidencyRequest,
    RestoreEvent, RestoreRegionRequest, RestoreTenantRequest, RotateKeyRequest, RunDrillRequest,
    SetTenantRequest, ShowCertificateRequest, ShowTenantRequest, Statement, StatementList,
    Tenant as TenantMessage, TenantList, UndeleteTenantRequest,
};
use crate::tenant::Tenant;
use crate::tenant::key::now_ms;

const PLACE_WITHIN: Duration = Duration::from_secs(10);
const OPEN_WITHIN: Duration = Duration::from_secs(20);

pub fn routes(node: &Arc<Node>) -> Routes {
    Routes::new(AdminServer::new(AdminService(node.clone())))
}

struct AdminService(Arc<Node>);

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

impl AdminService {
    /// Only an operator of this region may ask.
    fn operator<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let certificates = request.peer_certs();
        let first = certificates.as_ref().and_then(|c| c.first());
        let first = first
            .ok_or_else(|| Status::unauthenticated("an operator's certificate is required"))?;
        let identity = Identity::of(first).map_err(|e| Status::unauthenticated(e.to_string()))?;
        let ours = self.0.config.region;
        identity
            .check_region(ours)
            .map_err(|e| Status::permission_denied(e.to_string()))?;
        match identity {
            Identity::Operator { .. } => Ok(()),
            Identity::Node { .. } => Err(Status::permission_denied(
                "a node's certificate is not an operator's",
            )),
        }
    }

    fn directory(&self) -> Result<crate::directory::Directory, Status> {
        let state = self.0.state.read().name();
        let directory = self.0.directory();
        directory.ok_or_else(|| {
            Status::unavailable(format!("this node is {state}: it has no directory"))
        })
    }

    fn found(&self, name: &str) -> Result<Arc<Tenant>, Status> {
        let tenant = self.0.tenants.get(name);
        tenant.ok_or_else(|| Status::not_found(format!("there is no tenant {name} in this region")))
    }

    fn message(&self, tenant: &Tenant) -> TenantMessage {
        let record = tenant.record();
        let mut message = TenantMessage {
            name: record.name,
            id: record.id.to_string(),
            tier: record.tier.name().into(),
            rpo_ms: record.rpo_ms,
            rto_ms: record.rto_ms,
            key: record.key.to_string(),
            incarnation: record.incarnation,
            node: self.0.config.name.clone(),
            placement: record.placement,
            coverage: self.coverage(),
            key_grace_s: record.key_grace_s,
            generation: record.generation,
            other_generations: record.other_generations,
            key_task: record.key_task.map(|t| t.to_string()).unwrap_or_default(),
            ..TenantMessage::default()
        };
        let group = match tenant.group() {
            Ok(group) => group,
            Err(why) => {
                message.problem = why;
                return message;
            }
        };
        if let Some(why) = group.sealed() {
            message.problem = format!("sealed: {why}");
        }
        let status = group.status();
        let nodes = self
            .0
            .directory()
            .and_then(|d| d.nodes().ok())
            .unwrap_or_default();
        let name = |id: u64| {
            let known = nodes.iter().find(|n| n.record.id == id);
            known.map_or_else(|| format!("{id:x}"), |n| n.record.name.clone())
        };
        message.leader = status.leader.map(name).unwrap_or_default();
        message.voters = status.voters.iter().copied().map(name).collect();
        message.revision = status.revision;
        message.bytes = status.bytes;
        message.digest = status.digests.keys.to_string();
        message.applied = status.applied;
        message.archived = status.archived;
        message.actual_rpo_ms = status.rpo_ms;
        message
    }

    /// Whether the loss of the cloud region is survived.
    fn coverage(&self) -> String {
        match &self.0.config.bucket.cloud_region {
            // Nothing says where the nodes are: the operator's word is not asked for yet.
            Some(cloud) => format!("bucket in {cloud}; loss of that cloud region: not covered"),
            None => "bucket in a directory; loss of its machine: not covered".into(),
        }
    }

    async fn create(&self, request: CreateTenantRequest) -> Result<TenantMessage, Status> {
        plain_name("tenant", &request.name)?;
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
        let key: KeyUri = request
            .key
            .parse()
            .map_err(|e: kms::KmsError| Status::invalid_argument(e.to_string()))?;
        let region = self.0.config.region;
        let grace = keys::checked_grace(request.key_grace_s)?;
        let providers = &self.0.parts.providers;
        self.check_residency(&request.name, &key).await?;
        let directory = self.directory()?;
        let known = directory
            .tenants()
            .map_err(|e| Status::unavailable(e.to_string()))?;
        if known.iter().any(|t| t.record.name == request.name) {
            return Err(Status::already_exists(format!(
                "there is a tenant {} already",
                request.name
            )));
        }
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
            name: request.name.clone(),
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
        };
        directory
            .put_tenant(&record, 0)
            .await
            .map_err(|e| Status::aborted(e.to_string()))?;
        let tenant = self.opened(&request.name).await?;
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

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_tenant(
        &self,
        request: Request<CreateTenantRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        self.create(request.into_inner()).await.map(Response::new)
    }

    async fn list_tenants(
        &self,
        request: Request<ListTenantsRequest>,
    ) -> Result<Response<TenantList>, Status> {
        self.operator(&request)?;
        self.directory()?;
        let mut tenants: Vec<_> = self
            .0
            .tenants
            .all()
            .iter()
            .map(|t| self.message(t))
            .collect();
        tenants.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(TenantList { tenants }))
    }

    async fn show_tenant(
        &self,
        request: Request<ShowTenantRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        let tenant = self.found(&request.get_ref().name)?;
        let mut message = self.message(&tenant);
        let reports = self.0.key_reports(&tenant.record()).await;
        message.key_reports = reports.into_iter().map(|(_, r)| keys::message(r)).collect();
        Ok(Response::new(message))
    }

    async fn set_tenant(
        &self,
        request: Request<SetTenantRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        self.set(request.into_inner()).await.map(Response::new)
    }

    async fn rotate_key(
        &self,
        request: Request<RotateKeyRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        let request = request.into_inner();
        self.rotate(&request.name, request.rewrite)
            .await
            .map(Response::new)
    }

    async fn change_key(
        &self,
        request: Request<ChangeKeyRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        let request = request.into_inner();
        self.change_key_to(&request.name, &request.key)
            .await
            .map(Response::new)
    }

    async fn delete_tenant(
        &self,
        request: Request<DeleteTenantRequest>,
    ) -> Result<Response<DeleteTenantResponse>, Status> {
        self.operator(&request)?;
        self.delete(request.into_inner()).await.map(Response::new)
    }

    async fn undelete_tenant(
        &self,
        request: Request<UndeleteTenantRequest>,
    ) -> Result<Response<TenantMessage>, Status> {
        self.operator(&request)?;
        let name = request.into_inner().name;
        self.undelete(&name).await.map(Response::new)
    }

    async fn show_certificate(
        &self,
        request: Request<ShowCertificateRequest>,
    ) -> Result<Response<Statement>, Status> {
        self.operator(&request)?;
        let name = request.into_inner().name;
        self.certificate(&name).await.map(Response::new)
    }

    async fn residency(
        &self,
        request: Request<ResidencyRequest>,
    ) -> Result<Response<Statement>, Status> {
        self.operator(&request)?;
        let name = request.into_inner().name;
        self.residency_of(&name).await.map(Response::new)
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<EventList>, Status> {
        self.operator(&request)?;
        let tenant = &request.get_ref().tenant;
        self.events(tenant).map(Response::new)
    }

    async fn node_status(
        &self,
        request: Request<NodeStatusRequest>,
    ) -> Result<Response<NodeStatusResponse>, Status> {
        self.operator(&request)?;
        let nodes = self
            .0
            .directory()
            .and_then(|d| d.nodes().ok())
            .unwrap_or_default();
        Ok(Response::new(NodeStatusResponse {
            name: self.0.config.name.clone(),
            id: format!("{:x}", self.0.id),
            region: self.0.config.region.to_string(),
            zone: self.0.config.zone.clone(),
            state: self.0.state.read().name().into(),
            nodes: nodes.into_iter().map(|n| n.record.name).collect(),
            unreachable: self.0.unreachable(),
        }))
    }

    async fn restore_region(
        &self,
        request: Request<RestoreRegionRequest>,
    ) -> Result<Response<BoxStream<RestoreEvent>>, Status> {
        self.operator(&request)?;
        let request = request.get_ref();
        let asked = restore::Asked::Region {
            lost_at_ms: request.lost_at_ms,
            point: match request.at_ms {
                0 => Point::Newest,
                at => Point::Time(at),
            },
        };
        Ok(Response::new(restore::start(self.0.clone(), asked)?))
    }

    async fn list_archive(
        &self,
        request: Request<ListArchiveRequest>,
    ) -> Result<Response<Archive>, Status> {
        self.operator(&request)?;
        let name = &request.get_ref().name;
        self.archive(name).await.map(Response::new)
    }

    async fn list_objectives(
        &self,
        request: Request<ListObjectivesRequest>,
    ) -> Result<Response<ObjectiveList>, Status> {
        self.operator(&request)?;
        self.objectives().await.map(Response::new)
    }

    async fn run_drill(
        &self,
        request: Request<RunDrillRequest>,
    ) -> Result<Response<BoxStream<RestoreEvent>>, Status> {
        self.operator(&request)?;
        self.drill(&request.get_ref().name).map(Response::new)
    }

    async fn list_drills(
        &self,
        request: Request<ListDrillsRequest>,
    ) -> Result<Response<StatementList>, Status> {
        self.operator(&request)?;
        let name = &request.get_ref().name;
        self.drills(name).await.map(Response::new)
    }

    async fn restore_tenant(
        &self,
        request: Request<RestoreTenantRequest>,
    ) -> Result<Response<BoxStream<RestoreEvent>>, Status> {
        self.operator(&request)?;
        let request = request.into_inner();
        let point = match (request.at_ms, request.revision) {
            (at, 0) if at > 0 => Point::Time(at),
            (0, revision) if revision > 0 => Point::Revision(revision),
            _ => {
                return Err(Status::invalid_argument(
                    "name a time or a revision, above 0, and not both",
                ));
            }
        };
        let asked = restore::Asked::Tenant {
            name: request.name,
            point,
        };
        Ok(Response::new(restore::start(self.0.clone(), asked)?))
    }
}
