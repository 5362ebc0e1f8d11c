//! The directory of one replica.
//!
//! `engine-N/`: RocksDB; `ENGINE`: the number of the one in use; `snapshot-INDEX-TAG/` and
//! `snapshot.json`: the newest checkpoint, which is the Raft snapshot; `incoming-*`: what is being
//! received or removed; `FENCED`: the chain was closed by a restore; `DAMAGED`: it was found so; `FILLING`: it began empty, in the place of such a one.
//!
//! Invariants. A new engine is complete and synced before `ENGINE` names it, by a rename: a crash
//! at any moment leaves the old one or the new one in use. What nothing names is removed at start.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kms::local::write_private;
use serde::{Deserialize, Serialize};

use super::types::SnapshotMeta;
use crate::engine::link_dir;
use crate::machine::State;

const FENCED: &str = "FENCED";
const DAMAGED: &str = "DAMAGED";
const FILLING: &str = "FILLING";
const ABANDONED: Duration = Duration::from_secs(15 * 60);

/// Whether the replica in `path` was found damaged.
pub fn is_quarantined(path: &Path) -> bool {
    path.join(DAMAGED).exists()
}

/// Whether the replica in `path` has met the end of its chain.
pub fn is_fenced(path: &Path) -> bool {
    path.join(FENCED).exists()
}

/// Puts an empty replica in the place of the one in `path`, which is moved to `aside`, at once: at no
/// moment there is none, or one that does not say that it is to be filled. `aside` must not exist.
pub fn replace_empty(path: &Path, aside: &Path) -> io::Result<()> {
    fs::create_dir_all(aside)?;
    write_private(&aside.join(FILLING), b"its peers fill it\n")?;
    let here = rustix::fs::CWD;
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(here, aside, here, path, exchange)?;
    for above in [path.parent(), aside.parent()].into_iter().flatten() {
        File::open(above)?.sync_all()?;
    }
    Ok(())
}

