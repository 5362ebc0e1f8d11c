//! Retention against a model: random histories of links, checkpoints, restores to earlier moments,
//! lost files, holds and jumps of the clock. What was restorable inside the window before a sweep
//! must be so after it, in the same incarnation.

use kms::{Secret, TenantId};
use object_store::memory::InMemory;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::archive::chain::{Created, Tail};
use crate::archive::holds::What;
use crate::archive::link::{Base, Closed, Header, LinkState, Origin};
use crate::machine::Until;
use crate::mvcc::digest::Digests;
use crate::restore::RestoreError;
use crate::restore::plan::{self, Plan, Point};
use crate::{GroupId, Position};

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;
/// Later than any clock, so that what the store stamps is old.
const START: u64 = 4_000_000_000_000;
const KEEP: u64 = 7 * DAY;

/// A tenant whose history is written into a bucket in memory.
struct Model {
    rng: StdRng,
    config: BucketConfig,
    chain: Chain,
    tail: Tail,
    time_ms: u64,
    revision: i64,
    index: u64,
    /// Files of the newest checkpoint: most are in the next one too.
    files: Vec<checkpoint::ManifestFile>,
    /// Every moment at which something was archived.
    moments: Vec<(u64, i64)>,
    holds: Vec<Hold>,
}

impl Model {
    fn new(seed: u64) -> Self {
        let bucket: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let key = Secret::from_slice(&[3; 32]).unwrap();
        let group = GroupId {
            tenant: TenantId([1; 16]),
            incarnation: 1,
        };
        Model {
            rng: StdRng::seed_from_u64(seed),
            config: BucketConfig {
                url: "file:///nowhere/at/all".into(),
                cloud_region: None,
                endpoint: None,
                object_lock: None,
            },
            chain: Chain::new(bucket, key, group),
            tail: Tail::default(),
            time_ms: START,
            revision: 1,
            index: 0,
            files: Vec::new(),
            moments: Vec::new(),
            holds: Vec::new(),
        }
    }

    fn position(&self) -> Position {
        Position {
            term: 1,
            node: 7,
            index: self.index,
        }
    }

    async fn create(&mut self, entries: usize, closed: Option<Closed>, base: Option<Base>) {
        let header = Header {
            group: self.chain.group(),
            number: 0,
            previous: String::new(),
            term: 1,
            writer: "w".into(),
            last: Some(self.position()),
            entries: 0,
            state: Some(LinkState {
                revision: self.revision,
                time_ms: self.time_ms,
                digests: Digests::default(),
            }),
            written_ms: self.time_ms,
            closed,
            base,
        };
        let mut entry = self.position().to_bytes().to_vec();
        entry.push(0);
        let entries = vec![bytes::Bytes::from(entry); entries];
        let made = self
            .chain
            .create(&self.tail, header, &entries)
            .await
            .unwrap();
        let Created::Ours(tail) = made else {
            panic!("there is a link already");
        };
        self.tail = *tail;
    }

    async fn link(&mut self) {
        self.time_ms += self.rng.random_range(1..8 * HOUR);
        self.revision += self.rng.random_range(1..5);
        self.index += self.rng.random_range(1..4);
        self.create(1, None, None).await;
        self.moments.push((self.time_ms, self.revision));
    }

    async fn checkpoint(&mut self) {
        if self.tail.number == 0 {
            return;
        }
        let (bucket, group) = (self.chain.bucket().clone(), self.chain.group());
        if self.files.len() > 3 {
            let gone = self.rng.random_range(0..self.files.len());
            self.files.remove(gone);
        }
        let bytes: [u8; 32] = self.rng.random();
        self.files.push(checkpoint::ManifestFile {
            name: format!("{:06}.sst", self.index),
            length: 32,
            hash: blake3::hash(&bytes).to_hex().to_string(),
        });
        let object = file_path(group.tenant, &self.files.last().unwrap().hash);
        bucket
            .put(&object, PutPayload::from(bytes.to_vec()))
            .await
            .unwrap();
        let manifest = Manifest {
            format: checkpoint::FORMAT,
            group,
            link: self.tail.number,
            link_hash: self.tail.hash.clone(),
            position: self.position(),
            revision: self.revision,
            time_ms: self.time_ms,
            digests: Digests::default(),
            oldest: 0,
            files: self.files.clone(),
        };
        let name = format!("{:020}-{:08x}", manifest.link, self.rng.random::<u32>());
        let object = checkpoints_dir(group).join(name);
        let bytes = checkpoint::encode(self.chain.key(), &manifest);
        bucket.put(&object, PutPayload::from(bytes)).await.unwrap();
    }

