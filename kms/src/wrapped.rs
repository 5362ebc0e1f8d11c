//! Wrapped data keys: objects of their own in the bucket, `tenants/<id>/keys/<generation>`, and a
//! copy in a file on each node that holds a replica, and on the one where it was made.
//!
//! A generation is durable in the bucket before the first byte is sealed under it. Wrapped keys
//! are never in a log, a checkpoint or a chain, so that destroying them destroys the tenant. The
//! node's copy lets a replica start while the bucket is away. Wrapping a generation anew under
//! another KMS key replaces the object; a copy under the old key is taken for stale.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, UpdateVersion};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::local::write_private;
use crate::{Context, KeyUri, KmsError, Providers, Region, Secret, TenantId, TenantKeys};

const VERSION: u32 = 1;
const PURPOSE: &str = "data-key";

/// One generation of a tenant's keys, wrapped: the data key and the tenant's secret.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrappedKey {
    pub version: u32,
    pub tenant: TenantId,
    pub region: Region,
    pub generation: u32,
    pub key: KeyUri,
    /// Names the data key without telling it.
    pub fingerprint: String,
    /// 64 bytes, wrapped by the KMS, in hex: the data key, then the tenant's secret.
    pub wrapped: String,
}

#[derive(Debug, Error)]
pub enum WrappedKeyError {
    #[error(transparent)]
    Kms(#[from] KmsError),
    #[error("object {object}: {cause}")]
    Store { object: String, cause: String },
    #[error("there is no wrapped key {0}: the tenant was destroyed, or the bucket is not its own")]
    Missing(String),
    #[error("wrapped key {object} is not valid: {what}")]
    Invalid { object: String, what: String },
}

/// A generation in clear.
struct Unwrapped {
    generation: u32,
    data_key: Secret,
    secret: Secret,
}

impl WrappedKey {
    /// Draws the keys of a new tenant and wraps them under `key`. Nothing is stored yet.
    pub async fn create(
        providers: &Providers,
        key: &KeyUri,
        tenant: TenantId,
        region: Region,
    ) -> Result<(WrappedKey, TenantKeys), KmsError> {
        let (data_key, secret) = (Secret::random(), Secret::random());
        let own = Unwrapped {
            generation: 1,
            data_key,
            secret,
        };
        let record = Self::wrap(providers, key, tenant, region, &own).await?;
        let keys = TenantKeys::new(tenant, own.secret, [(1, own.data_key)]);
        Ok((record, keys))
    }

    /// Draws a data key for another generation of a tenant and wraps it under `key`. Nothing is
    /// stored yet, and `keys` does not change.
    pub async fn next(
        providers: &Providers,
        key: &KeyUri,
        keys: &TenantKeys,
        region: Region,
        generation: u32,
    ) -> Result<WrappedKey, KmsError> {
        let own = Unwrapped {
            generation,
            data_key: Secret::random(),
            secret: keys.secret().clone(),
        };
        Self::wrap(providers, key, keys.tenant(), region, &own).await
    }

    /// Wraps a generation that `keys` holds under `key`, be it what it was wrapped under or another.
    pub async fn again(
        providers: &Providers,
        key: &KeyUri,
        keys: &TenantKeys,
        region: Region,
        generation: u32,
    ) -> Result<Self, KmsError> {
        let held = keys.generation(generation);
        let held = held.ok_or_else(|| {
            KmsError::Invalid(format!("generation {generation} is not held here"))
        })?;
        let own = Unwrapped {
            generation,
            data_key: (*held).clone(),
            secret: keys.secret().clone(),
        };
        Self::wrap(providers, key, keys.tenant(), region, &own).await
    }

    async fn wrap(
        providers: &Providers,
        key: &KeyUri,
        tenant: TenantId,
        region: Region,
        own: &Unwrapped,
    ) -> Result<WrappedKey, KmsError> {
        providers.check_jurisdiction(key, region).await?;
        let mut plain = Zeroizing::new([0u8; 64]);
        plain[..32].copy_from_slice(own.data_key.expose());
        plain[32..].copy_from_slice(own.secret.expose());
        let ctx = Context {
            tenant,
            region,
            purpose: PURPOSE,
        };
        let wrapped = providers.wrap(key, plain.as_ref(), &ctx).await?;
        Ok(WrappedKey {
            version: VERSION,
            tenant,
            region,
            generation: own.generation,
            key: key.clone(),
            fingerprint: own.data_key.fingerprint(),
            wrapped: hex::encode(wrapped),
        })
    }

