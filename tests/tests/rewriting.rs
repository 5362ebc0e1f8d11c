//! Moving a tenant to its newest key generation, and what is refused and restored afterwards.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use daemon::proto::admin::Tenant;
use holdfast_tests::failpoint::{interrupted, killed_at};
use holdfast_tests::files::files_below;
use holdfast_tests::opened::chain_of;
use holdfast_tests::region::Region;
use holdfast_tests::writer::{Writer, check_all};
use rand::Rng;
use replication::GroupId;
use replication::engine::env::generation_of;
use replication::group::types::{decode_entry, machine_entry};
use replication::machine::Payload;

const DONE_WITHIN: Duration = Duration::from_secs(90);

/// The generations that a tenant's files are under, in the bucket and on the nodes.
fn of_files(region: &Region, id: &str) -> BTreeSet<u32> {
    let files = files_below(region.dir.path()).into_iter();
    let files = files.filter(|f| f.to_string_lossy().contains(id));
    files
        .filter_map(|f| generation_of(&std::fs::read(f).ok()?))
        .collect()
}

/// Generations of which there is a wrapped key, in the bucket or on a node.
fn of_keys(region: &Region, id: &str) -> BTreeSet<u32> {
    let files = files_below(region.dir.path()).into_iter();
    let generation = |file: PathBuf| {
        let name = file.file_name()?.to_string_lossy().into_owned();
        let in_bucket = file.to_string_lossy().contains(&format!("{id}/keys/"));
        let number = match in_bucket {
            true => name,
            false => name
                .strip_prefix(&format!("{id}-"))?
                .strip_suffix(".json")?
                .into(),
        };
        number.parse().ok()
    };
    files.filter_map(generation).collect()
}

/// Objects of a tenant's chain or checkpoints in the bucket, in order.
fn objects(region: &Region, id: &str, what: &str) -> Vec<PathBuf> {
    let wanted = format!("/{id}/{:010}/{what}/", 1);
    let mut found = files_below(&region.bucket());
    found.retain(|file| file.to_string_lossy().contains(&wanted));
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    for file in files_below(from) {
        let target = to.join(file.strip_prefix(from)?);
        std::fs::create_dir_all(target.parent().context("it has a parent")?)?;
        std::fs::copy(file, target)?;
    }
    Ok(())
}

async fn acme(rpo_ms: u64) -> Result<Region> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", rpo_ms, 60_000)
        .await?;
    Ok(region)
}

/// Under load: afterwards no file, log entry or object is under an older generation, its wrapped keys
/// are gone everywhere, and nodes and region come back with every acknowledged write.
#[tokio::test(flavor = "multi_thread")]
async fn everything_is_rewritten_and_the_old_generations_are_destroyed() -> Result<()> {
    let mut region = acme(200).await?;
    let mut client = region.client("acme").await?;
    // More than a checkpoint's worth: there are tables on several levels, and some in the bucket.
    let mut value = vec![0u8; 1 << 20];
    rand::rng().fill(&mut value[..]);
    for n in 0..80 {
        client.put(format!("big/{n}"), value.clone(), None).await?;
    }
    region.operate(&["key", "rotate", "acme"]).await?;
    let load = Writer::start(&region, "acme").await?;
    load.past(100).await?;
    let id = region.tenant(0, "acme").await?.id;
    ensure!(of_files(&region, &id).contains(&1));
    ensure!(of_keys(&region, &id) == BTreeSet::from([1, 2]));
    let before = objects(&region, &id, "chain").len();

    let said = region
        .operate(&["key", "rotate", "acme", "--rewrite"])
        .await?;
    ensure!(
        said.contains("Everything of acme is under generation 3"),
        "{said}"
    );
    // Writes went on, and go on.
    let count = load.count();
    ensure!(count > 200, "{count}");
    load.past(count + 50).await?;
    let acknowledged = load.stop().await?;
    region.archived("acme").await?;
    let (files, keys) = (of_files(&region, &id), of_keys(&region, &id));
    ensure!(files == BTreeSet::from([3]), "files: {files:?}");
    ensure!(keys == BTreeSet::from([3]), "wrapped keys: {keys:?}");
    let shown = region.tenant(0, "acme").await?;
    ensure!(shown.other_generations.is_empty(), "{shown:?}");
    ensure!(shown.key_reports.iter().all(|r| r.held == [3]), "{shown:?}");
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(events.contains("rewritten"), "{events}");
    println!(
        "{before} links before it; after it {}",
        objects(&region, &id, "chain").len()
    );
    let group = GroupId {
        tenant: id.parse().map_err(anyhow::Error::msg)?,
        incarnation: 1,
    };
    // The first link that is left only says where the chain stands.
    let chain = chain_of(&region, group).await?;
    for number in &chain.numbers(0).await?[1..] {
        for entry in chain.read(*number).await?.entries {
            let entry = decode_entry(&entry).context("an entry of a link")?;
            if let Payload::Sealed(sealed) = machine_entry(entry).payload {
                ensure!(kms::seal::generation_of(&sealed)? == 3, "link {number}");
            }
        }
    }
    region.same_everywhere("acme").await?;

    region.kill_all();
    region.start_all()?;
    region.serving().await?;
    check_all(&region, "acme", &acknowledged).await?;
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    check_all(&region, "acme", &acknowledged).await?;
    let mut client = region.client("acme").await?;
    for n in 0..80 {
        let found = client.get(format!("big/{n}"), None).await?;
        ensure!(found.kvs()[0].value() == value);
    }
    // Again, before the next incarnation has a checkpoint of its own: it begins with the one of before.
    region.operate(&["drill", "run", "acme"]).await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    check_all(&region, "acme", &acknowledged).await?;
    // The next incarnation, whose archive begins in the one before: that is let go of as well.
    region
        .operate(&["key", "rotate", "acme", "--rewrite"])
        .await?;
    let (files, keys) = (of_files(&region, &id), of_keys(&region, &id));
    let newest = BTreeSet::from([4]);
    ensure!(files == newest && keys == newest, "{files:?} {keys:?}");
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    check_all(&region, "acme", &acknowledged).await
}

