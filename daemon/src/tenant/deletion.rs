//! Destroying a tenant once its grace has passed: keys first, wherever they lie, then a restore is
//! tried and must fail, then the data, then the certificate.
//!
//! Invariants. Nothing is destroyed before the directory says that it is, and from then on nothing is
//! served or opened. What is to be destroyed is noted in the certificate's draft, in the bucket,
//! before it goes; after a crash whoever leads the directory does every step again. The certificate is
//! signed only when every wrapped key is gone from the bucket, in all versions, and from every node of
//! the region, and a restore was planned from what the archive still had and found no key.

use std::sync::Arc;
use std::time::Duration;

use kms::{KeyUri, Region, TenantId, WrappedKey, WrappedKeyError};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use replication::archive::s3::{self, Destroyed};
use replication::failpoint::failpoint;
use replication::restore::{RestoreError, plan};
use serde::{Deserialize, Serialize};

use super::key::now_ms;
use crate::directory::records::{DeletedRecord, EventKind, TenantRecord};
use crate::node::Node;
use crate::question::Question;
use crate::signed::{self, Kind};

const LOOK: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Stated {
    at_ms: u64,
}

/// A key generation that was destroyed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    pub generation: u32,
    pub fingerprint: String,
    pub key: KeyUri,
}

/// What a node destroyed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Erased {
    pub node: String,
    pub id: u64,
    /// Files of wrapped keys, overwritten and removed.
    pub key_files: Vec<String>,
    pub at_ms: u64,
}

/// A restore that was planned from everything that was left.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drill {
    pub at_ms: u64,
    /// What was there to restore from.
    pub left: String,
    /// Why it failed.
    pub failed: String,
}

/// The body of a certificate of destruction; while it is made, its draft.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    pub tenant: String,
    pub id: TenantId,
    pub jurisdiction: Region,
    pub asked_ms: u64,
    /// When destruction began.
    pub begun_ms: u64,
    /// When it was certified.
    pub at_ms: u64,
    pub generations: Vec<Generation>,
    pub key_objects: Vec<Destroyed>,
    pub nodes: Vec<Erased>,
    pub drill: Option<Drill>,
    /// Those that an Object Lock keeps outlive the keys, unreadable.
    pub data_objects: Vec<Destroyed>,
    pub note: String,
}

const NOTE: &str = "Ciphertext under the destroyed keys can remain: in objects that are listed with what keeps them, in node logs until their files are removed, in blocks of disks. Nothing opens it. Copies of wrapped keys elsewhere are not covered, such as a backup of the bucket, or the old disk of a node that was replaced: for those, delete the KMS key.";

/// Where a tenant's certificate, and its draft, lie in the bucket.
pub fn certificate_path(id: TenantId) -> Path {
    Path::from(format!("certificates/{id}.json"))
}

fn draft_path(id: TenantId) -> Path {
    Path::from(format!("certificates/{id}.draft.json"))
}

