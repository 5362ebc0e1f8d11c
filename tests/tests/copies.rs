//! A tenant restored as a new one, beside the one that it is made of and under a key of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etcd_client::GetOptions;
use holdfast_tests::failpoint::interrupted;
use holdfast_tests::files::files_below;
use holdfast_tests::region::Region;
use kms::local::KeyState;

const KEYS: usize = 300;

/// A region with acme, and what it held at a revision before half of it was deleted.
async fn harmed() -> Result<(Region, i64, BTreeMap<String, String>)> {
    let region = Region::started().await?;
    region.keyfile().add("own")?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    for n in 0..KEYS {
        client.put(format!("k/{n:04}"), "old", None).await?;
        client.put(format!("k/{n:04}"), n.to_string(), None).await?;
    }
    let put = client.put("last", "value", None).await?;
    let revision = put.header().context("a header")?.revision();
    let before = region.rows("acme").await?;
    let range = etcd_client::DeleteOptions::new().with_range("k/0150");
    client.delete("k/0000", Some(range)).await?;
    region.archived("acme").await?;
    Ok((region, revision, before))
}

fn objects_of(region: &Region, id: &str) -> usize {
    let mut found = files_below(&region.bucket());
    found.retain(|file| file.to_string_lossy().contains(id));
    found.len()
}

/// The copy is what it was made of at that revision, rows and history and users; it takes
/// writes, is proven by a drill, and outlives the other tenant's key.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_the_tenant_of_that_moment_under_its_own_key() -> Result<()> {
    let (mut region, revision, before) = harmed().await?;
    let at = revision.to_string();
    let harmed = region.rows("acme").await?;
    ensure!(harmed.len() < before.len());
    let restore = ["restore", "tenant", "acme", "--revision", &at];
    let copy = [&restore[..], &["--as", "copy", "--key", "local:own"]].concat();
    let said = region.operate(&copy).await?;
    println!("{said}");
    ensure!(said.contains(&format!("revision {revision}")), "{said}");
    ensure!(
        region.rows("copy").await? == before,
        "the copy is another one"
    );
    ensure!(region.rows("acme").await? == harmed, "acme was touched");
    for (name, key, wanted) in [
        ("copy", "local:own", "already"),
        ("other", "local:nothing", "nothing"),
        ("Other", "local:own", "lower-case"),
    ] {
        let asked = [&restore[..], &["--as", name, "--key", key]].concat();
        let (ok, said) = region.holdfast(&asked).await?;
        ensure!(!ok && said.contains(wanted), "{name}: {said}");
        ensure!(
            region.tenant(0, "other").await.is_err(),
            "{name} is recorded"
        );
    }

    let mut client = region.client("copy").await?;
    let old = GetOptions::new().with_revision(revision - 1);
    let found = client.get("last", Some(old)).await?;
    ensure!(found.kvs().is_empty(), "its history is another one");
    let put = client.put("new", "written", None).await?;
    let written = put.header().context("a header")?.revision();
    ensure!(
        written == revision + 1,
        "revision {written} after {revision}"
    );
    region.same_everywhere("copy").await?;
    region.archived("copy").await?;
    let said = region.operate(&["drill", "run", "copy"]).await?;
    ensure!(said.contains("passed"), "{said}");
    let said = region.operate(&["archive", "scrub", "copy"]).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");
    // Its one checkpoint is all that leads to what was copied; a scrub knows, and has another made.
    let id = region.tenant(0, "copy").await?.id;
    let mut files = files_below(&region.bucket());
    files.retain(|file| file.to_string_lossy().contains(&format!("/{id}/files/")));
    files.sort_by_key(|file| file.metadata().map_or(0, |m| m.len()));
    std::fs::remove_file(files.last().context("it has files")?)?;
    let said = region.operate(&["archive", "scrub", "copy"]).await?;
    ensure!(said.contains("nothing can be restored"), "{said}");
    ensure!(said.contains("A new checkpoint was made"), "{said}");
    region.operate(&["archive", "sweep", "copy"]).await?;
    println!("{}", region.operate(&["archive", "ls", "copy"]).await?);

    // It has a history of its own, which begins where it was made.
    client.put("new", "later", None).await?;
    region.archived("copy").await?;
    let asked = [
        "restore",
        "tenant",
        "copy",
        "--revision",
        &written.to_string(),
    ];
    region.operate(&asked).await?;
    let rows = region.rows("copy").await?;
    ensure!(
        rows.get("new").is_some_and(|v| v == "written"),
        "not at {written}"
    );
    let early = (revision - 1).to_string();
    let asked = ["restore", "tenant", "copy", "--revision", &early];
    let (ok, said) = region.holdfast(&asked).await?;
    ensure!(!ok && said.contains("the archive begins at"), "{said}");

    // The key of the tenant that it was made of goes.
    tokio::time::sleep(Duration::from_secs(3)).await;
    region.archived("copy").await?;
    region.keyfile().set_state("acme", KeyState::Disabled)?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(!ok && table.contains("acme is NOT restored"), "{table}");
    ensure!(!table.contains("copy is NOT restored"), "{table}");
    ensure!(region.rows("copy").await? == rows, "the copy is lost");
    Ok(())
}

/// Killed at each step: the tenant that it is made of serves as before, and what was begun is deleted
/// by its name, so that nothing of it is left and the same command succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_dies_is_deleted_and_made_again() -> Result<()> {
    let (mut region, revision, before) = harmed().await?;
    let at = revision.to_string();
    let copy = [
        "restore",
        "tenant",
        "acme",
        "--revision",
        &at,
        "--as",
        "copy",
        "--key",
        "local:own",
    ];
    for step in [
        "copy-recorded",
        "copy-made",
        "copy-uploaded",
        "restore-laid",
    ] {
        interrupted(&mut region, step, &copy).await?;
        let shown = region.tenant(0, "copy").await?;
        ensure!(
            shown.problem.contains("made of tenant acme"),
            "{step}: {}",
            shown.problem
        );
        let (ok, said) = region.holdfast(&copy).await?;
        ensure!(!ok && said.contains("already"), "{step}: {said}");
        region
            .operate(&["tenant", "delete", "copy", "--grace", "0s"])
            .await?;
        let left = objects_of(&region, &format!("tenants/{}", shown.id));
        ensure!(left == 0, "{step}: {left} objects are left");
        println!("{step}: deleted, nothing is left");
    }
    region.operate(&copy).await?;
    ensure!(
        region.rows("copy").await? == before,
        "the copy is another one"
    );
    region.same_everywhere("copy").await?;
    region.same_everywhere("acme").await
}
