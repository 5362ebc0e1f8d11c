//! Transactions: which branches are taken, and those that only read.

use bytes::Bytes;

use super::apply::header;
use super::state::State;
use crate::mvcc::check::Failed;
use crate::mvcc::key::KeyRange;
use crate::mvcc::range;
use crate::mvcc::record::Record;
use crate::mvcc::view::View;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    Compare, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};

/// Which branch each txn takes, outer before inner, all compared before anything is written.
pub(super) fn decide(
    view: &View<'_>,
    revision: i64,
    request: &TxnRequest,
    path: &mut Vec<bool>,
) -> Result<(), Failed> {
    let mut holds = true;
    for one in &request.compare {
        holds = holds && compare(view, revision, one)?;
    }
    path.push(holds);
    for op in branch(request, holds) {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            decide(view, revision, nested, path)?;
        }
    }
    Ok(())
}

fn compare(view: &View<'_>, revision: i64, compare: &Compare) -> Result<bool, Failed> {
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let found = view.scan(&range, revision, 0)?;
    if found.rows.is_empty() {
        let missing = Record {
            create: 0,
            modified: 0,
            version: 0,
            lease: 0,
            value: Bytes::new(),
        };
        let value = compare.target() == CompareTarget::Value;
        return Ok(!value && matches(compare, &missing));
    }
    Ok(found
        .rows
        .iter()
        .all(|(_, record)| matches(compare, record)))
}

/// Answers a txn that changes nothing.
pub(super) fn read_txn(
    view: &View<'_>,
    state: &State,
    request: &TxnRequest,
) -> Result<TxnResponse, Failed> {
    let mut path = Vec::new();
    decide(view, state.revision, request, &mut path)?;
    let mut response = run(request, &mut path.iter(), &mut |one| match one {
        Request::RequestRange(r) => {
            range::range(view, state.bounds(), r).map(|found| Some(Response::ResponseRange(found)))
        }
        _ => Ok(None),
    })?;
    response.header = header(state.revision);
    Ok(response)
}

/// Goes along the branches that `decide` took; `each` answers a request that is no txn.
pub(super) fn run(
    request: &TxnRequest,
    path: &mut std::slice::Iter<'_, bool>,
    each: &mut impl FnMut(&Request) -> Result<Option<Response>, Failed>,
) -> Result<TxnResponse, Failed> {
    let holds = *path.next().expect("decide visits every txn on the path");
    let mut responses = Vec::new();
    for op in branch(request, holds) {
        let response = match &op.request {
            Some(Request::RequestTxn(nested)) => {
                let mut nested = run(nested, path, each)?;
                nested.header = Some(ResponseHeader::default());
                Some(Response::ResponseTxn(nested))
            }
            Some(one) => each(one)?,
            None => None,
        };
        responses.push(ResponseOp { response });
    }
    Ok(TxnResponse {
        header: None,
        succeeded: holds,
        responses,
    })
}

pub(super) fn branch(request: &TxnRequest, holds: bool) -> &[RequestOp] {
    if holds {
        &request.success
    } else {
        &request.failure
    }
}

fn matches(compare: &Compare, record: &Record) -> bool {
    let int = |union: Option<i64>, own: i64| own.cmp(&union.unwrap_or(0));
    let target = compare.target_union.as_ref();
    let ordering = match compare.target() {
        CompareTarget::Version => int(
            target.and_then(|t| match t {
                TargetUnion::Version(v) => Some(*v),
                _ => None,
            }),
            record.version,
        ),
        CompareTarget::Create => int(
            target.and_then(|t| match t {
                TargetUnion::CreateRevision(v) => Some(*v),
                _ => None,
            }),
            record.create,
        ),
        CompareTarget::Mod => int(
            target.and_then(|t| match t {
                TargetUnion::ModRevision(v) => Some(*v),
                _ => None,
            }),
            record.modified,
        ),
        CompareTarget::Lease => int(
            target.and_then(|t| match t {
                TargetUnion::Lease(v) => Some(*v),
                _ => None,
            }),
            record.lease,
        ),
        CompareTarget::Value => {
            let empty = Bytes::new();
            let wanted = match target {
                Some(TargetUnion::Value(v)) => v,
                _ => &empty,
            };
            record.value.cmp(wanted)
        }
    };
    match compare.result() {
        CompareResult::Equal => ordering.is_eq(),
        CompareResult::NotEqual => ordering.is_ne(),
        CompareResult::Greater => ordering.is_gt(),
        CompareResult::Less => ordering.is_lt(),
    }
}