/// Destroys the tenants whose grace has passed, on the node that leads the directory.
pub async fn keep(node: Arc<Node>) {
    let mut told = String::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(directory) = node.directory().filter(|d| d.group().is_leader()) else {
            continue;
        };
        let Ok(tenants) = directory.tenants() else {
            continue;
        };
        // A restore opens what the directory named when it began.
        if node.is_restoring() {
            continue;
        }
        for found in tenants {
            if !found.record.is_due() {
                continue;
            }
            let mut record = found.record;
            let done = async {
                if record.is_destroying() {
                    return destroy(&node, &record, found.modified).await;
                }
                // What must work at the end is tried before there is no way back.
                signed::sign(
                    &node.config.tls,
                    Kind::Destruction,
                    &Stated { at_ms: now_ms() },
                )?;
                let deletion = record.deletion.as_mut();
                deletion.ok_or("it is not deleted")?.destroying = true;
                let put = directory.put_tenant(&record, found.modified).await;
                // It is gone on with at the next look.
                put.map_err(text)
            };
            if let Err(why) = done.await
                && why != told
            {
                tracing::warn!(tenant = %record.id, %why, "a tenant is not destroyed yet; it is tried again");
                told = why;
            }
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// That this node leads the directory, now, and that the record stands: one who led before it must
/// not go on beside it.
async fn stands(node: &Node, record: &TenantRecord, modified: i64) -> Result<(), String> {
    let directory = node.directory().ok_or("the directory is not open")?;
    directory.group().read_barrier().await.map_err(text)?;
    let tenants = directory.tenants().map_err(text)?;
    let known = tenants.iter().find(|t| t.record.id == record.id);
    match directory.group().is_leader() && known.is_some_and(|t| t.modified == modified) {
        true => Ok(()),
        false => Err("another node goes on with it".into()),
    }
}

async fn destroy(node: &Arc<Node>, record: &TenantRecord, modified: i64) -> Result<(), String> {
    failpoint("destruction-begun");
    stands(node, record, modified).await?;
    let (bucket, config) = (&node.parts.bucket, &node.config.bucket);
    let mut draft = draft(node, record).await?;
    let keys = format!("tenants/{}/keys", record.id);
    if draft.key_objects.is_empty() {
        // What is destroyed is noted before it goes.
        draft.key_objects = s3::find(config, bucket, &keys).await?;
        save(node, &draft).await?;
    }
    let destroyed = s3::destroy(config, bucket, &keys).await?;
    if let Some(kept) = destroyed.iter().find(|o| !o.left.is_empty()) {
        return Err(format!(
            "wrapped key {} cannot be deleted ({}): a bucket for keys must not be locked",
            kept.object, kept.left
        ));
    }
    failpoint("keys-destroyed");
    stands(node, record, modified).await?;
    erase_everywhere(node, record, &mut draft).await?;
    save(node, &draft).await?;
    failpoint("nodes-erased");
    if draft.drill.is_none() {
        draft.drill = Some(drill(node, record).await?);
        save(node, &draft).await?;
    }
    failpoint("destruction-drilled");
    let data = format!("tenants/{}", record.id);
    if draft.data_objects.is_empty() {
        draft.data_objects = s3::find(config, bucket, &data).await?;
        save(node, &draft).await?;
    }
    for kept in s3::destroy(config, bucket, &data).await? {
        let listed = draft.data_objects.iter_mut();
        match listed.into_iter().find(|o| o.object == kept.object) {
            Some(listed) => listed.left = kept.left,
            // A late writer's.
            None => draft.data_objects.push(kept),
        }
    }
    failpoint("data-destroyed");
    // Again, now that nothing can have been on its way for long: what a task that was held up has
    // written since.
    let late = s3::destroy(config, bucket, &data).await?;
    if late.iter().any(|o| o.object.starts_with(&keys)) {
        return Err("a wrapped key was written late: all is looked at again".into());
    }
    erase_everywhere(node, record, &mut draft).await?;
    stands(node, record, modified).await?;
    draft.at_ms = now_ms();
    let signed = signed::sign(&node.config.tls, Kind::Destruction, &draft)?;
    let bytes = serde_json::to_vec_pretty(&signed).map_err(text)?;
    let path = certificate_path(record.id);
    let put = bucket
        .put_opts(&path, PutPayload::from(bytes), PutMode::Create.into())
        .await;
    match put {
        // A try before was cut short behind it.
        Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => {}
        Err(e) => return Err(text(e)),
    }
    let deleted = DeletedRecord {
        name: record.name.clone(),
        id: record.id,
        at_ms: draft.at_ms,
        certificate: path.to_string(),
    };
    let directory = node.directory().ok_or("the directory is not open")?;
    directory
        .remove_tenant(record, modified, &deleted)
        .await
        .map_err(text)?;
    let _ = bucket.delete(&draft_path(record.id)).await;
    tracing::info!(tenant = %record.id, "the tenant is destroyed");
    node.event(record, EventKind::Destroyed, path.to_string());
    Ok(())
}

/// The draft that a try before left, or a new one that lists what is there. It is authenticated with
/// the archive key: what is signed at the end must be ours.
async fn draft(node: &Node, record: &TenantRecord) -> Result<Certificate, String> {
    let bucket = &node.parts.bucket;
    match bucket.get(&draft_path(record.id)).await {
        Ok(found) => {
            let bytes = found.bytes().await.map_err(text)?;
            let key = node.archive_key().ok_or("the archive key is not known")?;
            let refused = || format!("object {} is not ours", draft_path(record.id));
            let (json, tag) = bytes.split_last_chunk::<32>().ok_or_else(refused)?;
            if blake3::keyed_hash(key.expose(), json) != blake3::Hash::from(*tag) {
                return Err(refused());
            }
            let draft: Certificate = serde_json::from_slice(json).map_err(text)?;
            return match draft.id == record.id {
                true => Ok(draft),
                false => Err(refused()),
            };
        }
        Err(object_store::Error::NotFound { .. }) => {}
        Err(e) => return Err(text(e)),
    }
    let mut generations = Vec::new();
    for generation in record.needed() {
        match node.parts.keys.fetch(record.id, generation).await {
            Ok(found) => generations.push(found),
            // A damaged one is destroyed as well.
            Err(WrappedKeyError::Missing(_) | WrappedKeyError::Invalid { .. }) => {}
            Err(e) => return Err(text(e)),
        }
    }
    let generation = |key: WrappedKey| Generation {
        generation: key.generation,
        fingerprint: key.fingerprint,
        key: key.key,
    };
    let draft = Certificate {
        tenant: record.name.clone(),
        id: record.id,
        jurisdiction: node.config.region,
        asked_ms: record.deletion.as_ref().map_or(0, |d| d.asked_ms),
        begun_ms: now_ms(),
        at_ms: 0,
        generations: generations.into_iter().map(generation).collect(),
        key_objects: Vec::new(),
        nodes: Vec::new(),
        drill: None,
        data_objects: Vec::new(),
        note: NOTE.into(),
    };
    save(node, &draft).await?;
    Ok(draft)
}

async fn save(node: &Node, draft: &Certificate) -> Result<(), String> {
    let key = node.archive_key().ok_or("the archive key is not known")?;
    let mut bytes = serde_json::to_vec(draft).map_err(text)?;
    let tag = blake3::keyed_hash(key.expose(), &bytes);
    bytes.extend_from_slice(tag.as_bytes());
    let path = draft_path(draft.id);
    let put = node.parts.bucket.put(&path, bytes.into()).await;
    put.map(drop).map_err(text)
}

/// Has every node of the region destroy what it holds: a copy can be where the tenant was once, or
/// where it was made.
async fn erase_everywhere(
    node: &Arc<Node>,
    record: &TenantRecord,
    draft: &mut Certificate,
) -> Result<(), String> {
    let directory = node.directory().ok_or("the directory is not open")?;
    for other in directory.nodes().map_err(text)? {
        let (id, name) = (other.record.id, other.record.name);
        let erased = if id == node.id {
            node.erase(record.id).await?
        } else {
            let question = Question::Erase(record.id);
            let answer = node.ask(&other.record.peer_address, &question).await;
            let answer = answer.ok_or_else(|| {
                format!("node {name} has not said that it destroyed its copies: it is asked again; if it is down, start it")
            })?;
            serde_json::from_slice(&answer).map_err(text)?
        };
        if erased.id != id || erased.node != name {
            return Err(format!("another node than {name} answers at its address"));
        }
        // What was destroyed at an earlier try is in its answer too, but not of an earlier process.
        match draft.nodes.iter_mut().find(|e| e.id == id) {
            Some(known) => {
                known.key_files.extend(erased.key_files);
                known.key_files.sort();
                known.key_files.dedup();
            }
            None => draft.nodes.push(erased),
        }
    }
    Ok(())
}

/// Tries to restore the tenant; answers why that fails, or an error if it does not.
async fn drill(node: &Node, record: &TenantRecord) -> Result<Drill, String> {
    // One that was never made has no other.
    let chain = node.chain(record)?.of(record.incarnation.max(1));
    let left = match plan::newest(&chain).await {
        Ok(plan) => format!(
            "{} and {} links that authenticate",
            match &plan.manifest {
                Some(manifest) => format!("a checkpoint of {} files", manifest.files.len()),
                None => "no checkpoint".into(),
            },
            plan.total_links()
        ),
        Err(RestoreError::Nothing(_)) => "nothing".into(),
        Err(e) => return Err(text(e)),
    };
    match node.parts.keys.fetch_all(record.id).await {
        // Anything else is no proof.
        Err(failed @ WrappedKeyError::Missing(_)) => Ok(Drill {
            at_ms: now_ms(),
            left,
            failed: text(failed),
        }),
        Err(e) => Err(text(e)),
        Ok(_) => Err("wrapped keys are still in the bucket".into()),
    }
}

impl Node {
    /// Destroys what this node holds of a tenant that the directory says is being destroyed.
    pub async fn erase(&self, id: TenantId) -> Result<Erased, String> {
        let directory = self.directory().ok_or("there is no directory yet")?;
        let tenants = directory.tenants().map_err(text)?;
        let found = tenants.into_iter().find(|t| t.record.id == id);
        if !found.is_some_and(|f| f.record.is_destroying()) {
            return Err(
                "the directory does not say here that the tenant is to be destroyed".into(),
            );
        }
        // Keys first: whatever comes after may fail and be tried again.
        let key_files = self.parts.keys.shred(id).map_err(text)?;
        for group in self.parts.groups.all() {
            if group.id().tenant == id {
                group
                    .seal("it was deleted, and its keys are destroyed")
                    .await;
                self.parts.groups.remove(group.id());
                group.shutdown().await;
            }
        }
        let dir = self.parts.data_dir.join("tenants");
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(incarnation) = name.strip_prefix(&format!("{id}-")) else {
                continue;
            };
            if let Ok(incarnation) = incarnation.parse() {
                let group = replication::GroupId {
                    tenant: id,
                    incarnation,
                };
                self.parts.log.drop_group(group);
                let _ = std::fs::remove_dir_all(self.parts.drill_dir(group));
            }
            std::fs::remove_dir_all(entry.path()).map_err(text)?;
        }
        Ok(Erased {
            node: self.config.name.clone(),
            id: self.id,
            key_files,
            at_ms: now_ms(),
        })
    }
}
