//! Partitions between real network namespaces: an isolated leader, one-way cuts, a bridge.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::history::Clients;
use holdfast_tests::netns::Network;
use holdfast_tests::region::Region;
use parking_lot::Mutex;

async fn started(network: &Network) -> Result<Region> {
    let mut region = Region::new()?;
    region.move_into(network)?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    Ok(region)
}

/// The node that `of` takes for the leader, which must not be `old`.
async fn new_leader(region: &Region, of: usize, old: usize) -> Result<usize> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let leader = region.tenant(of, "acme").await?.leader;
        let found = region.nodes.iter().position(|n| n.config.name == leader);
        if let Some(found) = found.filter(|n| *n != old) {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "no other leader than {leader}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Row 5: an isolated leader acknowledges nothing and answers no linearizable read, although it
/// still reaches its clients and the bucket; the majority goes on; what the bucket holds in the end
/// is what was acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_leader_steps_down_and_its_archiver_stays_behind() -> Result<()> {
    let network = Network::new(3)?;
    let mut region = started(&network).await?;
    let old = region.leader("acme").await?;
    let (b, c) = ((old + 1) % 3, (old + 2) % 3);
    let mut at_old = region.client_at("acme", &[old]).await?;
    let mut at_b = region.client_at("acme", &[b]).await?;
    for n in 0..50 {
        at_old.put(format!("before/{n}"), "1", None).await?;
    }
    network.cut_both(old, b)?;
    network.cut_both(old, c)?;
    let isolated = tokio::spawn(async move {
        let put = at_old.put("k", "isolated", None).await;
        let get = at_old.get("before/1", None).await;
        (put.is_ok(), get.is_ok())
    });
    new_leader(&region, b, old).await?;
    for n in 0..50 {
        at_b.put(format!("after/{n}"), "2", None).await?;
    }
    let (put, get) = isolated.await?;
    ensure!(!put, "an isolated leader acknowledged a write");
    ensure!(!get, "an isolated leader answered a linearizable read");
    ensure!(
        region.tenant(old, "acme").await?.leader.is_empty(),
        "the isolated leader still says that it leads"
    );
    network.heal()?;
    let mut at_old = region.client_at("acme", &[old]).await?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while at_old.put("healed", "3", None).await.is_err() {
        ensure!(Instant::now() < deadline, "the old leader does not join");
    }
    region.same_everywhere("acme").await?;
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let mut client = region.client("acme").await?;
    for (prefix, value) in [("before", "1"), ("after", "2")] {
        for n in 0..50 {
            let found = client.get(format!("{prefix}/{n}"), None).await?;
            let found = found.kvs().first().map(|kv| kv.value().to_vec());
            ensure!(
                found.as_deref() == Some(value.as_bytes()),
                "{prefix}/{n}: {found:?}"
            );
        }
    }
    Ok(())
}

/// Who led in each term, as the nodes say; two in one term are an error.
async fn watch_terms(
    clients: Vec<etcd_client::Client>,
    stop: Arc<AtomicBool>,
    leaders: Arc<Mutex<HashMap<u64, u64>>>,
) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        for client in &clients {
            let mut client = client.maintenance_client();
            let status = tokio::time::timeout(Duration::from_secs(1), client.status()).await;
            let Ok(Ok(status)) = status else { continue };
            if status.leader() != 0 {
                let mut leaders = leaders.lock();
                let known = *leaders.entry(status.raft_term()).or_insert(status.leader());
                ensure!(
                    known == status.leader(),
                    "term {} has two leaders",
                    status.raft_term()
                );
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Row 6: one-way cuts and a bridge, under concurrent clients at every node: one leader a term, and
/// histories that are linearizable.
#[tokio::test(flavor = "multi_thread")]
async fn one_leader_a_term_and_linearizable_histories() -> Result<()> {
    let network = Network::new(3)?;
    let region = started(&network).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let leaders = Arc::new(Mutex::new(HashMap::new()));
    let mut watched = Vec::new();
    for n in 0..3 {
        watched.push(region.client_at("acme", &[n]).await?);
    }
    let terms = tokio::spawn(watch_terms(watched, stop.clone(), leaders.clone()));
    let clients = Clients::start(&region, "acme").await?;
    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let leader = region.leader("acme").await?;
        let (b, c) = ((leader + 1) % 3, (leader + 2) % 3);
        match round {
            // The leader is not heard by one follower.
            0 => network.cut(leader, b)?,
            // The leader is heard, and hears nobody.
            1 => {
                network.cut(b, leader)?;
                network.cut(c, leader)?;
            }
            // The leader hears, and is not heard.
            2 => {
                network.cut(leader, b)?;
                network.cut(leader, c)?;
            }
            // A bridge: leader and one follower do not reach each other, the third reaches both.
            3 => network.cut_both(leader, b)?,
            // All apart.
            _ => {
                network.cut_both(leader, b)?;
                network.cut_both(leader, c)?;
                network.cut_both(b, c)?;
            }
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        network.heal()?;
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let calls = clients.check().await?;
    stop.store(true, Ordering::Relaxed);
    terms.await??;
    let terms = leaders.lock().len();
    ensure!(calls > 300, "only {calls} calls were made");
    ensure!(terms > 1, "the partitions changed no leader");
    println!("{calls} calls are linearizable; {terms} terms had one leader each");
    region.same_everywhere("acme").await
}
