//! The log's thread: gathers changes, writes a frame, syncs, calls back.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::frame::{self, Kind};
use super::index::{Index, Place};
use super::record::{self, Record};
use super::segment::Segment;
use super::{Change, NodeLog, StateChange, segment_path};
use crate::group::types::Vote;
use crate::{GroupId, Position};

/// The length of a segment, unless a test asks for another.
pub const SEGMENT: u64 = 64 << 20;
/// Changes gathered for one frame, at most.
const GATHER: usize = 8 << 20;
/// After this long without a change the log marks itself idle.
const IDLE: Duration = Duration::from_millis(50);
/// With more segments than this, what still lives in the oldest is moved to the newest.
const MAX_SEGMENTS: usize = 6;
/// At most this much is moved; more is still being read by someone.
const MAX_MOVED: u64 = 8 << 20;
/// The exit code after a failed write or fsync (sysexits.h: EX_IOERR).
const EXIT_IO: i32 = 74;

/// What was written of a group besides entries.
#[derive(Default)]
struct GroupState {
    vote: Option<Vote>,
    purged: Option<Position>,
    committed: Option<Position>,
}

/// The state of all groups as it was written: memory may be ahead of it.
#[derive(Default)]
pub struct Written(HashMap<GroupId, GroupState>);

impl Written {
    pub fn of(groups: &HashMap<GroupId, Arc<Mutex<Index>>>) -> Self {
        let state = |index: &Arc<Mutex<Index>>| {
            let index = index.lock();
            GroupState {
                vote: index.vote,
                purged: index.purged,
                committed: index.committed,
            }
        };
        Written(groups.iter().map(|(g, i)| (*g, state(i))).collect())
    }

    fn note(&mut self, group: GroupId, change: &StateChange) {
        let state = self.0.entry(group).or_default();
        match change {
            StateChange::Vote(vote) => state.vote = Some(*vote),
            StateChange::Purged(at) => {
                if state.purged.is_none_or(|purged| purged.index < at.index) {
                    state.purged = Some(*at);
                }
            }
            StateChange::Committed(at) => state.committed = *at,
            StateChange::Dropped => drop(self.0.remove(&group)),
        }
    }

    /// Records of every group, for the beginning of a segment.
    fn encode(&self, out: &mut Vec<u8>) {
        for (group, state) in &self.0 {
            if let Some(vote) = state.vote {
                record::encode(*group, &Record::Vote(vote), out);
            }
            if let Some(purged) = state.purged {
                record::encode(*group, &Record::Purge(purged), out);
            }
            record::encode(*group, &Record::Committed(state.committed), out);
        }
    }
}

pub struct Writer {
    dir: PathBuf,
    /// A segment is closed once it is this long.
    segment_bytes: u64,
    sequence: u64,
    written: Written,
    /// Changes written so far.
    count: u64,
    /// Places to free once so many changes are written.
    late: VecDeque<(u64, Vec<Place>)>,
    log: Weak<NodeLog>,
    segment: u64,
    file: Option<Arc<File>>,
    offset: u64,
    buffer: Vec<u8>,
    idle_marked: bool,
}

impl Writer {
    pub fn new(
        dir: PathBuf,
        segment_bytes: u64,
        sequence: u64,
        written: Written,
        log: Weak<NodeLog>,
    ) -> Self {
        Writer {
            dir,
            segment_bytes,
            sequence,
            written,
            count: 0,
            late: VecDeque::new(),
            log,
            segment: 0,
            file: None,
            offset: 0,
            buffer: Vec::new(),
            idle_marked: true,
        }
    }

