//! The keeper of one tenant's key on this node: proves it, seals the tenant when it is taken away,
//! takes the tenant up again when it is back.
//!
//! Invariants. A refusal by the KMS seals the tenant at once, on this node, by this node's own
//! question; what another node says only makes it ask earlier. No answer is not a refusal: the
//! tenant is served for its grace, counted from the last proof. Nothing is deleted, whatever the KMS
//! says. One tenant's keeper waits for no other's, but
//! for its turn at the provider's meter.

use std::sync::Arc;
use std::time::Duration;

use kms::lease::{INTERVAL, boottime};
use kms::{KmsError, Lease, Probe, WrappedKeyError};
use replication::group::Group;
use tokio::time::sleep;

use super::key::now_ms;
use super::{Tenant, reason, wrapped};
use crate::directory::records::{EventKind, TenantRecord};
use crate::node::Node;
use crate::question::Question;

/// After a question that was not answered.
const AGAIN: Duration = Duration::from_secs(5);
/// How often in a row a sealed tenant's try gives way when the provider is busy.
const MAX_GIVEN_WAY: u32 = 4;
/// How long a suspected damage may take to be withdrawn.
const QUARANTINE: Duration = Duration::from_secs(30);
/// A sealed tenant's key is tried after this, then ever more seldom, down to the interval.
const FIRST_TRY: Duration = Duration::from_secs(1);

pub struct Keeper {
    node: Arc<Node>,
    tenant: Arc<Tenant>,
    group: Arc<Group>,
    probe: Option<Probe>,
    pause: Duration,
    /// Tries of a sealed tenant that gave way to others.
    gave_way: u32,
}

/// Keeps the key as long as the tenant's incarnation is open here.
pub async fn keep(node: Arc<Node>, tenant: Arc<Tenant>, group: Arc<Group>) {
    let id = group.id();
    let mut sealed = group.replica().watch_sealed();
    let mut keeper = Keeper {
        node,
        tenant: tenant.clone(),
        group: group.clone(),
        probe: None,
        pause: FIRST_TRY,
        gave_way: 0,
    };
    let lives = || {
        let record = tenant.record();
        record.group() == id && !record.is_destroying()
    };
    let is_served = group.sealed().is_none() && tenant.record().withheld().is_none();
    tokio::select! {
        () = sleep(first(is_served, &tenant.key.lease)) => {}
        () = tenant.nudged() => {}
        _ = sealed.changed() => {}
    }
    while lives() && !group.is_fenced() {
        if group.is_quarantined() {
            // It may be withdrawn.
            sleep(QUARANTINE).await;
            if group.is_quarantined() {
                break;
            }
            continue;
        }
        sealed.borrow_and_update();
        let wait = keeper.round().await;
        tokio::select! {
            () = sleep(wait) => {}
            () = tenant.nudged() => {}
            // Apply has met a generation that is not here yet.
            changed = sealed.changed() => if changed.is_err() { return },
        }
    }
    // It may have been meant for the next incarnation's.
    tenant.nudge();
    // Nothing looks after its keys any more.
    let why = tenant.record().withheld();
    let why = why.as_deref().unwrap_or("the tenant has moved on");
    group.seal(why).await;
}

/// When to ask first: the key of a tenant that is served was proven when it was unwrapped. Spread: tenants
/// that are opened together do not ask together.
fn first(is_served: bool, lease: &Lease) -> Duration {
    if !is_served || !lease.holds() {
        return Duration::ZERO;
    }
    let due = INTERVAL.mul_f64(rand::random_range(0.3..1.0));
    due.saturating_sub(lease.age(boottime()))
}

impl Keeper {
    /// Asks once; answers when to ask again.
    async fn round(&mut self) -> Duration {
        if let Some(why) = self.tenant.record().withheld() {
            self.probe = None;
            if self.group.sealed().as_deref() != Some(why.as_str()) {
                self.group.seal(&why).await;
                self.tenant.key.sealed();
            }
            return INTERVAL;
        }
        match self.group.sealed() {
            Some(why) => self.resume(&why).await,
            None => self.prove().await,
        }
    }

