//! Row 24: a bucket of MinIO's in which the archive is locked. Who holds its credentials and deletes what can be
//! deleted takes nothing from a restore, and what an Object Lock keeps is left alone by retention.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use holdfast_tests::region::Region;
use holdfast_tests::servers::{self, Server};
use object_store::ObjectStore;
use rand::Rng;
use replication::archive::bucket::BucketConfig;
use replication::archive::lock::{Mode, ObjectLock};

const DAYS: u32 = 14;
const DAY_S: i64 = 24 * 3600;

fn config(server: &Server, object_lock: Option<ObjectLock>) -> BucketConfig {
    BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(servers::CLOUD_REGION.into()),
        endpoint: Some(server.endpoint.clone()),
        object_lock,
    }
}

fn region(bucket: BucketConfig) -> Result<Region> {
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.environment = servers::credentials();
    Ok(region)
}

/// Paths of all objects that are there.
async fn objects(store: &Arc<dyn ObjectStore>) -> Result<Vec<String>> {
    let found: Vec<_> = store.list(None).try_collect().await?;
    Ok(found.into_iter().map(|m| m.location.to_string()).collect())
}

/// Headers of an object, in small letters.
async fn head(server: &Server, object: &str) -> Result<BTreeMap<String, String>> {
    let url = format!("{}/holdfast/{object}", server.endpoint);
    let (code, text) = servers::signed(&url, "HEAD", &[], "").await?;
    ensure!(code == "200", "{object}: {code} {text}");
    let headers = text.lines().filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_string()));
    Ok(headers.collect())
}

fn is_archive(object: &str) -> bool {
    let kinds = ["/chain/", "/checkpoints/", "/files/", "bootstrap.json"];
    kinds.iter().any(|kind| object.contains(kind))
}

/// When each lock of the archive ends, seconds since 1970. Nothing else is locked.
async fn locks(server: &Server, store: &Arc<dyn ObjectStore>) -> Result<BTreeMap<String, i64>> {
    let mut until = BTreeMap::new();
    for object in objects(store).await? {
        let head = head(server, &object).await?;
        let mode = head.get("x-amz-object-lock-mode").map(String::as_str);
        if !is_archive(&object) {
            ensure!(mode.is_none(), "{object} is locked");
            continue;
        }
        ensure!(mode == Some("GOVERNANCE"), "{object}: {head:?}");
        let ends = head.get("x-amz-object-lock-retain-until-date");
        let ends = ends.with_context(|| format!("{object}: {head:?}"))?;
        let rfc = &time::format_description::well_known::Rfc3339;
        let ends = time::OffsetDateTime::parse(ends, rfc)?;
        until.insert(object, ends.unix_timestamp());
    }
    Ok(until)
}

async fn write(region: &Region, round: usize) -> Result<()> {
    let mut client = region.client("acme").await?;
    let mut value = vec![0u8; 1 << 20];
    // One of its files goes up in parts.
    for n in 0..12 {
        rand::rng().fill(&mut value[..]);
        client
            .put(format!("{round}/{n}"), value.as_slice(), None)
            .await?;
    }
    region.archived("acme").await?;
    region.operate(&["archive", "checkpoint", "acme"]).await?;
    Ok(())
}

