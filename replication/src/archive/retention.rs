//! Retention: deletes of a tenant's archive what its window does not need, and what was never finished.
//!
//! Invariants. What stays is what `window::keep` says, of the lesser of this node's clock and the
//! store's: one that is wrong keeps too much. A manifest goes before the links and files that it needs.
//! It is retired first, as an object of another name: for `collect_after` from then on its files stay,
//! because a checkpoint on its way may refer to them (an upload refers to files of manifests that it
//! has read, and is given up before that time is over). A file that no manifest lists goes once it is
//! as old. While one manifest cannot be read, no file goes. Whoever dies in between leaves what the next
//! sweep goes on with.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};
use thiserror::Error;

use super::bucket::{BucketConfig, chain_dir, checkpoints_dir, file_path, retired_dir};
use super::chain::{Chain, ChainError};
use super::checkpoint::{self, Manifest};
use super::holds::{self, Hold};
use super::link::LinkError;
use super::s3::{self, Unfinished};
use super::window::{Candidate, Incarnation, Kept, SPACING_MS, keep};
use crate::GroupId;

const IN_FLIGHT: usize = 8;
/// A restore that begins at the edge of the window has so much time to read it: this, or a part of
/// the window.
const SLACK: Duration = Duration::from_secs(3600);
const SLACK_PART: u32 = 24;

#[derive(Debug, Error)]
pub enum RetentionError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("{0}")]
    Store(String),
    #[error(
        "a hold was placed or released meanwhile: no link and no file was deleted; sweep again"
    )]
    Held,
    #[error(
        "the newest state of group {0} cannot be restored from what is there: nothing is deleted; scrub the archive"
    )]
    Incomplete(GroupId),
}

/// What a tenant's contract says of its history.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Every moment of so long can be restored.
    pub keep: Duration,
    /// The newest checkpoints, so many, stay in any case.
    pub checkpoints: usize,
    /// What nothing refers to goes after this.
    pub collect_after: Duration,
}

/// What a sweep deletes, and what it does not.
#[derive(Clone, Debug, Default)]
pub struct Sweep {
    /// A file that was uploaded since then stays, milliseconds since 1970.
    older_ms: u64,
    /// Every moment since then can be restored, as far as the tenant is that old; ms since 1970.
    pub horizon_ms: u64,
    pub holds: Vec<Hold>,
    /// Manifests of checkpoints that go; their files follow.
    pub retired: Vec<String>,
    pub links: Vec<String>,
    /// Files, and manifests that were retired before.
    pub collected: Vec<String>,
    /// Where manifests lay that were retired before: versions of them may be left.
    remnants: Vec<String>,
    /// Uploads that nobody finished.
    pub unfinished: Vec<Unfinished>,
    /// Bytes of the links and files.
    pub bytes: u64,
    /// Manifests that do not read, for which no file goes.
    pub unreadable: Vec<String>,
    /// The newest checkpoint is a day old, and there is more behind it, which would stay in it for longer
    /// than the window; or there are fewer than the policy says.
    pub checkpoint_due: bool,
}

impl Sweep {
    pub fn is_empty(&self) -> bool {
        self.retired.is_empty()
            && self.links.is_empty()
            && self.collected.is_empty()
            && self.unfinished.is_empty()
    }
}

/// A manifest as it lies in the bucket; none if it does not read.
struct Read {
    object: Path,
    at_ms: u64,
    manifest: Option<Manifest>,
}

fn ms(meta: &ObjectMeta) -> u64 {
    let at = meta.last_modified.timestamp_millis();
    at.try_into().unwrap_or(0)
}

fn store(object: &Path, cause: object_store::Error) -> ChainError {
    ChainError::Store {
        object: object.to_string(),
        cause,
    }
}

async fn list(bucket: &Arc<dyn ObjectStore>, dir: &Path) -> Result<Vec<ObjectMeta>, ChainError> {
    let listed = bucket.list(Some(dir)).try_collect().await;
    listed.map_err(|e| store(dir, e))
}

async fn read_all(chain: &Chain, dir: &Path) -> Result<Vec<Read>, ChainError> {
    let listed = list(chain.bucket(), dir).await?;
    let reads = listed.into_iter().map(|meta| async move {
        let manifest = match checkpoint::read(chain, &meta.location).await {
            Ok(manifest) => Some(manifest),
            Err(ChainError::Refused { .. }) => None,
            Err(e) => return Err(e),
        };
        Ok(Read {
            at_ms: ms(&meta),
            object: meta.location,
            manifest,
        })
    });
    let reads = futures::stream::iter(reads.collect::<Vec<_>>());
    reads.buffered(IN_FLIGHT).try_collect().await
}

