//! Moving a replica to the key generation that seals, so that older ones can be destroyed.
//!
//! Invariants. Reads and writes go on while tables are written anew; apply is held only while a copy
//! of the engine, all of whose files are new, takes its place. What is left under an older generation
//! is counted from the files and log entries themselves.

use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::replica::sync_dir;
use super::sealing::Replica;
use super::types::{decode_entry, machine_entry};
use crate::Position;
use crate::engine::env::generations;
use crate::engine::{Engine, EngineError};
use crate::machine::Payload;

/// Log entries read at once.
const READ: usize = 4 << 20;
/// Entries looked at for the generation of the newest.
const LAST: u64 = 32;
const FRESH: Duration = Duration::from_millis(500);
/// A purge behind a checkpoint that takes longer was put off.
const PURGED_WITHIN: Duration = Duration::from_secs(5);

/// What a replica keeps, and how much of it is under generations before the one asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Older {
    /// Bytes of all files, of those under older generations, and of those of the engine and of the
    /// snapshot.
    pub of_bytes: u64,
    pub bytes: u64,
    pub engine_bytes: u64,
    pub snapshot_bytes: u64,
    /// Entries of the log, and the last of them.
    pub entries: u64,
    pub last_entry: u64,
}

impl Older {
    /// Whether nothing here needs an older generation.
    pub fn is_none(&self) -> bool {
        self.bytes == 0 && self.entries == 0
    }
}

/// A count, of which generation and when.
pub type Counted = (u32, Instant, Older);

/// The generation that a log entry is sealed under; none if it holds no commands.
fn generation_of(position: Position, bytes: &bytes::Bytes) -> io::Result<Option<u32>> {
    let entry = decode_entry(bytes);
    let entry =
        entry.ok_or_else(|| io::Error::other(format!("log entry {position} does not parse")))?;
    match machine_entry(entry).payload {
        Payload::Sealed(sealed) => {
            let under = kms::seal::generation_of(&sealed).map_err(io::Error::other)?;
            Ok(Some(under))
        }
        _ => Ok(None),
    }
}

impl Replica {
    /// Counts what is under generations before `generation`. One count at a time, which serves for
    /// `FRESH`. Blocking.
    pub fn older(&self, generation: u32) -> io::Result<Older> {
        let mut counted = self.counted.lock();
        if let Some((of, at, older)) = *counted
            && of == generation
            && at.elapsed() < FRESH
        {
            return Ok(older);
        }
        let older = self.count(generation)?;
        *counted = Some((generation, Instant::now(), older));
        Ok(older)
    }

    fn count(&self, generation: u32) -> io::Result<Older> {
        let mut older = Older::default();
        let engine = self.dir.engine()?;
        let snapshot = self.dir.snapshot()?.map(|found| found.dir);
        for dir in self.dir.all()? {
            let found = match generations(&dir) {
                Ok(found) => found,
                // A snapshot that has just been replaced.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            for (under, bytes) in found {
                older.of_bytes += bytes;
                if under < generation {
                    older.bytes += bytes;
                    older.engine_bytes += if dir == engine { bytes } else { 0 };
                    older.snapshot_bytes += if Some(&dir) == snapshot.as_ref() {
                        bytes
                    } else {
                        0
                    };
                }
            }
        }
        let mut at = 0;
        while let Some(last) = self.log.last().filter(|last| last.index >= at) {
            // It may be purged meanwhile.
            at = at.max(self.log.purged().map_or(0, |purged| purged.index + 1));
            let read = self.log.read(at, last.index + 1, READ)?;
            for (position, bytes) in &read {
                if generation_of(*position, bytes)?.is_some_and(|under| under < generation) {
                    older.entries += 1;
                    older.last_entry = position.index;
                }
                at = position.index + 1;
            }
            let purged = self.log.purged().map_or(0, |purged| purged.index);
            if read.is_empty() && purged < at && self.log.last() == Some(last) {
                break;
            }
        }
        Ok(older)
    }

    /// The generation that the newest entries of the log are under, if they hold commands.
    pub(super) fn last_generation(&self) -> Option<u32> {
        let last = self.log.last()?.index;
        let first = self.log.purged().map_or(0, |purged| purged.index + 1);
        let first = first.max(last.saturating_sub(LAST));
        let read = self.log.read(first, last + 1, READ);
        let under = read.ok()?.into_iter().rev();
        let mut under = under.filter_map(|(at, bytes)| generation_of(at, &bytes).ok().flatten());
        under.next()
    }

    /// Whether a checkpoint made now would let go of some of it.
    pub fn checkpoint_helps(&self, older: &Older) -> io::Result<bool> {
        let snapshot = self.dir.snapshot()?;
        let age = snapshot.as_ref().and_then(|found| {
            let made = std::fs::metadata(&found.dir).and_then(|meta| meta.modified());
            made.ok()?.elapsed().ok()
        });
        let at = snapshot.and_then(|found| found.meta.last_log_id);
        let at = at.map_or(0, |id| id.index);
        // A purge that openraft has put off is taken up again behind a newer one.
        let put_off = age.is_some_and(|age| age > PURGED_WITHIN);
        Ok(older.snapshot_bytes > 0 || older.entries > 0 && (at < older.last_entry || put_off))
    }

    /// Writes every file of the engine that is under a generation before `generation` anew, under the
    /// one that seals. Blocking.
    pub fn rewrite(&self, generation: u32) -> io::Result<()> {
        *self.counted.lock() = None;
        self.store.engine()?.rewrite_tables(generation)?;
        let _passed = self.hold();
        let _one = self.snapshots.lock();
        let machine = self.machine().ok_or(EngineError::Sealed)?;
        // Its tables are linked; everything else is written.
        let scratch = self.dir.scratch("rewritten");
        let _ = std::fs::remove_dir_all(&scratch);
        self.store.engine()?.checkpoint(&scratch)?;
        // It writes its options anew, and would keep the older ones beside them.
        for entry in std::fs::read_dir(&scratch)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("OPTIONS-") {
                std::fs::remove_file(entry.path())?;
            }
        }
        let (number, path) = self.dir.next_engine(&scratch)?;
        let engine = Engine::open(&path, machine.keys().clone(), &self.budget)?;
        sync_dir(&path)?;
        let before = self.dir.use_engine(number)?;
        self.store.replace(engine)?;
        let _ = std::fs::remove_dir_all(before);
        let _ = std::fs::remove_dir_all(scratch);
        *self.counted.lock() = None;
        Ok(())
    }
}
