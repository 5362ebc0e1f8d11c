//! A process's memory, searched for key material, and the keys that a tenant's come to.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

/// How often each of `needles` (32 bytes each) lies anywhere in the memory of `pid`.
pub fn count(pid: u32, needles: &[[u8; 32]]) -> Result<Vec<usize>> {
    let maps = BufReader::new(File::open(format!("/proc/{pid}/maps"))?);
    let memory = File::open(format!("/proc/{pid}/mem")).context("reading another's memory")?;
    // Few positions begin as a needle does.
    let mut begins = vec![false; 1 << 16];
    for needle in needles {
        begins[usize::from(u16::from_be_bytes([needle[0], needle[1]]))] = true;
    }
    let mut found = vec![0; needles.len()];
    for line in maps.lines() {
        let line = line?;
        let mut parts = line.split_whitespace();
        let (Some(range), Some(rights)) = (parts.next(), parts.next()) else {
            continue;
        };
        if !rights.starts_with("rw") {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let (start, end) = (
            u64::from_str_radix(start, 16)?,
            u64::from_str_radix(end, 16)?,
        );
        let mut bytes = vec![0u8; (end - start) as usize];
        // A mapping can go meanwhile, or have no pages behind it.
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        for window in bytes.windows(32) {
            if begins[usize::from(u16::from_be_bytes([window[0], window[1]]))] {
                for (needle, count) in needles.iter().zip(&mut found) {
                    *count += usize::from(window == needle);
                }
            }
        }
    }
    Ok(found)
}

fn multiply(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b > 0 {
        if b & 1 == 1 {
            product ^= a;
        }
        a = (a << 1) ^ if a & 0x80 > 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

/// AES's S-box of one byte: its inverse in GF(2^8), then the affine map.
fn sbox(byte: u8) -> u8 {
    let inverse = (0..=255u8).find(|x| multiply(byte, *x) == 1).unwrap_or(0);
    (0..5).fold(0x63, |sum, n| sum ^ inverse.rotate_left(n))
}

/// The second 32 bytes of the AES-256 schedule of `key` (the first are the key itself).
pub fn round_keys(key: &[u8; 32]) -> [u8; 32] {
    let mut words: Vec<[u8; 4]> = key
        .chunks_exact(4)
        .map(|w| [w[0], w[1], w[2], w[3]])
        .collect();
    for n in 8..16 {
        let mut word = words[n - 1];
        if n % 8 == 0 {
            word.rotate_left(1);
        }
        if n % 4 == 0 {
            word = word.map(sbox);
        }
        if n % 8 == 0 {
            word[0] ^= 1;
        }
        let before = words[n - 8];
        words.push(std::array::from_fn(|i| word[i] ^ before[i]));
    }
    let mut out = [0u8; 32];
    for (chunk, word) in out.chunks_exact_mut(4).zip(&words[8..]) {
        chunk.copy_from_slice(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 197, appendix A.3.
    #[test]
    fn schedule_known_answer() {
        let key = hex::decode("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
        let key: [u8; 32] = key.unwrap().try_into().unwrap();
        assert_eq!(
            hex::encode(round_keys(&key)),
            "9ba354118e6925afa51a8b5f2067fcdea8b09c1a93d194cdbe49846eb75d5b9a"
        );
    }

    #[test]
    fn what_lies_in_memory_is_counted() {
        let secret: [u8; 32] = std::array::from_fn(|n| (n as u8).wrapping_mul(37) ^ 0x5a);
        let copy = Box::new(secret);
        let found = count(std::process::id(), &[secret]).unwrap();
        assert!(found[0] >= 2, "{found:?}");
        assert_eq!(*copy, std::hint::black_box(secret));
    }
}
