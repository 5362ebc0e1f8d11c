//! What a restore will read: the newest usable checkpoint before the moment that it comes to, and
//! every link from there to it.

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;

use super::RestoreError;
use crate::archive::bucket::link_path;
use crate::archive::chain::{Chain, ChainError, End, Tail};
use crate::archive::checkpoint::{self, Manifest};
use crate::archive::link::{Base, Header, Link, LinkState};
use crate::clock::utc;
use crate::machine::Until;
use crate::{GroupId, Position};

const IN_FLIGHT: usize = 8;

/// A moment in a tenant's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    Newest,
    /// Milliseconds since 1970.
    Time(u64),
    Revision(i64),
}

/// The plan of one incarnation. A newer incarnation without a checkpoint of its own begins where
/// the one before it ended.
pub struct Plan {
    pub group: GroupId,
    pub manifest: Option<Manifest>,
    pub before: Option<Box<Plan>>,
    pub base: Option<Base>,
    pub links: Vec<Link>,
    /// Nothing behind it is applied.
    pub until: Until,
    /// The link that the first of `links` must follow.
    start: Tail,
}

impl Plan {
    pub fn tail(&self) -> Tail {
        self.links
            .last()
            .map_or_else(|| self.start.clone(), Tail::from)
    }

    /// What the chain says of the state at its end, if it says so of just that position.
    pub fn end(&self, position: Option<Position>) -> Option<&LinkState> {
        let headers = self.links.iter().rev().map(|l| &l.header);
        let headers = headers.chain(self.start.header.as_ref());
        let mut at = headers.filter(|header| position.is_some() && header.last == position);
        at.find_map(|header| header.state.as_ref())
    }

    /// Whether it comes to the newest state that there is.
    pub fn is_newest(&self) -> bool {
        self.until == Until::End
    }

    /// The checkpoint that everything begins with, also of an incarnation before.
    pub fn first_manifest(&self) -> Option<&Manifest> {
        let own = self.manifest.as_ref();
        own.or_else(|| self.before.as_ref()?.first_manifest())
    }

    /// Bytes of the entries that are replayed.
    pub fn log_bytes(&self) -> u64 {
        let entries = self.links.iter().flat_map(|link| &link.entries);
        let own: u64 = entries.map(|entry| entry.len() as u64).sum();
        own + self.before.as_ref().map_or(0, |b| b.log_bytes())
    }

    /// Bytes of the checkpoint's files.
    pub fn checkpoint_bytes(&self) -> u64 {
        let files = self.first_manifest().into_iter().flat_map(|m| &m.files);
        files.map(|file| file.length).sum()
    }

    /// Links of this plan and those before it.
    pub fn total_links(&self) -> u64 {
        self.links.len() as u64 + self.before.as_ref().map_or(0, |b| b.total_links())
    }

    /// When the newest archived write was made, milliseconds since 1970.
    pub fn newest_ms(&self) -> u64 {
        let headers = self.links.iter().rev().map(|l| &l.header);
        let mut headers = headers.chain(self.start.header.as_ref());
        let own = headers.find_map(|header| header.state.as_ref().map(|s| s.time_ms));
        own.or_else(|| self.before.as_ref().map(|b| b.newest_ms()))
            .unwrap_or(0)
    }
}

/// Plans a restore of `chain`'s group to its newest state.
pub async fn newest(chain: &Chain) -> Result<Plan, RestoreError> {
    to_newest(chain, &chain.end().await?, &[]).await
}

async fn to_newest(chain: &Chain, end: &End, unusable: &[Manifest]) -> Result<Plan, RestoreError> {
    let found = checkpoint_before(chain, &end.manifests, Until::End, unusable);
    let (manifest, refused) = found.await?;
    // Links before it are not listed: a long window has very many.
    let last = match end.tail.number {
        0 => chain.numbers(0).await?.last().copied(),
        number => Some(number),
    };
    let Some(last) = last else {
        return Err(RestoreError::Nothing(chain.group()));
    };
    if let (None, Some(refused)) = (&manifest, refused)
        && chain.numbers(0).await?.first() != Some(&1)
    {
        // The archive begins at it.
        return Err(refused.into());
    }
    behind(chain, manifest, last, Until::End, unusable, &end.tail).await
}

/// Plans a restore to `point`; `chain` is the newest one, on which the tenant is now, or was last, and
/// `end` is how it ends.
pub async fn at(chain: &Chain, end: &End, point: Point) -> Result<Plan, RestoreError> {
    without(chain, end, point, &[]).await
}

