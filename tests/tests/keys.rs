//! Rows 25 to 29: a tenant's key is taken away, given back, not answered for, rotated and changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use daemon::proto::admin::{KeyReport, Tenant};
use holdfast_tests::failpoint::interrupted;
use holdfast_tests::files::files_below;
use holdfast_tests::kms::{Mode, Proxy, create_key, schedule_deletion, with_key};
use holdfast_tests::memory;
use holdfast_tests::opened::{chain_of, keys_of};
use holdfast_tests::region::Region;
use holdfast_tests::served::Served;
use holdfast_tests::servers;
use holdfast_tests::writer::{Writer, check_all};
use kms::local::{KeyState, Keyfile};
use kms::{KeyUri, Providers, Secret, TenantId, WrappedKey};
use replication::GroupId;
use replication::group::types::{decode_entry, machine_entry};
use replication::machine::Payload;

/// The bound of the contract.
const BOUND: Duration = Duration::from_secs(60);

/// Every key that a tenant's data keys came to on its nodes, with what it is: the data keys themselves,
/// the key of each file and of each sealer, and the second part of each one's expanded schedule.
async fn material(region: &Region, tenant: &Tenant) -> Result<BTreeMap<[u8; 32], String>> {
    let id: TenantId = tenant.id.parse().map_err(anyhow::Error::msg)?;
    let group = GroupId {
        tenant: id,
        incarnation: 1,
    };
    let keys = keys_of(region, id).await?;
    let mut all: Vec<(String, Arc<Secret>)> = Vec::new();
    for generation in keys.held() {
        let key = keys.generation(generation);
        all.extend(key.map(|key| (format!("data key {generation}"), key)));
    }
    for node in &region.nodes {
        let replica = node.config.data_dir.join("tenants").join(group.to_string());
        for file in files_below(&replica) {
            let bytes = std::fs::read(&file).unwrap_or_default();
            if bytes.len() >= 4096 && bytes.starts_with(b"HOLDFAST") {
                let generation = u32::from_be_bytes(bytes[9..13].try_into()?);
                if let Some(key) = keys.generation(generation) {
                    let key = key.derive(&bytes[13..45], b"holdfast/v1/file");
                    all.push((format!("the key of {}", file.display()), Arc::new(key)));
                }
            }
        }
    }
    let files = all.len();
    ensure!(files > 3, "no encrypted file of the tenant was found");
    let chain = chain_of(region, group).await?;
    for number in chain.numbers(0).await? {
        for entry in chain.read(number).await?.entries {
            let entry = decode_entry(&entry).context("an entry of the chain")?;
            if let Payload::Sealed(sealed) = machine_entry(entry).payload {
                let generation = kms::seal::generation_of(&sealed)?;
                if let Some(key) = keys.generation(generation) {
                    let salt = &sealed[5..21];
                    let key = key.derive(salt, b"holdfast/v1/seal/log-entry");
                    all.push(("a sealer's key".into(), Arc::new(key)));
                }
            }
        }
    }
    ensure!(all.len() > files, "no sealed entry of the tenant was found");
    let mut found = BTreeMap::new();
    for (what, key) in all {
        found.insert(
            memory::round_keys(key.expose()),
            format!("{what}, expanded"),
        );
        found.insert(*key.expose(), what);
    }
    Ok(found)
}

/// What of `material` lies in each node's memory, once for each time that it does.
fn in_memory(region: &Region, material: &BTreeMap<[u8; 32], String>) -> Result<Vec<Vec<String>>> {
    let needles: Vec<[u8; 32]> = material.keys().copied().collect();
    let of = |node: &holdfast_tests::region::NodeProcess| {
        let pid = node.pid().context("the node runs")?;
        let counted = memory::count(pid, &needles)?.into_iter();
        let found = counted.zip(material.values());
        Ok(found.flat_map(|(n, what)| vec![what.clone(); n]).collect())
    };
    region.nodes.iter().map(of).collect()
}

