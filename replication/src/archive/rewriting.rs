//! Moving a tenant's archive to a newer key generation: it begins anew at a checkpoint under that
//! generation, and what is older goes.
//!
//! Invariants. Nothing goes before a restore from the new checkpoint, with nothing but the newer
//! generation, has come to the digest that the chain carries. The newest link that the checkpoint
//! covers stays, and the last one of each earlier incarnation: they say where the chain stands, and
//! that an old one is closed. A checkpoint at or behind that link goes only if it is under an older
//! generation: another node may have begun with it. A file goes only if it is under an older
//! generation and no checkpoint that stays lists it. A closed chain is not touched.

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
use super::chain::{Chain, ChainError, Tail};
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
    #[error("the archive does not reach entry {0} yet")]
    NotArchived(u64),
    #[error(
        "link {0} was made while the tenant was sealed, and carries no digest; the next one does"
    )]
    NoDigest(u64),
    #[error("the newest checkpoint in the bucket is not under generation {0}")]
    NoBeginning(u32),
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

/// Whether to go on.
pub type GoOn = Arc<dyn Fn() -> bool + Send + Sync>;

/// The chain's end, which no restore may have closed.
async fn open_tail(chain: &Chain) -> Result<Tail, RewriteError> {
    let tail = chain.tail().await?;
    match tail.closed() {
        Some(closed) => Err(ChainError::Closed(closed.incarnation).into()),
        None => Ok(tail),
    }
}

/// Uploads a checkpoint of this node that covers every link that there is now, behind the newest link
/// that it covers when it is made.
pub async fn begin(
    chain: &Chain,
    group: &Group,
    generation: u32,
) -> Result<Beginning, RewriteError> {
    let first = open_tail(chain).await?;
    if let Some(begun) = begun(chain, &first, generation).await? {
        return Ok(begun);
    }
    let deadline = Instant::now() + MADE_WITHIN;
    let (found, position) = loop {
        if let Some(found) = group.checkpoint()?
            && let Some(position) = found.state.applied
            && position.index >= first.last_index()
        {
            break (found, position);
        }
        if Instant::now() >= deadline {
            return Err(RewriteError::NoCheckpoint(first.number));
        }
        group.make_checkpoint().await;
        tokio::time::sleep(LOOK).await;
    };
    // Links that reach beyond it say what it must be, whoever made it.
    let mut behind = open_tail(chain).await?;
    while behind.last_index() < position.index {
        if Instant::now() >= deadline {
            return Err(RewriteError::NotArchived(position.index));
        }
        tokio::time::sleep(LOOK).await;
        behind = open_tail(chain).await?;
    }
    while behind.last_index() > position.index && behind.number > first.number {
        behind = Tail::from(&chain.read(behind.number - 1).await?);
    }
    let behind = (behind.number, behind.hash);
    let manifest = Manifest::new(chain.group(), &found.state, position, behind);
    let (object, manifest) = checkpoint::upload(chain, found.files, manifest).await?;
    Ok(Beginning { object, manifest })
}

/// The manifest in `object`, if it reads and is under `generation` or a newer one.
async fn read_under(
    chain: &Chain,
    object: &ObjectPath,
    generation: u32,
) -> Result<Option<Manifest>, ChainError> {
    match checkpoint::read(chain, object).await {
        Ok(manifest) => Ok((manifest.oldest >= generation).then_some(manifest)),
        Err(ChainError::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A checkpoint under `generation` that covers the whole chain, which an earlier try has uploaded.
async fn begun(
    chain: &Chain,
    tail: &Tail,
    generation: u32,
) -> Result<Option<Beginning>, RewriteError> {
    for object in checkpoint::list(chain.bucket(), chain.group()).await? {
        if checkpoint::link_of(&object) < Some(tail.number) {
            break;
        }
        if let Some(manifest) = read_under(chain, &object, generation).await?
            && manifest.position.index >= tail.last_index()
        {
            return Ok(Some(Beginning { object, manifest }));
        }
    }
    Ok(None)
}

/// Restores from `beginning`, as it is in the bucket, into `dir` with `keys`, compares the digest with
/// the one that the chain carries, and removes what it restored.
pub async fn prove(
    chain: &Chain,
    beginning: &Beginning,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
    go_on: GoOn,
) -> Result<(), RewriteError> {
    let manifest = checkpoint::read(chain, &beginning.object).await?;
    let plan = plan::from(chain, manifest.clone()).await?;
    // Where nothing lies behind the checkpoint, the link that it names says how the state must be.
    if plan.links.is_empty() && plan.end(Some(manifest.position)).is_none() {
        return Err(RewriteError::NoDigest(manifest.link));
    }
    let report = Arc::new(move |_| go_on());
    // Its engine is closed before its files go.
    let restored = restore::rebuild(chain, &plan, keys, budget, dir, report).await;
    let restored = restored.map(drop);
    let removed = tokio::fs::remove_dir_all(dir).await;
    restored?;
    Ok(removed?)
}

/// Deletes, in all versions, what lies before `beginning` and under generations before `generation`,
/// then looks whether what is left is enough. Answers what was deleted; `left` says what keeps one.
pub async fn shorten(
    config: &BucketConfig,
    chain: &Chain,
    beginning: &Beginning,
    generation: u32,
) -> Result<Vec<Destroyed>, RewriteError> {
    let (bucket, group) = (chain.bucket(), chain.group());
    open_tail(chain).await?;
    let mut last_links = Vec::new();
    for incarnation in 1..group.incarnation {
        last_links.push(
            chain
                .of(incarnation)
                .numbers(0)
                .await?
                .last()
                .copied()
                .unwrap_or(0),
        );
    }
    last_links.push(beginning.manifest.link);
    // Another node may be doing the same: what it has begun stays.
    let mut kept = HashSet::new();
    let mut listed: HashSet<String> = HashSet::new();
    for object in checkpoint::list(bucket, group).await? {
        if checkpoint::link_of(&object) < Some(beginning.manifest.link) {
            continue;
        }
        if let Some(manifest) = read_under(chain, &object, generation).await? {
            let files = manifest.files.iter();
            listed.extend(files.map(|f| file_path(group.tenant, &f.hash).to_string()));
            kept.insert(object.to_string());
        }
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
    let gone = gone.map_err(RewriteError::Store)?;
    check(chain, generation).await?;
    Ok(gone)
}

/// What a restore would begin with now must be under `generation` or a newer one, and be there.
async fn check(chain: &Chain, generation: u32) -> Result<(), RewriteError> {
    let plan = plan::newest(chain).await?;
    let manifest = plan.manifest.filter(|m| m.oldest >= generation);
    let manifest = manifest.ok_or(RewriteError::NoBeginning(generation))?;
    let there: HashSet<String> = files(chain.bucket(), chain.group())
        .await?
        .into_iter()
        .map(|(object, _)| object)
        .collect();
    for file in &manifest.files {
        let object = file_path(manifest.group.tenant, &file.hash).to_string();
        if !there.contains(&object) {
            return Err(ChainError::Missing(object).into());
        }
    }
    Ok(())
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
