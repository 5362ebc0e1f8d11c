//! The daemon killed at a named moment of what an operator asks for.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::region::Region;

/// How long the asking, and then whoever comes to the moment, may take.
const ASKED_WITHIN: Duration = Duration::from_secs(8);
const DIES_WITHIN: Duration = Duration::from_secs(30);

/// As `killed_at`, then starts the region again.
pub async fn interrupted(region: &mut Region, moment: &str, asked: &[&str]) -> Result<usize> {
    let died = killed_at(region, moment, asked).await?;
    region.start_all()?;
    region.serving().await?;
    Ok(died)
}

/// Asks `holdfast` for something during which every node that comes to `moment` is killed, then
/// kills the others; answers how many came to it.
pub async fn killed_at(region: &mut Region, moment: &str, asked: &[&str]) -> Result<usize> {
    region.kill_all();
    region
        .environment
        .push(("HOLDFAST_TEST_KILL_AT".into(), moment.into()));
    region.start_all()?;
    region.serving().await?;
    region.leader("acme").await?;
    let asking = region.holdfast(asked);
    let _ = tokio::time::timeout(ASKED_WITHIN, asking).await;
    let deadline = Instant::now() + DIES_WITHIN;
    let died = loop {
        let died = region.nodes.iter_mut().filter_map(|n| n.ended()).count();
        if died > 0 {
            break died;
        }
        ensure!(Instant::now() < deadline, "nobody was killed at {moment}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    region.kill_all();
    region.environment.pop();
    Ok(died)
}
