//! Recovery objectives: what was contracted and what is, and an alarm before it is missed.
//!
//! The RPO is the recovery ledger's. The RTO is estimated: what the newest drill took, and what a
//! restore would read more since, at the rates of that drill.

pub mod history;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kms::TenantId;
use replication::archive::survey::{Load, load};

use replication::group::Group;

use crate::directory::records::{DrillRecord, EventKind, TenantRecord};
use crate::node::Node;

/// Rates of a tenant that had no drill yet, bytes a second: careful ones.
const FETCH_RATE: u64 = 50 << 20;
const REPLAY_RATE: u64 = 20 << 20;
/// What a restore takes besides.
const FIXED_MS: u64 = 1_000;
/// Fewer bytes than this say nothing of a rate.
const MEASURABLE: u64 = 8 << 20;
/// From this part of a contract on it is near.
const NEAR: f64 = 0.8;
/// From this part of the RTO on a checkpoint is made, as long as the log is most of it.
const CHECKPOINT_AT: f64 = 0.5;
const LOOK: Duration = Duration::from_secs(1);
const ESTIMATE: Duration = Duration::from_secs(60);
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// An objective is said to be met again once it has been for so long.
const HELD: Duration = Duration::from_secs(10);
/// Up to here an RPO is near in ordinary service, in milliseconds.
const SHORT: u64 = 2_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Met,
    Near,
    Breached,
}

impl Standing {
    pub fn name(self) -> &'static str {
        match self {
            Standing::Met => "met",
            Standing::Near => "near",
            Standing::Breached => "breached",
        }
    }

    /// Of what is, beside what was contracted, in milliseconds.
    pub fn of(is: u64, contracted: u64) -> Self {
        // An RPO of 0 delays answers; a second is what the ledger's own samples may lag.
        let contracted = contracted.max(1_000);
        match is as f64 / contracted as f64 {
            part if part > 1.0 => Standing::Breached,
            part if part > NEAR => Standing::Near,
            _ => Standing::Met,
        }
    }
}

/// What a restore to the newest state would read and take.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    pub checkpoint_bytes: u64,
    pub log_bytes: u64,
    pub rto_ms: u64,
    /// Of it, for the log.
    pub replay_ms: u64,
}

fn rate(bytes: u64, in_ms: u64, otherwise: u64) -> u64 {
    match bytes >= MEASURABLE && in_ms > 0 {
        true => (bytes * 1000 / in_ms).max(1),
        false => otherwise,
    }
}

/// Estimates a restore from the newest drill.
pub fn estimate(load: Load, drill: Option<&DrillRecord>) -> Estimate {
    let Load {
        checkpoint_bytes,
        log_bytes,
    } = load;
    let drill = drill.filter(|drill| drill.problem.is_empty());
    let (fetch, replay) = match drill {
        Some(d) => (
            rate(d.fetched_bytes, d.fetched_in_ms, FETCH_RATE),
            rate(d.replayed_bytes, d.replayed_in_ms, REPLAY_RATE),
        ),
        None => (FETCH_RATE, REPLAY_RATE),
    };
    let more = |now: u64, then: Option<u64>, rate: u64| {
        now.saturating_sub(then.unwrap_or(0)) as u128 * 1000 / u128::from(rate)
    };
    let fetch_ms = more(checkpoint_bytes, drill.map(|d| d.fetched_bytes), fetch);
    let more_ms = more(log_bytes, drill.map(|d| d.replayed_bytes), replay);
    let rto_ms = drill.map_or(FIXED_MS, |d| d.rto_ms) + (fetch_ms + more_ms) as u64;
    Estimate {
        checkpoint_bytes,
        log_bytes,
        rto_ms,
        replay_ms: (u128::from(log_bytes) * 1000 / u128::from(replay)) as u64,
    }
}

impl Node {
    /// Estimates what a restore of a tenant would take now.
    pub async fn estimate(&self, record: &TenantRecord) -> Result<Estimate, String> {
        let chain = self.chain(record)?;
        let found = load(&chain).await.map_err(|e| e.to_string())?;
        let directory = self.directory().ok_or("the directory is not open")?;
        let drills = directory.drills().map_err(|e| e.to_string())?;
        let drill = drills.iter().find(|d| d.record.tenant == record.id);
        Ok(estimate(found, drill.map(|d| &d.record)))
    }

