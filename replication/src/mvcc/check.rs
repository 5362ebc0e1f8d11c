//! What is refused before anything is proposed, and the errors that clients match on.

use std::collections::HashSet;

use bytes::Bytes;
use thiserror::Error;

use super::key::KeyRange;
use crate::engine::EngineError;
use crate::proto::command::Failure;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{
    PutRequest, RangeRequest, RequestOp, TxnRequest, range_request::SortOrder,
    range_request::SortTarget,
};

/// Operations of one list of a txn; a nested list gets what the outer ones left.
pub const MAX_TXN_OPS: usize = 128;

/// gRPC codes, as numbers: this crate does not depend on tonic.
pub mod code {
    pub const UNKNOWN: i32 = 2;
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const NOT_FOUND: i32 = 5;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    pub const FAILED_PRECONDITION: i32 = 9;
    pub const OUT_OF_RANGE: i32 = 11;
    pub const INTERNAL: i32 = 13;
    pub const UNAVAILABLE: i32 = 14;
    pub const UNAUTHENTICATED: i32 = 16;
}

/// A request that failed. Texts are etcd's: clients match on them.
#[derive(Debug, Error)]
pub enum Failed {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    #[error("etcdserver: key not found")]
    KeyNotFound,
    #[error("etcdserver: value is provided")]
    ValueProvided,
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    #[error("etcdserver: request is too large")]
    TooLarge,
    #[error("etcdserver: invalid sort option")]
    InvalidSort,
    #[error("etcdserver: revision of auth store is old")]
    AuthOldRevision,
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound,
    #[error("etcdserver: permission denied")]
    PermissionDenied,
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    #[error("holdfast: {0}")]
    Engine(#[from] EngineError),
}

impl Failed {
    pub fn code(&self) -> i32 {
        match self {
            Failed::EmptyKey
            | Failed::KeyNotFound
            | Failed::ValueProvided
            | Failed::LeaseProvided
            | Failed::DuplicateKey
            | Failed::TooManyOps
            | Failed::TooLarge
            | Failed::InvalidSort
            | Failed::AuthOldRevision => code::INVALID_ARGUMENT,
            Failed::LeaseNotFound => code::NOT_FOUND,
            Failed::PermissionDenied => code::PERMISSION_DENIED,
            Failed::NoSpace => code::RESOURCE_EXHAUSTED,
            Failed::Compacted | Failed::FutureRevision => code::OUT_OF_RANGE,
            Failed::Engine(_) => code::INTERNAL,
        }
    }
}

impl From<&Failed> for Failure {
    fn from(failed: &Failed) -> Failure {
        Failure {
            code: failed.code(),
            message: failed.to_string(),
        }
    }
}

pub fn range(request: &RangeRequest) -> Result<(), Failed> {
    if request.key.is_empty() {
        return Err(Failed::EmptyKey);
    }
    let known = SortOrder::try_from(request.sort_order).is_ok()
        && SortTarget::try_from(request.sort_target).is_ok();
    if known {
        Ok(())
    } else {
        Err(Failed::InvalidSort)
    }
}

pub fn put(request: &PutRequest) -> Result<(), Failed> {
    if request.key.is_empty() {
        return Err(Failed::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Failed::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Failed::LeaseProvided);
    }
    Ok(())
}

pub fn delete_key(key: &[u8]) -> Result<(), Failed> {
    if key.is_empty() {
        Err(Failed::EmptyKey)
    } else {
        Ok(())
    }
}

/// Checks a txn: sizes, each operation, and that no key is put twice or put and deleted.
pub fn txn(request: &TxnRequest) -> Result<(), Failed> {
    txn_ops(request, MAX_TXN_OPS)?;
    intervals(&request.success)?;
    intervals(&request.failure)?;
    Ok(())
}

fn txn_ops(request: &TxnRequest, max: usize) -> Result<(), Failed> {
    let size = request
        .compare
        .len()
        .max(request.success.len())
        .max(request.failure.len());
    if size > max {
        return Err(Failed::TooManyOps);
    }
    for compare in &request.compare {
        delete_key(&compare.key)?;
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(r)) => range(r)?,
            Some(Request::RequestPut(r)) => put(r)?,
            Some(Request::RequestDeleteRange(r)) => delete_key(&r.key)?,
            Some(Request::RequestTxn(r)) => txn_ops(r, max - size)?,
            None => return Err(Failed::KeyNotFound),
        }
    }
    Ok(())
}

#[derive(Default)]
struct Touched {
    puts: HashSet<Bytes>,
    deletes: Vec<KeyRange>,
}

impl Touched {
    fn deleted(&self, key: &[u8]) -> bool {
        self.deletes.iter().any(|range| range.contains(key))
    }
}

/// etcd's rule (`checkIntervals`): children's puts against this level's deletes and each other,
/// where the branches of one nested txn exclude one another; then this level's puts against all.
fn intervals(ops: &[RequestOp]) -> Result<Touched, Failed> {
    let mut all = Touched::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(r)) = &op.request {
            all.deletes.push(KeyRange::new(&r.key, &r.range_end));
        }
    }
    for op in ops {
        let Some(Request::RequestTxn(nested)) = &op.request else {
            continue;
        };
        let then = intervals(&nested.success)?;
        let otherwise = intervals(&nested.failure)?;
        for key in &then.puts {
            if all.deleted(key) || !all.puts.insert(key.clone()) {
                return Err(Failed::DuplicateKey);
            }
        }
        for key in otherwise.puts {
            let fresh = !all.puts.contains(&key) || then.puts.contains(&key);
            if all.deleted(&key) || !fresh {
                return Err(Failed::DuplicateKey);
            }
            all.puts.insert(key);
        }
        all.deletes.extend(then.deletes);
        all.deletes.extend(otherwise.deletes);
    }
    for op in ops {
        if let Some(Request::RequestPut(r)) = &op.request
            && (all.deleted(&r.key) || !all.puts.insert(r.key.clone()))
        {
            return Err(Failed::DuplicateKey);
        }
    }
    Ok(all)
}

/// Whether a txn, in any branch, changes nothing.
pub fn is_read_only(request: &TxnRequest) -> bool {
    let reads = |op: &RequestOp| match &op.request {
        Some(Request::RequestRange(_)) => true,
        Some(Request::RequestTxn(nested)) => is_read_only(nested),
        _ => false,
    };
    request.success.iter().chain(&request.failure).all(reads)
}
