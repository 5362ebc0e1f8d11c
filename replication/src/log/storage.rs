//! openraft's storage traits for one group, on the node's log.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::index::Index;
use super::record::Record;
use super::{NodeLog, StateChange, vote_of};
use crate::group::types::{Entry, LogId, TypeConfig, Vote, decode_entry, log_id, position};
use crate::{GroupId, Position};

/// Entries in one replication message, at most: below the network's frame limit with room.
const MAX_READ: usize = 2 << 20;
/// Entries read at once for apply and archive.
const MAX_ENTRIES: u64 = 4096;

/// The log of one group.
pub struct GroupLog {
    log: Arc<NodeLog>,
    group: GroupId,
    index: Arc<Mutex<Index>>,
}

impl GroupLog {
    pub(super) fn new(log: Arc<NodeLog>, group: GroupId, index: Arc<Mutex<Index>>) -> Self {
        GroupLog { log, group, index }
    }

    pub fn reader(&self) -> LogReader {
        LogReader {
            log: self.log.clone(),
            index: self.index.clone(),
        }
    }
}

/// Reads entries of one group.
#[derive(Clone)]
pub struct LogReader {
    log: Arc<NodeLog>,
    index: Arc<Mutex<Index>>,
}

impl LogReader {
    /// Encoded entries from index `start` to below `end`, in order, until `max_bytes` are reached
    /// (at least one). Entries that were purged or are not there yet end the list.
    pub fn read(
        &self,
        start: u64,
        end: u64,
        max_bytes: usize,
    ) -> io::Result<Vec<(Position, bytes::Bytes)>> {
        let mut found = Vec::new();
        let mut size = 0;
        let mut at = start;
        while at < end && size < max_bytes {
            let (position, bytes, place) = {
                let index = self.index.lock();
                let Some(slot) = index.get(at) else { break };
                (slot.position, slot.bytes.clone(), slot.place)
            };
            let bytes = match (bytes, place) {
                (Some(bytes), _) => bytes,
                (None, Some(place)) => self.log.read(place)?,
                (None, None) => {
                    return Err(io::Error::other("a log entry has neither bytes nor place"));
                }
            };
            size += bytes.len();
            found.push((position, bytes));
            at += 1;
        }
        Ok(found)
    }

    /// Bytes that the node's log takes on disk, all groups together.
    pub fn disk_bytes(&self) -> u64 {
        self.log.disk_bytes()
    }

    /// The last index purged; entries at or below are gone.
    pub fn purged(&self) -> Option<Position> {
        self.index.lock().purged
    }

    pub fn last(&self) -> Option<Position> {
        self.index.lock().last()
    }

    fn entries(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        self.read(start, end, max_bytes)?
            .iter()
            .map(|(at, bytes)| {
                decode_entry(bytes)
                    .ok_or_else(|| io::Error::other(format!("log entry {at} does not parse")))
            })
            .collect()
    }
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let mut start = match range.start_bound() {
            Bound::Included(at) => *at,
            Bound::Excluded(at) => at + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(at) => at + 1,
            Bound::Excluded(at) => *at,
            Bound::Unbounded => u64::MAX,
        };
        if let Some(first) = self.index.lock().slots.front() {
            start = start.max(first.position.index);
        }
        self.entries(start, end, usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(vote_of(&self.index))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.entries(start, end.min(start + MAX_ENTRIES), MAX_READ)
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl futures::Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let entries = self.try_get_log_entries(range).await;
        futures::stream::iter(match entries {
            Ok(entries) => entries.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(e) => vec![Err(e)],
        })
    }
}

impl RaftLogStorage<TypeConfig> for GroupLog {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let index = self.index.lock();
        Ok(LogState {
            last_purged_log_id: index.purged.map(log_id),
            last_log_id: index.last().map(log_id),
        })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        self.reader()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (tell, told) = oneshot::channel();
        {
            let mut index = self.index.lock();
            index.vote = Some(*vote);
            let done = Box::new(move || {
                let _ = tell.send(());
            });
            self.log.change(
                self.group,
                &Record::Vote(*vote),
                Some(StateChange::Vote(*vote)),
                Vec::new(),
                Some(done),
            );
        }
        told.await
            .map_err(|_| io::Error::other("the log has stopped"))
    }

    /// Not waited for: it follows its entries into the log, never ahead of them.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let committed = committed.as_ref().map(position);
        let mut index = self.index.lock();
        index.committed = committed;
        self.log.change(
            self.group,
            &Record::Committed(committed),
            Some(StateChange::Committed(committed)),
            Vec::new(),
            None,
        );
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let index = self.index.lock();
        // Only what this log holds, or has purged: the position can be durable ahead of its entry,
        // and another entry may stand at its index.
        let held = |at: &Position| {
            let slot = index.get(at.index).map(|slot| slot.position);
            slot == Some(*at) || index.purged.is_some_and(|purged| purged.index >= at.index)
        };
        Ok(index.committed.filter(held).map(log_id))
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let done = Box::new(move || callback.io_completed(Ok(())));
        self.log
            .append(self.group, &self.index, entries.into_iter(), done);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let after = last.map(|id| id.index);
        let mut index = self.index.lock();
        let freed = index.truncate(after);
        self.log
            .change(self.group, &Record::Truncate(after), None, freed, None);
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let at = position(&upto);
        let mut index = self.index.lock();
        let freed = index.purge(at);
        self.log.change(
            self.group,
            &Record::Purge(at),
            Some(StateChange::Purged(at)),
            freed,
            None,
        );
        Ok(())
    }
}
