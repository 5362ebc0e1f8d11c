//! Restore: a checkpoint and a log tail, from the bucket, through the ordinary apply.
//!
//! Invariants. The old chain is closed before anything is served, so that whatever still runs of
//! the old region stops. Every object is authenticated or hashed before it is used, and a missing
//! or damaged one is refused by name. The digest after replay, counted anew from every row, must
//! be the one that the chain carries at its end; where it carries none (the end lies inside a batch, or
//! the tenant was sealed), the running one. The new incarnation's revision lies 10^9 higher, and what
//! was below is compacted.

mod fetch;
pub mod plan;
mod replay;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kms::TenantKeys;
use thiserror::Error;

use crate::archive::chain::{Chain, ChainError, Created, Tail};
use crate::archive::link::{Base, Closed, Header, LinkState};
use crate::engine::{Budget, EngineError};
use crate::machine::{MachineError, State};
use crate::mvcc::digest::Digest;
use crate::{GroupId, Position};

pub use plan::Plan;

/// Added to the revision at every restore: revisions that clients have seen are not given again.
pub const REVISION_JUMP: i64 = 1_000_000_000;

#[derive(Debug, Error)]
pub enum RestoreError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("object {object}: {what}")]
    Object { object: String, what: String },
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

/// Closes the chain of `plan`, so that no further link can be made, and takes in what an old
/// leader added meanwhile. Answers the group that goes on after it.
pub async fn close(chain: &Chain, plan: &mut Plan, restore: &str) -> Result<GroupId, RestoreError> {
    let next = plan.group.incarnation + 1;
    loop {
        let tail = plan.tail();
        // Another restore that came no further may be dead: whoever opens the next chain wins.
        if let Some(closed) = tail.closed() {
            return Ok(GroupId {
                incarnation: closed.incarnation,
                ..plan.group
            });
        }
        let header = Header {
            group: plan.group,
            number: 0,
            previous: String::new(),
            term: tail.header.as_ref().map_or(0, |h| h.term),
            writer: restore.to_string(),
            last: tail.header.as_ref().and_then(|h| h.last),
            entries: 0,
            state: tail.header.as_ref().and_then(|h| h.state.clone()),
            written_ms: 0,
            closed: Some(Closed {
                incarnation: next,
                restore: restore.to_string(),
            }),
            base: None,
        };
        match chain.create(&tail, header, &[]).await? {
            Created::Ours(_) => {
                return Ok(GroupId {
                    incarnation: next,
                    ..plan.group
                });
            }
            Created::Theirs(link) => {
                chain.check_follows(&tail, &link)?;
                plan.push(*link);
            }
        }
    }
}

/// Fetches, replays and verifies `plan` into `dir`, which is emptied first; ends as a checkpoint of
/// incarnation `group`.
pub async fn rebuild(
    chain: &Chain,
    plan: &Plan,
    group: GroupId,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
    report: Report,
) -> Result<Restored, RestoreError> {
    let _ = tokio::fs::remove_dir_all(dir).await;
    tokio::fs::create_dir_all(dir).await.map_err(io(dir))?;
    let engine_dir = dir.join("engine");
    if let Some(manifest) = &plan.manifest {
        fetch::checkpoint(chain, manifest, &engine_dir, report.clone()).await?;
    }
    replay::run(plan, group, keys, budget, dir, report)
}

/// The first link of a new incarnation: it says where the old one ended.
pub fn base(plan: &Plan, restored: &Restored, closing: u64) -> Base {
    Base {
        incarnation: plan.group.incarnation,
        link: closing,
        position: restored.position,
        revision: restored.state.revision,
    }
}

/// Opens the new incarnation's chain, exclusively: of two restores one wins here at the latest.
pub async fn open_chain(
    chain: &Chain,
    restored: &Restored,
    base: Base,
    restore: &str,
) -> Result<(), RestoreError> {
    let header = Header {
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
        base: Some(base),
    };
    match chain.create(&Tail::default(), header, &[]).await? {
        Created::Ours(_) => Ok(()),
        Created::Theirs(link) if link.header.writer == restore => Ok(()),
        Created::Theirs(_) => Err(RestoreError::Lost(restored.group.incarnation)),
    }
}
