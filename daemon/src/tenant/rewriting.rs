//! Moving a tenant to its newest key generation, so that the older ones can be destroyed: files and
//! log on every node, then the archive, then the keys.
//!
//! Invariants. A generation is destroyed only when every node of the placement has said, twice, that
//! it seals under the newest one and keeps no file and no log entry under another, and a restore from
//! the bucket with the newest one alone has come to the right digest. The directory names the older
//! generations as needed until then. Each step can be done again: whoever leads the tenant's group
//! after a crash goes on.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use crate::node::{Node, Question};

const LOOK: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Left free for the log, whatever is rewritten.
const SPARE: u64 = 1 << 30;
/// How long the nodes may take to destroy their copies of wrapped keys.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(20);
const FORGOTTEN_LOOK: Duration = Duration::from_millis(100);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// When a tenant is looked at again, after something did not succeed, and why it did not.
struct Pause {
    until: Instant,
    length: Duration,
    why: String,
}

/// Rewrites the tenants whose record says so: this node's replica, and, where it leads, the rest. One
/// tenant at a time.
pub async fn keep(node: Arc<Node>) {
    let mut pauses: HashMap<TenantId, Pause> = HashMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let Some(KeyTask::Rewrite { generation }) = record.key_task else {
                pauses.remove(&record.id);
                continue;
            };
            let Ok(group) = tenant.group() else { continue };
            let paused = pauses.get(&record.id);
            if group.sealed().is_some() || paused.is_some_and(|p| Instant::now() < p.until) {
                continue;
            }
            let done = async {
                rewrite_here(&group, generation).await?;
                match group.is_leader() {
                    true => rewrite_everywhere(&node, &group, &record, generation).await,
                    false => Ok(()),
                }
            };
            let Err(why) = done.await else {
                pauses.remove(&record.id);
                continue;
            };
            let before = pauses.remove(&record.id).filter(|p| p.why == why);
            if before.is_none() {
                tracing::info!(tenant = %record.id, generation, %why, "not everything is rewritten yet");
            }
            let length = before.map_or(LOOK, |p| (p.length * 2).min(LONGEST_PAUSE));
            let until = Instant::now() + length;
            pauses.insert(record.id, Pause { until, length, why });
        }
    }
}

/// What is free in the file system of `path` must be more than `needed` bytes.
fn room(path: &Path, needed: u64) -> Result<(), String> {
    let found = rustix::fs::statvfs(path).map_err(text)?;
    let free = found.f_bavail * found.f_frsize;
    let needed = needed + needed / 8 + SPARE;
    match free > needed {
        true => Ok(()),
        false => Err(format!(
            "{} has {free} bytes free, and {needed} are needed: make room; the other tenants' log must not run out of it",
            path.display()
        )),
    }
}

