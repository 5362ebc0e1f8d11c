//! Recovery drills: what they prove, what they leave, and what they say of a damaged archive.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use daemon::drill::Evidence;
use daemon::signed::Signed;
use holdfast_tests::files::files_below;
use holdfast_tests::region::Region;
use holdfast_tests::writer::Writer;

const WITHIN: Duration = Duration::from_secs(60);

async fn acme() -> Result<Region> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    for n in 0..300 {
        client.put(format!("k/{n:03}"), n.to_string(), None).await?;
    }
    region.archived("acme").await?;
    Ok(region)
}

async fn newest(region: &Region) -> Result<(String, Evidence)> {
    let shown = region.operate(&["drill", "show", "acme"]).await?;
    let signed: Signed = serde_json::from_str(&shown)?;
    Ok((shown, serde_json::from_str(&signed.body)?))
}

/// A drill beside a load: it passes, leaves signed evidence and a page, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_drill_proves_a_restore_and_leaves_evidence() -> Result<()> {
    let region = acme().await?;
    let load = Writer::start(&region, "acme").await?;
    load.past(50).await?;
    let said = region.operate(&["drill", "run", "acme"]).await?;
    ensure!(said.contains("The drill of acme passed"), "{said}");
    println!("{said}");
    let count = load.count();
    load.past(count + 50).await?;
    load.stop().await?;
    let (shown, evidence) = newest(&region).await?;
    ensure!(
        evidence.passed && evidence.sample.keys == 64,
        "{evidence:?}"
    );
    ensure!(
        evidence.sample.differ == 0 && evidence.sample.not_comparable == 0,
        "{evidence:?}"
    );
    ensure!(
        evidence.revision > 300 && evidence.links > 0,
        "{evidence:?}"
    );
    let steps: Vec<&str> = evidence.phases.iter().map(|p| p.name.as_str()).collect();
    ensure!(
        steps
            == [
                "keys unwrapped",
                "planned",
                "replayed",
                "verified",
                "compared"
            ],
        "{steps:?}"
    );

    let file = region.dir.path().join("drill.json");
    let (name, ca) = (file.display().to_string(), region.dir.path().join("ca.pem"));
    let ca = ca.display().to_string();
    std::fs::write(&file, &shown)?;
    let verify = ["drill", "verify", name.as_str(), "--ca", ca.as_str()];
    let said = region.operate(&verify).await?;
    ensure!(said.contains("valid: signed by"), "{said}");
    std::fs::write(&file, shown.replace(r#"\"differ\":0"#, r#"\"differ\":1"#))?;
    let (ok, said) = region.holdfast(&verify).await?;
    ensure!(!ok && said.contains("changed"), "{said}");

    let page = region.operate(&["drill", "show", "acme", "--html"]).await?;
    ensure!(page.contains("<svg") && page.contains("passed"), "{page}");
    ensure!(
        !page.contains("http") && !page.contains("<script"),
        "it needs nothing else"
    );
    let listed = region.operate(&["drill", "ls", "acme"]).await?;
    ensure!(listed.contains("passed"), "{listed}");
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(events.contains("drill-passed"), "{events}");
    let objectives = region.operate(&["objectives"]).await?;
    ensure!(!objectives.contains("none yet"), "{objectives}");
    println!("{objectives}");
    let left: Vec<PathBuf> = files_below(region.dir.path())
        .into_iter()
        .filter(|f| f.to_string_lossy().contains("/drill/"))
        .collect();
    ensure!(left.is_empty(), "the place is left: {left:?}");
    let archive = region.operate(&["archive", "ls", "acme"]).await?;
    ensure!(
        archive.contains("can be restored from its beginning on"),
        "{archive}"
    );
    println!("{archive}");
    Ok(())
}

/// A damaged object fails the drill by name; the tenant serves on, and the objectives say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_drill_of_a_damaged_archive_fails_by_name() -> Result<()> {
    let region = acme().await?;
    let id = region.tenant(0, "acme").await?.id;
    let mut links = files_below(&region.bucket());
    links.retain(|f| {
        f.to_string_lossy()
            .contains(&format!("{id}/0000000001/chain/"))
    });
    links.sort();
    let damaged = &links[links.len() / 2];
    let mut bytes = std::fs::read(damaged)?;
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(damaged, bytes)?;
    let (ok, said) = region.holdfast(&["drill", "run", "acme"]).await?;
    let name = damaged
        .file_name()
        .context("a name")?
        .to_string_lossy()
        .into_owned();
    ensure!(
        !ok && said.contains("FAILED") && said.contains(&name),
        "{said}"
    );
    println!("{said}");
    let (_, evidence) = newest(&region).await?;
    ensure!(
        !evidence.passed && evidence.problem.contains(&name),
        "{evidence:?}"
    );
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(events.contains("drill-failed"), "{events}");
    let (ok, objectives) = region.holdfast(&["objectives"]).await?;
    ensure!(
        !ok && objectives.contains("its newest drill failed"),
        "{objectives}"
    );
    let mut client = region.client("acme").await?;
    client.put("on", "and on", None).await?;
    // A new checkpoint heals it.
    region
        .operate(&["key", "rotate", "acme", "--rewrite"])
        .await?;
    let said = region.operate(&["drill", "run", "acme"]).await?;
    ensure!(said.contains("passed"), "{said}");
    Ok(())
}

/// Drills come by themselves, on a node that does not lead; a sealed tenant's is refused.
#[tokio::test(flavor = "multi_thread")]
async fn drills_are_run_by_themselves() -> Result<()> {
    let region = acme().await?;
    region
        .operate(&["tenant", "set", "acme", "--drill-every", "8s"])
        .await?;
    let deadline = Instant::now() + WITHIN;
    let listed = loop {
        let listed = region.operate(&["drill", "ls", "acme"]).await?;
        if listed.matches("passed").count() >= 2 {
            break listed;
        }
        ensure!(Instant::now() < deadline, "no second drill: {listed}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let leader = region.tenant(0, "acme").await?.leader;
    ensure!(
        !listed.contains(&leader),
        "{leader} leads and drills: {listed}"
    );
    region
        .operate(&["tenant", "set", "acme", "--drill-every", "0s"])
        .await?;
    region
        .keyfile()
        .set_state("acme", kms::local::KeyState::Disabled)?;
    let sealed = |t: &daemon::proto::admin::Tenant| {
        t.key_reports.len() == 3 && t.key_reports.iter().all(|r| !r.sealed.is_empty())
    };
    region.until("acme", WITHIN, sealed).await?;
    let (ok, said) = region.holdfast(&["drill", "run", "acme"]).await?;
    ensure!(!ok && said.contains("sealed"), "{said}");
    Ok(())
}
