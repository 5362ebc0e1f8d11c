//! What operators ask about tenants' keys: rotation, another KMS key, the grace, events.

use std::time::Duration;

use kms::{KeyUri, KmsError};
use tokio::time::Instant;
use tonic::Status;

use super::AdminService;
use crate::directory::Found;
use crate::directory::records::{EventKind, KeyTask, TenantRecord};
use crate::limits;
use crate::proto::admin::{
    Event, EventList, KeyReport as KeyReportMessage, SetTenantRequest, Statement,
    Tenant as TenantMessage,
};
use crate::signed::{self, Kind};
use crate::tenant::key::KeyReport;

/// A task whose end is not seen within this goes on in the background.
const DONE_WITHIN: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(100);

pub fn message(report: KeyReport) -> KeyReportMessage {
    KeyReportMessage {
        node: report.node,
        sealed: report.sealed.unwrap_or_default(),
        refused_ms: report.refused_ms,
        sealed_ms: report.sealed_ms,
        resumed_ms: report.resumed_ms,
        proof_age_ms: report.proof_age_ms,
        unproven: report.unproven.unwrap_or_default(),
        held: report.held,
        sealing: report.sealing,
        older_bytes: report.older.map_or(0, |older| older.bytes),
        of_bytes: report.older.map_or(0, |older| older.of_bytes),
        older_entries: report.older.map_or(0, |older| older.entries),
    }
}

pub fn checked_grace(asked: Option<u64>) -> Result<u64, Status> {
    let grace = asked.unwrap_or(limits::DEFAULT_GRACE.as_secs());
    match grace <= limits::MAX_GRACE.as_secs() {
        true => Ok(grace),
        false => Err(Status::invalid_argument(format!(
            "a grace of {grace} s is too long: use 0 to 24 h"
        ))),
    }
}

impl AdminService {
    /// The record of a tenant as the region has it now.
    pub(super) async fn record(&self, name: &str) -> Result<Found<TenantRecord>, Status> {
        let directory = self.directory()?;
        let unavailable = |e: &dyn std::fmt::Display| Status::unavailable(e.to_string());
        let barrier = directory.group().read_barrier().await;
        barrier.map_err(|e| unavailable(&e))?;
        let tenants = directory.tenants().map_err(|e| unavailable(&e))?;
        let found = tenants.into_iter().find(|t| t.record.name == name);
        found.ok_or_else(|| Status::not_found(format!("there is no tenant {name} in this region")))
    }

    pub(super) async fn put(&self, found: &Found<TenantRecord>) -> Result<(), Status> {
        let directory = self.directory()?;
        let put = directory.put_tenant(&found.record, found.modified).await;
        put.map_err(|e| Status::aborted(e.to_string()))
    }

    pub(super) async fn set(&self, request: SetTenantRequest) -> Result<TenantMessage, Status> {
        let mut found = self.record(&request.name).await?;
        if request.key_grace_s.is_some() {
            found.record.key_grace_s = checked_grace(request.key_grace_s)?;
        }
        if let Some(days) = request.rotate_days {
            found.record.rotate_days = days;
        }
        if let Some(most) = request.max_unarchived_ms {
            found.record.max_unarchived_ms = most;
        }
        if request.drill_every_s.is_some() {
            found.record.drill_every_s = request.drill_every_s;
        }
        if request.keep_ms.is_some() {
            found.record.keep_ms = request.keep_ms;
        }
        if let Some(number) = request.keep_checkpoints {
            if number == 0 {
                return Err(Status::invalid_argument(
                    "the newest checkpoint always stays: keep 1 or more",
                ));
            }
            found.record.keep_checkpoints = Some(number);
        }
        self.put(&found).await?;
        self.shown(&request.name)
    }

    /// Refuses a key outside the jurisdiction, and says so where it can be looked up.
    pub(super) async fn check_residency(&self, tenant: &str, key: &KeyUri) -> Result<(), Status> {
        let region = self.0.config.region;
        let checked = self.0.parts.providers.check_jurisdiction(key, region).await;
        checked.map(drop).map_err(|e| {
            if matches!(e, KmsError::Outside(_)) {
                let kind = EventKind::ResidencyRefused;
                self.0.event_of(tenant, kind, e.to_string());
            }
            Status::failed_precondition(e.to_string())
        })
    }

    pub(super) fn shown(&self, name: &str) -> Result<TenantMessage, Status> {
        let tenant = self.0.tenants.get(name);
        let tenant =
            tenant.ok_or_else(|| Status::not_found(format!("there is no tenant {name}")))?;
        Ok(self.message(&tenant))
    }

