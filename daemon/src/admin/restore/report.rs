//! The signed report of a region's restore: what was contracted, and what came of it.

use kms::Region;
use object_store::path::Path;
use object_store::{ObjectStore, PutMode, PutPayload};
use serde::{Deserialize, Serialize};

use super::Run;
use crate::directory::records::{TenantRecord, Tier};
use crate::proto::admin::RestoreEvent;
use crate::signed::{self, Kind};
use crate::tenant::key::now_ms;

/// One tenant's. Times are milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovered {
    pub tenant: String,
    pub id: String,
    pub tier: Tier,
    pub rpo_contract_ms: u64,
    /// The age of the newest restored write when the region was lost: at most so much is gone.
    pub rpo_ms: u64,
    pub rto_contract_ms: u64,
    /// From the declaration to verified reads.
    pub rto_ms: u64,
    pub revision: i64,
    pub digest: String,
    /// Why it is not restored; empty if it is.
    pub refused: String,
}

/// Moments are milliseconds since 1970.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub region: Region,
    /// Where it was restored first.
    pub node: String,
    pub lost_at_ms: u64,
    pub declared_ms: u64,
    pub at_ms: u64,
    /// The moment that was restored; none: the newest state.
    pub point_ms: Option<u64>,
    /// In the order in which they served.
    pub tenants: Vec<Recovered>,
}

impl Recovered {
    /// Of a tenant that was not restored.
    pub(super) fn refused(record: &TenantRecord, why: &str) -> Self {
        Recovered {
            tenant: record.name.clone(),
            id: record.id.to_string(),
            tier: record.tier,
            rpo_contract_ms: record.rpo_ms,
            rpo_ms: 0,
            rto_contract_ms: record.rto_ms,
            rto_ms: 0,
            revision: 0,
            digest: String::new(),
            refused: why.to_string(),
        }
    }
}

impl Run {
    /// Signs what came of the restore, keeps that in the bucket, and sends it.
    pub(super) async fn report(&self, lost_at_ms: u64, point_ms: Option<u64>) {
        let report = Report {
            region: self.node.config.region,
            node: self.node.config.name.clone(),
            lost_at_ms,
            declared_ms: self.asked_ms,
            at_ms: now_ms(),
            point_ms,
            tenants: std::mem::take(&mut *self.recovered.lock()),
        };
        if report.tenants.is_empty() {
            return;
        }
        let signed = signed::sign(&self.node.config.tls, Kind::Recovery, &report);
        let json = signed.and_then(|s| serde_json::to_string_pretty(&s).map_err(|e| e.to_string()));
        let json = match json {
            Ok(json) => json,
            // Everything is restored nevertheless.
            Err(why) => return tracing::error!(%why, "the restore is not reported"),
        };
        let object = Path::from(format!("recoveries/{:015}-{}.json", report.at_ms, self.id));
        let put = PutPayload::from(json.clone().into_bytes());
        let bucket = &self.node.parts.bucket;
        let put = bucket.put_opts(&object, put, PutMode::Create.into()).await;
        if let Err(e) = put {
            tracing::error!(%object, error = %e, "the report of the restore is not in the bucket");
        }
        let event = RestoreEvent {
            phase: "report".into(),
            message: json,
            ..RestoreEvent::default()
        };
        let _ = self.events.send(Ok(event)).await;
    }
}
