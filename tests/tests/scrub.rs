//! Scrub: what is damaged or missing in the bucket is found, named, and healed from the live replicas.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use holdfast_tests::files::{files_below, flip};
use holdfast_tests::region::Region;

const KEYS: usize = 200;

async fn fill(region: &Region, from: usize) -> Result<()> {
    let mut client = region.client("acme").await?;
    for n in from..from + KEYS {
        client.put(format!("k/{n:04}"), n.to_string(), None).await?;
    }
    region.archived("acme").await
}

/// Objects of the tenant whose path holds `what`, the largest first.
fn objects(region: &Region, what: &str) -> Vec<PathBuf> {
    let mut found = files_below(&region.bucket());
    found.retain(|file| file.to_string_lossy().contains(what));
    found.sort_by_key(|file| std::cmp::Reverse(file.metadata().map_or(0, |m| m.len())));
    found
}

fn name(object: &std::path::Path) -> Result<String> {
    let name = object.file_name().context("it has a name")?;
    Ok(name.to_string_lossy().into_owned())
}

async fn scrub(region: &Region) -> Result<String> {
    region.operate(&["archive", "scrub", "acme"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_named_and_healed() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let id = region.tenant(0, "acme").await?.id;
    let below = |what: &str| format!("/{id}/{what}");
    for round in 0..2 {
        fill(&region, round * KEYS).await?;
        region.operate(&["archive", "checkpoint", "acme"]).await?;
    }
    let said = scrub(&region).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");

    for harm in ["flipped", "gone"] {
        let files = objects(&region, &below("files/"));
        let object = files.first().context("there are files")?;
        let harmed = name(object)?;
        match harm {
            "flipped" => flip(std::slice::from_ref(object))?,
            _ => std::fs::remove_file(object)?,
        }
        let (ok, said) = region.holdfast(&["drill", "run", "acme"]).await?;
        println!("{harm}, a drill: {ok}");
        let found = scrub(&region).await?;
        println!("{found}");
        ensure!(
            found.contains(&harmed) && found.contains("every moment can still be restored"),
            "{harm}: {found}\n{said}"
        );
        ensure!(
            found.contains("A new checkpoint was made"),
            "{harm}: {found}"
        );
        let said = region.operate(&["drill", "run", "acme"]).await?;
        ensure!(said.contains("passed"), "{harm}: {said}");
        let said = scrub(&region).await?;
        ensure!(
            said.contains("; 0 are damaged or missing"),
            "{harm}: {said}"
        );
    }
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(
        events.contains("archive-damaged") && events.contains("archive-healed"),
        "{events}"
    );

    // In the grace of its deletion too: it may be brought back.
    region.operate(&["tenant", "delete", "acme"]).await?;
    let said = scrub(&region).await?;
    ensure!(said.contains("; 0 are damaged or missing"), "{said}");
    region.operate(&["tenant", "undelete", "acme"]).await?;

    // The first link: what it leads to is lost, and said to be; the newest state is not.
    let mut links = objects(&region, &below("0000000001/chain/"));
    links.sort();
    let link = &links[0];
    flip(std::slice::from_ref(link))?;
    let found = scrub(&region).await?;
    ensure!(
        found.contains(&name(link)?) && found.contains("cannot be restored"),
        "{found}"
    );
    let (ok, said) = region
        .holdfast(&["restore", "tenant", "acme", "--revision", "2"])
        .await?;
    ensure!(!ok && said.contains(&name(link)?), "{said}");
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    let rows = region.rows("acme").await?;
    ensure!(rows.len() == 2 * KEYS, "{} rows", rows.len());
    Ok(())
}
