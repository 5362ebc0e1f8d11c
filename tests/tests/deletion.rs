//! A tenant is deleted: brought back within its grace, or destroyed with a certificate. And where a
//! tenant's bytes lie, as the store says.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use daemon::signed::Signed;
use daemon::tenant::deletion::Certificate;
use holdfast_tests::failpoint::interrupted;
use holdfast_tests::files::files_below;
use holdfast_tests::region::{Region, tail};
use holdfast_tests::servers::{self, CLOUD_REGION};
use replication::archive::bucket::BucketConfig;

async fn put(region: &Region, tenant: &str, value: &str) -> Result<()> {
    region.client(tenant).await?.put("k", value, None).await?;
    Ok(())
}

async fn get(region: &Region, tenant: &str) -> Result<String> {
    let found = region.client(tenant).await?.get("k", None).await?;
    Ok(found
        .kvs()
        .first()
        .map(|kv| kv.value_str())
        .transpose()?
        .unwrap_or("")
        .to_string())
}

/// Checks a certificate with the tool, and that a changed one is refused; answers its body.
async fn checked(region: &Region, printed: &str) -> Result<Certificate> {
    let signed: Signed = serde_json::from_str(printed)?;
    let (ok, said) = region.verify(printed).await?;
    ensure!(
        ok && said.contains("valid: signed by holdfast://eu/node/"),
        "{said}"
    );
    let changed = Signed {
        body: signed.body.replace("acme", "globex"),
        format: signed.format,
        kind: signed.kind,
        certificate: signed.certificate.clone(),
        signature: signed.signature.clone(),
    };
    let (ok, said) = region.verify(&serde_json::to_string(&changed)?).await?;
    ensure!(!ok && said.contains("it was changed"), "{said}");
    Ok(serde_json::from_str(&signed.body)?)
}

fn complete(certificate: &Certificate, generations: usize) -> Result<()> {
    ensure!(
        certificate.generations.len() == generations,
        "{certificate:?}"
    );
    ensure!(
        certificate.key_objects.len() == generations,
        "{certificate:?}"
    );
    ensure!(certificate.nodes.len() == 3, "{certificate:?}");
    ensure!(!certificate.data_objects.is_empty(), "{certificate:?}");
    let failed = certificate
        .drill
        .as_ref()
        .map(|d| (d.left.as_str(), d.failed.as_str()));
    let (left, failed) = failed.unwrap_or_default();
    ensure!(left.contains("links that authenticate"), "{left}");
    ensure!(failed.contains("there is no wrapped key"), "{failed}");
    Ok(())
}

/// Files whose path names the tenant, but for its certificate.
fn left_of(region: &Region, id: &str) -> Vec<std::path::PathBuf> {
    let all = files_below(region.dir.path()).into_iter();
    all.filter(|f| {
        let path = f.to_string_lossy();
        path.contains(id) && !path.contains("certificates/")
    })
    .collect()
}

/// Deleted with a grace it is refused, through a restart too, and comes back whole; destroyed, no
/// wrapped key and no object is left, a restore of the region does not bring it back, its neighbour
/// is there, and its name can be used again.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tenant_comes_back_or_is_destroyed() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    region
        .create_tenant("globex", "enhanced", 200, 60_000)
        .await?;
    put(&region, "acme", "one").await?;
    put(&region, "globex", "two").await?;
    let mut client = region.client("acme").await?;
    let said = region.operate(&["tenant", "delete", "acme"]).await?;
    ensure!(said.contains("tenant undelete acme"), "{said}");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let refused = client.get("k", None).await.err().map(|e| e.to_string());
        if refused
            .as_deref()
            .unwrap_or_default()
            .contains("it is deleted")
        {
            break;
        }
        ensure!(Instant::now() < deadline, "still served: {refused:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    region.kill_all();
    region.start_all()?;
    region.serving().await?;
    ensure!(get(&region, "globex").await? == "two");
    let refused = client.get("k", None).await.err().map(|e| e.to_string());
    let refused = refused.unwrap_or_default();
    ensure!(refused.contains("it is deleted"), "{refused}");
    region.operate(&["tenant", "undelete", "acme"]).await?;
    ensure!(get(&region, "acme").await? == "one");

    region.operate(&["key", "rotate", "acme"]).await?;
    put(&region, "acme", "three").await?;
    region.archived("acme").await?;
    let id = region.tenant(0, "acme").await?.id;
    ensure!(!left_of(&region, &id).is_empty());
    let printed = region
        .operate(&["tenant", "delete", "acme", "--grace", "0s"])
        .await?;
    let certificate = checked(&region, &printed).await?;
    complete(&certificate, 2)?;
    let left = left_of(&region, &id);
    ensure!(left.is_empty(), "{left:?}");
    let (ok, said) = region.holdfast(&["tenant", "undelete", "acme"]).await?;
    ensure!(!ok && said.contains("no tenant acme"), "{said}");
    let said = region.operate(&["certificate", "show", "acme"]).await?;
    ensure!(said == printed, "{said}");
    ensure!(get(&region, "globex").await? == "two");
    region.archived("globex").await?;

    let (ok, table) = region.lose_and_restore().await?;
    ensure!(
        ok && table.contains("globex") && !table.contains("acme"),
        "{table}"
    );
    ensure!(get(&region, "globex").await? == "two");
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    ensure!(get(&region, "acme").await?.is_empty());
    Ok(())
}