    /// Says that an objective stands otherwise than before; `missed`: when it will be missed.
    fn objective(
        &self,
        record: &TenantRecord,
        what: &str,
        is: u64,
        contracted: u64,
        now: Standing,
        missed: &str,
    ) {
        let mut detail = format!("{what} {is} ms, {contracted} ms contracted");
        let kind = match now {
            Standing::Met => EventKind::ObjectiveMet,
            Standing::Near => {
                detail.push_str(missed);
                tracing::warn!(tenant = %record.id, "ALARM: near: {detail}");
                EventKind::ObjectiveNear
            }
            Standing::Breached => {
                tracing::error!(tenant = %record.id, "ALARM: missed: {detail}");
                EventKind::ObjectiveBreached
            }
        };
        self.event(record, kind, detail);
    }
}

const RPO: &str = "RPO";
const RTO: &str = "estimated RTO";

/// When an estimate that was `before` so long ago, and `is` now, will come to what was contracted.
fn forecast(before: Option<(Duration, u64)>, is: u64, contracted: u64) -> String {
    let Some((over, before)) = before else {
        return "; how it grows is not known yet".into();
    };
    if before >= is {
        return "; it does not grow now".into();
    }
    let left = contracted.saturating_sub(is) as f64 / (is - before) as f64;
    let left = over.mul_f64(left);
    format!(
        "; missed in about {} s if it grows on like this",
        left.as_secs()
    )
}

/// What was said of an objective, and since when it is met after it was not.
struct Said {
    standing: Standing,
    met_since: Option<Instant>,
}

/// What is said of the objectives of the tenants that this node leads.
#[derive(Default)]
struct Watched(HashMap<TenantId, Said>);

impl Watched {
    /// Answers whether `now` is to be said: anything worse at once, and that it is met once it has been
    /// for a while.
    fn see(&mut self, id: TenantId, now: Standing) -> bool {
        let said = self.0.entry(id).or_insert(Said {
            standing: Standing::Met,
            met_since: None,
        });
        if now != Standing::Met {
            said.met_since = None;
        }
        let mut held = || said.met_since.get_or_insert_with(Instant::now).elapsed() >= HELD;
        let news = match now.cmp(&said.standing) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Less => now == Standing::Met && held(),
            std::cmp::Ordering::Equal => false,
        };
        if news {
            *said = Said {
                standing: now,
                met_since: None,
            };
        }
        news
    }
}

/// The tenants that this node leads.
fn led(node: &Node) -> Vec<(TenantRecord, Arc<Group>)> {
    let tenants = node.tenants.all().into_iter();
    let open = tenants.filter_map(|tenant| Some((tenant.record(), tenant.group().ok()?)));
    open.filter(|(_, group)| group.is_leader()).collect()
}

/// Watches the RPO of the tenants that this node leads.
pub async fn keep_rpo(node: Arc<Node>) {
    let mut watched = Watched::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let led = led(&node);
        let leads = |id: &TenantId| led.iter().any(|(record, _)| record.id == *id);
        watched.0.retain(|id, _| leads(id));
        for (record, group) in led {
            let is = group.unarchived_for().as_millis() as u64;
            node.history.note(&record, is, 0);
            let now = match Standing::of(is, record.rpo_ms) {
                // An RPO of a second is near now and then: only that it is missed is said.
                Standing::Near if record.rpo_ms <= SHORT => Standing::Met,
                now => now,
            };
            if watched.see(record.id, now) {
                let left = record.rpo_ms.saturating_sub(is);
                let missed = format!("; missed in {left} ms unless the bucket answers");
                node.objective(&record, RPO, is, record.rpo_ms, now, &missed);
            }
        }
    }
}