/// The store's clock, milliseconds since 1970.
pub async fn clock(
    config: &BucketConfig,
    bucket: &Arc<dyn ObjectStore>,
) -> Result<u64, RetentionError> {
    let dir = format!("clock/{}", hex::encode(kms::secret::random_bytes::<8>()));
    let object = Path::from(format!("{dir}/now"));
    let put = bucket.put(&object, PutPayload::new()).await;
    put.map_err(|e| store(&object, e))?;
    let meta = bucket.head(&object).await.map_err(|e| store(&object, e))?;
    let gone = s3::destroy(config, bucket, &dir).await;
    gone.map_err(RetentionError::Store)?;
    Ok(ms(&meta))
}

/// Everything that there is of a tenant.
struct Inventory {
    incarnations: BTreeMap<u32, Incarnation>,
    manifests: Vec<(u32, Read)>,
    retired: Vec<Read>,
    /// Of incarnations that the directory does not name.
    newer: Vec<Read>,
    files: Vec<ObjectMeta>,
}

async fn inventory(chain: &Chain) -> Result<Inventory, RetentionError> {
    let (bucket, tenant) = (chain.bucket(), chain.group().tenant);
    let mut found = Inventory {
        incarnations: BTreeMap::new(),
        manifests: Vec::new(),
        retired: Vec::new(),
        newer: Vec::new(),
        // Before the manifests: one that comes in between may list a file that is not seen, not the
        // other way round.
        files: list(bucket, &Path::from(format!("tenants/{tenant}/files"))).await?,
    };
    let sizes = |meta: &ObjectMeta| (meta.location.to_string(), meta.size);
    let there: BTreeMap<String, u64> = found.files.iter().map(sizes).collect();
    let dir = Path::from(format!("tenants/{tenant}"));
    let below = bucket.list_with_delimiter(Some(&dir)).await;
    let below = below.map_err(|e| store(&dir, e))?;
    let names = below.common_prefixes.iter().filter_map(Path::filename);
    let mut numbers: Vec<u32> = names.filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    for number in numbers {
        let own = chain.of(number);
        if number > chain.group().incarnation {
            // A restore is under way, or was given up: what it refers to stays.
            let read = read_all(&own, &checkpoints_dir(own.group())).await?;
            found.newer.extend(read);
            continue;
        }
        let mut incarnation = Incarnation {
            last: match number == chain.group().incarnation {
                true => own.tail().await?.number,
                // What is left of it is little.
                false => own.numbers(0).await?.last().copied().unwrap_or(0),
            },
            ..Incarnation::default()
        };
        match own.read(1).await {
            Ok(first) => {
                incarnation.begins = !first.header.is_gap();
                incarnation.opening_ms = first.header.state.as_ref().map(|s| s.time_ms);
                incarnation.base = first.header.base;
            }
            Err(ChainError::Missing(_)) => {}
            Err(e) => return Err(e.into()),
        }
        for read in read_all(&own, &checkpoints_dir(own.group())).await? {
            let is_there = |manifest: &Manifest| {
                manifest.files.iter().all(|file| {
                    let object = file_path(tenant, &file.hash).to_string();
                    there.get(&object) == Some(&file.length)
                })
            };
            let manifest = read.manifest.as_ref();
            incarnation.checkpoints.push(Candidate {
                object: read.object.to_string(),
                link: checkpoint::link_of(&read.object).unwrap_or(0),
                index: manifest.map_or(0, |m| m.position.index),
                time_ms: manifest.map_or(0, |m| m.time_ms),
                whole: manifest.is_some_and(is_there),
            });
            found.manifests.push((number, read));
        }
        found
            .retired
            .extend(read_all(&own, &retired_dir(own.group())).await?);
        found.incarnations.insert(number, incarnation);
    }
    Ok(found)
}

/// The links of an incarnation before `from`.
async fn links_before(chain: &Chain, from: u64) -> Result<Vec<ObjectMeta>, ChainError> {
    let dir = chain_dir(chain.group());
    let mut listed = chain.bucket().list(Some(&dir));
    let mut before = Vec::new();
    while let Some(meta) = listed.try_next().await.map_err(|e| store(&dir, e))? {
        let number = meta.location.filename().and_then(|n| n.parse::<u64>().ok());
        if number.is_some_and(|number| number < from) {
            before.push(meta);
        }
    }
    Ok(before)
}

