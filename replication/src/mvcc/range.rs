//! A Range request on a view: filters, order, limit and count as etcd has them.

use std::cmp::Ordering;

use super::check::Failed;
use super::key::KeyRange;
use super::view::View;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader};
use crate::proto::mvccpb::KeyValue;

/// The revisions that bound what can be read.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub revision: i64,
    pub compacted: i64,
}

impl Bounds {
    /// Refuses a revision that is not there yet, or no more.
    pub fn check(&self, revision: i64) -> Result<(), Failed> {
        if revision > self.revision {
            return Err(Failed::FutureRevision);
        }
        if revision > 0 && revision < self.compacted {
            return Err(Failed::Compacted);
        }
        Ok(())
    }
}

/// Answers `request`; the header carries the current revision only.
pub fn range(
    view: &View<'_>,
    bounds: Bounds,
    request: &RangeRequest,
) -> Result<RangeResponse, Failed> {
    bounds.check(request.revision)?;
    let at = match request.revision {
        0 | i64::MIN..0 => bounds.revision,
        at => at,
    };
    let wanted = KeyRange::new(&request.key, &request.range_end);
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let order = request.sort_order();
    let target = request.sort_target();
    let filtered = request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0;
    let order = match (target, order) {
        (SortTarget::Key, SortOrder::Ascend) => SortOrder::None,
        (SortTarget::Key, order) => order,
        (_, SortOrder::None) => SortOrder::Ascend,
        (_, order) => order,
    };
    // As etcd: with order NONE and another target than the key, what the limit lets through in key
    // order is sorted, not the whole range.
    let whole = filtered || request.sort_order() != SortOrder::None;
    let fetch = match (request.count_only, whole, limit) {
        (true, ..) => 1,
        (_, true, _) | (_, _, 0) => 0,
        (_, false, limit) => limit.saturating_add(1),
    };
    let found = view.scan(&wanted, at, fetch)?;
    let mut response = RangeResponse {
        header: Some(ResponseHeader {
            revision: bounds.revision,
            ..ResponseHeader::default()
        }),
        count: found.count,
        ..RangeResponse::default()
    };
    if request.count_only {
        return Ok(response);
    }
    let mut kvs: Vec<KeyValue> = found
        .rows
        .into_iter()
        .map(|(key, record)| record.into_key_value(key))
        .filter(|kv| !filtered || passes(kv, request))
        .collect();
    sort(&mut kvs, target, order);
    if limit > 0 && kvs.len() > limit {
        kvs.truncate(limit);
        response.more = true;
    }
    if request.keys_only {
        for kv in &mut kvs {
            kv.value.clear();
        }
    }
    response.kvs = kvs;
    Ok(response)
}

fn passes(kv: &KeyValue, r: &RangeRequest) -> bool {
    let within = |value, min, max| (min == 0 || value >= min) && (max == 0 || value <= max);
    within(kv.mod_revision, r.min_mod_revision, r.max_mod_revision)
        && within(
            kv.create_revision,
            r.min_create_revision,
            r.max_create_revision,
        )
}

fn sort(kvs: &mut [KeyValue], target: SortTarget, order: SortOrder) {
    let compare = |a: &KeyValue, b: &KeyValue| -> Ordering {
        match target {
            SortTarget::Key => a.key.cmp(&b.key),
            SortTarget::Version => a.version.cmp(&b.version),
            SortTarget::Create => a.create_revision.cmp(&b.create_revision),
            SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
            SortTarget::Value => a.value.cmp(&b.value),
        }
    };
    match order {
        SortOrder::None => {}
        SortOrder::Ascend => kvs.sort_by(compare),
        SortOrder::Descend => kvs.sort_by(|a, b| compare(b, a)),
    }
}
