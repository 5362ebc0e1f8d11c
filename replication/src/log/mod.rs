//! The node's log: one sequence of files for the entries of all groups, one thread that writes.
//!
//! Invariants. Changes reach the disk in the order in which they were made; what has gathered
//! while the last frame was being synced becomes the next frame: one write, one fsync, then the
//! callbacks. An entry is readable when `append` returns and durable when its callback is called.
//! A failed write or fsync ends the process: what the kernel holds after that is unknown, so
//! nothing is retried and nothing more is acknowledged. Recovery discards a torn tail, which was
//! never acknowledged; damage before a valid frame is refused, and such a node must come back as a
//! new one (`frame`). Segments go from the oldest on, once no group has an entry in them.
//!
//! It is our own because RocksDB's recovery, by its source, cannot tell damage in the last file
//! from a torn tail in every case, and may drop what follows, votes included.

pub mod frame;
pub mod index;
pub mod record;
mod recovery;
mod segment;
mod storage;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::oneshot;

use crate::group::types::{Entry, Vote, encode_entry, entry_position};
use crate::{GroupId, Position};
use index::{Index, Place, Slot};
use record::Record;
use segment::Segments;

pub use storage::{GroupLog, LogReader};

/// Bytes of recent entries kept in memory for replication and apply.
const CACHE: usize = 64 << 20;

#[derive(Debug, Error)]
pub enum LogError {
    #[error("log directory {path}: {cause}")]
    Io { path: String, cause: io::Error },
    #[error(
        "log file {file} is damaged at byte {offset}, and valid records follow: this node must not vote. Remove its data directory, so that it comes back as a new node"
    )]
    Damaged { file: String, offset: u64 },
    #[error(
        "log file {file} has format {format}; run the version of holdfastd that wrote it, or a newer one"
    )]
    Format { file: String, format: u8 },
    #[error(
        "log file {0} is missing: this node must not vote. Remove its data directory, so that it comes back as a new node"
    )]
    Missing(String),
    #[error(
        "the log lacks entries of group {0}: this node must not vote. Remove its data directory, so that it comes back as a new node"
    )]
    Gap(GroupId),
}

type Callback = Box<dyn FnOnce() + Send>;

/// A change on its way to the disk.
struct Change {
    group: GroupId,
    /// Encoded records.
    records: Bytes,
    /// The entries among them: index, and payload's offset in `records` and length.
    entries: Vec<(Position, usize, u32)>,
    /// What the records leave of the group besides entries.
    state: Option<StateChange>,
    /// Places that nobody needs once the records are synced.
    freed: Vec<Place>,
    /// Made by the log's own thread, out of an old segment.
    moved: bool,
    done: Option<Callback>,
}

/// A change of what a segment's first frame says of a group.
enum StateChange {
    Vote(Vote),
    Purged(Position),
    Committed(Option<Position>),
    Dropped,
}

type Groups = Mutex<HashMap<GroupId, Arc<Mutex<Index>>>>;

/// The log of one node.
pub struct NodeLog {
    groups: Groups,
    segments: Mutex<Segments>,
    cache: Mutex<Cache>,
    changes: Mutex<mpsc::Sender<Change>>,
    /// Changes sent so far.
    sent: AtomicU64,
}

/// Entries whose bytes are in memory, oldest first.
#[derive(Default)]
struct Cache {
    entries: VecDeque<(GroupId, u64, usize)>,
    bytes: usize,
}

impl NodeLog {
    /// Opens the log in `dir`, recovering what is there, and starts its thread.
    pub fn open(dir: &Path) -> Result<Arc<Self>, LogError> {
        Self::open_with(dir, writer::SEGMENT)
    }

    /// As `open`, with segments of about `segment` bytes.
    fn open_with(dir: &Path, segment: u64) -> Result<Arc<Self>, LogError> {
        let at = |cause| LogError::Io {
            path: dir.display().to_string(),
            cause,
        };
        std::fs::create_dir_all(dir).map_err(at)?;
        let recovered = recovery::recover(dir)?;
        let written = writer::Written::of(&recovered.groups);
        let (sender, receiver) = mpsc::channel();
        let log = Arc::new(NodeLog {
            sent: AtomicU64::new(0),
            groups: Mutex::new(recovered.groups),
            segments: Mutex::new(recovered.segments),
            cache: Mutex::new(Cache::default()),
            changes: Mutex::new(sender),
        });
        let weak = Arc::downgrade(&log);
        let next = recovered.next_sequence;
        let writer = writer::Writer::new(dir.to_path_buf(), segment, next, written, weak);
        std::thread::Builder::new()
            .name("holdfast-log".into())
            .spawn(move || writer.run(&receiver))
            .map_err(at)?;
        Ok(log)
    }

    /// The log of one group. Its openraft storage is used by one group at a time.
    pub fn group(self: &Arc<Self>, group: GroupId) -> GroupLog {
        let index = self.groups.lock().entry(group).or_default().clone();
        GroupLog::new(self.clone(), group, index)
    }

    /// Forgets a group for good.
    pub fn drop_group(&self, group: GroupId) {
        self.drop_then(group, None);
    }

