//! Cluster: the region's nodes, for clients that ask for endpoints.

use std::sync::Arc;

use replication::proto::etcdserverpb::{Member, MemberListRequest, MemberListResponse};
use tonic::{Request, Response, Status};

use super::Gateway;
use crate::proto::etcd::cluster_server::Cluster;

pub struct ClusterService(pub Arc<Gateway>);

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        let directory = self.0.node.directory();
        let directory = directory.ok_or_else(|| Status::unavailable("etcdserver: no leader"))?;
        let nodes = directory
            .nodes()
            .map_err(|e| Status::unavailable(e.to_string()))?;
        let members = nodes.into_iter().map(|found| Member {
            id: found.record.id,
            name: found.record.name,
            // Peers speak another protocol than etcd's: nothing for clients to dial.
            peer_ur_ls: vec![],
            client_ur_ls: vec![found.record.client_url],
            is_learner: false,
        });
        Ok(Response::new(MemberListResponse {
            header: Some(self.0.header(&group, group.store().state().revision)),
            members: members.collect(),
        }))
    }
}