/// Plans a restore to `point` that begins with none of the `unusable` checkpoints.
pub async fn without(
    chain: &Chain,
    end: &End,
    point: Point,
    unusable: &[Manifest],
) -> Result<Plan, RestoreError> {
    let until = match point {
        Point::Newest => return to_newest(chain, end, unusable).await,
        Point::Time(ms) => Until::Time(ms),
        Point::Revision(revision) => Until::Revision(revision),
    };
    let (mut chain, mut manifests) = (chain.clone(), end.manifests.clone());
    loop {
        let all = chain.numbers(0).await?;
        let (Some(first), Some(last)) = (all.first(), all.last().copied()) else {
            return Err(RestoreError::Nothing(chain.group()));
        };
        let found = checkpoint_before(&chain, &manifests, until, unusable);
        let (manifest, refused) = found.await?;
        if manifest.is_some() {
            return behind(&chain, manifest, last, until, unusable, &end.tail).await;
        }
        if *first != 1 {
            return Err(match refused {
                Some(refused) => refused.into(),
                None => RestoreError::NotKept(oldest(&chain).await?),
            });
        }
        let opening = chain.read(1).await?.header;
        let is_behind = lies_behind(opening.state.as_ref(), until);
        // It began as a copy of another tenant.
        if opening.is_gap() && is_behind {
            return Err(RestoreError::NotKept(oldest(&chain).await?));
        }
        match opening.base {
            // Where this incarnation begins lies behind it: it is of one before.
            Some(base) if is_behind => {
                chain = chain.of(base.incarnation);
                manifests = checkpoint::list(chain.bucket(), chain.group()).await?;
            }
            _ => return behind(&chain, None, last, until, unusable, &end.tail).await,
        }
    }
}

/// Whether a state lies behind `until`; unknown ones do not.
fn lies_behind(state: Option<&LinkState>, until: Until) -> bool {
    state.is_some_and(|state| match until {
        Until::Time(ms) => state.time_ms > ms,
        Until::Revision(revision) => state.revision > revision,
        Until::End | Until::Entry { .. } => false,
    })
}

/// Where the oldest checkpoint of a chain stands, in words.
async fn oldest(chain: &Chain) -> Result<String, ChainError> {
    let manifests = checkpoint::list(chain.bucket(), chain.group()).await?;
    Ok(match manifests.last() {
        Some(object) => {
            let manifest = checkpoint::read(chain, object).await?;
            format!("revision {}, {}", manifest.revision, utc(manifest.time_ms))
        }
        None => format!("the end of incarnation {}", chain.group().incarnation),
    })
}

/// Whether a checkpoint can be the base of what comes to `until`.
fn serves(manifest: &Manifest, until: Until) -> bool {
    match until {
        Until::End => true,
        Until::Time(ms) => manifest.time_ms != 0 && manifest.time_ms <= ms,
        Until::Revision(revision) => manifest.revision <= revision,
        Until::Entry { index, revision } => {
            let last = index - u64::from(revision.is_some() && index > 0);
            manifest.position.index <= last
        }
    }
}

/// The newest manifest that reads and does not lie behind `until`; an older one serves where it does
/// not. Of two at one link the one that stands further on counts: it may bridge a gap. Also
/// answers why one was refused.
async fn checkpoint_before(
    chain: &Chain,
    manifests: &[Path],
    until: Until,
    unusable: &[Manifest],
) -> Result<(Option<Manifest>, Option<ChainError>), ChainError> {
    let mut newest: Option<Manifest> = None;
    let mut refused = None;
    for path in manifests {
        if let Some(found) = &newest
            && checkpoint::link_of(path) != Some(found.link)
        {
            break;
        }
        match checkpoint::read(chain, path).await {
            Ok(found) if serves(&found, until) && !unusable.contains(&found) => {
                // One that came late can be under a key that was destroyed since.
                let rank = |m: &Manifest| (m.position.index, m.oldest);
                let further = |m: &Manifest| rank(m) < rank(&found);
                if newest.as_ref().is_none_or(further) {
                    newest = Some(found);
                }
            }
            // Or retention took it away meanwhile.
            Ok(_) | Err(ChainError::Missing(_)) => {}
            Err(e @ ChainError::Refused { .. }) => {
                tracing::error!(error = %e, "a checkpoint's manifest is refused; an older one is used");
                refused.get_or_insert(e);
            }
            Err(e) => return Err(e),
        }
    }
    Ok((newest, refused))
}

