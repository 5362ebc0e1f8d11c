//! Fetching a checkpoint's files, in parallel; each is hashed and synced before it is used. They are
//! written out as they come: a sync of all of a file at its end would hold up the log's for that long.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectStore};

use super::{Progress, Report, RestoreError, io};
use crate::archive::bucket::file_path;
use crate::archive::chain::Chain;
use crate::archive::checkpoint::{Manifest, ManifestFile};

const IN_FLIGHT: usize = 8;
/// Bytes written, and written out, at once.
const PIECE: usize = 1 << 20;

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
    let told = move |bytes: u64| {
        let bytes = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match report(Progress::Fetched { bytes, total }) {
            true => Ok(()),
            false => Err(RestoreError::Stopped),
        }
    };
    let one = |file| fetch(chain, manifest, file, dir, told.clone());
    let fetches: Vec<_> = manifest.files.iter().map(one).collect();
    futures::stream::iter(fetches)
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<()>()
        .await?;
    std::fs::File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io(dir))
}

/// A file as it comes.
struct Coming {
    file: File,
    hasher: blake3::Hasher,
    length: u64,
}

impl Coming {
    fn write(&mut self, pieces: &[Bytes], is_last: bool) -> std::io::Result<()> {
        let from = self.length;
        for piece in pieces {
            self.hasher.update(piece);
            self.file.write_all(piece)?;
            self.length += piece.len() as u64;
        }
        match is_last {
            true => self.file.sync_all(),
            false => write_out(&self.file, from, self.length - from),
        }
    }
}

/// Has the disk take a part of a file. That it is durable is what the sync at the end is for; what goes
/// wrong here is said here only.
#[allow(unsafe_code)]
fn write_out(file: &File, from: u64, length: u64) -> std::io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open as long as `file` lives; no memory is passed.
    let said = unsafe { libc::sync_file_range(file.as_raw_fd(), from as i64, length as i64, how) };
    if said == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    match e.raw_os_error() {
        // A filesystem that cannot: the sync at the end does it all.
        Some(libc::ENOSYS | libc::EINVAL | libc::ESPIPE) => Ok(()),
        _ => Err(e),
    }
}

/// An object from a byte on.
async fn from(
    chain: &Chain,
    object: &ObjectPath,
    at: u64,
) -> object_store::Result<BoxStream<'static, object_store::Result<Bytes>>> {
    let options = GetOptions {
        range: (at > 0).then_some(GetRange::Offset(at)),
        ..GetOptions::default()
    };
    let got = chain.bucket().get_opts(object, options).await?;
    Ok(got.into_stream())
}

async fn fetch(
    chain: &Chain,
    manifest: &Manifest,
    file: &ManifestFile,
    dir: &Path,
    told: impl Fn(u64) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let object = file_path(manifest.group.tenant, &file.hash);
    let refuse = |what: String| RestoreError::Object {
        object: object.to_string(),
        what,
    };
    let unusable = |what: &str| RestoreError::File {
        object: object.to_string(),
        what: what.into(),
    };
    if file.name.contains('/') || file.name.starts_with('.') {
        return Err(refuse("its name is not plain".into()));
    }
    let failed = |e: object_store::Error| match e {
        object_store::Error::NotFound { .. } => unusable("it is missing"),
        e => refuse(e.to_string()),
    };
    let mut stream = from(chain, &object, 0).await.map_err(failed)?;
    let path = dir.join(&file.name);
    let mut coming = Coming {
        file: File::create_new(&path).map_err(io(&path))?,
        hasher: blake3::Hasher::new(),
        length: 0,
    };
    let mut broke_at = 0;
    loop {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while bytes < PIECE {
            let at = coming.length + bytes as u64;
            match stream.try_next().await {
                Ok(Some(piece)) => {
                    bytes += piece.len();
                    pieces.push(piece);
                }
                Ok(None) => break,
                // All of it came; only its end was late.
                Err(_) if at == file.length => break,
                // A connection that broke, or a disk that is so slow that the request took too long.
                Err(_) if at > broke_at => {
                    broke_at = at;
                    stream = from(chain, &object, at).await.map_err(failed)?;
                }
                Err(e) => return Err(refuse(e.to_string())),
            }
        }
        // More than it should be is no more use than less.
        let is_last = bytes < PIECE || coming.length > file.length;
        // Blocking work: hashes and a disk.
        let written = tokio::task::spawn_blocking(move || {
            coming.write(&pieces, is_last)?;
            Ok(coming)
        });
        let written = written.await.map_err(|e| refuse(e.to_string()))?;
        coming = written.map_err(io(&path))?;
        told(bytes as u64)?;
        if is_last {
            break;
        }
    }
    let whole = coming.length == file.length;
    match whole && coming.hasher.finalize().to_hex().as_str() == file.hash {
        true => Ok(()),
        false => Err(unusable(
            "its content does not have its hash: it is damaged",
        )),
    }
}