    /// Asks the KMS to unwrap it; checks the fingerprint. Also answers when it was asked.
    async fn open(&self, providers: &Providers) -> Result<(Unwrapped, Duration), KmsError> {
        providers.check_jurisdiction(&self.key, self.region).await?;
        let ctx = Context {
            tenant: self.tenant,
            region: self.region,
            purpose: PURPOSE,
        };
        let wrong = || KmsError::WrongCiphertext {
            key: self.key.to_string(),
        };
        let wrapped = hex::decode(&self.wrapped).map_err(|_| wrong())?;
        let (plain, asked) = providers.unwrap(&self.key, &wrapped, &ctx).await?;
        if plain.len() != 64 {
            return Err(wrong());
        }
        let data_key = Secret::from_slice(&plain[..32]).ok_or_else(wrong)?;
        let secret = Secret::from_slice(&plain[32..]).ok_or_else(wrong)?;
        if data_key.fingerprint() != self.fingerprint {
            return Err(wrong());
        }
        let own = Unwrapped {
            generation: self.generation,
            data_key,
            secret,
        };
        Ok((own, asked))
    }

    /// Unwraps this generation into `keys`, which goes on sealing under the one it did.
    pub async fn unwrap_into(
        &self,
        providers: &Providers,
        keys: &TenantKeys,
    ) -> Result<(), KmsError> {
        let (own, _) = self.open(providers).await?;
        if own.secret.expose() != keys.secret().expose() {
            return Err(KmsError::WrongCiphertext {
                key: self.key.to_string(),
            });
        }
        // Two keys of one generation would be the end of what is sealed under either.
        if let Some(held) = keys.generation(own.generation)
            && held.expose() != own.data_key.expose()
        {
            return Err(KmsError::WrongCiphertext {
                key: self.key.to_string(),
            });
        }
        keys.add(own.generation, own.data_key);
        Ok(())
    }

    /// Unwraps all of a tenant's generations.
    pub async fn unwrap(
        generations: &[WrappedKey],
        providers: &Providers,
    ) -> Result<TenantKeys, KmsError> {
        let Some((newest, older)) = generations.split_last() else {
            return Err(KmsError::Invalid("the tenant has no key generation".into()));
        };
        let (own, asked) = newest.open(providers).await?;
        let keys = TenantKeys::new(newest.tenant, own.secret, [(own.generation, own.data_key)]);
        let keys = keys.asked_at(asked);
        for key in older {
            key.unwrap_into(providers, &keys).await?;
        }
        Ok(keys)
    }

    fn parse(
        bytes: &[u8],
        object: &str,
        tenant: TenantId,
        generation: u32,
    ) -> Result<Self, WrappedKeyError> {
        let invalid = |what: String| WrappedKeyError::Invalid {
            object: object.to_string(),
            what,
        };
        let key: WrappedKey = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        if key.version != VERSION {
            return Err(invalid(format!(
                "version {}; this version of holdfastd reads {VERSION}",
                key.version
            )));
        }
        if key.tenant != tenant {
            return Err(invalid(format!(
                "it is tenant {}'s, not {tenant}'s",
                key.tenant
            )));
        }
        if key.generation != generation {
            return Err(invalid(format!(
                "it is generation {}, not {generation}",
                key.generation
            )));
        }
        Ok(key)
    }
}

/// Where wrapped keys are kept: the bucket, and a directory on this node.
#[derive(Clone)]
pub struct WrappedKeyStore {
    bucket: Arc<dyn ObjectStore>,
    dir: PathBuf,
    /// Tenants that are destroyed: no copy of theirs is kept any more. With the names of those that
    /// were.
    shredded: Arc<Mutex<HashMap<TenantId, Vec<String>>>>,
}

impl WrappedKeyStore {
    pub fn new(bucket: Arc<dyn ObjectStore>, dir: impl Into<PathBuf>) -> Self {
        WrappedKeyStore {
            bucket,
            dir: dir.into(),
            shredded: Arc::default(),
        }
    }

