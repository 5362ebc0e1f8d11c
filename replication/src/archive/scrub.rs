//! Scrub: everything of a tenant's archive is read back and authenticated.
//!
//! Invariants. What is said to be damaged or missing was read twice, and is still meant to be there: a
//! store that does not answer is an error, not damage. The lock of what is whole is renewed where the bucket
//! sets locks. Nothing else is changed here but by `retire`, which takes a manifest whose checkpoint cannot be restored out of every restore's way, and deletes the files
//! that are damaged, so that no later checkpoint refers to them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use object_store::ObjectStoreExt;
use object_store::path::Path;
use tokio::time::Instant;

use super::bucket::{checkpoints_dir, file_path, link_path};
use super::chain::{Chain, ChainError, Tail};
use super::checkpoint::{self, Manifest, ManifestFile};
use super::link::{Link, LinkError};
use super::lock::Locks;
use super::retention::{self, RetentionError};
use crate::clock::utc;

/// An object that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub object: String,
    pub what: String,
    /// The moments that cannot be restored for it, milliseconds since 1970; none: another way leads to
    /// each.
    pub lost: Option<(u64, u64)>,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "object {}: {}; ", self.object, self.what)?;
        match self.lost {
            Some((0, u64::MAX)) => write!(f, "nothing can be restored"),
            Some((from, u64::MAX)) => {
                write!(f, "moments since {} cannot be restored", utc(from))
            }
            Some((from, to)) => {
                let (from, to) = (utc(from), utc(to));
                write!(f, "moments from {from} to {to} cannot be restored")
            }
            None => write!(f, "every moment can still be restored"),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Scrubbed {
    pub objects: u64,
    pub bytes: u64,
    pub damages: Vec<Damage>,
    /// Manifests whose checkpoints cannot be restored.
    pub unusable: Vec<String>,
    /// Files that are not what their name says.
    pub damaged_files: Vec<String>,
    /// Objects whose lock the store refused to renew, and why.
    pub unlocked: Vec<String>,
}

/// Whether to go on.
pub type GoOn<'a> = &'a (dyn Fn() -> bool + Sync);

struct Reading<'a> {
    scope: &'a Scope<'a>,
    /// The incarnation that goes on.
    newest: u32,
    began: Instant,
    scrubbed: Scrubbed,
    /// What was found of each file, by its hash: files belong to many checkpoints.
    files: HashMap<String, Option<String>>,
}

/// How a scrub goes about it.
pub struct Scope<'a> {
    /// Bytes a second, at most.
    pub rate: u64,
    /// What is renewed of what is whole.
    pub locks: Option<&'a Locks>,
    /// Moments before this are not kept for their own sake, milliseconds since 1970: what only they need
    /// may lose its lock.
    pub since_ms: u64,
    /// Links are read behind the newest so many checkpoints only: what is never restored to an earlier moment
    /// needs no others.
    pub checkpoints: Option<usize>,
    pub go_on: GoOn<'a>,
}

/// Reads everything of a tenant whose newest chain is `chain`, up to link `known` at least; none if it was
/// stopped.
pub async fn scrub(
    chain: &Chain,
    known: u64,
    scope: &Scope<'_>,
) -> Result<Option<Scrubbed>, ChainError> {
    let newest = chain.group().incarnation;
    let mut reading = Reading::of(scope, newest);
    for incarnation in 1..=newest {
        let known = if incarnation == newest { known } else { 0 };
        reading.incarnation(&chain.of(incarnation), known).await?;
    }
    Ok((scope.go_on)().then_some(reading.scrubbed))
}

/// Reads every file of one checkpoint; why it cannot be restored, if so.
pub async fn check(chain: &Chain, manifest: &Manifest) -> Result<Option<String>, ChainError> {
    for file in &manifest.files {
        if let Some(why) = read_file(chain, file).await? {
            return Ok(Some(why));
        }
    }
    Ok(None)
}

/// Takes the manifests that cannot be restored away, and the files that are damaged: the next checkpoint
/// must not refer to them.
pub async fn retire(chain: &Chain, scrubbed: &Scrubbed) -> Result<(), RetentionError> {
    for object in &scrubbed.unusable {
        retention::retire(chain.bucket(), &Path::from(object.as_str())).await?;
    }
    for object in &scrubbed.damaged_files {
        match chain.bucket().delete(&Path::from(object.as_str())).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(cause) => {
                let object = object.clone();
                return Err(ChainError::Store { object, cause }.into());
            }
        }
    }
    Ok(())
}

