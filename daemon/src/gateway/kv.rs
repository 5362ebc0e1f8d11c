//! KV: Range, Put, DeleteRange, Txn, Compact.

use std::sync::Arc;

use prost::Message;
use replication::group::Group;
use replication::machine::check_command;
use replication::mvcc::check::{self, Failed};
use replication::proto::command::Command;
use replication::proto::command::command::Op;
use replication::proto::command::reply::Result as ReplyResult;
use replication::proto::etcdserverpb::request_op::Request as TxnOp;
use replication::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use tonic::{Code, Request, Response, Status};

use super::auth::Session;
use super::{Gateway, check_key, failed, proposal};
use crate::limits;
use crate::proto::etcd::kv_server::Kv;

pub struct KvService(pub Arc<Gateway>);

/// Ranges above this many keys are read on a thread of their own.
const INLINE_LIMIT: i64 = 128;

fn txn_is_serializable(txn: &TxnRequest) -> bool {
    let serializable = |op: &replication::proto::etcdserverpb::RequestOp| match &op.request {
        Some(TxnOp::RequestRange(r)) => r.serializable,
        _ => false,
    };
    txn.success.iter().chain(&txn.failure).all(serializable)
}

impl KvService {
    /// Proposes one operation; answers its reply and the group that gave it.
    async fn propose(
        &self,
        session: &Session,
        op: Op,
    ) -> Result<(ReplyResult, Arc<Group>), Status> {
        check_command(&op).map_err(|e| failed(&e))?;
        let group = self.0.group(session).await?;
        let grows = matches!(op, Op::Put(_) | Op::Txn(_));
        if grows && group.store().bytes() >= session.tenant.quota() {
            return Err(failed(&Failed::NoSpace));
        }
        let most = session.tenant.max_unarchived();
        if !most.is_zero() && group.unarchived_for() > most {
            return Err(Status::unavailable(format!(
                "holdfast: writes are refused while the archive is more than {} ms behind: is the bucket away?",
                most.as_millis()
            )));
        }
        let command = Command {
            user: session.user.clone(),
            auth_revision: session.auth_revision,
            op: Some(op),
        };
        if command.encoded_len() > limits::MAX_REQUEST {
            return Err(failed(&Failed::TooLarge));
        }
        let replies = group
            .propose(vec![command])
            .await
            .map_err(|e| proposal(&e))?;
        match replies.into_iter().next().and_then(|reply| reply.result) {
            Some(ReplyResult::Failure(f)) => Err(Status::new(Code::from_i32(f.code), f.message)),
            Some(result) => Ok((result, group)),
            None => Err(Status::unavailable("etcdserver: leader changed")),
        }
    }

    /// As `complete`, of a write, which was done: that is not to be said to be refused.
    fn written(
        &self,
        session: &Session,
        group: &Group,
        header: &mut Option<ResponseHeader>,
    ) -> Result<(), Status> {
        self.complete(session, group, header)
            .map_err(|e| Status::unavailable(format!("outcome unknown: {}", e.message())))
    }

    /// Fills in the header, if the tenant's key may still be used.
    fn complete(
        &self,
        session: &Session,
        group: &Group,
        header: &mut Option<ResponseHeader>,
    ) -> Result<(), Status> {
        check_key(&session.tenant, group)?;
        let revision = header.as_ref().map_or(0, |h| h.revision);
        *header = Some(self.0.header(group, revision));
        Ok(())
    }
}

fn unexpected() -> Status {
    Status::internal("holdfast: a reply of another kind than the request")
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let request = request.into_inner();
        check::range(&request).map_err(|e| failed(&e))?;
        let group = self.0.group(&session).await?;
        if !request.serializable {
            group.read_barrier().await.map_err(|e| proposal(&e))?;
        }
        self.0.check_session(&session, &group)?;
        let one = request.range_end.is_empty() || (1..=INLINE_LIMIT).contains(&request.limit);
        let answer = match one {
            true => group.store().range(&request),
            false => tokio::task::block_in_place(|| group.store().range(&request)),
        };
        let mut response = answer.map_err(|e| failed(&e))?;
        self.complete(&session, &group, &mut response.header)?;
        Ok(Response::new(response))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        match self
            .propose(&session, Op::Put(request.into_inner()))
            .await?
        {
            (ReplyResult::Put(mut response), group) => {
                self.written(&session, &group, &mut response.header)?;
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        match self
            .propose(&session, Op::DeleteRange(request.into_inner()))
            .await?
        {
            (ReplyResult::DeleteRange(mut response), group) => {
                self.written(&session, &group, &mut response.header)?;
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        let txn = request.into_inner();
        check::txn(&txn).map_err(|e| failed(&e))?;
        if check::is_read_only(&txn) {
            let group = self.0.group(&session).await?;
            if !txn_is_serializable(&txn) {
                group.read_barrier().await.map_err(|e| proposal(&e))?;
            }
            self.0.check_session(&session, &group)?;
            let mut response = group.store().read_txn(&txn).map_err(|e| failed(&e))?;
            self.complete(&session, &group, &mut response.header)?;
            return Ok(Response::new(response));
        }
        match self.propose(&session, Op::Txn(txn)).await? {
            (ReplyResult::Txn(mut response), group) => {
                self.written(&session, &group, &mut response.header)?;
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let session = self.0.session(request.metadata()).await?;
        match self
            .propose(&session, Op::Compact(request.into_inner()))
            .await?
        {
            (ReplyResult::Compact(mut response), group) => {
                self.written(&session, &group, &mut response.header)?;
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }
}
