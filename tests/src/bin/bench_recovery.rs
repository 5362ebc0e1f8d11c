//! What recovery costs, on MinIO: replay of the log, a region of many tenants, the archive beside the
//! puts, an RPO of zero, a drill beside live traffic. `bench_restore` measures one large tenant.
//!
//! Sections by name, all if none is named: replay, many, archive, zero, drill.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use hdrhistogram::Histogram;
use holdfast_tests::opened::{chain_of, keys_of};
use holdfast_tests::plain;
use holdfast_tests::region::Region;
use holdfast_tests::servers::{self, Server};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use parking_lot::Mutex;
use rand::Rng;
use replication::GroupId;
use replication::archive::bucket::BucketConfig;
use replication::engine::{Budget, Ciphering};
use replication::restore::{self, Progress, plan};

const CLIENTS: usize = 64;

fn setting(name: &str, default: usize) -> usize {
    let given = std::env::var(name).ok();
    given.and_then(|v| v.parse().ok()).unwrap_or(default)
}

async fn on_minio() -> Result<(Server, Region)> {
    let minio = servers::minio().await?;
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let bucket = BucketConfig {
        url: "s3://holdfast".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(minio.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    region.start_all()?;
    region.serving().await?;
    Ok((minio, region))
}

/// Puts of 64 clients on one connection to the leader.
struct Puts {
    client: Client,
    value: usize,
    next: Arc<AtomicUsize>,
}

impl Puts {
    async fn of(region: &Region, tenant: &str, value: usize) -> Result<Self> {
        let leader = region.leader(tenant).await?;
        Ok(Puts {
            client: region.client_at(tenant, &[leader]).await?,
            value,
            next: Arc::new(AtomicUsize::new(0)),
        })
    }

    /// Puts until so many were made or so long has passed; answers how many a second, and p99 in ms.
    async fn run(&self, count: usize, over: Duration) -> Result<(f64, f64)> {
        let (began, until) = (Instant::now(), Instant::now() + over);
        let limit = self.next.load(Ordering::Relaxed) + count;
        let all = Arc::new(Mutex::new(Histogram::<u64>::new(3)?));
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..CLIENTS {
            let (mut client, next, all) = (self.client.clone(), self.next.clone(), all.clone());
            let mut value = vec![0u8; self.value];
            workers.spawn(async move {
                while Instant::now() < until {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= limit {
                        break;
                    }
                    rand::rng().fill(&mut value[..]);
                    let at = Instant::now();
                    client
                        .put(format!("key/{n:08}"), value.as_slice(), None)
                        .await?;
                    all.lock().record(at.elapsed().as_micros() as u64)?;
                }
                Ok::<_, anyhow::Error>(())
            });
        }
        while let Some(ended) = workers.join_next().await {
            ended??;
        }
        self.next.store(
            limit.min(self.next.load(Ordering::Relaxed)),
            Ordering::Relaxed,
        );
        let all = all.lock();
        Ok((
            all.len() as f64 / began.elapsed().as_secs_f64(),
            all.value_at_quantile(0.99) as f64 / 1e3,
        ))
    }
}

/// The whole log of a tenant replayed from its links alone, with values of this size.
async fn replay(value: usize, megabytes: usize) -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let count = (megabytes << 20) / value;
    let puts = Puts::of(&region, "acme", value).await?;
    let (live, _) = puts.run(count, Duration::from_secs(600)).await?;
    region.archived("acme").await?;
    let tenant: kms::TenantId = region
        .tenant(0, "acme")
        .await?
        .id
        .parse()
        .map_err(anyhow::Error::msg)?;
    let keys = Arc::new(keys_of(&region, tenant).await?);
    region.kill_all();
    // Without a checkpoint everything is replayed.
    let dir = format!("tenants/{tenant}/0000000001/checkpoints");
    let _ = std::fs::remove_dir_all(region.bucket().join(dir));
    let group = GroupId {
        tenant,
        incarnation: 1,
    };
    let chain = chain_of(&region, group).await?;
    let plan = plan::newest(&chain).await?;
    let scratch = tempfile::tempdir()?;
    let replayed = Arc::new(Mutex::new(None));
    let noted = replayed.clone();
    let budget = Budget::new(512 << 20, 64 << 20, Ciphering::Encrypted);
    let began = Instant::now();
    let rebuilt = restore::rebuild(
        &chain,
        &plan,
        keys,
        budget,
        &scratch.path().join("rebuilt"),
        Arc::new(move |progress| {
            if let Progress::Replayed { .. } = progress {
                *noted.lock() = Some(Instant::now());
            }
            true
        }),
    )
    .await?;
    let took = replayed.lock().context("nothing was replayed")? - began;
    let verified = began.elapsed() - took;
    let (bytes, seconds) = (plan.log_bytes() as f64 / 1e6, took.as_secs_f64());
    ensure!(rebuilt.state.revision as usize > count);
    println!(
        "replay, values of {value} bytes: {bytes:.0} MB of log in {seconds:.1} s, {:.0} MB/s; {:.0} puts/s, {:.1} times the live rate of {live:.0}; the digest scan {:.1} s apart",
        bytes / seconds,
        count as f64 / seconds,
        count as f64 / seconds / live,
        verified.as_secs_f64(),
    );
    Ok(())
}

/// A region of many tenants, restored, beside a download of the same objects.
async fn many() -> Result<()> {
    const VALUE: usize = 64 << 10;
    let tenants = setting("BENCH_TENANTS", 200);
    let megabytes = setting("BENCH_TENANT_MB", 10);
    let (minio, mut region) = on_minio().await?;
    for n in 0..tenants {
        let name = format!("t{n:03}");
        region
            .create_tenant_with(&name, "standard", 1_000, 600_000, "local:acme", "app")
            .await?;
        let mut client = region.client(&name).await?;
        let mut value = vec![0u8; VALUE];
        for row in 0..megabytes * (1 << 20) / VALUE {
            rand::rng().fill(&mut value[..]);
            client
                .put(format!("key/{row:04}"), value.as_slice(), None)
                .await?;
        }
        region
            .operate(&["archive", "checkpoint", &name])
            .await
            .with_context(|| format!("a checkpoint of {name}"))?;
    }
    let mut objects = Vec::new();
    let store = servers::s3(&minio.endpoint, "holdfast")?;
    for n in 0..tenants {
        let name = format!("t{n:03}");
        region.archived(&name).await?;
        let id = region.tenant(0, &name).await?.id;
        objects.extend(plain::objects(&store, &id).await?);
    }
    region.kill_all();
    region.lose_disks()?;
    let scratch = region.dir.path().join("download");
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let began = Instant::now();
    let (ok, table) = region.holdfast(&["restore", "region"]).await?;
    let restored = began.elapsed().as_secs_f64();
    ensure!(ok, "{table}");
    region.kill_all();
    let (bytes, seconds) = plain::download(&store, &objects, &scratch).await?;
    let megabytes = bytes as f64 / 1e6;
    println!(
        "{tenants} tenants, {} objects of {megabytes:.0} MB; plain download {seconds:.1} s, {:.0} MB/s; the region restored in {restored:.1} s, {:.0} MB/s; ratio {:.2} (target 0.7)",
        objects.len(),
        megabytes / seconds,
        megabytes / restored,
        seconds / restored
    );
    Ok(())
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(0.0)
}

/// Puts of 64 clients with the archive at work, and with the bucket's store stopped, in turns.
async fn archive() -> Result<()> {
    let (minio, region) = on_minio().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let puts = Puts::of(&region, "acme", 256).await?;
    let leader = region.leader("acme").await?;
    puts.run(100_000, Duration::from_secs(60)).await?;
    let over = Duration::from_secs(setting("BENCH_SECONDS", 10) as u64);
    let (mut with, mut without, mut lags) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..setting("BENCH_ROUNDS", 5) {
        region.archived("acme").await?;
        let watch = async {
            let until = Instant::now() + over;
            let mut seen = Vec::new();
            while Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let shown = region.tenant(leader, "acme").await;
                seen.extend(shown.map(|t| t.actual_rpo_ms));
            }
            seen
        };
        let (figures, seen) = tokio::join!(puts.run(usize::MAX / 2, over), watch);
        with.push(figures?.0);
        lags.extend(seen);
        minio.pause();
        let figures = puts.run(usize::MAX / 2, over).await;
        minio.resume();
        without.push(figures?.0);
    }
    lags.sort_unstable();
    let p99 = lags.get(lags.len() * 99 / 100).copied().unwrap_or(0);
    let (with, without) = (median(with), median(without));
    println!(
        "archive beside {CLIENTS} clients: {with:.0} puts/s, with the store stopped {without:.0}: it costs {:.0}% (target 10); lag p99 {p99} ms of {} samples (target 1000)",
        (1.0 - with / without) * 100.0,
        lags.len()
    );
    Ok(())
}

