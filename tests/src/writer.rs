//! A client that writes numbered keys, and remembers which writes were acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::region::Region;

/// Writes numbered keys until told to stop; answers those acknowledged.
pub struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Vec<u64>>,
}

impl Writer {
    pub async fn start(region: &Region, tenant: &str) -> Result<Self> {
        let mut client = region.client(tenant).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (stop.clone(), count.clone());
        let task = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0u64.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                match client.put(format!("w/{n}"), n.to_string(), None).await {
                    Ok(_) => {
                        acknowledged.push(n);
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
            acknowledged
        });
        Ok(Writer { stop, count, task })
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until this many writes are acknowledged.
    pub async fn past(&self, count: u64) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.count() < count {
            ensure!(Instant::now() < deadline, "not {count} writes in a minute");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub async fn stop(self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.task.await?)
    }
}

/// Reads every acknowledged write back.
pub async fn check_all(region: &Region, tenant: &str, acknowledged: &[u64]) -> Result<()> {
    let mut client = region.client(tenant).await?;
    for n in acknowledged {
        let found = client.get(format!("w/{n}"), None).await?;
        let value = found.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(
            value == Some(n.to_string().into_bytes()),
            "write {n} of {tenant} was acknowledged and is {value:?}"
        );
    }
    Ok(())
}
