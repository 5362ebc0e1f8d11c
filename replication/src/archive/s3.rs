//! What the object store's library lacks of S3: where a bucket lies, and the versions of its objects.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::Builder;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::DisplayErrorContext;
use futures::{StreamExt, TryStreamExt};
use kms::aws::sdk_config;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use url::Url;

use super::bucket::BucketConfig;
use super::lock::ObjectLock;

/// Deletions at once.
const IN_FLIGHT: usize = 16;

/// Where the store says that the bucket lies. `Ok(None)`: it is a directory, or a store that does
/// not tell, which proves nothing; what node.toml declares is all there is then.
pub async fn location(config: &BucketConfig) -> Result<Option<String>, String> {
    let (Ok(url), Some(declared)) = (Url::parse(&config.url), &config.cloud_region) else {
        return Ok(None);
    };
    let (true, Some(bucket)) = (url.scheme() == "s3", url.host_str()) else {
        return Ok(None);
    };
    let client = client(declared, config.endpoint.as_deref()).await;
    let answer = client.get_bucket_location().bucket(bucket).send().await;
    let answer = answer.map_err(|e| DisplayErrorContext(e).to_string())?;
    let told = answer.location_constraint().map(|c| c.as_str().to_string());
    Ok(match told.as_deref() {
        // AWS's oldest region has no constraint; elsewhere none means nothing.
        None | Some("") => config.endpoint.is_none().then(|| "us-east-1".to_string()),
        Some("EU") => Some("eu-west-1".into()),
        Some(_) => told,
    })
}

async fn builder(cloud_region: &str, endpoint: Option<&str>) -> Builder {
    let config = Builder::from(&sdk_config(cloud_region, endpoint).await);
    // Whatever is at an endpoint of its own may not resolve a name for each bucket.
    config.force_path_style(endpoint.is_some())
}

async fn client(cloud_region: &str, endpoint: Option<&str>) -> Client {
    Client::from_conf(builder(cloud_region, endpoint).await.build())
}

/// A bucket of S3, and where in it the region's objects lie.
#[derive(Clone, Debug)]
pub(super) struct S3 {
    client: Client,
    /// Patient, as the object store's library is.
    pub(super) uploads: Client,
    pub(super) bucket: String,
    /// Empty, or it ends with `/`.
    root: String,
}

/// What a store says of a bucket's Object Lock.
pub(super) enum BucketLock {
    Absent,
    Enabled,
    /// It locks every object, for so long.
    ByItself(String),
    NotSaid,
}

impl S3 {
    /// The store's name for an object.
    pub(super) fn key(&self, object: &Path) -> String {
        format!("{}{object}", self.root)
    }

    pub(super) async fn bucket_lock(&self) -> BucketLock {
        let asked = self.client.get_object_lock_configuration();
        match asked.bucket(&self.bucket).send().await {
            Ok(told) => {
                let rule = told.object_lock_configuration().and_then(|c| c.rule());
                match rule.and_then(|rule| rule.default_retention()) {
                    Some(kept) => BucketLock::ByItself(match (kept.days(), kept.years()) {
                        (_, Some(years)) => format!("{years} years"),
                        (days, None) => format!("{} days", days.unwrap_or(0)),
                    }),
                    None => BucketLock::Enabled,
                }
            }
            Err(e) => match e.as_service_error().and_then(|e| e.meta().code()) {
                Some("ObjectLockConfigurationNotFoundError") => BucketLock::Absent,
                _ => BucketLock::NotSaid,
            },
        }
    }
}

/// The bucket, if it is not a directory.
pub(super) async fn opened(config: &BucketConfig) -> Result<Option<S3>, String> {
    let url = Url::parse(&config.url).map_err(|e| e.to_string())?;
    let ("s3", Some(bucket), Some(declared)) = (url.scheme(), url.host_str(), &config.cloud_region)
    else {
        return Ok(None);
    };
    let root = url.path().trim_matches('/');
    let builder = builder(declared, config.endpoint.as_deref()).await;
    let patient = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(Duration::from_secs(30))
        .build();
    let retries = RetryConfig::standard().with_max_attempts(3);
    let uploads = builder.clone().timeout_config(patient);
    Ok(Some(S3 {
        client: Client::from_conf(builder.build()),
        uploads: Client::from_conf(uploads.retry_config(retries).build()),
        bucket: bucket.to_string(),
        root: match root.is_empty() {
            true => String::new(),
            false => format!("{root}/"),
        },
    }))
}

/// The directory that is the bucket.
fn directory(config: &BucketConfig) -> Result<std::path::PathBuf, String> {
    let url = Url::parse(&config.url).map_err(|e| e.to_string())?;
    let none = |()| format!("bucket url \"{}\" names no directory", config.url);
    url.to_file_path().map_err(none)
}

/// An object that was deleted with all its versions, or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destroyed {
    pub object: String,
    /// Versions and delete markers that were there.
    pub versions: u32,
    /// Why one of them is still there, such as an Object Lock; empty if all are gone.
    pub left: String,
}

