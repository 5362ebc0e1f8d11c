//! Restore after total loss, from real object stores, and what is refused.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use etcd_client::{Client, ConnectOptions};
use holdfast_tests::files::files_below;
use holdfast_tests::kms::calls;
use holdfast_tests::region::{PASSWORD, Region};
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

/// A KMS answers so many calls a second: a tenant that is restored takes one, which proves its key. One that
/// was deleted and can be brought back yet is restored, and not served.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_tenant_takes_one_call_to_its_kms() -> Result<()> {
    const TENANTS: u64 = 8;
    let mut region = Region::started().await?;
    for n in 0..TENANTS {
        let name = format!("t{n}");
        region
            .create_tenant_with(&name, "standard", 100, 60_000, "local:acme", "app")
            .await?;
        let mut client = region.client(&name).await?;
        fill(&mut client, 3).await?;
        region.archived(&name).await?;
    }
    region.operate(&["tenant", "delete", "t0"]).await?;
    region.kill_all();
    region.lose_disks()?;
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let (ok, table) = region.holdfast(&["restore", "region"]).await?;
    let calls = calls(&region, 0).await?;
    ensure!(ok, "{table}");
    println!("{calls} calls for {TENANTS} tenants and the directory");
    ensure!((TENANTS + 1..TENANTS + 4).contains(&calls), "{calls} calls");
    for n in 1..TENANTS {
        let mut client = region.client_at(&format!("t{n}"), &[0]).await?;
        check(&mut client, 3).await?;
    }
    let restored = Instant::now();
    let mut told = String::new();
    while restored.elapsed() < Duration::from_secs(3) {
        let address = region.client_address(0).to_string();
        let user = ConnectOptions::new().with_user("app@t0", PASSWORD);
        let read = async {
            let mut client = Client::connect([address], Some(user)).await?;
            client.get("key/0001", None).await
        };
        match read.await {
            Ok(_) => bail!("a deleted tenant is served"),
            Err(e) => told = e.to_string(),
        }
    }
    ensure!(told.contains("it is deleted"), "{told}");
    Ok(())
}

/// Rows 21, 22 and 38: an object that is missing, cut, flipped or of a newer format is refused by
/// name, and the other tenant is restored all the same; the refused one once the object is back.
#[tokio::test(flavor = "multi_thread")]
async fn damage_is_refused_by_name_and_others_are_restored() -> Result<()> {
    for damage in ["missing", "flipped", "cut", "older", "newer"] {
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
        let good = std::fs::read(&victim)?;
        let mut bytes = good.clone();
        match damage {
            "missing" | "older" => std::fs::remove_file(&victim)?,
            "newer" => {
                bytes[4] = 2;
                std::fs::write(&victim, bytes)?;
            }
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
        ensure!(
            damage != "newer" || table.contains("format 2"),
            "the format is not named: {table}"
        );
        let mut other = region.client("globex").await?;
        check(&mut other, 3).await?;
        // The object is found again: what was refused is restored, and nothing else.
        std::fs::write(&victim, good)?;
        let (ok, table) = region.holdfast(&["restore", "region"]).await?;
        ensure!(ok && table.contains("acme"), "{damage}, again: {table}");
        ensure!(!table.contains("globex"), "{damage}, again: {table}");
        let mut client = region.client("acme").await?;
        check(&mut client, 100).await?;
        write(&mut client, "again").await?;
        check(&mut other, 3).await?;
    }
    Ok(())
}

/// Row 21 for a checkpoint: one with a file that is missing or damaged is passed over by itself, for an
/// older one and a longer log, and for the whole log where there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_passed_over_for_an_older_one() -> Result<()> {
    for (damage, checkpoints) in [("missing", 2), ("flipped", 1)] {
        let mut region = filled().await?;
        let id = region.tenant(0, "acme").await?.id;
        let files = || {
            let mut found = files_below(&region.bucket());
            found.retain(|file| file.to_string_lossy().contains(&format!("/{id}/files/")));
            found
        };
        let mut before = Vec::new();
        for round in 0..checkpoints {
            before = files();
            let mut client = region.client("acme").await?;
            client
                .put(format!("round/{round}"), "written", None)
                .await?;
            region.archived("acme").await?;
            region.operate(&["archive", "checkpoint", "acme"]).await?;
        }
        let newest = files().into_iter().filter(|file| !before.contains(file));
        let victim = newest.max_by_key(|file| file.metadata().map_or(0, |m| m.len()));
        let victim = victim.expect("the newest checkpoint has files of its own");
        let name = victim.file_name().unwrap().to_string_lossy().into_owned();
        match damage {
            "missing" => std::fs::remove_file(&victim)?,
            _ => {
                let mut bytes = std::fs::read(&victim)?;
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&victim, bytes)?;
            }
        }
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(ok, "{damage}: {table}");
        let log = region.log(0);
        let passed_over = log.contains("a checkpoint cannot be used") && log.contains(&name);
        ensure!(passed_over, "{damage}: the newest checkpoint was used");
        let mut client = region.client("acme").await?;
        check(&mut client, 100).await?;
        for round in 0..checkpoints {
            let found = client.get(format!("round/{round}"), None).await?;
            ensure!(found.kvs().len() == 1, "{damage}: round/{round} is lost");
        }
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
        object_lock: None,
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
    // A restart changes nothing: no node of the old region serves again.
    region.kill_all();
    region.start_all()?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    for n in 0..3 {
        let taken = old_write(&region, n).await;
        ensure!(!taken, "node {n} of the old region takes writes again");
    }
    check(&mut client, 100).await
}

