//! Going on with what a tenant's record says is being done with its key: a rotation, or a change to
//! another KMS key. (Rewriting under the newest generation is `rewriting`'s.)
//!
//! Invariants. The record names the task and its generation before anything is made, and each step
//! can be done again: whoever leads the tenant's group after a crash goes on. A generation is in the
//! bucket before a node is told of it, and on every node that answers before one seals under it.
//! During a change every generation is wrapped under the new key in the bucket before the record
//! names that key.

use std::sync::Arc;
use std::time::Duration;

use kms::{KeyUri, WrappedKey, WrappedKeyError};
use replication::failpoint::failpoint;
use replication::group::Group;
use tokio::time::Instant;

use super::Tenant;
use super::key::now_ms;
use crate::directory::DirectoryError;
use crate::directory::records::{EventKind, KeyTask, TenantRecord};
use crate::node::Node;

const LOOK: Duration = Duration::from_secs(1);
/// How long a node may take to fetch a generation; one that answers nothing is not waited for.
const HELD_WITHIN: Duration = Duration::from_secs(20);
const HELD_LOOK: Duration = Duration::from_millis(50);
const DAY_MS: u64 = 24 * 3600 * 1000;

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error(transparent)]
    Key(#[from] WrappedKeyError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("node {0} does not hold generation {1} yet")]
    NotHeld(String, u32),
    #[error("the tenant is sealed here")]
    Sealed,
}

/// Goes on with the tasks of the tenants that this node leads.
pub async fn keep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for tenant in node.tenants.all() {
            let Ok(group) = tenant.group() else { continue };
            if !group.is_leader() || group.sealed().is_some() {
                continue;
            }
            schedule(&node, &tenant).await;
            let record = tenant.record();
            let Some(task) = record.key_task.clone() else {
                continue;
            };
            if let Err(e) = go_on(&node, &group, &record, &task).await {
                tracing::warn!(tenant = %record.id, %task, error = %e, "not done yet; it is tried again");
            }
        }
    }
}

/// Begins a rotation that is due.
async fn schedule(node: &Node, tenant: &Tenant) {
    let mut record = tenant.record();
    let due = record.rotated_ms + u64::from(record.rotate_days) * DAY_MS;
    let busy = record.key_task.is_some() || record.restoring.is_some();
    if record.rotate_days == 0 || busy || now_ms() < due {
        return;
    }
    record.key_task = Some(KeyTask::Rotate {
        generation: record.next_generation(),
        rewrite: false,
    });
    // Whoever changed the record meanwhile is not overwritten.
    if let Err(e) = change(node, &tenant.record(), |r| r.clone_from(&record)).await {
        tracing::warn!(tenant = %record.id, error = %e, "a scheduled rotation has not begun");
    }
}

/// Changes the tenant's record, if it is still the one that this node knows.
pub async fn change(
    node: &Node,
    known: &TenantRecord,
    with: impl FnOnce(&mut TenantRecord),
) -> Result<TenantRecord, DirectoryError> {
    let directory = node
        .directory()
        .ok_or_else(|| DirectoryError::Conflict("the directory is not open".into()))?;
    directory.group().read_barrier().await?;
    let tenants = directory.tenants()?;
    let found = tenants.into_iter().find(|t| t.record == *known);
    let mut found = found.ok_or_else(|| DirectoryError::Conflict(known.name.clone()))?;
    with(&mut found.record);
    directory.put_tenant(&found.record, found.modified).await?;
    Ok(found.record)
}

async fn go_on(
    node: &Arc<Node>,
    group: &Group,
    record: &TenantRecord,
    task: &KeyTask,
) -> Result<(), TaskError> {
    let (generation, key) = match task {
        KeyTask::Rotate { generation, .. } => (*generation, record.key.clone()),
        KeyTask::Change { key, generation } => (*generation, key.clone()),
        KeyTask::Rewrite { .. } => return Ok(()),
    };
    failpoint("key-task-begun");
    stands(node, record).await?;
    if matches!(task, KeyTask::Change { .. }) {
        rewrap(node, group, record, &key).await?;
    }
    let made = make(node, group, record, &key, generation).await?;
    failpoint("generation-stored");
    let announced = record.key == key && record.other_generations.contains(&generation);
    let record = match announced {
        true => record.clone(),
        false => {
            change(node, record, |r| {
                r.key = key.clone();
                r.other_generations.push(generation);
                r.other_generations.sort_unstable();
                r.other_generations.dedup();
            })
            .await?
        }
    };
    failpoint("generation-announced");
    held(node, &record, &key, generation).await?;
    let done = change(node, &record, |r| {
        r.other_generations.retain(|g| *g != generation);
        r.other_generations.push(r.generation);
        r.other_generations.sort_unstable();
        r.generation = generation;
        r.fingerprint.clone_from(&made.fingerprint);
        r.rotated_ms = now_ms();
        r.key_task = match task {
            KeyTask::Rotate { rewrite: true, .. } => Some(KeyTask::Rewrite { generation }),
            _ => None,
        };
    })
    .await?;
    failpoint("key-task-done");
    tracing::info!(tenant = %done.id, generation, "new writes are sealed under a new key generation");
    let kind = match task {
        KeyTask::Change { .. } => EventKind::KeyChanged,
        _ => EventKind::Rotated,
    };
    node.event(&done, kind, format!("generation {generation}, key {key}"));
    Ok(())
}

