//! Points in time: a tenant restored to any revision or moment of its history, and in place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use etcd_client::{Client, DeleteOptions, GetOptions, Txn, TxnOp};
use holdfast_tests::failpoint::interrupted;
use holdfast_tests::files::files_below;
use holdfast_tests::opened::{chain_of, keys_of};
use holdfast_tests::region::Region;
use holdfast_tests::writer::Writer;
use kms::TenantKeys;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replication::GroupId;
use replication::archive::chain::Chain;
use replication::command::EntryCodec;
use replication::engine::{Budget, Ciphering};
use replication::group::types::{decode_entry, machine_entry};
use replication::machine::Payload;
use replication::mvcc::digest::{Digest, Hasher};
use replication::mvcc::record::Record;
use replication::restore::{self, Point, Rebuilt, RestoreError, plan};

const REVISIONS: usize = 1000;
const WRITERS: usize = 8;
const WITHIN: Duration = Duration::from_secs(30);

/// What one write did, as its answer says it: keys put with their values, and keys deleted.
#[derive(Clone, Default)]
struct Write {
    puts: Vec<(String, String)>,
    deletes: Vec<String>,
}

/// Writes of one client to keys of its own, by the revision that each was answered with.
async fn write_some(
    mut client: Client,
    writer: usize,
    count: usize,
    seed: u64,
) -> Result<Vec<(i64, Write)>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut done = Vec::new();
    let mut live: Vec<String> = Vec::new();
    for n in 0..count {
        let key = format!("{writer}/{}", rng.random_range(0..12));
        let mut write = Write::default();
        let revision = match rng.random_range(0..10) {
            0..6 => {
                write.puts.push((key.clone(), format!("{n}")));
                let put = client.put(key, format!("{n}"), None).await?;
                put.header().context("a header")?.revision()
            }
            6..8 => {
                let other = format!("{writer}/txn");
                write.puts = vec![(key, format!("{n}a")), (other, format!("{n}b"))];
                let puts = write.puts.iter();
                let puts = puts.map(|(k, v)| TxnOp::put(k.as_str(), v.as_str(), None));
                let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
                client
                    .txn(txn)
                    .await?
                    .header()
                    .context("a header")?
                    .revision()
            }
            kind => {
                let options = (kind == 9).then(|| DeleteOptions::new().with_prefix());
                let target = match kind {
                    9 => format!("{writer}/1"),
                    _ => key,
                };
                let prefix = kind == 9;
                write.deletes = live.clone();
                write.deletes.retain(|k| match prefix {
                    true => k.starts_with(&target),
                    false => *k == target,
                });
                // Each command is a revision.
                if write.deletes.is_empty() {
                    continue;
                }
                let deleted = client.delete(target, options).await?;
                ensure!(
                    deleted.deleted() as usize == write.deletes.len(),
                    "{deleted:?}"
                );
                deleted.header().context("a header")?.revision()
            }
        };
        live.retain(|k| !write.deletes.contains(k));
        for (key, _) in &write.puts {
            if !live.contains(key) {
                live.push(key.clone());
            }
        }
        done.push((revision, write));
    }
    Ok(done)
}

type Model = BTreeMap<String, Record>;

fn apply(model: &mut Model, revision: i64, write: &Write) {
    for key in &write.deletes {
        model.remove(key);
    }
    for (key, value) in &write.puts {
        let before = model.get(key);
        let record = Record {
            create: before.map_or(revision, |r| r.create),
            modified: revision,
            version: before.map_or(1, |r| r.version + 1),
            lease: 0,
            value: Bytes::from(value.clone()),
        };
        model.insert(key.clone(), record);
    }
}

fn digest_of(model: &Model, hasher: &Hasher) -> Digest {
    let mut digest = Digest::default();
    for (key, record) in model {
        digest.add(hasher.hash(key.as_bytes(), &record.encode()));
    }
    digest
}