/// Rewrites this node's files, and has the log purged of what is under older generations.
async fn rewrite_here(group: &Arc<Group>, generation: u32) -> Result<(), String> {
    let sealing = group.keys().map(|keys| keys.sealing());
    if sealing.is_none_or(|sealing| sealing < generation) {
        return Err("this node seals under an older generation yet".into());
    }
    let replica = group.replica().clone();
    let rewritten = tokio::task::spawn_blocking(move || {
        replica.dir.sweep().map_err(text)?;
        let mut older = replica.older(generation).map_err(text)?;
        if older.engine_bytes > 0 {
            room(&replica.dir.engine().map_err(text)?, older.engine_bytes)?;
            replica.rewrite().map_err(text)?;
            failpoint("replica-rewritten");
            older = replica.older(generation).map_err(text)?;
            if older.engine_bytes > 0 {
                return Err("tables are still under an older generation".into());
            }
        }
        replica.checkpoint_helps(&older).map_err(text)
    });
    if rewritten.await.map_err(text)?? {
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
    if record.needed() != [generation] {
        none_behind(node, &record, generation).await?;
        // Sealing waits for the keys that a restore holds: it ends then, also in its blocking part.
        let stop = Arc::new(AtomicBool::new(false));
        let (mut sealed, mut also) = (
            group.replica().watch_sealed(),
            group.replica().watch_sealed(),
        );
        let stopping = stop.clone();
        let watch = tokio::spawn(async move {
            let _ = also.wait_for(Option::is_some).await;
            stopping.store(true, Ordering::Relaxed);
        });
        let begun = tokio::select! {
            begun = begin_anew(node, group, &record, generation, stop) => begun,
            _ = sealed.wait_for(Option::is_some) => Err("the tenant was sealed here".into()),
        };
        watch.abort();
        begun?;
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
    let said = format!("everything is under generation {generation}, older ones are destroyed");
    tracing::info!(tenant = %done.id, "{said}");
    node.event(&done, EventKind::Rewritten, said);
    Ok(())
}

/// Has the archive begin at a checkpoint under `generation`, and destroys what is before it.
async fn begin_anew(
    node: &Node,
    group: &Group,
    record: &TenantRecord,
    generation: u32,
    stop: Arc<AtomicBool>,
) -> Result<(), String> {
    let parts = &node.parts;
    let archive_key = node.archive_key().ok_or("the archive key is not known")?;
    let chain = Chain::new(parts.bucket.clone(), archive_key, record.group());
    let beginning = begin(&chain, group).await.map_err(text)?;
    failpoint("archive-begun");
    let files = beginning.manifest.files.iter();
    room(&parts.data_dir, files.map(|f| f.length).sum())?;
    // With what is in the bucket, as a restore has it.
    let wrapped = parts.keys.fetch(record.id, generation).await;
    let wrapped = wrapped.map_err(text)?;
    let keys = WrappedKey::unwrap(&[wrapped], &parts.providers).await;
    let keys = Arc::new(keys.map_err(text)?);
    group.replica().lend(&keys);
    let dir = parts.drill_dir(record.group());
    let go_on = Arc::new(move || !stop.load(Ordering::Relaxed));
    let budget = parts.budget.clone();
    let proven = prove(&chain, &beginning, keys, budget, &dir, go_on).await;
    proven.map_err(text)?;
    failpoint("archive-proven");
    stands(node, record).await.map_err(text)?;
    if !group.is_leader() {
        return Err("another node leads now".into());
    }
    let gone = shorten(&node.config.bucket, &chain, &beginning, generation).await;
    let gone = gone.map_err(text)?;
    failpoint("archive-shortened");
    let kept = gone.iter().filter(|object| !object.left.is_empty());
    let kept: Vec<&str> = kept.map(|object| object.left.as_str()).collect();
    let mut said = format!(
        "the archive begins at link {}, {} objects before it are destroyed",
        beginning.manifest.link,
        gone.len() - kept.len()
    );
    if let Some(why) = kept.first() {
        let outlive = format!(", {} outlive their key, unreadable: {why}", kept.len());
        said.push_str(&outlive);
    }
    tracing::info!(tenant = %record.id, generation, "{said}");
    node.event(record, EventKind::Rewritten, said);
    Ok(())
}

/// Waits until no replica holds a generation before `generation` in memory, and no node of the region
/// a wrapped copy of one: the node where it was made can be of no placement.
async fn forgotten(node: &Node, record: &TenantRecord, generation: u32) -> Result<(), String> {
    let deadline = Instant::now() + FORGOTTEN_WITHIN;
    loop {
        let Err(why) = all_forgot(node, record, generation).await else {
            return Ok(());
        };
        if Instant::now() >= deadline {
            return Err(why);
        }
        tokio::time::sleep(FORGOTTEN_LOOK).await;
    }
}

async fn all_forgot(node: &Node, record: &TenantRecord, generation: u32) -> Result<(), String> {
    let reports = node.key_reports(record).await;
    let holds = |report: &KeyReport| report.held.iter().any(|g| *g < generation);
    for name in &record.placement {
        match reports.iter().find(|(n, _)| n.name == *name) {
            Some((_, report)) if !holds(report) => {}
            Some(_) => return Err(format!("node {name} still holds an older generation")),
            None => return Err(format!("node {name} does not answer")),
        }
    }
    let directory = node.directory().ok_or("the directory is not open")?;
    for other in directory.nodes().map_err(text)? {
        let other = other.record;
        let forgot = if other.id == node.id {
            node.forget_before(record.id, generation).map(|()| true)?
        } else {
            let question = Question::Forget(record.id, generation);
            node.ask(&other.peer_address, &question).await.is_some()
        };
        if !forgot {
            return Err(format!(
                "node {} does not say that it destroyed its copies of older generations; if it is down, start it, or replace it",
                other.name
            ));
        }
    }
    Ok(())
}

impl Node {
    /// Destroys this node's copies of generations that the directory says are needed no more.
    pub fn forget_before(&self, id: TenantId, generation: u32) -> Result<(), String> {
        let directory = self.directory().ok_or("there is no directory yet")?;
        let tenants = directory.tenants().map_err(text)?;
        let found = tenants.into_iter().find(|t| t.record.id == id);
        let needed = found.and_then(|t| t.record.needed().first().copied());
        match needed.is_some_and(|oldest| oldest >= generation) {
            true => self.parts.keys.forget_before(id, generation).map_err(text),
            false => Err("the directory does not say here that they are needed no more".into()),
        }
    }
}
