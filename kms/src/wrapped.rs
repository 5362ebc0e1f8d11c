//! Wrapped data keys: objects of their own in the bucket, `tenants/<id>/keys/<generation>`, and a
//! copy in a file on each node that holds a replica.
//!
//! A generation is durable in the bucket before the first byte is sealed under it. Wrapped keys
//! are never in a log, a checkpoint or a chain, so that destroying them destroys the tenant. The
//! node's copy lets a replica start while the bucket is away.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
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

impl WrappedKey {
    /// Draws fresh keys and wraps them under `key`. Nothing is stored yet.
    pub async fn create(
        providers: &Providers,
        key: &KeyUri,
        tenant: TenantId,
        region: Region,
    ) -> Result<(WrappedKey, TenantKeys), KmsError> {
        key.check_jurisdiction(region)?;
        let (data_key, secret) = (Secret::random(), Secret::random());
        let mut plain = Zeroizing::new([0u8; 64]);
        plain[..32].copy_from_slice(data_key.expose());
        plain[32..].copy_from_slice(secret.expose());
        let ctx = Context {
            tenant,
            region,
            purpose: PURPOSE,
        };
        let wrapped = providers.of(key)?.wrap(key, plain.as_ref(), &ctx).await?;
        let record = WrappedKey {
            version: VERSION,
            tenant,
            region,
            generation: 1,
            key: key.clone(),
            fingerprint: data_key.fingerprint(),
            wrapped: hex::encode(wrapped),
        };
        Ok((record, TenantKeys::new(tenant, secret, [(1, data_key)])))
    }

    /// Asks the KMS to unwrap it; checks the fingerprint.
    pub async fn unwrap(&self, providers: &Providers) -> Result<TenantKeys, KmsError> {
        self.key.check_jurisdiction(self.region)?;
        let ctx = Context {
            tenant: self.tenant,
            region: self.region,
            purpose: PURPOSE,
        };
        let wrong = || KmsError::WrongCiphertext {
            key: self.key.to_string(),
        };
        let wrapped = hex::decode(&self.wrapped).map_err(|_| wrong())?;
        let plain = providers
            .of(&self.key)?
            .unwrap(&self.key, &wrapped, &ctx)
            .await?;
        if plain.len() != 64 {
            return Err(wrong());
        }
        let data_key = Secret::from_slice(&plain[..32]).ok_or_else(wrong)?;
        let secret = Secret::from_slice(&plain[32..]).ok_or_else(wrong)?;
        if data_key.fingerprint() != self.fingerprint {
            return Err(wrong());
        }
        Ok(TenantKeys::new(
            self.tenant,
            secret,
            [(self.generation, data_key)],
        ))
    }

    fn parse(bytes: &[u8], object: &str, tenant: TenantId) -> Result<Self, WrappedKeyError> {
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
        Ok(key)
    }
}

/// Where wrapped keys are kept: the bucket, and a directory on this node.
#[derive(Clone)]
pub struct WrappedKeyStore {
    bucket: Arc<dyn ObjectStore>,
    dir: PathBuf,
}

impl WrappedKeyStore {
    pub fn new(bucket: Arc<dyn ObjectStore>, dir: impl Into<PathBuf>) -> Self {
        WrappedKeyStore {
            bucket,
            dir: dir.into(),
        }
    }

    fn object(tenant: TenantId) -> ObjectPath {
        ObjectPath::from(format!("tenants/{tenant}/keys/{:010}", 1))
    }

    fn file(&self, tenant: TenantId) -> PathBuf {
        self.dir.join(format!("{tenant}-1.json"))
    }

    /// Stores a new generation in the bucket, exclusively, then on this node.
    pub async fn create(&self, key: &WrappedKey) -> Result<(), WrappedKeyError> {
        let object = Self::object(key.tenant);
        let bytes = to_json(key);
        self.bucket
            .put_opts(
                &object,
                PutPayload::from(bytes.clone()),
                PutMode::Create.into(),
            )
            .await
            .map_err(|e| WrappedKeyError::Store {
                object: object.to_string(),
                cause: e.to_string(),
            })?;
        self.remember(key.tenant, &bytes)
    }

    /// Reads a tenant's wrapped key: this node's copy, else the bucket's, which is then kept.
    pub async fn load(&self, tenant: TenantId) -> Result<WrappedKey, WrappedKeyError> {
        let file = self.file(tenant);
        match std::fs::read(&file) {
            Ok(bytes) => WrappedKey::parse(&bytes, &file_name(&file), tenant),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => self.fetch(tenant).await,
            Err(e) => Err(WrappedKeyError::Store {
                object: file_name(&file),
                cause: e.to_string(),
            }),
        }
    }

    /// Reads a tenant's wrapped key from the bucket and keeps it on this node.
    pub async fn fetch(&self, tenant: TenantId) -> Result<WrappedKey, WrappedKeyError> {
        let object = Self::object(tenant);
        let store = |e: object_store::Error| match e {
            object_store::Error::NotFound { .. } => WrappedKeyError::Missing(object.to_string()),
            e => WrappedKeyError::Store {
                object: object.to_string(),
                cause: e.to_string(),
            },
        };
        let got = self.bucket.get(&object).await.map_err(store)?;
        let bytes = got.bytes().await.map_err(store)?;
        let key = WrappedKey::parse(&bytes, object.as_ref(), tenant)?;
        self.remember(tenant, &bytes)?;
        Ok(key)
    }

    fn remember(&self, tenant: TenantId, bytes: &[u8]) -> Result<(), WrappedKeyError> {
        let file = self.file(tenant);
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| write_private(&file, bytes))
            .map_err(|e| WrappedKeyError::Store {
                object: file_name(&file),
                cause: e.to_string(),
            })
    }
}

fn to_json(key: &WrappedKey) -> Vec<u8> {
    serde_json::to_vec_pretty(key).expect("a record of strings and numbers is JSON")
}

fn file_name(path: &Path) -> String {
    path.display().to_string()
}
