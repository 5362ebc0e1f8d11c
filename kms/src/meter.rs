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
                pause: FIRST_PAUSE,
            }),
            calls: AtomicU64::new(0),
        }
    }

    /// Waits for a turn.
    pub async fn turn(&self) {
        let at = {
            let mut state = self.state.lock();
            let at = state.next.max(Instant::now());
            state.next = at + self.interval;
            at
        };
        tokio::time::sleep_until(at).await;
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// How long a call would wait for its turn.
    pub fn queue(&self) -> Duration {
        let next = self.state.lock().next;
        next.saturating_duration_since(Instant::now())
    }

    /// Notes whether a call was answered.
    pub fn answered(&self, answered: bool) {
        let mut state = self.state.lock();
        if answered {
            state.pause = FIRST_PAUSE;
            return;
        }
        let until = Instant::now() + state.pause;
        // Calls that failed together are one failure.
        if until > state.next {
            state.next = until;
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
        meter.answered(false);
        meter.answered(false);
        assert!(meter.queue() <= FIRST_PAUSE);
        let start = Instant::now();
        meter.turn().await;
        assert!(start.elapsed() >= FIRST_PAUSE - Duration::from_millis(20));
        // The second pause is longer; an answer ends that.
        meter.answered(false);
        assert!(meter.queue() > FIRST_PAUSE);
        meter.turn().await;
        meter.answered(true);
        meter.turn().await;
        meter.answered(false);
        assert!(meter.queue() <= FIRST_PAUSE);
        assert_eq!(meter.calls(), 14);
    }
}