/// Puts that are answered once they are in the bucket.
async fn zero() -> Result<()> {
    let (minio, region) = on_minio().await?;
    region
        .operate(&[
            "tenant",
            "create",
            "acme",
            "--tier",
            "enhanced",
            "--rpo",
            "0s",
            "--key",
            "local:acme",
            "--user",
            "app",
            "--password",
            holdfast_tests::region::PASSWORD,
        ])
        .await?;
    let puts = Puts::of(&region, "acme", 256).await?;
    puts.run(usize::MAX / 2, Duration::from_secs(5)).await?;
    let (rate, p99) = puts.run(usize::MAX / 2, Duration::from_secs(20)).await?;
    let store = servers::s3(&minio.endpoint, "holdfast")?;
    let mut took = Vec::new();
    // A link of 64 puts.
    let body = vec![7u8; 64 * 400];
    for n in 0..200 {
        let began = Instant::now();
        let object = Path::from(format!("probe/{n}"));
        store.put(&object, PutPayload::from(body.clone())).await?;
        took.push(began.elapsed().as_secs_f64());
    }
    let latency = median(took);
    println!(
        "RPO 0, {CLIENTS} clients: {rate:.0} puts/s, p99 {p99:.1} ms; a PUT to the store takes {:.1} ms, so {:.0} puts/s with every waiting write in the next link (target: 2000, or that if it is less)",
        latency * 1e3,
        CLIENTS as f64 / latency
    );
    Ok(())
}