    async fn prove(&mut self) -> Duration {
        let record = self.tenant.record();
        let asked = boottime();
        match self.ask(&record).await {
            Ok(sent) => {
                self.tenant.key.proven(sent);
                // Whatever keeps a generation away says nothing of the key.
                if let Err(e) = self.follow(&record).await {
                    tracing::warn!(tenant = %record.id, error = %e, "a key generation is not here yet; it is tried again");
                    return AGAIN.mul_f64(rand::random_range(0.5..1.5));
                }
                // Spread: tenants that were opened together do not ask together for ever.
                INTERVAL.mul_f64(rand::random_range(0.95..1.05))
            }
            Err(e @ KmsError::Refused { .. }) => {
                self.tenant.key.refused();
                tracing::error!(tenant = %record.id, error = %e, "the KMS refuses the tenant's key");
                self.seal(&reason(&e.into())).await;
                FIRST_TRY
            }
            Err(e) => {
                // Of a ciphertext that it cannot read, a KMS says nothing about the key.
                self.probe = None;
                let (why, grace) = (e.to_string(), record.key_grace_s);
                if self.tenant.key.unproven(asked, &why) {
                    tracing::error!(tenant = %record.id, %why, grace_s = grace, "ALARM: the tenant's key cannot be proven; it is served for its grace");
                    let detail = format!("{why}; sealed after a grace of {grace} s");
                    self.node.event(&record, EventKind::KeyUnproven, detail);
                }
                if self.tenant.key.lease.grace_is_over(boottime()) {
                    let why = reason(&e.into());
                    let why = format!("its key could not be proven for {grace} s: {why}");
                    self.seal(&why).await;
                    return FIRST_TRY;
                }
                let again = AGAIN.min(record.key_grace().max(FIRST_TRY));
                again.mul_f64(rand::random_range(0.5..1.5))
            }
        }
    }

    /// Asks the KMS whether the key may be used; answers when it was asked.
    async fn ask(&mut self, record: &TenantRecord) -> Result<Duration, KmsError> {
        let providers = &self.node.parts.providers;
        if self.probe.as_ref().is_none_or(|p| *p.key() != record.key) {
            let region = self.node.config.region;
            self.probe = Some(Probe::make(providers, &record.key, record.id, region).await?);
        }
        match &self.probe {
            Some(probe) => probe.ask(providers).await,
            None => Err(KmsError::Invalid("there is no probe".into())),
        }
    }

    /// Holds the generations that the record names, and seals under the one that it says.
    async fn follow(&self, record: &TenantRecord) -> Result<(), WrappedKeyError> {
        let Some(keys) = self.group.keys() else {
            return Ok(());
        };
        let (parts, needed) = (&self.node.parts, record.needed());
        for generation in &needed {
            let copy = parts.keys.copy(record.id, *generation).ok().flatten();
            let stale = copy.is_none_or(|copy| copy.key != record.key);
            if stale || keys.generation(*generation).is_none() {
                let wrapped = parts.keys.load(record.id, *generation, &record.key).await?;
                wrapped.unwrap_into(&parts.providers, &keys).await?;
                // In the place of a copy under a KMS key of before, now that it is known to open.
                parts.keys.keep(&wrapped)?;
                tracing::info!(tenant = %record.id, generation, "a key generation is here");
            }
        }
        keys.seal_under(record.generation);
        if let Some(oldest) = needed.first() {
            if let Some(machine) = self.group.replica().machine() {
                machine.forget_before(*oldest);
            }
            parts.keys.forget_before(record.id, *oldest)?;
        }
        Ok(())
    }