/// Whether only this checkpoint leads over the link behind it, which stands for entries that were purged
/// before they were archived.
async fn bridges(chain: &Chain, object: &Path) -> Result<bool, ChainError> {
    let link = checkpoint::link_of(object).unwrap_or(0);
    match chain.read(link + 1).await {
        Ok(next) => {
            let header = next.header;
            Ok(header.entries == 0 && header.closed.is_none() && header.base.is_none())
        }
        // Before what is kept, behind all there is, or of no use to anybody.
        Err(ChainError::Missing(_) | ChainError::Refused { .. }) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Decides what goes; `chain` is the tenant's newest, `known` the newest link that the directory knows
/// of, `now_ms` the lesser of the clocks.
pub async fn decide(
    config: &BucketConfig,
    chain: &Chain,
    policy: &Policy,
    known: u64,
    now_ms: u64,
) -> Result<Sweep, RetentionError> {
    let (bucket, tenant) = (chain.bucket(), chain.group().tenant);
    let entries = holds::entries(bucket, chain.key(), tenant).await?;
    let holds = holds::standing(&entries);
    let slack = SLACK.min(policy.keep / SLACK_PART);
    let window = (policy.keep + slack).as_millis() as u64;
    let held = holds.iter().map(|hold| hold.since_ms).min();
    let horizon_ms = now_ms.saturating_sub(window).min(held.unwrap_or(u64::MAX));
    let found = inventory(chain).await?;
    if let Some((_, newest)) = found.incarnations.last_key_value() {
        let restorable = newest.begins || newest.checkpoints.iter().any(|c| c.whole);
        if newest.last < known || !restorable {
            return Err(RetentionError::Incomplete(chain.group()));
        }
    }
    let kept = keep(&found.incarnations, horizon_ms, policy.checkpoints);
    let old = |at_ms: u64| at_ms + policy.collect_after.as_millis() as u64 <= now_ms;
    let mut sweep = Sweep {
        older_ms: now_ms.saturating_sub(policy.collect_after.as_millis() as u64),
        horizon_ms,
        holds,
        ..Sweep::default()
    };
    for (number, kept) in &kept {
        for link in links_before(&chain.of(*number), kept.from).await? {
            sweep.bytes += link.size;
            sweep.links.push(link.location.to_string());
        }
    }
    let stays = |number: &u32, object: &Path| {
        let of: Option<&Kept> = kept.get(number);
        of.is_some_and(|kept| kept.checkpoints.contains(object.as_ref()))
    };
    let mut listed = HashSet::new();
    let mut refer = |read: &Read, unreadable: &mut Vec<String>| match &read.manifest {
        Some(manifest) => {
            let files = manifest.files.iter();
            listed.extend(files.map(|file| file_path(tenant, &file.hash).to_string()));
        }
        None => unreadable.push(read.object.to_string()),
    };
    for (number, read) in &found.manifests {
        let from = kept.get(number).map_or(0, |kept| kept.from);
        let inside = checkpoint::link_of(&read.object) >= Some(from);
        let own = chain.of(*number);
        let needed = stays(number, &read.object) || inside && bridges(&own, &read.object).await?;
        if !needed {
            sweep.retired.push(read.object.to_string());
        }
        // Also of one that is retired now.
        refer(read, &mut sweep.unreadable);
    }
    for read in &found.newer {
        refer(read, &mut sweep.unreadable);
    }
    let live: HashSet<&str> = found
        .manifests
        .iter()
        .map(|(_, r)| r.object.as_ref())
        .collect();
    for read in &found.retired {
        let before = read.object.as_ref().replace("/retired/", "/checkpoints/");
        if live.contains(before.as_str()) {
            // Its retirement was cut short: it is decided anew.
            refer(read, &mut sweep.unreadable);
            continue;
        }
        sweep.remnants.push(before);
        // It tells of a version that is left as long as that can be locked.
        let locked = config.object_lock;
        match old(read.at_ms) {
            true if locked.is_some_and(|lock| lock.stands(read.at_ms, now_ms)) => {}
            true => sweep.collected.push(read.object.to_string()),
            false => refer(read, &mut sweep.unreadable),
        }
    }
    // Without any manifest the files are all that there is: somebody has deleted too much.
    if sweep.unreadable.is_empty() && !found.manifests.is_empty() {
        for file in &found.files {
            if old(ms(file)) && !listed.contains(file.location.as_ref()) {
                sweep.bytes += file.size;
                sweep.collected.push(file.location.to_string());
            }
        }
    }
    if let Some((_, newest)) = found.incarnations.last_key_value() {
        let whole = || newest.checkpoints.iter().filter(|c| c.whole);
        let last = whole().max_by_key(|c| c.index);
        // Of a chain that does not begin with its first link one must be there.
        let since = last.map(|c| c.time_ms).or(newest.opening_ms).unwrap_or(0);
        let behind = newest.last > last.map_or(0, |c| c.link) + 1;
        sweep.checkpoint_due =
            since + SPACING_MS <= now_ms && (behind || whole().count() < policy.checkpoints);
    }
    let unfinished = s3::unfinished(config, &format!("tenants/{tenant}")).await;
    sweep.unfinished = unfinished.map_err(RetentionError::Store)?;
    sweep.unfinished.retain(|upload| old(upload.begun_ms));
    Ok(sweep)
}

/// Deletes what was decided, in all versions; `moment` is told the name of each step before it.
/// Answers what an Object Lock keeps.
pub async fn run(
    config: &BucketConfig,
    chain: &Chain,
    sweep: &Sweep,
    moment: &(dyn Fn(&str) + Sync),
) -> Result<Vec<String>, RetentionError> {
    let (bucket, tenant) = (chain.bucket(), chain.group().tenant);
    undisturbed(chain, sweep).await?;
    moment("retention-begun");
    for object in &sweep.retired {
        retire(bucket, &Path::from(object.as_str())).await?;
    }
    moment("checkpoints-retired");
    undisturbed(chain, sweep).await?;
    let all = [
        &sweep.links,
        &sweep.collected,
        &sweep.retired,
        &sweep.remnants,
    ];
    let goes: HashSet<&str> = all.into_iter().flatten().map(String::as_str).collect();
    let mut left = Vec::new();
    if !goes.is_empty() {
        let prefix = format!("tenants/{tenant}");
        // A file can have been uploaded anew since.
        let which = |object: &str, at_ms: u64| {
            goes.contains(object) && (!object.contains("/files/") || at_ms <= sweep.older_ms)
        };
        let gone = s3::destroy_older(config, bucket, &prefix, &which).await;
        left = gone.map_err(RetentionError::Store)?;
    }
    moment("history-deleted");
    for upload in &sweep.unfinished {
        let given_up = s3::give_up(config, upload).await;
        given_up.map_err(RetentionError::Store)?;
    }
    Ok(left
        .into_iter()
        .map(|o| format!("{}: {}", o.object, o.left))
        .collect())
}

/// No restore has closed the chain, and no hold was placed, since the sweep was decided.
async fn undisturbed(chain: &Chain, sweep: &Sweep) -> Result<(), RetentionError> {
    let tail = chain.tail().await?;
    if let Some(closed) = tail.closed() {
        return Err(ChainError::Closed(closed.incarnation).into());
    }
    let tenant = chain.group().tenant;
    let entries = holds::entries(chain.bucket(), chain.key(), tenant).await?;
    match holds::standing(&entries) == sweep.holds {
        true => Ok(()),
        false => Err(RetentionError::Held),
    }
}

/// Moves a manifest to where no restore looks for it.
pub(super) async fn retire(
    bucket: &Arc<dyn ObjectStore>,
    object: &Path,
) -> Result<(), RetentionError> {
    let parts: Vec<String> = object
        .parts()
        .map(|part| part.as_ref().to_string())
        .collect();
    let [tenants, tenant, incarnation, _, name] = &parts[..] else {
        return Err(ChainError::Refused {
            object: object.to_string(),
            cause: LinkError::Malformed("its name is not a checkpoint's".into()),
        }
        .into());
    };
    let to = Path::from(format!("{tenants}/{tenant}/{incarnation}/retired/{name}"));
    let got = match bucket.get(object).await {
        Ok(got) => got,
        // A try before came further.
        Err(object_store::Error::NotFound { .. }) => return Ok(()),
        Err(e) => return Err(store(object, e).into()),
    };
    let bytes = got.bytes().await.map_err(|e| store(object, e))?;
    // Over one that a try before has left: its time counts from now.
    let put = bucket.put(&to, PutPayload::from(bytes)).await;
    put.map_err(|e| store(&to, e))?;
    bucket.delete(object).await.map_err(|e| store(object, e))?;
    Ok(())
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
