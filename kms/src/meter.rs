//! How fast one provider is asked: a rate that all tenants of the node share, and a back-off.
//!
//! Invariants. Calls are spread evenly, never more than the rate. A provider that does not answer
//! is asked again after a pause that doubles up to five seconds; whoever comes within it is told why
//! without a call. A refusal is an answer.

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
    /// The pause after the next failure, and the end and cause of the present one.
    pause: Duration,
    paused: Option<(Instant, String)>,
}

impl Meter {
    /// `rate`: calls a second.
    pub fn new(rate: f64) -> Self {
        Meter {
            interval: Duration::from_secs_f64(1.0 / rate),
            state: Mutex::new(State {
                next: Instant::now(),
                pause: FIRST_PAUSE,
                paused: None,
            }),
            calls: AtomicU64::new(0),
        }
    }

    /// Waits for a turn. During a pause: why the provider is not asked.
    pub async fn turn(&self) -> Result<(), String> {
        let at = {
            let mut state = self.state.lock();
            let now = Instant::now();
            if let Some((_, why)) = state.paused.as_ref().filter(|(until, _)| now < *until) {
                return Err(format!("it did not answer a moment ago ({why})"));
            }
            let at = state.next.max(now);
            state.next = at + self.interval;
            at
        };
        tokio::time::sleep_until(at).await;
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Notes what came of a call: `Some` says why there was no answer.
    pub fn answered(&self, failed: Option<&String>) {
        let mut state = self.state.lock();
        match failed {
            Some(why) => {
                let until = Instant::now() + state.pause;
                state.paused = Some((until, why.clone()));
                state.pause = (state.pause * 2).min(LONGEST_PAUSE);
            }
            None => {
                state.paused = None;
                state.pause = FIRST_PAUSE;
            }
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
            meter.turn().await.unwrap();
        }
        assert!(start.elapsed() >= Duration::from_millis(100));
        meter.answered(Some(&"timed out".to_string()));
        assert!(meter.turn().await.unwrap_err().contains("timed out"));
        tokio::time::sleep(FIRST_PAUSE + Duration::from_millis(20)).await;
        meter.turn().await.unwrap();
        // The second pause is longer; an answer ends it.
        meter.answered(Some(&"timed out".to_string()));
        tokio::time::sleep(FIRST_PAUSE + Duration::from_millis(20)).await;
        assert!(meter.turn().await.is_err());
        meter.answered(None);
        meter.turn().await.unwrap();
        assert_eq!(meter.calls(), 13);
    }
}
