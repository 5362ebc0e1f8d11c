//! How a tenant's key stands on this node: the lease, and when it was refused, sealed and resumed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kms::Lease;
use kms::lease::boottime;
use parking_lot::Mutex;
use replication::group::Group;
use replication::group::rewriting::Older;
use serde::{Deserialize, Serialize};

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

/// What a node says of a tenant's key. Times are milliseconds since 1970, 0 where it never happened.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KeyReport {
    pub node: String,
    /// Why the tenant is sealed there; none while it is not.
    pub sealed: Option<String>,
    /// When the KMS first refused the key in the present or last refusal.
    pub refused_ms: u64,
    pub sealed_ms: u64,
    pub resumed_ms: u64,
    /// Milliseconds since the KMS was asked and last proved the key usable; since the machine
    /// started, if it never did.
    pub proof_age_ms: u64,
    /// Why the KMS did not answer when it was last asked; none if it did.
    pub unproven: Option<String>,
    /// Generations held in memory, and the one that seals.
    pub held: Vec<u32>,
    pub sealing: u32,
    /// The KMS keys that this node's copies of wrapped generations are under.
    pub copies: Vec<(u32, String)>,
    /// While everything is rewritten: what is still under older generations.
    pub older: Option<Older>,
}

#[derive(Default)]
pub struct KeyStanding {
    pub lease: Lease,
    times: Mutex<Times>,
}

#[derive(Clone, Default)]
struct Times {
    refused_ms: u64,
    sealed_ms: u64,
    resumed_ms: u64,
    unproven: Option<String>,
}

/// Why a tenant's requests are not answered.
#[derive(Debug)]
pub enum KeyRefusal {
    Sealed(String),
    /// This node has not proven the key for too long: it was stopped, or is very slow.
    Expired,
}

impl KeyStanding {
    /// Whether this node may use the tenant's key now. Asked before each answer.
    pub fn check(&self, group: &Group) -> Result<(), KeyRefusal> {
        if let Some(why) = group.sealed() {
            return Err(KeyRefusal::Sealed(why.to_string()));
        }
        match self.lease.holds() {
            true => Ok(()),
            false => Err(KeyRefusal::Expired),
        }
    }

    /// The KMS was asked at `sent`, on the clock of `boottime`, and proved the key usable.
    pub fn proven(&self, sent: Duration) {
        if self.lease.proven(sent) {
            self.times.lock().unproven = None;
        }
    }

    /// It was asked at `sent` and proved nothing. Answers whether this is news.
    pub fn unproven(&self, sent: Duration, why: &str) -> bool {
        self.lease.unproven(sent);
        let known = self.times.lock().unproven.replace(why.to_string());
        known.is_none()
    }

    pub fn refused(&self) {
        self.lease.refused(boottime());
        self.times.lock().refused_ms = now_ms();
    }

    pub fn sealed(&self) {
        self.times.lock().sealed_ms = now_ms();
    }

    pub fn resumed(&self, sent: Duration) {
        self.proven(sent);
        self.times.lock().resumed_ms = now_ms();
    }

    pub fn report(&self, node: &str, group: Option<&Group>) -> KeyReport {
        let times = self.times.lock().clone();
        let keys = group.and_then(Group::keys);
        let sealed = match group {
            Some(group) => group.sealed().map(|why| why.to_string()),
            None => Some("the tenant is not open on this node".into()),
        };
        KeyReport {
            node: node.to_string(),
            sealed,
            refused_ms: times.refused_ms,
            sealed_ms: times.sealed_ms,
            resumed_ms: times.resumed_ms,
            proof_age_ms: self.lease.age(boottime()).as_millis() as u64,
            unproven: times.unproven,
            held: keys.as_ref().map(|k| k.held()).unwrap_or_default(),
            sealing: keys.map_or(0, |k| k.sealing()),
            copies: Vec::new(),
            older: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_without_an_answer_is_news_until_a_later_proof() {
        let (key, second) = (KeyStanding::default(), Duration::from_secs(1));
        key.proven(second);
        assert!(key.unproven(5 * second, "no answer"));
        key.proven(3 * second);
        assert!(!key.unproven(6 * second, "no answer"));
        key.proven(7 * second);
        assert!(key.unproven(8 * second, "no answer"));
    }
}
