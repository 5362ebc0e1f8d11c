//! Segments: the files of the log, and how much in each is still needed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::index::Place;

/// Live entries of a segment.
pub struct Segment {
    pub file: Arc<File>,
    pub path: PathBuf,
    pub bytes: u64,
    pub live: u64,
    pub live_bytes: u64,
}

#[derive(Default)]
pub struct Segments {
    pub all: BTreeMap<u64, Segment>,
}

impl Segments {
    pub fn file(&self, segment: u64) -> io::Result<Arc<File>> {
        match self.all.get(&segment) {
            Some(s) => Ok(s.file.clone()),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the entry's log segment was removed",
            )),
        }
    }

    pub fn hold(&mut self, place: Place) {
        if let Some(segment) = self.all.get_mut(&place.segment) {
            segment.live += 1;
            segment.live_bytes += u64::from(place.length);
        }
    }

    pub fn free(&mut self, places: &[Place]) {
        for place in places {
            if let Some(segment) = self.all.get_mut(&place.segment) {
                segment.live = segment.live.saturating_sub(1);
                segment.live_bytes = segment.live_bytes.saturating_sub(u64::from(place.length));
            }
        }
    }

    /// Takes out the oldest segments in which no entry is needed; the newest stays.
    pub fn take_dead(&mut self) -> Vec<PathBuf> {
        let mut dead = Vec::new();
        while self.all.len() > 1
            && let Some(oldest) = self.all.first_entry()
            && oldest.get().live == 0
        {
            dead.push(oldest.remove().path);
        }
        dead
    }

    pub fn disk_bytes(&self) -> u64 {
        self.all.values().map(|s| s.bytes).sum()
    }
}
