//! Sealing: AES-256-GCM with keys derived per sealer and counted nonces.
//!
//! `format (1) | key generation (4, BE) | salt (16) | counter (8, BE) | ciphertext | tag (16)`
//!
//! Invariants. A sealer draws a random salt when it is made, derives its own key from the data key
//! and that salt, and counts its nonces from 0: no (key, nonce) pair is used twice, however many
//! nodes and restarts seal under one data key. Tenant, incarnation and purpose are associated data
//! and the purpose is in the key's label too: bytes put in another's place do not open.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit};
use parking_lot::RwLock;
use thiserror::Error;

use crate::guarded::Guarded;
use crate::secret::{Secret, random_bytes};
use crate::{TenantId, TenantKeys};

pub const FORMAT: u8 = 1;
const HEADER: usize = 1 + 4 + 16 + 8;
const TAG: usize = 16;
/// Bytes that sealing adds.
pub const OVERHEAD: usize = HEADER + TAG;
/// Derived keys an opener keeps: one a sealer's start, so a handful in ordinary life.
const MAX_OPENERS: usize = 256;

/// What sealed bytes are for. Separate labels keep one purpose from standing in for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    LogEntry,
    Directory,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Purpose::LogEntry => b"holdfast/v1/seal/log-entry",
            Purpose::Directory => b"holdfast/v1/seal/directory",
        }
    }
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum SealError {
    #[error("sealed bytes are cut short: {0} bytes")]
    Truncated(usize),
    #[error("sealed bytes have format {0}; this version reads format {FORMAT}")]
    Format(u8),
    #[error("sealed under key generation {0}, which this node does not hold")]
    UnknownGeneration(u32),
    #[error(
        "sealed bytes do not authenticate: damaged, or another tenant's, incarnation's or purpose's"
    )]
    Forged,
}

fn associated_data(tenant: TenantId, incarnation: u32, purpose: Purpose) -> Vec<u8> {
    let mut aad = Vec::with_capacity(64);
    aad.extend_from_slice(&tenant.0);
    aad.extend_from_slice(&incarnation.to_be_bytes());
    aad.extend_from_slice(purpose.label());
    aad
}

fn cipher(key: &Secret, salt: &[u8; 16], purpose: Purpose) -> Guarded<Aes256Gcm> {
    let derived = key.derive(salt, purpose.label());
    Guarded::new(|| Aes256Gcm::new(derived.expose().into()))
}

fn nonce(counter: u64) -> [u8; 12] {
    let mut n = [0u8; 12];
    n[4..].copy_from_slice(&counter.to_be_bytes());
    n
}

/// Seals for one tenant, incarnation and purpose.
pub struct Sealer {
    generation: u32,
    salt: [u8; 16],
    counter: AtomicU64,
    cipher: Guarded<Aes256Gcm>,
    aad: Vec<u8>,
}

impl Sealer {
    /// Seals under the newest generation that `keys` holds.
    pub fn new(keys: &TenantKeys, incarnation: u32, purpose: Purpose) -> Self {
        Self::with_salt(keys, incarnation, purpose, random_bytes())
    }

    fn with_salt(keys: &TenantKeys, incarnation: u32, purpose: Purpose, salt: [u8; 16]) -> Self {
        let (generation, key) = keys.newest();
        Sealer {
            generation,
            salt,
            counter: AtomicU64::new(0),
            cipher: cipher(&key, &salt, purpose),
            aad: associated_data(keys.tenant(), incarnation, purpose),
        }
    }

    /// The generation that it seals under.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    pub fn seal(&self, plain: &[u8]) -> Vec<u8> {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        assert!(counter < u64::MAX, "a sealer's counter never wraps");
        let mut out = Vec::with_capacity(plain.len() + OVERHEAD);
        out.push(FORMAT);
        out.extend_from_slice(&self.generation.to_be_bytes());
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&counter.to_be_bytes());
        out.extend_from_slice(plain);
        let tag = self
            .cipher
            .encrypt_inout_detached(
                &nonce(counter).into(),
                &self.aad,
                (&mut out[HEADER..]).into(),
            )
            .expect("a command is far below the 64 GiB that AES-GCM takes");
        out.extend_from_slice(&tag);
        out
    }
}

/// Ciphers by key generation and salt.
type Derived = HashMap<(u32, [u8; 16]), Arc<Guarded<Aes256Gcm>>>;

/// Opens what sealers of one tenant, incarnation and purpose made, in any generation held.
pub struct Opener {
    purpose: Purpose,
    aad: Vec<u8>,
    derived: RwLock<Derived>,
    /// Dropped last: whoever waits for them to be gone waits for what was derived too.
    keys: Arc<TenantKeys>,
}