    async fn plan(&self, point: Point) -> Result<Plan, RestoreError> {
        plan::at(&self.chain, &self.chain.end().await?, point).await
    }

    /// A restore in place to `point`, as the daemon does it.
    async fn go_back(&mut self, point: Point) {
        let Ok(plan) = self.plan(point).await else {
            return;
        };
        // Where it comes to: the last link that does not lie behind it.
        let mut headers: Vec<Header> = plan.links.iter().map(|l| l.header.clone()).collect();
        if let Until::Time(ms) = plan.until {
            headers.retain(|h| h.state.as_ref().is_some_and(|s| s.time_ms <= ms));
        }
        let own = plan.manifest.as_ref();
        let reached = headers.last().and_then(|h| h.last);
        let Some(position) = reached.or(own.map(|m| m.position)) else {
            return;
        };
        let from = plan.group.incarnation;
        let next = self.chain.group().incarnation + 1;
        let closed = Closed {
            incarnation: next,
            restore: "r".into(),
        };
        self.create(0, Some(closed), None).await;
        self.time_ms += self.rng.random_range(1..HOUR);
        let base = Base {
            incarnation: self.chain.group().incarnation,
            link: self.tail.number,
            position,
            revision: self.revision + 1_000_000_000,
            origin: Some(Origin {
                incarnation: from,
                revision: None,
                at_ms: self.time_ms,
            }),
        };
        self.chain = self.chain.of(next);
        self.tail = Tail::default();
        self.revision = base.revision;
        self.index = position.index + 1;
        self.create(0, None, Some(base)).await;
        self.moments.push((self.time_ms, self.revision));
    }

    async fn lose_a_file(&mut self) {
        let Some(file) = self.files.first().cloned() else {
            return;
        };
        let object = file_path(self.chain.group().tenant, &file.hash);
        let _ = self.chain.bucket().delete(&object).await;
        self.files.retain(|known| *known != file);
    }

    async fn hold(&mut self) {
        let (bucket, key) = (self.chain.bucket(), self.chain.key());
        let tenant = self.chain.group().tenant;
        let what = match self.holds.pop() {
            Some(hold) => What::Release(hold.id),
            None => {
                let hold = Hold {
                    id: "h".into(),
                    since_ms: self
                        .time_ms
                        .saturating_sub(self.rng.random_range(0..20 * DAY)),
                    reason: "a case".into(),
                };
                self.holds.push(hold.clone());
                What::Hold(hold)
            }
        };
        holds::add(bucket, key, tenant, self.time_ms, what)
            .await
            .unwrap();
    }

    /// The incarnation that a restore to `point` ends in; none if it cannot be made.
    async fn restorable(&self, point: Point) -> Option<u32> {
        let plan = self.plan(point).await.ok()?;
        if let Some(manifest) = plan.first_manifest() {
            for file in &manifest.files {
                let object = file_path(manifest.group.tenant, &file.hash);
                self.chain.bucket().head(&object).await.ok()?;
            }
        }
        Some(plan.group.incarnation)
    }

    async fn decided(&self, now_ms: u64, collect_after: Duration) -> Result<Sweep, RetentionError> {
        let policy = Policy {
            keep: Duration::from_millis(KEEP),
            checkpoints: 2,
            collect_after,
        };
        let known = self.tail.number;
        decide(&self.config, &self.chain, &policy, known, now_ms).await
    }

    async fn sweep(&self, now_ms: u64, collect_after: Duration) -> Sweep {
        let sweep = self.decided(now_ms, collect_after).await.unwrap();
        let left = run(&self.config, &self.chain, &sweep, &|_| {}).await;
        assert_eq!(left.unwrap(), Vec::<String>::new());
        sweep
    }

    fn points(&self) -> Vec<Point> {
        let each = self.moments.iter();
        let each = each.flat_map(|(ms, revision)| [Point::Time(*ms), Point::Revision(*revision)]);
        each.chain([Point::Newest]).collect()
    }

