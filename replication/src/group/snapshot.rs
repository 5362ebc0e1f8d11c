//! Streaming a checkpoint's files to a peer.
//!
//! `SnapshotBegin` makes a directory at the receiver, `SnapshotChunk` fills files, `SnapshotEnd`
//! verifies every file's length and hash, syncs, and installs. Files are ciphertext on the way, as
//! on disk; neither needs the data key.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};

use super::replica::open_files;
use super::state_machine::SnapshotDir;
use super::types::{SnapshotMeta, Vote};
use crate::GroupId;
use crate::machine::State;
use crate::network::{CallError, Connection, Service};

const CHUNK: usize = 1 << 20;
const IN_FLIGHT: usize = 4;
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
pub struct FileInfo {
    pub length: u64,
    pub hash: String,
}

/// Closes a transfer: what was sent, and under which vote it is to be installed.
#[derive(Serialize, Deserialize)]
pub struct End {
    pub session: String,
    pub vote: Vote,
    pub meta: SnapshotMeta,
    /// The state row that the files stand at, in hex: a sealed receiver cannot read it from them.
    pub state: String,
    pub files: BTreeMap<String, FileInfo>,
}

/// A chunk's header: JSON with its length before it.
#[derive(Serialize, Deserialize)]
struct ChunkHead {
    session: String,
    file: String,
    offset: u64,
}

/// A name that stays inside its directory.
fn plain_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && name != "." && name != ".."
}

/// Sends the files of `dir` to `peer` and has them installed; answers the peer's response body.
pub async fn send(
    peer: &Arc<Connection>,
    group: GroupId,
    vote: Vote,
    meta: SnapshotMeta,
    snapshot: &SnapshotDir,
) -> Result<Bytes, CallError> {
    let session = hex::encode(kms::secret::random_bytes::<8>());
    let local = |e: io::Error| CallError::Remote(format!("reading the snapshot here: {e}"));
    peer.call(
        Service::SnapshotBegin,
        group,
        session.as_bytes(),
        CHUNK_TIMEOUT,
    )
    .await?;
    let mut files = BTreeMap::new();
    for (name, file) in open_files(&snapshot.path).map_err(local)? {
        let file = Arc::new(file);
        let length = file.metadata().map_err(local)?.len();
        let mut hasher = blake3::Hasher::new();
        let chunks = (0..length.div_ceil(CHUNK as u64)).map(|n| n * CHUNK as u64);
        let chunks = futures::stream::iter(chunks).map(|offset| {
            let (file, session, name) = (file.clone(), session.clone(), name.clone());
            async move {
                let size = CHUNK.min((length - offset) as usize);
                let mut bytes = vec![0u8; size];
                file.read_exact_at(&mut bytes, offset).map_err(local)?;
                let head = ChunkHead {
                    session,
                    file: name,
                    offset,
                };
                let head =
                    serde_json::to_vec(&head).map_err(|e| CallError::Remote(e.to_string()))?;
                let mut body = (head.len() as u32).to_be_bytes().to_vec();
                body.extend_from_slice(&head);
                body.extend_from_slice(&bytes);
                peer.call(Service::SnapshotChunk, group, &body, CHUNK_TIMEOUT)
                    .await?;
                Ok::<_, CallError>(bytes)
            }
        });
        let mut chunks = chunks.buffered(IN_FLIGHT);
        while let Some(bytes) = chunks.next().await {
            hasher.update(&bytes?);
        }
        drop(chunks);
        let hash = hasher.finalize().to_hex().to_string();
        files.insert(name, FileInfo { length, hash });
    }
    let end = End {
        session,
        vote,
        meta,
        state: hex::encode(snapshot.state.encode()),
        files,
    };
    let body = serde_json::to_vec(&end).map_err(|e| CallError::Remote(e.to_string()))?;
    peer.call(Service::SnapshotEnd, group, &body, END_TIMEOUT)
        .await
}

/// Where a session's files are received: below the replica's directory.
fn session_dir(replica: &Path, session: &str) -> io::Result<PathBuf> {
    match plain_name(session) {
        true => Ok(replica.join(format!("incoming-{session}"))),
        false => Err(io::Error::other("the session's name is not plain")),
    }
}

pub fn receive_begin(replica: &Path, body: &[u8]) -> io::Result<()> {
    let session = std::str::from_utf8(body).map_err(io::Error::other)?;
    std::fs::create_dir(session_dir(replica, session)?)
}

pub fn receive_chunk(replica: &Path, body: &[u8]) -> io::Result<()> {
    let bad = || io::Error::other("the chunk does not parse");
    let length = body
        .get(..4)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(bad)?;
    let length = u32::from_be_bytes(length) as usize;
    let head = body.get(4..4 + length).ok_or_else(bad)?;
    let head: ChunkHead = serde_json::from_slice(head).map_err(io::Error::other)?;
    if !plain_name(&head.file) {
        return Err(bad());
    }
    let path = session_dir(replica, &head.session)?.join(&head.file);
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    file.write_all_at(&body[4 + length..], head.offset)
}

/// Verifies and syncs what was received.
pub fn receive_end(replica: &Path, end: &End) -> io::Result<SnapshotDir> {
    let dir = session_dir(replica, &end.session)?;
    for (name, info) in &end.files {
        if !plain_name(name) {
            return Err(io::Error::other("a file's name is not plain"));
        }
        let path = dir.join(name);
        if info.length == 0 {
            std::fs::write(&path, [])?;
        }
        let bytes = std::fs::read(&path)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        if bytes.len() as u64 != info.length || hash != info.hash {
            return Err(io::Error::other(format!(
                "snapshot file {name} arrived damaged"
            )));
        }
    }
    super::replica::sync_dir(&dir)?;
    let state = hex::decode(&end.state).map_err(io::Error::other)?;
    Ok(SnapshotDir {
        path: dir,
        state: State::decode(&state)?,
    })
}
