//! Where each entry of one group lies, in memory. Entries that were just appended are readable at
//! once, from their bytes; older ones from their segment.

use std::collections::VecDeque;

use bytes::Bytes;

use super::record::Record;
use crate::Position;
use crate::group::types::{Vote, entry_position};

/// Where an encoded entry lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub segment: u64,
    pub offset: u64,
    pub length: u32,
}

pub struct Slot {
    pub position: Position,
    pub bytes: Option<Bytes>,
    pub place: Option<Place>,
}

/// One group's log: entries `(purged, last]` without a gap, a vote, a committed position.
#[derive(Default)]
pub struct Index {
    pub slots: VecDeque<Slot>,
    pub purged: Option<Position>,
    pub vote: Option<Vote>,
    pub committed: Option<Position>,
}

impl Index {
    pub fn last(&self) -> Option<Position> {
        self.slots.back().map(|slot| slot.position).or(self.purged)
    }

    fn first_index(&self) -> Option<u64> {
        self.slots.front().map(|slot| slot.position.index)
    }

    fn slot_at(&self, index: u64) -> Option<usize> {
        let first = self.first_index()?;
        let at = usize::try_from(index.checked_sub(first)?).ok()?;
        (at < self.slots.len()).then_some(at)
    }

    pub fn get(&self, index: u64) -> Option<&Slot> {
        self.slots.get(self.slot_at(index)?)
    }

    pub fn get_mut(&mut self, index: u64) -> Option<&mut Slot> {
        let at = self.slot_at(index)?;
        self.slots.get_mut(at)
    }

    /// Adds an entry; what stood at or above its index is replaced. Answers the places given up.
    pub fn push(&mut self, slot: Slot) -> Vec<Place> {
        let index = slot.position.index;
        let freed = match self.first_index() {
            Some(_) if index > 0 => self.truncate(Some(index - 1)),
            _ => self.truncate(None),
        };
        self.slots.push_back(slot);
        freed
    }

    /// Removes entries above `after`, or all.
    pub fn truncate(&mut self, after: Option<u64>) -> Vec<Place> {
        let keep = match (after, self.first_index()) {
            (Some(after), Some(first)) if after >= first => {
                usize::try_from(after - first + 1).unwrap_or(usize::MAX)
            }
            _ => 0,
        };
        let keep = keep.min(self.slots.len());
        self.slots.drain(keep..).filter_map(|s| s.place).collect()
    }

    /// Removes entries up to `at`, which may lie beyond the last one.
    pub fn purge(&mut self, at: Position) -> Vec<Place> {
        if self.purged.is_some_and(|purged| purged.index >= at.index) {
            return Vec::new();
        }
        self.purged = Some(at);
        let gone = self
            .slots
            .iter()
            .take_while(|s| s.position.index <= at.index)
            .count();
        self.slots.drain(..gone).filter_map(|s| s.place).collect()
    }

    /// Repeats a record that was read from a segment. Answers the places given up; `None` if the
    /// record does not fit what came before it.
    pub fn replay(&mut self, record: &Record<'_>, place: Place) -> Option<Vec<Place>> {
        Some(match record {
            Record::Append(entry) => {
                let position = entry_position(entry)?;
                self.push(Slot {
                    position,
                    bytes: None,
                    place: Some(place),
                })
            }
            Record::Moved(entry) => {
                let position = entry_position(entry)?;
                if self
                    .purged
                    .is_some_and(|purged| purged.index >= position.index)
                {
                    return Some(vec![place]);
                }
                match self.get_mut(position.index) {
                    Some(slot) if slot.position == position => {
                        slot.place.replace(place).into_iter().collect()
                    }
                    // Its first writing was in a segment that is gone: entries move in order, so
                    // that it belongs before those still in place.
                    _ => {
                        let slot = Slot {
                            position,
                            bytes: None,
                            place: Some(place),
                        };
                        let at = self
                            .slots
                            .partition_point(|s| s.position.index < position.index);
                        self.slots.insert(at, slot);
                        Vec::new()
                    }
                }
            }
            Record::Truncate(after) => self.truncate(*after),
            Record::Purge(at) => self.purge(*at),
            Record::Vote(vote) => {
                self.vote = Some(*vote);
                Vec::new()
            }
            Record::Committed(at) => {
                self.committed = *at;
                Vec::new()
            }
            Record::Drop => std::mem::take(self)
                .slots
                .into_iter()
                .filter_map(|s| s.place)
                .collect(),
        })
    }
}