    fn object(tenant: TenantId, generation: u32) -> ObjectPath {
        ObjectPath::from(format!("tenants/{tenant}/keys/{generation:010}"))
    }

    fn file(&self, tenant: TenantId, generation: u32) -> PathBuf {
        self.dir.join(format!("{tenant}-{generation}.json"))
    }

    /// Stores a new generation in the bucket, exclusively, then on this node.
    pub async fn create(&self, key: &WrappedKey) -> Result<(), WrappedKeyError> {
        self.put(key, PutMode::Create).await?;
        self.keep(key)
    }

    /// Stores a generation that was wrapped anew in the place of what the bucket has. Where the store
    /// can tell, it is refused if another writer came between.
    pub async fn replace(&self, key: &WrappedKey) -> Result<(), WrappedKeyError> {
        let object = Self::object(key.tenant, key.generation);
        let mode = match self.bucket.head(&object).await {
            Ok(found) => PutMode::Update(UpdateVersion {
                e_tag: found.e_tag,
                version: found.version,
            }),
            Err(object_store::Error::NotFound { .. }) => PutMode::Create,
            Err(e) => return Err(store_error(&object, &e)),
        };
        match self.bucket_put(key, mode).await {
            // A directory cannot tell.
            Err(object_store::Error::NotImplemented { .. }) => {
                self.put(key, PutMode::Overwrite).await
            }
            done => done.map_err(|e| store_error(&object, &e)),
        }
    }

    async fn put(&self, key: &WrappedKey, mode: PutMode) -> Result<(), WrappedKeyError> {
        let object = Self::object(key.tenant, key.generation);
        let put = self.bucket_put(key, mode).await;
        put.map_err(|e| store_error(&object, &e))
    }

    async fn bucket_put(&self, key: &WrappedKey, mode: PutMode) -> object_store::Result<()> {
        let object = Self::object(key.tenant, key.generation);
        let bytes = PutPayload::from(to_json(key));
        self.bucket
            .put_opts(&object, bytes, mode.into())
            .await
            .map(drop)
    }

    /// Reads a generation: this node's copy, else the bucket's. A copy under another KMS key than
    /// `under` is stale, and serves only if the bucket has no good one. What was read is kept by
    /// `keep`, once it was opened.
    pub async fn load(
        &self,
        tenant: TenantId,
        generation: u32,
        under: &KeyUri,
    ) -> Result<WrappedKey, WrappedKeyError> {
        let copy = match self.copy(tenant, generation) {
            Ok(Some(copy)) if copy.key == *under => return Ok(copy),
            copy => copy.ok().flatten(),
        };
        match (self.fetch(tenant, generation).await, copy) {
            (Err(e), Some(copy)) => {
                tracing::warn!(%tenant, generation, error = %e, "the bucket's wrapped key cannot be read; this node's older copy is used");
                Ok(copy)
            }
            (found, _) => found,
        }
    }

    /// This node's copy of a generation.
    pub fn copy(
        &self,
        tenant: TenantId,
        generation: u32,
    ) -> Result<Option<WrappedKey>, WrappedKeyError> {
        let file = self.file(tenant, generation);
        match std::fs::read(&file) {
            Ok(bytes) => WrappedKey::parse(&bytes, &file_name(&file), tenant, generation).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(file_error(&file, &e)),
        }
    }

    /// Reads a generation from the bucket.
    pub async fn fetch(
        &self,
        tenant: TenantId,
        generation: u32,
    ) -> Result<WrappedKey, WrappedKeyError> {
        let object = Self::object(tenant, generation);
        let store = |e: object_store::Error| match e {
            object_store::Error::NotFound { .. } => WrappedKeyError::Missing(object.to_string()),
            e => store_error(&object, &e),
        };
        let got = self.bucket.get(&object).await.map_err(store)?;
        let bytes = got.bytes().await.map_err(store)?;
        WrappedKey::parse(&bytes, object.as_ref(), tenant, generation)
    }

