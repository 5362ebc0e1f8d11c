//! Restore after total loss, from real object stores, and what is refused.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::Client;
use holdfast_tests::region::{Region, files_below};
use holdfast_tests::servers;
use kms::local::KeyState;
use replication::archive::bucket::BucketConfig;

async fn fill(client: &mut Client, count: usize) -> Result<()> {
    for n in 0..count {
        client
            .put(format!("key/{n:04}"), format!("value {n}"), None)
            .await?;
    }
    Ok(())
}

async fn check(client: &mut Client, count: usize) -> Result<()> {
    for n in 0..count {
        let found = client.get(format!("key/{n:04}"), None).await?;
        let value = found.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(
            value == Some(format!("value {n}").into_bytes()),
            "key/{n:04} is {value:?}"
        );
    }
    Ok(())
}

/// Writes until one succeeds: after a restore a majority has to join first.
async fn write(client: &mut Client, key: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(e) = client.put(key, "written", None).await {
        ensure!(Instant::now() < deadline, "{key}: {e}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// The links of tenant `id`'s first incarnation, in order.
fn links(region: &Region, id: &str) -> Vec<PathBuf> {
    let wanted = format!("/{id}/{:010}/chain/", 1);
    let mut found = files_below(&region.bucket());
    found.retain(|file| file.to_string_lossy().contains(&wanted));
    found.sort();
    found
}

/// A region with acme, archived, whose directory knows of its newest link.
async fn filled() -> Result<Region> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 100, 60_000)
        .await?;
    region.create_tenant("globex", "standard", 0, 0).await?;
    let mut other = region.client("globex").await?;
    fill(&mut other, 3).await?;
    let mut client = region.client("acme").await?;
    // Each wave ends in a link of its own.
    for _ in 0..6 {
        fill(&mut client, 100).await?;
        region.archived("acme").await?;
    }
    for tenant in ["acme", "globex"] {
        region.archived(tenant).await?;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(region)
}

#[tokio::test(flavor = "multi_thread")]
async fn restores_twice_and_goes_on() -> Result<()> {
    let mut region = filled().await?;
    for round in 1..=2 {
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(ok, "round {round}: {table}");
        let mut client = region.client("acme").await?;
        check(&mut client, 100).await?;
        // A majority joins, and writes go on, at a revision a thousand million higher.
        write(&mut client, &format!("round/{round}")).await?;
        let revision = client
            .get("round/1", None)
            .await?
            .header()
            .unwrap()
            .revision();
        ensure!(
            revision > i64::from(round) * 1_000_000_000,
            "revision {revision}"
        );
        region.archived("acme").await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let mut client = region.client("acme").await?;
    for round in 1..=2 {
        let found = client.get(format!("round/{round}"), None).await?;
        ensure!(found.kvs().len() == 1, "round/{round} is lost");
    }
    Ok(())
}

/// Rows 21 and 22: an object that is missing, cut or flipped is refused by name, and the other
/// tenant is restored all the same.
#[tokio::test(flavor = "multi_thread")]
async fn damage_is_refused_by_name_and_others_are_restored() -> Result<()> {
    for damage in ["missing", "flipped", "cut", "older"] {
        let mut region = filled().await?;
        let id = region.tenant(0, "acme").await?.id;
        region.kill_all();
        let chain = links(&region, &id);
        ensure!(chain.len() > 5, "only {} links", chain.len());
        let victim = match damage {
            "older" => chain.last(),
            _ => chain.get(chain.len() / 2),
        };
        let victim = victim.unwrap().clone();
        let mut bytes = std::fs::read(&victim)?;
        match damage {
            "missing" | "older" => std::fs::remove_file(&victim)?,
            "flipped" => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&victim, bytes)?;
            }
            _ => std::fs::write(&victim, &bytes[..bytes.len() / 2])?,
        }
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(
            !ok && table.contains("acme is NOT restored"),
            "{damage}: {table}"
        );
        let name = victim.file_name().unwrap().to_string_lossy().into_owned();
        let named =
            table.contains(&name) || (damage == "older" && table.contains("the bucket is older"));
        ensure!(named, "{damage}: {name} is not named: {table}");
        let mut other = region.client("globex").await?;
        check(&mut other, 3).await?;
    }
    Ok(())
}

/// Rows 26 and 30 at restore: a key that is disabled, and another tenant's wrapped key.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_key_is_away_or_swapped_is_refused() -> Result<()> {
    let mut region = filled().await?;
    region.keyfile().set_state("acme", KeyState::Disabled)?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(!ok && table.contains("local:acme: disabled"), "{table}");
    check(&mut region.client("globex").await?, 3).await?;

    let mut region = filled().await?;
    region.kill_all();
    let wrapped: Vec<PathBuf> = files_below(&region.bucket())
        .into_iter()
        .filter(|f| f.to_string_lossy().contains("/keys/"))
        .collect();
    let of = |key: &str| {
        wrapped
            .iter()
            .find(|f| std::fs::read_to_string(f).unwrap().contains(key))
            .unwrap()
    };
    let (acme, globex) = (of("local:acme"), of("local:globex"));
    std::fs::copy(globex, acme)?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(
        !ok && table.contains("acme is NOT restored") && table.contains("is tenant"),
        "{table}"
    );
    check(&mut region.client("globex").await?, 3).await
}

