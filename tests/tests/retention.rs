//! Retention with real processes, in a bucket of LocalStack's that keeps versions: what is inside the
//! window or held restores, the rest goes in all its versions, wherever the daemon is killed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use holdfast_tests::failpoint::interrupted;
use holdfast_tests::region::Region;
use holdfast_tests::servers::{self, Server};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use replication::archive::bucket::BucketConfig;
use replication::clock::utc;

const ROUNDS: usize = 4;
const KEYS: usize = 50;
/// What is left while nothing refers to it; the same for every node.
const COLLECT_AFTER_MS: u64 = 1_500;

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

async fn on_versions() -> Result<(Server, Region)> {
    let localstack = servers::localstack().await?;
    servers::make_bucket(&localstack.endpoint, "holdfast").await?;
    servers::keep_versions(&localstack.endpoint, "holdfast").await?;
    let bucket = BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(localstack.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    let collect = COLLECT_AFTER_MS.to_string();
    region
        .environment
        .push(("HOLDFAST_TEST_COLLECT_AFTER_MS".into(), collect));
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 100, 60_000)
        .await?;
    Ok((localstack, region))
}

/// Keys of the present objects below the tenant's `what`.
async fn objects(store: &Arc<dyn ObjectStore>, id: &str, what: &str) -> Result<BTreeSet<String>> {
    let dir = Path::from(format!("eu/tenants/{id}/{what}"));
    let found: Vec<_> = store.list(Some(&dir)).try_collect().await?;
    Ok(found.into_iter().map(|m| m.location.to_string()).collect())
}

/// All versions of objects below the tenant's `what`, delete markers too.
async fn versions(endpoint: &str, id: &str, what: &str) -> Result<usize> {
    let path = format!("holdfast?versions&prefix=eu/tenants/{id}/{what}");
    let listed = servers::ask_localstack(endpoint, "GET", &path, "").await?;
    Ok(listed.matches("<Key>").count())
}

