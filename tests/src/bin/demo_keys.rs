//! Three tenants under load, two under keys of LocalStack's KMS, one under a keyfile: keys are
//! disabled, scheduled for deletion, denied, not answered for, rotated, rewritten and changed, and what
//! was acknowledged to the tenant whose key it was is read back.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::kms::{Mode, Proxy, create_key, schedule_deletion, with_key};
use holdfast_tests::load::{Load, WRITERS};
use holdfast_tests::region::Region;
use holdfast_tests::served::Served;
use holdfast_tests::servers;

const TENANTS: [&str; 3] = ["acme", "globex", "initech"];
const BOUND: Duration = Duration::from_secs(60);
/// How long the load is measured at a time.
const WINDOW: Duration = Duration::from_secs(8);

/// Measures the others' load over a window.
async fn neighbours(loads: &[(usize, Load)], without: usize, what: &str) {
    for (_, load) in loads {
        load.begin();
    }
    let began = Instant::now();
    tokio::time::sleep(WINDOW).await;
    for (n, load) in loads.iter().filter(|(n, _)| *n != without) {
        let (rate, p99) = load.figures(began.elapsed());
        println!(
            "    {:<8} {what:<22} {rate:6.0} puts/s, p99 {p99:6.1} ms",
            TENANTS[*n]
        );
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let all = Instant::now();
    let step = |what: &str| println!("[{:6.1} s] {what}", all.elapsed().as_secs_f64());

    step("starting LocalStack, a proxy before its KMS, and a region of three daemons");
    let localstack = servers::localstack().await?;
    let arns = [
        create_key(&localstack.endpoint).await?,
        create_key(&localstack.endpoint).await?,
        create_key(&localstack.endpoint).await?,
    ];
    let proxy = Proxy::start(&localstack.endpoint).await?;
    let mut region = Region::new()?;
    region.on_kms(&proxy.endpoint)?;
    region.keyfile().add("initech")?;
    region.start_all()?;
    region.serving().await?;
    let keys = [
        arns[0].clone(),
        arns[1].clone(),
        "local:initech".to_string(),
    ];
    let mut clients = Vec::new();
    let mut loads = Vec::new();
    for (n, (name, key)) in TENANTS.iter().zip(&keys).enumerate() {
        region
            .create_tenant_with(name, "enhanced", 1_000, 60_000, key, "app")
            .await?;
        clients.push(Served::connect(&region, name).await?);
        loads.push((n, Load::start(&region, name).await?));
    }
    step("acme and globex are under keys of LocalStack, initech under a keyfile; all under load");
    tokio::time::sleep(Duration::from_secs(3)).await;

    step("a control without any revocation, then acme's key is disabled");
    neighbours(&loads, 0, "control").await;
    neighbours(&loads, 0, "before").await;
    for (_, load) in &loads {
        load.begin();
    }
    let began = Instant::now();
    with_key(&localstack.endpoint, "DisableKey", &arns[0]).await?;
    let took = clients[0].sealed("disabled", BOUND).await?;
    for (n, load) in &loads[1..] {
        let (rate, p99) = load.figures(began.elapsed());
        println!(
            "    {:<8} {:<22} {rate:6.0} puts/s, p99 {p99:6.1} ms",
            TENANTS[*n], "while it is sealed"
        );
    }
    step(&format!("each node refuses acme after {took} (at most 60)"));
    neighbours(&loads, 0, "after").await;
    with_key(&localstack.endpoint, "EnableKey", &arns[0]).await?;
    let took = clients[0].resumed(BOUND).await?;
    step(&format!(
        "enabled again: each node serves acme after {took}"
    ));
    let (_, load) = loads.remove(0);
    let last = load.end().await?;
    for (writer, last) in last.iter().enumerate() {
        let found = clients[0].0[0].get(format!("load/{writer}"), None).await?;
        let found = found
            .kvs()
            .first()
            .map(|kv| kv.value_str().map(str::parse::<u64>));
        // One that was not acknowledged may have been done.
        let found = found.transpose()?.transpose()?.unwrap_or(0);
        ensure!(
            found >= *last,
            "writer {writer} was acknowledged {last}, found {found}"
        );
    }
    step(&format!(
        "every acknowledged write of acme is there: the last of each writer were {last:?}"
    ));

    schedule_deletion(&localstack.endpoint, &arns[0]).await?;
    let took = clients[0].sealed("pending deletion", BOUND).await?;
    step(&format!(
        "acme's key is pending deletion: refused after {took}"
    ));
    with_key(&localstack.endpoint, "CancelKeyDeletion", &arns[0]).await?;
    with_key(&localstack.endpoint, "EnableKey", &arns[0]).await?;
    let took = clients[0].resumed(BOUND).await?;
    step(&format!("cancelled and enabled: served after {took}"));

    proxy.set(Mode::Deny(arns[0].clone()));
    let took = clients[0].sealed("access denied", BOUND).await?;
    step(&format!(
        "access to acme's key is denied: refused after {took}"
    ));
    proxy.set(Mode::Pass);
    let took = clients[0].resumed(BOUND).await?;
    step(&format!("allowed again: served after {took}"));

    region
        .operate(&["tenant", "set", "acme", "--key-grace", "30s"])
        .await?;
    localstack.pause();
    let took = clients[0]
        .sealed("could not be proven", Duration::from_secs(120))
        .await?;
    step(&format!(
        "the KMS is stopped: acme, with a grace of 30 s, is sealed after {took}"
    ));
    let stopped = Duration::from_secs(120).saturating_sub(took.last());
    tokio::time::sleep(stopped).await;
    let now = clients[1].resumed(Duration::from_secs(2)).await?;
    step(&format!(
        "after two minutes without the KMS globex, with a grace of 10 min, is served by {} nodes",
        now.0.len()
    ));
    localstack.resume();
    let took = clients[0].resumed(BOUND).await?;
    step(&format!("the KMS goes on: acme is served after {took}"));

    // A login ends after five minutes.
    clients[0] = Served::connect(&region, "acme").await?;
    for arguments in [
        vec!["key", "rotate", "acme"],
        vec!["key", "rotate", "acme", "--rewrite"],
        vec!["key", "change", "acme", "--key", arns[2].as_str()],
        vec!["residency", "acme"],
    ] {
        let began = Instant::now();
        let said = region.operate(&arguments).await?;
        println!("$ holdfast {}\n{}", arguments.join(" "), said.trim_end());
        step(&format!("took {:.1} s", began.elapsed().as_secs_f64()));
    }
    schedule_deletion(&localstack.endpoint, &arns[0]).await?;
    clients[0].0[0].put("after", "the change", None).await?;
    for n in 0..WRITERS {
        let found = clients[0].0[1].get(format!("load/{n}"), None).await?;
        ensure!(found.count() == 1);
    }
    step("acme's first key is scheduled for deletion, and everything is still read");
    let said = region.operate(&["events", "--tenant", "acme"]).await?;
    println!("{said}");
    for (_, load) in loads {
        load.end().await?;
    }
    let certificate = region
        .operate(&["tenant", "delete", "acme", "--grace", "0s"])
        .await?;
    let (ok, said) = region.verify(&certificate).await?;
    ensure!(ok, "{said}");
    // The objects are many.
    let drill = said.lines().filter(|l| {
        [
            "valid",
            "\"drill\"",
            "\"failed\"",
            "\"left\": \"no",
            "\"left\": \"a",
        ]
        .iter()
        .any(|w| l.contains(w))
    });
    for line in drill {
        println!("{line}");
    }
    step("acme is destroyed; its certificate verifies, and names why a restore failed: done");
    Ok(())
}