async fn old_write(region: &Region, n: usize) -> bool {
    let within = Duration::from_secs(3);
    let attempt = async {
        let mut client = region.client_at("acme", &[n]).await?;
        client.put("too", "late", None).await?;
        Ok::<_, anyhow::Error>(())
    };
    matches!(tokio::time::timeout(within, attempt).await, Ok(Ok(())))
}

/// A restore whose node is killed on the way is resumed by the same command; and if its disks are
/// lost as well, by a restore onto fresh ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_dies_is_resumed() -> Result<()> {
    let mut region = filled().await?;
    for wait_ms in [0, 60, 200] {
        region.kill_all();
        region.lose_disks()?;
        region.start_all()?;
        region.all_in("awaiting restore").await?;
        let begun = region.nodes[0].config.data_dir.join("region.json");
        let dies = async {
            while !begun.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        };
        // What the command says of a node that dies is no matter.
        tokio::select! {
            () = dies => {}
            _ = region.holdfast(&["restore", "region"]) => {}
        }
        region.nodes[0].kill();
        if wait_ms == 60 {
            continue;
        }
        region.start(0)?;
        region.serving().await?;
        let (ok, table) = region.holdfast(&["restore", "region"]).await?;
        ensure!(ok, "{wait_ms} ms: {table}");
        let mut client = region.client("acme").await?;
        check(&mut client, 100).await?;
        write(&mut client, "resumed").await?;
        check(&mut region.client("globex").await?, 3).await?;
        for tenant in ["acme", "globex"] {
            region.archived(tenant).await?;
        }
    }
    Ok(())
}

/// Row 32: a region is lost; tenants of the enhanced tier come first, and what was contracted and
/// what was reached stand side by side. Nodes of another jurisdiction are refused (row 31).
#[tokio::test(flavor = "multi_thread")]
async fn the_enhanced_tier_comes_first_and_figures_are_recorded() -> Result<()> {
    let mut region = Region::started().await?;
    let (keyfile, mut ids) = (region.keyfile(), Vec::new());
    for (name, tier) in [
        ("s1", "standard"),
        ("e1", "enhanced"),
        ("s2", "standard"),
        ("e2", "enhanced"),
    ] {
        keyfile.add(name)?;
        region.create_tenant(name, tier, 200, 60_000).await?;
        fill(&mut region.client(name).await?, 10).await?;
        region.archived(name).await?;
        ids.push(region.tenant(0, name).await?.id);
    }
    region.kill_all();
    region.lose_disks()?;
    let bucket = BucketConfig {
        url: format!("file://{}", region.bucket().display()),
        cloud_region: None,
        endpoint: None,
        object_lock: None,
    };
    let mut foreign = Region::in_jurisdiction(kms::Region::Us, tempfile::tempdir()?, bucket)?;
    foreign.start_all()?;
    foreign.all_in("awaiting restore").await?;
    let (ok, said) = foreign.holdfast(&["restore", "region"]).await?;
    ensure!(
        !ok && said.contains("region eu") && said.contains("region us"),
        "{said}"
    );
    foreign.kill_all();

    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let (ok, table) = region.holdfast(&["restore", "region"]).await?;
    ensure!(ok, "{table}");
    let row = |name: &str| {
        table
            .lines()
            .position(|l| l.split_whitespace().next() == Some(name))
    };
    let rows = ["e1", "e2", "s1", "s2"].map(row);
    ensure!(rows.is_sorted() && rows[0].is_some(), "{table}");
    let log = region.log(0);
    // As created: standard, enhanced, standard, enhanced.
    let begun: Vec<_> = ids
        .iter()
        .map(|id| log.find(&format!("restoring tenant={id}")))
        .collect();
    ensure!(begun.iter().all(Option::is_some), "{begun:?}");
    ensure!(begun[1].max(begun[3]) < begun[0].min(begun[2]), "{begun:?}");
    ensure!(
        table.contains("ACTUAL RPO") && table.contains("ACTUAL RTO"),
        "{table}"
    );
    region.serving().await?;
    for name in ["e1", "s2"] {
        check(&mut region.client(name).await?, 10).await?;
    }
    Ok(())
}

/// Row 38 at start: a data directory and a bucket of a newer version are refused, and say so.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_version_wrote_is_refused() -> Result<()> {
    let mut region = Region::started().await?;
    region.kill_all();
    let file = region.nodes[0].config.data_dir.join("region.json");
    let newer = |text: String| {
        text.replace("\"version\":1", "\"version\":2")
            .replace("\"version\": 1", "\"version\": 2")
    };
    let text = newer(std::fs::read_to_string(&file)?);
    ensure!(text.contains('2'), "{text}");
    std::fs::write(&file, text)?;
    region.start(0)?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(region.state(0).await? == "starting");
    ensure!(
        region.log(0).contains("version 2 is not known"),
        "{}",
        region.log(0)
    );
    region.kill_all();
    region.lose_disks()?;
    let object = region.bucket().join("bootstrap.json");
    std::fs::write(&object, newer(std::fs::read_to_string(&object)?))?;
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let (ok, said) = region.holdfast(&["restore", "region"]).await?;
    ensure!(
        !ok && said.contains("bootstrap.json") && said.contains("version 2"),
        "{said}"
    );
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
            object_lock: None,
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
        object_lock: None,
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
