//! What a put must know of the record that it replaces, for keys that were written lately: a point
//! read of RocksDB costs more than all the rest of a put.
//!
//! Invariant. An entry is what the engine will hold once the batch being applied is written: it
//! changes with every put and delete, and all go when a batch fails or the engine is replaced.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crate::engine::Engine;
use crate::mvcc::digest::Digest;

/// Longer keys are read from RocksDB each time.
const MAX_KEY: usize = 256;
/// Keys of one tenant, about 150 bytes each.
const CAPACITY: usize = 128 << 10;
/// Keys of all tenants of the process: 150 MB.
const TOTAL: usize = 1 << 20;
static CACHED: AtomicUsize = AtomicUsize::new(0);

/// The latest version of a live key, without its value.
#[derive(Clone, Copy)]
pub struct Known {
    pub create: i64,
    pub version: i64,
    /// Of the whole record, as the digest counts it.
    pub hash: Digest,
}

#[derive(Default)]
pub struct Latest {
    of: Weak<Engine>,
    keys: HashMap<Box<[u8]>, Known>,
}

impl Latest {
    /// Lets go of everything if `engine` is not the one that the entries are of.
    pub fn bind(&mut self, engine: &Arc<Engine>) {
        let of = Arc::downgrade(engine);
        if !Weak::ptr_eq(&self.of, &of) {
            self.clear();
            self.of = of;
        }
    }

    pub fn get(&self, key: &[u8]) -> Option<Known> {
        self.keys.get(key).copied()
    }

    pub fn put(&mut self, key: &[u8], known: Known) {
        if let Some(entry) = self.keys.get_mut(key) {
            *entry = known;
            return;
        }
        if key.len() > MAX_KEY {
            return;
        }
        // All at once: what is written again is back after one read each.
        if self.keys.len() >= CAPACITY || CACHED.load(Ordering::Relaxed) >= TOTAL {
            self.clear();
        }
        self.keys.insert(key.into(), known);
        CACHED.fetch_add(1, Ordering::Relaxed);
    }

    pub fn remove(&mut self, key: &[u8]) {
        if self.keys.remove(key).is_some() {
            CACHED.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub fn clear(&mut self) {
        CACHED.fetch_sub(self.keys.len(), Ordering::Relaxed);
        self.keys = HashMap::new();
    }
}

impl Drop for Latest {
    fn drop(&mut self) {
        self.clear();
    }
}