/// The record as the directory has it now must be the one that this node goes on with: a leader that
/// was cut off, or stopped for a while, must not write over what another has done since.
pub(super) async fn stands(node: &Node, record: &TenantRecord) -> Result<(), TaskError> {
    let directory = node
        .directory()
        .ok_or_else(|| DirectoryError::Conflict("the directory is not open".into()))?;
    let barrier = directory.group().read_barrier().await;
    barrier.map_err(DirectoryError::from)?;
    let tenants = directory.tenants()?;
    match tenants.iter().any(|t| t.record == *record) {
        true => Ok(()),
        false => Err(DirectoryError::Conflict(record.name.clone()).into()),
    }
}

/// Wraps every generation under `key` in the bucket, from memory: what the bucket has may be damaged,
/// or under a key that is gone.
async fn rewrap(
    node: &Node,
    group: &Group,
    record: &TenantRecord,
    key: &KeyUri,
) -> Result<(), TaskError> {
    let (parts, region) = (&node.parts, node.config.region);
    let keys = group.keys().ok_or(TaskError::Sealed)?;
    for generation in record.needed() {
        let known = parts.keys.fetch(record.id, generation).await;
        if known.is_ok_and(|known| known.key == *key) {
            continue;
        }
        let again = WrappedKey::again(&parts.providers, key, &keys, region, generation).await;
        let again = again.map_err(WrappedKeyError::from)?;
        stands(node, record).await?;
        parts.keys.replace(&again).await?;
        failpoint("generation-rewrapped");
    }
    // Each must open before the record names the key.
    let wrapped = parts.keys.fetch_all(record.id).await?;
    for wrapped in wrapped
        .iter()
        .filter(|w| record.needed().contains(&w.generation))
    {
        let opened = wrapped.unwrap_into(&parts.providers, &keys).await;
        opened.map_err(WrappedKeyError::from)?;
    }
    Ok(())
}

/// The generation's wrapped key, in the bucket: the one that a try before left there, if it opens and
/// is under `key`, or a new one.
async fn make(
    node: &Node,
    group: &Group,
    record: &TenantRecord,
    key: &KeyUri,
    generation: u32,
) -> Result<WrappedKey, TaskError> {
    let (parts, region) = (&node.parts, node.config.region);
    let keys = group.keys().ok_or(TaskError::Sealed)?;
    match parts.keys.fetch(record.id, generation).await {
        Ok(found) if found.key == *key => {
            let opened = found.unwrap_into(&parts.providers, &keys).await;
            opened.map_err(WrappedKeyError::from)?;
            return Ok(found);
        }
        // Of a change to another key that was given up.
        Ok(_) | Err(WrappedKeyError::Missing(_)) => {}
        Err(e) => return Err(e.into()),
    }
    let made = match keys.generation(generation) {
        Some(_) => WrappedKey::again(&parts.providers, key, &keys, region, generation).await,
        // It was announced, so that someone may hold it, and seal under it.
        None if record.needed().contains(&generation) => {
            return Err(TaskError::NotHeld(node.config.name.clone(), generation));
        }
        None => WrappedKey::next(&parts.providers, key, &keys, region, generation).await,
    };
    let made = made.map_err(WrappedKeyError::from)?;
    stands(node, record).await?;
    parts.keys.replace(&made).await?;
    Ok(made)
}

/// Waits until every node of the placement that answers holds `generation`, and has its copies of
/// all generations under `key`.
async fn held(
    node: &Node,
    record: &TenantRecord,
    key: &KeyUri,
    generation: u32,
) -> Result<(), TaskError> {
    let deadline = Instant::now() + HELD_WITHIN;
    let key = key.to_string();
    loop {
        let reports = node.key_reports(record).await;
        let behind = reports.iter().find(|(_, report)| {
            let stale = report.copies.iter().any(|(_, under)| *under != key);
            report.sealed.is_none() && (stale || !report.held.contains(&generation))
        });
        let Some((behind, _)) = behind else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(TaskError::NotHeld(behind.name.clone(), generation));
        }
        tokio::time::sleep(HELD_LOOK).await;
    }
}
