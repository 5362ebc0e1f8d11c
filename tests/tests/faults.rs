//! The fault catalogue with real processes: kills, zone and majority loss, pauses, failing fsync,
//! a canary for plaintext, and histories checked for linearizability.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::files::files_below;
use holdfast_tests::history::Clients;
use holdfast_tests::region::Region;
use rand::Rng;

/// Rows 1, 2, 3 and 7: leaders and followers are killed and paused under concurrent clients.
#[tokio::test(flavor = "multi_thread")]
async fn histories_are_linearizable_through_kills_and_pauses() -> Result<()> {
    let mut region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let clients = Clients::start(&region, "acme").await?;
    for round in 0..4 {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let leader = region.leader("acme").await?;
        let victim = if round == 2 { (leader + 1) % 3 } else { leader };
        if round == 1 {
            // Past the election time-out, then on as if nothing had been.
            region.nodes[victim].pause();
            tokio::time::sleep(Duration::from_secs(4)).await;
            region.nodes[victim].resume();
        } else {
            region.nodes[victim].kill();
            tokio::time::sleep(Duration::from_secs(3)).await;
            region.start(victim)?;
        }
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let calls = clients.check().await?;
    ensure!(calls > 300, "only {calls} calls were made");
    println!("{calls} calls are linearizable");
    Ok(())
}

/// Row 3: a zone is lost; the majority serves, and health says which zone is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_zone_is_served_around_and_said() -> Result<()> {
    let mut region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let lost = region.leader("acme").await?;
    let other = (lost + 1) % 3;
    ensure!(region.status(other).await?.unreachable.is_empty());
    let zone = format!("(zone {})", region.nodes[lost].config.zone);
    region.nodes[lost].kill();
    let mut client = region.client_at("acme", &[other]).await?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while client.put("k", "without the zone", None).await.is_err() {
        ensure!(Instant::now() < deadline, "the majority does not serve");
    }
    let away = region.status(other).await?.unreachable;
    ensure!(away.len() == 1 && away[0].contains(&zone), "{away:?}");
    region.start(lost)?;
    region.serving().await?;
    while !region.status(other).await?.unreachable.is_empty() {
        ensure!(
            Instant::now() < deadline + Duration::from_secs(20),
            "still degraded"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    region.same_everywhere("acme").await
}

/// Row 4: without a majority writes and linearizable reads are refused; with it they go on.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_nothing_is_acknowledged() -> Result<()> {
    let mut region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let mut client = region.client_at("acme", &[0]).await?;
    client.put("k", "1", None).await?;
    region.nodes[1].kill();
    region.nodes[2].kill();
    ensure!(
        client.put("k", "2", None).await.is_err(),
        "a write was acknowledged without a majority"
    );
    ensure!(
        client.get("k", None).await.is_err(),
        "a linearizable read was answered without a majority"
    );
    let serializable = etcd_client::GetOptions::new().with_serializable();
    ensure!(client.get("k", Some(serializable)).await?.kvs().len() == 1);
    region.start(1)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while client.put("k", "3", None).await.is_err() {
        ensure!(
            Instant::now() < deadline,
            "writes do not go on with a majority"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Row 12 in part, by SIGKILL: every node at once; what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn all_nodes_killed_at_once_lose_nothing() -> Result<()> {
    let mut region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let client = region.client("acme").await?;
    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = tokio::spawn({
        let (mut client, acknowledged) = (client.clone(), acknowledged.clone());
        async move {
            for n in 0..u64::MAX {
                if client
                    .put(format!("n/{n:06}"), n.to_string(), None)
                    .await
                    .is_err()
                {
                    return;
                }
                acknowledged.store(n + 1, Ordering::SeqCst);
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    region.kill_all();
    writer.await?;
    let count = acknowledged.load(Ordering::SeqCst);
    ensure!(count > 50, "only {count} writes");
    region.start_all()?;
    region.serving().await?;
    let mut client = region.client("acme").await?;
    let options = etcd_client::GetOptions::new()
        .with_prefix()
        .with_count_only();
    let found = client.get("n/", Some(options)).await?.count();
    ensure!(
        found >= count as i64,
        "{count} writes were acknowledged, {found} are there"
    );
    Ok(())
}

/// Row 11: fsync fails under an unchanged daemon, which stops and acknowledges nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_fsync_stops_the_process() -> Result<()> {
    let mut region = Region::started().await?;
    region.create_tenant("acme", "standard", 0, 0).await?;
    let victim = (region.leader("acme").await? + 1) % 3;
    region.nodes[victim].kill();
    let wrapper = [
        "fiu-run",
        "-x",
        "-c",
        "enable_random name=posix/io/sync/*,probability=0.02",
    ];
    region.nodes[victim].wrapper = wrapper.map(String::from).to_vec();
    region.start(victim)?;
    region.nodes[victim].wrapper.clear();
    let mut client = region.client_at("acme", &[(victim + 1) % 3]).await?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut n = 0;
    let status = loop {
        client.put("k", n.to_string(), None).await?;
        n += 1;
        if let Some(status) = region.nodes[victim].ended() {
            break status;
        }
        ensure!(
            Instant::now() < deadline,
            "the daemon goes on although fsync fails"
        );
    };
    ensure!(!status.success(), "it ended with {status}");
    // It comes back with a sound disk, and nothing is lost.
    region.nodes[victim].kill();
    region.start(victim)?;
    region.serving().await?;
    let found = client.get("k", None).await?;
    ensure!(found.kvs()[0].value() == (n - 1).to_string().as_bytes());
    Ok(())
}

const CANARY: &[u8] = b"zanzibar-canary-9731";

/// Files in which the canary stands.
fn sightings(region: &Region) -> Vec<String> {
    let seen = |path: &std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(CANARY.len()).any(|w| w == CANARY)
    };
    let files = files_below(region.dir.path());
    files
        .iter()
        .filter(|f| seen(f))
        .map(|f| f.display().to_string())
        .collect()
}

/// The canary as key and as value: in no file of a node, no object and no log line. With a null
/// cipher in the engine it is found, so that the test can fail.
#[tokio::test(flavor = "multi_thread")]
async fn the_canary_is_nowhere_in_clear() -> Result<()> {
    for null_cipher in [false, true] {
        let mut region = Region::new()?;
        if null_cipher {
            region
                .environment
                .push(("HOLDFAST_TEST_NULL_CIPHER".into(), "1".into()));
        }
        region.start_all()?;
        region.serving().await?;
        let canary = std::str::from_utf8(CANARY)?;
        region
            .create_tenant("acme", "enhanced", 200, 60_000)
            .await?;
        // A second tenant, whose user is called as the canary.
        region.create_tenant_of("globex", 200, canary).await?;
        let mut client = region.client("acme").await?;
        // More than a checkpoint's worth, incompressible, so that memtables are flushed.
        let mut filler = vec![0u8; 1 << 20];
        for n in 0..80 {
            rand::rng().fill(&mut filler[..]);
            client
                .put(format!("filler/{n}"), filler.clone(), None)
                .await?;
            client
                .put(format!("{canary}/{n}"), format!("{canary} {n}"), None)
                .await?;
        }
        for tenant in ["acme", "globex"] {
            region.archived(tenant).await?;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        region.kill_all();
        let seen = sightings(&region);
        match null_cipher {
            false => ensure!(seen.is_empty(), "the canary stands in {seen:?}"),
            true => ensure!(
                !seen.is_empty(),
                "the control found nothing: the test could not fail"
            ),
        }
    }
    Ok(())
}
