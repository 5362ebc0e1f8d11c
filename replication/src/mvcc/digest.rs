//! The digest of a tenant's state: the sum modulo 2^256 of keyed BLAKE3 hashes of what lives.
//!
//! Adding and removing are constant work, the order does not matter, and compaction of history
//! does not touch it. Equal digests under one key mean equal live states.

use serde::{Deserialize, Serialize};

/// A sum modulo 2^256, little-endian limbs.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest([u64; 4]);

impl Digest {
    pub fn add(&mut self, hash: Digest) {
        let mut carry = 0u128;
        for (limb, other) in self.0.iter_mut().zip(hash.0) {
            let sum = u128::from(*limb) + u128::from(other) + carry;
            *limb = sum as u64;
            carry = sum >> 64;
        }
    }

    pub fn subtract(&mut self, hash: Digest) {
        let mut borrow = 0i128;
        for (limb, other) in self.0.iter_mut().zip(hash.0) {
            let difference = i128::from(*limb) - i128::from(other) - borrow;
            *limb = difference as u64;
            borrow = i128::from(difference < 0);
        }
    }

    pub fn to_bytes(self) -> [u8; 32] {
        let mut out = [0u8; 32];
        for (chunk, limb) in out.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&limb.to_le_bytes());
        }
        out
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut limbs = [0u64; 4];
        for (limb, chunk) in limbs.iter_mut().zip(bytes.chunks_exact(8)) {
            *limb = u64::from_le_bytes(chunk.try_into().expect("8 bytes"));
        }
        Digest(limbs)
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.to_bytes()))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let mut bytes = [0u8; 32];
        hex::decode_to_slice(&text, &mut bytes).map_err(serde::de::Error::custom)?;
        Ok(Digest::from_bytes(bytes))
    }
}

/// Digests of a tenant's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Live keys: key, value, create and mod revision, version, lease of the latest version.
    pub keys: Digest,
    /// Users and roles.
    pub auth: Digest,
    pub leases: Digest,
}

/// Hashes rows for a digest under the tenant's secret digest key.
pub struct Hasher {
    key: kms::Secret,
}

impl Hasher {
    pub fn new(keys: &kms::TenantKeys) -> Self {
        Hasher {
            key: keys.digest_key(),
        }
    }

    /// `row` is the stored form of the record under `key`.
    pub fn hash(&self, key: &[u8], row: &[u8]) -> Digest {
        let mut hasher = blake3::Hasher::new_keyed(self.key.expose());
        hasher.update(&(key.len() as u64).to_be_bytes());
        hasher.update(key);
        hasher.update(row);
        Digest::from_bytes(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_wrap_and_undo() {
        let max = Digest::from_bytes([0xff; 32]);
        let mut one = [0u8; 32];
        one[0] = 1;
        let mut d = max;
        d.add(Digest::from_bytes(one));
        assert_eq!(d, Digest::default());
        d.subtract(Digest::from_bytes(one));
        assert_eq!(d, max);
        assert_eq!(Digest::from_bytes(max.to_bytes()), max);
    }
}
