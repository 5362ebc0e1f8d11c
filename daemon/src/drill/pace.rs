//! How a drill keeps out of the way of live tenants, and how long it would take if it did not.
//!
//! Whatever the priority of its threads, a drill shares caches, memory and network with live requests. So it
//! fetches at a rate, and replays and verifies a part of the time. A restore does neither, and its objective
//! must not be charged with pauses: those that were slept are taken off, but of what is fetched no more than
//! leaves the speed of the first part, which is not paced. A small tenant's drill has none.

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
    began: Instant,
    fetched: Step,
    replayed: Step,
    verified: Step,
    /// Bytes fetched before fetching was paced, and how long they took; and all that there are.
    first: (u64, Duration),
    total: u64,
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
            began,
            fetched: Step::default(),
            replayed: Step::default(),
            verified: Step::default(),
            first: (0, Duration::ZERO),
            total: 0,
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
            Progress::Fetched { bytes, total } => {
                self.total = *total;
                self.fetching(*bytes, now)
            }
            // Told of each row: who has not had the time has not worked for that long either.
            Progress::Replayed { .. } | Progress::Counting if now < self.look => Duration::ZERO,
            Progress::Replayed { .. } | Progress::Counting => {
                self.look = now + SLICE;
                self.working(worked())
            }
            Progress::Verified => Duration::ZERO,
        }
    }

    /// Notes that it paused until `now`, for `slept`.
    pub fn paused(&mut self, progress: &Progress, now: Instant, slept: Duration) {
        let step = match progress {
            Progress::Fetched { .. } => &mut self.fetched,
            Progress::Replayed { .. } => &mut self.replayed,
            Progress::Counting | Progress::Verified => &mut self.verified,
        };
        step.ended = Some(now);
        step.paused += slept;
    }

    fn fetching(&mut self, bytes: u64, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.began);
        if bytes <= limits::DRILL_MEASURED {
            self.first = (bytes, elapsed);
            return Duration::ZERO;
        }
        let (first, took) = self.first;
        let paced = (bytes - first) as f64 / limits::DRILL_RATE as f64;
        (took + Duration::from_secs_f64(paced)).saturating_sub(elapsed)
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

    pub fn fetched(&self) -> Step {
        let (first, took) = self.first;
        let elapsed = self
            .fetched
            .ended
            .map(|at| at.saturating_duration_since(self.began));
        // While one connection's turn is slept away, others go on.
        let unpaced = took.mul_f64(self.total as f64 / first.max(1) as f64);
        let longer = elapsed.unwrap_or_default().saturating_sub(unpaced);
        Step {
            paused: self.fetched.paused.min(longer),
            ..self.fetched
        }
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

    /// Fetches nine times what is not paced, the first part in a quarter of a second; answers the pauses
    /// that are taken off of what took a minute.
    fn taken_off(slept: Duration) -> Duration {
        let began = Instant::now();
        let mut pace = Pace::new(began);
        let (first, total) = (limits::DRILL_MEASURED, 9 * limits::DRILL_MEASURED);
        let fetched = |bytes| Progress::Fetched { bytes, total };
        let at = began + SECOND / 4;
        assert_eq!(pace.pause(&fetched(first), at, || ZERO), ZERO);
        pace.paused(&fetched(first), at, ZERO);
        let due = 0.25 + first as f64 / limits::DRILL_RATE as f64;
        let pause = pace.pause(&fetched(2 * first), began + SECOND / 2, || ZERO);
        assert!(
            (pause.as_secs_f64() - (due - 0.5)).abs() < 1e-6,
            "{pause:?}"
        );
        pace.paused(&fetched(2 * first), began + SECOND, slept);
        let ended = began + 60 * SECOND;
        assert_eq!(pace.pause(&fetched(total), ended, || ZERO), ZERO);
        pace.paused(&fetched(total), ended, ZERO);
        assert_eq!(pace.fetched().ended, Some(ended));
        pace.fetched().paused
    }

    #[test]
    fn pauses_of_a_fetch_are_those_slept_and_leave_the_speed_of_its_first_part() {
        // A bucket that became slower than the rate is not excused.
        assert_eq!(taken_off(SECOND), SECOND);
        assert_eq!(taken_off(59 * SECOND), 60 * SECOND - 9 * SECOND / 4);
    }

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