/// An old region that still runs while its restore begins: it stops, and acknowledges nothing that
/// is not in the new one.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_region_that_still_runs_is_fenced() -> Result<()> {
    let mut region = filled().await?;
    let mut old = region.client("acme").await?;
    // A second set of nodes, on fresh disks, with the same bucket and keys.
    let bucket = BucketConfig {
        url: format!("file://{}", region.bucket().display()),
        cloud_region: None,
        endpoint: None,
    };
    let mut new = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    std::fs::copy(region.keyfile().path(), new.keyfile().path())?;
    new.start_all()?;
    new.all_in("awaiting restore").await?;
    let (ok, table) = new.holdfast(&["restore", "region"]).await?;
    ensure!(ok, "{table}");
    new.serving().await?;
    // The old leader meets the closed chain when it looks or writes next.
    let deadline = Instant::now() + Duration::from_secs(30);
    while old.put("too", "late", None).await.is_ok() {
        ensure!(
            Instant::now() < deadline,
            "the old region still takes writes"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut client = new.client("acme").await?;
    check(&mut client, 100).await?;
    write(&mut client, "new").await?;
    region.kill_all();
    Ok(())
}

/// The whole path on MinIO, and on SeaweedFS.
#[tokio::test(flavor = "multi_thread")]
async fn restores_from_real_object_stores() -> Result<()> {
    for server in [servers::minio().await?, servers::seaweedfs().await?] {
        servers::make_bucket(&server.endpoint, "holdfast").await?;
        let bucket = BucketConfig {
            url: "s3://holdfast/eu".into(),
            cloud_region: Some(servers::CLOUD_REGION.into()),
            endpoint: Some(server.endpoint.clone()),
        };
        let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
        region.environment = servers::credentials();
        region.start_all()?;
        region.serving().await?;
        region
            .create_tenant("acme", "enhanced", 500, 60_000)
            .await?;
        fill(&mut region.client("acme").await?, 200).await?;
        region.archived("acme").await?;
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(ok, "{table}");
        check(&mut region.client("acme").await?, 200).await?;
    }
    Ok(())
}

/// Row 18: while the bucket is away service goes on and the ledger grows; it catches up by itself.
#[tokio::test(flavor = "multi_thread")]
async fn service_goes_on_without_the_bucket() -> Result<()> {
    let minio = servers::minio().await?;
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let bucket = BucketConfig {
        url: "s3://holdfast".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(minio.endpoint.clone()),
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 500, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    fill(&mut client, 20).await?;
    region.archived("acme").await?;
    minio.pause();
    fill(&mut client, 50).await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let leader = region.leader("acme").await?;
    let shown = region.tenant(leader, "acme").await?;
    ensure!(
        shown.actual_rpo_ms > 2_000 && shown.archived < shown.applied,
        "the ledger says {} ms",
        shown.actual_rpo_ms
    );
    minio.resume();
    region.archived("acme").await?;
    check(&mut client, 50).await
}

/// Row 31: a bucket in another jurisdiction is refused before anything is written.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_of_another_jurisdiction_is_refused() -> Result<()> {
    let region = Region::new()?;
    let mut config = region.nodes[0].config.clone();
    config.bucket = BucketConfig {
        url: "s3://holdfast".into(),
        cloud_region: Some("us-east-1".into()),
        endpoint: None,
    };
    let problems = config.problems().join("\n");
    ensure!(
        problems.contains("us-east-1") && problems.contains("jurisdiction eu"),
        "{problems}"
    );
    Ok(())
}
