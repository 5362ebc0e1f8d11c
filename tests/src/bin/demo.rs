//! The main job on real input: a region is loaded while a zone is killed, then lost whole, then
//! restored from its bucket and compared document by document.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, GetOptions};
use holdfast_tests::debian;
use holdfast_tests::region::Region;

const WRITERS: usize = 64;

/// Puts `documents`, each until it is acknowledged; counts those in `done`.
async fn load(
    client: &Client,
    documents: Vec<(String, Vec<u8>)>,
    done: Arc<AtomicUsize>,
) -> Result<()> {
    let documents = Arc::new(documents);
    let next = Arc::new(AtomicUsize::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let (mut client, documents, next, done) = (
            client.clone(),
            documents.clone(),
            next.clone(),
            done.clone(),
        );
        writers.spawn(async move {
            while let Some((key, value)) = documents.get(next.fetch_add(1, Ordering::Relaxed)) {
                let deadline = Instant::now() + Duration::from_secs(60);
                while let Err(e) = client.put(key.as_str(), value.as_slice(), None).await {
                    ensure!(Instant::now() < deadline, "{key}: {e}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    Ok(())
}

/// Reads everything under `pkg/` in pages.
async fn read_all(client: &mut Client) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut from = b"pkg/".to_vec();
    loop {
        let options = GetOptions::new().with_range("pkg0").with_limit(500);
        let page = client.get(from.clone(), Some(options)).await?;
        for kv in page.kvs() {
            found.insert(String::from_utf8(kv.key().to_vec())?, kv.value().to_vec());
        }
        match page.kvs().last() {
            Some(last) if page.more() => {
                from = last.key().to_vec();
                from.push(0);
            }
            _ => return Ok(found),
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let all = Instant::now();
    let step = |what: &str| println!("[{:6.1} s] {what}", all.elapsed().as_secs_f64());

    step("starting a region of three zones: three daemons, a directory as bucket");
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    region.create_tenant("globex", "standard", 0, 0).await?;
    step(
        "tenants acme (enhanced, RPO 1 s, RTO 60 s) and globex (standard), each under a key of its own",
    );

    let documents: Vec<(String, Vec<u8>)> = debian::documents()?.into_iter().collect();
    let bytes: usize = documents.iter().map(|(k, v)| k.len() + v.len()).sum();
    let total = documents.len();
    step(&format!(
        "loading {total} documents, {} MB, from this machine's Debian package index",
        bytes >> 20
    ));
    let expected: BTreeMap<String, Vec<u8>> = documents.iter().cloned().collect();
    let mut other = region.client("globex").await?;
    other.put("owner", "globex", None).await?;
    let client = region.client("acme").await?;
    let done = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let loading = tokio::spawn({
        let done = done.clone();
        async move { load(&client, documents, done).await }
    });
    let reached = |part: usize| {
        let done = done.clone();
        async move {
            while done.load(Ordering::Relaxed) < part {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    reached(total / 3).await;
    let victim = region.leader("acme").await?;
    region.nodes[victim].kill();
    step(&format!(
        "killed zone {} (SIGKILL; it led acme) at {} documents",
        region.nodes[victim].config.zone,
        done.load(Ordering::Relaxed)
    ));
    reached(total * 2 / 3).await;
    region.start(victim)?;
    step(&format!(
        "brought zone {} back at {} documents",
        region.nodes[victim].config.zone,
        done.load(Ordering::Relaxed)
    ));
    loading.await??;
    let rate = total as f64 / started.elapsed().as_secs_f64();
    step(&format!(
        "every document is acknowledged: {rate:.0} a second over the whole load, the loss of a zone included"
    ));

    region.archived("acme").await?;
    region.archived("globex").await?;
    // The directory records the newest links every two seconds.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (ok, shown) = region.holdfast(&["tenant", "show", "acme"]).await?;
    ensure!(ok, "{shown}");
    println!("{shown}");

    step("killing every node and deleting every data directory");
    let (restored, table) = region.lose_and_restore().await?;
    println!("{table}");
    ensure!(restored, "the region is not restored");
    step("restored from the bucket; reading every document back");
    let mut client = region.client("acme").await?;
    let found = read_all(&mut client).await?;
    let missing = expected
        .iter()
        .filter(|(k, v)| found.get(*k) != Some(v))
        .count();
    ensure!(
        missing == 0 && found.len() == expected.len(),
        "{missing} of {total} documents differ, {} were found",
        found.len()
    );
    let mut other = region.client("globex").await?;
    ensure!(
        other.get("owner", None).await?.kvs()[0].value() == b"globex",
        "globex is not as it was"
    );
    step(&format!("all {total} documents are there and equal"));
    client.put("after", "the restore", None).await?;
    step("and the region takes writes again: done");
    Ok(())
}
