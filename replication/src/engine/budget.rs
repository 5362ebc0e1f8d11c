//! What the engines of a node share: a bound on their memtables, and how files are ciphered.
//!
//! RocksDB, at the bound, writes out the memtables of the engine that is written to, and of no other: idle
//! engines would keep their share for ever, and a busy one would write a small table with each batch until
//! it stalls. So the node has the largest memtables written out at half of the bound, whoever they are of.

use std::sync::{Arc, Weak};

use rocksdb::WriteBufferManager;

use super::{Ciphering, Engine, EngineError};

/// What all engines of a node share.
pub struct Budget {
    pub(super) write_buffers: WriteBufferManager,
    pub(super) cache_bytes: usize,
    pub ciphering: Ciphering,
    /// Tables are compacted as they gather.
    pub(super) compacts: bool,
}

impl Budget {
    /// `write_bytes` bounds all memtables of the node together; `cache_bytes` one tenant's cache.
    pub fn new(write_bytes: usize, cache_bytes: usize, ciphering: Ciphering) -> Arc<Self> {
        Arc::new(Budget {
            write_buffers: WriteBufferManager::new_write_buffer_manager(write_bytes, false),
            cache_bytes,
            ciphering,
            compacts: true,
        })
    }

    /// Of an engine that is read once and removed: it compacts nothing, which RocksDB would do on
    /// threads that the node's other engines share.
    pub fn passing(write_bytes: usize, cache_bytes: usize) -> Arc<Self> {
        Arc::new(Budget {
            write_buffers: WriteBufferManager::new_write_buffer_manager(write_bytes, false),
            cache_bytes,
            ciphering: Ciphering::Encrypted,
            compacts: false,
        })
    }

    /// The same, for an engine that is closed before a compaction is done: whoever opens its files next
    /// compacts them.
    pub fn briefly(&self) -> Arc<Self> {
        Arc::new(Budget {
            write_buffers: self.write_buffers.clone(),
            compacts: false,
            ..*self
        })
    }

    /// Bytes of memtables above half of the bound.
    pub fn excess(&self) -> u64 {
        let half = self.write_buffers.get_buffer_size() / 2;
        self.write_buffers.get_usage().saturating_sub(half) as u64
    }
}

/// Memtables below this free little: an empty one has a filter and its first block.
const LEAST: u64 = 1 << 20;

/// Writes out the largest memtables of `engines`, until `excess` bytes of them are. Blocking. One that
/// fails does not hold up the others; answers the first failure. It holds one engine at a time: sealing a
/// tenant waits for its engine to be let go.
pub fn relieve(engines: Vec<Arc<Engine>>, excess: u64) -> Result<(), EngineError> {
    let mut failed = Ok(());
    let sized = engines.into_iter().map(|engine| {
        let bytes = engine.memtables().unwrap_or(0);
        (bytes, Arc::downgrade(&engine))
    });
    let mut sized: Vec<(u64, Weak<Engine>)> = sized.collect();
    sized.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let mut written = 0;
    for (bytes, engine) in sized {
        if written >= excess || bytes < LEAST {
            break;
        }
        let Some(engine) = engine.upgrade() else {
            continue;
        };
        match engine.flush() {
            Ok(()) => written += bytes,
            Err(e) => failed = failed.and(Err(e)),
        }
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Cf;
    use kms::{Secret, TenantId, TenantKeys};
    use rocksdb::WriteBatch;

    fn engine(dir: &std::path::Path, budget: &Budget) -> Arc<Engine> {
        let key = Secret::random();
        let keys = TenantKeys::new(TenantId([1; 16]), Secret::random(), [(1, key)]);
        Arc::new(Engine::open(dir, Arc::new(keys), budget).unwrap())
    }

    fn put(engine: &Engine, n: usize, bytes: usize) {
        let mut batch = WriteBatch::default();
        batch.put_cf(engine.cf(Cf::Kv), n.to_be_bytes(), vec![7u8; bytes]);
        engine.write(batch).unwrap();
    }

    /// Tables that 200 small puts leave behind, while other engines hold all of the budget.
    fn tables_beside_idle_engines(is_relieved: bool) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let budget = Budget::new(16 << 20, 1 << 20, Ciphering::Encrypted);
        let idle: Vec<_> = (0..8)
            .map(|n| engine(&dir.path().join(n.to_string()), &budget))
            .collect();
        for engine in &idle {
            (0..2).for_each(|n| put(engine, n, 1 << 20));
        }
        let busy = engine(&dir.path().join("busy"), &budget);
        let mut all = idle.clone();
        all.push(busy.clone());
        if is_relieved {
            assert!(budget.excess() > 0, "the idle engines hold little");
            relieve(all, budget.excess()).unwrap();
        }
        for n in 0..200 {
            put(&busy, n, 100);
        }
        busy.db().live_files().unwrap().len()
    }

    #[test]
    fn idle_engines_do_not_make_a_busy_one_write_small_tables() {
        let without = tables_beside_idle_engines(false);
        let with = tables_beside_idle_engines(true);
        assert!(
            with == 0 && without > 1,
            "{with} tables; {without} if nobody looks"
        );
    }
}
