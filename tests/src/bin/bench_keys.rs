//! What taking a key away, giving it back and rotating it cost, with LocalStack's KMS: the time to the
//! last node's seal and resumption over many rounds, calls to the KMS, and puts beside a rotation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::kms::{self, create_key, with_key};
use holdfast_tests::load::Load;
use holdfast_tests::region::Region;
use holdfast_tests::served::Served;
use holdfast_tests::servers;

const BOUND: Duration = Duration::from_secs(60);
const WINDOW: Duration = Duration::from_secs(6);
const ROUNDS_BESIDE: usize = 4;
/// Tenants whose keys are taken away at the same time, each at moments of its own.
const AT_ONCE: usize = 10;
/// Tenants for counting calls, and for how long they are counted.
const TENANTS: usize = 30;
const COUNTED: Duration = Duration::from_secs(90);

fn rounds() -> usize {
    let given = std::env::var("BENCH_KEYS_ROUNDS").ok();
    given.and_then(|v| v.parse().ok()).unwrap_or(50)
}

fn row(what: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |q: f64| took[((took.len() - 1) as f64 * q).round() as usize].as_secs_f64();
    println!(
        "{what:<34} median {:5.1} s  p99 {:5.1} s  max {:5.1} s  ({} rounds)",
        at(0.5),
        at(0.99),
        at(1.0),
        took.len()
    );
}

/// Calls to the KMS that all nodes have made.
async fn calls(region: &Region) -> Result<u64> {
    let mut calls = 0;
    for n in 0..region.nodes.len() {
        calls += kms::calls(region, n).await?;
    }
    Ok(calls)
}

/// Puts a second, and p99 in milliseconds, over a window.
async fn measured(load: &Load) -> (f64, f64) {
    load.begin();
    let began = Instant::now();
    tokio::time::sleep(WINDOW).await;
    load.figures(began.elapsed())
}

/// Takes a tenant's key away and gives it back, again and again; answers how long the last node took
/// to seal and to serve.
async fn revoked(region: &Region, kms: &str, n: usize) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let (name, arn) = (format!("revoked-{n}"), create_key(kms).await?);
    region
        .create_tenant_with(&name, "enhanced", 1_000, 60_000, &arn, "app")
        .await?;
    let (mut sealed, mut resumed) = (Vec::new(), Vec::new());
    for _ in 0..rounds().div_ceil(AT_ONCE) {
        // A login ends after five minutes.
        let mut at_nodes = Served::connect(region, &name).await?;
        // Anywhere between two proofs.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..30_000))).await;
        with_key(kms, "DisableKey", &arn).await?;
        sealed.push(at_nodes.sealed("disabled", BOUND).await?.last());
        with_key(kms, "EnableKey", &arn).await?;
        resumed.push(at_nodes.resumed(BOUND).await?.last());
    }
    Ok((sealed, resumed))
}

#[tokio::main]
async fn main() -> Result<()> {
    let localstack = servers::localstack().await?;
    let arn = create_key(&localstack.endpoint).await?;
    let mut region = Region::new()?;
    region.on_kms(&localstack.endpoint)?;
    region.start_all()?;
    region.serving().await?;
    for (name, key) in [("acme", arn.as_str()), ("globex", "local:globex")] {
        region
            .create_tenant_with(name, "enhanced", 1_000, 60_000, key, "app")
            .await?;
    }
    let load = Load::start(&region, "globex").await?;
    let each = (0..AT_ONCE).map(|n| revoked(&region, &localstack.endpoint, n));
    let (mut sealed, mut resumed) = (Vec::new(), Vec::new());
    for (one, other) in futures::future::try_join_all(each).await? {
        sealed.extend(one);
        resumed.extend(other);
    }
    row("DisableKey to the last node's seal", sealed);
    row("EnableKey to the last node's service", resumed);
    load.end().await?;

    let load = Load::start(&region, "acme").await?;
    println!("puts of acme, in turns of {} s:", WINDOW.as_secs());
    let mut kinds = [
        ("control", Vec::new()),
        ("rotating once a second", Vec::new()),
        ("rotating and rewriting", Vec::new()),
    ];
    for _ in 0..ROUNDS_BESIDE {
        for (what, found) in &mut kinds {
            let asked: &[&str] = match *what {
                "control" => &[],
                "rotating once a second" => &["key", "rotate", "acme"],
                _ => &["key", "rotate", "acme", "--rewrite"],
            };
            // A rotation that was begun is seen to its end.
            let over = AtomicBool::new(false);
            let beside = async {
                while !asked.is_empty() && !over.load(Ordering::Relaxed) {
                    let (ok, said) = region.holdfast(asked).await?;
                    ensure!(ok, "{said}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Ok(())
            };
            let window = async {
                let figures = measured(&load).await;
                over.store(true, Ordering::Relaxed);
                figures
            };
            let (figures, ended) = tokio::join!(window, beside);
            ended?;
            found.push(figures);
            let idle = |t: &daemon::proto::admin::Tenant| t.key_task.is_empty();
            region.until("acme", BOUND, idle).await?;
        }
    }
    for (what, found) in kinds {
        let each = |of: fn(&(f64, f64)) -> f64| {
            let mut all: Vec<f64> = found.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            (all[0], all[all.len() / 2], all[all.len() - 1])
        };
        let ((low, rate, high), (_, p99, worst)) = (each(|f| f.0), each(|f| f.1));
        println!(
            "  {what:<24} {rate:6.0} puts/s ({low:.0} to {high:.0}), p99 {p99:5.1} ms (at most {worst:.1})"
        );
    }
    load.end().await?;

    for n in 0..TENANTS {
        let name = format!("tenant-{n}");
        region
            .create_tenant_with(&name, "enhanced", 1_000, 60_000, &arn, "app")
            .await?;
    }
    tokio::time::sleep(Duration::from_secs(30)).await;
    let before = calls(&region).await?;
    tokio::time::sleep(COUNTED).await;
    let made = (calls(&region).await? - before) as f64 / COUNTED.as_secs_f64();
    // Those of before, and globex, which asks its keyfile.
    let tenants = TENANTS + AT_ONCE + 2;
    println!(
        "calls to the KMS: {made:.2} a second for {tenants} tenants on three nodes, so {:.0} for 1,000",
        made * 1000.0 / tenants as f64
    );
    Ok(())
}
