//! The encrypted Env: every file that RocksDB writes is AES-256-CTR under a key of its own.
//!
//! A file begins with a 4 KiB prefix: magic, key generation, a random salt, zeros (see
//! docs/formats/README.md). Its key is HKDF(data key, salt). Invariant: a salt covers one
//! content; `env.cc` refuses every call that could rewrite a file. `Ciphering::Plain` exists so
//! that the canary test can show that it would find plaintext.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use aes::Aes256;
use aes::cipher::KeyInit;
use ctr::cipher::{InnerIvInit, StreamCipher, StreamCipherSeek};
use ctr::{Ctr128BE, CtrCore, flavors};
use kms::secret::random_bytes;
use kms::{Guarded, TenantKeys};

const MAGIC: &[u8; 8] = b"HOLDFAST";
const FORMAT: u8 = 1;
pub const PREFIX: usize = 4096;
const HEADER: usize = 8 + 1 + 4 + 32;
const LABEL: &[u8] = b"holdfast/v1/file";

#[repr(C)]
struct CipherCalls {
    provider: *mut c_void,
    new_prefix: extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int,
    open: extern "C" fn(*mut c_void, *const c_char, usize) -> *mut c_void,
    apply: extern "C" fn(*mut c_void, u64, *mut c_char, usize),
    close: extern "C" fn(*mut c_void),
    drop: extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn holdfast_encrypted_env(calls: *const CipherCalls) -> *mut librocksdb_sys::rocksdb_env_t;
}

/// The prefix of a new file under the newest generation.
fn new_prefix(keys: &TenantKeys) -> [u8; PREFIX] {
    let mut prefix = [0u8; PREFIX];
    prefix[..8].copy_from_slice(MAGIC);
    prefix[8] = FORMAT;
    prefix[9..13].copy_from_slice(&keys.newest().0.to_be_bytes());
    prefix[13..HEADER].copy_from_slice(&random_bytes::<32>());
    prefix
}

/// The cipher of the file that begins with `prefix`, or `None` if the prefix is not valid.
fn file_cipher(keys: &TenantKeys, prefix: &[u8]) -> Option<Guarded<Aes256>> {
    let valid = prefix.len() == PREFIX
        && &prefix[..8] == MAGIC
        && prefix[8] == FORMAT
        && prefix[HEADER..].iter().all(|b| *b == 0);
    if !valid {
        return None;
    }
    let generation = u32::from_be_bytes(prefix[9..13].try_into().ok()?);
    let key = keys
        .generation(generation)?
        .derive(&prefix[13..HEADER], LABEL);
    Some(Guarded::new(|| Aes256::new(key.expose().into())))
}

/// How much of a file tells its generation.
pub const HEAD: usize = 13;

/// The generation that a file is under, by its first `HEAD` bytes; none if it is not encrypted.
pub fn generation_of(head: &[u8]) -> Option<u32> {
    let head = head.get(..HEAD).filter(|head| head.starts_with(MAGIC))?;
    Some(u32::from_be_bytes(
        head[9..].try_into().expect("4 bytes are left"),
    ))
}

/// The generation that a file is under; none if it is not encrypted.
pub fn generation_of_file(path: &Path) -> io::Result<Option<u32>> {
    let mut head = [0u8; HEAD];
    let file = fs::File::open(path)?;
    let read = file.read_exact_at(&mut head, 0).is_ok();
    Ok(read.then(|| generation_of(&head)).flatten())
}

/// Bytes of the files in `dir` by the generation that each is under.
pub fn generations(dir: &Path) -> io::Result<BTreeMap<u32, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let looked = generation_of_file(&path).and_then(|under| Ok((under, fs::metadata(&path)?)));
        match looked {
            Ok((Some(under), meta)) => *found.entry(under).or_default() += meta.len(),
            Ok((None, _)) => {}
            // An engine that runs removes files.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// A generation that a file of `dir` is under and `keys` does not hold.
pub fn missing_generation(dir: &Path, keys: &TenantKeys) -> io::Result<Option<u32>> {
    let found = generations(dir)?.into_keys();
    Ok(found.into_iter().find(|g| keys.generation(*g).is_none()))
}

/// En- or decrypts `data`, which stands at `offset` of its file.
fn apply_cipher(cipher: &Aes256, offset: u64, data: &mut [u8]) {
    // By reference: the key schedule is expanded once a file, not once a call.
    let core = CtrCore::<&Aes256, flavors::Ctr128BE>::inner_iv_init(cipher, &[0u8; 16].into());
    let mut stream = Ctr128BE::<&Aes256>::from_core(core);
    stream.seek(offset);
    stream.apply_keystream(data);
}

extern "C" fn call_new_prefix(provider: *mut c_void, out: *mut c_char, length: usize) -> c_int {
    if length != PREFIX {
        return 1;
    }
    // SAFETY: `provider` is the Arc leaked in `encrypted_env`, alive until `call_drop`.
    let keys = unsafe { &*provider.cast::<TenantKeys>() };
    let prefix = new_prefix(keys);
    // SAFETY: RocksDB hands a buffer of `length` bytes.
    unsafe { std::ptr::copy_nonoverlapping(prefix.as_ptr(), out.cast(), PREFIX) };
    0
}

extern "C" fn call_open(
    provider: *mut c_void,
    prefix: *const c_char,
    length: usize,
) -> *mut c_void {
    // SAFETY: as above; `prefix` points to `length` bytes.
    let (keys, prefix) = unsafe {
        let keys = &*provider.cast::<TenantKeys>();
        (
            keys,
            std::slice::from_raw_parts(prefix.cast::<u8>(), length),
        )
    };
    match file_cipher(keys, prefix) {
        Some(cipher) => cipher.into_raw().cast(),
        None => std::ptr::null_mut(),
    }
}

extern "C" fn call_apply(cipher: *mut c_void, offset: u64, data: *mut c_char, length: usize) {
    // SAFETY: `cipher` is a Guarded from `call_open`, shared for reading; `data` has `length` bytes.
    let (cipher, data) = unsafe {
        let cipher = &*cipher.cast::<Aes256>();
        (
            cipher,
            std::slice::from_raw_parts_mut(data.cast::<u8>(), length),
        )
    };
    apply_cipher(cipher, offset, data);
}

extern "C" fn call_close(cipher: *mut c_void) {
    // SAFETY: the stream that owned it ends here.
    drop(unsafe { Guarded::from_raw(cipher.cast::<Aes256>()) });
}

extern "C" fn call_drop(provider: *mut c_void) {
    // SAFETY: the Arc leaked in `encrypted_env`; RocksDB's provider ends here.
    drop(unsafe { Arc::from_raw(provider.cast::<TenantKeys>()) });
}

/// How an engine's files lie on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ciphering {
    Encrypted,
    /// Control for tests: no cipher.
    Plain,
}

