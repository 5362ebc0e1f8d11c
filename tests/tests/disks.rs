//! Disks: a filesystem that forgets what was never synced, a leader that dies before its own fsync,
//! flipped bits in files of the engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::Client;
use holdfast_tests::files::{files_below, flip};
use holdfast_tests::forgetful::Forgetful;
use holdfast_tests::region::Region;
use kms::{Secret, TenantId, TenantKeys};
use replication::engine::{Budget, Cf, Ciphering, Engine, link_dir};
use tokio::task::JoinSet;

/// A region whose nodes keep their data on a filesystem that forgets.
fn forgetful() -> Result<(Region, Forgetful)> {
    let mut region = Region::new()?;
    let disks = region.dir.path().join("disks");
    std::fs::create_dir(&disks)?;
    let filesystem = Forgetful::mount(&disks)?;
    region.configure(|_, config| config.data_dir = disks.join(&config.name))?;
    for node in &region.nodes {
        std::fs::create_dir(&node.config.data_dir)?;
    }
    std::fs::File::open(&disks)?.sync_all()?;
    Ok((region, filesystem))
}

/// Clients that write numbered keys one after the other, and count what was acknowledged.
struct Writers {
    acknowledged: Vec<Arc<AtomicU64>>,
    tasks: JoinSet<()>,
}

impl Writers {
    fn start(client: &Client, count: usize, from: u64) -> Self {
        let mut writers = Writers {
            acknowledged: Vec::new(),
            tasks: JoinSet::new(),
        };
        for writer in 0..count {
            let acknowledged = Arc::new(AtomicU64::new(from));
            let (mut client, own) = (client.clone(), acknowledged.clone());
            writers.acknowledged.push(acknowledged);
            writers.tasks.spawn(async move {
                loop {
                    let next = own.load(Ordering::SeqCst) + 1;
                    let key = format!("writer/{writer}/{next}");
                    if client.put(key, next.to_string(), None).await.is_err() {
                        return;
                    }
                    own.store(next, Ordering::SeqCst);
                }
            });
        }
        writers
    }

    fn total(&self) -> u64 {
        self.acknowledged
            .iter()
            .map(|own| own.load(Ordering::SeqCst))
            .sum()
    }

    /// Ends the writers, and looks that all of theirs is there.
    async fn check(mut self, client: &mut Client, from: u64) -> Result<u64> {
        while self.tasks.join_next().await.is_some() {}
        for (writer, own) in self.acknowledged.iter().enumerate() {
            for n in from + 1..=own.load(Ordering::SeqCst) {
                let found = client.get(format!("writer/{writer}/{n}"), None).await?;
                let found = found.kvs().first().map(|kv| kv.value().to_vec());
                ensure!(
                    found.as_deref() == Some(n.to_string().as_bytes()),
                    "writer/{writer}/{n} was acknowledged, and is {found:?}"
                );
            }
        }
        Ok(self.total())
    }
}

/// Row 12: power fails on every node at once, again and again: what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_the_loss_of_everything_unsynced() -> Result<()> {
    let (mut region, filesystem) = forgetful()?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut total = 0;
    for round in 0..3u64 {
        let client = region.client("acme").await?;
        let from = round * 1_000_000;
        let writers = Writers::start(&client, 8, from);
        tokio::time::sleep(Duration::from_millis(1500 + 400 * round)).await;
        region.kill_all();
        filesystem.forget(None);
        region.start_all()?;
        region.serving().await?;
        let mut client = region.client("acme").await?;
        total += writers.check(&mut client, from).await? - 8 * from;
    }
    ensure!(total > 300, "only {total} writes were acknowledged");
    println!("{total} acknowledged writes are there after three losses of power");
    region.same_everywhere("acme").await
}

