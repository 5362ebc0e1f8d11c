//! Drills: a tenant is restored from the bucket alone, in a place that no client can reach, proven,
//! measured and removed; signed evidence of it is kept in the bucket.
//!
//! Invariants. Nothing of the tenant is changed, and nothing that lives on this node is used but its
//! keys, which are let go of when it is sealed. A drill passes only if everything it read
//! authenticates, the digest counted from every row is the chain's, and a sample of keys is what the
//! live tenant says at the same revision. It runs when nothing else wants the core (`threads`), with memory of
//! its own, and pauses (`reading`, `pace`), which its figures are without.

mod evidence;
mod pace;
mod page;
mod reading;
mod schedule;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kms::TenantKeys;
use object_store::path::Path as ObjectPath;
use object_store::{PutMode, PutPayload};
use parking_lot::Mutex;
use replication::archive::chain::Chain;
use replication::engine::Budget;
use replication::group::Group;
use replication::mvcc::digest::Digests;
use replication::proto::etcdserverpb::RangeRequest;
use replication::restore::{self, Plan, Progress, Rebuilt, RestoreError, plan};

use crate::directory::records::{DrillRecord, EventKind, TenantRecord};
use crate::limits;
use crate::node::Node;
use crate::signed::{self, Kind, Signed};
use crate::tenant::key::now_ms;
use crate::tenant::rewriting::room;
use crate::tenant::{self, DRILL};

pub use evidence::{Evidence, Phase, Sample};
use pace::Pace;
pub use page::page;
use reading::Reading;
pub use schedule::{is_new_period, is_ours, keep};
use threads::Threads;

/// Told of each step, with how far it is: done, of how much.
pub type Told = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

const LOOK: Duration = Duration::from_millis(100);

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Where the evidence of a tenant's drills lies.
pub fn evidence_dir(id: kms::TenantId) -> ObjectPath {
    ObjectPath::from(format!("drills/{id}"))
}

/// Runs a drill and leaves its evidence, also of one that fails; an error if there could be none.
pub async fn run(node: &Arc<Node>, record: &TenantRecord, told: Told) -> Result<Signed, String> {
    let Ok(_one) = node.drilling.try_acquire() else {
        return Err("a drill is under way on this node: try again once it is done".into());
    };
    let group = node.parts.groups.get(record.group());
    let group = group.ok_or_else(|| {
        let placement = record.placement.join(", ");
        format!("this node holds no replica of the tenant: ask one of {placement}")
    })?;
    if let Some(why) = group.sealed() {
        return Err(format!("the tenant is sealed here: {why}"));
    }
    if let Some(task) = &record.key_task {
        return Err(format!("{task} is under way: try again once it is done"));
    }
    let mut evidence = Evidence::new(node, record, group.status().rpo_ms);
    let began = Instant::now();
    let tried = restored(node, record, &group, &mut evidence, told).await;
    if let (Err(why), true) = (&tried, evidence.not_run) {
        return Err(why.clone());
    }
    // That is no failure of the archive.
    let now = node.tenants.find(record.id).map(|tenant| tenant.record());
    let stands = |now: &TenantRecord| {
        (now.incarnation, &now.key, now.needed(), &now.key_task)
            == (record.incarnation, &record.key, record.needed(), &None)
            && now.withheld().is_none()
    };
    if let Err(why) = &tried
        && (group.sealed().is_some() || !now.as_ref().is_some_and(stands))
    {
        return Err(format!("the tenant was sealed or changed meanwhile: {why}"));
    }
    evidence.end(tried, began.elapsed());
    let signed = signed::sign(&node.config.tls, Kind::Drill, &evidence)?;
    keep_evidence(node, record, &evidence, &signed).await?;
    Ok(signed)
}

