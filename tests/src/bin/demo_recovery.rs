//! Ten tenants on MinIO, under keys of LocalStack's KMS: a bad client deletes half of one, which goes
//! back to one second before; a drill proves another; everything is lost and restored. All is
//! compared with an independent record of what was written when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, DeleteOptions};
use holdfast_tests::kms::create_key;
use holdfast_tests::region::Region;
use holdfast_tests::servers;
use replication::archive::bucket::BucketConfig;
use replication::clock::utc;

const TENANTS: usize = 10;
/// Writes go on for so long, half of it before the bad client comes.
const WRITTEN: Duration = Duration::from_secs(120);
const KEYS: usize = 400;
const PAUSE: Duration = Duration::from_millis(10);

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

fn name(n: usize) -> String {
    match n {
        0 => "acme".into(),
        n => format!("tenant-{n}"),
    }
}

/// One put, and between which moments it was done; it never was if it has no end.
struct Write {
    key: String,
    value: String,
    sent_ms: u64,
    done_ms: Option<u64>,
}

/// Puts numbered values under the tenant's keys until told to stop; answers what was written.
async fn write(mut client: Client, stop: Arc<AtomicBool>) -> Vec<Write> {
    let mut written = Vec::new();
    for n in 0usize.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (key, value) = (format!("k/{:03}", n % KEYS), n.to_string());
        let sent_ms = now_ms();
        let put = client.put(key.as_str(), value.as_str(), None).await;
        written.push(Write {
            key,
            value,
            sent_ms,
            done_ms: put.ok().map(|_| now_ms()),
        });
        tokio::time::sleep(PAUSE).await;
    }
    written
}

type Rows = BTreeMap<String, String>;

/// Compares rows with what the record says of a moment: each key holds the last value acknowledged by
/// then, or one that was on its way. Answers how many keys were compared.
fn compare(record: &[Write], rows: &Rows, at_ms: u64) -> Result<usize> {
    let mut keys: BTreeMap<&str, Vec<&Write>> = BTreeMap::new();
    for write in record {
        keys.entry(&write.key).or_default().push(write);
    }
    for (key, writes) in &keys {
        let found = rows.get(*key);
        let done = |w: &&&Write| w.done_ms.is_some_and(|done| done <= at_ms);
        let last = writes.iter().rfind(done);
        let on_its_way =
            |w: &&Write| w.sent_ms <= at_ms && last.is_none_or(|last| w.sent_ms > last.sent_ms);
        let allowed = writes.iter().filter(|w| on_its_way(w)).map(|w| &w.value);
        let mut allowed = allowed.chain(last.map(|w| &w.value));
        match found {
            Some(found) => ensure!(
                allowed.any(|value| value == found),
                "{key} is {found} at {}, not what was written",
                utc(at_ms)
            ),
            None => ensure!(last.is_none(), "{key} was acknowledged and is gone"),
        }
    }
    ensure!(
        rows.keys().all(|key| keys.contains_key(key.as_str())),
        "there are keys that nobody wrote"
    );
    Ok(keys.len())
}

/// Opens a page in a headless Chromium; an error if that says anything of it on its console.
fn opened(dir: &std::path::Path, page: &str) -> Result<String> {
    let file = dir.join("drill.html");
    std::fs::write(&file, page)?;
    let out = std::process::Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg("--enable-logging=stderr")
        .arg(format!(
            "--user-data-dir={}",
            dir.join("chromium").display()
        ))
        .arg(format!("file://{}", file.display()))
        .output()
        .context("chromium is not installed: make demo-recovery installs it")?;
    let (dom, said) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    let errors: Vec<&str> = said.lines().filter(|l| l.contains("CONSOLE")).collect();
    ensure!(out.status.success() && errors.is_empty(), "{errors:?}");
    let phases = dom.matches("<rect").count();
    ensure!(
        dom.contains("passed") && dom.contains("aria-label=\"timeline\"") && phases > 3,
        "the page is not what it should be: {dom}"
    );
    Ok(format!(
        "its page opens in a headless Chromium without errors, with a timeline of {phases} phases"
    ))
}

