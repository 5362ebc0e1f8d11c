//! The operators' API: gRPC over mutual TLS, for operator certificates only.

mod archive;
mod creation;
mod deletion;
mod drills;
mod keys;
mod objectives;
pub mod restore;

use std::sync::Arc;

use replication::network::Identity;
use replication::restore::Point;
use tonic::codegen::BoxStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::node::Node;
use crate::proto::admin::admin_server::{Admin, AdminServer};
use crate::proto::admin::{
    Archive, ArchiveCheckpoint, ChangeKeyRequest, CreateTenantRequest, DeleteTenantRequest,
    DeleteTenantResponse, EventList, Hold, HoldArchiveRequest, ListArchiveRequest,
    ListDrillsRequest, ListEventsRequest, ListObjectivesRequest, ListTenantsRequest,
    MakeCheckpointRequest, NodeStatusRequest, NodeStatusResponse, ObjectiveHistoryRequest,
    ObjectiveHistoryResponse, ObjectiveList, ReleaseArchiveRequest, ReleaseArchiveResponse,
    ResidencyRequest, RestoreEvent, RestoreRegionRequest, RestoreTenantRequest, RotateKeyRequest,
    RunDrillRequest, ScrubArchiveRequest, ScrubArchiveResponse, SetTenantRequest,
    ShowCertificateRequest, ShowTenantRequest, Statement, StatementList, SweepArchiveRequest,
    SweepArchiveResponse, Tenant as TenantMessage, TenantList, UndeleteTenantRequest,
};
use crate::tenant::Tenant;

pub fn routes(node: &Arc<Node>) -> Routes {
    Routes::new(AdminServer::new(AdminService(node.clone())))
}

struct AdminService(Arc<Node>);

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

    async fn sweep_archive(
        &self,
        request: Request<SweepArchiveRequest>,
    ) -> Result<Response<SweepArchiveResponse>, Status> {
        self.operator(&request)?;
        self.sweep(request.into_inner()).await.map(Response::new)
    }

    async fn scrub_archive(
        &self,
        request: Request<ScrubArchiveRequest>,
    ) -> Result<Response<ScrubArchiveResponse>, Status> {
        self.operator(&request)?;
        self.scrub(request.into_inner()).await.map(Response::new)
    }

    async fn make_checkpoint(
        &self,
        request: Request<MakeCheckpointRequest>,
    ) -> Result<Response<ArchiveCheckpoint>, Status> {
        self.operator(&request)?;
        let made = self.checkpoint(request.into_inner()).await;
        made.map(Response::new)
    }

    async fn hold_archive(
        &self,
        request: Request<HoldArchiveRequest>,
    ) -> Result<Response<Hold>, Status> {
        self.operator(&request)?;
        self.hold(request.into_inner()).await.map(Response::new)
    }

    async fn release_archive(
        &self,
        request: Request<ReleaseArchiveRequest>,
    ) -> Result<Response<ReleaseArchiveResponse>, Status> {
        self.operator(&request)?;
        self.release(request.into_inner()).await?;
        Ok(Response::new(ReleaseArchiveResponse {}))
    }

    async fn objective_history(
        &self,
        request: Request<ObjectiveHistoryRequest>,
    ) -> Result<Response<ObjectiveHistoryResponse>, Status> {
        self.operator(&request)?;
        let name = request.into_inner().name;
        Ok(Response::new(AdminService::objective_history(self, &name)?))
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
            (0, 0) if !request.new_name.is_empty() => Point::Newest,
            _ => {
                return Err(Status::invalid_argument(
                    "name a time or a revision, above 0, and not both",
                ));
            }
        };
        let name = request.name;
        let asked = match request.new_name.is_empty() {
            true => restore::Asked::Tenant { name, point },
            false => {
                let new = self.checked(request.new_name, &request.new_key).await?;
                restore::Asked::Copy { name, point, new }
            }
        };
        Ok(Response::new(restore::start(self.0.clone(), asked)?))
    }
}