/// The daemon killed at each step: the rewriting goes on to its end, and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_rewriting_goes_on_wherever_it_was_interrupted() -> Result<()> {
    let mut region = acme(200).await?;
    let mut acknowledged = Vec::new();
    for (n, moment) in [
        "replica-rewritten",
        "archive-begun",
        "archive-proven",
        "archive-shortened",
        "generations-dropped",
        "generations-destroyed",
    ]
    .iter()
    .enumerate()
    {
        let mut client = region.client("acme").await?;
        client.put(format!("w/{n}"), n.to_string(), None).await?;
        acknowledged.push(n as u64);
        let asked = ["key", "rotate", "acme", "--rewrite"];
        let died = interrupted(&mut region, moment, &asked).await?;
        let generation = n as u32 + 2;
        let done = |t: &Tenant| t.generation == generation && t.key_task.is_empty();
        let shown = region.until("acme", DONE_WITHIN, done).await?;
        let (files, keys) = (of_files(&region, &shown.id), of_keys(&region, &shown.id));
        let newest = BTreeSet::from([generation]);
        ensure!(
            files == newest && keys == newest,
            "{moment}: {files:?} {keys:?}"
        );
        check_all(&region, "acme", &acknowledged).await?;
        println!("killed at {moment} ({died} nodes): done after the restart");
    }
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    check_all(&region, "acme", &acknowledged).await
}

/// Row 29: a copy of the bucket made before, during and after a rotation and a rewriting restores,
/// each to what was acknowledged then.
#[tokio::test(flavor = "multi_thread")]
async fn backups_from_before_during_and_after_a_rotation_restore() -> Result<()> {
    let mut region = acme(100).await?;
    let backups = tempfile::tempdir()?;
    let mut acknowledged: Vec<u64> = Vec::new();
    let mut counts = Vec::new();
    for (n, moment) in [
        "",
        "generation-announced",
        "",
        "archive-shortened",
        "generations-dropped",
        "",
    ]
    .iter()
    .enumerate()
    {
        let mut client = region.client("acme").await?;
        client.put(format!("w/{n}"), n.to_string(), None).await?;
        acknowledged.push(n as u64);
        region.archived("acme").await?;
        let asked: &[&str] = match *moment {
            "generation-announced" => &["key", "rotate", "acme"],
            _ => &["key", "rotate", "acme", "--rewrite"],
        };
        if moment.is_empty() {
            region.kill_all();
        } else {
            killed_at(&mut region, moment, asked).await?;
        }
        copy(&region.bucket(), &backups.path().join(n.to_string()))?;
        counts.push(acknowledged.len());
        region.start_all()?;
        region.serving().await?;
        let idle = |t: &Tenant| t.key_task.is_empty();
        region.until("acme", DONE_WITHIN, idle).await?;
    }
    for (n, count) in counts.iter().enumerate() {
        region.kill_all();
        std::fs::remove_dir_all(region.bucket())?;
        copy(&backups.path().join(n.to_string()), &region.bucket())?;
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(ok, "backup {n}: {table}");
        check_all(&region, "acme", &acknowledged[..*count]).await?;
        println!("backup {n} holds its {count} writes");
    }
    Ok(())
}

/// Row 30: another tenant's manifest, or its link, in the place of a tenant's own.
#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_manifest_or_link_is_refused() -> Result<()> {
    for what in ["checkpoints", "chain"] {
        let mut region = acme(100).await?;
        region
            .create_tenant("globex", "enhanced", 100, 60_000)
            .await?;
        let mut newest = Vec::new();
        for name in ["acme", "globex"] {
            // Links of before, which the rewriting removes.
            for n in 0..3 {
                let mut client = region.client(name).await?;
                client.put(format!("before/{n}"), "it", None).await?;
                region.archived(name).await?;
            }
            region
                .operate(&["key", "rotate", name, "--rewrite"])
                .await?;
            let mut client = region.client(name).await?;
            for n in 0..20u64 {
                client.put(format!("w/{n}"), n.to_string(), None).await?;
            }
            region.archived(name).await?;
            let id = region.tenant(0, name).await?.id;
            let last = objects(&region, &id, what).pop();
            newest.push(last.with_context(|| format!("{name} has {what}"))?);
        }
        region.kill_all();
        std::fs::copy(&newest[1], &newest[0])?;
        let name = newest[0].file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let (ok, table) = region.lose_and_restore().await?;
        ensure!(
            !ok && table.contains("acme is NOT restored") && table.contains(&name),
            "{what} {name}: {table}"
        );
        let writes: Vec<u64> = (0..20).collect();
        check_all(&region, "globex", &writes).await?;
        println!("{what}: {table}");
    }
    Ok(())
}
