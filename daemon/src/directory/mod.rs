//! The directory: the region's system tenant, and what it holds.
//!
//! It is an ordinary tenant (same group, engine and archive) whose changes are answered once they
//! are archived. Every node has a replica and reads it locally; a change may be asked of any node.

pub mod controller;
pub mod events;
pub mod joins;
pub mod records;

use std::sync::Arc;

use bytes::Bytes;
use kms::TenantId;
use replication::group::{Group, ProposeError};
use replication::mvcc::check::Failed;
use replication::proto::command::Command;
use replication::proto::command::command::Op;
use replication::proto::command::reply::Result as ReplyResult;
use replication::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use replication::proto::etcdserverpb::request_op::Request;
use replication::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::limits;
use records::{
    DeletedRecord, DrillRecord, EventRecord, LinkRecord, NodeRecord, ObjectiveRecord, ScrubRecord,
    TenantRecord,
};

#[derive(Debug, Error)]
pub enum DirectoryError {
    #[error("the directory did not take the change: {0}")]
    Propose(#[from] ProposeError),
    #[error("the directory cannot be read: {0}")]
    Read(#[from] Failed),
    #[error("the record {0} was changed by someone else meanwhile; look and try again")]
    Conflict(String),
    #[error("the record {0} does not parse: {1}")]
    Malformed(String, String),
}

/// A record and the revision that it was last changed at; 0: it does not exist.
pub struct Found<T> {
    pub record: T,
    pub modified: i64,
}

/// One key if there is no end.
fn remove_range(key: String, end: String) -> RequestOp {
    RequestOp {
        request: Some(Request::RequestDeleteRange(DeleteRangeRequest {
            key: key.into(),
            range_end: end.into(),
            ..DeleteRangeRequest::default()
        })),
    }
}

#[derive(Clone)]
pub struct Directory {
    group: Arc<Group>,
}

impl Directory {
    pub fn new(group: Arc<Group>) -> Self {
        Directory { group }
    }

    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    fn list<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<Found<T>>, DirectoryError> {
        // '0' follows '/': the end of the prefix's range.
        let end = format!("{}0", prefix.trim_end_matches('/'));
        let response = self.group.store().range(&RangeRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: end.into_bytes().into(),
            ..RangeRequest::default()
        })?;
        let parse = |kv: replication::proto::mvccpb::KeyValue| {
            let record = serde_json::from_slice(&kv.value).map_err(|e| {
                DirectoryError::Malformed(
                    String::from_utf8_lossy(&kv.key).into_owned(),
                    e.to_string(),
                )
            })?;
            Ok(Found {
                record,
                modified: kv.mod_revision,
            })
        };
        response.kvs.into_iter().map(parse).collect()
    }

    /// Writes a record if it still stands at `modified`.
    async fn put<T: Serialize>(
        &self,
        key: String,
        record: &T,
        modified: i64,
    ) -> Result<(), DirectoryError> {
        let value = serde_json::to_vec(record)
            .map_err(|e| DirectoryError::Malformed(key.clone(), e.to_string()))?;
        let bytes = Bytes::from(key.clone().into_bytes());
        let put = RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: bytes,
                value: value.into(),
                ..PutRequest::default()
            })),
        };
        self.change(key, modified, vec![put]).await
    }

    /// Makes `changes` if the record under `key` still stands at `modified`.
    async fn change(
        &self,
        key: String,
        modified: i64,
        changes: Vec<RequestOp>,
    ) -> Result<(), DirectoryError> {
        let txn = TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Equal as i32,
                target: CompareTarget::Mod as i32,
                key: Bytes::from(key.clone().into_bytes()),
                target_union: Some(TargetUnion::ModRevision(modified)),
                ..Compare::default()
            }],
            success: changes,
            failure: vec![],
        };
        let command = Command {
            op: Some(Op::Txn(txn)),
            ..Command::default()
        };
        let replies = self.group.propose(vec![command]).await?;
        match replies.into_iter().next().and_then(|r| r.result) {
            Some(ReplyResult::Txn(answer)) if answer.succeeded => Ok(()),
            _ => Err(DirectoryError::Conflict(key)),
        }
    }

    pub fn nodes(&self) -> Result<Vec<Found<NodeRecord>>, DirectoryError> {
        self.list("/nodes/")
    }

    pub fn tenants(&self) -> Result<Vec<Found<TenantRecord>>, DirectoryError> {
        self.list("/tenants/")
    }

    pub fn links(&self) -> Result<Vec<Found<LinkRecord>>, DirectoryError> {
        self.list("/links/")
    }

    /// The newest link of a tenant that the directory knows of; 0: none.
    pub fn newest_link(&self, record: &TenantRecord) -> Result<u64, DirectoryError> {
        let mut links = self.links()?.into_iter().map(|found| found.record);
        let known = links.find(|l| l.tenant == record.id && l.incarnation == record.incarnation);
        Ok(known.map_or(0, |l| l.link))
    }

    /// The newest drill of each tenant.
    pub fn drills(&self) -> Result<Vec<Found<DrillRecord>>, DirectoryError> {
        self.list("/drills/")
    }

    /// Records a drill, unless a newer one is.
    pub async fn put_drill(&self, drill: &DrillRecord) -> Result<(), DirectoryError> {
        self.group.read_barrier().await?;
        let known = self.drills()?.into_iter();
        let known = known.into_iter().find(|d| d.record.tenant == drill.tenant);
        match known {
            Some(known) if known.record.at_ms >= drill.at_ms => Ok(()),
            known => {
                let modified = known.map_or(0, |known| known.modified);
                self.put(format!("/drills/{}", drill.tenant), drill, modified)
                    .await
            }
        }
    }

    /// The days of a tenant's objectives that are kept, oldest first.
    pub fn objective_days(
        &self,
        id: TenantId,
    ) -> Result<Vec<Found<ObjectiveRecord>>, DirectoryError> {
        self.list(&format!("/objectives/{id}/"))
    }

    pub fn objective_day(
        &self,
        id: TenantId,
        day: u64,
    ) -> Result<Option<Found<ObjectiveRecord>>, DirectoryError> {
        let days = self.list(&format!("/objectives/{id}/{day:06}"))?;
        Ok(days.into_iter().next())
    }

    /// Records a day of a tenant's objectives, and forgets those before `limits::OBJECTIVE_DAYS`.
    pub async fn put_objective_day(
        &self,
        day: &ObjectiveRecord,
        modified: i64,
    ) -> Result<(), DirectoryError> {
        let of = |number: u64| format!("/objectives/{}/{number:06}", day.tenant);
        let value = serde_json::to_vec(day)
            .map_err(|e| DirectoryError::Malformed(of(day.day), e.to_string()))?;
        let put = RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: of(day.day).into(),
                value: value.into(),
                ..PutRequest::default()
            })),
        };
        let first = day.day.saturating_sub(limits::OBJECTIVE_DAYS);
        let forget = remove_range(of(0), of(first));
        self.change(of(day.day), modified, vec![forget, put]).await
    }

    /// The newest scrub of each tenant.
    pub fn scrubs(&self) -> Result<Vec<Found<ScrubRecord>>, DirectoryError> {
        self.list("/scrubs/")
    }

    /// Records a scrub.
    pub async fn put_scrub(&self, scrub: &ScrubRecord) -> Result<(), DirectoryError> {
        self.group.read_barrier().await?;
        let mut known = self.scrubs()?.into_iter();
        let known = known.find(|s| s.record.tenant == scrub.tenant);
        let modified = known.map_or(0, |known| known.modified);
        self.put(format!("/scrubs/{}", scrub.tenant), scrub, modified)
            .await
    }

    /// Takes a destroyed tenant's records away and notes where its certificate lies, if its record
    /// still stands at `modified`: another may have used the name since.
    pub async fn remove_tenant(
        &self,
        record: &TenantRecord,
        modified: i64,
        deleted: &DeletedRecord,
    ) -> Result<(), DirectoryError> {
        let remove = |key: String| remove_range(key, String::new());
        let key = format!("/deleted/{}-{}", deleted.name, deleted.id);
        let value = serde_json::to_vec(deleted)
            .map_err(|e| DirectoryError::Malformed(key.clone(), e.to_string()))?;
        let note = RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: key.into(),
                value: value.into(),
                ..PutRequest::default()
            })),
        };
        let tenant = format!("/tenants/{}", record.name);
        let changes = vec![
            remove(tenant.clone()),
            remove(format!("/links/{}", record.id)),
            remove(format!("/drills/{}", record.id)),
            remove(format!("/scrubs/{}", record.id)),
            remove_range(
                format!("/objectives/{}/", record.id),
                // '0' follows '/'.
                format!("/objectives/{}0", record.id),
            ),
            note,
        ];
        self.change(tenant, modified, changes).await
    }

    /// Tenants that were destroyed.
    pub fn deleted(&self) -> Result<Vec<Found<DeletedRecord>>, DirectoryError> {
        self.list("/deleted/")
    }

    /// Oldest first.
    pub fn events(&self) -> Result<Vec<Found<EventRecord>>, DirectoryError> {
        self.list("/events/")
    }

    pub async fn put_event(&self, event: &EventRecord) -> Result<(), DirectoryError> {
        let tag = hex::encode(kms::secret::random_bytes::<4>());
        let key = format!("/events/{:016}-{}-{tag}", event.at_ms, event.node);
        self.put(key, event, 0).await
    }

    /// Removes the oldest events beyond what is kept, a tenth at a time.
    pub async fn drop_old_events(&self) -> Result<(), DirectoryError> {
        let events = self.events()?;
        if events.len() < limits::MAX_EVENTS * 11 / 10 {
            return Ok(());
        }
        let first_kept = &events[events.len() - limits::MAX_EVENTS].record;
        let command = Command {
            op: Some(Op::DeleteRange(DeleteRangeRequest {
                key: Bytes::from_static(b"/events/"),
                range_end: format!("/events/{:016}", first_kept.at_ms).into(),
                ..DeleteRangeRequest::default()
            })),
            ..Command::default()
        };
        self.group.propose(vec![command]).await?;
        Ok(())
    }

    pub async fn put_node(&self, record: &NodeRecord, modified: i64) -> Result<(), DirectoryError> {
        self.put(format!("/nodes/{}", record.name), record, modified)
            .await
    }

    pub async fn put_tenant(
        &self,
        record: &TenantRecord,
        modified: i64,
    ) -> Result<(), DirectoryError> {
        self.put(format!("/tenants/{}", record.name), record, modified)
            .await
    }

    pub async fn put_link(&self, record: &LinkRecord, modified: i64) -> Result<(), DirectoryError> {
        self.put(format!("/links/{}", record.tenant), record, modified)
            .await
    }

    /// Registers a node under its name. A known name with another id is a new node in its place.
    pub async fn register(&self, node: &NodeRecord) -> Result<(), DirectoryError> {
        let known = self
            .nodes()?
            .into_iter()
            .find(|found| found.record.name == node.name);
        match known {
            Some(found) if found.record == *node => Ok(()),
            Some(found) => self.put_node(node, found.modified).await,
            None => self.put_node(node, 0).await,
        }
    }
}