/// The live p99 with drills and without, in turns of a minute, or as long as a whole drill takes.
async fn drill() -> Result<()> {
    let (_minio, region) = on_minio().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let fill = Puts::of(&region, "acme", 4 << 10).await?;
    fill.run((256 << 20) / (4 << 10), Duration::from_secs(300))
        .await?;
    region.archived("acme").await?;
    let load = holdfast_tests::load::Load::start(&region, "acme").await?;
    let over = Duration::from_secs(setting("BENCH_MINUTE_S", 60) as u64);
    let mut turns = [Vec::new(), Vec::new(), Vec::new()];
    let mut drills = 0;
    for turn in 0..setting("BENCH_TURNS", 15) {
        let on = turn % 3 == 1;
        load.begin();
        let began = Instant::now();
        match on {
            // Every phase of a drill, whatever it costs, is in what is measured.
            true => {
                while began.elapsed() < over {
                    region.operate(&["drill", "run", "acme"]).await?;
                    drills += 1;
                }
            }
            false => tokio::time::sleep(over).await,
        }
        let (rate, p99) = load.figures(began.elapsed());
        ensure!(rate > 0.0, "no put was acknowledged in turn {turn}");
        turns[turn % 3].push(p99);
    }
    load.end().await?;
    let [off, on, control] = turns.map(median);
    println!(
        "drills beside live puts: p99 {off:.1} ms without, {on:.1} ms with ({drills} drills), {:+.0}% (target 20); control without: {control:.1} ms, {:+.0}%",
        (on / off - 1.0) * 100.0,
        (control / off - 1.0) * 100.0
    );
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let named: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| n == name);
    if wanted("replay") {
        replay(4 << 10, setting("BENCH_REPLAY_MB", 512)).await?;
        replay(256, setting("BENCH_REPLAY_MB", 512) / 4).await?;
    }
    if wanted("archive") {
        archive().await?;
    }
    if wanted("zero") {
        zero().await?;
    }
    if wanted("many") {
        many().await?;
    }
    if wanted("drill") {
        drill().await?;
    }
    Ok(())
}
