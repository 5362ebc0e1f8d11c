//! What the object store's library lacks of S3: where a bucket lies, and the versions of its objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::Builder;
use aws_sdk_s3::error::DisplayErrorContext;
use futures::{StreamExt, TryStreamExt};
use kms::aws::sdk_config;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use url::Url;

use super::bucket::BucketConfig;

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

async fn client(cloud_region: &str, endpoint: Option<&str>) -> Client {
    let config = Builder::from(&sdk_config(cloud_region, endpoint).await);
    // Whatever is at an endpoint of its own may not resolve a name for each bucket.
    let config = config.force_path_style(endpoint.is_some());
    Client::from_conf(config.build())
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
    each(config, store, prefix, &|_| false).await
}

/// Deletes every version of every object below `prefix`.
pub async fn destroy(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
) -> Result<Vec<Destroyed>, String> {
    let gone = each(config, store, prefix, &|_| true).await?;
    sweep(config, prefix)?;
    Ok(gone)
}

/// Deletes every version of the objects below `prefix` that `which` names.
pub async fn destroy_some(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    which: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Vec<Destroyed>, String> {
    let mut gone = each(config, store, prefix, which).await?;
    gone.retain(|found| which(&found.object));
    Ok(gone)
}

async fn each(
    config: &BucketConfig,
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    delete: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Vec<Destroyed>, String> {
    let url = Url::parse(&config.url).map_err(|e| e.to_string())?;
    match (url.scheme(), url.host_str(), &config.cloud_region) {
        ("s3", Some(bucket), Some(declared)) => {
            let client = client(declared, config.endpoint.as_deref()).await;
            let root = url.path().trim_matches('/');
            each_version(&client, bucket, root, prefix, delete).await
        }
        _ => each_file(store, prefix, delete).await,
    }
}

/// What a process that died in the middle of a write left beside the objects of a directory; the
/// store's library does not list it.
fn sweep(config: &BucketConfig, prefix: &str) -> Result<(), String> {
    let url = Url::parse(&config.url).map_err(|e| e.to_string())?;
    let Ok(root) = url.to_file_path() else {
        return Ok(());
    };
    match std::fs::remove_dir_all(root.join(prefix)) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(format!("{}: {e}", root.join(prefix).display())),
    }
}

/// In a directory an object is a file, which has no versions.
async fn each_file(
    store: &Arc<dyn ObjectStore>,
    prefix: &str,
    delete: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Vec<Destroyed>, String> {
    let dir = Path::from(prefix);
    let found: Vec<_> = store
        .list(Some(&dir))
        .try_collect()
        .await
        .map_err(|e| e.to_string())?;
    let mut gone = Vec::new();
    for object in found {
        if delete(object.location.as_ref()) {
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

async fn each_version(
    client: &Client,
    bucket: &str,
    root: &str,
    prefix: &str,
    delete: &(dyn Fn(&str) -> bool + Sync),
) -> Result<Vec<Destroyed>, String> {
    let root = match root.is_empty() {
        true => String::new(),
        false => format!("{root}/"),
    };
    let mut gone: BTreeMap<String, Destroyed> = BTreeMap::new();
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
        let versions = page.versions().iter().map(|v| (v.key(), v.version_id()));
        let markers = page.delete_markers().iter();
        let all = versions.chain(markers.map(|m| (m.key(), m.version_id())));
        let mut deletions = Vec::new();
        for (key, version) in all.filter_map(|(key, version)| Some((key?, version))) {
            let object = key.strip_prefix(&root).unwrap_or(key).to_string();
            let entry = gone.entry(object.clone()).or_insert(Destroyed {
                object: object.clone(),
                versions: 0,
                left: String::new(),
            });
            entry.versions += 1;
            if delete(&object) {
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
            _ => return Ok(gone.into_values().collect()),
        }
    }
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
