//! Replaying links through the ordinary apply, and proving the result.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kms::TenantKeys;

use super::plan::Plan;
use super::{Progress, Report, RestoreError, Restored};
use crate::archive::bucket::link_path;
use crate::archive::link::{Base, Link};
use crate::engine::{Budget, Engine};
use crate::group::founding::Founder;
use crate::group::types::{decode_entry, machine_entry};
use crate::machine::{Applied, Machine, State, Store, Until};
use crate::mvcc::digest::Hasher;
use crate::{GroupId, Position};

/// A state that was restored and verified, before it becomes an incarnation of its own.
pub struct Rebuilt {
    store: Arc<Store>,
    dir: PathBuf,
    pub state: State,
    /// The revision within the last entry at which it ends, if not at that entry's end.
    pub cut: Option<i64>,
    /// Something behind it was met.
    pub ended: bool,
}

/// The second half of `rebuild`, which takes a core: replays `plan` on the engine in `dir/engine`, and
/// verifies it.
pub fn replay(
    plan: &Plan,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
    report: Report,
) -> Result<Rebuilt, RestoreError> {
    // Blocking work of seconds: replay is CPU and disk.
    tokio::task::block_in_place(|| {
        let engine = Engine::open(&dir.join("engine"), keys.clone(), &budget)?;
        let store = Arc::new(Store::open(engine)?);
        check_manifest(plan, &store.state())?;
        let mut done = 0;
        let links = plan.total_links();
        let (is_cut, ended) = apply_links(plan, &store, &keys, &report, &mut done, links)?;
        verify(plan, &store, &keys, is_cut, &report)?;
        report(Progress::Verified);
        let state = store.state();
        Ok(Rebuilt {
            store,
            dir: dir.to_path_buf(),
            cut: is_cut.then_some(state.revision),
            ended,
            state,
        })
    })
}

impl Rebuilt {
    /// What can be read of it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Makes it incarnation `group` of `founder`, which begins at `base`.
    pub fn finish(
        self,
        group: GroupId,
        base: &Base,
        founder: &Founder,
    ) -> Result<Restored, RestoreError> {
        tokio::task::block_in_place(|| {
            jump(&self.store, base)?;
            let state = self.store.state();
            let checkpoint = self.dir.join("checkpoint");
            Restored::of(group, &self.store, state, founder, checkpoint)
        })
    }
}

/// The files of a checkpoint must stand where its manifest says.
fn check_manifest(plan: &Plan, state: &State) -> Result<(), RestoreError> {
    let Some(manifest) = plan.first_manifest() else {
        return Ok(());
    };
    let stands = (state.applied, state.revision, state.digests);
    match stands == (Some(manifest.position), manifest.revision, manifest.digests) {
        true => Ok(()),
        false => Err(RestoreError::Position {
            object: format!("the checkpoint at link {}", manifest.link),
            found: at(state.applied),
            wanted: manifest.position.to_string(),
        }),
    }
}

fn at(position: Option<Position>) -> String {
    position.map_or_else(|| "the beginning".into(), |at| at.to_string())
}

/// Answers whether it ends within an entry, and whether something behind the end was met.
fn apply_links(
    plan: &Plan,
    store: &Arc<Store>,
    keys: &Arc<TenantKeys>,
    report: &Report,
    done: &mut u64,
    total: u64,
) -> Result<(bool, bool), RestoreError> {
    if let (Some(before), Some(base)) = (&plan.before, &plan.base) {
        apply_links(before, store, keys, report, done, total)?;
        let found = store.state().applied;
        if found != Some(base.position) {
            return Err(RestoreError::Position {
                object: link_path(plan.group, 1).to_string(),
                found: at(found),
                wanted: base.position.to_string(),
            });
        }
        jump(store, base)?;
    }
    let machine = Machine::new(store.clone(), keys.clone(), plan.group);
    let (mut is_cut, mut ended) = (false, false);
    for link in &plan.links {
        let applied = apply_link(plan, link, &machine, store)?;
        *done += 1;
        let links = *done;
        if !report(Progress::Replayed { links, total }) {
            return Err(RestoreError::Stopped);
        }
        (is_cut, ended) = (applied.is_cut, applied.ended);
        if ended {
            break;
        }
    }
    let state = store.state();
    let last = state.revision;
    match plan.until {
        Until::Revision(wanted) if last < wanted => Err(RestoreError::NotReached {
            wanted,
            incarnation: plan.group.incarnation,
            last,
        }),
        Until::Entry { index, .. } if state.applied.is_none_or(|at| at.index != index) => {
            Err(RestoreError::Position {
                object: format!("the chain of group {}", plan.group),
                found: at(state.applied),
                wanted: format!("index {index}"),
            })
        }
        _ => Ok((is_cut, ended)),
    }
}

