//! A tenant's keys in clear, in memory: a data key per generation, and the tenant's own secret,
//! which never rotates and from which the digest key and the token key come.

use std::collections::BTreeMap;

use crate::{Secret, TenantId};

/// Keys of one tenant. Dropping it overwrites them.
pub struct TenantKeys {
    tenant: TenantId,
    secret: Secret,
    generations: BTreeMap<u32, Secret>,
}

impl TenantKeys {
    /// # Panics
    /// If `generations` is empty: a tenant without a data key does not exist.
    pub fn new(
        tenant: TenantId,
        secret: Secret,
        generations: impl IntoIterator<Item = (u32, Secret)>,
    ) -> Self {
        let generations: BTreeMap<_, _> = generations.into_iter().collect();
        assert!(!generations.is_empty(), "a tenant has a data key");
        TenantKeys {
            tenant,
            secret,
            generations,
        }
    }

    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// The newest generation, under which new bytes are sealed.
    pub fn newest(&self) -> (u32, &Secret) {
        let (generation, key) = self.generations.last_key_value().expect("never empty");
        (*generation, key)
    }

    pub fn generation(&self, generation: u32) -> Option<&Secret> {
        self.generations.get(&generation)
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