    async fn seal(&mut self, why: &str) {
        let record = self.tenant.record();
        tracing::error!(tenant = %record.id, %why, "ALARM: the tenant is sealed on this node");
        self.probe = None;
        self.pause = FIRST_TRY;
        self.tell_others(&record);
        let gone = self.group.seal(why).await;
        self.tenant.key.sealed();
        let mut detail = self.figures(why);
        if !gone {
            detail.push_str("; a reader still holds its engine or keys in memory");
        }
        self.node.event(&record, EventKind::Sealed, detail);
    }

    fn figures(&self, why: &str) -> String {
        let report = self.tenant.key.report("", None);
        let refused = match report.refused_ms {
            // Of a seal before this one.
            at if at <= report.resumed_ms => String::new(),
            at => format!(
                "{} ms after the KMS first refused here, ",
                now_ms().saturating_sub(at)
            ),
        };
        format!(
            "{why} ({refused}{} ms after the last proof)",
            report.proof_age_ms
        )
    }

    /// Tries a sealed tenant's key.
    async fn resume(&mut self, known: &str) -> Duration {
        let record = self.tenant.record();
        if self.gave_way < MAX_GIVEN_WAY && self.node.parts.providers.is_busy(&record.key) {
            // Who is served goes first, though not for ever.
            self.gave_way += 1;
            return AGAIN.mul_f64(rand::random_range(0.5..1.5));
        }
        self.gave_way = 0;
        let sent = boottime();
        let why = match wrapped(&self.node.parts, &record).await {
            Ok(keys) => match self.group.unseal(Arc::new(keys)).await {
                Ok(()) => {
                    self.tenant.key.resumed(sent);
                    tracing::info!(tenant = %record.id, "the tenant is resumed on this node");
                    self.node.event(&record, EventKind::Resumed, String::new());
                    self.pause = FIRST_TRY;
                    self.tell_others(&record);
                    return Duration::ZERO;
                }
                Err(e) => {
                    tracing::error!(tenant = %record.id, error = %e, "the tenant's key is back, and its replica cannot be opened");
                    "its replica cannot be opened".into()
                }
            },
            // No answer is no news of a sealed tenant's key.
            Err(WrappedKeyError::Kms(KmsError::Unreachable { .. })) => known.to_string(),
            Err(e) => reason(&e),
        };
        if why != known {
            self.group.seal(&why).await;
        }
        self.give_lead(&record).await;
        let pause = self.pause;
        self.pause = (pause * 2).min(INTERVAL);
        pause.mul_f64(rand::random_range(0.9..1.1))
    }

    /// A sealed leader cannot propose: one who can takes its place, if there is one.
    async fn give_lead(&self, record: &TenantRecord) {
        if !self.group.is_leader() {
            return;
        }
        let reports = self.node.key_reports(record).await;
        if let Some((to, _)) = reports.iter().find(|(_, report)| report.sealed.is_none()) {
            tracing::info!(tenant = %record.id, to = %to.name, "a sealed leader gives its place to a node that holds the key");
            self.group.give_lead(to.id).await;
        }
    }

    /// Has the other replicas' nodes ask now rather than at their next turn.
    fn tell_others(&self, record: &TenantRecord) {
        let question = Question::ProveKey(record.id);
        for other in self.node.placed(record) {
            let (node, question) = (self.node.clone(), question.clone());
            if other.id != node.id {
                tokio::spawn(async move { node.ask(&other.peer_address, &question).await });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_sealed_or_unproven_asks_at_once_and_who_was_just_proven_later() {
        let lease = Lease::default();
        assert_eq!(first(true, &lease), Duration::ZERO);
        lease.proven(boottime());
        assert_eq!(first(false, &lease), Duration::ZERO);
        let due = first(true, &lease);
        assert!(
            (INTERVAL.mul_f64(0.29)..=INTERVAL).contains(&due),
            "{due:?}"
        );
        lease.refused(boottime() + Duration::from_millis(1));
        assert_eq!(first(true, &lease), Duration::ZERO);
    }
}
