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

    /// By search: while a log is replayed, entries that were moved are missing in between.
    fn slot_at(&self, index: u64) -> Option<usize> {
        self.slots
            .binary_search_by_key(&index, |slot| slot.position.index)
            .ok()
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
        let keep = self.below(slot.position.index);
        let freed = self.drain_from(keep);
        self.slots.push_back(slot);
        freed
    }

    /// Removes entries above `after`, or all.
    pub fn truncate(&mut self, after: Option<u64>) -> Vec<Place> {
        let keep = after.map_or(0, |after| self.below(after + 1));
        self.drain_from(keep)
    }

    /// How many entries lie below `index`.
    fn below(&self, index: u64) -> usize {
        self.slots
            .partition_point(|slot| slot.position.index < index)
    }

    fn drain_from(&mut self, keep: usize) -> Vec<Place> {
        self.slots.drain(keep..).filter_map(|s| s.place).collect()
    }

    /// Removes entries up to `at`, which may lie beyond the last one.
    pub fn purge(&mut self, at: Position) -> Vec<Place> {
        if self.purged.is_none_or(|purged| purged.index < at.index) {
            self.purged = Some(at);
        }
        let upto = self.purged.map_or(0, |purged| purged.index);
        let gone = self
            .slots
            .iter()
            .take_while(|s| s.position.index <= upto)
            .count();
        self.slots.drain(..gone).filter_map(|s| s.place).collect()
    }

    fn has_purged(&self, at: Position) -> bool {
        self.purged.is_some_and(|purged| purged.index >= at.index)
    }

    /// Whether no entry is missing between what was purged and the last one.
    pub fn is_whole(&self) -> bool {
        let mut next = self.purged.map(|purged| purged.index + 1);
        self.slots.iter().all(|slot| {
            let index = slot.position.index;
            let follows = next.is_none_or(|next| next == index);
            next = Some(index + 1);
            follows
        })
    }

    /// Repeats a record that was read from a segment. Answers the places given up; `None` if the
    /// record does not fit what came before it.
    pub fn replay(&mut self, record: &Record<'_>, place: Place) -> Option<Vec<Place>> {
        Some(match record {
            Record::Append(entry) => {
                let position = entry_position(entry)?;
                if self.has_purged(position) {
                    return Some(vec![place]);
                }
                self.push(Slot {
                    position,
                    bytes: None,
                    place: Some(place),
                })
            }
            Record::Moved(entry) => {
                let position = entry_position(entry)?;
                if self.has_purged(position) {
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
                        self.slots.insert(self.below(position.index), slot);
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
