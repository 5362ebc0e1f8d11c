//! What of a tenant's history is in the bucket, from listings and manifests alone.

use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStore};

use super::bucket::chain_dir;
use super::chain::{Chain, ChainError};
use super::checkpoint::{self, Manifest};

const IN_FLIGHT: usize = 8;

/// A checkpoint in the bucket.
#[derive(Clone, Debug)]
pub struct Kept {
    pub manifest: Manifest,
    /// When it was uploaded, by the store's clock, milliseconds since 1970.
    pub at_ms: u64,
}

impl Kept {
    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.length).sum()
    }
}

/// One incarnation's chain.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    pub incarnation: u32,
    /// Number, size in bytes and time of each link, in order.
    pub links: Vec<(u64, u64, u64)>,
    pub closed: bool,
    /// Its first link is there, and what leads to it: every moment since can be restored.
    pub whole: bool,
    /// Oldest first.
    pub checkpoints: Vec<Kept>,
}

fn ms(meta: &ObjectMeta) -> u64 {
    meta.last_modified
        .timestamp_millis()
        .try_into()
        .unwrap_or(0)
}

/// What a restore to the newest state reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub checkpoint_bytes: u64,
    pub log_bytes: u64,
}

/// What a restore of a chain's newest state would read; also of the incarnations that it begins in.
pub async fn load(chain: &Chain) -> Result<Load, ChainError> {
    let mut load = Load::default();
    let mut chain = chain.clone();
    loop {
        let (bucket, group) = (chain.bucket(), chain.group());
        let mut manifest = None;
        for object in checkpoint::list(bucket, group).await? {
            match checkpoint::read(&chain, &object).await {
                Ok(read) => {
                    manifest = Some(read);
                    break;
                }
                // A restore takes the one before it.
                Err(ChainError::Refused { .. } | ChainError::Missing(_)) => {}
                Err(e) => return Err(e),
            }
        }
        let from = manifest.as_ref().map_or(0, |manifest| manifest.link);
        let links = chain.sizes(from).await?;
        load.log_bytes += links.iter().map(|(_, bytes)| bytes).sum::<u64>();
        if let Some(manifest) = manifest {
            load.checkpoint_bytes = manifest.files.iter().map(|file| file.length).sum();
            return Ok(load);
        }
        let base = match links.first() {
            Some((1, _)) => chain.read(1).await?.header.base,
            _ => None,
        };
        let Some(base) = base else {
            return Ok(load);
        };
        let origin = base.origin.map(|origin| origin.incarnation);
        chain = chain.of(origin.unwrap_or(base.incarnation));
    }
}

impl Survey {
    /// Bytes of the links that a restore to the newest state replays.
    pub fn behind(&self) -> u64 {
        let newest = self.checkpoints.last().map_or(0, |kept| kept.manifest.link);
        let behind = self.links.iter().filter(|(number, _, _)| *number > newest);
        behind.map(|(_, bytes, _)| bytes).sum()
    }
}

/// Looks at a chain.
pub async fn survey(chain: &Chain) -> Result<Survey, ChainError> {
    let (bucket, group) = (chain.bucket(), chain.group());
    let dir = chain_dir(group);
    let listed: Vec<ObjectMeta> = bucket
        .list(Some(&dir))
        .try_collect()
        .await
        .map_err(|cause| ChainError::Store {
            object: dir.to_string(),
            cause,
        })?;
    let link = |meta: &ObjectMeta| {
        let number = meta.location.filename()?.parse().ok()?;
        Some((number, meta.size, ms(meta)))
    };
    let mut links: Vec<_> = listed.iter().filter_map(link).collect();
    links.sort_unstable();
    let closed = match links.last() {
        Some((number, _, _)) => chain.read(*number).await?.header.closed.is_some(),
        None => false,
    };
    let whole = match links.first() {
        Some((1, _, _)) => !chain.read(1).await?.header.is_gap(),
        _ => false,
    };
    let objects = checkpoint::list_with_times(bucket, group).await?;
    let reads = objects.into_iter().map(|(object, at)| async move {
        match checkpoint::read(chain, &object).await {
            Ok(manifest) => Ok(Some(Kept {
                manifest,
                at_ms: at,
            })),
            // It is of no use for a restore.
            Err(ChainError::Refused { .. } | ChainError::Missing(_)) => Ok(None),
            Err(e) => Err(e),
        }
    });
    let read: Vec<Option<Kept>> = futures::stream::iter(reads)
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    let mut checkpoints: Vec<Kept> = read.into_iter().flatten().collect();
    checkpoints.sort_by_key(|kept| (kept.manifest.link, kept.manifest.position.index));
    Ok(Survey {
        incarnation: group.incarnation,
        links,
        closed,
        whole,
        checkpoints,
    })
}
