//! Secret bytes: overwritten when dropped, never printed.

use hkdf::Hkdf;
use rand::TryRngCore;
use sha2::Sha256;

use crate::guarded::{Guarded, burn_stack};

/// 256 bits of key material in guarded memory. `Debug` prints no bytes.
pub struct Secret(Guarded<[u8; 32]>);

/// Runs in a frame of its own, below the one that burns the stack.
#[inline(never)]
fn below(run: impl FnOnce()) {
    run();
}

impl Secret {
    fn filled(fill: impl FnOnce(&mut [u8; 32])) -> Self {
        let mut own = Guarded::new(|| [0u8; 32]);
        below(|| fill(&mut own));
        burn_stack();
        Secret(own)
    }

    pub fn random() -> Self {
        Self::filled(|own| {
            rand::rngs::OsRng
                .try_fill_bytes(own)
                .expect("the kernel's random generator answers");
        })
    }

    /// Takes exactly 32 bytes; the caller's copy stays the caller's to overwrite.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == 32).then(|| Self::filled(|own| own.copy_from_slice(bytes)))
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// HKDF-SHA256 with `salt` and `label`. Labels keep purposes apart.
    pub fn derive(&self, salt: &[u8], label: &[u8]) -> Secret {
        Self::filled(|own| {
            Hkdf::<Sha256>::new(Some(salt), self.expose())
                .expand(label, own)
                .expect("32 bytes is a valid HKDF-SHA256 output length");
        })
    }

    /// What names a key without telling it: the first 16 hex digits of a derived value.
    pub fn fingerprint(&self) -> String {
        hex::encode(&self.derive(b"", b"holdfast/v1/fingerprint").expose()[..8])
    }
}

impl Clone for Secret {
    fn clone(&self) -> Self {
        Self::filled(|own| own.copy_from_slice(self.expose()))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Bytes from the operating system.
///
/// # Panics
/// If the kernel has no randomness: nothing that follows would be safe.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .expect("the kernel's random generator answers");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 5869, test case 1, cut to 32 bytes.
    #[test]
    fn hkdf_known_answer() {
        let mut okm = [0u8; 32];
        let ikm = [0x0b; 22];
        let salt: Vec<u8> = (0..=0x0c).collect();
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        Hkdf::<Sha256>::new(Some(&salt), &ikm)
            .expand(&info, &mut okm)
            .unwrap();
        assert_eq!(
            hex::encode(okm),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        );
    }

    #[test]
    fn debug_prints_no_bytes() {
        let s = Secret::from_slice(&[0xAB; 32]).unwrap();
        assert_eq!(format!("{s:?}"), "Secret(..)");
        assert!(Secret::from_slice(&[0; 31]).is_none());
    }
}