/// Waits until each node says that sealing is over: a request that is on its way may hold the keys until
/// then, for a while after the first refusal.
async fn sealing_is_over(region: &Region, tenant: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let reports = region.tenant(0, tenant).await?.key_reports;
        let over = |r: &KeyReport| r.sealed_ms >= r.refused_ms && r.sealed_ms > 0;
        if reports.len() == region.nodes.len() && reports.iter().all(over) {
            return Ok(());
        }
        ensure!(began.elapsed() < BOUND, "not over: {reports:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Row 26, and the life of a sealed tenant: it is refused everywhere with the reason, its keys are
/// gone from memory, its neighbour is not touched; what was acknowledged reaches the archive; nodes
/// and region restart; and when the key is enabled it goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_tenant_is_sealed_lives_on_and_resumes() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    region
        .create_tenant("globex", "enhanced", 1_000, 60_000)
        .await?;
    let acme = Writer::start(&region, "acme").await?;
    let globex = Writer::start(&region, "globex").await?;
    let mut at_nodes = Served::connect(&region, "acme").await?;
    acme.past(200).await?;
    globex.past(200).await?;
    // A restart opens files, so that there are file keys in memory beside the sealer's.
    let other = (region.leader("acme").await? + 1) % 3;
    region.nodes[other].kill();
    region.start(other)?;
    region.serving().await?;
    region.archived("acme").await?;
    let shown = region.tenant(0, "acme").await?;
    let before = in_memory(&region, &material(&region, &shown).await?)?;
    ensure!(
        before.iter().all(|found| !found.is_empty()),
        "not found before: {before:?}"
    );

    region.keyfile().set_state("acme", KeyState::Disabled)?;
    let took = at_nodes.sealed("disabled", BOUND).await?;
    println!("sealed on each node {took} after the key was disabled");
    sealing_is_over(&region, "acme").await?;
    // The files of the end have keys of their own.
    let needles = material(&region, &shown).await?;
    let after = in_memory(&region, &needles)?;
    ensure!(
        after.iter().all(Vec::is_empty),
        "still in memory: {after:?} of {}",
        needles.len()
    );
    let times: Vec<usize> = before.iter().map(Vec::len).collect();
    println!(
        "{} keys and schedules: in memory {times:?} times before, not once after",
        needles.len()
    );
    let acknowledged = acme.stop().await?;
    let shown = region.operate(&["tenant", "show", "acme"]).await?;
    ensure!(shown.contains("sealed on all nodes"), "{shown}");
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(events.matches(" sealed ").count() >= 3, "{events}");
    // Ciphertext still reaches the archive.
    region.archived("acme").await?;

    // The neighbour goes on, a node restarts, then all of them: sealed all the while.
    region.nodes[0].kill();
    region.start(0)?;
    region.serving().await?;
    ensure!(at_nodes.refusals().await.iter().all(Option::is_some));
    let others = globex.stop().await?;
    check_all(&region, "globex", &others).await?;
    region.kill_all();
    region.start_all()?;
    region.serving().await?;
    check_all(&region, "globex", &others).await?;
    at_nodes.sealed("disabled", BOUND).await?;

    region.keyfile().set_state("acme", KeyState::Enabled)?;
    let took = at_nodes.resumed(BOUND).await?;
    println!("resumed on each node {took} after the key was enabled");
    ensure!(acknowledged.len() > 50, "{}", acknowledged.len());
    check_all(&region, "acme", &acknowledged).await?;
    region.same_everywhere("acme").await?;
    region
        .client("acme")
        .await?
        .put("after", "it", None)
        .await?;
    Ok(())
}

/// A replica that is wiped while its tenant is sealed is filled from its peers without the key, and
/// serves when the key is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_tenant_is_replicated_to_an_empty_node() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 1_000, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    // More than a checkpoint's worth, so that the log is purged and files must be sent.
    let value = vec![7u8; 1 << 20];
    for n in 0..100 {
        client.put(format!("w/{n}"), value.clone(), None).await?;
    }
    let mut at_nodes = Served::connect(&region, "acme").await?;
    region.archived("acme").await?;
    // The log is purged once a second.
    tokio::time::sleep(Duration::from_secs(3)).await;
    region.keyfile().set_state("acme", KeyState::Disabled)?;
    at_nodes.sealed("disabled", BOUND).await?;
    let victim = (region.leader("acme").await? + 1) % 3;
    region.nodes[victim].kill();
    std::fs::remove_dir_all(&region.nodes[victim].config.data_dir)?;
    region.start(victim)?;
    region.serving().await?;
    let id = region.tenant(victim, "acme").await?.id;
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let data = region.nodes[victim].config.data_dir.join("tenants");
        let held: u64 = files_below(&data)
            .iter()
            .filter(|f| f.to_string_lossy().contains(&id))
            .filter_map(|f| std::fs::metadata(f).ok())
            .map(|m| m.len())
            .sum();
        let shown = region.tenant(victim, "acme").await?;
        if held > 1 << 20 && shown.voters.len() == 3 && shown.problem.contains("sealed") {
            break;
        }
        ensure!(Instant::now() < deadline, "{held} bytes, {shown:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    region.keyfile().set_state("acme", KeyState::Enabled)?;
    at_nodes.resumed(BOUND).await?;
    region.same_everywhere("acme").await?;
    let mut client = region.client_at("acme", &[victim]).await?;
    ensure!(client.get("w/99", None).await?.kvs()[0].value() == value);
    Ok(())
}

/// Rows 25 to 27 with LocalStack: a key pending deletion, one that is denied, one that the KMS does
/// not answer for; nobody else is sealed, and each resumes.
#[tokio::test(flavor = "multi_thread")]
async fn a_kms_that_refuses_denies_or_is_silent() -> Result<()> {
    let localstack = servers::localstack().await?;
    let mut arns = Vec::new();
    for _ in 0..3 {
        arns.push(create_key(&localstack.endpoint).await?);
    }
    let proxy = Proxy::start(&localstack.endpoint).await?;
    let mut region = Region::new()?;
    region.on_kms(&proxy.endpoint)?;
    region.start_all()?;
    region.serving().await?;
    let names = ["deleted", "denied", "silent"];
    let mut at = Vec::new();
    for (name, arn) in names.iter().zip(&arns) {
        region
            .create_tenant_with(name, "enhanced", 1_000, 60_000, arn, "app")
            .await?;
        region.client(name).await?.put("w/0", "0", None).await?;
        at.push(Served::connect(&region, name).await?);
    }
    let shown = region
        .operate(&["tenant", "set", "silent", "--key-grace", "20s"])
        .await?;
    ensure!(shown.contains("20.0 s"), "{shown}");

    schedule_deletion(&localstack.endpoint, &arns[0]).await?;
    proxy.set(Mode::Deny(arns[1].clone()));
    let took = at[0].sealed("pending deletion", BOUND).await?;
    println!("pending deletion: sealed after {took}");
    at[1].sealed("access denied", BOUND).await?;
    ensure!(at[2].refusals().await.iter().all(Option::is_none));
    with_key(&localstack.endpoint, "CancelKeyDeletion", &arns[0]).await?;
    with_key(&localstack.endpoint, "EnableKey", &arns[0]).await?;
    proxy.set(Mode::Pass);
    let took = at[0].resumed(BOUND).await?;
    println!("deletion cancelled: resumed after {took}");
    at[1].resumed(BOUND).await?;

    // No answer is no proof: the default grace is ten minutes, one tenant's is 20 s.
    proxy.set(Mode::Silence);
    at[2]
        .sealed("could not be proven", Duration::from_secs(90))
        .await?;
    for clients in &mut at[..2] {
        let said = clients.refusals().await;
        ensure!(said.iter().all(Option::is_none), "{said:?}");
    }
    let events = region.operate(&["events"]).await?;
    ensure!(events.contains("key-unproven"), "{events}");
    proxy.set(Mode::Pass);
    at[2].resumed(BOUND).await?;
    // Throttling is no proof either.
    proxy.set(Mode::Throttle);
    for (name, clients) in names.iter().zip(&mut at[..2]) {
        let throttled = |t: &Tenant| {
            let reports = t.key_reports.iter();
            reports
                .filter(|r| r.unproven.contains("Throttling"))
                .count()
                == 3
        };
        region.until(name, BOUND, throttled).await?;
        ensure!(clients.refusals().await.iter().all(Option::is_none));
    }
    Ok(())
}

/// Row 28: a key that is gone. The tenant is sealed, which is said to be for good; nothing is deleted,
/// nothing is served or taken in clear, and no restore brings it back.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_seals_for_good() -> Result<()> {
    let mut region = Region::started().await?;
    for name in ["acme", "globex"] {
        region.create_tenant(name, "enhanced", 200, 60_000).await?;
        region.client(name).await?.put("k", "v", None).await?;
        region.archived(name).await?;
    }
    let mut at_nodes = Served::connect(&region, "acme").await?;
    let path = region.keyfile().path().to_path_buf();
    let mut keys: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let gone = keys["keys"].as_object_mut().and_then(|k| k.remove("acme"));
    ensure!(gone.is_some(), "{keys}");
    // By a rename: whoever reads it sees the one file or the other.
    kms::local::write_private(&path, &serde_json::to_vec(&keys)?)?;
    let permanent = "A deleted key cannot be brought back";
    at_nodes.sealed(permanent, BOUND).await?;
    region.kill_all();
    region.start_all()?;
    region.serving().await?;
    at_nodes.sealed(permanent, BOUND).await?;
    for client in &mut at_nodes.0 {
        ensure!(client.put("k", "in clear", None).await.is_err());
    }
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(
        !ok && table.contains("acme is NOT restored") && table.contains("not found"),
        "{table}"
    );
    let found = region.client("globex").await?.get("k", None).await?;
    ensure!(found.kvs()[0].value() == b"v");
    Ok(())
}

