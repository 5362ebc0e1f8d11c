//! The `local` provider: KEKs in a keyfile, for development and air-gapped sites.
//!
//! The file is JSON, mode 0600, read anew at each call, so that a changed state takes effect at
//! once. A key has the states that a KMS knows: enabled, disabled, pending deletion. Changes are
//! written beside and renamed over, after fsync.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::guarded::Guarded;
use crate::secret::random_bytes;
use crate::{Context, KeyUri, KmsError, Provider, Refusal, Secret};

/// The state of a key in the keyfile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    Enabled,
    Disabled,
    PendingDeletion,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    state: KeyState,
    /// 64 hex digits.
    material: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.material.zeroize();
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    keys: BTreeMap<String, Entry>,
}

/// A keyfile.
#[derive(Clone)]
pub struct Keyfile {
    path: PathBuf,
}

impl Keyfile {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Keyfile { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a key with fresh material; creates the file if there is none. A key that is there
    /// already is an error, since overwriting one destroys what it wraps.
    pub fn add(&self, name: &str) -> Result<(), KmsError> {
        format!("local:{name}").parse::<KeyUri>()?;
        let mut file = match self.path.exists() {
            true => self.read()?,
            false => File {
                version: 1,
                ..File::default()
            },
        };
        if file.keys.contains_key(name) {
            return Err(KmsError::Invalid(format!(
                "keyfile {} has a key {name} already; choose another name",
                self.path.display()
            )));
        }
        let material = hex::encode(random_bytes::<32>());
        let state = KeyState::Enabled;
        file.keys
            .insert(name.to_string(), Entry { state, material });
        self.write(&file)
    }

    pub fn set_state(&self, name: &str, state: KeyState) -> Result<(), KmsError> {
        let mut file = self.read()?;
        let Some(entry) = file.keys.get_mut(name) else {
            return Err(KmsError::refused(
                &KeyUri::Local(name.into()),
                Refusal::NotFound,
            ));
        };
        entry.state = state;
        self.write(&file)
    }

    fn invalid(&self, what: impl std::fmt::Display) -> KmsError {
        KmsError::Invalid(format!("keyfile {}: {what}", self.path.display()))
    }

    fn read(&self) -> Result<File, KmsError> {
        let meta = fs::metadata(&self.path).map_err(|e| self.invalid(e))?;
        let mode = meta.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(self.invalid(format!(
                "mode {mode:o} lets others read it; run chmod 600 on it"
            )));
        }
        let text = Zeroizing::new(fs::read(&self.path).map_err(|e| self.invalid(e))?);
        let file: File = serde_json::from_slice(&text).map_err(|e| self.invalid(e))?;
        if file.version != 1 {
            return Err(self.invalid(format!("version {} is not known; 1 is", file.version)));
        }
        Ok(file)
    }

    fn write(&self, file: &File) -> Result<(), KmsError> {
        let text = Zeroizing::new(serde_json::to_vec_pretty(file).map_err(|e| self.invalid(e))?);
        write_private(&self.path, &text).map_err(|e| self.invalid(e))
    }

    /// The cipher of an enabled key.
    fn cipher(&self, key: &KeyUri) -> Result<Guarded<Aes256Gcm>, KmsError> {
        let KeyUri::Local(name) = key else {
            return Err(self.invalid(format!("{key} is not a local key")));
        };
        let file = self.read()?;
        let entry = file
            .keys
            .get(name)
            .ok_or_else(|| KmsError::refused(key, Refusal::NotFound))?;
        match entry.state {
            KeyState::Enabled => {}
            KeyState::Disabled => return Err(KmsError::refused(key, Refusal::Disabled)),
            KeyState::PendingDeletion => {
                return Err(KmsError::refused(key, Refusal::PendingDeletion));
            }
        }
        let bytes = Zeroizing::new(hex::decode(&entry.material).unwrap_or_default());
        let secret = Secret::from_slice(&bytes)
            .ok_or_else(|| self.invalid(format!("key {name} is not 64 hex digits")))?;
        Ok(Guarded::new(|| Aes256Gcm::new(secret.expose().into())))
    }
}

