//! A tenant's keys in clear, in memory: a data key per generation, and the tenant's own secret,
//! which never rotates and from which the digest key and the token key come.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use crate::{Secret, TenantId};

/// Keys of one tenant. Dropping it overwrites them.
pub struct TenantKeys {
    tenant: TenantId,
    secret: Secret,
    generations: RwLock<BTreeMap<u32, Arc<Secret>>>,
    /// Under which new bytes are sealed.
    sealing: AtomicU32,
    asked: Duration,
}

impl TenantKeys {
    /// New bytes are sealed under the newest of `generations`.
    ///
    /// # Panics
    /// If `generations` is empty: a tenant without a data key does not exist.
    pub fn new(
        tenant: TenantId,
        secret: Secret,
        generations: impl IntoIterator<Item = (u32, Secret)>,
    ) -> Self {
        let generations: BTreeMap<_, _> = generations
            .into_iter()
            .map(|(number, key)| (number, Arc::new(key)))
            .collect();
        let newest = generations.last_key_value().map(|(number, _)| *number);
        TenantKeys {
            tenant,
            secret,
            sealing: AtomicU32::new(newest.expect("a tenant has a data key")),
            generations: RwLock::new(generations),
            asked: Duration::ZERO,
        }
    }

    /// Notes when the KMS was asked to unwrap them, on the clock of `boottime`.
    pub(crate) fn asked_at(self, asked: Duration) -> Self {
        TenantKeys { asked, ..self }
    }

    /// Of keys that were unwrapped under another KMS key than the tenant's: that proves nothing of it.
    pub fn unproven(self) -> Self {
        self.asked_at(Duration::ZERO)
    }

    /// When the KMS was asked to unwrap them, which proved the key usable; zero if it was not.
    pub fn asked(&self) -> Duration {
        self.asked
    }

    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// The generation under which new bytes are sealed.
    pub fn sealing(&self) -> u32 {
        self.sealing.load(Ordering::Acquire)
    }

    /// That generation and its key.
    pub fn newest(&self) -> (u32, Arc<Secret>) {
        let number = self.sealing();
        let key = self.generation(number);
        (number, key.expect("the generation that seals is held"))
    }

    pub fn generation(&self, generation: u32) -> Option<Arc<Secret>> {
        self.generations.read().get(&generation).cloned()
    }

    /// Generations held, oldest first.
    pub fn held(&self) -> Vec<u32> {
        self.generations.read().keys().copied().collect()
    }

    /// Takes in another generation; what is sealed under it can be opened from now on.
    pub fn add(&self, generation: u32, key: Secret) {
        let mut generations = self.generations.write();
        generations
            .entry(generation)
            .or_insert_with(|| Arc::new(key));
    }

    /// Seals under `generation`, if it is held. Before anything is sealed.
    pub fn begin_under(&self, generation: u32) {
        if self.generation(generation).is_some() {
            self.sealing.store(generation, Ordering::Release);
        }
    }

    /// Seals new bytes under `generation` from now on, if it is held and newer than the one that
    /// seals: whoever has moved to a generation never goes back, so that an older one can be
    /// destroyed.
    pub fn seal_under(&self, generation: u32) {
        if self.generation(generation).is_some() {
            self.sealing.fetch_max(generation, Ordering::AcqRel);
        }
    }

    /// Lets go of every generation before `oldest`.
    pub fn drop_before(&self, oldest: u32) {
        let oldest = oldest.min(self.sealing());
        let mut generations = self.generations.write();
        *generations = generations.split_off(&oldest);
    }

    /// Wrapped beside each data key.
    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Keys the digests of the tenant's state.
    pub fn digest_key(&self) -> Secret {
        self.secret.derive(b"", b"holdfast/v1/digest")
    }

    /// Keys the MACs of login tokens.
    pub fn token_key(&self) -> Secret {
        self.secret.derive(b"", b"holdfast/v1/token")
    }

    /// Keys the MACs of archive objects; only the directory's is used, as the region's key.
    pub fn archive_key(&self) -> Secret {
        self.secret.derive(b"", b"holdfast/v1/archive")
    }
}
