//! How a drill's work keeps out of the way of live tenants; what it reads has a rate of its own (`reading`).
//!
//! Whatever the priority of its thread, replay and verification share caches and memory with live requests. So
//! they have a part of the time, once they are not small. A restore does not pause, and its objective must not
//! be charged with that: what was slept is taken off.

use std::time::{Duration, Instant};

use replication::restore::Progress;

use crate::limits;

/// Work between two pauses, at least.
const SLICE: Duration = Duration::from_millis(4);

/// When a step ended, as far as it came, and its pauses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step {
    pub ended: Option<Instant>,
    pub paused: Duration,
}

pub struct Pace {
    replayed: Step,
    verified: Step,
    /// Before this the CPU time is not asked for again: that is a call of the system.
    look: Instant,
    /// CPU time of the working thread at its last pause.
    since: Option<Duration>,
    /// How much longer it may work before it pauses at all.
    free: Duration,
}

impl Pace {
    pub fn new(began: Instant) -> Self {
        Pace {
            replayed: Step::default(),
            verified: Step::default(),
            look: began,
            since: None,
            free: limits::DRILL_FREE,
        }
    }

    /// How long to pause after what was done by `now`; `worked` says the thread's CPU time.
    pub fn pause(
        &mut self,
        progress: &Progress,
        now: Instant,
        worked: impl FnOnce() -> Duration,
    ) -> Duration {
        match progress {
            // Told of each row: who has not had the time has not worked for that long either.
            Progress::Replayed { .. } | Progress::Counting if now >= self.look => {
                self.look = now + SLICE;
                self.working(worked())
            }
            _ => Duration::ZERO,
        }
    }

    /// Notes that it paused until `now`, for `slept`.
    pub fn paused(&mut self, progress: &Progress, now: Instant, slept: Duration) {
        let step = match progress {
            Progress::Fetched { .. } => return,
            Progress::Replayed { .. } => &mut self.replayed,
            Progress::Counting | Progress::Verified => &mut self.verified,
        };
        step.ended = Some(now);
        step.paused += slept;
    }

    fn working(&mut self, worked: Duration) -> Duration {
        let since = *self.since.get_or_insert(worked);
        let slice = worked.saturating_sub(since);
        if slice < SLICE {
            return Duration::ZERO;
        }
        self.since = Some(worked);
        let over = slice.saturating_sub(self.free);
        self.free = self.free.saturating_sub(slice);
        over * (limits::DRILL_SHARE - 1)
    }

    pub fn replayed(&self) -> Step {
        self.replayed
    }

    pub fn verified(&self) -> Step {
        self.verified
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const ZERO: Duration = Duration::ZERO;

    #[test]
    fn work_pauses_in_proportion_once_what_is_free_is_used_up() {
        let began = Instant::now();
        let mut pace = Pace::new(began);
        // Each a second after the one before, whatever it worked.
        let mut at = began;
        let mut after = |ms: u64| {
            at += SECOND;
            let worked = SECOND + Duration::from_millis(ms);
            pace.pause(&Progress::Counting, at, || worked)
        };
        let share = limits::DRILL_SHARE - 1;
        let free = limits::DRILL_FREE.as_millis() as u64;
        assert_eq!(after(0), ZERO, "whatever the thread had done before");
        assert_eq!(after(free - 10), ZERO);
        assert_eq!(after(free + 10), Duration::from_millis(10) * share);
        assert_eq!(after(free + 11), ZERO, "a row");
        assert_eq!(after(free + 20), Duration::from_millis(10) * share);
        assert_eq!(
            after(free + 220),
            Duration::from_millis(200) * share,
            "a link"
        );
    }
}
