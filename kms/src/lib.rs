//! Keys: who may read a tenant's bytes.
//!
//! A tenant's data key (DEK) exists in clear only in the memory of nodes that unwrapped it under
//! the tenant's own key-encryption key (KEK) in a KMS. Everywhere else it is wrapped. This crate
//! holds the providers that wrap and unwrap, the objects that wrapped keys are kept in, and the
//! sealing that turns plaintext into the only form that logs, peers and buckets ever see.

pub mod aws;
pub mod guarded;
pub mod jurisdiction;
pub mod keyring;
pub mod lease;
pub mod local;
mod meter;
pub mod provider;
pub mod seal;
pub mod secret;
pub mod wrapped;

pub use guarded::Guarded;
pub use jurisdiction::Region;
pub use keyring::TenantKeys;
pub use lease::{Lease, Probe};
pub use provider::{Context, KeyUri, KmsError, Provider, Providers, Refusal};
pub use seal::{Opener, Purpose, SealError, Sealer};
pub use secret::Secret;
pub use wrapped::{WrappedKey, WrappedKeyError, WrappedKeyStore};

use serde::{Deserialize, Serialize};

/// A tenant's random identity: 128 bits, never reused. Printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TenantId(pub [u8; 16]);

impl TenantId {
    /// A fresh id from the operating system's randomness.
    pub fn random() -> Self {
        TenantId(secret::random_bytes())
    }
}

impl std::fmt::Display for TenantId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for TenantId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for TenantId {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut id = [0u8; 16];
        hex::decode_to_slice(s, &mut id)
            .map_err(|_| format!("\"{s}\" is not a tenant id: 32 hex digits are expected"))?;
        Ok(TenantId(id))
    }
}

impl Serialize for TenantId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TenantId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