/// Why a file is not what its manifest says; none if it is.
async fn read_file(chain: &Chain, file: &ManifestFile) -> Result<Option<String>, ChainError> {
    let object = file_path(chain.group().tenant, &file.hash);
    let mut why = String::new();
    for _ in 0..2 {
        why = match chain.get(&object).await {
            Ok(bytes) => {
                let (length, hash) = (bytes.len() as u64, file.hash.clone());
                let same = tokio::task::spawn_blocking(move || {
                    blake3::hash(&bytes).to_hex().as_str() == hash
                });
                if length == file.length && same.await.unwrap_or(false) {
                    return Ok(None);
                }
                "its content does not have its hash: it is damaged".into()
            }
            Err(ChainError::Missing(_)) => "it is missing".into(),
            Err(e) => return Err(e),
        };
    }
    Ok(Some(format!("object {object}: {why}")))
}

impl<'a> Reading<'a> {
    fn of(scope: &'a Scope<'a>, newest: u32) -> Self {
        Reading {
            scope,
            newest,
            began: Instant::now(),
            scrubbed: Scrubbed::default(),
            files: HashMap::new(),
        }
    }

    async fn pace(&mut self, bytes: u64) {
        self.scrubbed.objects += 1;
        self.scrubbed.bytes += bytes;
        let due =
            Duration::from_secs_f64(self.scrubbed.bytes as f64 / self.scope.rate.max(1) as f64);
        tokio::time::sleep_until(self.began + due).await;
    }

    /// Renews the lock of an object that was found whole.
    async fn renew(&mut self, chain: &Chain, object: &Path) -> Result<(), ChainError> {
        let Some(locks) = self.scope.locks else {
            return Ok(());
        };
        let renewed = locks.renew(object).await;
        let renewed = renewed.map_err(|cause| ChainError::Store {
            object: format!("{object} of group {}", chain.group()),
            cause,
        });
        if let Some(why) = renewed? {
            self.scrubbed.unlocked.push(format!("{object}: {why}"));
        }
        Ok(())
    }

    /// `known`: the directory's record of the newest link, 0 of a chain that is closed.
    async fn incarnation(&mut self, chain: &Chain, known: u64) -> Result<(), ChainError> {
        let numbers = chain.numbers(0).await?;
        let first = numbers.first().copied().unwrap_or(1);
        let last = numbers.last().copied().unwrap_or(0).max(known);
        let remnants = self.are_remnants(chain, &numbers).await?;
        // Whether the whole log can be replayed without a checkpoint.
        let begins = match chain.read(1).await {
            _ if remnants => false,
            Ok(link) => !link.header.is_gap(),
            // Read again, and named, below.
            Err(ChainError::Missing(_) | ChainError::Refused { .. }) => first == 1,
            Err(e) => return Err(e),
        };
        // Link and time of the checkpoints that can be restored, and those that cannot.
        let mut whole: BTreeMap<u64, u64> = BTreeMap::new();
        let mut bad: Vec<(Path, u64, String)> = Vec::new();
        for object in checkpoint::list(chain.bucket(), chain.group()).await? {
            if !(self.scope.go_on)() {
                return Ok(());
            }
            let link = checkpoint::link_of(&object).unwrap_or(0);
            match self.manifest(chain, &object).await? {
                Ok(time_ms) => {
                    whole.insert(link, time_ms);
                    self.renew(chain, &object).await?;
                }
                // Retention may have taken it away meanwhile.
                Err(_) if is_gone(chain, &object).await? => {}
                Err(why) => bad.push((object, link, why)),
            }
        }
        let none_listed = whole.is_empty() && bad.is_empty();
        for (object, link, what) in bad {
            let before = whole.range(..=link).next().is_some() || begins;
            let lost = (!before).then(|| {
                let until = whole.values().next().copied().unwrap_or(u64::MAX);
                (0, until)
            });
            self.scrubbed.unusable.push(object.to_string());
            self.scrubbed.damages.push(Damage {
                object: object.to_string(),
                what,
                lost,
            });
        }
        let oldest = whole.keys().next().copied();
        if known > 0 && none_listed && !begins {
            self.scrubbed.damages.push(Damage {
                object: checkpoints_dir(chain.group()).to_string(),
                what: "no checkpoint is there, and the log alone leads nowhere".into(),
                lost: Some((0, u64::MAX)),
            });
        }
        // What lies before the oldest checkpoint is of no use, and on its way out.
        let first = match first == 1 && !remnants {
            true => 1,
            false => oldest.unwrap_or(last),
        };
        let needed = self.scope.checkpoints.and_then(|n| {
            let mut newest = whole.keys().rev().take(n.max(1));
            newest.next_back().copied()
        });
        let first = first.max(needed.unwrap_or(0));
        self.links(chain, first, last, &whole).await
    }