fn apply_link(
    plan: &Plan,
    link: &Link,
    machine: &Machine,
    store: &Store,
) -> Result<Applied, RestoreError> {
    let object = || link_path(plan.group, link.header.number).to_string();
    if let Until::Revision(last) = plan.until
        && store.state().revision >= last
    {
        return Ok(Applied {
            ended: true,
            ..Applied::default()
        });
    }
    let applied = store.state().applied;
    let mut entries = Vec::with_capacity(link.entries.len());
    for bytes in &link.entries {
        let entry = decode_entry(bytes).ok_or_else(|| RestoreError::Object {
            object: object(),
            what: "an entry does not parse".into(),
        })?;
        let entry = machine_entry(entry);
        // The checkpoint may hold the first ones already.
        if applied.is_none_or(|at| entry.position.index > at.index) {
            entries.push(entry);
        }
    }
    let next = applied.map_or(0, |at| at.index + 1);
    let first = entries.first().map(|entry| entry.position.index);
    // A link without entries either repeats where the one before it ended, or stands for a gap.
    let first = first.or(link.header.last.map(|at| at.index + 1));
    if let Some(first) = first.filter(|first| *first > next) {
        return Err(RestoreError::Gap {
            object: object(),
            from: next,
            to: first - 1,
        });
    }
    let applied = match entries.is_empty() {
        true => Applied::default(),
        false => machine.apply_until(entries, plan.until)?,
    };
    let state = store.state();
    let Some(last) = link.header.last.filter(|_| !applied.ended) else {
        return Ok(applied);
    };
    // The checkpoint that replay began from may stand further on.
    if state.applied.is_some_and(|at| at.index > last.index) {
        return Ok(applied);
    }
    if state.applied != Some(last) {
        return Err(RestoreError::Position {
            object: object(),
            found: at(state.applied),
            wanted: last.to_string(),
        });
    }
    match &link.header.state {
        Some(wanted) if wanted.digests != state.digests => Err(RestoreError::Digest {
            found: state.digests.keys,
            wanted: wanted.digests.keys,
        }),
        _ => Ok(applied),
    }
}

/// Counts the digest from every row and compares it with what the chain says of the end.
fn verify(
    plan: &Plan,
    store: &Store,
    keys: &TenantKeys,
    is_cut: bool,
    report: &Report,
) -> Result<(), RestoreError> {
    let (found, _) = store.scan_digests(&Hasher::new(keys), |_| report(Progress::Counting))?;
    let state = store.state();
    let wanted = match plan.end(state.applied) {
        Some(end) if !is_cut => end.digests,
        // The end lies inside a batch or a link: the running digest is all there is.
        _ => state.digests,
    };
    if found != wanted {
        return Err(RestoreError::Digest {
            found: found.keys,
            wanted: wanted.keys,
        });
    }
    Ok(())
}

/// Moves to the incarnation that begins at `base`: a higher revision, everything below it compacted.
fn jump(store: &Store, base: &Base) -> Result<(), RestoreError> {
    let mut state: State = store.state();
    state.revision = base.revision;
    state.compacted = base.revision;
    if let Some(origin) = &base.origin {
        state.time_ms = state.time_ms.max(origin.at_ms);
    }
    Ok(store.set_state(state)?)
}
