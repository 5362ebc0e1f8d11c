//! When the other nodes join what was restored on this one.
//!
//! A restored tenant can be read at once, and written once others hold it. Filling them takes more of the
//! machines than restoring does, so while a region is restored a tier's tenants are joined only when all of
//! them can be read, and none waits longer than `limits::JOIN_WITHIN`. A directory that was restored with them
//! goes with the first tier: from then on the other nodes open replicas. What was not restored now waits for
//! nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kms::TenantId;
use parking_lot::Mutex;

use super::records::Tier;
use crate::limits;

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
    pub fn done(&self, tier: Tier, tenant: TenantId) {
        let mut now = self.0.lock();
        let Some(held) = now.as_mut() else { return };
        if let Some(waiting) = held.tiers.get_mut(&tier) {
            waiting.left.remove(&tenant);
            if waiting.left.is_empty() {
                held.tiers.remove(&tier);
                held.directory = false;
            }
        }
    }

    fn waits(&self, held: impl Fn(&Held) -> bool) -> bool {
        let now = self.0.lock();
        now.as_ref()
            .is_some_and(|now| now.since.elapsed() < limits::JOIN_WITHIN && held(now))
    }

    pub fn tenant_waits(&self, tier: Tier, tenant: TenantId) -> bool {
        let waits = |waiting: &Waiting| waiting.all.contains(&tenant);
        self.waits(|held| held.tiers.get(&tier).is_some_and(waits))
    }

    pub fn directory_waits(&self) -> bool {
        self.waits(|held| held.directory)
    }
}

impl Hold<'_> {
    /// Has those of the tenants wait that are to be restored.
    pub fn tenants(&self, tenants: impl Iterator<Item = (Tier, TenantId)>) {
        if let Some(held) = self.0.0.lock().as_mut() {
            for (tier, tenant) in tenants {
                let waiting = held.tiers.entry(tier).or_default();
                waiting.all.insert(tenant);
                waiting.left.insert(tenant);
            }
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
    fn a_tier_joins_once_all_of_it_is_restored_and_the_directory_with_the_first() {
        let [first, second, third, other] = [1, 2, 3, 4].map(|n| TenantId([n; 16]));
        let joins = Joins::default();
        let hold = joins.hold(true);
        assert!(joins.directory_waits());
        assert!(
            !joins.tenant_waits(Tier::Enhanced, first),
            "it is not named yet"
        );
        hold.tenants(
            [
                (Tier::Enhanced, first),
                (Tier::Enhanced, second),
                (Tier::Standard, third),
            ]
            .into_iter(),
        );
        assert!(!joins.tenant_waits(Tier::Enhanced, other));
        joins.done(Tier::Enhanced, first);
        assert!(joins.tenant_waits(Tier::Enhanced, first) && joins.directory_waits());
        joins.done(Tier::Enhanced, second);
        assert!(!joins.tenant_waits(Tier::Enhanced, first));
        assert!(!joins.tenant_waits(Tier::Enhanced, second) && !joins.directory_waits());
        assert!(joins.tenant_waits(Tier::Standard, third));
        drop(hold);
        assert!(!joins.tenant_waits(Tier::Standard, third));
    }

    #[test]
    fn a_directory_that_serves_waits_for_nothing() {
        let joins = Joins::default();
        let _hold = joins.hold(false);
        assert!(!joins.directory_waits());
    }
}