/// A node that was stopped while the key was taken away answers nothing when it goes on, not even
/// what was asked of it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_answers_nothing_on_an_old_proof() -> Result<()> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    region.client("acme").await?.put("k", "v", None).await?;
    let mut at_nodes = Served::connect(&region, "acme").await?;
    ensure!(at_nodes.refusals().await.iter().all(Option::is_none));
    region.nodes[1].pause();
    region.keyfile().set_state("acme", KeyState::Disabled)?;
    // Longer than a question counts.
    tokio::time::sleep(kms::lease::LEASE + Duration::from_secs(1)).await;
    let mut asked = at_nodes.0[1].clone();
    let options = etcd_client::GetOptions::new().with_serializable();
    let asking = tokio::spawn(async move { asked.get("k", Some(options)).await });
    // It lies in the socket.
    tokio::time::sleep(Duration::from_millis(500)).await;
    region.nodes[1].resume();
    let answer = asking.await?;
    ensure!(
        answer.is_err(),
        "it was answered on a proof that is too old"
    );
    at_nodes.sealed("disabled", BOUND).await?;
    Ok(())
}

/// Row 29: old and new generations are read by everyone, after restarts and after a restore; a
/// rotation, or a change of the KMS key, goes on wherever it was interrupted.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_or_change_goes_on_wherever_it_was_interrupted() -> Result<()> {
    let mut region = Region::new()?;
    region.keyfile().add("acme-2")?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut acknowledged = Vec::new();
    let mut write = async |region: &Region, n: u64| -> Result<()> {
        let mut client = region.client("acme").await?;
        client.put(format!("w/{n}"), n.to_string(), None).await?;
        acknowledged.push(n);
        Ok(())
    };
    write(&region, 0).await?;
    let said = region.operate(&["key", "rotate", "acme"]).await?;
    ensure!(said.contains("generation 2"), "{said}");
    write(&region, 1).await?;
    let said = region
        .operate(&["key", "change", "acme", "--key", "local:acme-2"])
        .await?;
    ensure!(said.contains("generation 3"), "{said}");
    region
        .keyfile()
        .set_state("acme", KeyState::PendingDeletion)?;
    write(&region, 2).await?;

    let moments = [
        ("key-task-begun", "rotate"),
        ("generation-stored", "rotate"),
        ("generation-announced", "rotate"),
        ("key-task-done", "rotate"),
        ("generation-rewrapped", "change"),
        ("generation-stored", "change"),
        ("generation-announced", "change"),
    ];
    let mut under = 0;
    for (n, (moment, task)) in moments.iter().enumerate() {
        let key = format!("local:acme-{}", 3 + under);
        let asked = match *task {
            "rotate" => vec!["key", "rotate", "acme"],
            _ => {
                region.keyfile().add(&format!("acme-{}", 3 + under))?;
                under += 1;
                vec!["key", "change", "acme", "--key", &key]
            }
        };
        let died = interrupted(&mut region, moment, &asked).await?;
        let generation = n as u32 + 4;
        let done = |t: &Tenant| t.generation == generation && t.key_task.is_empty();
        region.until("acme", BOUND, done).await?;
        write(&region, 3 + n as u64).await?;
        println!("{task} killed at {moment} ({died} nodes): done after the restart");
    }
    check_all(&region, "acme", &acknowledged).await?;
    region.same_everywhere("acme").await?;
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    check_all(&region, "acme", &acknowledged).await
}

