//! Restore: a checkpoint and a log tail, from the bucket, through the ordinary apply.
//!
//! Invariants. The old chain is closed before anything is served, so that whatever still runs of
//! the old region stops. Every object is authenticated or hashed before it is used, and a missing
//! or damaged one is refused by name. The digest after replay, counted anew from every row, must
//! be the one that the chain carries at its end; where it carries none (the end lies inside a batch, or
//! the tenant was sealed), the running one. The new incarnation's revision lies 10^9 above every one that clients
//! have seen, and what was below is compacted. A restore to an earlier moment ends exactly there:
//! nothing of what came after is applied.

mod copy;
mod fetch;
pub mod plan;
mod replay;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kms::TenantKeys;
use thiserror::Error;

use crate::archive::chain::{Chain, ChainError, Created, Tail};
use crate::archive::link::{Base, Closed, Header, Link, LinkState, Origin};
use crate::engine::{Budget, EngineError};
use crate::group::founding::Founder;
use crate::group::replica::sync_dir;
use crate::machine::{MachineError, State, Store};
use crate::mvcc::digest::Digest;
use crate::{GroupId, Position};

pub use copy::begin_chain;
pub use plan::{Plan, Point};
pub use replay::{Rebuilt, replay};

/// Added to the revision at every restore: revisions that clients have seen are not given again.
pub const REVISION_JUMP: i64 = 1_000_000_000;

#[derive(Debug, Error)]
pub enum RestoreError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("object {object}: {what}")]
    Object { object: String, what: String },
    /// A file of the checkpoint that was planned is missing or damaged.
    #[error("object {object}: {what}")]
    File { object: String, what: String },
    #[error(
        "the chain ends at link {found} of incarnation {incarnation}, but the directory knows of link {known}: the bucket is older than what was acknowledged"
    )]
    Older {
        incarnation: u32,
        found: u64,
        known: u64,
    },
    #[error(
        "object {object}: entries {from} to {to} before it are in no link: they were purged before they were archived, and no moment between can be restored"
    )]
    Gap { object: String, from: u64, to: u64 },
    #[error("object {object}: the state after it is at {found}, it says {wanted}")]
    Position {
        object: String,
        found: String,
        wanted: String,
    },
    #[error("nothing of group {0} is in the bucket")]
    Nothing(GroupId),
    #[error(
        "the digest after replay is {found}, the chain says {wanted}: the restored state is not the archived one"
    )]
    Digest { found: Digest, wanted: Digest },
    #[error(
        "revision {wanted} was never reached: the history of incarnation {incarnation} ends at revision {last}"
    )]
    NotReached {
        wanted: i64,
        incarnation: u32,
        last: i64,
    },
    #[error("the moment lies before what is kept: the archive begins at {0}")]
    NotKept(String),
    #[error("it was stopped")]
    Stopped,
    #[error("another restore took this tenant over as incarnation {0}")]
    Lost(u32),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{path}: {cause}")]
    Io { path: String, cause: std::io::Error },
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> RestoreError + '_ {
    move |cause| RestoreError::Io {
        path: path.display().to_string(),
        cause,
    }
}

/// How far a restore has come; sent as it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Fetched {
        bytes: u64,
        total: u64,
    },
    Replayed {
        links: u64,
        total: u64,
    },
    /// A row was counted.
    Counting,
    Verified,
}

/// Answers whether to go on.
pub type Report = Arc<dyn Fn(Progress) -> bool + Send + Sync>;

/// A restored tenant, as a checkpoint to found its group from.
pub struct Restored {
    /// The group of the new incarnation.
    pub group: GroupId,
    pub checkpoint: PathBuf,
    pub position: Position,
    pub state: State,
}

impl Restored {
    /// What `store` holds, at `state`, as the beginning of `group`; its files go to `checkpoint`, which must
    /// not exist.
    fn of(
        group: GroupId,
        store: &Store,
        mut state: State,
        founder: &Founder,
        checkpoint: PathBuf,
    ) -> Result<Self, RestoreError> {
        let position = *state.applied.get_or_insert_default();
        store.set_state(state.clone())?;
        store.set_membership(&founder.membership(position))?;
        store.engine()?.checkpoint(&checkpoint)?;
        sync_dir(&checkpoint).map_err(io(&checkpoint))?;
        Ok(Restored {
            group,
            checkpoint,
            position,
            state,
        })
    }
}

/// A chain that was closed for a restore.
pub struct Closing {
    /// The group of the incarnation that goes on after it.
    pub group: GroupId,
    /// The closing link.
    pub number: u64,
    /// What an old leader added meanwhile.
    pub added: Vec<Link>,
    /// The newest revision that the chain says of itself.
    pub revision: i64,
}