async fn sweep(region: &Region) -> Result<String> {
    tokio::time::sleep(Duration::from_millis(2 * COLLECT_AFTER_MS)).await;
    region.operate(&["archive", "sweep", "acme"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_restores_and_the_rest_goes() -> Result<()> {
    let (localstack, mut region) = on_versions().await?;
    let endpoint = localstack.endpoint.clone();
    let store: Arc<dyn ObjectStore> = Arc::new(servers::s3(&endpoint, "holdfast")?);
    let id = region.tenant(0, "acme").await?.id;

    // Rounds of writes, each with a checkpoint at its end.
    let mut moments = Vec::new();
    for round in 0..ROUNDS {
        let mut client = region.client("acme").await?;
        for n in 0..KEYS {
            client
                .put(format!("k/{n}"), format!("{round}/{n}"), None)
                .await?;
        }
        moments.push(now_ms());
        tokio::time::sleep(Duration::from_millis(500)).await;
        let said = region.operate(&["archive", "checkpoint", "acme"]).await?;
        ensure!(said.contains("is in the bucket"), "{said}");
    }
    region.archived("acme").await?;
    let all = objects(&store, &id, "").await?;

    let many = ["tenant", "set", "acme", "--keep-checkpoints", "10"];
    region.operate(&many).await?;
    // Nothing goes inside the window, and a dry run deletes nothing.
    let said = region.operate(&["archive", "sweep", "acme"]).await?;
    ensure!(said.contains("0 checkpoints, 0 links, 0 files"), "{said}");
    region.keep_little("acme").await?;
    // The newest checkpoint is older than the window then.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let dry = ["archive", "sweep", "acme", "--dry-run"];
    let said = region.operate(&dry).await?;
    ensure!(said.contains("Would go: 3 checkpoints"), "{said}");
    ensure!(
        all.is_subset(&objects(&store, &id, "").await?),
        "a dry run deleted"
    );

    // A hold keeps the second round's end, and everything behind it.
    let since = utc(moments[1]);
    let hold = [
        "archive", "hold", "acme", "--since", &since, "--reason", "case 7",
    ];
    let said = region.operate(&hold).await?;
    let held = said
        .split_whitespace()
        .nth(1)
        .context("its id")?
        .to_string();
    let said = sweep(&region).await?;
    ensure!(said.contains("case 7"), "{said}");
    region
        .operate(&["restore", "tenant", "acme", "--at", &since])
        .await?;
    let rows = region.rows("acme").await?;
    ensure!(
        rows.len() == KEYS && rows.values().all(|value| value.starts_with("1/")),
        "not what was held: {rows:?}"
    );
    region.same_everywhere("acme").await?;

    // Released, it goes; killed at each step, the sweep is gone on with.
    let mut client = region.client("acme").await?;
    client.put("last", "one", None).await?;
    region.operate(&["archive", "checkpoint", "acme"]).await?;
    region
        .operate(&["archive", "release", "acme", &held])
        .await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for moment in ["retention-begun", "checkpoints-retired", "history-deleted"] {
        let died = interrupted(&mut region, moment, &["archive", "sweep", "acme"]).await?;
        println!("killed at {moment}: {died}");
        let rows = region.rows("acme").await?;
        ensure!(rows.len() == KEYS + 1, "{moment}: {rows:?}");
    }
    // An upload that nobody finished, and a file that nothing refers to.
    let orphan = Path::from(format!("eu/tenants/{id}/files/ab"));
    store.put(&orphan, PutPayload::from_static(b"x")).await?;
    let begun = format!("holdfast/eu/tenants/{id}/files/cd?uploads");
    let begun = servers::ask_localstack(&endpoint, "POST", &begun, "").await?;
    ensure!(begun.contains("UploadId"), "{begun}");
    let said = sweep(&region).await?;
    ensure!(said.contains("1 uploads"), "{said}");
    let said = sweep(&region).await?;
    println!("{said}");
    let uploads = format!("holdfast?uploads&prefix=eu/tenants/{id}/");
    let uploads = servers::ask_localstack(&endpoint, "GET", &uploads, "").await?;
    ensure!(!uploads.contains("<UploadId>"), "{uploads}");

    // One checkpoint with its files is left, and of the old incarnation its last link, in one version.
    let manifests = objects(&store, &id, "0000000002/checkpoints").await?;
    ensure!(manifests.len() == 1, "{manifests:?}");
    for (what, most) in [
        ("0000000001/chain", 1),
        ("0000000001/checkpoints", 0),
        ("0000000001/retired", 0),
        ("0000000002/checkpoints", 1),
    ] {
        let found = versions(&endpoint, &id, what).await?;
        ensure!(found == most, "{what}: {found} versions, not {most}");
    }
    let files = objects(&store, &id, "files").await?;
    ensure!(!files.contains(orphan.as_ref()), "the orphan is there yet");
    ensure!(versions(&endpoint, &id, "files").await? == files.len());
    let (ok, said) = region
        .holdfast(&["restore", "tenant", "acme", "--at", &since])
        .await?;
    ensure!(!ok && said.contains("before what is kept"), "{said}");
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let rows = region.rows("acme").await?;
    ensure!(rows.len() == KEYS + 1 && rows["last"] == "one", "{rows:?}");
    Ok(())
}

/// The daemon killed at each step of a checkpoint and its upload: the next one is made, and restores.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_goes_on_wherever_it_was_interrupted() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 100, 60_000)
        .await?;
    let checkpoint = ["archive", "checkpoint", "acme"];
    for (round, moment) in [
        "checkpoint-made",
        "checkpoint-named",
        "checkpoint-files-uploaded",
        "checkpoint-uploaded",
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = region.client("acme").await?;
        for n in 0..KEYS {
            let key = format!("{round}/{n}");
            client.put(key, n.to_string(), None).await?;
        }
        region.archived("acme").await?;
        let died = interrupted(&mut region, moment, &checkpoint).await?;
        println!("killed at {moment}: {died}");
        region.leader("acme").await?;
        region.operate(&checkpoint).await?;
        let said = region.operate(&["archive", "scrub", "acme"]).await?;
        ensure!(said.contains("; 0 are damaged"), "{moment}: {said}");
        let said = region.operate(&["drill", "run", "acme"]).await?;
        ensure!(said.contains("passed"), "{moment}: {said}");
        let rows = region.rows("acme").await?;
        ensure!(
            rows.len() == (round + 1) * KEYS,
            "{moment}: {} rows",
            rows.len()
        );
    }
    Ok(())
}