/// Writes `bytes` to `path` with mode 0600, through a synced temporary file and a rename.
pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // A name of its own: two writers of one file do not meet in the temporary one.
    let tag = hex::encode(random_bytes::<4>());
    let temporary = path.with_extension(format!("{tag}.tmp"));
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => fs::File::open(dir)?.sync_all(),
        _ => fs::File::open(".")?.sync_all(),
    }
}

#[async_trait]
impl Provider for Keyfile {
    async fn wrap(&self, key: &KeyUri, plain: &[u8], ctx: &Context) -> Result<Vec<u8>, KmsError> {
        let nonce: [u8; 12] = random_bytes();
        let mut out = nonce.to_vec();
        out.extend_from_slice(plain);
        let tag = self
            .cipher(key)?
            .encrypt_inout_detached(&nonce.into(), &ctx.bytes(), (&mut out[12..]).into())
            .map_err(|_| self.invalid("plaintext too long"))?;
        out.extend_from_slice(&tag);
        Ok(out)
    }

    async fn unwrap(
        &self,
        key: &KeyUri,
        wrapped: &[u8],
        ctx: &Context,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let cipher = self.cipher(key)?;
        let wrong = || KmsError::WrongCiphertext {
            key: key.to_string(),
        };
        let (nonce, rest) = wrapped.split_first_chunk::<12>().ok_or_else(wrong)?;
        let (body, tag) = rest.split_last_chunk::<16>().ok_or_else(wrong)?;
        let mut out = Zeroizing::new(body.to_vec());
        cipher
            .decrypt_inout_detached(
                &(*nonce).into(),
                &ctx.bytes(),
                out.as_mut_slice().into(),
                &(*tag).into(),
            )
            .map_err(|_| wrong())?;
        Ok(out)
    }

    async fn locations(&self, _key: &KeyUri) -> Result<Vec<String>, KmsError> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Region, TenantId};

    fn ctx(tenant: u8) -> Context {
        Context {
            tenant: TenantId([tenant; 16]),
            region: Region::Eu,
            purpose: "data-key",
        }
    }

    #[tokio::test]
    async fn wraps_unwraps_and_obeys_the_state() {
        let dir =
            std::env::temp_dir().join(format!("keyfile-{}", hex::encode(random_bytes::<8>())));
        fs::create_dir(&dir).unwrap();
        let kf = Keyfile::new(dir.join("keys.json"));
        kf.add("acme").unwrap();
        assert!(kf.add("acme").is_err());
        let key = KeyUri::Local("acme".into());
        let w = kf.wrap(&key, b"secret", &ctx(1)).await.unwrap();
        assert_eq!(*kf.unwrap(&key, &w, &ctx(1)).await.unwrap(), b"secret");
        let e = kf.unwrap(&key, &w, &ctx(2)).await.unwrap_err();
        assert!(matches!(e, KmsError::WrongCiphertext { .. }), "{e}");

        kf.set_state("acme", KeyState::Disabled).unwrap();
        let e = kf.unwrap(&key, &w, &ctx(1)).await.unwrap_err();
        assert!(e.to_string().contains("disabled"), "{e}");
        kf.set_state("acme", KeyState::PendingDeletion).unwrap();
        let e = kf.unwrap(&key, &w, &ctx(1)).await.unwrap_err();
        assert!(e.to_string().contains("pending deletion"), "{e}");
        kf.set_state("acme", KeyState::Enabled).unwrap();

        fs::set_permissions(kf.path(), fs::Permissions::from_mode(0o644)).unwrap();
        let e = kf.unwrap(&key, &w, &ctx(1)).await.unwrap_err();
        assert!(e.to_string().contains("chmod 600"), "{e}");
        fs::remove_dir_all(dir).unwrap();
    }
}
