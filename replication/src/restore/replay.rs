//! Replaying links through the ordinary apply, and proving the result.

use std::path::Path;
use std::sync::Arc;

use kms::TenantKeys;

use super::plan::Plan;
use super::{Progress, REVISION_JUMP, Report, RestoreError, Restored, io};
use crate::archive::bucket::link_path;
use crate::archive::link::Link;
use crate::engine::{Budget, Engine};
use crate::group::replica::sync_dir;
use crate::group::types::{decode_entry, machine_entry};
use crate::machine::{Machine, State, Store};
use crate::mvcc::digest::Hasher;
use crate::{GroupId, Position};

/// Replays `plan` on the engine in `dir/engine`, verifies it, makes it incarnation `group`.
pub fn run(
    plan: &Plan,
    group: GroupId,
    keys: Arc<TenantKeys>,
    budget: Arc<Budget>,
    dir: &Path,
    report: Report,
) -> Result<Restored, RestoreError> {
    // Blocking work of seconds: replay is CPU and disk.
    tokio::task::block_in_place(|| {
        let engine = Engine::open(&dir.join("engine"), keys.clone(), &budget)?;
        let store = Arc::new(Store::open(engine)?);
        check_manifest(plan, &store.state())?;
        let mut done = 0;
        replay(plan, &store, &keys, &report, &mut done, plan.total_links())?;
        verify(plan, &store, &keys, &report)?;
        report(Progress::Verified);
        jump(&store)?;
        let checkpoint = dir.join("checkpoint");
        store.engine()?.checkpoint(&checkpoint)?;
        sync_dir(&checkpoint).map_err(io(&checkpoint))?;
        let state = store.state();
        Ok(Restored {
            group,
            checkpoint,
            position: state.applied.unwrap_or_default(),
            state,
        })
    })
}

/// The files of a checkpoint must stand where its manifest says.
fn check_manifest(plan: &Plan, state: &State) -> Result<(), RestoreError> {
    let Some(manifest) = &plan.manifest else {
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

fn replay(
    plan: &Plan,
    store: &Arc<Store>,
    keys: &Arc<TenantKeys>,
    report: &Report,
    done: &mut u64,
    total: u64,
) -> Result<(), RestoreError> {
    if let Some(before) = &plan.before {
        replay(before, store, keys, report, done, total)?;
        jump(store)?;
    }
    let machine = Machine::new(store.clone(), keys.clone(), plan.group);
    for link in &plan.links {
        apply(plan.group, link, &machine, store)?;
        *done += 1;
        let links = *done;
        if !report(Progress::Replayed { links, total }) {
            return Err(RestoreError::Stopped);
        }
    }
    Ok(())
}

fn apply(
    group: GroupId,
    link: &Link,
    machine: &Machine,
    store: &Store,
) -> Result<(), RestoreError> {
    let object = || link_path(group, link.header.number).to_string();
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
    if !entries.is_empty() {
        machine.apply(entries)?;
    }
    let state = store.state();
    let Some(last) = link.header.last else {
        return Ok(());
    };
    // The checkpoint that replay began from may stand further on.
    if state.applied.is_some_and(|at| at.index > last.index) {
        return Ok(());
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
        _ => Ok(()),
    }
}

/// Counts the digest from every row and compares it with what the chain says of the end.
fn verify(
    plan: &Plan,
    store: &Store,
    keys: &TenantKeys,
    report: &Report,
) -> Result<(), RestoreError> {
    let (found, _) = store.scan_digests(&Hasher::new(keys), |_| report(Progress::Counting))?;
    let state = store.state();
    let wanted = match plan.end(state.applied) {
        Some(end) => end.digests,
        // The end lies inside a batch: the running digest is all there is.
        None => state.digests,
    };
    if found != wanted {
        return Err(RestoreError::Digest {
            found: found.keys,
            wanted: wanted.keys,
        });
    }
    Ok(())
}

/// Moves to the next incarnation: a higher revision, everything below it compacted.
fn jump(store: &Store) -> Result<(), RestoreError> {
    let mut state: State = store.state();
    state.revision += REVISION_JUMP;
    state.compacted = state.revision;
    Ok(store.set_state(state)?)
}