/// Trap 0 of the design: the leader is killed between the followers' fsync and its own, and is back
/// within the election time-out. Every acknowledged write is there and all replicas are equal.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_killed_before_its_own_fsync_loses_nothing() -> Result<()> {
    let (mut region, filesystem) = forgetful()?;
    let filesystem = Arc::new(filesystem);
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    for round in 0..3u64 {
        let leader = region.leader("acme").await?;
        let client = region.client_at("acme", &[leader]).await?;
        let from = round * 1_000_000;
        let writers = Writers::start(&client, 8, from);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let name = region.nodes[leader].config.name.clone();
        filesystem.hold(&name);
        let deadline = Instant::now() + Duration::from_secs(2);
        while filesystem.held() == 0 {
            ensure!(Instant::now() < deadline, "the leader syncs nothing");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let before = writers.total();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let after = writers.total();
        // Its process cannot end while the kernel waits for a sync of its.
        let failing = filesystem.clone();
        let failed = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            failing.fail_held();
        });
        region.nodes[leader].kill();
        let _ = failed.join();
        filesystem.forget(Some(&name));
        region.start(leader)?;
        region.serving().await?;
        let mut client = region.client("acme").await?;
        writers.check(&mut client, from).await?;
        region.same_everywhere("acme").await?;
        println!(
            "round {round}: {} writes were acknowledged while the leader's fsync was under way",
            after - before
        );
    }
    Ok(())
}

fn keys() -> Result<Arc<TenantKeys>> {
    let secret = |byte| Secret::from_slice(&[byte; 32]).context("32 bytes");
    let tenant = TenantId([7; 16]);
    Ok(Arc::new(TenantKeys::new(
        tenant,
        secret(9)?,
        [(1, secret(8)?)],
    )))
}

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// All rows of an engine, or why they cannot be read.
fn rows(dir: &Path) -> Result<Rows> {
    let budget = Budget::new(8 << 20, 1 << 20, Ciphering::Encrypted);
    let engine = Engine::open(dir, keys()?, &budget)?;
    let mut found = Vec::new();
    for cf in Cf::ALL {
        let mut options = rocksdb::ReadOptions::default();
        options.set_verify_checksums(true);
        let mut rows = engine.db().raw_iterator_cf_opt(engine.cf(cf), options);
        rows.seek_to_first();
        while let Some((key, value)) = rows.item() {
            found.push((key.to_vec(), value.to_vec()));
            rows.next();
        }
        rows.status()?;
    }
    Ok(found)
}

