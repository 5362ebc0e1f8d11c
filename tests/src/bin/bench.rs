//! Holdfast beside etcd 3.7 in one run: three nodes each on loopback, fsync on, the same load.
//!
//! The load is an etcd client in this process, one connection, at the leader of each. Both stores
//! are filled first. Runs alternate, so that a noisy machine is noisy for both; medians count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, GetOptions};
use hdrhistogram::Histogram;
use holdfast_tests::region::Region;
use holdfast_tests::servers;
use parking_lot::Mutex;
use rand::Rng;

const VALUE: usize = 256;

#[derive(Clone, Copy, PartialEq)]
enum Load {
    Put,
    Linearizable,
    Serializable,
    Mixed,
}

struct Figures {
    rate: f64,
    p50: f64,
    p99: f64,
    /// Milliseconds of server CPU per 1,000 requests.
    cpu: f64,
    max_rpo_ms: Vec<u64>,
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// User and system time of processes, in milliseconds.
fn cpu(pids: &[u32]) -> f64 {
    let one = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks = |n: usize| {
            fields
                .get(n)
                .and_then(|f| f.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        // Hundredths of a second, as on every Linux here.
        (ticks(11) + ticks(12)) * 10.0
    };
    pids.iter().map(one).sum()
}

async fn run(
    client: &Client,
    load: Load,
    in_flight: usize,
    seconds: f64,
    keys: usize,
    pids: &[u32],
) -> Result<Figures> {
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    let (before, started) = (cpu(pids), Instant::now());
    let all = Arc::new(Mutex::new(Histogram::<u64>::new(3)?));
    let errors = Arc::new(AtomicU64::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..in_flight {
        let (mut client, all, errors) = (client.clone(), all.clone(), errors.clone());
        workers.spawn(async move {
            let mut own = Histogram::<u64>::new(3).expect("three digits");
            let mut value = vec![0u8; VALUE];
            while Instant::now() < until {
                let key = format!("bench/{:08}", rand::rng().random_range(0..keys));
                let writes = match load {
                    Load::Put => true,
                    Load::Mixed => rand::rng().random_range(0..5) == 0,
                    _ => false,
                };
                let at = Instant::now();
                let ok = if writes {
                    rand::rng().fill(&mut value[..]);
                    client.put(key, value.as_slice(), None).await.is_ok()
                } else {
                    let options =
                        (load == Load::Serializable).then(|| GetOptions::new().with_serializable());
                    client.get(key, options).await.is_ok()
                };
                match ok {
                    true => drop(own.record(at.elapsed().as_micros() as u64)),
                    false => drop(errors.fetch_add(1, Ordering::Relaxed)),
                }
            }
            let _ = all.lock().add(own);
        });
    }
    while workers.join_next().await.is_some() {}
    let elapsed = started.elapsed().as_secs_f64();
    let used = cpu(pids) - before;
    ensure!(
        errors.load(Ordering::Relaxed) == 0,
        "{} requests failed",
        errors.load(Ordering::Relaxed)
    );
    let all = all.lock();
    Ok(Figures {
        rate: all.len() as f64 / elapsed,
        p50: all.value_at_quantile(0.5) as f64 / 1e3,
        p99: all.value_at_quantile(0.99) as f64 / 1e3,
        cpu: used * 1e3 / all.len() as f64,
        max_rpo_ms: Vec::new(),
    })
}

async fn fill(client: &Client, keys: usize) -> Result<()> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..128 {
        let (mut client, next) = (client.clone(), next.clone());
        workers.spawn(async move {
            let mut value = vec![0u8; VALUE];
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= keys {
                    return Ok::<_, anyhow::Error>(());
                }
                rand::rng().fill(&mut value[..]);
                client
                    .put(format!("bench/{n:08}"), value.as_slice(), None)
                    .await?;
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended??;
    }
    Ok(())
}

fn median(mut figures: Vec<Figures>) -> Figures {
    figures.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    let middle = figures.len() / 2;
    figures.swap_remove(middle)
}

#[tokio::main]
async fn main() -> Result<()> {
    let keys = setting("BENCH_KEYS", 100_000);
    let seconds = setting("BENCH_SECONDS", 6) as f64;
    let rounds = setting("BENCH_ROUNDS", 3);
    println!(
        "filling both with {keys} keys of {VALUE} bytes; {rounds} rounds of {seconds} s a row, alternating"
    );
    let etcd = servers::etcd_cluster().await?;
    let theirs = Client::connect([&etcd.leader().await?], None).await?;
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let leader = region.leader("acme").await?;
    let ours = region.client_at("acme", &[leader]).await?;
    let pids: Vec<u32> = region.nodes.iter().filter_map(|n| n.pid()).collect();
    fill(&theirs, keys).await?;
    fill(&ours, keys).await?;

    println!(
        "{:<28}{:>10}{:>10}{:>7}{:>17}{:>17}{:>19}",
        "", "etcd/s", "ours/s", "ratio", "p50 ms etcd/ours", "p99 ms etcd/ours", "CPU ms/1000 e/o"
    );
    let rows = [
        ("put, 1 client", Load::Put, 1),
        ("put, 16 clients", Load::Put, 16),
        ("put, 64 clients", Load::Put, 64),
        ("put, 256 clients", Load::Put, 256),
        ("linearizable read, 64", Load::Linearizable, 64),
        ("serializable read, 64", Load::Serializable, 64),
        ("mixed 20/80, 64", Load::Mixed, 64),
    ];
    for (name, load, in_flight) in rows {
        let (mut of_etcd, mut of_ours) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            of_etcd.push(run(&theirs, load, in_flight, seconds, keys, &etcd.pids()).await?);
            // The ledger is looked at while the load runs.
            let watch = async {
                let mut seen = Vec::new();
                if load == Load::Put && in_flight == 64 {
                    let until = Instant::now() + Duration::from_secs_f64(seconds * 0.95);
                    while Instant::now() < until {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        seen.extend(region.tenant(leader, "acme").await.map(|t| t.actual_rpo_ms));
                    }
                }
                seen
            };
            let (figures, seen) =
                tokio::join!(run(&ours, load, in_flight, seconds, keys, &pids), watch);
            let mut figures = figures?;
            figures.max_rpo_ms = seen;
            of_ours.push(figures);
        }
        let mut lags: Vec<u64> = of_ours.iter().flat_map(|f| f.max_rpo_ms.clone()).collect();
        let (e, o) = (median(of_etcd), median(of_ours));
        println!(
            "{name:<28}{:>10.0}{:>10.0}{:>7.2}{:>17}{:>17}{:>19}",
            e.rate,
            o.rate,
            o.rate / e.rate,
            format!("{:.1}/{:.1}", e.p50, o.p50),
            format!("{:.1}/{:.1}", e.p99, o.p99),
            format!("{:.0}/{:.0}", e.cpu, o.cpu),
        );
        if !lags.is_empty() {
            lags.sort_unstable();
            println!(
                "  archive lag during our runs: p99 {} ms of {} samples",
                lags[lags.len() * 99 / 100],
                lags.len()
            );
        }
    }
    Ok(())
}
