//! Fetching a checkpoint's files, in parallel; each is hashed and synced before it is used.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;

use super::{Progress, Report, RestoreError, io};
use crate::archive::bucket::file_path;
use crate::archive::chain::Chain;
use crate::archive::checkpoint::{Manifest, ManifestFile};

const IN_FLIGHT: usize = 8;

/// Fetches every file of `manifest` into `dir`, which must not exist.
pub async fn checkpoint(
    chain: &Chain,
    manifest: &Manifest,
    dir: &Path,
    report: Report,
) -> Result<(), RestoreError> {
    tokio::fs::create_dir_all(dir).await.map_err(io(dir))?;
    let total: u64 = manifest.files.iter().map(|f| f.length).sum();
    let done = Arc::new(AtomicU64::new(0));
    let one = |file| {
        let (done, report) = (done.clone(), report.clone());
        counted(chain, manifest, file, dir, done, total, report)
    };
    let fetches: Vec<_> = manifest.files.iter().map(one).collect();
    futures::stream::iter(fetches)
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<()>()
        .await?;
    std::fs::File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io(dir))
}

async fn counted(
    chain: &Chain,
    manifest: &Manifest,
    file: &ManifestFile,
    dir: &Path,
    done: Arc<AtomicU64>,
    total: u64,
    report: Report,
) -> Result<(), RestoreError> {
    fetch(chain, manifest, file, dir).await?;
    let bytes = done.fetch_add(file.length, Ordering::Relaxed) + file.length;
    match report(Progress::Fetched { bytes, total }) {
        true => Ok(()),
        false => Err(RestoreError::Stopped),
    }
}

async fn fetch(
    chain: &Chain,
    manifest: &Manifest,
    file: &ManifestFile,
    dir: &Path,
) -> Result<(), RestoreError> {
    let object = file_path(manifest.group.tenant, &file.hash);
    let refuse = |what: String| RestoreError::Object {
        object: object.to_string(),
        what,
    };
    if file.name.contains('/') || file.name.starts_with('.') {
        return Err(refuse("its name is not plain".into()));
    }
    let got = chain.bucket().get(&object).await.map_err(|e| match e {
        object_store::Error::NotFound { .. } => refuse("it is missing".into()),
        e => refuse(e.to_string()),
    })?;
    let bytes = got.bytes().await.map_err(|e| refuse(e.to_string()))?;
    let path = dir.join(&file.name);
    let (length, hash) = (file.length, file.hash.clone());
    let verified = tokio::task::spawn_blocking(move || {
        if bytes.len() as u64 != length || blake3::hash(&bytes).to_hex().as_str() != hash {
            return Ok(false);
        }
        let write = || {
            let mut out = std::fs::File::create_new(&path)?;
            std::io::Write::write_all(&mut out, &bytes)?;
            out.sync_all()
        };
        write().map(|()| true).map_err(|e| (path.clone(), e))
    })
    .await
    .map_err(|e| refuse(e.to_string()))?;
    match verified {
        Ok(true) => Ok(()),
        Ok(false) => Err(refuse(
            "its content does not have its hash: it is damaged".into(),
        )),
        Err((path, e)) => Err(io(&path)(e)),
    }
}
