//! The bucket as it fails: away, refusing, losing answers; an old leader's late upload.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::Client;
use holdfast_tests::files::files_below;
use holdfast_tests::proxy::{Mode, Proxy};
use holdfast_tests::region::Region;
use holdfast_tests::servers::{self, Server};
use rand::Rng;
use replication::archive::bucket::BucketConfig;

/// A region with MinIO behind a proxy.
async fn behind_a_proxy(rpo_ms: u64) -> Result<(Server, Proxy, Region)> {
    let minio = servers::minio().await?;
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let proxy = Proxy::start(&minio.endpoint).await?;
    let bucket = BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(proxy.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", rpo_ms, 60_000)
        .await?;
    Ok((minio, proxy, region))
}

async fn fill(client: &mut Client, from: usize, to: usize) -> Result<()> {
    for n in from..to {
        client.put(format!("key/{n}"), n.to_string(), None).await?;
    }
    Ok(())
}

async fn restores_all(mut region: Region, count: usize) -> Result<()> {
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let mut client = region.client("acme").await?;
    let deadline = Instant::now() + Duration::from_secs(60);
    for n in 0..count {
        let found = loop {
            match client.get(format!("key/{n}"), None).await {
                Ok(found) => break found,
                // As it says: another node is asked next.
                Err(e) => ensure!(
                    e.to_string().contains("is being filled") && Instant::now() < deadline,
                    "key/{n}: {e}"
                ),
            }
        };
        let value = found.kvs().first().map(|kv| kv.value().to_vec());
        ensure!(
            value.as_deref() == Some(n.to_string().as_bytes()),
            "key/{n} is {value:?}"
        );
    }
    Ok(())
}

/// Rows 18 and 23: 503, 429 and 403 are waited out, with the ledger growing and an alarm; service
/// goes on, and no other bucket is tried.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_waited_out() -> Result<()> {
    let (_minio, proxy, region) = behind_a_proxy(500).await?;
    let mut client = region.client("acme").await?;
    let mut written = 0;
    for status in [503, 429, 403] {
        proxy.set(Mode::Refuse(status));
        fill(&mut client, written, written + 30).await?;
        written += 30;
        let leader = region.leader("acme").await?;
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let shown = region.tenant(leader, "acme").await?;
            if shown.actual_rpo_ms > 1_500 && shown.archived < shown.applied {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{status}: the ledger says {} ms",
                shown.actual_rpo_ms
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(proxy.harmed() > 0);
        let log = region.log(leader);
        ensure!(
            log.contains("archiving does not succeed"),
            "{status}: no alarm in the log"
        );
        proxy.set(Mode::Pass);
        region.archived("acme").await?;
    }
    let mut elsewhere = files_below(region.dir.path());
    elsewhere.retain(|f| f.to_string_lossy().contains("/chain/"));
    ensure!(elsewhere.is_empty(), "links lie in {elsewhere:?}");
    restores_all(region, written).await
}

/// Row 20: PUTs arrive and their answers are lost: each link is there once, and the chain is whole.
#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_do_no_harm() -> Result<()> {
    let (_minio, proxy, region) = behind_a_proxy(100).await?;
    let mut client = region.client("acme").await?;
    proxy.set(Mode::LoseAnswers);
    for wave in 0..20 {
        fill(&mut client, wave * 10, wave * 10 + 10).await?;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    ensure!(proxy.harmed() > 20, "{} answers were met", proxy.harmed());
    proxy.set(Mode::Pass);
    restores_all(region, 200).await
}

/// Connections break in the middle of a file that a restore fetches: it goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_goes_on_where_connections_broke() -> Result<()> {
    const VALUES: usize = 24;
    let (_minio, proxy, mut region) = behind_a_proxy(200).await?;
    let mut client = region.client("acme").await?;
    let mut written = Vec::new();
    for n in 0..VALUES {
        let mut value = vec![0u8; 1 << 20];
        rand::rng().fill(&mut value[..]);
        client
            .put(format!("key/{n}"), value.as_slice(), None)
            .await?;
        written.push(value);
    }
    region.archived("acme").await?;
    region.operate(&["archive", "checkpoint", "acme"]).await?;
    let before = proxy.harmed();
    proxy.set(Mode::CutAnswers(5 << 20));
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let broken = proxy.harmed() - before;
    println!("{broken} connections were broken");
    ensure!(broken > 3, "{broken} connections were broken");
    let mut client = region.client_at("acme", &[0]).await?;
    for (n, value) in written.iter().enumerate() {
        let got = client.get(format!("key/{n}"), None).await?;
        ensure!(got.kvs().first().is_some_and(|kv| kv.value() == value));
    }
    Ok(())
}

/// An old leader's late upload: it is stopped with entries that no link covers, another leader goes
/// on, and when it wakes up its link does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_leaders_late_upload_does_no_harm() -> Result<()> {
    let (_minio, _proxy, region) = behind_a_proxy(2_000).await?;
    let mut written = 0;
    for _ in 0..3 {
        let old = region.leader("acme").await?;
        let mut client = region.client_at("acme", &[old]).await?;
        region.archived("acme").await?;
        fill(&mut client, written, written + 40).await?;
        written += 40;
        // Its link is due within the second.
        region.nodes[old].pause();
        let mut client = region.client_at("acme", &[(old + 1) % 3]).await?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while fill(&mut client, written, written + 1).await.is_err() {
            ensure!(Instant::now() < deadline, "no other leader takes writes");
        }
        fill(&mut client, written, written + 40).await?;
        written += 40;
        region.nodes[old].resume();
        fill(&mut client, written, written + 40).await?;
        written += 40;
    }
    region.same_everywhere("acme").await?;
    restores_all(region, written).await
}

