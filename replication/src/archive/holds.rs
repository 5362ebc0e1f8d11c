//! Holds: while one stands, nothing of a tenant's history since a moment goes, whatever its window.
//!
//! They are entries of a ledger beside the chains, `tenants/<id>/ledger/<n>`, which is only ever added
//! to: each is created exclusively, authenticated with the region's archive key, and durable before it
//! is answered. A gap in their numbers is damage, and stops retention.

use std::sync::Arc;

use futures::TryStreamExt;
use kms::{Secret, TenantId};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use serde::{Deserialize, Serialize};

use super::chain::ChainError;
use super::link::LinkError;

pub const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// Random; names it when it is released.
    pub id: String,
    /// Everything since then stays, milliseconds since 1970.
    pub since_ms: u64,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    Hold(Hold),
    /// Of the hold of this id.
    Release(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub format: u32,
    pub tenant: TenantId,
    /// Counts from 1.
    pub number: u64,
    /// When it was made, milliseconds since 1970.
    pub at_ms: u64,
    pub what: What,
}

fn dir(tenant: TenantId) -> Path {
    Path::from(format!("tenants/{tenant}/ledger"))
}

fn encode(key: &Secret, entry: &Entry) -> Vec<u8> {
    let mut out = serde_json::to_vec(entry).expect("an entry of strings and numbers is JSON");
    let tag = blake3::keyed_hash(key.expose(), &out);
    out.extend_from_slice(tag.as_bytes());
    out
}

fn decode(key: &Secret, tenant: TenantId, number: u64, bytes: &[u8]) -> Result<Entry, LinkError> {
    let (json, tag) = bytes.split_last_chunk::<32>().ok_or(LinkError::Truncated)?;
    if blake3::keyed_hash(key.expose(), json) != blake3::Hash::from(*tag) {
        return Err(LinkError::Forged);
    }
    let entry: Entry =
        serde_json::from_slice(json).map_err(|e| LinkError::Malformed(e.to_string()))?;
    if entry.format != FORMAT {
        return Err(LinkError::Format(entry.format as u8));
    }
    match entry.tenant == tenant && entry.number == number {
        true => Ok(entry),
        false => Err(LinkError::Malformed(format!(
            "it is entry {} of tenant {}",
            entry.number, entry.tenant
        ))),
    }
}

/// The ledger, in order.
pub async fn entries(
    bucket: &Arc<dyn ObjectStore>,
    key: &Secret,
    tenant: TenantId,
) -> Result<Vec<Entry>, ChainError> {
    let dir = dir(tenant);
    let store = |object: &Path, cause| ChainError::Store {
        object: object.to_string(),
        cause,
    };
    let listed: Vec<_> = bucket
        .list(Some(&dir))
        .try_collect()
        .await
        .map_err(|e| store(&dir, e))?;
    let mut objects: Vec<Path> = listed.into_iter().map(|meta| meta.location).collect();
    objects.sort();
    let mut entries = Vec::new();
    for (at, object) in objects.into_iter().enumerate() {
        let number = at as u64 + 1;
        let wanted = dir.clone().join(format!("{number:020}"));
        if object != wanted {
            return Err(ChainError::Missing(wanted.to_string()));
        }
        let got = bucket.get(&object).await.map_err(|e| store(&object, e))?;
        let bytes = got.bytes().await.map_err(|e| store(&object, e))?;
        let entry = decode(key, tenant, number, &bytes).map_err(|cause| ChainError::Refused {
            object: object.to_string(),
            cause,
        })?;
        entries.push(entry);
    }
    Ok(entries)
}

/// Adds to the ledger, behind whatever another adds at the same time.
pub async fn add(
    bucket: &Arc<dyn ObjectStore>,
    key: &Secret,
    tenant: TenantId,
    at_ms: u64,
    what: What,
) -> Result<(), ChainError> {
    let mut number = entries(bucket, key, tenant).await?.len() as u64;
    loop {
        number += 1;
        let entry = Entry {
            format: FORMAT,
            tenant,
            number,
            at_ms,
            what: what.clone(),
        };
        let object = dir(tenant).join(format!("{number:020}"));
        let payload = PutPayload::from(encode(key, &entry));
        match bucket
            .put_opts(&object, payload, PutMode::Create.into())
            .await
        {
            Ok(_) => return Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => {
                // Its own, where the answer was lost.
                let known = entries(bucket, key, tenant).await?;
                if known.iter().any(|e| e.number == number && *e == entry) {
                    return Ok(());
                }
            }
            Err(cause) => {
                return Err(ChainError::Store {
                    object: object.to_string(),
                    cause,
                });
            }
        }
    }
}

/// The holds that were not released, oldest first.
pub fn standing(entries: &[Entry]) -> Vec<Hold> {
    let mut holds: Vec<Hold> = Vec::new();
    for entry in entries {
        match &entry.what {
            What::Hold(hold) => holds.push(hold.clone()),
            What::Release(id) => holds.retain(|hold| hold.id != *id),
        }
    }
    holds
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::local::LocalFileSystem;

    fn hold(id: &str, since_ms: u64) -> What {
        What::Hold(Hold {
            id: id.into(),
            since_ms,
            reason: "case 7".into(),
        })
    }

    #[tokio::test]
    async fn holds_stand_until_they_are_released_and_damage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalFileSystem::new_with_prefix(dir.path()).unwrap();
        let bucket: Arc<dyn ObjectStore> = Arc::new(store);
        let key = Secret::from_slice(&[3; 32]).unwrap();
        let tenant = TenantId([1; 16]);
        for what in [hold("a", 5), hold("b", 7), What::Release("a".into())] {
            add(&bucket, &key, tenant, 1, what).await.unwrap();
        }
        let known = entries(&bucket, &key, tenant).await.unwrap();
        assert_eq!(known.len(), 3);
        let standing = standing(&known);
        assert_eq!(standing.len(), 1);
        assert_eq!((standing[0].id.as_str(), standing[0].since_ms), ("b", 7));
        let other = Secret::from_slice(&[4; 32]).unwrap();
        let forged = entries(&bucket, &other, tenant).await;
        assert!(matches!(forged, Err(ChainError::Refused { .. })));
        let second = super::dir(tenant).join(format!("{:020}", 2));
        bucket.delete(&second).await.unwrap();
        let missing = entries(&bucket, &key, tenant).await;
        assert!(
            matches!(missing, Err(ChainError::Missing(object)) if object == second.to_string())
        );
    }
}
