//! The region's bucket: where its objects lie, and how it is opened.
//!
//! `bootstrap.json` | `tenants/<id>/keys/<generation>` | `tenants/<id>/<incarnation>/chain/<n>` |
//! `tenants/<id>/<incarnation>/checkpoints/<n>-<writer>` | `tenants/<id>/files/<hash>` |
//! `tenants/<id>/<incarnation>/retired/<n>-<writer>` | `tenants/<id>/ledger/<n>` |
//! `certificates/<id>.json`, while it is made `certificates/<id>.draft.json`

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use serde::{Deserialize, Serialize};
use url::Url;

use super::lock::{Locking, Locks, ObjectLock};
use crate::GroupId;
use kms::{KeyUri, Region, TenantId};

/// How a node reaches its bucket.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketConfig {
    /// `s3://bucket/prefix` or `file:///directory`.
    pub url: String,
    /// The cloud region that the bucket lies in; required for S3.
    pub cloud_region: Option<String>,
    /// An S3 endpoint other than AWS's.
    pub endpoint: Option<String>,
    /// Locks what the archive writes; the bucket must have been made with Object Lock.
    pub object_lock: Option<ObjectLock>,
}

impl BucketConfig {
    /// Opens it; credentials for S3 come from the environment (`AWS_ACCESS_KEY_ID`, …).
    pub fn open(&self, region: Region) -> Result<Arc<dyn ObjectStore>, String> {
        let url = Url::parse(&self.url).map_err(|e| format!("bucket url \"{}\": {e}", self.url))?;
        match url.scheme() {
            "file" => {
                let dir = url
                    .to_file_path()
                    .map_err(|()| format!("bucket url \"{}\" is not an absolute path", self.url))?;
                std::fs::create_dir_all(&dir)
                    .map_err(|e| format!("bucket {}: {e}", dir.display()))?;
                let store = LocalFileSystem::new_with_prefix(&dir)
                    .map_err(|e| format!("bucket {}: {e}", dir.display()))?;
                Ok(Arc::new(store.with_fsync(true)))
            }
            "s3" => self.open_s3(&url, region),
            other => Err(format!(
                "bucket url \"{}\": scheme {other} is not known; use s3 or file",
                self.url
            )),
        }
    }

    fn open_s3(&self, url: &Url, region: Region) -> Result<Arc<dyn ObjectStore>, String> {
        let cloud_region = self
            .cloud_region
            .as_deref()
            .ok_or("an s3 bucket needs cloud_region in node.toml")?;
        let bucket = url
            .host_str()
            .ok_or("an s3 url names a bucket: s3://BUCKET/PREFIX")?;
        region.admits(&format!("bucket {bucket}"), cloud_region)?;
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_region(cloud_region)
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(50),
                    max_backoff: Duration::from_secs(1),
                    base: 2.0,
                },
                max_retries: 2,
                retry_timeout: Duration::from_secs(10),
            });
        let mut client = ClientOptions::new()
            .with_timeout(Duration::from_secs(30))
            .with_connect_timeout(Duration::from_secs(3));
        if let Some(endpoint) = &self.endpoint {
            client = client.with_allow_http(endpoint.starts_with("http://"));
            builder = builder
                .with_endpoint(endpoint)
                .with_virtual_hosted_style_request(false);
        }
        let store = builder
            .with_client_options(client)
            .build()
            .map_err(|e| format!("bucket {bucket}: {e}"))?;
        let prefix = url.path().trim_matches('/');
        let store: Arc<dyn ObjectStore> = match prefix.is_empty() {
            true => Arc::new(store),
            false => Arc::new(PrefixStore::new(store, prefix)),
        };
        Ok(match Locks::of(self) {
            Some(locks) => Arc::new(Locking::new(store, locks)),
            None => store,
        })
    }
}

/// Finds the directory of a region; written once, when the region is founded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    pub version: u32,
    pub region: Region,
    pub directory: TenantId,
    /// The region's own key, under which the directory is.
    pub key: KeyUri,
}

impl Bootstrap {
    pub const VERSION: u32 = 1;

    pub fn path() -> Path {
        Path::from("bootstrap.json")
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let found: Bootstrap =
            serde_json::from_slice(bytes).map_err(|e| format!("object {}: {e}", Self::path()))?;
        match found.version {
            Self::VERSION => Ok(found),
            other => Err(format!(
                "object {}: version {other} is not known to this version of holdfastd; run the one that wrote it, or a newer one",
                Self::path()
            )),
        }
    }
}

pub fn chain_dir(group: GroupId) -> Path {
    Path::from(format!(
        "tenants/{}/{:010}/chain",
        group.tenant, group.incarnation
    ))
}

pub fn link_path(group: GroupId, number: u64) -> Path {
    chain_dir(group).join(format!("{number:020}"))
}

pub fn checkpoints_dir(group: GroupId) -> Path {
    Path::from(format!(
        "tenants/{}/{:010}/checkpoints",
        group.tenant, group.incarnation
    ))
}

/// Manifests that retention took away; their files stay for a while.
pub fn retired_dir(group: GroupId) -> Path {
    Path::from(format!(
        "tenants/{}/{:010}/retired",
        group.tenant, group.incarnation
    ))
}

pub fn file_path(tenant: TenantId, hash: &str) -> Path {
    Path::from(format!("tenants/{tenant}/files/{hash}"))
}
