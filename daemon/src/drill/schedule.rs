//! Drills by themselves: each tenant's as often as it says, spread over that time by its id, on a node
//! that does not lead it.

use std::sync::Arc;
use std::time::Duration;

use kms::TenantId;

use super::run;
use crate::directory::records::TenantRecord;
use crate::node::Node;
use crate::tenant::key::now_ms;

const LOOK: Duration = Duration::from_secs(5);
/// After a drill that left no evidence.
const AGAIN: Duration = Duration::from_secs(600);

/// Which of the tenant's periods a moment is in; they begin at a time of its own.
fn period(id: TenantId, every_ms: u64, at_ms: u64) -> u64 {
    let hash = id.0[..8].try_into().map_or(0, u64::from_be_bytes);
    (at_ms + hash % every_ms) / every_ms
}

/// Whether a drill is due: none was in this period. A tenant that never had one waits for the first
/// period after its newest key was made.
fn is_due(record: &TenantRecord, last_ms: Option<u64>, now_ms: u64) -> bool {
    let every_ms = record.drill_every_s() * 1000;
    if every_ms == 0 {
        return false;
    }
    let since = last_ms.unwrap_or(record.rotated_ms);
    is_new_period(record.id, every_ms, since, now_ms)
}

/// Whether another of the tenant's periods has begun.
pub fn is_new_period(id: TenantId, every_ms: u64, since_ms: u64, now_ms: u64) -> bool {
    period(id, every_ms, now_ms) > period(id, every_ms, since_ms)
}

/// Whether it is this node's turn: the first one of the placement that is there and does not lead.
pub fn is_ours(node: &Node, record: &TenantRecord) -> bool {
    let Some(group) = node.parts.groups.get(record.group()) else {
        return false;
    };
    let leader = group.status().leader;
    let mut placed = node.placed(record).into_iter();
    let first = placed.find(|n| Some(n.id) != leader && (n.id == node.id || node.is_connected(n)));
    first.is_some_and(|n| n.id == node.id)
}

pub async fn keep(node: Arc<Node>) {
    let mut not_before = std::collections::HashMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(directory) = node.directory() else {
            continue;
        };
        let Ok(drills) = directory.drills() else {
            continue;
        };
        for tenant in node.tenants.all() {
            let record = tenant.record();
            let last = drills.iter().find(|d| d.record.tenant == record.id);
            let held_up = not_before
                .get(&record.id)
                .is_some_and(|at| tokio::time::Instant::now() < *at);
            if record.withheld().is_some()
                || record.key_task.is_some()
                || !record.formed
                || held_up
                || !is_due(&record, last.map(|d| d.record.at_ms), now_ms())
                || !is_ours(&node, &record)
            {
                continue;
            }
            if let Err(why) = run(&node, &record, Arc::new(|_, _, _| {})).await {
                tracing::warn!(tenant = %record.id, %why, "a drill is not run; it is tried again");
                not_before.insert(record.id, tokio::time::Instant::now() + AGAIN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_one_drill_and_tenants_are_spread() {
        let every = 86_400_000;
        let ids: Vec<TenantId> = (0..100u8)
            .map(|n| TenantId([n.wrapping_mul(37); 16]))
            .collect();
        let start = 1_790_000_000_000;
        let mut hours = std::collections::BTreeSet::new();
        for id in ids {
            let turns: Vec<u64> = (0..48)
                .filter(|h| {
                    let at = |h: u64| start + h * 3_600_000;
                    period(id, every, at(h + 1)) > period(id, every, at(*h))
                })
                .collect();
            assert_eq!(turns.len(), 2, "one a day");
            assert_eq!(turns[1] - turns[0], 24);
            hours.insert(turns[0]);
        }
        assert!(hours.len() > 15, "{hours:?}");
    }
}
