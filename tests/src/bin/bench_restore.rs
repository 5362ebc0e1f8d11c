//! Restoring a tenant of 1 GB from MinIO, beside downloading the same objects with the same
//! parallelism to the same disk, hashed and fsynced.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::plain::{self, PARALLEL};
use holdfast_tests::region::Region;
use holdfast_tests::servers;
use rand::Rng;
use replication::archive::bucket::BucketConfig;

const VALUE: usize = 64 << 10;

fn megabytes() -> usize {
    let given = std::env::var("BENCH_RESTORE_MB").ok();
    given.and_then(|v| v.parse().ok()).unwrap_or(1024)
}

async fn fill(region: &Region, count: usize) -> Result<()> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (mut client, next) = (region.client("acme").await?, next.clone());
        writers.spawn(async move {
            let mut value = vec![0u8; VALUE];
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return Ok::<_, anyhow::Error>(());
                }
                rand::rng().fill(&mut value[..]);
                client
                    .put(format!("key/{n:08}"), value.as_slice(), None)
                    .await?;
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
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
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let count = megabytes() * (1 << 20) / VALUE;
    println!(
        "restore: writing {} MB in {count} values to a tenant archived to MinIO",
        megabytes()
    );
    fill(&region, count).await?;
    region.archived("acme").await?;
    let id = region.tenant(0, "acme").await?.id;
    // The last checkpoint may still be on its way up.
    tokio::time::sleep(Duration::from_secs(10)).await;
    region.kill_all();
    region.lose_disks()?;
    let store = servers::s3(&minio.endpoint, "holdfast")?;
    let objects = plain::objects(&store, &id).await?;
    let scratch = region.dir.path().join("download");
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let started = Instant::now();
    let (ok, table) = region.holdfast(&["restore", "region"]).await?;
    let restored = started.elapsed().as_secs_f64();
    ensure!(ok, "{table}");
    region.serving().await?;
    let mut client = region.client_at("acme", &[0]).await?;
    let options = etcd_client::GetOptions::new()
        .with_prefix()
        .with_count_only();
    let found = client.get("key/", Some(options)).await?.count();
    ensure!(found == count as i64, "{found} of {count} keys are there");
    let first = client.get("key/00000000", None).await?;
    let value = first.kvs().first().context("the first key is gone")?;
    ensure!(value.value().len() == VALUE);
    region.kill_all();
    let (bytes, seconds) = plain::download(&store, &objects, &scratch).await?;
    let megabytes = bytes as f64 / 1e6;
    println!(
        "{} objects of {megabytes:.0} MB, {PARALLEL} at once; plain download: {seconds:.1} s, {:.0} MB/s; restored to verified reads: {restored:.1} s, {:.0} MB/s",
        objects.len(),
        megabytes / seconds,
        megabytes / restored
    );
    println!("ratio {:.2} (target 0.8)", seconds / restored);
    for line in table
        .lines()
        .filter(|l| l.starts_with("acme") || l.starts_with("TENANT"))
    {
        println!("{line}");
    }
    Ok(())
}
