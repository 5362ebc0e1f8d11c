//! Moving a tenant to its newest key generation, so that the older ones can be destroyed: files and
//! log on every node, then the archive, then the keys.
//!
//! Invariants. A generation is destroyed only when every node of the placement has said, twice, that
//! it seals under the newest one and keeps no file and no log entry under another, and a restore from
//! the bucket with the newest one alone has come to the right digest. The directory names the older
//! generations as needed until then. Each step can be done again: whoever leads the tenant's group
//! after a crash goes on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kms::{TenantId, WrappedKey};
use replication::archive::chain::Chain;
use replication::archive::rewriting::{begin, prove, shorten};
use replication::archive::s3;
use replication::group::Group;
use tokio::time::Instant;

use super::key::KeyReport;
use super::rotation::{change, stands};
use crate::directory::records::{EventKind, KeyTask, TenantRecord};
use crate::failpoint::failpoint;
use crate::node::{DRILL, Node};

const LOOK: Duration = Duration::from_secs(1);
/// How long the nodes may take to destroy their copies of wrapped keys.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(20);
const FORGOTTEN_LOOK: Duration = Duration::from_millis(100);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Rewrites the tenants whose record says so: this node's replica, and, where it leads, the rest. One
/// tenant at a time.
pub async fn keep(node: Arc<Node>) {
    let mut told: HashMap<TenantId, String> = HashMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let Some(KeyTask::Rewrite { generation }) = record.key_task else {
                told.remove(&record.id);
                continue;
            };
            let Ok(group) = tenant.group() else { continue };
            if group.sealed().is_some() {
                continue;
            }
            let done = async {
                rewrite_here(&group, generation).await?;
                match group.is_leader() {
                    true => rewrite_everywhere(&node, &group, &record, generation).await,
                    false => Ok(()),
                }
            };
            if let Err(why) = done.await
                && told.get(&record.id) != Some(&why)
            {
                tracing::info!(tenant = %record.id, generation, %why, "not everything is rewritten yet");
                told.insert(record.id, why);
            }
        }
    }
}

/// Rewrites this node's files, and has the log purged of what is under older generations.
async fn rewrite_here(group: &Arc<Group>, generation: u32) -> Result<(), String> {
    let replica = group.replica().clone();
    let rewritten = tokio::task::spawn_blocking(move || {
        let mut older = replica.older(generation)?;
        if older.engine_bytes > 0 {
            replica.rewrite()?;
            failpoint("replica-rewritten");
            older = replica.older(generation)?;
        }
        replica.checkpoint_helps(&older)
    });
    let checkpoint = rewritten.await.map_err(text)?.map_err(text)?;
    if checkpoint {
        // The log is purged behind it, once it is archived.
        group.make_checkpoint().await;
    }
    Ok(())
}

/// What a node still has to do; none if nothing of it needs an older generation.
fn behind(report: &KeyReport, generation: u32) -> Option<String> {
    let node = &report.node;
    if let Some(why) = &report.sealed {
        return Some(format!("the tenant is sealed on node {node}: {why}"));
    }
    if report.sealing < generation {
        return Some(format!("node {node} seals under an older generation"));
    }
    match report.older {
        Some(older) if older.is_none() => None,
        Some(_) => Some(format!(
            "node {node} keeps files or log entries under older generations"
        )),
        None => Some(format!("node {node} has not counted what it keeps")),
    }
}

/// Every node of the placement must say that it needs no older generation.
async fn none_behind(node: &Node, record: &TenantRecord, generation: u32) -> Result<(), String> {
    let reports = node.key_reports(record).await;
    for name in &record.placement {
        let report = reports.iter().find(|(n, _)| n.name == *name);
        let (_, report) = report.ok_or_else(|| format!("node {name} does not answer"))?;
        if let Some(why) = behind(report, generation) {
            return Err(why);
        }
    }
    Ok(())
}

