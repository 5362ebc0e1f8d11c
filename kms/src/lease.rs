//! A node's lease on a tenant's key: for how long the last proof that it may be used holds.
//!
//! Invariants. A proof counts from the moment the KMS was *asked*, on a clock that goes on while the
//! machine sleeps: a process that was stopped for an hour does not answer on an hour-old proof. An
//! answer that proves nothing (a time-out, throttling) lets the lease go on for the tenant's grace,
//! counted from the last proof. Who did not ask at all has no lease after `LEASE`.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use zeroize::Zeroizing;

use crate::secret::random_bytes;
use crate::{Context, KeyUri, KmsError, Providers, Region, TenantId};

/// How often a key is proven.
pub const INTERVAL: Duration = Duration::from_secs(30);
/// For how long a question counts: an interval, its jitter, a turn at the meter and a slow answer.
pub const LEASE: Duration = Duration::from_secs(50);
const PURPOSE: &str = "probe";

/// Time since the machine started, sleep included.
pub fn boottime() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the struct that it is given.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    assert_eq!(done, 0, "the kernel has CLOCK_BOOTTIME");
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// When a key was last asked for, last proven and last refused, in milliseconds of `boottime`.
#[derive(Default)]
pub struct Lease {
    asked: AtomicU64,
    proven: AtomicU64,
    refused: AtomicU64,
    grace: AtomicU64,
}

impl Lease {
    pub fn set_grace(&self, grace: Duration) {
        let grace = grace.as_millis() as u64;
        self.grace.store(grace, Ordering::Relaxed);
    }

    /// The KMS proved the key usable when asked at `sent`. Answers whether it was not asked since.
    pub fn proven(&self, sent: Duration) -> bool {
        let sent = sent.as_millis() as u64;
        self.proven.fetch_max(sent, Ordering::AcqRel);
        self.asked.fetch_max(sent, Ordering::AcqRel) <= sent
    }

    /// The KMS was asked at `sent` and proved nothing.
    pub fn unproven(&self, sent: Duration) {
        self.asked
            .fetch_max(sent.as_millis() as u64, Ordering::AcqRel);
    }

    /// The KMS refused the key: what it proved before counts no more.
    pub fn refused(&self, now: Duration) {
        self.refused
            .fetch_max(now.as_millis() as u64, Ordering::AcqRel);
    }

    /// Since the last proof.
    pub fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_millis(self.proven.load(Ordering::Acquire)))
    }

    fn grace(&self) -> Duration {
        Duration::from_millis(self.grace.load(Ordering::Relaxed))
    }

    /// Whether the grace after the last proof has passed.
    pub fn grace_is_over(&self, now: Duration) -> bool {
        self.age(now) >= self.grace()
    }

    /// Whether the key may be used now.
    pub fn holds(&self) -> bool {
        let now = boottime();
        let asked = Duration::from_millis(self.asked.load(Ordering::Acquire));
        if self.proven.load(Ordering::Acquire) < self.refused.load(Ordering::Acquire) {
            return false;
        }
        // Between two proofs the key counts as proven, however short the grace.
        now.saturating_sub(asked) < LEASE && self.age(now) < self.grace().max(LEASE)
    }
}

/// A random value under a tenant's key. Opening it proves the key usable, and tells nothing.
pub struct Probe {
    key: KeyUri,
    context: Context,
    plain: [u8; 32],
    wrapped: Vec<u8>,
}

impl Probe {
    pub async fn make(
        providers: &Providers,
        key: &KeyUri,
        tenant: TenantId,
        region: Region,
    ) -> Result<Self, KmsError> {
        let plain = random_bytes();
        let context = Context {
            tenant,
            region,
            purpose: PURPOSE,
        };
        let wrapped = providers.wrap(key, &plain, &context).await?;
        Ok(Probe {
            key: key.clone(),
            context,
            plain,
            wrapped,
        })
    }

    pub fn key(&self) -> &KeyUri {
        &self.key
    }

    /// Asks the KMS; answers when it was asked.
    pub async fn ask(&self, providers: &Providers) -> Result<Duration, KmsError> {
        let (plain, sent): (Zeroizing<Vec<u8>>, _) = providers
            .unwrap(&self.key, &self.wrapped, &self.context)
            .await?;
        match plain.as_slice() == self.plain {
            true => Ok(sent),
            false => Err(KmsError::WrongCiphertext {
                key: self.key.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lease from a proof for which the KMS was asked at `sent`.
    fn lease(sent: Duration, grace: Duration) -> Lease {
        let lease = Lease::default();
        lease.set_grace(grace);
        lease.proven(sent);
        lease
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lease_counts_from_the_question_and_grace_from_the_proof() {
        let now = boottime();
        let minute = Duration::from_secs(60);
        let fresh = lease(now, 10 * minute);
        assert!(fresh.holds());
        // Nobody asked for longer than the lease: grace does not help.
        let stale = lease(now.saturating_sub(LEASE + SECOND), 10 * minute);
        assert!(!stale.holds());
        // Asked and not answered: it holds for the grace, and no longer.
        stale.unproven(now);
        assert!(stale.holds());
        stale.set_grace(Duration::ZERO);
        assert!(!stale.holds());
        stale.proven(now);
        assert!(stale.holds());
    }

    #[test]
    fn what_was_proven_before_a_refusal_counts_no_more() {
        let now = boottime();
        let refused = lease(now.saturating_sub(SECOND), 10 * SECOND);
        refused.refused(now);
        assert!(!refused.holds());
        // Asked for before it was refused, and heard of after.
        refused.proven(now.saturating_sub(SECOND / 2));
        assert!(!refused.holds());
        refused.proven(now);
        assert!(refused.holds());
    }
}