    fn idle(record: &TenantRecord) -> Result<(), Status> {
        if let Some(why) = &record.restoring {
            return Err(Status::failed_precondition(format!(
                "tenant {}: {why}: wait until that is done",
                record.name
            )));
        }
        match &record.key_task {
            None => Ok(()),
            // It gives way as long as nothing is destroyed.
            Some(KeyTask::Rewrite { generation }) if record.needed() != [*generation] => Ok(()),
            Some(task) => Err(Status::failed_precondition(format!(
                "tenant {} is {task}: wait until that is done",
                record.name
            ))),
        }
    }

    /// Makes a new data key; returns once new writes use it, and, if everything is to be rewritten,
    /// while that goes on.
    pub(super) async fn rotate(&self, name: &str, rewrite: bool) -> Result<TenantMessage, Status> {
        let mut found = self.record(name).await?;
        Self::idle(&found.record)?;
        let task = KeyTask::Rotate {
            generation: found.record.next_generation(),
            rewrite,
        };
        found.record.key_task = Some(task.clone());
        self.put(&found).await?;
        self.done(name, &task).await
    }

    /// Moves to another KMS key; returns once the old one is needed no more.
    pub(super) async fn change_key_to(
        &self,
        name: &str,
        key: &str,
    ) -> Result<TenantMessage, Status> {
        let key: KeyUri = key
            .parse()
            .map_err(|e: KmsError| Status::invalid_argument(e.to_string()))?;
        let mut found = self.record(name).await?;
        // A change that cannot be finished, because its key is gone, gives way to another.
        if !matches!(found.record.key_task, Some(KeyTask::Change { .. })) {
            Self::idle(&found.record)?;
        }
        if found.record.key == key && found.record.key_task.is_none() {
            return Err(Status::failed_precondition(format!(
                "tenant {name} is under key {key} already; use 'holdfast key rotate' for a new data key"
            )));
        }
        self.check_residency(name, &key).await?;
        // Found out before anything is changed: every node can use the key, and its policy lets it.
        let tried = self.0.try_key_everywhere(&found.record, &key).await;
        tried.map_err(Status::failed_precondition)?;
        let task = KeyTask::Change {
            generation: found.record.next_generation(),
            key,
        };
        found.record.key_task = Some(task.clone());
        self.put(&found).await?;
        self.done(name, &task).await
    }

    /// Waits until a task is done and this node says so.
    async fn done(&self, name: &str, task: &KeyTask) -> Result<TenantMessage, Status> {
        let deadline = Instant::now() + DONE_WITHIN;
        loop {
            if let Some(tenant) = self.0.tenants.get(name) {
                let record = tenant.record();
                let done = record.generation >= task.generation()
                    && record.key_task.as_ref() != Some(task);
                // Each node moves to it once it has proven the key.
                if done && self.seals_under(&record, task.generation()).await {
                    return Ok(self.message(&tenant));
                }
            }
            if Instant::now() >= deadline {
                return Err(Status::deadline_exceeded(format!(
                    "{task} is not done within {} s and goes on; look with 'holdfast tenant show {name}'",
                    DONE_WITHIN.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether every node that answers and is not sealed seals under `generation`, or a newer one.
    async fn seals_under(&self, record: &TenantRecord, generation: u32) -> bool {
        let reports = self.0.key_reports(record).await;
        reports
            .iter()
            .all(|(_, r)| r.sealed.is_some() || r.sealing >= generation)
    }

    pub(super) async fn residency_of(&self, name: &str) -> Result<Statement, Status> {
        let found = self.record(name).await?;
        let report = self.0.residency(&found.record).await;
        let signed =
            signed::sign(&self.0.config.tls, Kind::Residency, &report).map_err(Status::internal)?;
        let json = serde_json::to_string_pretty(&signed);
        let json = json.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Statement { json })
    }

    pub(super) fn events(&self, tenant: &str) -> Result<EventList, Status> {
        let events = self.directory()?.events();
        let events = events.map_err(|e| Status::unavailable(e.to_string()))?;
        let events = events.into_iter().map(|found| found.record);
        let of = events.filter(|e| tenant.is_empty() || e.tenant == tenant);
        let message = |e: crate::directory::records::EventRecord| Event {
            at_ms: e.at_ms,
            node: e.node,
            tenant: e.tenant,
            kind: e.kind.name().into(),
            detail: e.detail,
        };
        Ok(EventList {
            events: of.map(message).collect(),
        })
    }
}
