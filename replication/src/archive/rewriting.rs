//! Moving a tenant's archive to a newer key generation: it begins anew at a checkpoint under that
//! generation, and what is older goes.
//!
//! Invariants. Nothing goes before a restore from the new checkpoint, with nothing but the newer
//! generation, has come to the digest that the chain carries. The newest link that the checkpoint
//! covers stays, and the last one of each earlier incarnation: they say where the chain stands, and
//! that an old one is closed. A file goes only if it is under an older generation and no checkpoint
//! that stays lists it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use kms::TenantKeys;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use thiserror::Error;
use tokio::time::Instant;

use super::bucket::{BucketConfig, file_path};
use super::chain::{Chain, ChainError};
use super::checkpoint::{self, Manifest};
use super::s3::{self, Destroyed};
use crate::GroupId;
use crate::engine::Budget;
use crate::engine::env::{HEAD, generation_of};
use crate::group::Group;
use crate::restore::{self, RestoreError, plan};

/// How long a checkpoint may take to be made.
const MADE_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);
const IN_FLIGHT: usize = 8;

#[derive(Debug, Error)]
pub enum RewriteError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("{0}")]
    Local(#[from] std::io::Error),
    #[error("no checkpoint is made that covers link {0}")]
    NoCheckpoint(u64),
    #[error("object {object} is under generation {found}, before {wanted}")]
    Older {
        object: String,
        found: u32,
        wanted: u32,
    },
    #[error("{0}")]
    Store(String),
}

/// Where the archive begins.
pub struct Beginning {
    pub object: ObjectPath,
    pub manifest: Manifest,
}

/// Uploads a checkpoint of this node that covers the chain's newest link.
pub async fn begin(chain: &Chain, group: &Group) -> Result<Beginning, RewriteError> {
    let tail = chain.tail().await?;
    let deadline = Instant::now() + MADE_WITHIN;
    loop {
        if let Some(found) = group.checkpoint()?
            && let Some(position) = found.state.applied
            && position.index >= tail.last_index()
        {
            let behind = (tail.number, tail.hash);
            let manifest = Manifest::new(chain.group(), &found.state, position, behind);
            let (object, manifest) = checkpoint::upload(chain, found.files, manifest).await?;
            return Ok(Beginning { object, manifest });
        }
        if Instant::now() >= deadline {
            return Err(RewriteError::NoCheckpoint(tail.number));
        }
        group.make_checkpoint().await;
        tokio::time::sleep(LOOK).await;
    }
}

/// Restores from `beginning` into `dir` with `keys`, compares the digest with the chain's, and removes
/// what it restored.
pub async fn prove(
    chain: &Chain,
    beginning: &Beginning,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
) -> Result<(), RewriteError> {
    let plan = plan::from(chain, beginning.manifest.clone()).await?;
    let group = chain.group();
    let quiet = Arc::new(|_| ());
    let restored = restore::rebuild(chain, &plan, group, keys, budget, dir, quiet).await;
    let removed = tokio::fs::remove_dir_all(dir).await;
    restored?;
    Ok(removed?)
}

/// Deletes, in all versions, what lies before `beginning` and under generations before `generation`.
/// Answers what that was; `left` says what keeps one.
pub async fn shorten(
    config: &BucketConfig,
    chain: &Chain,
    beginning: &Beginning,
    generation: u32,
) -> Result<Vec<Destroyed>, RewriteError> {
    let (bucket, group) = (chain.bucket(), chain.group());
    let mut last_links = Vec::new();
    for incarnation in 1..group.incarnation {
        let before = GroupId {
            incarnation,
            ..group
        };
        let before = Chain::new(bucket.clone(), chain.key().clone(), before);
        last_links.push(before.numbers(0).await?.last().copied().unwrap_or(0));
    }
    last_links.push(beginning.manifest.link);
    let mut kept = HashSet::from([beginning.object.to_string()]);
    let mut listed: HashSet<String> = HashSet::new();
    for object in checkpoint::list(bucket, group).await? {
        let later = checkpoint::link_of(&object) > Some(beginning.manifest.link);
        if !later && object != beginning.object {
            continue;
        }
        let store = |e: object_store::Error| RewriteError::Store(format!("{object}: {e}"));
        let bytes = bucket.get(&object).await.map_err(store)?.bytes().await;
        let manifest = checkpoint::decode(chain.key(), group, &bytes.map_err(store)?);
        let manifest = manifest.map_err(|e| RewriteError::Store(format!("{object}: {e}")))?;
        let files = manifest.files.iter();
        listed.extend(files.map(|f| file_path(group.tenant, &f.hash).to_string()));
        kept.insert(object.to_string());
    }
    // Found by their own words: one that is uploaded meanwhile is not among them.
    let mut older = HashSet::new();
    for (object, under) in files(bucket, group).await? {
        if under >= generation {
            continue;
        }
        if listed.contains(&object) {
            return Err(RewriteError::Older {
                object,
                found: under,
                wanted: generation,
            });
        }
        older.insert(object);
    }
    let tenant = format!("tenants/{}", group.tenant);
    let goes = |object: &str| -> bool {
        let parts: Vec<&str> = object.split('/').skip(2).collect();
        match parts[..] {
            ["files", _] => older.contains(object),
            [incarnation, what, name] => {
                let Ok(incarnation) = incarnation.parse::<u32>() else {
                    return false;
                };
                let Some(last) = last_links.get((incarnation as usize).wrapping_sub(1)) else {
                    return false;
                };
                match what {
                    "chain" => name.parse::<u64>().is_ok_and(|number| number < *last),
                    "checkpoints" => {
                        let link = name.split('-').next().and_then(|n| n.parse::<u64>().ok());
                        link.is_some_and(|link| link <= *last) && !kept.contains(object)
                    }
                    _ => false,
                }
            }
            _ => false,
        }
    };
    let gone = s3::destroy_some(config, bucket, &tenant, &goes).await;
    gone.map_err(RewriteError::Store)
}

/// The tenant's files in the bucket, with the generation that each is under.
async fn files(
    bucket: &Arc<dyn ObjectStore>,
    group: GroupId,
) -> Result<Vec<(String, u32)>, RewriteError> {
    let dir = ObjectPath::from(format!("tenants/{}/files", group.tenant));
    let store = |e: object_store::Error| RewriteError::Store(format!("{dir}: {e}"));
    let found: Vec<_> = bucket.list(Some(&dir)).try_collect().await.map_err(store)?;
    let heads = found.into_iter().map(|meta| async move {
        let head = bucket.get_range(&meta.location, 0..HEAD as u64).await;
        // An empty file is nobody's, and is not encrypted.
        let under = match head {
            Ok(head) => generation_of(&head).unwrap_or(u32::MAX),
            Err(_) if meta.size < HEAD as u64 => u32::MAX,
            Err(e) => return Err(RewriteError::Store(format!("{}: {e}", meta.location))),
        };
        Ok((meta.location.to_string(), under))
    });
    futures::stream::iter(heads)
        .buffered(IN_FLIGHT)
        .try_collect()
        .await
}
