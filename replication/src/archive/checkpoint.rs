//! Checkpoints in the bucket: content-addressed files, and a manifest that lists them.
//!
//! Data first, manifest last. A file is uploaded once and named by the hash of its ciphertext; the
//! manifest is authenticated with the region's archive key.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kms::Secret;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::bucket::{checkpoints_dir, file_path};
use super::chain::{Chain, ChainError};
use super::link::LinkError;
use crate::engine::env::generation_of;
use crate::failpoint::failpoint;
use crate::machine::State;
use crate::mvcc::digest::Digests;
use crate::{GroupId, Position};

pub const FORMAT: u32 = 1;
const IN_FLIGHT: usize = 4;
/// The longest that an upload may take: shorter than `COLLECT_AFTER`.
const UPLOAD_WITHIN: Duration = Duration::from_secs(12 * 3600);
/// A file that is younger is not about to go, even by a clock that is some hours off.
const FRESH: Duration = Duration::from_secs(6 * 3600);
/// What nothing in the bucket refers to goes after this.
pub const COLLECT_AFTER: Duration = Duration::from_secs(24 * 3600);
const _: () = assert!(FRESH.as_secs() + UPLOAD_WITHIN.as_secs() < COLLECT_AFTER.as_secs());
/// Files above this go up in parts.
const PART: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    pub name: String,
    pub length: u64,
    /// BLAKE3 of the ciphertext, in hex.
    pub hash: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub group: GroupId,
    /// A link at or before `position`: replay begins with the one after it.
    pub link: u64,
    pub link_hash: String,
    pub position: Position,
    pub revision: i64,
    /// Effective time of `position`, milliseconds since 1970; 0 where it is not said.
    #[serde(default, skip_serializing_if = "is_unknown")]
    pub time_ms: u64,
    pub digests: Digests,
    /// The oldest key generation that one of the files is under; 0 where it is not said.
    #[serde(default, skip_serializing_if = "is_unknown")]
    pub oldest: u32,
    pub files: Vec<ManifestFile>,
}

fn is_unknown<T: Default + PartialEq>(said: &T) -> bool {
    *said == T::default()
}

impl Manifest {
    /// Of a checkpoint at `position`, behind a link that it covers. Its files are listed as they are
    /// uploaded.
    pub fn new(group: GroupId, state: &State, position: Position, behind: (u64, String)) -> Self {
        Manifest {
            format: FORMAT,
            group,
            link: behind.0,
            link_hash: behind.1,
            position,
            revision: state.revision,
            time_ms: state.time_ms,
            digests: state.digests,
            oldest: 0,
            files: Vec::new(),
        }
    }
}

/// `manifest (JSON) | MAC (32)`.
pub fn encode(key: &Secret, manifest: &Manifest) -> Vec<u8> {
    let mut out = serde_json::to_vec(manifest).expect("a manifest of strings and numbers is JSON");
    let tag = blake3::keyed_hash(key.expose(), &out);
    out.extend_from_slice(tag.as_bytes());
    out
}

pub fn decode(key: &Secret, group: GroupId, bytes: &[u8]) -> Result<Manifest, LinkError> {
    let (json, tag) = bytes.split_last_chunk::<32>().ok_or(LinkError::Truncated)?;
    if blake3::keyed_hash(key.expose(), json) != blake3::Hash::from(*tag) {
        return Err(LinkError::Forged);
    }
    let manifest: Manifest =
        serde_json::from_slice(json).map_err(|e| LinkError::Malformed(e.to_string()))?;
    if manifest.format != FORMAT {
        return Err(LinkError::Format(manifest.format as u8));
    }
    if manifest.group != group {
        return Err(LinkError::OtherGroup(manifest.group));
    }
    Ok(manifest)
}

/// Reads a manifest; `ChainError::Refused` if it is not the chain's.
pub async fn read(chain: &Chain, object: &Path) -> Result<Manifest, ChainError> {
    let bytes = chain.get(object).await?;
    decode(chain.key(), chain.group(), &bytes).map_err(|cause| ChainError::Refused {
        object: object.to_string(),
        cause,
    })
}

