//! Maintenance: of the tenant, not of the node.

use std::sync::Arc;

use bytes::Bytes;
use replication::mvcc::key::KeyRange;
use replication::proto::etcdserverpb::alarm_request::AlarmAction;
use replication::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse,
    StatusRequest, StatusResponse,
};
use tonic::{Request, Response, Status};

use super::{ETCD_VERSION, Gateway, failed};
use crate::proto::etcd::maintenance_server::Maintenance;

pub struct MaintenanceService(pub Arc<Gateway>);

/// CRC-32 over the live records of `group` at `revision`; 0 is the newest.
fn hash(group: &replication::group::Group, revision: i64) -> Result<(u32, i64, i64), Status> {
    let answer = group.store().view(|view, state| {
        state.bounds().check(revision)?;
        let at = if revision <= 0 {
            state.revision
        } else {
            revision
        };
        let all = KeyRange::Many(Bytes::new(), None);
        let mut hasher = crc32fast::Hasher::new();
        for (key, record) in view.scan(&all, at, 0)?.rows {
            hasher.update(&key);
            hasher.update(&record.encode());
        }
        Ok((hasher.finalize(), state.compacted, at))
    });
    answer.map_err(|e| failed(&e))
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        let status = group.status();
        let bytes = i64::try_from(status.bytes).unwrap_or(i64::MAX).max(4096);
        let errors = match status.leader {
            Some(_) => vec![],
            None => vec!["etcdserver: no leader".to_string()],
        };
        Ok(Response::new(StatusResponse {
            header: Some(self.0.header(&group, status.revision)),
            version: ETCD_VERSION.into(),
            storage_version: "3.7.0".into(),
            db_size: bytes,
            db_size_in_use: bytes,
            db_size_quota: i64::try_from(session.tenant.quota()).unwrap_or(i64::MAX),
            leader: status.leader.unwrap_or(0),
            raft_index: status.applied,
            raft_applied_index: status.applied,
            raft_term: status.term,
            errors,
            ..StatusResponse::default()
        }))
    }

    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        if request.get_ref().action() != AlarmAction::Get {
            return Err(Status::permission_denied("etcdserver: permission denied"));
        }
        Ok(Response::new(AlarmResponse {
            header: Some(self.0.header(&group, group.store().state().revision)),
            alarms: vec![],
        }))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        let (hash, _, at) = tokio::task::block_in_place(|| hash(&group, 0))?;
        Ok(Response::new(HashResponse {
            header: Some(self.0.header(&group, at)),
            hash,
        }))
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let group = self.0.group(&session).await?;
        let revision = request.get_ref().revision;
        let (hash, compact_revision, hash_revision) =
            tokio::task::block_in_place(|| hash(&group, revision))?;
        Ok(Response::new(HashKvResponse {
            header: Some(self.0.header(&group, group.store().state().revision)),
            hash,
            compact_revision,
            hash_revision,
        }))
    }
}
