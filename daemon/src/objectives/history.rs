//! The recovery ledger's history: of each hour the worst that a tenant's objectives stood at.
//!
//! Its leader notes them each second (RPO) and minute (estimated RTO); the directory is told when an
//! hour's worst has come a tenth of the contract further. What a leader that dies has noted since it told the directory last is
//! lost: a minute at most.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kms::TenantId;
use parking_lot::Mutex;

use crate::directory::records::{HourRecord, ObjectiveRecord, TenantRecord};
use crate::directory::{Directory, DirectoryError};
use crate::node::Node;
use crate::tenant::key::now_ms;

const HOUR_MS: u64 = 3_600_000;
const TELL: Duration = Duration::from_secs(60);
/// What is told, of a contract: a tenth of it more than is known.
const STEPS: u64 = 10;

/// By tenant and hour since 1970.
#[derive(Default)]
pub struct History(Mutex<HashMap<TenantId, BTreeMap<u64, HourRecord>>>);

impl History {
    /// Notes what stands now: figures that are not known are 0.
    pub fn note(&self, record: &TenantRecord, rpo_ms: u64, rto_ms: u64) {
        let hour = now_ms() / HOUR_MS;
        let seen = HourRecord {
            hour: (hour % 24) as u8,
            rpo_ms,
            rpo_contract_ms: record.rpo_ms,
            rto_ms,
            rto_contract_ms: record.rto_ms,
        };
        let mut noted = self.0.lock();
        let hours = noted.entry(record.id).or_default();
        let worst = hours.entry(hour).or_insert_with(|| seen.clone());
        worst.take_worse(&seen);
    }

    fn take(&self) -> Vec<(TenantId, u64, HourRecord)> {
        let noted = std::mem::take(&mut *self.0.lock());
        let each = noted.into_iter().flat_map(|(id, hours)| {
            let hours = hours.into_iter();
            hours.map(move |(hour, worst)| (id, hour, worst))
        });
        each.collect()
    }

    fn give_back(&self, id: TenantId, hour: u64, worst: &HourRecord) {
        let mut noted = self.0.lock();
        let hours = noted.entry(id).or_default();
        hours
            .entry(hour)
            .or_insert_with(|| worst.clone())
            .take_worse(worst);
    }
}

/// Tells the directory, at intervals, what was noted here.
pub async fn keep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(TELL).await;
        let Some(directory) = node.directory() else {
            continue;
        };
        for (id, hour, worst) in node.history.take() {
            if let Err(e) = tell(&directory, id, hour, &worst).await {
                tracing::debug!(tenant = %id, error = %e, "an hour of its objectives is not recorded yet");
                node.history.give_back(id, hour, &worst);
            }
        }
    }
}

async fn tell(
    directory: &Directory,
    id: TenantId,
    hour: u64,
    worst: &HourRecord,
) -> Result<(), DirectoryError> {
    // One that was destroyed meanwhile has no history.
    if directory.tenants()?.iter().all(|t| t.record.id != id) {
        return Ok(());
    }
    let known = directory.objective_day(id, hour / 24)?;
    let (mut day, modified) = match known {
        Some(found) => (found.record, found.modified),
        None => {
            let day = ObjectiveRecord {
                tenant: id,
                day: hour / 24,
                hours: Vec::new(),
            };
            (day, 0)
        }
    };
    match day.hours.iter_mut().find(|h| h.hour == worst.hour) {
        Some(known) if !is_worse(known, worst) => return Ok(()),
        Some(known) => known.take_worse(worst),
        None => day.hours.push(worst.clone()),
    }
    directory.put_objective_day(&day, modified).await
}

/// By so much that the directory is told: an estimate grows with every write.
fn is_worse(known: &HourRecord, now: &HourRecord) -> bool {
    let more = |known: u64, now: u64, contract: u64| {
        let steps = |ms: u64| ms * STEPS / contract.max(1_000);
        steps(now) > steps(known) || (known == 0 && now > 0)
    };
    let (rpo, rto) = (now.rpo_contract_ms, now.rto_contract_ms);
    (rpo, rto) != (known.rpo_contract_ms, known.rto_contract_ms)
        || more(known.rpo_ms, now.rpo_ms, rpo)
        || more(known.rto_ms, now.rto_ms, rto)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_an_hour_stays() {
        let hour = |rpo_ms, rto_ms| HourRecord {
            hour: 3,
            rpo_ms,
            rpo_contract_ms: 1_000,
            rto_ms,
            rto_contract_ms: 60_000,
        };
        let mut worst = hour(10, 0);
        worst.take_worse(&hour(5, 2_000));
        assert_eq!(worst, hour(10, 2_000));
        assert!(!is_worse(&hour(10, 2_000), &hour(99, 5_999)));
        assert!(is_worse(&hour(10, 2_000), &hour(110, 2_000)));
        assert!(is_worse(&hour(10, 2_000), &hour(10, 6_000)));
        assert!(is_worse(&hour(0, 0), &hour(0, 1)));
        let history = History::default();
        let id = TenantId([1; 16]);
        history.give_back(id, 27, &hour(3, 1));
        history.give_back(id, 27, &hour(7, 0));
        assert_eq!(history.take(), vec![(id, 27, hour(7, 1))]);
        assert!(history.take().is_empty());
    }
}
