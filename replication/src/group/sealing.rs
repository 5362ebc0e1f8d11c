//! A replica with its tenant's key, and without it: sealed.
//!
//! Invariants. The engine, and every key in clear, exists only between `unseal` and `seal`. A sealed
//! replica goes on in its group: committed entries pass unapplied, snapshots are kept as files,
//! nothing is purged, so that what was acknowledged reaches the archive and all of it is applied when
//! the key is back. Whoever applies, lets pass, opens or closes holds one lock, so that each entry
//! that has passed is applied once, in order. Sealing is over when engine and keys are gone from
//! memory.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kms::TenantKeys;
use openraft::EntryPayload;
use parking_lot::RwLock;
use tokio::sync::{OwnedMutexGuard, watch};

use super::replica::ReplicaDir;
use super::rewriting::Counted;
use super::types::{
    Entry, LogId, StoredMembership, decode_entry, decode_membership, log_id, machine_entry,
};
use crate::GroupId;
use crate::engine::env::{generations, missing_generation};
use crate::engine::{Budget, Engine, EngineError};
use crate::log::LogReader;
use crate::machine::{Machine, State, Store};
use crate::proto::command::Reply;

/// Entries applied at once when the key is back.
const REPLAY: usize = 4 << 20;
/// Readers finish, and a checkpoint under way is made, before the engine is gone.
const GONE_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(2);

/// The last entry that passed, and the membership there. Kept while sealed only.
#[derive(Clone, Default)]
pub struct Passed {
    pub position: Option<LogId>,
    pub membership: StoredMembership,
}

/// One replica of a tenant.
pub struct Replica {
    pub group: GroupId,
    pub dir: ReplicaDir,
    pub budget: Arc<Budget>,
    pub store: Arc<Store>,
    pub log: LogReader,
    /// One snapshot is made or installed at a time.
    pub snapshots: parking_lot::Mutex<()>,
    machine: RwLock<Option<Arc<Machine>>>,
    passed: Arc<tokio::sync::Mutex<Passed>>,
    /// Why the tenant is sealed here; none while it is not.
    sealed: watch::Sender<Option<Arc<str>>>,
    /// What was taken away last.
    closing: parking_lot::Mutex<(Weak<Engine>, Weak<TenantKeys>)>,
    /// Keys that something beside the machine holds for a while; it stops when the tenant is sealed.
    lent: parking_lot::Mutex<Vec<Weak<TenantKeys>>>,
    pub(super) counted: parking_lot::Mutex<Option<Counted>>,
    /// It is not opened again.
    ended: AtomicBool,
}

/// Why the files in `path` cannot be opened with `keys`; none if they can.
pub(super) fn lacks(path: &Path, keys: &TenantKeys) -> Option<String> {
    match missing_generation(path, keys) {
        Ok(None) => None,
        Ok(Some(generation)) => Some(not_here(generation)),
        Err(e) => Some(e.to_string()),
    }
}

fn not_here(generation: u32) -> String {
    format!("its key generation {generation} is not on this node yet")
}

/// The position and membership that an engine stands at.
fn applied(engine: &Engine) -> Result<Passed, EngineError> {
    let membership = match State::read_membership(engine)? {
        Some(bytes) => {
            decode_membership(&bytes).ok_or(EngineError::Damaged("the stored membership"))?
        }
        None => StoredMembership::default(),
    };
    Ok(Passed {
        position: State::read(engine)?.applied.map(log_id),
        membership,
    })
}