    pub fn run(mut self, changes: &Receiver<Change>) {
        let mut pending: Vec<Change> = Vec::new();
        loop {
            match changes.recv_timeout(IDLE) {
                Ok(change) => {
                    let mut size = change.records.len();
                    pending.push(change);
                    while size < GATHER {
                        let Ok(change) = changes.try_recv() else {
                            break;
                        };
                        size += change.records.len();
                        pending.push(change);
                    }
                    // Nobody waits for a committed position alone: it goes with the next frame.
                    if pending
                        .iter()
                        .all(|c| c.done.is_none() && c.entries.is_empty())
                        && size < 4096
                    {
                        continue;
                    }
                    self.or_exit(|w| w.write(Kind::Records, std::mem::take(&mut pending)));
                    self.idle_marked = false;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if !self.idle_marked || !pending.is_empty() {
                        self.or_exit(|w| w.write(Kind::Idle, std::mem::take(&mut pending)));
                        self.idle_marked = true;
                        self.or_exit(Self::collect);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Ends the process on a failure. What the kernel wrote of it is unknown: a retried fsync may
    /// succeed without the data, so that nothing may be acknowledged after it.
    #[allow(unsafe_code)]
    fn or_exit(&mut self, work: impl FnOnce(&mut Self) -> io::Result<()>) {
        if let Err(e) = work(self) {
            tracing::error!(error = %e, "the log cannot be written or synced: stopping, nothing more is acknowledged");
            // SAFETY: ends the process at once; no destructor may write after a failed fsync.
            unsafe { libc::_exit(EXIT_IO) }
        }
    }

    fn write(&mut self, kind: Kind, changes: Vec<Change>) -> io::Result<()> {
        if self.file.is_none() || self.offset >= self.segment_bytes {
            self.roll()?;
        }
        frame::begin(&mut self.buffer);
        let mut starts = Vec::with_capacity(changes.len());
        for change in &changes {
            starts.push(self.buffer.len() as u64);
            self.buffer.extend_from_slice(&change.records);
        }
        let at = self.offset;
        self.put_frame(kind)?;
        let log = self.log.upgrade();
        for (change, start) in changes.into_iter().zip(starts) {
            if let Some(state) = &change.state {
                self.written.note(change.group, state);
            }
            if let Some(log) = &log {
                self.placed(log, &change, at + start);
            }
            self.count += u64::from(!change.moved);
            if let Some(done) = change.done {
                done();
            }
        }
        Ok(())
    }

    /// Tells the index where the entries of a change lie, and frees what it has made needless.
    fn placed(&mut self, log: &NodeLog, change: &Change, at: u64) {
        let places: Vec<(Position, Place)> = change
            .entries
            .iter()
            .map(|(position, offset, length)| {
                let place = Place {
                    segment: self.segment,
                    offset: at + *offset as u64,
                    length: *length,
                };
                (*position, place)
            })
            .collect();
        {
            let mut segments = log.segments.lock();
            places.iter().for_each(|(_, place)| segments.hold(*place));
            segments.free(&change.freed);
        }
        if places.is_empty() {
            return;
        }
        let gone = log.placed(change.group, &places);
        if !gone.is_empty() {
            // Whatever replaced them was sent by now, and may not be written yet.
            self.late
                .push_back((log.sent.load(Ordering::Relaxed), gone));
        }
    }

    /// Frees places whose replacement is on the disk.
    fn free_late(&mut self, log: &NodeLog) {
        while let Some((_, places)) = self.late.pop_front_if(|(due, _)| *due <= self.count) {
            log.segments.lock().free(&places);
        }
    }

    /// Writes the frame in `buffer` at the end and syncs it.
    fn put_frame(&mut self, kind: Kind) -> io::Result<()> {
        frame::finish(&mut self.buffer, kind, self.sequence);
        let file = self
            .file
            .as_ref()
            .ok_or_else(|| io::Error::other("no segment is open"))?;
        file.write_all_at(&self.buffer, self.offset)?;
        file.sync_data()?;
        self.offset += self.buffer.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    /// Begins a new segment with the state of all groups.
    fn roll(&mut self) -> io::Result<()> {
        let Some(log) = self.log.upgrade() else {
            return Err(io::Error::other("the log is closed"));
        };
        if let Some(file) = &self.file {
            file.set_len(self.offset)?;
            file.sync_all()?;
            if let Some(closed) = log.segments.lock().all.get_mut(&self.segment) {
                closed.bytes = self.offset;
            }
        }
        let newest = log.segments.lock().all.last_key_value().map(|(n, _)| *n);
        self.segment = newest.unwrap_or(0) + 1;
        let path = segment_path(&self.dir, self.segment);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        preallocate(&file, self.segment_bytes);
        let file = Arc::new(file);
        log.segments.lock().all.insert(
            self.segment,
            Segment {
                file: file.clone(),
                path,
                bytes: self.segment_bytes,
                live: 0,
                live_bytes: 0,
            },
        );
        self.file = Some(file.clone());
        self.offset = 0;
        frame::begin(&mut self.buffer);
        self.written.encode(&mut self.buffer);
        self.put_frame(Kind::State)?;
        file.sync_all()?;
        File::open(&self.dir)?.sync_all()?;
        self.collect()
    }

    /// Removes segments that nobody needs, moving little out of the oldest when there are many.
    fn collect(&mut self) -> io::Result<()> {
        let Some(log) = self.log.upgrade() else {
            return Ok(());
        };
        self.free_late(&log);
        let crowded = {
            let segments = log.segments.lock();
            let oldest = segments.all.first_key_value();
            oldest
                .filter(|(_, s)| segments.all.len() > MAX_SEGMENTS && s.live_bytes <= MAX_MOVED)
                .map(|(number, _)| *number)
        };
        if let Some(number) = crowded {
            self.move_out(&log, number)?;
        }
        let dead = log.segments.lock().take_dead();
        if dead.is_empty() {
            return Ok(());
        }
        // The newest segment begins with every group's state, so that the oldest can go.
        for path in dead {
            std::fs::remove_file(path)?;
        }
        File::open(&self.dir)?.sync_all()
    }

    fn move_out(&mut self, log: &Arc<NodeLog>, number: u64) -> io::Result<()> {
        let groups: Vec<_> = log
            .groups
            .lock()
            .iter()
            .map(|(g, i)| (*g, i.clone()))
            .collect();
        for (group, index) in groups {
            let places: Vec<(Position, Place)> = index
                .lock()
                .slots
                .iter()
                .filter_map(|slot| {
                    Some((slot.position, slot.place.filter(|p| p.segment == number)?))
                })
                .collect();
            if places.is_empty() {
                continue;
            }
            let mut records = Vec::new();
            let mut entries = Vec::new();
            for (position, place) in places {
                let bytes = log.read(place)?;
                entries.push((position, records.len() + record::HEADER, place.length));
                record::encode(group, &Record::Moved(&bytes), &mut records);
            }
            let change = Change {
                group,
                records: records.into(),
                entries,
                state: None,
                freed: Vec::new(),
                moved: true,
                done: None,
            };
            self.write(Kind::Records, vec![change])?;
        }
        Ok(())
    }
}

/// Reserves space, so that a full disk is met when a segment begins, and the file's length does
/// not change with each frame. A filesystem that cannot is no error.
#[allow(unsafe_code)]
fn preallocate(file: &File, bytes: u64) {
    use std::os::fd::AsRawFd;
    // SAFETY: a plain system call on an open descriptor.
    unsafe {
        libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t);
    }
}
