//! Histories: concurrent clients on a few registers, recorded, and checked for linearizability.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use etcd_client::{Client, Compare, CompareOp, Txn, TxnOp};
use parking_lot::Mutex;
use rand::Rng;
use tokio::task::JoinSet;

use crate::linear::{Call, Operation, check};
use crate::region::Region;

const KEYS: usize = 6;
const CLIENTS: usize = 6;

fn number(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// One client's operations on random keys, recorded, until told to stop.
async fn work(
    mut client: Client,
    clock: Arc<AtomicU64>,
    next: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    histories: Arc<Vec<Mutex<Vec<Call>>>>,
) {
    while !stop.load(Ordering::Relaxed) {
        let n = rand::rng().random_range(0..KEYS);
        let key = format!("register/{n}");
        let fresh = next.fetch_add(1, Ordering::Relaxed);
        let start = clock.fetch_add(1, Ordering::SeqCst);
        let kind = rand::rng().random_range(0..10);
        let (operation, known) = match kind {
            0..4 => {
                let answer = client.get(key, None).await;
                match answer {
                    Ok(found) => (
                        Operation::Read(found.kvs().first().and_then(|kv| number(kv.value()))),
                        true,
                    ),
                    // Nothing is learned from a read that failed.
                    Err(_) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                }
            }
            4..7 => {
                let known = client.put(key, fresh.to_string(), None).await.is_ok();
                (Operation::Put(fresh), known)
            }
            7 => (Operation::Delete, client.delete(key, None).await.is_ok()),
            _ => {
                let expected = histories[n]
                    .lock()
                    .iter()
                    .rev()
                    .find_map(|c| match c.operation {
                        Operation::Put(v) if c.end.is_some() => Some(v),
                        _ => None,
                    });
                let Some(expected) = expected else { continue };
                let txn = Txn::new()
                    .when([Compare::value(
                        key.clone(),
                        CompareOp::Equal,
                        expected.to_string(),
                    )])
                    .and_then([TxnOp::put(key, fresh.to_string(), None)]);
                match client.txn(txn).await {
                    Ok(answer) => (
                        Operation::Swap(Some(expected), fresh, Some(answer.succeeded())),
                        true,
                    ),
                    Err(_) => (Operation::Swap(Some(expected), fresh, None), false),
                }
            }
        };
        let end = clock.fetch_add(1, Ordering::SeqCst);
        let call = Call {
            start,
            end: known.then_some(end),
            operation,
        };
        histories[n].lock().push(call);
        // Bounds how many calls overlap, and with them the check.
        tokio::time::sleep(Duration::from_millis(if known { 40 } else { 200 })).await;
    }
}

/// Clients at every node of a region, at work.
pub struct Clients {
    stop: Arc<AtomicBool>,
    histories: Arc<Vec<Mutex<Vec<Call>>>>,
    tasks: JoinSet<()>,
}

impl Clients {
    /// Starts clients of tenant `name`, each at one node.
    pub async fn start(region: &Region, name: &str) -> Result<Self> {
        let (clock, next) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(1)));
        let stop = Arc::new(AtomicBool::new(false));
        let histories: Arc<Vec<Mutex<Vec<Call>>>> =
            Arc::new((0..KEYS).map(|_| Mutex::default()).collect());
        let mut tasks = JoinSet::new();
        for n in 0..CLIENTS {
            let client = region.client_at(name, &[n % region.nodes.len()]).await?;
            let (clock, next) = (clock.clone(), next.clone());
            tasks.spawn(work(client, clock, next, stop.clone(), histories.clone()));
        }
        Ok(Clients {
            stop,
            histories,
            tasks,
        })
    }

    /// Ends the work and checks what was recorded; answers how many calls it was.
    pub async fn check(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        let mut calls = 0;
        for (n, history) in self.histories.iter().enumerate() {
            let mut history = history.lock().clone();
            calls += history.len();
            ensure!(
                check(&history),
                "register/{n} is not linearizable: {history:?}"
            );
            // The control: one falsified answer must be found.
            history.sort_by_key(|c| c.start);
            if let Some(read) = history
                .iter_mut()
                .find(|c| matches!(c.operation, Operation::Read(_)))
            {
                read.operation = Operation::Read(Some(u64::MAX));
                let end = read.end;
                // What came later explains nothing.
                history.retain(|c| Some(c.start) < end);
                ensure!(
                    !check(&history),
                    "register/{n}: a falsified read was not found"
                );
            }
        }
        Ok(calls)
    }
}