/// Row 13: whatever bit of a table file flips, no row is read that was not written.
#[test]
fn a_flip_at_every_byte_of_a_table_is_noticed_or_harmless() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let whole = dir.path().join("whole");
    {
        let budget = Budget::new(8 << 20, 1 << 20, Ciphering::Encrypted);
        let engine = Engine::open(&dir.path().join("engine"), keys()?, &budget)?;
        let mut batch = rocksdb::WriteBatch::default();
        for n in 0..30u8 {
            batch.put_cf(engine.cf(Cf::Kv), [b'k', n], [n; 40]);
        }
        engine.write(batch)?;
        engine.checkpoint(&whole)?;
    }
    let written = rows(&whole)?;
    ensure!(written.len() == 30, "{} rows", written.len());
    let table = |dir: &Path| -> Result<PathBuf> {
        let files = files_below(dir);
        let mut tables = files
            .into_iter()
            .filter(|f| f.extension().is_some_and(|e| e == "sst"));
        tables.next().context("no table file")
    };
    let bytes = std::fs::read(table(&whole)?)?;
    let (mut noticed, mut harmless) = (0, 0);
    std::thread::scope(|scope| {
        let half = bytes.len() / 2;
        let parts = [0..half, half..bytes.len()].map(|part| {
            let (bytes, written, whole) = (&bytes, &written, &whole);
            let scratch = dir.path().join(format!("flip-{}", part.start));
            scope.spawn(move || -> Result<(usize, usize)> {
                let (mut noticed, mut harmless) = (0, 0);
                for at in part {
                    let _ = std::fs::remove_dir_all(&scratch);
                    link_dir(whole, &scratch)?;
                    let file = table(&scratch)?;
                    std::fs::remove_file(&file)?;
                    let mut bad = bytes.clone();
                    bad[at] ^= 1 << (at % 8);
                    std::fs::write(&file, bad)?;
                    match rows(&scratch) {
                        Err(_) => noticed += 1,
                        Ok(found) => {
                            ensure!(found == *written, "a flip at {at} changed what is read");
                            harmless += 1;
                        }
                    }
                }
                Ok((noticed, harmless))
            })
        });
        for part in parts {
            let (n, h) = part
                .join()
                .map_err(|_| anyhow::anyhow!("a flip panicked"))??;
            noticed += n;
            harmless += h;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    println!(
        "{} bytes: {noticed} flips noticed, {harmless} harmless",
        bytes.len()
    );
    // Most of the 4 KiB prefix holds nothing.
    ensure!(noticed > (bytes.len() - 4096) / 2, "{noticed} noticed");
    Ok(())
}

/// Row 13 in a region: a scan finds the damage, the replica stops, and its peers fill a new one, while
/// they serve the tenant; also if the node dies at a step of that, and is damaged before it starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_replica_is_found_and_rebuilt_from_its_peers() -> Result<()> {
    let mut region = Region::new()?;
    region.configure(|_, config| config.scan_every_s = Some(1))?;
    region.start_all()?;
    region.serving().await?;
    region
        .create_tenant("acme", "enhanced", 200, 60_000)
        .await?;
    let mut client = region.client("acme").await?;
    // More than the memtables hold, so that there are table files.
    let value = vec![7u8; 1 << 20];
    for n in 0..160 {
        client.put(format!("key/{n}"), value.clone(), None).await?;
    }
    let victim = (region.leader("acme").await? + 1) % 3;
    let id = region.tenant(victim, "acme").await?.id;
    // Compactions replace tables: those that stay for a while are hit.
    let data_dir = region.nodes[victim].config.data_dir.clone();
    // A checkpoint's are the same files by another name: two flips would undo each other.
    let engine = format!("{id}-1/engine-");
    let of_tenant = move || {
        let mut files = files_below(&data_dir);
        let table = |f: &Path| f.extension().is_some_and(|e| e == "sst");
        files.retain(|f| f.to_string_lossy().contains(&engine) && table(f));
        files.sort();
        files
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut tables, mut since) = (of_tenant(), Instant::now());
    while tables.is_empty() || since.elapsed() < Duration::from_secs(4) {
        ensure!(Instant::now() < deadline, "the tables do not come to rest");
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = of_tenant();
        if now != tables {
            (tables, since) = (now, Instant::now());
        }
    }
    // Under the running process, which has read none of it yet.
    flip(&tables)?;
    let writing = writes(region.client_at("acme", &[(victim + 1) % 3]).await?);
    rebuilt(&region, victim, 1).await?;
    ensure!(
        region
            .log(victim)
            .contains("ALARM: a scan found this replica damaged"),
        "it was not the scan that found it"
    );
    let made = writing.await??;
    println!("{made} writes were acknowledged while a replica was damaged and rebuilt");
    region.same_everywhere("acme").await?;

    // Damaged while it was down: found when it is opened. It dies at each step of being rebuilt.
    for step in ["replica-removed", "replica-log-dropped"] {
        region.nodes[victim].kill();
        let manifests: Vec<PathBuf> = files_below(&region.nodes[victim].config.data_dir)
            .into_iter()
            .filter(|f| {
                let path = f.to_string_lossy();
                path.contains(&format!("{id}-1/engine-")) && path.contains("MANIFEST-")
            })
            .collect();
        ensure!(!manifests.is_empty(), "{step}: no manifest");
        flip(&manifests)?;
        region.environment = vec![("HOLDFAST_TEST_KILL_AT".into(), step.into())];
        region.start(victim)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while region.nodes[victim].ended().is_none() {
            ensure!(Instant::now() < deadline, "it was not killed at {step}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        region.nodes[victim].kill();
        region.environment.clear();
        let mut client = region.client_at("acme", &[(victim + 1) % 3]).await?;
        client.put(format!("while/{step}"), "damaged", None).await?;
        region.start(victim)?;
        region.serving().await?;
        rebuilt(&region, victim, 0).await?;
        region.same_everywhere("acme").await?;
    }
    let events = region.operate(&["events", "--tenant", "acme"]).await?;
    ensure!(
        events.contains("replica-damaged") && events.contains("replica-rebuilt"),
        "{events}"
    );
    Ok(())
}

/// Writes for some seconds, each acknowledged within two; answers how many.
fn writes(mut client: Client) -> tokio::task::JoinHandle<Result<u64>> {
    tokio::spawn(async move {
        let (began, mut made) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(10) {
            let put = client.put(format!("while/{made}"), "damaged", None);
            tokio::time::timeout(Duration::from_secs(2), put).await??;
            made += 1;
        }
        Ok(made)
    })
}

/// Waits until a node says so often that its replica was filled again.
async fn rebuilt(region: &Region, node: usize, times: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let log = region.log(node);
        let whole = region.tenant(node, "acme").await;
        let whole = whole.is_ok_and(|t| t.problem.is_empty() && t.voters.len() == 3);
        if whole && log.matches("kind=\"replica-rebuilt\"").count() >= times {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it is not rebuilt");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
