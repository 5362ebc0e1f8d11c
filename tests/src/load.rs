//! A steady load of small puts on one tenant, measured over windows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use parking_lot::Mutex;

use crate::region::{Region, connect};

pub const WRITERS: usize = 4;

/// A tenant's load: writers that each put the next number under keys of their own.
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Latencies in microseconds since last asked.
    times: Arc<Mutex<Histogram<u64>>>,
    tasks: Vec<tokio::task::JoinHandle<u64>>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid bounds")
}

impl Load {
    pub async fn start(region: &Region, tenant: &str) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let times = Arc::new(Mutex::new(histogram()));
        let mut tasks = Vec::new();
        for writer in 0..WRITERS {
            let mut client = region.client(tenant).await?;
            let (stop, times, tenant) = (stop.clone(), times.clone(), tenant.to_string());
            let endpoints: Vec<String> = (0..region.nodes.len())
                .map(|n| region.client_address(n).to_string())
                .collect();
            tasks.push(tokio::spawn(async move {
                let mut acknowledged = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (key, value) = (format!("load/{writer}"), acknowledged + 1);
                    let began = Instant::now();
                    match client.put(key, value.to_string(), None).await {
                        Ok(_) => {
                            acknowledged = value;
                            times
                                .lock()
                                .saturating_record(began.elapsed().as_micros() as u64);
                        }
                        Err(_) => {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            // A login ends after a while.
                            if let Ok(again) = connect(&endpoints, &tenant).await {
                                client = again;
                            }
                        }
                    }
                }
                acknowledged
            }));
        }
        Ok(Load { stop, times, tasks })
    }

    /// Begins to measure.
    pub fn begin(&self) {
        self.times.lock().reset();
    }

    /// Puts a second, and p99 in milliseconds, since `begin`.
    pub fn figures(&self, over: Duration) -> (f64, f64) {
        let times = self.times.lock();
        let rate = times.len() as f64 / over.as_secs_f64();
        (rate, times.value_at_quantile(0.99) as f64 / 1000.0)
    }

    /// What each writer was acknowledged last.
    pub async fn end(self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut last = Vec::new();
        for task in self.tasks {
            last.push(task.await?);
        }
        Ok(last)
    }
}
