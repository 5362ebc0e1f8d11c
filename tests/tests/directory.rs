//! The directory's own archive: what its newest state does not need goes, and what of that is damaged is found
//! and healed, so that a region which is lost still comes back with every tenant in it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use holdfast_tests::files::{files_below, flip};
use holdfast_tests::region::Region;
use replication::archive::bucket::Bootstrap;

const COLLECT_AFTER_MS: u64 = 1_000;
const KEEP_MS: u64 = 1_000;
/// Three of the intervals in which a node tells the directory what it archived.
const QUIET: Duration = Duration::from_secs(6);

/// What of the directory is in the bucket, in order.
fn objects(region: &Region, what: &str) -> Result<Vec<PathBuf>> {
    let bootstrap = region.bucket().join(Bootstrap::path().as_ref());
    let bootstrap = Bootstrap::decode(&std::fs::read(bootstrap)?).map_err(anyhow::Error::msg)?;
    let below = format!("tenants/{}/", bootstrap.directory);
    let mut found = files_below(&region.bucket());
    found.retain(|file| {
        let path = file.to_string_lossy();
        path.contains(&below) && path.contains(what)
    });
    found.sort();
    Ok(found)
}

/// Changes what the directory holds, each time as one link, and makes a checkpoint of it.
async fn change(region: &Region, rounds: std::ops::Range<usize>) -> Result<()> {
    for round in rounds {
        let days = (20 + round).to_string();
        region
            .operate(&["tenant", "set", "acme", "--keep", &format!("{days}d")])
            .await?;
        let made = region.operate(&["archive", "checkpoint", "--directory"]);
        ensure!(made.await?.contains("is in the bucket"));
    }
    Ok(())
}

/// Waits until a directory that nobody changes makes no link of its own.
async fn is_quiet(region: &Region) -> Result<()> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let before = objects(region, "/chain/")?;
        tokio::time::sleep(QUIET).await;
        if objects(region, "/chain/")? == before {
            return Ok(());
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "the directory's chain grows while nothing is changed"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directorys_archive_is_swept_and_healed() -> Result<()> {
    let mut region = Region::new()?;
    for (name, ms) in [
        ("HOLDFAST_TEST_COLLECT_AFTER_MS", COLLECT_AFTER_MS),
        ("HOLDFAST_TEST_KEEP_DIRECTORY_MS", KEEP_MS),
    ] {
        region.environment.push((name.into(), ms.to_string()));
    }
    region.start_all()?;
    region.serving().await?;
    let started = tokio::time::Instant::now();
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    client.put("k", "v", None).await?;
    region.archived("acme").await?;
    change(&region, 0..4).await?;
    tokio::time::sleep(Duration::from_millis(3 * KEEP_MS)).await;

    let (links, manifests) = (
        objects(&region, "/chain/")?,
        objects(&region, "/checkpoints/")?,
    );
    // It may have been swept by itself by now.
    let dry = region.operate(&["archive", "sweep", "--directory", "--dry-run"]);
    let said = dry.await?;
    ensure!(
        said.contains("Would go: 2 checkpoints") || manifests.len() == 2,
        "{said}"
    );
    ensure!(
        objects(&region, "/checkpoints/")? == manifests,
        "a dry run deleted"
    );
    println!(
        "{}",
        region.operate(&["archive", "sweep", "--directory"]).await?
    );
    ensure!(objects(&region, "/checkpoints/")?.len() == 2);
    let left = objects(&region, "/chain/")?;
    ensure!(
        left.first() > links.first() && left.last() >= links.last(),
        "of {} links {} are left, the first {:?}",
        links.len(),
        left.len(),
        left.first()
    );
    let scrub = ["archive", "scrub", "--directory"];
    // The leader's own first one, ten seconds after its start, is over then.
    tokio::time::sleep_until(started + Duration::from_secs(15)).await;
    let said = region.operate(&scrub).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");

    // Every file of its checkpoints.
    let files = objects(&region, "/files/")?;
    flip(&files)?;
    let found = region.operate(&scrub).await?;
    println!("{found}");
    ensure!(
        files.iter().any(|file| file
            .file_name()
            .is_some_and(|name| found.contains(&*name.to_string_lossy()))),
        "{found}"
    );
    ensure!(found.contains("A new checkpoint was made"), "{found}");
    let said = region.operate(&scrub).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");
    let events = region.operate(&["events"]).await?;
    ensure!(
        events.contains("archive-damaged") && events.contains("archive-healed"),
        "{events}"
    );

    let (ok, said) = region
        .holdfast(&["archive", "scrub", "acme", "--directory"])
        .await?;
    ensure!(!ok && said.contains("cannot be used with"), "{said}");

    // With what is left the region comes back, as it was changed last.
    change(&region, 4..5).await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let drawn = region.operate(&["archive", "ls", "acme"]).await?;
    ensure!(drawn.contains("kept: every moment of 576 h"), "{drawn}");
    ensure!(region.rows("acme").await?["k"] == "v");

    // And a second time, with what is left of both incarnations of it.
    change(&region, 5..8).await?;
    tokio::time::sleep(Duration::from_millis(3 * KEEP_MS)).await;
    println!(
        "{}",
        region.operate(&["archive", "sweep", "--directory"]).await?
    );
    let first = objects(&region, "/0000000001/chain/")?;
    ensure!(first.len() == 1, "of the first incarnation: {first:?}");
    let said = region.operate(&scrub).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    ensure!(region.rows("acme").await?["k"] == "v");
    is_quiet(&region).await
}
