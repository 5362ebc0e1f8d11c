//! When the other nodes join what was restored on this one.
//!
//! A restored tenant can be read at once, and written once others hold it. Filling them takes more of the
//! machines than restoring does, so while a region is restored a tier's tenants are joined only when all of
//! them can be read, and none waits longer than `MOST`. The directory goes with the first tier: from then on
//! the other nodes open replicas.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::records::Tier;

/// The longest that a tenant which can be read waits for a second replica.
const MOST: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Joins(Mutex<Option<Held>>);

struct Held {
    since: Instant,
    tiers: BTreeSet<Tier>,
    /// One of them was let go.
    begun: bool,
}

/// While it lives, joins wait for their tier.
pub struct Hold<'a>(&'a Joins);

impl Joins {
    /// Has those of every tier wait.
    pub fn hold(&self) -> Hold<'_> {
        *self.0.lock() = Some(Held {
            since: Instant::now(),
            tiers: BTreeSet::from([Tier::Enhanced, Tier::Standard]),
            begun: false,
        });
        Hold(self)
    }

    fn waits(&self, held: impl Fn(&Held) -> bool) -> bool {
        let now = self.0.lock();
        now.as_ref()
            .is_some_and(|now| now.since.elapsed() < MOST && held(now))
    }

    pub fn tenant_waits(&self, tier: Tier) -> bool {
        self.waits(|held| held.tiers.contains(&tier))
    }

    pub fn directory_waits(&self) -> bool {
        self.waits(|held| !held.begun)
    }
}

impl Hold<'_> {
    /// Every tenant of the tier that is to be restored is.
    pub fn release(&self, tier: Tier) {
        if let Some(held) = self.0.0.lock().as_mut() {
            held.begun |= held.tiers.remove(&tier);
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        *self.0.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_joins_when_it_is_restored_and_the_directory_with_the_first() {
        let joins = Joins::default();
        assert!(!joins.tenant_waits(Tier::Standard) && !joins.directory_waits());
        let hold = joins.hold();
        assert!(joins.tenant_waits(Tier::Enhanced) && joins.directory_waits());
        hold.release(Tier::Enhanced);
        assert!(!joins.tenant_waits(Tier::Enhanced) && !joins.directory_waits());
        assert!(joins.tenant_waits(Tier::Standard));
        drop(hold);
        assert!(!joins.tenant_waits(Tier::Standard));
    }
}