impl Opener {
    pub fn new(keys: Arc<TenantKeys>, incarnation: u32, purpose: Purpose) -> Self {
        Opener {
            aad: associated_data(keys.tenant(), incarnation, purpose),
            keys,
            purpose,
            derived: RwLock::new(HashMap::new()),
        }
    }

    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let generation = generation_of(sealed)?;
        let salt: [u8; 16] = sealed[5..21].try_into().expect("length checked");
        let counter = u64::from_be_bytes(sealed[21..29].try_into().expect("length checked"));
        let cipher = self.derived(generation, salt)?;
        let (body, tag) = sealed[HEADER..].split_at(sealed.len() - OVERHEAD);
        let mut out = body.to_vec();
        let tag: [u8; TAG] = tag.try_into().expect("length checked");
        cipher
            .decrypt_inout_detached(
                &nonce(counter).into(),
                &self.aad,
                out.as_mut_slice().into(),
                &tag.into(),
            )
            .map_err(|_| SealError::Forged)?;
        Ok(out)
    }

    /// Lets go of what was derived of generations before `oldest`.
    pub fn forget_before(&self, oldest: u32) {
        self.derived
            .write()
            .retain(|(generation, _), _| *generation >= oldest);
    }

    fn derived(
        &self,
        generation: u32,
        salt: [u8; 16],
    ) -> Result<Arc<Guarded<Aes256Gcm>>, SealError> {
        if let Some(c) = self.derived.read().get(&(generation, salt)) {
            return Ok(c.clone());
        }
        let key = self
            .keys
            .generation(generation)
            .ok_or(SealError::UnknownGeneration(generation))?;
        let made = Arc::new(cipher(&key, &salt, self.purpose));
        let mut derived = self.derived.write();
        if derived.len() >= MAX_OPENERS {
            derived.clear();
        }
        derived.insert((generation, salt), made.clone());
        Ok(made)
    }
}

/// The key generation that sealed bytes name, without opening them.
pub fn generation_of(sealed: &[u8]) -> Result<u32, SealError> {
    if sealed.len() < OVERHEAD {
        return Err(SealError::Truncated(sealed.len()));
    }
    if sealed[0] != FORMAT {
        return Err(SealError::Format(sealed[0]));
    }
    Ok(u32::from_be_bytes(
        sealed[1..5].try_into().expect("length checked"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(tenant: u8) -> Arc<TenantKeys> {
        let secret = Secret::from_slice(&[7; 32]).unwrap();
        Arc::new(TenantKeys::new(
            TenantId([tenant; 16]),
            secret.clone(),
            [(1, secret)],
        ))
    }

    /// NIST GCM test case 16 (256-bit key, 12-byte nonce, associated data).
    #[test]
    fn aes_gcm_known_answer() {
        let key: [u8; 32] =
            hex::decode("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308")
                .unwrap()
                .try_into()
                .unwrap();
        let nonce: [u8; 12] = hex::decode("cafebabefacedbaddecaf888")
            .unwrap()
            .try_into()
            .unwrap();
        let aad = hex::decode("feedfacedeadbeeffeedfacedeadbeefabaddad2").unwrap();
        let mut buf = hex::decode("d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39").unwrap();
        let tag = Aes256Gcm::new(&key.into())
            .encrypt_inout_detached(&nonce.into(), &aad, buf.as_mut_slice().into())
            .unwrap();
        assert_eq!(hex::encode(tag), "76fc6ece0f4e1768cddf8853bb2d551b");
        assert_eq!(&hex::encode(&buf)[..32], "522dc1f099567d07f47f37a32a84427d");
    }

    /// The format is fixed: a sealer with a known key and salt makes these bytes.
    #[test]
    fn golden_sealed_bytes() {
        let sealer = Sealer::with_salt(&keys(1), 3, Purpose::LogEntry, [9; 16]);
        let golden = include_str!("../golden/sealed-v1.hex").trim();
        assert_eq!(hex::encode(sealer.seal(b"holdfast")), golden);
        let opener = Opener::new(keys(1), 3, Purpose::LogEntry);
        assert_eq!(
            opener.open(&hex::decode(golden).unwrap()).unwrap(),
            b"holdfast"
        );
    }

    #[test]
    fn every_flip_and_every_cut_is_refused() {
        let sealed = Sealer::new(&keys(1), 1, Purpose::LogEntry).seal(b"value");
        let opener = Opener::new(keys(1), 1, Purpose::LogEntry);
        for i in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[i] ^= 1;
            assert!(opener.open(&bad).is_err(), "flip at {i}");
            assert!(opener.open(&sealed[..i]).is_err(), "cut at {i}");
        }
        assert_eq!(opener.open(&sealed).unwrap(), b"value");
    }

    #[test]
    fn swapped_tenant_incarnation_purpose_or_generation_is_refused() {
        let sealed = Sealer::new(&keys(1), 1, Purpose::LogEntry).seal(b"value");
        let opens = |k, inc, p| Opener::new(k, inc, p).open(&sealed);
        assert_eq!(opens(keys(2), 1, Purpose::LogEntry), Err(SealError::Forged));
        assert_eq!(opens(keys(1), 2, Purpose::LogEntry), Err(SealError::Forged));
        assert_eq!(
            opens(keys(1), 1, Purpose::Directory),
            Err(SealError::Forged)
        );
        let mut other = sealed.clone();
        other[4] = 2;
        let e = Opener::new(keys(1), 1, Purpose::LogEntry).open(&other);
        assert_eq!(e, Err(SealError::UnknownGeneration(2)));
    }

    #[test]
    fn nonces_and_salts_differ() {
        let a = Sealer::new(&keys(1), 1, Purpose::LogEntry);
        let b = Sealer::new(&keys(1), 1, Purpose::LogEntry);
        let sealed = [a.seal(b"x"), a.seal(b"x"), b.seal(b"x")];
        assert_ne!(sealed[0][5..29], sealed[1][5..29]);
        assert_ne!(sealed[0][5..29], sealed[2][5..29]);
    }
}