/// Every object below `prefix`, with the number of its versions.
pub async fn find(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
) -> Result<Vec<Destroyed>, String> {
    each(config, store, prefix, &|_, _| false).await
}

/// Deletes every version of every object below `prefix`.
pub async fn destroy(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
) -> Result<Vec<Destroyed>, String> {
    let gone = each(config, store, prefix, &|_, _| true).await?;
    if opened(config).await?.is_none() {
        sweep(&directory(config)?.join(prefix))?;
    }
    Ok(gone)
}

/// Deletes every version of the objects below `prefix` that `which` names.
pub async fn destroy_some(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    which: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Vec<Destroyed>, String> {
    let mut gone = each(config, store, prefix, &|object, _| which(object)).await?;
    gone.retain(|found| which(&found.object));
    Ok(gone)
}

/// Deletes the versions below `prefix` that `which` names, by object and when it was written, milliseconds
/// since 1970; answers those that something keeps.
pub async fn destroy_older(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    which: &Which<'_>,
) -> Result<Vec<Destroyed>, String> {
    let mut gone = match opened(config).await? {
        Some(s3) => each_version(&s3, prefix, which, config.object_lock).await?,
        None => each_file(store, prefix, which).await?,
    };
    gone.retain(|found| !found.left.is_empty());
    Ok(gone)
}

type Which<'a> = dyn Fn(&str, u64) -> bool + Sync + 'a;

async fn each(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    delete: &Which<'_>,
) -> Result<Vec<Destroyed>, String> {
    match opened(config).await? {
        Some(s3) => each_version(&s3, prefix, delete, None).await,
        None => each_file(store, prefix, delete).await,
    }
}

/// What a process that died in the middle of a write left beside the objects of a directory; the
/// store's library does not list it.
fn sweep(dir: &std::path::Path) -> Result<(), String> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(format!("{}: {e}", dir.display())),
    }
}

/// An upload that was begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    pub object: String,
    /// The store's name for it; of a directory the file that was written.
    id: String,
    /// Milliseconds since 1970.
    pub begun_ms: u64,
}

/// Uploads below `prefix` that are not finished.
pub async fn unfinished(config: &BucketConfig, prefix: &str) -> Result<Vec<Unfinished>, String> {
    let mut found = Vec::new();
    let Some(s3) = opened(config).await? else {
        let dir = directory(config)?.join(prefix);
        staged(&dir, &mut found).map_err(|e| e.to_string())?;
        return Ok(found);
    };
    let (mut key, mut upload) = (None, None);
    loop {
        let page = s3
            .client
            .list_multipart_uploads()
            .bucket(&s3.bucket)
            .prefix(format!("{}{prefix}/", s3.root))
            .set_key_marker(key)
            .set_upload_id_marker(upload)
            .send()
            .await
            .map_err(|e| format!("listing uploads: {}", DisplayErrorContext(e)))?;
        found.extend(page.uploads().iter().filter_map(|upload| {
            let begun = upload.initiated()?.to_millis().ok()?;
            Some(Unfinished {
                object: upload.key()?.into(),
                id: upload.upload_id()?.into(),
                begun_ms: begun.try_into().unwrap_or(0),
            })
        }));
        (key, upload) = (
            page.next_key_marker().map(String::from),
            page.next_upload_id_marker().map(String::from),
        );
        if page.is_truncated() != Some(true) || key.is_none() {
            return Ok(found);
        }
    }
}

/// What the store's library writes beside an object of a directory until it is whole: `NAME#NUMBER`.
fn staged(dir: &std::path::Path, found: &mut Vec<Unfinished>) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            staged(&entry.path(), found)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.rsplit_once('#').map(|(_, number)| number);
        if !number.is_some_and(|n| n.bytes().all(|c| c.is_ascii_digit())) {
            continue;
        }
        // It may have been finished meanwhile.
        let Ok(meta) = entry.metadata() else { continue };
        let since = meta.modified()?.duration_since(std::time::UNIX_EPOCH);
        found.push(Unfinished {
            object: name,
            id: entry.path().to_string_lossy().into_owned(),
            begun_ms: since.unwrap_or_default().as_millis() as u64,
        });
    }
    Ok(())
}

/// Has the store forget an upload, and what was uploaded of it.
pub async fn give_up(config: &BucketConfig, upload: &Unfinished) -> Result<(), String> {
    let Some(s3) = opened(config).await? else {
        return match std::fs::remove_file(&upload.id) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{}: {e}", upload.id))
            }
            _ => Ok(()),
        };
    };
    let given_up = s3
        .client
        .abort_multipart_upload()
        .bucket(&s3.bucket)
        .key(&upload.object)
        .upload_id(&upload.id)
        .send()
        .await;
    match given_up {
        Err(e) if e.as_service_error().and_then(|e| e.meta().code()) != Some("NoSuchUpload") => {
            Err(format!("{}: {}", upload.object, DisplayErrorContext(e)))
        }
        _ => Ok(()),
    }
}