/// Has `WRITERS` clients write at once, `count` revisions together or a few more.
async fn history(region: &Region, count: usize, seed: u64) -> Result<Vec<(i64, Write)>> {
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let client = region.client("acme").await?;
        let each = count.div_ceil(WRITERS) * 6 / 5;
        writers.push(write_some(client, writer, each, seed + writer as u64));
    }
    let mut all: Vec<_> = futures::future::try_join_all(writers)
        .await?
        .into_iter()
        .flatten()
        .collect();
    all.sort_by_key(|(revision, _)| *revision);
    Ok(all)
}

struct Archive {
    chain: Chain,
    keys: Arc<TenantKeys>,
    hasher: Hasher,
    scratch: tempfile::TempDir,
}

impl Archive {
    async fn of(region: &Region, incarnation: u32) -> Result<Self> {
        let id = region.tenant(0, "acme").await?.id;
        let tenant = id.parse().map_err(anyhow::Error::msg)?;
        let group = GroupId {
            tenant,
            incarnation,
        };
        let keys = Arc::new(keys_of(region, tenant).await?);
        Ok(Archive {
            chain: chain_of(region, group).await?,
            hasher: Hasher::new(&keys),
            keys,
            scratch: tempfile::tempdir()?,
        })
    }

    async fn rebuilt(&self, point: Point) -> Result<Rebuilt, RestoreError> {
        let plan = plan::at(&self.chain, &self.chain.end().await?, point).await?;
        let budget = Budget::new(64 << 20, 8 << 20, Ciphering::Encrypted);
        let dir = self.scratch.path().join("rebuilt");
        restore::rebuild(
            &self.chain,
            &plan,
            self.keys.clone(),
            budget,
            &dir,
            Arc::new(|_| true),
        )
        .await
    }

    /// Effective time and last revision of each entry of incarnation `of`.
    async fn entries(&self, of: u32, mut revision: i64) -> Result<Vec<(u64, i64)>> {
        let chain = self.chain.of(of);
        let codec = EntryCodec::new(&self.keys, chain.group());
        let (mut time, mut found) = (0, Vec::new());
        for number in chain.numbers(0).await? {
            for entry in chain.read(number).await?.entries {
                let entry = decode_entry(&entry).context("an entry of a link")?;
                if let Payload::Sealed(sealed) = machine_entry(entry).payload {
                    let batch = codec.open(&sealed)?;
                    time = time.max(batch.time_ms);
                    // The first one makes the user.
                    if found.is_empty() {
                        found.push((time, revision));
                        continue;
                    }
                    revision += batch.commands.len() as i64;
                    found.push((time, revision));
                }
            }
        }
        Ok(found)
    }
}

