//! How fast one provider is asked: a rate that all tenants of the node share, and a back-off.
//!
//! Invariants. Calls are spread evenly, never more than the rate. A provider that does not answer
//! is asked again after a pause that doubles up to five seconds; whoever comes within it waits for
//! its end, so that each tenant gets an answer of its own. A refusal is an answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub struct Meter {
    interval: Duration,
    state: Mutex<State>,
    calls: AtomicU64,
}

struct State {
    next: Instant,
    /// Nobody is asked before.
    paused_until: Instant,
    /// The pause after the next failure.
    pause: Duration,
}

impl Meter {
    /// `rate`: calls a second.
    pub fn new(rate: f64) -> Self {
        Meter {
            interval: Duration::from_secs_f64(1.0 / rate),
            state: Mutex::new(State {
                next: Instant::now(),
                paused_until: Instant::now(),
                pause: FIRST_PAUSE,
            }),
            calls: AtomicU64::new(0),
        }
    }

    /// Waits for a turn.
    pub async fn turn(&self) {
        loop {
            let at = {
                let mut state = self.state.lock();
                let at = state.next.max(state.paused_until).max(Instant::now());
                state.next = at + self.interval;
                at
            };
            tokio::time::sleep_until(at).await;
            // Who waited while a pause began gets another turn behind it.
            if self.state.lock().paused_until <= at {
                break;
            }
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// How long a call would wait for its turn.
    pub fn queue(&self) -> Duration {
        let state = self.state.lock();
        let at = state.next.max(state.paused_until);
        at.saturating_duration_since(Instant::now())
    }

    /// Notes whether a call was answered.
    pub fn answered(&self, answered: bool) {
        let mut state = self.state.lock();
        if answered {
            state.pause = FIRST_PAUSE;
            return;
        }
        let now = Instant::now();
        // Calls that failed together are one failure.
        if now >= state.paused_until {
            state.paused_until = now + state.pause;
            state.pause = (state.pause * 2).min(LONGEST_PAUSE);
        }
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_are_spread_and_a_silent_provider_is_left_alone() {
        let meter = Meter::new(100.0);
        let start = Instant::now();
        for _ in 0..11 {
            meter.turn().await;
        }
        assert!(start.elapsed() >= Duration::from_millis(100));
        // Two that fail together are one failure.
        let failed = Instant::now();
        meter.answered(false);
        meter.answered(false);
        meter.turn().await;
        assert!(failed.elapsed() >= FIRST_PAUSE);
        // The second pause is longer; an answer ends that.
        let failed = Instant::now();
        meter.answered(false);
        meter.turn().await;
        assert!(failed.elapsed() >= FIRST_PAUSE * 2);
        meter.answered(true);
        meter.answered(false);
        assert!(meter.queue() <= FIRST_PAUSE);
        assert_eq!(meter.calls(), 13);
    }
}
