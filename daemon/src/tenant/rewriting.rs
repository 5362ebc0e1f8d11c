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
use parking_lot::Mutex;
use replication::archive::rewriting::{RewriteError, begin, prove, shorten};
use replication::archive::s3;
use replication::failpoint::failpoint;
use replication::group::Group;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::key::KeyReport;
use super::rotation::{change, stands};
use crate::directory::records::{EventKind, KeyTask, TenantRecord};
use crate::node::Node;
use crate::question::Question;

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

/// Why a step is not done yet.
enum NotYet {
    /// Others have something to do first.
    Waits(String),
    Failed(String),
}

impl From<String> for NotYet {
    fn from(why: String) -> Self {
        NotYet::Failed(why)
    }
}

/// When a tenant is looked at again, and why.
struct Pause {
    until: Instant,
    length: Duration,
    why: String,
}

#[derive(Default)]
struct Pauses(Mutex<HashMap<TenantId, Pause>>);

impl Pauses {
    fn is_over(&self, id: TenantId) -> bool {
        let pauses = self.0.lock();
        pauses.get(&id).is_none_or(|p| Instant::now() >= p.until)
    }

    fn end(&self, id: TenantId) {
        self.0.lock().remove(&id);
    }

    fn note(&self, id: TenantId, done: Result<(), NotYet>) {
        let mut pauses = self.0.lock();
        let before = pauses.remove(&id);
        let (why, longer) = match done {
            Ok(()) => return,
            Err(NotYet::Waits(why)) => (why, false),
            Err(NotYet::Failed(why)) => (why, true),
        };
        if before.as_ref().is_none_or(|p| p.why != why) {
            tracing::info!(tenant = %id, %why, "not everything is rewritten yet");
        }
        let length = match before {
            Some(before) if longer => (before.length * 2).min(LONGEST_PAUSE),
            _ => LOOK,
        };
        let until = Instant::now() + length;
        pauses.insert(id, Pause { until, length, why });
    }
}

/// Rewrites the tenants whose record says so: this node's replicas one after the other; and, beside
/// that, what is a leader's to do, also of one tenant at a time.
pub async fn keep(node: Arc<Node>) {
    let pauses = Arc::new(Pauses::default());
    let leading = Arc::new(Semaphore::new(1));
    loop {
        tokio::time::sleep(LOOK).await;
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let Some(KeyTask::Rewrite { generation }) = record.key_task else {
                pauses.end(record.id);
                continue;
            };
            let Ok(group) = tenant.group() else { continue };
            if group.sealed().is_some() || !pauses.is_over(record.id) {
                continue;
            }
            if let Err(why) = rewrite_here(&group, generation).await {
                pauses.note(record.id, Err(why));
                continue;
            }
            if !group.is_leader() {
                pauses.end(record.id);
            } else if let Ok(permit) = leading.clone().try_acquire_owned() {
                let (own, pauses) = (node.clone(), pauses.clone());
                node.spawn(async move {
                    let done = rewrite_everywhere(&own, &group, &record, generation).await;
                    pauses.note(record.id, done);
                    drop(permit);
                });
            }
        }
    }
}

/// What is free in the file system of `path` must be more than `needed` bytes.
pub fn room(path: &Path, needed: u64) -> Result<(), String> {
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
async fn rewrite_here(group: &Arc<Group>, generation: u32) -> Result<(), NotYet> {
    let sealing = group.keys().map(|keys| keys.sealing());
    if sealing.is_none_or(|sealing| sealing < generation) {
        let why = "this node seals under an older generation yet";
        return Err(NotYet::Waits(why.into()));
    }
    let replica = group.replica().clone();
    let rewritten = tokio::task::spawn_blocking(move || {
        replica.dir.sweep().map_err(text)?;
        let mut older = replica.older(generation).map_err(text)?;
        if older.engine_bytes > 0 {
            room(&replica.dir.engine().map_err(text)?, older.engine_bytes)?;
            replica.rewrite(generation).map_err(text)?;
            failpoint("replica-rewritten");
            older = replica.older(generation).map_err(text)?;
            if older.engine_bytes > 0 {
                return Ok(None);
            }
        }
        replica.checkpoint_helps(&older).map(Some).map_err(text)
    });
    let helps: Result<Option<bool>, String> = rewritten.await.map_err(text)?;
    // A compaction beside it can have moved a table rather than write it.
    let helps =
        helps?.ok_or_else(|| NotYet::Waits("tables are under an older generation yet".into()))?;
    if helps {
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
async fn none_behind(node: &Node, record: &TenantRecord, generation: u32) -> Result<(), NotYet> {
    let reports = node.key_reports(record).await;
    for name in &record.placement {
        let report = reports.iter().find(|(n, _)| n.name == *name);
        let silent = || NotYet::Waits(format!("node {name} does not answer"));
        let (_, report) = report.ok_or_else(silent)?;
        if let Some(why) = behind(report, generation) {
            return Err(NotYet::Waits(why));
        }
    }
    Ok(())
}

async fn rewrite_everywhere(
    node: &Arc<Node>,
    group: &Arc<Group>,
    record: &TenantRecord,
    generation: u32,
) -> Result<(), NotYet> {
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
            _ = sealed.wait_for(Option::is_some) => Err(String::from("the tenant was sealed here")),
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
        let why = format!("{} cannot be destroyed: {}", kept.object, kept.left);
        return Err(NotYet::Failed(why));
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
    let chain = node.chain(record)?;
    let snapshot = group.checkpoint().map_err(text)?;
    let files = snapshot.into_iter().flat_map(|found| found.files);
    let lengths = files.map(|(_, file)| file.metadata().map_or(0, |m| m.len()));
    room(&parts.data_dir, lengths.sum())?;
    let beginning = begin(&chain, group, generation).await.map_err(text)?;
    failpoint("archive-begun");
    // With what is in the bucket, as a restore has it.
    let wrapped = parts.keys.fetch(record.id, generation).await;
    let wrapped = wrapped.map_err(text)?;
    let keys = WrappedKey::unwrap(&[wrapped], &parts.providers).await;
    let keys = Arc::new(keys.map_err(text)?);
    group.replica().lend(&keys);
    let dir = parts.drill_dir(record.group());
    let go_on = Arc::new(move || !stop.load(Ordering::Relaxed));
    let budget = parts.budget.clone();
    match prove(&chain, &beginning, keys, budget, &dir, go_on).await {
        Ok(()) => {}
        // An entry that changes nothing brings a link that does.
        Err(e @ RewriteError::NoDigest(_)) => {
            let _ = group.propose(Vec::new()).await;
            return Err(text(e));
        }
        Err(e) => return Err(text(e)),
    }
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
    node.event(record, EventKind::ArchiveShortened, said);
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