/// In a directory an object is a file, which has no versions.
async fn each_file(
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    delete: &Which<'_>,
) -> Result<Vec<Destroyed>, String> {
    let dir = Path::from(prefix);
    let found: Vec<_> = store
        .list(Some(&dir))
        .try_collect()
        .await
        .map_err(|e| e.to_string())?;
    let mut gone = Vec::new();
    for object in found {
        let at = object.last_modified.timestamp_millis().try_into();
        if delete(object.location.as_ref(), at.unwrap_or(0)) {
            let deleted = store.delete(&object.location).await;
            deleted.map_err(|e| e.to_string())?;
        }
        gone.push(Destroyed {
            object: object.location.to_string(),
            versions: 1,
            left: String::new(),
        });
    }
    Ok(gone)
}

/// What was written so lately that its lock stands is not tried.
async fn each_version(
    s3: &S3,
    prefix: &str,
    delete: &Which<'_>,
    lock: Option<ObjectLock>,
) -> Result<Vec<Destroyed>, String> {
    let S3 {
        client,
        bucket,
        root,
        ..
    } = s3;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now_ms = now.unwrap_or_default().as_millis() as u64;
    let mut gone: BTreeMap<String, Destroyed> = BTreeMap::new();
    // They go last: without its marker a version that a lock keeps would be current again.
    let mut covers = Vec::new();
    let mut marker: Option<(String, Option<String>)> = None;
    loop {
        let (key, version) = marker.take().unzip();
        let page = client
            .list_object_versions()
            .bucket(bucket)
            .prefix(format!("{root}{}/", prefix.trim_end_matches('/')))
            .set_key_marker(key)
            .set_version_id_marker(version.flatten())
            .send()
            .await
            .map_err(|e| format!("listing versions: {}", DisplayErrorContext(e)))?;
        let versions = page.versions().iter();
        let versions = versions.map(|v| (v.key(), v.version_id(), v.last_modified(), false));
        let markers = page.delete_markers().iter();
        let markers = markers.map(|m| (m.key(), m.version_id(), m.last_modified(), true));
        let mut deletions = Vec::new();
        for (key, version, at, is_marker) in versions.chain(markers) {
            let Some(key) = key else { continue };
            let object = key.strip_prefix(root.as_str()).unwrap_or(key).to_string();
            let entry = gone.entry(object.clone()).or_insert(Destroyed {
                object: object.clone(),
                versions: 0,
                left: String::new(),
            });
            entry.versions += 1;
            let at = at.and_then(|at| at.to_millis().ok()).unwrap_or(0);
            let at_ms = at.try_into().unwrap_or(0);
            if !delete(&object, at_ms) {
                continue;
            }
            if is_marker {
                covers.push((object, key.to_string(), version.map(String::from)));
            } else if lock.is_some_and(|lock| lock.stands(at_ms, now_ms)) {
                entry.left = "its Object Lock stands".into();
            } else {
                let kept = delete_version(client, bucket, key, version);
                deletions.push(async move { kept.await.map(|kept| (object, kept)) });
            }
        }
        let mut deletions = futures::stream::iter(deletions).buffer_unordered(IN_FLIGHT);
        while let Some((object, kept)) = deletions.try_next().await? {
            if let (Some(why), Some(entry)) = (kept, gone.get_mut(&object)) {
                entry.left = why;
            }
        }
        let next = page.next_key_marker().map(String::from);
        match (page.is_truncated(), next) {
            (Some(true), Some(key)) => {
                marker = Some((key, page.next_version_id_marker().map(String::from)));
            }
            _ => break,
        }
    }
    covers.retain(|(object, _, _)| gone.get(object).is_some_and(|found| found.left.is_empty()));
    let deletions = covers
        .iter()
        .map(|(object, key, version)| async move {
            let kept = delete_version(client, bucket, key, version.as_deref()).await?;
            Ok::<_, String>((object, kept))
        })
        .collect::<Vec<_>>();
    let mut deletions = futures::stream::iter(deletions).buffer_unordered(IN_FLIGHT);
    while let Some((object, kept)) = deletions.try_next().await? {
        if let (Some(why), Some(entry)) = (kept, gone.get_mut(object)) {
            entry.left = why;
        }
    }
    Ok(gone.into_values().collect())
}

/// Deletes one version; answers what keeps it, such as an Object Lock, or a policy: it stays for as
/// long as that says.
async fn delete_version(
    client: &Client,
    bucket: &str,
    key: &str,
    version: Option<&str>,
) -> Result<Option<String>, String> {
    let deleted = client
        .delete_object()
        .bucket(bucket)
        .key(key)
        .set_version_id(version.map(String::from))
        .send()
        .await;
    let Err(e) = deleted else {
        return Ok(None);
    };
    match e.as_service_error().and_then(|e| e.meta().code()) {
        Some(code @ ("AccessDenied" | "InvalidRequest" | "ObjectLocked")) => {
            let meta = e.as_service_error().and_then(|e| e.meta().message());
            Ok(Some(format!("{code}: {}", meta.unwrap_or_default())))
        }
        _ => Err(format!("deleting {key}: {}", DisplayErrorContext(e))),
    }
}