/// What was written, too large for one answer.
async fn rows(region: &Region) -> Result<Vec<Vec<u8>>> {
    let mut client = region.client_at("acme", &[0]).await?;
    let mut found = Vec::new();
    for key in (0..2).flat_map(|round| (0..12).map(move |n| format!("{round}/{n}"))) {
        let got = client.get(key.as_str(), None).await?;
        found.push(got.kvs().first().context(key)?.value().to_vec());
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_archive_outlives_whoever_deletes_it() -> Result<()> {
    let minio = servers::minio().await?;
    servers::make_lockable_bucket(&minio.endpoint, "holdfast").await?;
    let lock = ObjectLock {
        mode: Mode::Governance,
        days: DAYS,
    };
    let mut region = region(config(&minio, Some(lock)))?;
    region
        .environment
        .push(("HOLDFAST_TEST_COLLECT_AFTER_MS".into(), "1000".into()));
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    write(&region, 0).await?;
    let store: Arc<dyn ObjectStore> = Arc::new(servers::s3(&minio.endpoint, "holdfast")?);
    let first = locks(&minio, &store).await?;
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let whole = i64::from(DAYS) * DAY_S;
    for (object, ends) in &first {
        ensure!(
            (now + whole - 600..=now + whole).contains(ends),
            "{object} until {ends}"
        );
    }
    let kinds = ["/chain/", "/checkpoints/", "/files/"];
    ensure!(
        kinds
            .iter()
            .all(|kind| first.keys().any(|object| object.contains(kind))),
        "{first:?}"
    );
    let listed: Vec<_> = store.list(None).try_collect().await?;
    let files = listed
        .iter()
        .filter(|m| m.location.as_ref().contains("/files/"));
    let sizes: Vec<u64> = files.map(|meta| meta.size).collect();
    ensure!(
        sizes.iter().any(|size| *size > 8 << 20),
        "none went up in parts: {sizes:?}"
    );

    // A lock of fourteen days is renewed by each scrub.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let said = region.operate(&["archive", "scrub", "acme"]).await?;
    ensure!(said.contains("; 0 are damaged"), "{said}");
    let id = region.tenant(0, "acme").await?.id;
    let renewed = locks(&minio, &store).await?;
    for (object, ends) in first.iter().filter(|(object, _)| object.contains(&id)) {
        ensure!(renewed.get(object) > Some(ends), "{object} was not renewed");
    }

    // What leaves the window stays as long as its lock does, and is in nobody's way.
    region.keep_little("acme").await?;
    write(&region, 1).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let said = region.operate(&["archive", "sweep", "acme"]).await?;
    ensure!(said.contains("its Object Lock stands"), "{said}");
    let manifests = |all: Vec<String>| {
        let own = format!("{id}/0000000001/checkpoints");
        all.into_iter()
            .filter(|object| object.contains(&own))
            .count()
    };
    let left = manifests(objects(&store).await?);
    ensure!(
        left == 1,
        "{left} manifests are there, not the newest alone"
    );
    let said = region.operate(&["archive", "sweep", "acme"]).await?;
    println!("{said}");
    // Nor is its lock renewed: it can go one day.
    let before = locks(&minio, &store).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    region.operate(&["archive", "scrub", "acme"]).await?;
    let after = locks(&minio, &store).await?;
    let own = |object: &&String| object.contains(&id) && object.contains("/chain/");
    let links: Vec<&String> = before.keys().filter(own).collect();
    let (oldest, newest) = (links[0], links[links.len() - 1]);
    ensure!(
        after[oldest] == before[oldest],
        "{oldest} is kept for nothing"
    );
    ensure!(after[newest] > before[newest], "{newest} was not renewed");
    let left = manifests(objects(&store).await?);
    ensure!(left == 1, "a retired manifest came back");
    let said = region.operate(&["drill", "run", "acme"]).await?;
    ensure!(said.contains("passed"), "{said}");

    // Somebody with the region's own credentials deletes everything, and each version of the archive.
    let before = rows(&region).await?;
    region.kill_all();
    region.lose_disks()?;
    let mut markers = Vec::new();
    for object in objects(&store).await? {
        let url = format!("{}/holdfast/{object}", minio.endpoint);
        if is_archive(&object) {
            let version = head(&minio, &object).await?;
            let version = version.get("x-amz-version-id").context("versions")?;
            let one = format!("{url}?versionId={version}");
            let (code, said) = servers::signed(&one, "DELETE", &[], "").await?;
            ensure!(
                code == "400" || code == "403",
                "{object} is gone: {code} {said}"
            );
        }
        let (code, said) = servers::signed(&url, "DELETE", &[], "").await?;
        ensure!(code == "204", "{object}: {code} {said}");
        markers.push(object);
    }
    ensure!(objects(&store).await?.is_empty());
    // The operator takes the delete markers away.
    for object in markers {
        let (_, text) = servers::signed(
            &format!("{}/holdfast/{object}", minio.endpoint),
            "HEAD",
            &[],
            "",
        )
        .await?;
        let marker = text
            .lines()
            .find_map(|line| {
                line.to_lowercase()
                    .strip_prefix("x-amz-version-id: ")
                    .map(String::from)
            })
            .with_context(|| format!("a marker of {object}: {text}"))?;
        let url = format!(
            "{}/holdfast/{object}?versionId={}",
            minio.endpoint,
            marker.trim()
        );
        let (code, said) = servers::signed(&url, "DELETE", &[], "").await?;
        ensure!(code == "204", "{object}: {code} {said}");
    }
    region.start_all()?;
    region.all_in("awaiting restore").await?;
    let (ok, table) = region.holdfast(&["restore", "region"]).await?;
    ensure!(ok, "{table}");
    region.serving().await?;
    ensure!(rows(&region).await? == before, "not all of it is there");
    Ok(())
}

/// A bucket that cannot hold what node.toml says, or would lock wrapped keys, is refused at the start.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_locks_otherwise_is_refused() -> Result<()> {
    let minio = servers::minio().await?;
    let lock = ObjectLock {
        mode: Mode::Compliance,
        days: DAYS,
    };
    servers::make_bucket(&minio.endpoint, "holdfast").await?;
    let mut without = region(config(&minio, Some(lock)))?;
    without.start(0)?;
    let said = ended(&mut without).await?;
    ensure!(said.contains("has no Object Lock: enable it"), "{said}");

    let other = servers::minio().await?;
    servers::make_lockable_bucket(&other.endpoint, "holdfast").await?;
    let rule = "<ObjectLockConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention><Mode>GOVERNANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
    let url = format!("{}/holdfast?object-lock=", other.endpoint);
    let (code, said) = servers::signed(&url, "PUT", &[], rule).await?;
    ensure!(code == "200", "{code} {said}");
    let mut all = region(config(&other, None))?;
    all.start(0)?;
    let said = ended(&mut all).await?;
    ensure!(
        said.contains("wrapped keys could not be destroyed in it"),
        "{said}"
    );
    Ok(())
}

/// What the first node said when it ended.
async fn ended(region: &mut Region) -> Result<String> {
    for _ in 0..100 {
        if let Some(status) = region.nodes[0].ended() {
            ensure!(!status.success());
            return Ok(region.log(0));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    anyhow::bail!("it runs: {}", region.log(0))
}