/// Restores, proves and compares; the place is gone afterwards.
async fn restored(
    node: &Arc<Node>,
    record: &TenantRecord,
    group: &Arc<Group>,
    evidence: &mut Evidence,
    told: Told,
) -> Result<(), String> {
    let archive_key = node.archive_key().ok_or("the archive key is not known")?;
    // Unwrapped anew, as a restore has to.
    let keys = tenant::wrapped(&node.parts, record).await.map_err(text)?;
    let keys = Arc::new(keys);
    group.replica().lend(&keys);
    evidence.phase("keys unwrapped");
    let stop = Arc::new(AtomicBool::new(false));
    let mut sealed = group.replica().watch_sealed();
    let threads = Arc::new(Threads::default());
    let (stopping, raised, config) = (stop.clone(), threads.clone(), node.config.clone());
    let watch = tokio::spawn(async move {
        let _ = sealed.wait_for(Option::is_some).await;
        stopping.store(true, Ordering::Relaxed);
        raised.raise();
    });
    let tag = hex::encode(kms::secret::random_bytes::<4>());
    let place = Place {
        dir: node.parts.data_dir.join(DRILL).join(tag),
        // Connections of its own: those of this one end with it.
        bucket: Arc::new(Reading::new(config.bucket.open(config.region)?)),
        keys,
        stop,
        threads,
        told,
    };
    let id = record.group();
    let (mut own, live) = (evidence.clone(), group.clone());
    let (tell, done) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("drill".into())
        .spawn(move || {
            let compared = place.run(archive_key, id, &live, &mut own);
            // Its keys first: a tenant that is sealed waits for them.
            let dir = place.dir.clone();
            drop(place);
            let _ = std::fs::remove_dir_all(dir);
            let _ = tell.send((compared, own));
        })
        .map_err(text)?;
    let ended = done.await;
    watch.abort();
    let (compared, own) = ended.map_err(|_| "the drill's thread ended early")?;
    *evidence = own;
    compared
}

/// What a drill has for itself.
struct Place {
    dir: PathBuf,
    bucket: Arc<Reading>,
    keys: Arc<TenantKeys>,
    stop: Arc<AtomicBool>,
    threads: Arc<Threads>,
    told: Told,
}

impl Place {
    fn run(
        &self,
        archive_key: kms::Secret,
        id: replication::GroupId,
        live: &Group,
        evidence: &mut Evidence,
    ) -> Result<(), String> {
        self.threads.lower();
        let threads = self.threads.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .on_thread_start(move || threads.lower())
            .enable_all()
            .build()
            .map_err(text)?;
        let rebuilt = runtime.block_on(async {
            let chain = Chain::new(self.bucket.clone(), archive_key, id);
            let plan = tokio::select! {
                plan = plan::newest(&chain) => plan.map_err(text)?,
                () = self.stopped() => return Err(RestoreError::Stopped.to_string()),
            };
            let data_dir = self.dir.ancestors().nth(2).unwrap_or(&self.dir);
            let room = room(data_dir, plan.checkpoint_bytes() + 2 * plan.log_bytes());
            evidence.not_run = room.is_err();
            room?;
            evidence.planned(&plan);
            evidence.step("planned", self.bucket.step());
            let rebuilt = self.rebuild(&chain, &plan, evidence).await?;
            let state = &rebuilt.state;
            evidence.revision = state.revision;
            evidence.time_ms = state.time_ms;
            evidence.digest = state.digests.keys.to_string();
            Ok::<_, String>(rebuilt)
        })?;
        // What it looks at is the live tenant's.
        self.threads.raise();
        let compared = self.compare(&rebuilt, live, evidence);
        evidence.phase("compared");
        drop(rebuilt);
        runtime.shutdown_timeout(Duration::from_secs(1));
        compared
    }