/// Watches what a restore of the tenants that this node leads would take, and has a checkpoint made
/// before that is too much.
pub async fn keep_rto(node: Arc<Node>) {
    let mut watched = Watched::default();
    let mut before: HashMap<TenantId, (Instant, u64)> = HashMap::new();
    loop {
        tokio::time::sleep(ESTIMATE).await;
        let led = led(&node);
        let leads = |id: &TenantId| led.iter().any(|(record, _)| record.id == *id);
        watched.0.retain(|id, _| leads(id));
        before.retain(|id, _| leads(id));
        for (record, group) in led {
            let estimated = tokio::time::timeout(ANSWERS_WITHIN, node.estimate(&record)).await;
            let estimate = match estimated {
                Ok(Ok(estimate)) => estimate,
                Ok(Err(why)) => {
                    tracing::warn!(tenant = %record.id, %why, "what a restore would take is not known");
                    continue;
                }
                // The bucket is away: the RPO says so.
                Err(_) => continue,
            };
            let most = record.rto_ms as f64 * CHECKPOINT_AT;
            if estimate.rto_ms as f64 > most && estimate.replay_ms * 2 > estimate.rto_ms {
                tracing::info!(tenant = %record.id, rto_ms = estimate.rto_ms, "a checkpoint is made: a restore would take too much of its RTO");
                group.want_checkpoint();
            }
            let is = estimate.rto_ms;
            node.history.note(&record, 0, is);
            let last = before.insert(record.id, (Instant::now(), is));
            let last = last.map(|(at, was)| (at.elapsed(), was));
            let now = Standing::of(is, record.rto_ms);
            if watched.see(record.id, now) {
                let missed = forecast(last, is, record.rto_ms);
                node.objective(&record, RTO, is, record.rto_ms, now, &missed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_follows_the_drill() {
        let drill = DrillRecord {
            tenant: TenantId([1; 16]),
            at_ms: 1,
            problem: String::new(),
            rpo_ms: 0,
            rto_ms: 3_000,
            fetched_bytes: 100 << 20,
            fetched_in_ms: 1_000,
            replayed_bytes: 10 << 20,
            replayed_in_ms: 1_000,
            evidence: String::new(),
        };
        let found = Load {
            checkpoint_bytes: 0,
            log_bytes: 30 << 20,
        };
        // 20 MiB more of log, at 10 MiB a second.
        let estimated = estimate(found, Some(&drill));
        assert_eq!((estimated.log_bytes, estimated.rto_ms), (30 << 20, 5_000));
        // Nothing measured: the careful rates.
        assert_eq!(estimate(found, None).rto_ms, 1_000 + 1_500);
        let failed = DrillRecord {
            problem: "damaged".into(),
            ..drill
        };
        assert_eq!(estimate(found, Some(&failed)).rto_ms, 2_500);
    }

    #[test]
    fn a_breach_is_forecast_from_how_an_estimate_grows() {
        let minute = Duration::from_secs(60);
        // 10 s a minute, 5 s left.
        let said = forecast(Some((minute, 45_000)), 55_000, 60_000);
        assert!(said.contains("in about 30 s"), "{said}");
        for before in [55_000, 58_000] {
            assert!(forecast(Some((minute, before)), 55_000, 60_000).contains("does not grow"));
        }
        assert!(forecast(None, 55_000, 60_000).contains("not known"));
    }

    #[test]
    fn what_is_worse_is_said_at_once_and_what_is_met_once_it_holds() {
        let mut watched = Watched::default();
        let id = TenantId([1; 16]);
        assert!(!watched.see(id, Standing::Met));
        assert!(watched.see(id, Standing::Near));
        assert!(watched.see(id, Standing::Breached));
        assert!(!watched.see(id, Standing::Near));
        assert!(!watched.see(id, Standing::Met), "not before it holds");
        watched.0.get_mut(&id).unwrap().met_since = Instant::now().checked_sub(HELD);
        assert!(watched.see(id, Standing::Met));
        assert!(!watched.see(id, Standing::Met));
    }

    #[test]
    fn contracts_are_near_before_they_are_breached() {
        for (is, wanted) in [
            (0, Standing::Met),
            (4_000, Standing::Met),
            (4_500, Standing::Near),
            (5_001, Standing::Breached),
        ] {
            assert_eq!(Standing::of(is, 5_000), wanted, "{is}");
        }
    }
}