async fn rewrite_everywhere(
    node: &Arc<Node>,
    group: &Arc<Group>,
    record: &TenantRecord,
    generation: u32,
) -> Result<(), String> {
    let mut record = record.clone();
    let mut gone = None;
    if record.needed() != [generation] {
        none_behind(node, &record, generation).await?;
        gone = Some(begin_anew(node, group, &record, generation).await?);
        // Whatever was on its way when they said so before has come by now.
        none_behind(node, &record, generation).await?;
        let dropped = change(node, &record, |r| {
            r.other_generations.retain(|g| *g > generation);
        });
        record = dropped.await.map_err(text)?;
        failpoint("generations-dropped");
    }
    forgotten(node, &record, generation).await?;
    stands(node, &record).await.map_err(text)?;
    let keys = format!("tenants/{}/keys", record.id);
    let older = |object: &str| {
        let number = object
            .rsplit('/')
            .next()
            .and_then(|n| n.parse::<u32>().ok());
        number.is_some_and(|number| number < generation)
    };
    let (config, bucket) = (&node.config.bucket, &node.parts.bucket);
    let destroyed = s3::destroy_some(config, bucket, &keys, &older).await?;
    if let Some(kept) = destroyed.iter().find(|object| !object.left.is_empty()) {
        return Err(format!(
            "{} cannot be destroyed: {}",
            kept.object, kept.left
        ));
    }
    failpoint("generations-destroyed");
    let done = change(node, &record, |r| r.key_task = None);
    let done = done.await.map_err(text)?;
    tracing::info!(tenant = %done.id, generation, "everything is under the newest generation, and the older ones are destroyed");
    let detail = format!(
        "everything is under generation {generation}, older ones are destroyed{}",
        gone.unwrap_or_default()
    );
    node.event(&done, EventKind::Rewritten, detail);
    Ok(())
}

/// Has the archive begin at a checkpoint under `generation`, and destroys what is before it. Answers
/// what that was.
async fn begin_anew(
    node: &Node,
    group: &Group,
    record: &TenantRecord,
    generation: u32,
) -> Result<String, String> {
    let parts = &node.parts;
    let archive_key = node.archive_key().ok_or("the archive key is not known")?;
    let chain = Chain::new(parts.bucket.clone(), archive_key, record.group());
    let beginning = begin(&chain, group).await.map_err(text)?;
    failpoint("archive-begun");
    // With what is in the bucket, as a restore has it.
    let wrapped = parts
        .keys
        .fetch(record.id, generation)
        .await
        .map_err(text)?;
    let keys = WrappedKey::unwrap(&[wrapped], &parts.providers).await;
    let keys = Arc::new(keys.map_err(text)?);
    let dir = parts.data_dir.join(DRILL).join(record.group().to_string());
    let proven = prove(&chain, &beginning, keys, parts.budget.clone(), &dir).await;
    proven.map_err(text)?;
    failpoint("archive-proven");
    stands(node, record).await.map_err(text)?;
    let gone = shorten(&node.config.bucket, &chain, &beginning, generation).await;
    let gone = gone.map_err(text)?;
    failpoint("archive-shortened");
    let kept = gone.iter().filter(|object| !object.left.is_empty());
    let kept: Vec<&str> = kept.map(|object| object.left.as_str()).collect();
    let mut said = format!(
        "; the archive begins at link {}, {} objects before it are destroyed",
        beginning.manifest.link,
        gone.len() - kept.len()
    );
    if let Some(why) = kept.first() {
        said.push_str(&format!(
            ", {} outlive their key, unreadable: {why}",
            kept.len()
        ));
    }
    Ok(said)
}

/// Waits until no node has a generation before `generation` in memory or as a wrapped copy.
async fn forgotten(node: &Node, record: &TenantRecord, generation: u32) -> Result<(), String> {
    let deadline = Instant::now() + FORGOTTEN_WITHIN;
    loop {
        let reports = node.key_reports(record).await;
        let has = |(_, report): &&(_, KeyReport)| {
            let older = |g: &u32| *g < generation;
            report.held.iter().any(older) || report.kept.iter().any(older)
        };
        let has = reports.iter().find(has).map(|(node, _)| node.name.clone());
        if reports.len() == record.placement.len() && has.is_none() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let who = has.unwrap_or_else(|| "that does not answer".into());
            return Err(format!("node {who} may still hold an older generation"));
        }
        tokio::time::sleep(FORGOTTEN_LOOK).await;
    }
}
