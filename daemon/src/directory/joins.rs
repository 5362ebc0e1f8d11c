//! When the other nodes join what was restored on this one.
//!
//! A restored tenant can be read at once, and written once others hold it. Filling them takes more of the
//! machines than restoring does, so while a region is restored a tier's tenants are joined only when all of
//! them can be read, and none waits longer than `MOST`. A directory that was restored with them goes with the
//! first tier: from then on the other nodes open replicas. What was not restored now waits for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kms::TenantId;
use parking_lot::Mutex;

use super::records::{TenantRecord, Tier};

/// The longest that a tenant which can be read waits for a second replica.
const MOST: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Joins(Mutex<Option<Held>>);

struct Held {
    since: Instant,
    directory: bool,
    tiers: BTreeMap<Tier, Waiting>,
}

#[derive(Default)]
struct Waiting {
    all: BTreeSet<TenantId>,
    /// Not restored yet.
    left: BTreeSet<TenantId>,
}

/// While it lives, joins wait for their tier.
pub struct Hold<'a>(&'a Joins);

impl Joins {
    /// Has those of the directory wait, if it is restored too.
    pub fn hold(&self, directory: bool) -> Hold<'_> {
        *self.0.lock() = Some(Held {
            since: Instant::now(),
            directory,
            tiers: BTreeMap::new(),
        });
        Hold(self)
    }

    /// A tenant is restored, or refused: it holds up its tier no longer.
    pub fn restored(&self, record: &TenantRecord) {
        let mut now = self.0.lock();
        let Some(held) = now.as_mut() else { return };
        if let Some(waiting) = held.tiers.get_mut(&record.tier) {
            waiting.left.remove(&record.id);
            if waiting.left.is_empty() {
                held.tiers.remove(&record.tier);
                held.directory = false;
            }
        }
    }

    fn waits(&self, held: impl Fn(&Held) -> bool) -> bool {
        let now = self.0.lock();
        now.as_ref()
            .is_some_and(|now| now.since.elapsed() < MOST && held(now))
    }

    pub fn tenant_waits(&self, record: &TenantRecord) -> bool {
        let waits = |tier: &Waiting| tier.all.contains(&record.id);
        self.waits(|held| held.tiers.get(&record.tier).is_some_and(waits))
    }

    pub fn directory_waits(&self) -> bool {
        self.waits(|held| held.directory)
    }
}

impl Hold<'_> {
    /// Has those of the tenants wait that are to be restored.
    pub fn tenants<'r>(&self, records: impl Iterator<Item = &'r TenantRecord>) {
        if let Some(held) = self.0.0.lock().as_mut() {
            for record in records {
                let waiting = held.tiers.entry(record.tier).or_default();
                waiting.all.insert(record.id);
                waiting.left.insert(record.id);
            }
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        *self.0.0.lock() = None;
    }
}