    /// Sweeps, and compares what can be restored before and after.
    async fn check(&mut self, seed: u64) -> usize {
        let now_ms = match self.rng.random_range(0..10) {
            0 => 0,
            1 => self.time_ms + 100 * 365 * DAY,
            _ => self.time_ms,
        };
        let mut before = Vec::new();
        for point in self.points() {
            before.push((point, self.restorable(point).await));
        }
        let decided = self.decided(now_ms, Duration::ZERO).await;
        if let Err(RetentionError::Incomplete(_)) = decided {
            // A file that was lost was its last checkpoint's.
            assert_eq!(before.last(), Some(&(Point::Newest, None)), "seed {seed}");
            return 0;
        }
        let sweep = self.sweep(now_ms, Duration::ZERO).await;
        let held = self.holds.iter().map(|hold| hold.since_ms).min();
        let horizon = now_ms.saturating_sub(KEEP).min(held.unwrap_or(u64::MAX));
        let inside = |point: &Point| match point {
            Point::Newest => true,
            Point::Time(ms) => *ms >= horizon,
            Point::Revision(revision) => {
                let at = self.moments.iter().find(|(_, r)| r == revision);
                at.is_some_and(|(ms, _)| *ms >= horizon)
            }
        };
        for (point, was) in before
            .iter()
            .filter(|(point, was)| was.is_some() && inside(point))
        {
            let is = self.restorable(*point).await;
            assert_eq!(is, *was, "seed {seed}, {point:?}, at {now_ms}: {sweep:?}");
        }
        sweep.links.len() + sweep.retired.len() + sweep.collected.len()
    }
}

#[tokio::test]
async fn whatever_is_inside_the_window_restores() {
    let mut deleted = 0;
    for seed in 0..60 {
        let mut model = Model::new(seed);
        for _ in 0..150 {
            match model.rng.random_range(0..100) {
                0..66 => model.link().await,
                66..80 => model.checkpoint().await,
                80..83 => {
                    let known = model.moments.len();
                    if known > 0 {
                        let at = model.rng.random_range(0..known);
                        let (ms, revision) = model.moments[at];
                        let point = match model.rng.random_range(0..3) {
                            0 => Point::Newest,
                            1 => Point::Time(ms),
                            _ => Point::Revision(revision),
                        };
                        model.go_back(point).await;
                    }
                }
                83..86 => model.lose_a_file().await,
                86..89 => model.hold().await,
                _ => deleted += model.check(seed).await,
            }
        }
        deleted += model.check(seed).await;
    }
    assert!(
        deleted > 1000,
        "{deleted} objects went: the model tests nothing"
    );
}

#[tokio::test]
async fn nothing_outside_the_window_stays_and_files_wait_for_their_time() {
    let mut model = Model::new(1);
    for _ in 0..20 {
        for _ in 0..10 {
            model.link().await;
        }
        model.checkpoint().await;
    }
    let newest = model.tail.number;
    let much = Duration::from_secs(3600);
    let first = model.sweep(model.time_ms, much).await;
    assert!(
        !first.links.is_empty() && !first.retired.is_empty(),
        "{first:?}"
    );
    assert!(
        first.collected.is_empty(),
        "files stay for a while: {first:?}"
    );
    // Retired manifests and the files that only they list.
    let second = model.sweep(u64::MAX / 2, Duration::ZERO).await;
    assert!(second.collected.len() > first.retired.len(), "{second:?}");
    // The clock is far ahead: two checkpoints and the links from the older one on are left.
    let left = model.chain.numbers(0).await.unwrap();
    assert_eq!(left, (newest - 10..=newest).collect::<Vec<_>>());
    let manifests = checkpoint::list(model.chain.bucket(), model.chain.group()).await;
    assert_eq!(manifests.unwrap().len(), 2);
    let third = model.sweep(u64::MAX / 2, Duration::ZERO).await;
    assert!(third.collected.len() <= second.retired.len() + model.files.len());
    let fourth = model.sweep(u64::MAX / 2, Duration::ZERO).await;
    assert!(fourth.is_empty(), "{fourth:?}");
    assert!(model.restorable(Point::Newest).await.is_some());
}

