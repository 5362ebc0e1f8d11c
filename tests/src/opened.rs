//! What only the holder of the keyfile can see of a region: keys, and what is archived.

use std::sync::Arc;

use anyhow::Result;
use kms::local::{KeyState, Keyfile};
use kms::{KeyUri, Providers, TenantId, TenantKeys, WrappedKey, WrappedKeyStore};
use object_store::ObjectStore;
use replication::GroupId;
use replication::archive::bucket::Bootstrap;
use replication::archive::chain::Chain;

use crate::region::Region;

fn bucket(region: &Region) -> Result<Arc<dyn ObjectStore>> {
    let config = &region.nodes[0].config;
    let opened = config.bucket.open(config.region);
    opened.map_err(anyhow::Error::msg)
}

/// The keys of a tenant, unwrapped as only the holder of the keyfile can, whatever its state.
pub async fn keys_of(region: &Region, id: TenantId) -> Result<TenantKeys> {
    let scratch = tempfile::tempdir()?;
    let store = WrappedKeyStore::new(bucket(region)?, scratch.path());
    let wrapped = store.fetch_all(id).await?;
    let keyfile = Keyfile::new(scratch.path().join("keys.json"));
    std::fs::copy(region.keyfile().path(), keyfile.path())?;
    for wrapped in &wrapped {
        if let KeyUri::Local(name) = &wrapped.key {
            keyfile.set_state(name, KeyState::Enabled)?;
        }
    }
    let mut providers = Providers::default();
    providers.set_local(Arc::new(keyfile), 1000.0);
    Ok(WrappedKey::unwrap(&wrapped, &providers).await?)
}

/// A group's chain, with the region's archive key.
pub async fn chain_of(region: &Region, group: GroupId) -> Result<Chain> {
    let bootstrap = std::fs::read(region.bucket().join("bootstrap.json"))?;
    let bootstrap = Bootstrap::decode(&bootstrap).map_err(anyhow::Error::msg)?;
    let directory = keys_of(region, bootstrap.directory).await?;
    Ok(Chain::new(bucket(region)?, directory.archive_key(), group))
}