/// A copy of bucket and disks from before a key change does not open with the new KMS key, nor one
/// from after it with the old.
#[tokio::test(flavor = "multi_thread")]
async fn copies_from_before_and_after_a_key_change_stay_apart() -> Result<()> {
    let mut region = Region::new()?;
    region.keyfile().add("acme-2")?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    region.client("acme").await?.put("w/0", "0", None).await?;
    let id: TenantId = region
        .tenant(0, "acme")
        .await?
        .id
        .parse()
        .map_err(anyhow::Error::msg)?;
    let before = wrapped_keys(&region, id)?;
    region
        .operate(&["key", "change", "acme", "--key", "local:acme-2"])
        .await?;
    let after = wrapped_keys(&region, id)?;
    ensure!(
        before.len() == 4 && after.len() == 8,
        "{} {}",
        before.len(),
        after.len()
    );
    // Whoever holds only one of the two keys: the other's material is gone.
    for (copies, holds, opens) in [
        (&before, "acme-2", false),
        (&after, "acme", false),
        (&before, "acme", true),
        (&after, "acme-2", true),
    ] {
        let other = if holds == "acme" { "acme-2" } else { "acme" };
        let scratch = tempfile::tempdir()?;
        let own = scratch.path().join("keys.json");
        std::fs::copy(region.keyfile().path(), &own)?;
        let keyfile = Keyfile::new(&own);
        keyfile.set_state(other, KeyState::PendingDeletion)?;
        let mut providers = Providers::default();
        providers.set_local(Arc::new(keyfile), 1000.0);
        for copy in copies {
            let mut copy = copy.clone();
            let opened = WrappedKey::unwrap(std::slice::from_ref(&copy), &providers).await;
            ensure!(
                opened.is_ok() == opens,
                "generation {} with {holds}",
                copy.generation
            );
            if !opens {
                // Nor if it is said to be under that key.
                copy.key = KeyUri::Local(holds.into());
                let opened = WrappedKey::unwrap(&[copy], &providers).await;
                ensure!(opened.is_err());
            }
        }
    }
    Ok(())
}

/// Every copy of a tenant's wrapped keys, in the bucket and on disks.
fn wrapped_keys(region: &Region, id: TenantId) -> Result<Vec<WrappedKey>> {
    let mut found = Vec::new();
    for file in files_below(region.dir.path()) {
        let path = file.to_string_lossy();
        if path.contains(&format!("{id}/keys/")) || path.contains(&format!("keys/{id}-")) {
            found.push(serde_json::from_slice(&std::fs::read(&file)?)?);
        }
    }
    Ok(found)
}