impl Replica {
    /// Opens the replica in `dir` with its keys, or sealed, with the reason.
    pub fn open(
        group: GroupId,
        dir: ReplicaDir,
        budget: Arc<Budget>,
        log: LogReader,
        keys: Result<Arc<TenantKeys>, String>,
    ) -> io::Result<Arc<Self>> {
        // A sealed replica begins where its last checkpoint stands; the log holds what follows.
        let snapshot = dir.snapshot()?.map(|found| found.meta);
        let mut passed = snapshot.map_or_else(Passed::default, |meta| Passed {
            position: meta.last_log_id,
            membership: meta.last_membership,
        });
        passed.position = passed.position.max(log.purged().map(log_id));
        let replica = Arc::new(Replica {
            group,
            dir,
            budget,
            store: Arc::new(Store::sealed()),
            log,
            snapshots: parking_lot::Mutex::new(()),
            machine: RwLock::new(None),
            passed: Arc::new(tokio::sync::Mutex::new(passed)),
            sealed: watch::Sender::new(None),
            closing: parking_lot::Mutex::default(),
            lent: parking_lot::Mutex::default(),
            counted: parking_lot::Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let keys = keys.and_then(|keys| {
            let path = replica.dir.engine().map_err(|e| e.to_string())?;
            match path.is_dir() {
                true => lacks(&path, &keys).map_or(Ok(keys), Err),
                false => Ok(keys),
            }
        });
        match keys {
            Ok(keys) => {
                let machine = replica.open_engine(keys)?;
                *replica.machine.write() = Some(machine);
            }
            Err(why) => drop(replica.sealed.send_replace(Some(why.into()))),
        }
        Ok(replica)
    }

    fn open_engine(&self, keys: Arc<TenantKeys>) -> Result<Arc<Machine>, EngineError> {
        let path = self.dir.engine().map_err(io_error)?;
        let files = match path.is_dir() {
            true => generations(&path).map_err(io_error)?,
            false => BTreeMap::new(),
        };
        // What was said of the key may be older than what was done with it here.
        let newest = files.last_key_value().map(|(generation, _)| *generation);
        for generation in newest.into_iter().chain(self.last_generation()) {
            keys.seal_under(generation);
        }
        let engine = Engine::open(&path, keys.clone(), &self.budget)?;
        self.store.replace(engine)?;
        Ok(Arc::new(Machine::new(self.store.clone(), keys, self.group)))
    }

    /// What applies entries here; none while the tenant is sealed.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        self.machine.read().clone()
    }

    /// Why the tenant is sealed here; none while it is not.
    pub fn sealed(&self) -> Option<Arc<str>> {
        self.sealed.borrow().clone()
    }

    pub fn watch_sealed(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.sealed.subscribe()
    }

    pub async fn applied(&self) -> Result<Passed, EngineError> {
        let passed = self.passed.lock().await;
        match self.machine() {
            Some(_) => applied(&*self.store.engine()?),
            None => Ok(passed.clone()),
        }
    }

    /// Applies committed entries, or lets them pass; answers the replies of each, which a sealed
    /// replica has not.
    pub async fn apply(&self, entries: Vec<Entry>) -> io::Result<Vec<Vec<Reply>>> {
        let mut passed = self.passed.lock().await;
        let count = entries.len();
        let mut after = Passed::default();
        for entry in &entries {
            after.position = Some(entry.log_id);
            if let EntryPayload::Membership(membership) = &entry.payload {
                after.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
        }
        if let Some(machine) = self.machine() {
            let entries = entries.into_iter().map(machine_entry).collect();
            let failed = match machine.apply(entries) {
                Ok(replies) => return Ok(replies),
                Err(failed) => failed,
            };
            drop(machine);
            let Some(generation) = failed.missing_generation() else {
                tracing::error!(group = %self.group, error = %failed, "this replica cannot apply an entry: it stops here");
                return Err(io::Error::other(failed.to_string()));
            };
            self.park(&not_here(generation), &mut passed)?;
        }
        passed.position = after.position;
        if after.membership.log_id().is_some() {
            passed.membership = after.membership;
        }
        self.store
            .pass(passed.position.as_ref().map(super::types::position));
        Ok(vec![Vec::new(); count])
    }

    /// Takes engine and keys away. What is left of them until their last user is done is in
    /// `closing`.
    pub fn park(&self, why: &str, passed: &mut Passed) -> Result<(), EngineError> {
        self.sealed.send_replace(Some(why.into()));
        let engine = self.store.engine()?;
        *passed = applied(&engine)?;
        let machine = self.machine.write().take();
        let keys = machine.as_ref().map(|m| Arc::downgrade(m.keys()));
        *self.closing.lock() = (Arc::downgrade(&engine), keys.unwrap_or_default());
        self.store.close();
        self.store
            .pass(passed.position.as_ref().map(super::types::position));
        engine.stop();
        // Closing RocksDB waits for its threads: not on one that serves others.
        drop(std::thread::spawn(move || drop((engine, machine))));
        Ok(())
    }

    /// Seals the tenant on this node; answers whether engine and keys are gone from memory.
    pub async fn seal(&self, why: &str) -> bool {
        // From here on nothing new is asked of the engine.
        self.sealed.send_replace(Some(why.into()));
        let mut passed = self.passed.clone().lock_owned().await;
        if self.machine().is_some()
            && let Err(e) = self.park(why, &mut passed)
        {
            tracing::error!(group = %self.group, error = %e, "the engine's position cannot be read: this replica cannot be sealed in good order, and the process ends");
            std::process::abort();
        }
        drop(passed);
        let started = Instant::now();
        loop {
            let (engine, keys) = self.closing.lock().clone();
            let lent = self.lent.lock().iter().any(|lent| lent.strong_count() > 0);
            if engine.strong_count() + keys.strong_count() == 0 && !lent {
                return true;
            }
            if started.elapsed() > GONE_WITHIN {
                tracing::error!(group = %self.group, "ALARM: the tenant is sealed, but a reader still holds its engine or keys in memory");
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Notes keys that are in use beside the machine: sealing is not over before they are gone.
    pub fn lend(&self, keys: &Arc<TenantKeys>) {
        let mut lent = self.lent.lock();
        lent.retain(|lent| lent.strong_count() > 0);
        lent.push(Arc::downgrade(keys));
    }

    /// Seals it for good: its directory is about to be another replica's.
    pub async fn end(&self, why: &str) -> bool {
        {
            let _passed = self.passed.lock().await;
            self.ended.store(true, Ordering::Release);
        }
        self.seal(why).await
    }

    /// Opens a sealed replica and applies what has passed meanwhile.
    pub async fn unseal(self: &Arc<Self>, keys: Arc<TenantKeys>) -> io::Result<()> {
        let passed = self.passed.clone().lock_owned().await;
        if self.ended.load(Ordering::Acquire) {
            return Err(io::Error::other("another replica takes its place"));
        }
        if self.machine().is_none() {
            let replica = self.clone();
            let opened = tokio::task::spawn_blocking(move || replica.catch_up(keys, passed));
            opened.await.map_err(io::Error::other)??;
        }
        Ok(())
    }

    fn catch_up(&self, keys: Arc<TenantKeys>, passed: OwnedMutexGuard<Passed>) -> io::Result<()> {
        let path = self.dir.engine()?;
        if let Some(why) = path.is_dir().then(|| lacks(&path, &keys)).flatten() {
            return Err(io::Error::other(why));
        }
        let machine = self.open_engine(keys)?;
        let done = self.replay(&machine, passed.position.map_or(0, |at| at.index));
        match &done {
            Ok(()) => {
                *self.machine.write() = Some(machine);
                // Under the lock: apply may seal again right after.
                self.sealed.send_replace(None);
            }
            Err(_) => {
                self.store.close();
                self.store
                    .pass(passed.position.as_ref().map(super::types::position));
            }
        }
        done
    }

    fn replay(&self, machine: &Machine, end: u64) -> io::Result<()> {
        loop {
            let applied = self.store.state().applied;
            if end == 0 || applied.is_some_and(|at| at.index >= end) {
                return Ok(());
            }
            let start = applied.map_or(0, |at| at.index + 1);
            let read = self.log.read(start, end + 1, REPLAY)?;
            let first = read.first().map(|(at, _)| at.index);
            if first != Some(start) {
                return Err(io::Error::other(format!(
                    "entry {start}, which has passed, is not in the log"
                )));
            }
            let entries = read.iter().map(|(at, bytes)| {
                decode_entry(bytes)
                    .map(machine_entry)
                    .ok_or_else(|| io::Error::other(format!("log entry {at} does not parse")))
            });
            let entries: io::Result<Vec<_>> = entries.collect();
            machine
                .apply(entries?)
                .map_err(|e| io::Error::other(e.to_string()))?;
        }
    }

    /// Holds off applying, passing, sealing and unsealing. Blocking.
    pub fn hold(&self) -> OwnedMutexGuard<Passed> {
        self.passed.clone().blocking_lock_owned()
    }
}

fn io_error(e: io::Error) -> EngineError {
    EngineError::Io(e.to_string())
}