/// Hashes of files that need no upload: those of the newest manifests that are there now, which keeps
/// them there for longer than an upload may take. Others can be about to go, unless they are fresh.
async fn known(chain: &Chain) -> Result<HashSet<String>, ChainError> {
    let mut known = HashSet::new();
    let incarnation = chain.group().incarnation;
    for chain in [chain.clone(), chain.of(incarnation.saturating_sub(1))] {
        for object in list(chain.bucket(), chain.group()).await?.iter().take(2) {
            match read(&chain, object).await {
                Ok(manifest) => known.extend(manifest.files.into_iter().map(|f| f.hash)),
                Err(ChainError::Refused { .. } | ChainError::Missing(_)) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(known)
}

async fn upload_file(
    bucket: &Arc<dyn ObjectStore>,
    group: GroupId,
    (name, file): (String, File),
    known: &HashSet<String>,
) -> Result<(ManifestFile, Option<u32>), ChainError> {
    let local = |e: std::io::Error| ChainError::Store {
        object: name.clone(),
        cause: object_store::Error::Generic {
            store: "local disk",
            source: Box::new(e),
        },
    };
    let read = move || {
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).map(|_| bytes)
    };
    let bytes = tokio::task::spawn_blocking(read)
        .await
        .map_err(|e| local(std::io::Error::other(e)))?
        .map_err(local)?;
    let bytes = Bytes::from(bytes);
    let under = generation_of(&bytes);
    let file = ManifestFile {
        hash: blake3::hash(&bytes).to_hex().to_string(),
        length: bytes.len() as u64,
        name: name.clone(),
    };
    let object = file_path(group.tenant, &file.hash);
    let store = |cause| ChainError::Store {
        object: object.to_string(),
        cause,
    };
    match bucket.head(&object).await {
        Ok(meta) if meta.size == file.length => {
            // An upload that was cut short is gone on with.
            let age = OffsetDateTime::now_utc().unix_timestamp() - meta.last_modified.timestamp();
            if known.contains(&file.hash) || age.unsigned_abs() < FRESH.as_secs() {
                return Ok((file, under));
            }
        }
        Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
        Err(e) => return Err(store(e)),
    }
    if bytes.len() <= PART {
        bucket
            .put(&object, PutPayload::from(bytes))
            .await
            .map_err(store)?;
    } else {
        let upload = bucket.put_multipart(&object).await.map_err(store)?;
        let mut writer = WriteMultipart::new_with_chunk_size(upload, PART);
        writer.put(bytes);
        writer.finish().await.map_err(store)?;
    }
    Ok((file, under))
}

/// Uploads the files of a checkpoint, then its manifest; answers that, with its files, and its name.
pub async fn upload(
    chain: &Chain,
    files: Vec<(String, File)>,
    manifest: Manifest,
) -> Result<(Path, Manifest), ChainError> {
    let object = checkpoints_dir(manifest.group).to_string();
    let uploaded = tokio::time::timeout(UPLOAD_WITHIN, upload_all(chain, files, manifest)).await;
    uploaded.unwrap_or_else(|e| {
        Err(ChainError::Store {
            object,
            cause: object_store::Error::Generic {
                store: "upload",
                source: Box::new(e),
            },
        })
    })
}

async fn upload_all(
    chain: &Chain,
    mut files: Vec<(String, File)>,
    mut manifest: Manifest,
) -> Result<(Path, Manifest), ChainError> {
    files.sort_by(|a, b| a.0.cmp(&b.0));
    let group = manifest.group;
    let bucket = chain.bucket();
    let known = known(chain).await?;
    let uploads: Vec<_> = files
        .into_iter()
        .map(|file| upload_file(bucket, group, file, &known))
        .collect();
    let uploaded: Vec<_> = futures::stream::iter(uploads)
        .buffered(IN_FLIGHT)
        .try_collect()
        .await?;
    let oldest = uploaded.iter().filter_map(|(_, under)| *under).min();
    manifest.oldest = oldest.unwrap_or(0);
    manifest.files = uploaded.into_iter().map(|(file, _)| file).collect();
    failpoint("checkpoint-files-uploaded");
    let writer = hex::encode(kms::secret::random_bytes::<8>());
    let object = checkpoints_dir(group).join(format!("{:020}-{writer}", manifest.link));
    let bytes = encode(chain.key(), &manifest);
    let put = bucket
        .put_opts(&object, PutPayload::from(bytes), PutMode::Create.into())
        .await;
    match put {
        // Its name is random: it is this one, whose answer was lost.
        Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => {}
        Err(cause) => {
            let object = object.to_string();
            return Err(ChainError::Store { object, cause });
        }
    }
    failpoint("checkpoint-uploaded");
    Ok((object, manifest))
}

/// Names of a group's manifests, newest first.
pub async fn list(bucket: &Arc<dyn ObjectStore>, group: GroupId) -> Result<Vec<Path>, ChainError> {
    let listed = list_with_times(bucket, group).await?;
    let mut names: Vec<_> = listed.into_iter().map(|(name, _)| name).collect();
    names.sort();
    names.reverse();
    Ok(names)
}

/// Names of a group's manifests, and when each was written, by the store's clock, in milliseconds
/// since 1970.
pub async fn list_with_times(
    bucket: &Arc<dyn ObjectStore>,
    group: GroupId,
) -> Result<Vec<(Path, u64)>, ChainError> {
    let dir = checkpoints_dir(group);
    let found: Vec<_> = bucket
        .list(Some(&dir))
        .try_collect()
        .await
        .map_err(|cause| ChainError::Store {
            object: dir.to_string(),
            cause,
        })?;
    let timed = |meta: object_store::ObjectMeta| {
        let at = meta.last_modified.timestamp_millis();
        (meta.location, at.try_into().unwrap_or(0))
    };
    Ok(found.into_iter().map(timed).collect())
}

/// The link that a manifest's name says it stands at.
pub fn link_of(name: &Path) -> Option<u64> {
    name.filename()?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms::TenantId;

    #[test]
    fn golden_manifest() {
        let key = Secret::from_slice(&[3; 32]).unwrap();
        let group = GroupId {
            tenant: TenantId([1; 16]),
            incarnation: 2,
        };
        let manifest = Manifest {
            format: FORMAT,
            group,
            link: 4,
            link_hash: "ab".into(),
            position: Position {
                term: 1,
                node: 7,
                index: 5,
            },
            revision: 9,
            time_ms: 0,
            digests: Digests::default(),
            oldest: 0,
            files: vec![ManifestFile {
                name: "000012.sst".into(),
                length: 6,
                hash: "cd".into(),
            }],
        };
        let bytes = encode(&key, &manifest);
        let golden = include_str!("../../golden/manifest-v1.hex").trim();
        assert_eq!(hex::encode(&bytes), golden);
        assert_eq!(decode(&key, group, &bytes), Ok(manifest));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&key, group, &bad), Err(LinkError::Forged), "{at}");
        }
    }
}