/// The bucket is away longer than the log may grow: entries go unarchived, which is said; when it
/// is back a checkpoint takes their place, and the newest state is restored.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_over_its_cap_is_bridged_by_a_checkpoint() -> Result<()> {
    let minio = servers::minio().await?;
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let proxy = Proxy::start(&minio.endpoint).await?;
    let bucket = BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(proxy.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    region.configure(|_, config| config.max_log_bytes = Some(256 << 20))?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 500, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    fill(&mut client, 0, 20).await?;
    region.archived("acme").await?;
    proxy.set(Mode::Refuse(503));
    let mut value = vec![0u8; 1 << 20];
    for n in 0..420 {
        rand::Rng::fill(&mut rand::rng(), &mut value[..]);
        let key = format!("large/{}", n % 40);
        // The disk has much to do: a leader may change, and then it is written again.
        while let Err(e) = client.put(key.as_str(), value.clone(), None).await {
            ensure!(e.to_string().contains("leader changed"), "{e}");
        }
    }
    let leader = region.leader("acme").await?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !region.log(leader).contains("purged unarchived") {
        ensure!(Instant::now() < deadline, "the log keeps to no cap");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    fill(&mut client, 20, 40).await?;
    proxy.set(Mode::Pass);
    let restored = restores_all(region, 40).await;
    drop(minio);
    restored
}

/// An RPO of 0: what is answered is in the bucket, so that the loss of everything at any moment loses
/// nothing; while the bucket is away a write's outcome is unknown, and serializable reads go on.
/// Beside it a tenant that refuses writes once its archive is too far behind, and whose missed
/// objective is said.
#[tokio::test(flavor = "multi_thread")]
async fn an_rpo_of_zero_loses_nothing() -> Result<()> {
    let (_minio, proxy, mut region) = behind_a_proxy(500).await?;
    let args = [
        "tenant", "create", "zero", "--tier", "enhanced", "--rpo", "0s",
    ];
    let more = ["--rto", "60s", "--key", "local:globex", "--user", "app"];
    let password = ["--password", holdfast_tests::region::PASSWORD];
    region
        .operate(&[&args[..], &more[..], &password[..]].concat())
        .await?;
    region
        .operate(&["tenant", "set", "acme", "--max-unarchived", "3s"])
        .await?;
    let mut zero = region.client("zero").await?;
    let mut acme = region.client("acme").await?;
    fill(&mut zero, 0, 20).await?;
    proxy.set(Mode::Refuse(503));
    let refused = zero.put("unknown", "it", None).await.err();
    let refused = refused.ok_or_else(|| anyhow::anyhow!("acknowledged, and not in the bucket"))?;
    ensure!(refused.to_string().contains("outcome unknown"), "{refused}");
    let serializable = etcd_client::GetOptions::new().with_serializable();
    let found = zero.get("key/7", Some(serializable)).await?;
    ensure!(found.kvs().len() == 1);
    let linearizable = zero.get("key/7", None).await;
    ensure!(linearizable.is_err(), "it shows what is not archived");
    // The other tenant takes writes until its archive is three seconds behind.
    acme.put("first", "it", None).await?;
    let deadline = Instant::now() + Duration::from_secs(15);
    let refused = loop {
        match acme.put("more", "it", None).await {
            Ok(_) => ensure!(Instant::now() < deadline, "writes are never refused"),
            Err(e) => break e.to_string(),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    ensure!(refused.contains("writes are refused"), "{refused}");
    let (ok, objectives) = region.holdfast(&["objectives"]).await?;
    ensure!(!ok && objectives.contains("breached"), "{objectives}");
    proxy.set(Mode::Pass);
    region.archived("acme").await?;
    let deadline = Instant::now() + Duration::from_secs(15);
    while let Err(e) = acme.put("after", "it", None).await {
        ensure!(Instant::now() < deadline, "{e}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let events = loop {
        let events = region.operate(&["events", "--tenant", "acme"]).await?;
        if events.contains("objective-met") {
            break events;
        }
        ensure!(Instant::now() < deadline, "{events}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    ensure!(events.contains("objective-breached"), "{events}");
    // The hour's worst is on record, once the directory was told.
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let history = region.operate(&["objectives", "--history", "acme"]).await?;
        if history.contains("breached") {
            println!("{history}");
            break;
        }
        ensure!(Instant::now() < deadline, "{history}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // Lost in the middle of a load.
    let mut acknowledged = 20;
    let ends = Instant::now() + Duration::from_secs(3);
    while Instant::now() < ends {
        fill(&mut zero, acknowledged, acknowledged + 1).await?;
        acknowledged += 1;
    }
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let mut zero = region.client("zero").await?;
    for n in 0..acknowledged {
        let found = zero.get(format!("key/{n}"), None).await?;
        ensure!(
            found.kvs().len() == 1,
            "key/{n} was acknowledged and is gone"
        );
    }
    println!("{acknowledged} acknowledged writes, none lost");
    Ok(())
}