/// Every revision of a history of a thousand, and every moment at which an entry was made, restores
/// to exactly that state, whose digest is a model's; also after the tenant went back in place,
/// and of the time that was gone back over.
#[tokio::test(flavor = "multi_thread")]
async fn every_revision_and_moment_restores_exactly() -> Result<()> {
    let region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 100, 60_000)
        .await?;
    let mut writes = history(&region, REVISIONS, 1).await?;
    ensure!(writes.len() >= REVISIONS, "{} revisions", writes.len());
    region.archived("acme").await?;
    // Back in place, and on from there.
    let (back_to, _) = writes[writes.len() / 3];
    region
        .operate(&[
            "restore",
            "tenant",
            "acme",
            "--revision",
            &back_to.to_string(),
        ])
        .await?;
    region.same_everywhere("acme").await?;
    let again = region.client("acme").await?;
    let later = write_after(again).await?;
    region.archived("acme").await?;

    let archive = Archive::of(&region, 2).await?;
    let mut model = Model::new();
    let mut digests = BTreeMap::from([(1, Digest::default())]);
    for (revision, write) in &writes {
        apply(&mut model, *revision, write);
        digests.insert(*revision, digest_of(&model, &archive.hasher));
    }
    let mut model = Model::new();
    let before = writes.iter().filter(|(revision, _)| *revision <= back_to);
    before.for_each(|(revision, write)| apply(&mut model, *revision, write));
    for (revision, write) in &later {
        apply(&mut model, *revision, write);
        digests.insert(*revision, digest_of(&model, &archive.hasher));
    }
    writes.extend(later);
    let mut cut = 0;
    for (revision, _) in &writes {
        let rebuilt = archive.rebuilt(Point::Revision(*revision)).await?;
        ensure!(
            rebuilt.state.revision == *revision,
            "{revision}: {:?}",
            rebuilt.state
        );
        ensure!(
            rebuilt.state.digests.keys == digests[revision],
            "revision {revision}"
        );
        cut += usize::from(rebuilt.cut.is_some());
    }
    println!(
        "{} revisions restore exactly, {cut} of them within an entry",
        writes.len()
    );
    ensure!(cut > 50, "only {cut} revisions lay within an entry");

    let entries = archive.entries(1, 1).await?;
    for (n, (time, _)) in entries.iter().enumerate().skip(1) {
        // Entries of one millisecond come together.
        let last = |at: u64| {
            entries
                .iter()
                .rev()
                .find(|(t, _)| *t <= at)
                .map(|(_, r)| *r)
        };
        for at in [*time, time - 1] {
            let Some(wanted) = last(at) else { continue };
            let rebuilt = archive.rebuilt(Point::Time(at)).await?;
            ensure!(
                rebuilt.state.revision == wanted && rebuilt.state.digests.keys == digests[&wanted],
                "entry {n}, at {at}: revision {}, not {wanted}",
                rebuilt.state.revision
            );
        }
    }
    println!("so do the moments of {} entries", entries.len());
    for (point, wanted) in [
        (
            Point::Revision(writes[writes.len() - 1].0 + 1),
            "was never reached",
        ),
        (Point::Revision(999_999_999), "was never reached"),
    ] {
        let refused = archive
            .rebuilt(point)
            .await
            .err()
            .context("it is refused")?;
        ensure!(refused.to_string().contains(wanted), "{refused}");
    }
    Ok(())
}

