//! The recovery ledger of a replica: how old the oldest acknowledged write is that no link covers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Samples closer together than this are one.
const GRAIN: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Inner {
    /// Applied indexes and when they were first seen, oldest first.
    pending: VecDeque<(u64, Instant)>,
    archived: u64,
}

/// See the module. On a follower the archived index arrives with appends, up to a heartbeat late.
#[derive(Default)]
pub struct Ledger {
    inner: Mutex<Inner>,
}

impl Ledger {
    pub fn applied(&self, index: u64) {
        let mut inner = self.inner.lock();
        if index <= inner.archived {
            return;
        }
        let now = Instant::now();
        // The older time stands for both: the age is never understated.
        match inner.pending.back_mut() {
            Some((last, at)) if now.duration_since(*at) < GRAIN => *last = index,
            _ => inner.pending.push_back((index, now)),
        }
    }

    pub fn archived(&self, index: u64) {
        let mut inner = self.inner.lock();
        inner.archived = inner.archived.max(index);
        while inner.pending.front().is_some_and(|(at, _)| *at <= index) {
            inner.pending.pop_front();
        }
    }

    /// Age of the oldest acknowledged write that is not archived; zero when there is none.
    pub fn age(&self) -> Duration {
        let inner = self.inner.lock();
        inner
            .pending
            .front()
            .map_or(Duration::ZERO, |(_, at)| at.elapsed())
    }
}
