//! Catching up by snapshot: behind a purged log, and through crashes in the middle of an install.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::Client;
use holdfast_tests::files::files_below;
use holdfast_tests::region::Region;

/// Writes more than two checkpoints' worth, so that the log behind them is purged.
async fn load(client: &mut Client, round: usize) -> Result<()> {
    let mut value = vec![0u8; 1 << 20];
    for n in 0..160u32 {
        rand::Rng::fill(&mut rand::rng(), &mut value[..]);
        client
            .put(format!("load/{round}/{n}"), value.clone(), None)
            .await?;
    }
    Ok(())
}

async fn started() -> Result<Region> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 500, 60_000)
        .await?;
    Ok(region)
}

fn snapshot_was_installed(region: &Region, n: usize) -> bool {
    region.log(n).contains("installing a snapshot")
}

/// Row 17: a follower that stands still while the log is purged converges.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_follower_converges_after_the_log_was_purged() -> Result<()> {
    let region = started().await?;
    let leader = region.leader("acme").await?;
    let slow = (leader + 1) % 3;
    let mut client = region.client_at("acme", &[leader]).await?;
    client.put("before", "1", None).await?;
    region.nodes[slow].pause();
    load(&mut client, 0).await?;
    region.archived("acme").await?;
    // Its connections are given up, then checkpoint and purge follow within seconds.
    tokio::time::sleep(Duration::from_secs(8)).await;
    region.nodes[slow].resume();
    region.same_everywhere("acme").await?;
    ensure!(
        snapshot_was_installed(&region, slow),
        "the log was not purged: no snapshot was needed"
    );
    Ok(())
}

/// Whether a replica of node `dir` has something whose name begins so.
fn has(dir: &Path, id: &str, name: &str) -> bool {
    let replica = format!("{id}-1/{name}");
    files_below(dir)
        .iter()
        .any(|file| file.to_string_lossy().contains(&replica))
}

/// Row 15: killed while a snapshot arrives, while it is installed, and right after; then the whole
/// region restarts behind a purged log.
#[tokio::test(flavor = "multi_thread")]
async fn crashes_in_a_snapshot_install_leave_a_consistent_replica() -> Result<()> {
    let mut region = started().await?;
    let leader = region.leader("acme").await?;
    let victim = (leader + 1) % 3;
    let id = region.tenant(leader, "acme").await?.id;
    let mut client = region.client_at("acme", &[leader]).await?;
    region.nodes[victim].kill();
    load(&mut client, 0).await?;
    region.archived("acme").await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    for moment in ["incoming-", "engine-2", "ENGINE"] {
        region.start(victim)?;
        let dir = region.nodes[victim].config.data_dir.clone();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !has(&dir, &id, moment) {
            ensure!(Instant::now() < deadline, "no install came to {moment}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        region.nodes[victim].kill();
    }
    region.start(victim)?;
    region.serving().await?;
    region.same_everywhere("acme").await?;
    load(&mut client, 1).await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    region.kill_all();
    region.start_all()?;
    region.serving().await?;
    region.same_everywhere("acme").await?;
    let options = etcd_client::GetOptions::new()
        .with_prefix()
        .with_count_only();
    let mut client = region.client("acme").await?;
    let count = client.get("load/", Some(options)).await?.count();
    ensure!(count == 320, "{count} of 320 keys are there");
    Ok(())
}
