//! Row 31: whatever lies in another jurisdiction is refused: bucket, key, peer, node. A key of a KMS
//! is tried in `kms.rs`, a restore target in `restore.rs`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use daemon::pki::Authority;
use holdfast_tests::region::Region;
use kms::Region as Jurisdiction;
use replication::archive::bucket::BucketConfig;
use replication::network::{Hello, NodeTls, PROTOCOL, Peers};

/// Row 31: a bucket in another jurisdiction is refused before anything is written.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_of_another_jurisdiction_is_refused() -> Result<()> {
    let region = Region::new()?;
    let mut config = region.nodes[0].config.clone();
    config.bucket = BucketConfig {
        url: "s3://holdfast".into(),
        cloud_region: Some("us-east-1".into()),
        endpoint: None,
        object_lock: None,
    };
    let problems = config.problems().join("\n");
    ensure!(
        problems.contains("us-east-1") && problems.contains("jurisdiction eu"),
        "{problems}"
    );
    Ok(())
}

/// A node whose certificate names another jurisdiction is not spoken to, although the same
/// authority signed it; one of this jurisdiction is, so that the test can fail.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_jurisdiction_is_refused() -> Result<()> {
    let region = Region::started().await?;
    let dir = region.dir.path();
    let file = |name: &str| dir.join(name);
    let authority =
        Authority::load(&file("ca.pem"), &file("ca-key.pem")).map_err(anyhow::Error::msg)?;
    for (jurisdiction, welcome) in [(Jurisdiction::Us, false), (Jurisdiction::Eu, true)] {
        let (cert, key) = (file("other.pem"), file("other-key.pem"));
        let signed = authority.node(jurisdiction, "a", "node9", &cert, &key);
        signed.map_err(anyhow::Error::msg)?;
        let tls = NodeTls::load(&file("ca.pem"), &cert, &key, &[])?;
        let hello = Hello {
            protocol: PROTOCOL,
            format: replication::command::VERSION,
            node: 9,
            name: "node9".into(),
        };
        let peers = Peers::new(tls, hello);
        let peer = peers.address(&region.nodes[0].config.peer_address.to_string());
        let connected = peer.connected(Duration::from_secs(3)).await.is_some();
        ensure!(
            connected == welcome,
            "{jurisdiction}: connected is {connected}"
        );
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let events = region.operate(&["events"]).await?;
        if events.contains("residency-refused") && events.contains("jurisdiction us") {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{events}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A node does not start under a certificate of another jurisdiction than its configuration's.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_does_not_start_under_another_jurisdictions_certificate() -> Result<()> {
    let mut region = Region::new()?;
    region.configure(|_, config| config.region = Jurisdiction::Us)?;
    region.start(0)?;
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while region.nodes[0].ended().is_none() {
        ensure!(std::time::Instant::now() < deadline, "it goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let log = region.log(0);
    ensure!(
        log.contains("the certificate names") && log.contains("/us/"),
        "{log}"
    );
    Ok(())
}
