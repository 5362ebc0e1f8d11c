//! What a restore will read: the newest usable checkpoint and every link behind it.

use futures::{StreamExt, TryStreamExt};

use super::RestoreError;
use crate::archive::bucket::link_path;
use crate::archive::chain::{Chain, ChainError, Tail};
use crate::archive::checkpoint::{self, Manifest};
use crate::archive::link::{Base, Header, Link, LinkState};
use crate::{GroupId, Position};

const IN_FLIGHT: usize = 8;

/// The plan of one incarnation. A newer incarnation without a checkpoint of its own begins where
/// the one before it ended.
pub struct Plan {
    pub group: GroupId,
    pub manifest: Option<Manifest>,
    pub before: Option<Box<Plan>>,
    pub base: Option<Base>,
    pub links: Vec<Link>,
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

    pub fn push(&mut self, link: Link) {
        self.links.push(link);
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

/// Plans a restore of `chain`'s group to its newest state. `known`: the newest link that the
/// directory has a record of.
pub async fn newest(chain: &Chain, known: u64) -> Result<Plan, RestoreError> {
    let group = chain.group();
    let all = chain.numbers(0).await?;
    let Some(last) = all.last().copied() else {
        return Err(RestoreError::Nothing(group));
    };
    if last < known {
        return Err(RestoreError::Older {
            incarnation: group.incarnation,
            found: last,
            known,
        });
    }
    // The newest manifest that reads is the base; an older one serves when it does not. Of two at
    // one link the one that stands further on counts: it may bridge a gap.
    let mut manifest: Option<Manifest> = None;
    let mut refused = None;
    for path in checkpoint::list(chain.bucket(), group).await? {
        if let Some(found) = &manifest
            && checkpoint::link_of(&path) != Some(found.link)
        {
            break;
        }
        match checkpoint::read(chain, &path).await {
            Ok(found) => {
                // One that came late can be under a key that was destroyed since.
                let rank = |m: &Manifest| (m.position.index, m.oldest);
                let further = |m: &Manifest| rank(m) < rank(&found);
                if manifest.as_ref().is_none_or(further) {
                    manifest = Some(found);
                }
            }
            Err(e @ ChainError::Refused { .. }) => {
                tracing::error!(error = %e, "a checkpoint's manifest is refused; an older one is used");
                refused.get_or_insert(e);
            }
            Err(e) => return Err(e.into()),
        }
    }
    if let (None, Some(refused)) = (&manifest, refused)
        && all.first() != Some(&1)
    {
        // The archive begins at it.
        return Err(refused.into());
    }
    behind(chain, manifest, last).await
}

/// Plans a restore from a checkpoint to the newest state behind it.
pub async fn from(chain: &Chain, manifest: Manifest) -> Result<Plan, RestoreError> {
    let last = chain.numbers(manifest.link).await?.last().copied();
    let last = last.unwrap_or(manifest.link);
    behind(chain, Some(manifest), last).await
}

/// What the link that a manifest names says. It is not needed to restore: without it less is compared.
async fn covered(chain: &Chain, manifest: &Manifest) -> Option<Header> {
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

/// A plan of `manifest` and every link behind it up to `last`.
async fn behind(
    chain: &Chain,
    manifest: Option<Manifest>,
    last: u64,
) -> Result<Plan, RestoreError> {
    let group = chain.group();
    let from = manifest.as_ref().map_or(0, |m| m.link);
    let start = match &manifest {
        Some(m) => Tail {
            number: m.link,
            hash: m.link_hash.clone(),
            header: covered(chain, m).await,
        },
        None => Tail::default(),
    };
    // Every number must be there: a gap is a missing object, and is named.
    let reads: Vec<_> = (from + 1..=last).map(|number| chain.read(number)).collect();
    let links: Vec<Link> = futures::stream::iter(reads)
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    let mut before = start.clone();
    for link in &links {
        chain.check_follows(&before, link)?;
        before = Tail::from(link);
    }
    let mut plan = Plan {
        group,
        base: links.first().and_then(|l| l.header.base.clone()),
        manifest,
        before: None,
        links,
        start,
    };
    if plan.manifest.is_none()
        && let Some(base) = plan.base.clone()
    {
        let older = GroupId {
            incarnation: base.incarnation,
            ..group
        };
        let chain = Chain::new(chain.bucket().clone(), chain.key().clone(), older);
        let older_plan = Box::pin(newest(&chain, base.link)).await?;
        if older_plan.tail().closed().map(|c| c.incarnation) != Some(group.incarnation) {
            return Err(RestoreError::Object {
                object: link_path(older, base.link).to_string(),
                what: format!(
                    "it does not close the chain for incarnation {}",
                    group.incarnation
                ),
            });
        }
        plan.before = Some(Box::new(older_plan));
    }
    Ok(plan)
}