    /// Reads every generation that the bucket has, oldest first.
    pub async fn fetch_all(&self, tenant: TenantId) -> Result<Vec<WrappedKey>, WrappedKeyError> {
        let dir = ObjectPath::from(format!("tenants/{tenant}/keys"));
        let listed: Result<Vec<_>, _> = self.bucket.list(Some(&dir)).try_collect().await;
        let listed = listed.map_err(|e| store_error(&dir, &e))?;
        let number = |meta: &object_store::ObjectMeta| meta.location.filename()?.parse().ok();
        let mut numbers: Vec<u32> = listed.iter().filter_map(number).collect();
        numbers.sort_unstable();
        let mut keys = Vec::new();
        for generation in numbers {
            keys.push(self.fetch(tenant, generation).await?);
        }
        match keys.is_empty() {
            true => Err(WrappedKeyError::Missing(dir.to_string())),
            false => Ok(keys),
        }
    }

    /// Whether a tenant's copies were destroyed here.
    pub fn is_shredded(&self, tenant: TenantId) -> bool {
        self.shredded.lock().contains_key(&tenant)
    }

    /// Destroys this node's copies of a tenant's wrapped keys, and keeps none from here on; answers
    /// the names of those that were destroyed since the process began.
    pub fn shred(&self, tenant: TenantId) -> std::io::Result<Vec<String>> {
        // Under the lock, which `keep` takes too.
        let mut shredded = self.shredded.lock();
        let gone = shredded.entry(tenant).or_default();
        let files = self.files(tenant)?;
        if files.is_empty() {
            return Ok(gone.clone());
        }
        for (_, file) in files {
            overwrite(&file)?;
            let name = file.file_name().unwrap_or_default();
            gone.push(name.to_string_lossy().into_owned());
        }
        std::fs::File::open(&self.dir)?.sync_all()?;
        Ok(gone.clone())
    }

    /// Destroys this node's copies of a tenant's generations before `oldest`.
    pub fn forget_before(&self, tenant: TenantId, oldest: u32) -> Result<(), WrappedKeyError> {
        let forget = || {
            let mut files = self.files(tenant)?;
            files.retain(|(generation, _)| *generation < oldest);
            for (_, file) in &files {
                overwrite(file)?;
            }
            match files.is_empty() {
                true => Ok(()),
                false => std::fs::File::open(&self.dir)?.sync_all(),
            }
        };
        forget().map_err(|e| file_error(&self.dir, &e))
    }

    /// Files of a tenant's generations. A write that was cut short left a temporary one beside them.
    fn files(&self, tenant: TenantId) -> std::io::Result<Vec<(u32, PathBuf)>> {
        let listed = match std::fs::read_dir(&self.dir) {
            Ok(listed) => listed,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut files = Vec::new();
        for entry in listed {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let rest = name.strip_prefix(&format!("{tenant}-"));
            if let Some(generation) = rest.and_then(|rest| rest.split('.').next()?.parse().ok()) {
                files.push((generation, entry.path()));
            }
        }
        Ok(files)
    }

    /// Keeps a generation on this node, which is known to open, in the place of an older copy.
    pub fn keep(&self, key: &WrappedKey) -> Result<(), WrappedKeyError> {
        let file = self.file(key.tenant, key.generation);
        let shredded = self.shredded.lock();
        if shredded.contains_key(&key.tenant) {
            return Err(WrappedKeyError::Missing(file_name(&file)));
        }
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| write_private(&file, &to_json(key)))
            .map_err(|e| file_error(&file, &e))
    }
}

/// Overwrites a file, then removes it.
fn overwrite(path: &Path) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let zeros = vec![0u8; file.metadata()?.len() as usize];
    std::os::unix::fs::FileExt::write_all_at(&file, &zeros, 0)?;
    file.sync_all()?;
    std::fs::remove_file(path)
}

fn store_error(object: &ObjectPath, e: &object_store::Error) -> WrappedKeyError {
    WrappedKeyError::Store {
        object: object.to_string(),
        cause: e.to_string(),
    }
}

fn file_error(file: &Path, e: &std::io::Error) -> WrappedKeyError {
    WrappedKeyError::Store {
        object: file_name(file),
        cause: e.to_string(),
    }
}

fn to_json(key: &WrappedKey) -> Vec<u8> {
    serde_json::to_vec_pretty(key).expect("a record of strings and numbers is JSON")
}

fn file_name(path: &Path) -> String {
    path.display().to_string()
}