#[tokio::test]
async fn a_manifest_that_does_not_read_keeps_all_files_and_a_closed_chain_everything() {
    let mut model = Model::new(2);
    for _ in 0..5 {
        model.link().await;
        model.checkpoint().await;
    }
    let manifests = checkpoint::list(model.chain.bucket(), model.chain.group()).await;
    let newest = manifests.unwrap()[0].clone();
    let bad = PutPayload::from_static(b"damaged");
    model.chain.bucket().put(&newest, bad).await.unwrap();
    let orphan = file_path(model.chain.group().tenant, "ab");
    let put = model
        .chain
        .bucket()
        .put(&orphan, PutPayload::from_static(b"x"));
    put.await.unwrap();
    let swept = model.sweep(u64::MAX / 2, Duration::ZERO).await;
    assert_eq!(swept.unreadable, [newest.to_string()]);
    assert!(swept.collected.is_empty());
    let closed = Closed {
        incarnation: 2,
        restore: "r".into(),
    };
    model.create(0, Some(closed), None).await;
    let refused = run(&model.config, &model.chain, &Sweep::default(), &|_| {}).await;
    assert!(matches!(
        refused,
        Err(RetentionError::Chain(ChainError::Closed(2)))
    ));
}

#[tokio::test]
async fn a_checkpoint_that_leads_over_a_gap_stays() {
    let mut model = Model::new(3);
    let mut made = Vec::new();
    for round in 0..5 {
        for _ in 0..2 {
            model.time_ms += 1_000;
            model.index += 1;
            model.create(1, None, None).await;
        }
        if round == 2 {
            model.index += 100;
        }
        model.checkpoint().await;
        let all = checkpoint::list(model.chain.bucket(), model.chain.group()).await;
        made.push(all.unwrap()[0].to_string());
        if round == 2 {
            // It stands for entries that were purged before they were archived.
            model.create(0, None, None).await;
        }
    }
    // Of one day: the first, the newest two, and the one that leads over the gap.
    let swept = model.sweep(model.time_ms, Duration::ZERO).await;
    assert_eq!(swept.retired, [made[1].clone()], "{made:?}");
    assert!(model.restorable(Point::Newest).await.is_some());
}

#[tokio::test]
async fn a_retirement_that_was_cut_short_is_decided_anew() {
    let mut model = Model::new(4);
    for _ in 0..6 {
        model.link().await;
        model.checkpoint().await;
    }
    let (bucket, group) = (model.chain.bucket().clone(), model.chain.group());
    let manifests = checkpoint::list(&bucket, group).await.unwrap();
    // The newest lies in both places: whoever retired it died, and it is needed since.
    let to = retired_dir(group).join(manifests[0].filename().unwrap());
    let bytes = bucket.get(&manifests[0]).await.unwrap().bytes().await;
    bucket.put(&to, bytes.unwrap().into()).await.unwrap();
    model.sweep(u64::MAX / 2, Duration::ZERO).await;
    let left = checkpoint::list(&bucket, group).await.unwrap();
    assert!(left.contains(&manifests[0]), "{left:?}");
    assert!(model.restorable(Point::Newest).await.is_some());
}

#[tokio::test]
async fn nothing_goes_from_an_archive_that_cannot_be_restored() {
    let mut model = Model::new(5);
    for _ in 0..10 {
        model.link().await;
        model.checkpoint().await;
    }
    model.sweep(u64::MAX / 2, Duration::ZERO).await;
    // Somebody deletes every manifest; the chain does not begin at its first link any more.
    let (bucket, group) = (model.chain.bucket().clone(), model.chain.group());
    for object in checkpoint::list(&bucket, group).await.unwrap() {
        bucket.delete(&object).await.unwrap();
    }
    let decided = model.decided(u64::MAX / 2, Duration::ZERO).await;
    assert!(
        matches!(decided, Err(RetentionError::Incomplete(_))),
        "{decided:?}"
    );
    // Or the newest links.
    let mut model = Model::new(6);
    model.link().await;
    model.tail.number += 1;
    let decided = model.decided(u64::MAX / 2, Duration::ZERO).await;
    assert!(
        matches!(decided, Err(RetentionError::Incomplete(_))),
        "{decided:?}"
    );
}