/// Closes a chain behind `tail`, so that no further link can be made.
pub async fn close(chain: &Chain, mut tail: Tail, restore: &str) -> Result<Closing, RestoreError> {
    let mut closing = Closing {
        group: chain.group().next(),
        number: 0,
        added: Vec::new(),
        revision: 0,
    };
    // Of a chain that ends with links without a state, the last one before them says it.
    let mut said = tail.header.clone();
    while let Some(header) = said.take_if(|h| h.state.is_none() && h.number > 1) {
        said = match chain.read(header.number - 1).await {
            Ok(link) => Some(link.header),
            // The archive begins there.
            Err(ChainError::Missing(_)) => None,
            Err(e) => return Err(e.into()),
        };
    }
    closing.revision = said.and_then(|h| h.state).map_or(0, |s| s.revision);
    loop {
        let state = tail.header.as_ref().and_then(|h| h.state.clone());
        closing.revision = state
            .as_ref()
            .map_or(0, |s| s.revision)
            .max(closing.revision);
        closing.number = tail.number;
        // Another restore that came no further may be dead: whoever opens the next chain wins.
        if let Some(closed) = tail.closed() {
            closing.group.incarnation = closed.incarnation;
            return Ok(closing);
        }
        let header = Header {
            group: chain.group(),
            number: 0,
            previous: String::new(),
            term: tail.header.as_ref().map_or(0, |h| h.term),
            writer: restore.to_string(),
            last: tail.header.as_ref().and_then(|h| h.last),
            entries: 0,
            state,
            written_ms: 0,
            closed: Some(Closed {
                incarnation: closing.group.incarnation,
                restore: restore.to_string(),
            }),
            base: None,
        };
        match chain.create(&tail, header, &[]).await? {
            Created::Ours(closed) => tail = *closed,
            Created::Theirs(link) => {
                chain.check_follows(&tail, &link)?;
                tail = Tail::from(&*link);
                closing.added.push(*link);
            }
        }
    }
}

/// Fetches, replays and verifies `plan` in `dir`, which is emptied first.
pub async fn rebuild(
    chain: &Chain,
    plan: &Plan,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
    report: Report,
) -> Result<Rebuilt, RestoreError> {
    fetch(chain, plan, dir, report.clone()).await?;
    replay(plan, keys, budget, dir, report)
}

/// The first half of `rebuild`: network and disk.
pub async fn fetch(
    chain: &Chain,
    plan: &Plan,
    dir: &Path,
    report: Report,
) -> Result<(), RestoreError> {
    let _ = tokio::fs::remove_dir_all(dir).await;
    tokio::fs::create_dir_all(dir).await.map_err(io(dir))?;
    match plan.first_manifest() {
        Some(manifest) => fetch::checkpoint(chain, manifest, &dir.join("engine"), report).await,
        None => Ok(()),
    }
}

/// The first link of a new incarnation: it says where the old one ended, or what was gone back to.
pub fn base(plan: &Plan, rebuilt: &Rebuilt, closing: &Closing, at_ms: u64) -> Base {
    let closed = closing.group.incarnation - 1;
    let origin = Origin {
        incarnation: plan.group.incarnation,
        revision: rebuilt.cut,
        at_ms,
    };
    let beyond = rebuilt.state.revision.max(closing.revision);
    Base {
        incarnation: closed,
        link: closing.number,
        position: rebuilt.state.applied.unwrap_or_default(),
        revision: beyond + REVISION_JUMP,
        origin: (!plan.is_newest()).then_some(origin),
    }
}

fn first_link(restored: &Restored, base: Option<Base>, restore: &str) -> Header {
    Header {
        group: restored.group,
        number: 0,
        previous: String::new(),
        term: restored.position.term,
        writer: restore.to_string(),
        last: Some(restored.position),
        entries: 0,
        state: Some(LinkState::from(&restored.state)),
        written_ms: 0,
        closed: None,
        base,
    }
}

/// Opens the new incarnation's chain, exclusively: of two restores one wins here at the latest. Answers
/// its first link.
pub async fn open_chain(
    chain: &Chain,
    restored: &Restored,
    base: Base,
    restore: &str,
) -> Result<Tail, RestoreError> {
    let header = first_link(restored, Some(base), restore);
    match chain.create(&Tail::default(), header, &[]).await? {
        Created::Ours(tail) => Ok(*tail),
        Created::Theirs(link) if link.header.writer == restore => Ok(Tail::from(&*link)),
        Created::Theirs(_) => Err(RestoreError::Lost(restored.group.incarnation)),
    }
}
