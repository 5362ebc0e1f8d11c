//! Where everything of a tenant lies, what was checked, when, and by asking whom.

use kms::Region;
use replication::archive::s3;
use serde::{Deserialize, Serialize};

use crate::directory::records::TenantRecord;
use crate::node::Node;
use crate::tenant::key::now_ms;

/// A place where bytes of the tenant, or its key, lie.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// "replica", "objects", "wrapped keys" or "KMS key".
    pub what: String,
    pub name: String,
    /// Where it lies: a zone of the jurisdiction, cloud regions, or a directory.
    pub place: String,
    /// What says so.
    pub checked: String,
    /// When that was checked, milliseconds since 1970; 0: it could not be.
    pub at_ms: u64,
    /// Why it is not inside the jurisdiction, or not known to be; empty if it is.
    pub problem: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub tenant: String,
    pub id: String,
    pub jurisdiction: Region,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    pub places: Vec<Place>,
}

/// What the store said of where the bucket lies.
#[derive(Clone, Debug, Default)]
pub struct BucketPlace {
    pub told: Option<String>,
    /// When it was asked, milliseconds since 1970; 0: it has not answered yet.
    pub at_ms: u64,
    /// Why that is not where it must be; empty if it is.
    pub problem: String,
}

impl Node {
    /// Asks the store where the bucket lies. A place outside the jurisdiction, or another than
    /// node.toml declares, is an error; a store that does not answer is asked again later.
    pub async fn check_bucket(&self) -> Result<(), String> {
        let (bucket, region) = (&self.config.bucket, self.config.region);
        let told = match s3::location(bucket).await {
            Ok(told) => told,
            Err(why) => {
                tracing::warn!(%why, "the store does not say yet where the bucket lies");
                return Ok(());
            }
        };
        let checked = match &told {
            None => Ok(()),
            Some(told) if Some(told) == bucket.cloud_region.as_ref() => {
                region.admits(&format!("bucket {}", bucket.url), told)
            }
            Some(told) => Err(format!(
                "bucket {} lies in {told}, and node.toml declares cloud_region {}: put that right",
                bucket.url,
                bucket.cloud_region.as_deref().unwrap_or("none")
            )),
        };
        *self.bucket_place.write() = BucketPlace {
            told,
            at_ms: now_ms(),
            problem: checked.clone().err().unwrap_or_default(),
        };
        checked
    }

    /// Where everything of a tenant lies.
    pub async fn residency(&self, record: &TenantRecord) -> Report {
        let mut places = Vec::new();
        self.replicas(record, &mut places);
        self.objects(record, &mut places);
        self.keys(record, &mut places).await;
        Report {
            tenant: record.name.clone(),
            id: record.id.to_string(),
            jurisdiction: self.config.region,
            at_ms: now_ms(),
            places,
        }
    }

    fn replicas(&self, record: &TenantRecord, places: &mut Vec<Place>) {
        let nodes = self.placed(record);
        for name in &record.placement {
            let node = nodes.iter().find(|n| n.name == *name);
            let near = node.is_some_and(|n| self.is_connected(n));
            places.push(Place {
                what: "replica".into(),
                name: name.clone(),
                place: node.map_or_else(String::new, |n| {
                    format!("{}, zone {}", self.config.region, n.zone)
                }),
                checked: format!(
                    "the node's certificate, at its connection to {}",
                    self.config.name
                ),
                at_ms: if near { now_ms() } else { 0 },
                problem: match near {
                    true => String::new(),
                    false => "it is not connected: its certificate was not seen now".into(),
                },
            });
        }
    }

    fn objects(&self, record: &TenantRecord, places: &mut Vec<Place>) {
        let bucket = &self.config.bucket;
        let asked = self.bucket_place.read().clone();
        let (place, checked, problem) = match (&bucket.cloud_region, asked.told) {
            (None, _) => (
                "a directory".to_string(),
                "node.toml: where its disk lies is the operator's word".to_string(),
                String::new(),
            ),
            (Some(_), Some(told)) => (told, "GetBucketLocation".into(), asked.problem),
            (Some(declared), None) if asked.at_ms > 0 => (
                declared.clone(),
                "node.toml; the store does not tell where a bucket lies".into(),
                String::new(),
            ),
            (Some(declared), None) => (
                declared.clone(),
                "node.toml".into(),
                "the store has not answered yet".into(),
            ),
        };
        let endpoint = bucket.endpoint.as_deref().unwrap_or_default();
        for (what, prefix) in [
            ("objects", format!("tenants/{}/", record.id)),
            ("wrapped keys", format!("tenants/{}/keys/", record.id)),
        ] {
            places.push(Place {
                what: what.into(),
                name: format!("{} {endpoint} {prefix}", bucket.url),
                place: place.clone(),
                checked: checked.clone(),
                at_ms: asked.at_ms,
                problem: problem.clone(),
            });
        }
    }

    async fn keys(&self, record: &TenantRecord, places: &mut Vec<Place>) {
        for (node, report) in self.key_reports(record).await {
            for (generation, key) in report.copies {
                places.push(Place {
                    what: "wrapped key".into(),
                    name: format!("generation {generation} under {key}"),
                    place: format!("{}, node {}", self.config.region, node.name),
                    checked: "the node's answer".into(),
                    at_ms: now_ms(),
                    problem: String::new(),
                });
            }
        }
        let providers = &self.parts.providers;
        let found = providers
            .check_jurisdiction(&record.key, self.config.region)
            .await;
        let checked = match record.key.is_multi_region() {
            true => "DescribeKey: all replicas of a multi-region key",
            false => "the key's name",
        };
        let (place, problem) = match found {
            Ok(regions) if regions.is_empty() => ("a keyfile on the nodes".into(), String::new()),
            Ok(regions) => (regions.join(", "), String::new()),
            Err(e) => (String::new(), e.to_string()),
        };
        places.push(Place {
            what: "KMS key".into(),
            name: record.key.to_string(),
            place,
            checked: checked.into(),
            at_ms: now_ms(),
            problem,
        });
    }
}