    async fn stopped(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn rebuild(
        &self,
        chain: &Chain,
        plan: &Plan,
        evidence: &mut Evidence,
    ) -> Result<Rebuilt, String> {
        let pace = Arc::new(Mutex::new(Pace::new(Instant::now())));
        let (pacing, stop, told) = (pace.clone(), self.stop.clone(), self.told.clone());
        let bucket = self.bucket.clone();
        let report = Arc::new(move |progress: Progress| {
            let from = Instant::now();
            let pause = pacing.lock().pause(&progress, from, threads::cpu_time);
            // A tenant that is sealed meanwhile waits for its keys.
            while from.elapsed() < pause && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK.min(pause.saturating_sub(from.elapsed())));
            }
            let now = Instant::now();
            let slept = match pause.is_zero() {
                true => Duration::ZERO,
                false => now - from,
            };
            pacing.lock().paused(&progress, now, slept);
            match progress {
                Progress::Fetched { bytes, total } => {
                    bucket.written(bytes);
                    told("fetched", bytes, total);
                }
                Progress::Replayed { links, total } => told("replayed", links, total),
                Progress::Counting => {}
                Progress::Verified => told("verified", 1, 1),
            }
            !stop.load(Ordering::Relaxed)
        });
        let fetched = tokio::select! {
            fetched = restore::fetch(chain, plan, &self.dir, report.clone()) => fetched,
            () = self.stopped() => Err(RestoreError::Stopped),
        };
        if plan.first_manifest().is_some() {
            evidence.step("fetched", self.bucket.step());
        }
        fetched.map_err(text)?;
        let budget = Budget::passing(limits::DRILL_BUFFERS, limits::DRILL_CACHE);
        let rebuilt = restore::replay(plan, self.keys.clone(), budget, &self.dir, report);
        let pace = pace.lock();
        evidence.step("replayed", pace.replayed());
        let rebuilt = rebuilt.map_err(text)?;
        evidence.step("verified", pace.verified());
        Ok(rebuilt)
    }

    /// Compares with the replica that lives here: its digest, if it is known at that position, and a
    /// sample of keys at that revision.
    fn compare(
        &self,
        rebuilt: &Rebuilt,
        live: &Group,
        evidence: &mut Evidence,
    ) -> Result<(), String> {
        let state = &rebuilt.state;
        let recent = live.recent_digests();
        let index = state.applied.map_or(0, |at| at.index);
        let known = recent.iter().find(|(at, _)| *at == index);
        let known: Option<Digests> = known.map(|(_, digests)| *digests);
        evidence.live_digest = known.map(|digests| digests.keys.to_string());
        if known.is_some_and(|known| known != state.digests) {
            return Err(format!(
                "the live replica's digest at entry {index} is another one"
            ));
        }
        let go_on = || !self.stop.load(Ordering::Relaxed);
        let sampled = rebuilt.store().sample(limits::DRILL_SAMPLE, go_on);
        let sampled = sampled.map_err(text)?;
        if !go_on() {
            return Err(RestoreError::Stopped.to_string());
        }
        for (key, record) in sampled {
            evidence.sample.keys += 1;
            let request = RangeRequest {
                key,
                revision: state.revision,
                ..RangeRequest::default()
            };
            let Ok(answer) = live.store().range(&request) else {
                // Compacted since, or this replica is not there yet.
                evidence.sample.not_comparable += 1;
                continue;
            };
            let same = answer.kvs.first().is_some_and(|kv| {
                kv.value == record.value
                    && kv.mod_revision == record.modified
                    && kv.version == record.version
            });
            evidence.sample.differ += u64::from(!same);
        }
        match evidence.sample.differ {
            0 => Ok(()),
            differ => Err(format!(
                "{differ} of {} sampled keys are not what the live tenant says at revision {}",
                evidence.sample.keys, state.revision
            )),
        }
    }
}

/// Puts the evidence in the bucket and the directory, and raises an alarm of a failure.
async fn keep_evidence(
    node: &Arc<Node>,
    record: &TenantRecord,
    evidence: &Evidence,
    signed: &Signed,
) -> Result<(), String> {
    let dir = evidence_dir(record.id);
    let json = serde_json::to_vec_pretty(signed).map_err(text)?;
    let name = format!("{:015}-{}", evidence.at_ms, node.config.name);
    let objects = [
        (dir.clone().join(format!("{name}.json")), json),
        (dir.join(format!("{name}.html")), page(signed)?.into_bytes()),
    ];
    let object = objects[0].0.to_string();
    let mut kept = Ok(());
    for (path, bytes) in objects {
        let put = PutPayload::from(bytes);
        let put = node
            .parts
            .bucket
            .put_opts(&path, put, PutMode::Create.into())
            .await;
        kept = kept.and(put.map(drop).map_err(text));
    }
    let detail = match evidence.passed {
        true => format!(
            "revision {}, restored and verified in {} ms; evidence {object}",
            evidence.revision, evidence.rto_ms
        ),
        false => format!(
            "{}; {}; evidence {object}",
            evidence.problem, evidence.advice
        ),
    };
    let kind = match evidence.passed {
        true => EventKind::DrillPassed,
        false => {
            tracing::error!(tenant = %record.id, problem = evidence.problem, "ALARM: a drill failed");
            EventKind::DrillFailed
        }
    };
    node.event(record, kind, detail);
    let took = |name: &str| evidence.took_ms(name);
    let drill = DrillRecord {
        tenant: record.id,
        at_ms: now_ms(),
        problem: evidence.problem.clone(),
        rpo_ms: evidence.rpo_ms,
        rto_ms: evidence.rto_ms,
        fetched_bytes: evidence.checkpoint_bytes,
        fetched_in_ms: took("fetched"),
        replayed_bytes: evidence.log_bytes,
        replayed_in_ms: took("replayed"),
        evidence: object,
    };
    let directory = node.directory().ok_or("the directory is not open")?;
    directory.put_drill(&drill).await.map_err(text)?;
    kept.map_err(|e| format!("the evidence is not in the bucket: {e}"))
}