/// A few writes after a tenant went back, as soon as it takes writes.
async fn write_after(mut client: Client) -> Result<Vec<(i64, Write)>> {
    let deadline = tokio::time::Instant::now() + WITHIN;
    let mut done = Vec::new();
    while done.len() < 50 {
        let key = format!("after/{}", done.len() % 7);
        let value = done.len().to_string();
        match client.put(key.as_str(), value.as_str(), None).await {
            Ok(put) => {
                let write = Write {
                    puts: vec![(key, value)],
                    ..Write::default()
                };
                done.push((put.header().context("a header")?.revision(), write));
            }
            Err(e) => {
                ensure!(tokio::time::Instant::now() < deadline, "{e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    Ok(done)
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

/// A bad client deletes half of a tenant; it goes back to just before, beside another tenant's
/// load, and further; a node that was away joins; the region is lost and restored.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_goes_back_in_place() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    region
        .create_tenant("globex", "enhanced", 200, 60_000)
        .await?;
    let load = Writer::start(&region, "globex").await?;
    let mut client = region.client("acme").await?;
    for n in 0..200 {
        client.put(format!("k/{n:03}"), n.to_string(), None).await?;
    }
    let before = region.rows("acme").await?;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let at = replication::clock::utc(now_ms());
    tokio::time::sleep(Duration::from_millis(20)).await;
    let options = DeleteOptions::new().with_range("k/100");
    client.delete("k/", Some(options)).await?;
    let deleted = client.put("bad", "client", None).await?;
    let deleted = deleted.header().context("a header")?.revision();
    let after = region.rows("acme").await?;
    ensure!(after.len() == 101, "{}", after.len());

    // What cannot be is refused, and the tenant serves on.
    for (point, wanted) in [
        (["--at", "2999-01-01T00:00:00Z"], "has not come yet"),
        (["--at", "2001-01-01T00:00:00Z"], "nothing was written yet"),
        (["--revision", "5000"], "was never reached"),
    ] {
        let asked = [&["restore", "tenant", "acme"][..], &point[..]].concat();
        let (ok, said) = region.holdfast(&asked).await?;
        ensure!(!ok && said.contains(wanted), "{said}");
        ensure!(region.rows("acme").await? == after);
    }

    let away = (region.leader("acme").await? + 1) % 3;
    region.nodes[away].kill();
    let said = region
        .operate(&["restore", "tenant", "acme", "--at", &at])
        .await?;
    ensure!(said.contains("it is as it was at revision"), "{said}");
    ensure!(
        region.rows("acme").await? == before,
        "not what it was at {at}"
    );
    let mut client = region.client("acme").await?;
    let late = write_after(client.clone()).await?;
    ensure!(late[0].0 > 1_000_000_000, "{}", late[0].0);
    let old = GetOptions::new().with_revision(deleted);
    let refused = loop {
        let refused = client.get("bad", Some(old.clone())).await.err();
        let refused = refused.context("compacted")?;
        // The node that is away is asked in its turn.
        if !refused.to_string().contains("connect error") {
            break refused;
        }
    };
    ensure!(refused.to_string().contains("compacted"), "{refused}");
    region.start(away)?;
    region.serving().await?;
    region.same_everywhere("acme").await?;
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(events.contains("restored"), "{events}");

    // What was gone back over can be come to as well.
    let asked = deleted.to_string();
    region
        .operate(&["restore", "tenant", "acme", "--revision", &asked])
        .await?;
    ensure!(region.rows("acme").await? == after);
    region.same_everywhere("acme").await?;
    let shown = region.tenant(0, "acme").await?;
    ensure!(shown.incarnation == 3, "{shown:?}");
    let id = shown.id;
    let old: Vec<_> = files_below(region.dir.path())
        .into_iter()
        .map(|f| f.to_string_lossy().into_owned())
        .filter(|f| f.contains(&format!("tenants/{id}-1/")) || f.contains(&format!("{id}-2/")))
        .collect();
    ensure!(old.is_empty(), "replicas of before are left: {old:?}");
    let written = load.stop().await?;
    ensure!(written.len() > 100, "globex took {} writes", written.len());

    region.archived("globex").await?;
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    ensure!(region.rows("acme").await? == after);
    holdfast_tests::writer::check_all(&region, "globex", &written).await
}

/// The daemon killed at each step of going back: until the chain is closed the tenant is as it was or
/// withheld, and the same command brings it there.
#[tokio::test(flavor = "multi_thread")]
async fn going_back_is_gone_on_with_wherever_it_was_interrupted() -> Result<()> {
    let mut region = Region::started().await?;
    region
        .create_tenant("acme", "enhanced", 100, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    let mut wanted = BTreeMap::new();
    let mut revision = 0;
    for n in 0..20 {
        wanted.insert(format!("k/{n}"), n.to_string());
        let put = client.put(format!("k/{n}"), n.to_string(), None).await?;
        revision = put.header().context("a header")?.revision();
    }
    let revision = revision.to_string();
    let asked = ["restore", "tenant", "acme", "--revision", revision.as_str()];
    for moment in [
        "restore-withheld",
        "restore-closed",
        "restore-opened",
        "restore-laid",
    ] {
        let mut client = region.client("acme").await?;
        let deadline = tokio::time::Instant::now() + WITHIN;
        while let Err(e) = client.put("later", moment, None).await {
            ensure!(tokio::time::Instant::now() < deadline, "{moment}: {e}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        region.archived("acme").await?;
        let died = interrupted(&mut region, moment, &asked).await?;
        ensure!(died == 1, "{died} nodes died at {moment}");
        let refused = client.put("refused", moment, None).await.err();
        let refused = refused.context("a withheld tenant takes no write")?;
        ensure!(
            refused.to_string().contains("restored"),
            "{moment}: {refused}"
        );
        region.operate(&asked).await?;
        ensure!(region.rows("acme").await? == wanted, "{moment}");
        println!("killed at {moment}: done when asked again");
    }
    region.archived("acme").await?;
    let (ok, table) = region.lose_and_restore().await?;
    ensure!(ok, "{table}");
    ensure!(region.rows("acme").await? == wanted);
    Ok(())
}