/// Plans a restore from a checkpoint to the newest state behind it.
pub async fn from(chain: &Chain, manifest: Manifest) -> Result<Plan, RestoreError> {
    let last = chain.numbers(manifest.link).await?.last().copied();
    let last = last.unwrap_or(manifest.link);
    let newest = Tail::default();
    behind(chain, Some(manifest), last, Until::End, &[], &newest).await
}

/// What the link that a manifest names says, which may be the newest. It is not needed to restore: without it
/// less is compared.
async fn covered(chain: &Chain, manifest: &Manifest, newest: &Tail) -> Option<Header> {
    if newest.hash == manifest.link_hash {
        return newest.header.clone();
    }
    match manifest.link > 0 {
        true => match chain.read(manifest.link).await {
            Ok(link) if link.hash == manifest.link_hash => Some(link.header),
            Ok(_) => {
                tracing::error!(
                    link = manifest.link,
                    "ALARM: the link that a checkpoint names is another one"
                );
                None
            }
            Err(e) => {
                tracing::error!(error = %e, "the link that a checkpoint names cannot be read");
                None
            }
        },
        false => None,
    }
}

/// Whether a link is the last one that is needed.
fn reaches(header: &Header, until: Until) -> bool {
    match until {
        Until::End => false,
        Until::Time(ms) => header.state.as_ref().is_some_and(|s| s.time_ms > ms),
        Until::Revision(revision) => {
            let state = header.state.as_ref();
            state.is_some_and(|s| s.revision >= revision)
        }
        Until::Entry { index, .. } => header.last.is_some_and(|last| last.index >= index),
    }
}

/// A plan of `manifest` and every link behind it up to `last`, as far as `until` needs them.
async fn behind(
    chain: &Chain,
    manifest: Option<Manifest>,
    last: u64,
    until: Until,
    unusable: &[Manifest],
    newest: &Tail,
) -> Result<Plan, RestoreError> {
    let from = manifest.as_ref().map_or(0, |m| m.link);
    let start = match &manifest {
        Some(m) => Tail {
            number: m.link,
            hash: m.link_hash.clone(),
            header: covered(chain, m, newest).await,
        },
        None => Tail::default(),
    };
    // Every number must be there: a gap is a missing object, and is named.
    let reads = futures::stream::iter(from + 1..=last).map(|number| chain.read(number));
    let mut reads = std::pin::pin!(reads.buffered(IN_FLIGHT));
    let mut links: Vec<Link> = Vec::new();
    let mut before = start.clone();
    while let Some(link) = reads.try_next().await? {
        chain.check_follows(&before, &link)?;
        before = Tail::from(&link);
        let reached = reaches(&link.header, until);
        links.push(link);
        if reached {
            break;
        }
    }
    let base = links.first().and_then(|l| l.header.base.clone());
    let before = match &base {
        Some(base) if manifest.is_none() => Some(Box::new(beginning(chain, base, unusable).await?)),
        _ => None,
    };
    Ok(Plan {
        group: chain.group(),
        base,
        manifest,
        before,
        links,
        until,
        start,
    })
}

/// A plan of the state that an incarnation began with, in one before it.
async fn beginning(
    chain: &Chain,
    base: &Base,
    unusable: &[Manifest],
) -> Result<Plan, RestoreError> {
    let closed = chain.of(base.incarnation);
    // Up to there and no further: a late checkpoint of its old leader can stand beyond it.
    let until = Until::Entry {
        index: base.position.index,
        revision: base.origin.as_ref().and_then(|origin| origin.revision),
    };
    let origin = base.origin.as_ref().map(|origin| origin.incarnation);
    let from = chain.of(origin.unwrap_or(base.incarnation));
    let last = from.numbers(0).await?.last().copied().unwrap_or(0);
    let manifests = checkpoint::list(from.bucket(), from.group()).await?;
    let found = checkpoint_before(&from, &manifests, until, unusable);
    let (manifest, refused) = found.await?;
    let plan = match (
        Box::pin(behind(
            &from,
            manifest,
            last,
            until,
            unusable,
            &Tail::default(),
        ))
        .await,
        refused,
    ) {
        // What is missing was before a checkpoint that cannot be used.
        (Err(RestoreError::Chain(ChainError::Missing(_))), Some(refused)) => {
            return Err(refused.into());
        }
        (planned, _) => planned?,
    };
    let closing = closed.read(base.link).await?.header.closed;
    match closing.map(|c| c.incarnation) == Some(chain.group().incarnation) {
        true => Ok(plan),
        false => Err(RestoreError::Object {
            object: link_path(closed.group(), base.link).to_string(),
            what: format!(
                "it does not close the chain for incarnation {}",
                chain.group().incarnation
            ),
        }),
    }
}
