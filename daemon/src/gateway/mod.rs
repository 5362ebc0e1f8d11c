//! The etcd v3 API. A request may arrive at any node of the region: writes go to the tenant's
//! leader, reads are answered here once this replica is known to be up to date.

pub mod auth;
mod cluster;
mod health;
mod kv;
mod maintenance;
mod rest;

use std::sync::Arc;

use replication::group::{Group, ProposeError};
use replication::mvcc::check::Failed;
use replication::proto::etcdserverpb::ResponseHeader;
use tonic::service::Routes;
use tonic::{Code, Status};

use crate::limits;
use crate::node::Node;
use crate::proto::{etcd, health as health_proto};
use crate::tenant::Tenant;
use crate::tenant::key::KeyRefusal;
use auth::{Session, Sessions};

/// The version that clients see; they switch features on by it.
pub const ETCD_VERSION: &str = "3.7.3";

/// Said by a node that has not yet been sent what its replica is to hold.
const FILLING: &str = "this node's replica is being filled from its peers; ask another node";
const OPENING_LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// What the services share.
pub struct Gateway {
    pub node: Arc<Node>,
    pub sessions: Sessions,
}

pub fn failed(e: &Failed) -> Status {
    Status::new(Code::from_i32(e.code()), e.to_string())
}

pub fn proposal(e: &ProposeError) -> Status {
    match e {
        ProposeError::Overloaded => Status::resource_exhausted(e.to_string()),
        ProposeError::Sealed => Status::failed_precondition(e.to_string()),
        _ => Status::unavailable(e.to_string()),
    }
}

/// Whether a tenant's key may be used here, as a client is told.
pub fn check_key(tenant: &Tenant, group: &Group) -> Result<(), Status> {
    tenant.key.check(group).map_err(|refusal| match refusal {
        // Not to be tried again before the customer has done something.
        KeyRefusal::Sealed(why) => Status::failed_precondition(format!(
            "holdfast: tenant {} is sealed: {why}",
            tenant.record().name
        )),
        KeyRefusal::Expired => Status::unavailable(
            "etcdserver: no leader (holdfast: this node proves the tenant's key anew)",
        ),
    })
}

impl Gateway {
    /// The group of a login, if this node may use the tenant's key.
    pub async fn group(&self, session: &Session) -> Result<Arc<Group>, Status> {
        self.group_of(&session.tenant).await
    }

    /// The group of a tenant, if this node may use its key. One that is just being opened or filled
    /// here is waited for.
    pub async fn group_of(&self, tenant: &Tenant) -> Result<Arc<Group>, Status> {
        let deadline = tokio::time::Instant::now() + limits::OPENING;
        let pending = |group: &Result<Arc<Group>, String>| match group {
            Ok(group) => !group.has_joined(),
            Err(_) => tenant.is_opening(),
        };
        let mut group = tenant.group();
        while pending(&group) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(OPENING_LOOK).await;
            group = tenant.group();
        }
        let no_leader =
            |why: &str| Status::unavailable(format!("etcdserver: no leader (holdfast: {why})"));
        let group = group.map_err(|why| no_leader(&why))?;
        if !group.has_joined() {
            return Err(no_leader(FILLING));
        }
        check_key(tenant, &group)?;
        Ok(group)
    }

    /// Fills in what only this node knows; `revision` stays.
    pub fn header(&self, group: &Group, revision: i64) -> ResponseHeader {
        let tenant = group.id().tenant.0;
        let cluster = u64::from_be_bytes(tenant[..8].try_into().expect("8 bytes"));
        ResponseHeader {
            cluster_id: cluster,
            member_id: self.node.id,
            revision,
            raft_term: group.term(),
        }
    }
}

/// All services that clients reach.
pub fn routes(node: &Arc<Node>) -> Routes {
    let gateway = Arc::new(Gateway {
        node: node.clone(),
        sessions: Sessions::default(),
    });
    let kv = etcd::kv_server::KvServer::from_arc(Arc::new(kv::KvService(gateway.clone())));
    let auth =
        etcd::auth_server::AuthServer::from_arc(Arc::new(auth::AuthService(gateway.clone())));
    let maintenance = Arc::new(maintenance::MaintenanceService(gateway.clone()));
    let maintenance = etcd::maintenance_server::MaintenanceServer::from_arc(maintenance);
    let cluster =
        etcd::cluster_server::ClusterServer::from_arc(Arc::new(cluster::ClusterService(gateway)));
    Routes::new(kv.max_decoding_message_size(limits::MAX_MESSAGE))
        .add_service(auth.max_decoding_message_size(limits::MAX_MESSAGE))
        .add_service(maintenance)
        .add_service(cluster)
        .add_service(etcd::watch_server::WatchServer::new(rest::Later))
        .add_service(etcd::lease_server::LeaseServer::new(rest::Later))
        .add_service(health_proto::health_server::HealthServer::new(
            health::HealthService(node.clone()),
        ))
}