pub struct ReplicaDir {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct StoredMeta {
    dir: String,
    meta: SnapshotMeta,
    /// The state machine's state row, in hex.
    state: String,
}

/// The newest snapshot: what it holds and where it lies.
pub struct StoredSnapshot {
    pub meta: SnapshotMeta,
    pub state: State,
    pub dir: PathBuf,
}

impl ReplicaDir {
    /// Opens or makes the directory, and removes what a crash left.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        let dir = ReplicaDir {
            path: path.to_path_buf(),
        };
        let engine = dir.engine();
        let snapshot = dir.snapshot()?.map(|found| found.dir);
        for entry in fs::read_dir(path)? {
            let entry = entry?.path();
            let kept = Some(&entry) == engine.as_ref().ok() || Some(&entry) == snapshot.as_ref();
            if entry.is_dir() && !kept {
                fs::remove_dir_all(entry)?;
            }
        }
        Ok(dir)
    }

    fn number(&self) -> io::Result<u64> {
        match fs::read_to_string(self.path.join("ENGINE")) {
            Ok(text) => text
                .trim()
                .parse()
                .map_err(|_| io::Error::other("the file ENGINE does not hold a number")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(1),
            Err(e) => Err(e),
        }
    }

    /// The engine in use.
    pub fn engine(&self) -> io::Result<PathBuf> {
        Ok(self.path.join(format!("engine-{}", self.number()?)))
    }

    /// Links the files of `from` into a directory for the next engine.
    pub fn next_engine(&self, from: &Path) -> io::Result<(u64, PathBuf)> {
        let number = self.number()? + 1;
        let path = self.path.join(format!("engine-{number}"));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        link_dir(from, &path)?;
        Ok((number, path))
    }

    /// Puts engine `number` in use; answers the directory of the one before.
    pub fn use_engine(&self, number: u64) -> io::Result<PathBuf> {
        let before = self.engine()?;
        write_private(&self.path.join("ENGINE"), number.to_string().as_bytes())?;
        Ok(before)
    }

    /// Puts a checkpoint, whose files are synced, in use as engine and as snapshot; answers the directory
    /// of the engine before.
    pub fn put_checkpoint(
        &self,
        files: &Path,
        meta: &SnapshotMeta,
        state: &State,
    ) -> io::Result<PathBuf> {
        let (number, path) = self.next_engine(files)?;
        let scratch = self.scratch("installed");
        let _ = fs::remove_dir_all(&scratch);
        link_dir(&path, &scratch)?;
        // In this order: a replica that is opened sealed begins at its snapshot, which the engine must
        // not stand behind.
        let before = self.use_engine(number)?;
        self.set_snapshot(&scratch, meta, state)?;
        Ok(before)
    }

    /// Every directory with files of the replica.
    pub fn all(&self) -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.path)?;
        let paths = entries.map(|entry| Ok(entry?.path()));
        let dirs = paths.filter(|path| path.as_ref().is_ok_and(|p| p.is_dir()) || path.is_err());
        dirs.collect()
    }

    /// Removes what a transfer that broke off has left: nothing was written to it for `ABANDONED`.
    pub fn sweep(&self) -> io::Result<()> {
        for dir in self.all()? {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with("incoming-") {
                continue;
            }
            let abandoned = || -> io::Result<bool> {
                let mut newest = fs::metadata(&dir)?.modified()?;
                for entry in fs::read_dir(&dir)? {
                    newest = newest.max(entry?.metadata()?.modified()?);
                }
                Ok(newest.elapsed().is_ok_and(|age| age > ABANDONED))
            };
            match abandoned() {
                Ok(true) => fs::remove_dir_all(dir)?,
                Ok(false) => {}
                // It is in use, and gone by now.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// A fresh directory to receive a snapshot in, or to make one in.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.path.join(format!("incoming-{name}"))
    }

    /// Makes `dir` the snapshot. Its files must be synced.
    pub fn set_snapshot(
        &self,
        dir: &Path,
        meta: &SnapshotMeta,
        state: &State,
    ) -> io::Result<PathBuf> {
        let before = self.snapshot()?.map(|found| found.dir);
        let index = meta.last_log_id.as_ref().map_or(0, |id| id.index);
        let tag = hex::encode(kms::secret::random_bytes::<4>());
        let name = format!("snapshot-{index}-{tag}");
        let target = self.path.join(&name);
        fs::rename(dir, &target)?;
        File::open(&self.path)?.sync_all()?;
        let stored = StoredMeta {
            dir: name,
            meta: meta.clone(),
            state: hex::encode(state.encode()),
        };
        let bytes = serde_json::to_vec(&stored).map_err(io::Error::other)?;
        write_private(&self.path.join("snapshot.json"), &bytes)?;
        if let Some(before) = before.filter(|b| *b != target) {
            // Whoever is opening its files sees that the name is gone, not that a file is.
            let gone = self.scratch(&format!("gone-{tag}"));
            fs::rename(before, &gone)?;
            let _ = fs::remove_dir_all(gone);
        }
        Ok(target)
    }

    /// Whether its peers have not filled it yet.
    pub fn is_filling(&self) -> bool {
        self.path.join(FILLING).exists()
    }

    /// Notes that they have.
    pub fn filled(&self) -> io::Result<()> {
        fs::remove_file(self.path.join(FILLING))?;
        File::open(&self.path)?.sync_all()
    }

    /// Notes that this replica is damaged: it is never opened again.
    pub fn quarantine(&self) -> io::Result<()> {
        write_private(
            &self.path.join(DAMAGED),
            b"its rows do not have its digest\n",
        )
    }

    /// Notes that the chain was closed by a restore: this replica never serves again.
    pub fn fence(&self) -> io::Result<()> {
        write_private(&self.path.join(FENCED), b"closed by a restore\n")
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> io::Result<Option<StoredSnapshot>> {
        let bytes = match fs::read(self.path.join("snapshot.json")) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let stored: StoredMeta = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
        let dir = self.path.join(&stored.dir);
        if !dir.is_dir() {
            return Err(io::Error::other(
                "the snapshot that snapshot.json names is missing",
            ));
        }
        let state = hex::decode(&stored.state).map_err(io::Error::other)?;
        Ok(Some(StoredSnapshot {
            meta: stored.meta,
            state: State::decode(&state)?,
            dir,
        }))
    }
}

/// Opens every file of a snapshot's directory. A snapshot is renamed before its files go, so that
/// they are all there if its name still is once they are open.
pub fn open_files(dir: &Path) -> io::Result<Vec<(String, File)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push((name, File::open(entry.path())?));
    }
    match dir.is_dir() {
        true => Ok(files),
        false => Err(io::Error::other("a newer snapshot took its place")),
    }
}

/// Syncs every file of `dir` and the directory.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        match File::open(entry?.path()) {
            Ok(file) => file.sync_all()?,
            // An engine that runs there removes files.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listed file that is gone when it is opened, as a running engine leaves them.
    #[test]
    fn a_file_that_an_engine_removes_meanwhile_stops_no_sync() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("stays"), "it").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("gone")).unwrap();
        sync_dir(dir.path()).unwrap();
        assert!(sync_dir(&dir.path().join("no-directory")).is_err());
    }
}