#[tokio::main]
async fn main() -> Result<()> {
    let all = Instant::now();
    let step = |what: &str| println!("[{:6.1} s] {what}", all.elapsed().as_secs_f64());

    step("starting MinIO, LocalStack and a region of three daemons");
    let (minio, localstack) = tokio::try_join!(servers::minio(), servers::localstack())?;
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let bucket = BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(minio.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.on_kms(&localstack.endpoint)?;
    region.start_all()?;
    region.serving().await?;
    for n in 0..TENANTS {
        let key = create_key(&localstack.endpoint).await?;
        let (tier, rpo_ms, rto_ms) = match n % 2 {
            0 => ("enhanced", 5_000, 60_000),
            _ => ("standard", 60_000, 600_000),
        };
        region
            .create_tenant_with(&name(n), tier, rpo_ms, rto_ms, &key, "app")
            .await?;
    }
    step("ten tenants: five enhanced (RPO 5 s, RTO 60 s), five standard (RPO 60 s, RTO 10 min)");

    let (stop, stop_acme) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let acme = tokio::spawn(write(region.client("acme").await?, stop_acme.clone()));
    let mut writers = Vec::new();
    for n in 1..TENANTS {
        let client = region.client(&name(n)).await?;
        writers.push((n, tokio::spawn(write(client, stop.clone()))));
    }
    let began = Instant::now();
    tokio::time::sleep(WRITTEN / 2).await;
    let before_ms = now_ms();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut bad = region.client("acme").await?;
    let half = DeleteOptions::new().with_range(format!("k/{:03}", KEYS / 2));
    let deleted = bad.delete("k/", Some(half)).await?.deleted();
    step(&format!("a bad client deletes {deleted} of acme's keys"));
    ensure!(deleted > 0, "there was nothing to delete");

    tokio::time::sleep(Duration::from_secs(2)).await;
    stop_acme.store(true, Ordering::Relaxed);
    let record = acme.await?;
    let (at, asked) = (utc(before_ms), Instant::now());
    let said = region
        .operate(&["restore", "tenant", "acme", "--at", &at])
        .await?;
    let restored = region.rows("acme").await?;
    let compared = compare(&record, &restored, before_ms)?;
    step(&format!(
        "restore tenant acme --at {at}, the others served: {:.1} s; {compared} keys as they were then, of {} writes:{}",
        asked.elapsed().as_secs_f64(),
        record.len(),
        said.trim_end()
    ));
    println!("{}", region.operate(&["archive", "ls", "acme"]).await?);
    let said = region.operate(&["drill", "run", "tenant-2"]).await?;
    step(&format!("a drill of tenant-2:\n{}", said.trim()));
    let evidence = region.dir.path().join("drill.json");
    std::fs::write(
        &evidence,
        region.operate(&["drill", "show", "tenant-2"]).await?,
    )?;
    let (file, ca) = (
        evidence.display().to_string(),
        region.dir.path().join("ca.pem"),
    );
    let ca = ca.display().to_string();
    let said = region
        .operate(&["drill", "verify", &file, "--ca", &ca])
        .await?;
    step(said.lines().next().context("it says something")?);
    let page = region
        .operate(&["drill", "show", "tenant-2", "--html"])
        .await?;
    step(&opened(region.dir.path(), &page)?);
    println!("{}", region.operate(&["objectives"]).await?);
    tokio::time::sleep(WRITTEN.saturating_sub(began.elapsed())).await;

    stop.store(true, Ordering::Relaxed);
    let mut records = Vec::new();
    for (n, writer) in writers {
        records.push((n, writer.await?));
    }
    let written: usize = records.iter().map(|(_, record)| record.len()).sum();
    step(&format!(
        "{written} writes; killing every node and deleting every disk"
    ));
    let lost_ms = now_ms();
    region.kill_all();
    region.lose_disks()?;
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let report = region.dir.path().join("recovery.json");
    let report = report.display().to_string();
    let declare = ["disaster", "declare", "--region", "eu", "--report", &report];
    println!("{}", region.operate(&declare).await?);
    region.serving().await?;
    let verify = ["disaster", "verify", &report, "--ca", &ca];
    let said = region.operate(&verify).await?;
    step(said.lines().next().context("it says something")?);
    ensure!(
        region.rows("acme").await? == restored,
        "acme is not what it was"
    );
    for (n, record) in &records {
        let rpo_ms = if n % 2 == 0 { 5_000 } else { 60_000 };
        let rows = region.rows(&name(*n)).await?;
        // Whatever is older than the contract's RPO is there; what is there was written.
        let promised: Vec<&Write> = record
            .iter()
            .filter(|w| w.done_ms.is_some_and(|done| done + rpo_ms <= lost_ms))
            .collect();
        for write in &promised {
            ensure!(
                rows.contains_key(&write.key),
                "{}: {} was acknowledged before the RPO and is gone",
                name(*n),
                write.key
            );
        }
        let newest = record.iter().filter(|w| rows.get(&w.key) == Some(&w.value));
        let newest = newest.filter_map(|w| w.done_ms).max().unwrap_or(0);
        let oldest = promised.iter().filter_map(|w| w.done_ms).max().unwrap_or(0);
        ensure!(newest >= oldest, "{}: more than its RPO is gone", name(*n));
        let compared = compare(record, &rows, newest)?;
        println!(
            "    {:<10} {compared} keys as written, up to {} ms before the loss",
            name(*n),
            lost_ms.saturating_sub(newest)
        );
    }
    step("everything is as it was written");
    Ok(())
}