/// The daemon killed at each step of a destruction: it goes on, and the certificate lists all.
#[tokio::test(flavor = "multi_thread")]
async fn a_destruction_goes_on_wherever_it_was_interrupted() -> Result<()> {
    let mut region = Region::started().await?;
    for moment in [
        "destruction-begun",
        "keys-destroyed",
        "nodes-erased",
        "destruction-drilled",
        "data-destroyed",
    ] {
        region
            .create_tenant("acme", "enhanced", 200, 60_000)
            .await?;
        put(&region, "acme", moment).await?;
        region.archived("acme").await?;
        let id = region.tenant(0, "acme").await?.id;
        let asked = ["tenant", "delete", "acme", "--grace", "0s"];
        let ended = interrupted(&mut region, moment, &asked).await?;
        let deadline = Instant::now() + Duration::from_secs(60);
        let printed = loop {
            let (ok, said) = region.holdfast(&["certificate", "show", "acme"]).await?;
            if ok && said.contains(&id) {
                break said;
            }
            ensure!(
                Instant::now() < deadline,
                "{moment}: {said}\n{}",
                tail(&region.log(0))
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        complete(&checked(&region, &printed).await?, 1)?;
        let left = left_of(&region, &id);
        ensure!(left.is_empty(), "{moment}: {left:?}");
        println!("killed at {moment} ({ended} nodes): destroyed after the restart");
    }
    Ok(())
}

/// In a bucket that keeps versions every version of every wrapped key goes. The store is asked where
/// the bucket lies, and a declaration that is not so is refused (row 31).
#[tokio::test(flavor = "multi_thread")]
async fn versions_are_destroyed_and_the_store_is_asked_where_it_lies() -> Result<()> {
    let localstack = servers::localstack().await?;
    let endpoint = &localstack.endpoint;
    servers::make_bucket(endpoint, "holdfast").await?;
    servers::keep_versions(endpoint, "holdfast").await?;
    let bucket = |cloud_region: &str| BucketConfig {
        url: "s3://holdfast/eu".into(),
        cloud_region: Some(cloud_region.into()),
        endpoint: Some(endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket("eu-west-1"))?;
    region.environment = servers::credentials();
    region.start(0)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while region.nodes[0].ended().is_none() {
        ensure!(
            Instant::now() < deadline,
            "a false declaration is not refused"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let log = region.log(0);
    ensure!(
        log.contains(CLOUD_REGION) && log.contains("eu-west-1"),
        "{log}"
    );
    drop(region);

    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket(CLOUD_REGION))?;
    region.keyfile().add("acme-2")?;
    region.environment = servers::credentials();
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    put(&region, "acme", "one").await?;
    let said = region.operate(&["residency", "acme"]).await?;
    ensure!(
        said.contains("GetBucketLocation") && said.contains(CLOUD_REGION),
        "{said}"
    );
    let signed = region.operate(&["residency", "acme", "--json"]).await?;
    let (ok, said) = region.verify(&signed).await?;
    ensure!(ok, "{said}");
    // Each generation's object is written twice: a version under either KMS key.
    region
        .operate(&["key", "change", "acme", "--key", "local:acme-2"])
        .await?;
    let id = region.tenant(0, "acme").await?.id;
    let versions = format!("holdfast?versions&prefix=eu/tenants/{id}/");
    let before = servers::ask_localstack(endpoint, "GET", &versions, "").await?;
    ensure!(
        before.matches("/keys/0000000001</Key>").count() == 2,
        "{before}"
    );
    let printed = region
        .operate(&["tenant", "delete", "acme", "--grace", "0s"])
        .await?;
    let certificate = checked(&region, &printed).await?;
    complete(&certificate, 2)?;
    ensure!(
        certificate
            .key_objects
            .iter()
            .map(|o| o.versions)
            .sum::<u32>()
            == 3
    );
    region
        .create_tenant("globex", "enhanced", 200, 60_000)
        .await?;
    put(&region, "globex", "two").await?;
    region
        .operate(&["key", "rotate", "globex", "--rewrite"])
        .await?;
    let id = region.tenant(0, "globex").await?.id;
    let keys = format!("holdfast?versions&prefix=eu/tenants/{id}/keys/");
    let keys = servers::ask_localstack(endpoint, "GET", &keys, "").await?;
    ensure!(
        keys.matches("/keys/0000000002</Key>").count() == 1 && keys.matches("<Key>").count() == 1,
        "{keys}"
    );
    let after = servers::ask_localstack(endpoint, "GET", &versions, "").await?;
    ensure!(
        after.contains("ListVersionsResult") && !after.contains("<Key>"),
        "{after}"
    );
    Ok(())
}
