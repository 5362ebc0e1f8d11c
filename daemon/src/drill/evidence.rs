//! What a drill did, found and measured.

use std::time::{Duration, Instant};

use kms::Region;
use replication::restore::Plan;
use serde::{Deserialize, Serialize};

use super::pace::Step;
use crate::directory::records::{TenantRecord, Tier};
use crate::node::Node;
use crate::tenant::key::now_ms;

/// A step of a drill, and when it was done, in milliseconds since its begin.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    pub name: String,
    pub from_ms: u64,
    pub to_ms: u64,
    /// Of them, those in which it kept out of the way of live tenants.
    #[serde(default)]
    pub paused_ms: u64,
}

/// Keys of the restored state that were looked up in the live tenant at the same revision.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    pub keys: u64,
    pub differ: u64,
    /// The live tenant could not say: compacted since, or not there yet.
    pub not_comparable: u64,
}

/// The body of a drill's statement. Times are milliseconds, moments milliseconds since 1970.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    pub tenant: String,
    pub id: String,
    pub jurisdiction: Region,
    /// Where it was restored: on this node, reachable by nobody, removed afterwards.
    pub node: String,
    pub bucket: String,
    pub tier: Tier,
    pub incarnation: u32,
    pub begun_ms: u64,
    pub at_ms: u64,
    pub passed: bool,
    /// Why it did not pass, and what to do; empty if it did.
    pub problem: String,
    pub advice: String,
    /// What was restored.
    pub link: u64,
    pub checkpoint_bytes: u64,
    pub links: u64,
    pub log_bytes: u64,
    pub revision: i64,
    /// Effective time of its newest write.
    pub time_ms: u64,
    /// Counted from every restored row, and equal to the chain's.
    pub digest: String,
    /// The live replica's at the same entry, if it still knows it.
    pub live_digest: Option<String>,
    pub sample: Sample,
    /// Age of the oldest acknowledged write that was not archived when it began.
    pub rpo_ms: u64,
    pub rpo_contract_ms: u64,
    /// From the begin to the last row verified, less the pauses.
    pub rto_ms: u64,
    pub rto_contract_ms: u64,
    pub phases: Vec<Phase>,
    /// The pauses of all phases: a restore has none.
    #[serde(default)]
    pub paused_ms: u64,
    /// It could not begin.
    #[serde(skip)]
    pub not_run: bool,
    #[serde(skip)]
    clock: Clock,
}

#[derive(Clone, Debug)]
struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Clock(Instant::now())
    }
}

fn ms(took: Duration) -> u64 {
    took.as_millis() as u64
}

impl Evidence {
    pub(super) fn new(node: &Node, record: &TenantRecord, rpo_ms: u64) -> Self {
        Evidence {
            tenant: record.name.clone(),
            id: record.id.to_string(),
            jurisdiction: node.config.region,
            node: node.config.name.clone(),
            bucket: node.config.bucket.url.clone(),
            tier: record.tier,
            incarnation: record.incarnation,
            begun_ms: now_ms(),
            at_ms: 0,
            passed: false,
            problem: String::new(),
            advice: String::new(),
            link: 0,
            checkpoint_bytes: 0,
            links: 0,
            log_bytes: 0,
            revision: 0,
            time_ms: 0,
            digest: String::new(),
            live_digest: None,
            sample: Sample::default(),
            rpo_ms,
            rpo_contract_ms: record.rpo_ms,
            rto_ms: 0,
            rto_contract_ms: record.rto_ms,
            phases: Vec::new(),
            paused_ms: 0,
            not_run: false,
            clock: Clock::default(),
        }
    }

    pub(super) fn planned(&mut self, plan: &Plan) {
        self.link = plan.tail().number;
        self.checkpoint_bytes = plan.checkpoint_bytes();
        self.links = plan.total_links();
        self.log_bytes = plan.log_bytes();
    }

    /// A step has just ended.
    pub(super) fn phase(&mut self, name: &str) {
        self.phase_at(name, Instant::now());
    }

    fn phase_at(&mut self, name: &str, at: Instant) {
        let to_ms = ms(at.saturating_duration_since(self.clock.0));
        self.phases.push(Phase {
            name: name.into(),
            from_ms: self.phases.last().map_or(0, |before| before.to_ms),
            to_ms,
            paused_ms: 0,
        });
    }

    /// A step that was paced, if it was come to.
    pub(super) fn step(&mut self, name: &str, step: Step) {
        let Some(ended) = step.ended else { return };
        self.phase_at(name, ended);
        if let Some(phase) = self.phases.last_mut() {
            phase.paused_ms = ms(step.paused).min(phase.to_ms - phase.from_ms);
            self.paused_ms += phase.paused_ms;
        }
    }

    pub(super) fn end(&mut self, tried: Result<(), String>, took: Duration) {
        self.at_ms = now_ms();
        let verified = self.phases.iter().find(|p| p.name == "verified");
        let took = verified.map_or(ms(took), |p| p.to_ms);
        self.rto_ms = took.saturating_sub(self.paused_ms);
        let late = |what: &str, is: u64, contracted: u64| {
            format!("{what} was {is} ms, {contracted} ms are contracted")
        };
        let (problem, advice) = match tried {
            Err(why) => (
                why,
                "see docs/operating/drills.md: 'holdfast archive scrub TENANT' names every object that is damaged or missing, and makes a new checkpoint".into(),
            ),
            Ok(()) if self.rto_ms > self.rto_contract_ms => (
                late("the restore", self.rto_ms, self.rto_contract_ms),
                "a restore takes longer than its contract: give the nodes a faster disk or network, or the tenant another RTO".into(),
            ),
            Ok(()) if self.rpo_ms > self.rpo_contract_ms.max(1000) => (
                late("the archive's lag", self.rpo_ms, self.rpo_contract_ms),
                "the archive lags behind: look whether the bucket answers".into(),
            ),
            Ok(()) => (String::new(), String::new()),
        };
        self.passed = problem.is_empty();
        (self.problem, self.advice) = (problem, advice);
    }

    /// How long a step took, less its pauses.
    pub fn took_ms(&self, name: &str) -> u64 {
        let phase = self.phases.iter().find(|p| p.name == name);
        phase.map_or(0, |p| p.to_ms - p.from_ms - p.paused_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Evidence is kept for years: what an earlier version wrote still reads.
    #[test]
    fn earlier_evidence_reads() {
        let earlier = include_str!("../../golden/drill-evidence-v1.json");
        let read: Evidence = serde_json::from_str(earlier).expect("it reads");
        assert_eq!((read.rto_ms, read.paused_ms), (812, 0));
        assert_eq!(read.took_ms("fetched"), 240);
    }
}