    /// Whether the links before the first gap lie outside the window: only their locks have kept them.
    async fn are_remnants(&self, chain: &Chain, numbers: &[u64]) -> Result<bool, ChainError> {
        let gap = numbers.windows(2).find(|two| two[1] != two[0] + 1);
        let (Some(gap), Some(_)) = (gap, self.scope.locks) else {
            return Ok(false);
        };
        match chain.read(gap[0]).await {
            Ok(link) => Ok(link.header.written_ms < self.scope.since_ms),
            Err(ChainError::Missing(_) | ChainError::Refused { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The effective time of a checkpoint, or why it cannot be restored.
    async fn manifest(
        &mut self,
        chain: &Chain,
        object: &Path,
    ) -> Result<Result<u64, String>, ChainError> {
        let mut read = checkpoint::read(chain, object).await;
        if read.is_err() {
            read = checkpoint::read(chain, object).await;
        }
        let manifest = match read {
            Ok(manifest) => manifest,
            Err(ChainError::Refused { cause, .. }) if is_damage(&cause) => {
                return Ok(Err(cause.to_string()));
            }
            Err(ChainError::Missing(_)) => return Ok(Err("it is missing".into())),
            Err(e) => return Err(e),
        };
        self.pace(0).await;
        let mut why = None;
        // All of them: the next checkpoint must not refer to any that is damaged.
        for file in &manifest.files {
            let found = match self.files.get(&file.hash) {
                Some(found) => found.clone(),
                None => {
                    let found = read_file(chain, file).await?;
                    let object = file_path(chain.group().tenant, &file.hash);
                    match found {
                        Some(_) => self.scrubbed.damaged_files.push(object.to_string()),
                        None => self.renew(chain, &object).await?,
                    }
                    self.files.insert(file.hash.clone(), found.clone());
                    self.pace(file.length).await;
                    found
                }
            };
            why = why.or(found);
            if !(self.scope.go_on)() {
                break;
            }
        }
        Ok(why.map_or(Ok(manifest.time_ms), Err))
    }

    async fn links(
        &mut self,
        chain: &Chain,
        first: u64,
        last: u64,
        whole: &BTreeMap<u64, u64>,
    ) -> Result<(), ChainError> {
        let mut before: Option<Tail> = None;
        let mut since = 0;
        for number in first..=last {
            if !(self.scope.go_on)() {
                return Ok(());
            }
            let read = match read_link(chain, number, before.as_ref()).await? {
                Ok(link) => link,
                Err(what) => {
                    before = None;
                    // Retention may have taken it away meanwhile.
                    if chain.numbers(0).await?.first() > Some(&number) {
                        continue;
                    }
                    let next = whole.range(number..).next().map(|(_, ms)| *ms);
                    self.scrubbed.damages.push(Damage {
                        object: link_path(chain.group(), number).to_string(),
                        what,
                        lost: Some((since, next.unwrap_or(u64::MAX))),
                    });
                    continue;
                }
            };
            let bytes: usize = read.entries.iter().map(|entry| entry.len()).sum();
            self.pace(bytes as u64).await;
            // What the window has left behind goes once its lock has lapsed.
            let in_window = read.header.written_ms >= self.scope.since_ms;
            let is_behind = match whole.keys().next() {
                Some(oldest) => number >= *oldest,
                None => chain.group().incarnation == self.newest,
            };
            if is_behind || in_window || number == last {
                self.renew(chain, &link_path(chain.group(), number)).await?;
            }
            since = read.header.state.as_ref().map_or(since, |s| s.time_ms);
            before = Some(Tail::from(&read));
        }
        Ok(())
    }
}

/// What authenticates and cannot be read is of another version, not damaged.
fn is_damage(cause: &LinkError) -> bool {
    !matches!(cause, LinkError::Format(_) | LinkError::Malformed(_))
}

async fn is_gone(chain: &Chain, object: &Path) -> Result<bool, ChainError> {
    match chain.bucket().head(object).await {
        Ok(_) => Ok(false),
        Err(object_store::Error::NotFound { .. }) => Ok(true),
        Err(cause) => Err(ChainError::Store {
            object: object.to_string(),
            cause,
        }),
    }
}

/// A link that authenticates and follows the one before it, or why not.
async fn read_link(
    chain: &Chain,
    number: u64,
    before: Option<&Tail>,
) -> Result<Result<Link, String>, ChainError> {
    let mut why = String::new();
    for _ in 0..2 {
        why = match chain.read(number).await {
            Ok(link) => match before.map(|before| chain.check_follows(before, &link)) {
                Some(Err(e)) => e.to_string(),
                _ => return Ok(Ok(link)),
            },
            Err(ChainError::Missing(_)) => "it is missing".into(),
            Err(ChainError::Refused { cause, .. }) if is_damage(&cause) => cause.to_string(),
            Err(e) => return Err(e),
        };
    }
    Ok(Err(why))
}