    /// As `drop_group`; returns once that is synced, or the log has stopped.
    pub async fn drop_group_synced(&self, group: GroupId) -> bool {
        let (tell, told) = oneshot::channel();
        let done = Box::new(move || {
            let _ = tell.send(());
        });
        !self.drop_then(group, Some(done)) || told.await.is_ok()
    }

    /// Answers whether there was anything to forget.
    fn drop_then(&self, group: GroupId, done: Option<Callback>) -> bool {
        // Under the lock: whoever does not find the group knows that its end was sent.
        let mut groups = self.groups.lock();
        let Some(index) = groups.remove(&group) else {
            return false;
        };
        let freed = index.lock().truncate(None);
        let dropped = Some(StateChange::Dropped);
        self.change(group, &Record::Drop, dropped, freed, done);
        true
    }

    /// The caller holds the index's lock: the disk sees changes in the index's order.
    fn send(&self, change: Change) {
        let changes = self.changes.lock();
        self.sent.fetch_add(1, Ordering::Relaxed);
        // The receiver ends only with the process.
        let _ = changes.send(change);
    }

    fn change(
        &self,
        group: GroupId,
        record: &Record<'_>,
        state: Option<StateChange>,
        freed: Vec<Place>,
        done: Option<Callback>,
    ) {
        let mut records = Vec::with_capacity(64);
        record::encode(group, record, &mut records);
        self.send(Change {
            group,
            records: Bytes::from(records),
            entries: Vec::new(),
            state,
            freed,
            moved: false,
            done,
        });
    }

    fn append(
        &self,
        group: GroupId,
        index: &Mutex<Index>,
        entries: impl Iterator<Item = Entry>,
        done: Callback,
    ) {
        let mut records = Vec::new();
        let mut spans = Vec::new();
        let mut encoded = Vec::new();
        for entry in entries {
            encoded.clear();
            encode_entry(&entry, &mut encoded);
            let at = records.len() + record::HEADER;
            record::encode(group, &Record::Append(&encoded), &mut records);
            let position = entry_position(&encoded).expect("an encoded entry has a position");
            spans.push((position, at, encoded.len() as u32));
        }
        let records = Bytes::from(records);
        // One lock over index and queue: the disk sees changes in the index's order.
        let mut index = index.lock();
        let mut freed = Vec::new();
        for (position, at, length) in &spans {
            let bytes = records.slice(*at..*at + *length as usize);
            freed.extend(index.push(Slot {
                position: *position,
                bytes: Some(bytes),
                place: None,
            }));
        }
        self.send(Change {
            group,
            records: records.clone(),
            entries: spans,
            state: None,
            freed,
            moved: false,
            done: Some(done),
        });
    }

    /// The bytes of an encoded entry, from memory or disk.
    fn read(&self, place: Place) -> io::Result<Bytes> {
        let file = self.segments.lock().file(place.segment)?;
        let mut bytes = vec![0u8; place.length as usize];
        file.read_exact_at(&mut bytes, place.offset)?;
        Ok(Bytes::from(bytes))
    }

    /// Notes where entries were written, and lets go of the oldest bytes in memory. Answers places
    /// that no entry has any more: their old ones, and those of entries that are gone already,
    /// whose records say so only in a later frame.
    fn placed(&self, group: GroupId, places: &[(Position, Place)]) -> Vec<Place> {
        let Some(index) = self.groups.lock().get(&group).cloned() else {
            return places.iter().map(|(_, place)| *place).collect();
        };
        let mut gone = Vec::new();
        let mut cached = Vec::new();
        {
            let mut index = index.lock();
            for (position, place) in places {
                match index.get_mut(position.index) {
                    Some(slot) if slot.position == *position => {
                        gone.extend(slot.place.replace(*place));
                        if let Some(bytes) = &slot.bytes {
                            cached.push((group, position.index, bytes.len()));
                        }
                    }
                    // Truncated or purged before it was written.
                    _ => gone.push(*place),
                }
            }
        }
        let mut cache = self.cache.lock();
        cache.bytes += cached.iter().map(|c| c.2).sum::<usize>();
        cache.entries.extend(cached);
        let mut evicted = Vec::new();
        while cache.bytes > CACHE {
            let Some(oldest) = cache.entries.pop_front() else {
                break;
            };
            cache.bytes -= oldest.2;
            evicted.push(oldest);
        }
        drop(cache);
        for (group, at, _) in evicted {
            let index = self.groups.lock().get(&group).cloned();
            if let Some(slot) = index
                .as_ref()
                .map(|i| i.lock())
                .as_mut()
                .and_then(|i| i.get_mut(at))
            {
                // An entry that took the place of another may still be on its way to the disk.
                if slot.place.is_some() {
                    slot.bytes = None;
                }
            }
        }
        gone
    }

    /// Bytes that the log's files take on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.segments.lock().disk_bytes()
    }
}

fn segment_path(dir: &Path, segment: u64) -> PathBuf {
    dir.join(format!("{segment:010}.log"))
}

fn vote_of(index: &Mutex<Index>) -> Option<Vote> {
    index.lock().vote
}
