//! Tenants under keys of a real KMS: LocalStack.

use anyhow::{Result, ensure};
use holdfast_tests::kms::{create_key, with_key};
use holdfast_tests::region::Region;
use holdfast_tests::servers::{self, CLOUD_REGION};
use replication::archive::bucket::BucketConfig;

/// A tenant under a key of LocalStack is written, lost and restored; with the key disabled (row 26,
/// read at restore) it is refused, and a key of another jurisdiction (row 31) at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_under_a_kms_key_is_restored_and_refused() -> Result<()> {
    let localstack = servers::localstack().await?;
    let arn = create_key(&localstack.endpoint).await?;
    // Its S3 holds the bucket as well.
    servers::make_bucket(&localstack.endpoint, "holdfast").await?;
    let bucket = BucketConfig {
        url: "s3://holdfast".into(),
        cloud_region: Some(CLOUD_REGION.into()),
        endpoint: Some(localstack.endpoint.clone()),
        object_lock: None,
    };
    let mut region = Region::with_bucket(tempfile::tempdir()?, bucket)?;
    region.on_kms(&localstack.endpoint)?;
    region.start_all()?;
    region.serving().await?;
    let foreign = arn.replace(CLOUD_REGION, "eu-west-2");
    let refused = region
        .create_tenant_with("other", "standard", 0, 0, &foreign, "app")
        .await;
    let why = refused.err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(
        why.contains("eu-west-2") && why.contains("jurisdiction eu"),
        "{why}"
    );

    region
        .create_tenant_with("acme", "enhanced", 200, 60_000, &arn, "app")
        .await?;
    region.client("acme").await?.put("k", "v", None).await?;
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let found = region.client("acme").await?.get("k", None).await?;
    ensure!(found.kvs()[0].value() == b"v");

    with_key(&localstack.endpoint, "DisableKey", &arn).await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(
        !ok && table.contains("refuses key") && table.contains("disabled"),
        "{table}"
    );
    Ok(())
}
