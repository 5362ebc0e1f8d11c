//! Moving a replica to the key generation that seals, so that older ones can be destroyed.
//!
//! Invariants. Reads and writes go on while tables are written anew; apply is held only while a copy
//! of the engine, all of whose files are new, takes its place. What is left under an older generation
//! is counted from the files and log entries themselves.

use std::io;

use serde::{Deserialize, Serialize};

use super::replica::sync_dir;
use super::sealing::Replica;
use super::types::{decode_entry, machine_entry};
use crate::engine::env::generations;
use crate::engine::{Engine, EngineError};
use crate::machine::Payload;

/// Log entries read at once.
const READ: usize = 4 << 20;

/// What a replica keeps, and how much of it is under generations before the one asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Older {
    /// Bytes of all files, of those under older generations, and of those of the engine.
    pub of_bytes: u64,
    pub bytes: u64,
    pub engine_bytes: u64,
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

impl Replica {
    /// Counts what is under generations before `generation`. Blocking.
    pub fn older(&self, generation: u32) -> io::Result<Older> {
        let mut older = Older::default();
        let engine = self.dir.engine()?;
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
                }
            }
        }
        let mut at = self.log.purged().map_or(0, |purged| purged.index + 1);
        loop {
            let read = self.log.read(at, u64::MAX, READ)?;
            let Some((last, _)) = read.last() else {
                return Ok(older);
            };
            at = last.index + 1;
            for (position, bytes) in &read {
                let entry = decode_entry(bytes);
                let entry = entry.ok_or_else(|| {
                    io::Error::other(format!("log entry {position} does not parse"))
                })?;
                if let Payload::Sealed(sealed) = machine_entry(entry).payload {
                    let under = kms::seal::generation_of(&sealed).map_err(io::Error::other)?;
                    if under < generation {
                        older.entries += 1;
                        older.last_entry = position.index;
                    }
                }
            }
        }
    }

    /// Whether a checkpoint made now would let go of some of it.
    pub fn checkpoint_helps(&self, older: &Older) -> io::Result<bool> {
        let at = self
            .dir
            .snapshot()?
            .and_then(|found| found.meta.last_log_id);
        let at = at.map_or(0, |id| id.index);
        Ok(older.bytes > 0 || older.entries > 0 && at < older.last_entry)
    }

    /// Writes every file of the engine anew, under the generation that seals. Blocking.
    pub fn rewrite(&self) -> io::Result<()> {
        self.store.engine()?.rewrite_tables();
        let _passed = self.hold();
        let _one = self.snapshots.lock();
        let machine = self.machine().ok_or(EngineError::Sealed)?;
        // Its tables are linked; everything else is written.
        let scratch = self.dir.scratch("rewritten");
        let _ = std::fs::remove_dir_all(&scratch);
        self.store.engine()?.checkpoint(&scratch)?;
        let (number, path) = self.dir.next_engine(&scratch)?;
        let engine = Engine::open(&path, machine.keys().clone(), &self.budget)?;
        sync_dir(&path)?;
        let before = self.dir.use_engine(number)?;
        self.store.replace(engine)?;
        let _ = std::fs::remove_dir_all(before);
        let _ = std::fs::remove_dir_all(scratch);
        Ok(())
    }
}
