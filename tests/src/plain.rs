//! What a restore reads, downloaded plainly: hashed and fsynced, with the same parallelism.

use std::time::Instant;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

/// As many as a restore has in flight.
pub const PARALLEL: usize = 8;

/// What a restore of tenant `id` reads: the files of its newest checkpoint, and the links behind it.
pub async fn objects(store: &impl ObjectStore, id: &str) -> Result<Vec<Path>> {
    let mut manifests = names(store, &format!("tenants/{id}/0000000001/checkpoints")).await?;
    manifests.sort();
    let newest = manifests.last().context("no checkpoint is in the bucket")?;
    let bytes = store.get(newest).await?.bytes().await?;
    // JSON, then a MAC of 32 bytes.
    let manifest: serde_json::Value = serde_json::from_slice(&bytes[..bytes.len() - 32])?;
    let link = manifest["link"].as_u64().context("link")?;
    let files = manifest["files"].as_array().context("files")?.iter();
    let mut found: Vec<Path> = files
        .filter_map(|file| file["hash"].as_str())
        .map(|hash| Path::from(format!("tenants/{id}/files/{hash}")))
        .collect();
    let links = names(store, &format!("tenants/{id}/0000000001/chain")).await?;
    found.extend(links.into_iter().filter(|path| {
        let number = path.filename().and_then(|n| n.parse::<u64>().ok());
        number.is_some_and(|n| n > link)
    }));
    Ok(found)
}

async fn names(store: &impl ObjectStore, prefix: &str) -> Result<Vec<Path>> {
    let listed = store.list(Some(&Path::from(prefix)));
    Ok(listed.map_ok(|meta| meta.location).try_collect().await?)
}

/// Downloads objects; answers bytes and seconds.
pub async fn download(
    store: &impl ObjectStore,
    objects: &[Path],
    to: &std::path::Path,
) -> Result<(u64, f64)> {
    std::fs::create_dir_all(to)?;
    let started = Instant::now();
    let gets = objects.iter().enumerate().map(|(n, object)| async move {
        let bytes = store.get(object).await?.bytes().await?;
        let file = to.join(n.to_string());
        tokio::task::spawn_blocking(move || {
            std::hint::black_box(blake3::hash(&bytes));
            let mut out = std::fs::File::create(file)?;
            std::io::Write::write_all(&mut out, &bytes)?;
            out.sync_all()?;
            Ok::<_, anyhow::Error>(bytes.len() as u64)
        })
        .await?
    });
    let sizes: Vec<u64> = futures::stream::iter(gets)
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    Ok((sizes.iter().sum(), started.elapsed().as_secs_f64()))
}