/// An Env for one tenant's RocksDB. Its thread pools are the process's, shared by all tenants.
pub fn encrypted_env(keys: Arc<TenantKeys>, how: Ciphering) -> Result<rocksdb::Env, String> {
    if how == Ciphering::Plain {
        return rocksdb::Env::new().map_err(|e| e.to_string());
    }
    let calls = CipherCalls {
        provider: Arc::into_raw(keys).cast_mut().cast(),
        new_prefix: call_new_prefix,
        open: call_open,
        apply: call_apply,
        close: call_close,
        drop: call_drop,
    };
    // SAFETY: the calls outlive the Env: `provider` is dropped by its last owner through `drop`.
    let env = unsafe { holdfast_encrypted_env(&calls) };
    if env.is_null() {
        return Err("RocksDB refuses the encryption provider".into());
    }
    // SAFETY: a rocksdb_env_t with the layout of RocksDB's C API, owned by the returned Env.
    Ok(unsafe { rocksdb::Env::from_raw(env) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms::{Secret, TenantId};

    fn keys() -> TenantKeys {
        let key = Secret::from_slice(&[5; 32]).unwrap();
        TenantKeys::new(TenantId([1; 16]), key.clone(), [(1, key)])
    }

    /// NIST SP 800-38A, F.5.5: CTR-AES256, first block.
    #[test]
    fn ctr_known_answer() {
        let key: [u8; 32] =
            hex::decode("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
                .unwrap()
                .try_into()
                .unwrap();
        let iv: [u8; 16] = hex::decode("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
            .unwrap()
            .try_into()
            .unwrap();
        let mut data = hex::decode("6bc1bee22e409f96e93d7e117393172a").unwrap();
        let aes = Aes256::new(&key.into());
        let core = CtrCore::<&Aes256, flavors::Ctr128BE>::inner_iv_init(&aes, &iv.into());
        Ctr128BE::<&Aes256>::from_core(core).apply_keystream(&mut data);
        assert_eq!(hex::encode(data), "601ec313775789a5b7a7f504bbf3d228");
    }

    #[test]
    fn golden_file_prefix() {
        let mut prefix = new_prefix(&keys());
        prefix[13..HEADER].fill(7);
        let cipher = file_cipher(&keys(), &prefix).unwrap();
        let mut data = *b"holdfast";
        apply_cipher(&cipher, PREFIX as u64, &mut data);
        let golden = include_str!("../../golden/file-prefix-v1.hex").trim();
        assert_eq!(
            format!("{}{}", hex::encode(&prefix[..HEADER]), hex::encode(data)),
            golden
        );
    }

    #[test]
    fn a_damaged_prefix_is_refused() {
        let prefix = new_prefix(&keys());
        assert!(file_cipher(&keys(), &prefix[..PREFIX - 1]).is_none());
        for i in (0..13).chain(HEADER..PREFIX) {
            let mut bad = prefix;
            bad[i] ^= 1;
            assert!(file_cipher(&keys(), &bad).is_none(), "flip at {i}");
        }
    }

    #[test]
    fn any_offset_decrypts_alone() {
        let cipher = file_cipher(&keys(), &new_prefix(&keys())).unwrap();
        let plain: Vec<u8> = (0..200).collect();
        let mut all = plain.clone();
        apply_cipher(&cipher, 4096, &mut all);
        for at in [0, 1, 15, 16, 17, 100] {
            let mut part = all[at..].to_vec();
            apply_cipher(&cipher, 4096 + at as u64, &mut part);
            assert_eq!(part, plain[at..], "from {at}");
        }
    }
}
