//! How a node finds its region, or founds it.
//!
//! Where the directory is: this node's own note of it (`region.json`); else a peer that has it;
//! else, when the bucket knows no region, the founder makes one. A node with an empty data
//! directory whose region is in the bucket and on no peer waits for a restore: it never founds a
//! second region over the first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kms::local::write_private;
use kms::{KeyUri, TenantId, WrappedKey};
use object_store::{ObjectStoreExt, PutMode, PutPayload};
use replication::GroupId;
use replication::archive::bucket::Bootstrap;
use serde::{Deserialize, Serialize};

use crate::node::{LOOK, Node, NodeState};
use crate::question::Question;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegionFile {
    version: u32,
    pub(super) directory: GroupId,
    /// This node founded the region, and forms the directory's group.
    #[serde(default)]
    founder: bool,
}

impl RegionFile {
    const VERSION: u32 = 1;
}

impl Node {
    fn region_file(&self) -> std::path::PathBuf {
        self.parts.data_dir.join("region.json")
    }

    pub fn save_region(&self, directory: GroupId, founder: bool) -> Result<(), String> {
        let file = RegionFile {
            version: RegionFile::VERSION,
            directory,
            founder,
        };
        let bytes = serde_json::to_vec(&file).map_err(|e| e.to_string())?;
        write_private(&self.region_file(), &bytes)
            .map_err(|e| format!("{}: {e}", self.region_file().display()))
    }

    pub(super) fn read_region(&self) -> Result<Option<RegionFile>, String> {
        match std::fs::read(self.region_file()) {
            Ok(bytes) => {
                let file: RegionFile = serde_json::from_slice(&bytes)
                    .map_err(|e| format!("{}: {e}", self.region_file().display()))?;
                match file.version {
                    RegionFile::VERSION => Ok(Some(file)),
                    other => Err(format!(
                        "{}: version {other} is not known to this version of holdfastd; run the one that wrote it, or a newer one",
                        self.region_file().display()
                    )),
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(format!("{}: {e}", self.region_file().display())),
        }
    }

    /// Finds or founds the region, and serves it.
    pub(super) async fn join_region(self: Arc<Self>) {
        let mut told = String::new();
        loop {
            match self.find_directory().await {
                Ok(Some(group)) => match self.open_directory(group).await {
                    Ok(()) => return,
                    Err(why) => self.tell(&mut told, why),
                },
                // A restore may have opened it meanwhile.
                Ok(None) if self.directory().is_some() => return,
                Ok(None) => {}
                Err(why) => self.tell(&mut told, why),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn tell(&self, told: &mut String, why: String) {
        if *told != why {
            tracing::warn!(%why, "the region is not there yet");
            *told = why;
        }
    }

    async fn find_directory(&self) -> Result<Option<GroupId>, String> {
        if let Some(file) = self.read_region()? {
            if file.founder {
                self.form(file.directory).await?;
            }
            return Ok(Some(file.directory));
        }
        for peer in self.other_peers() {
            if let Some(answer) = self.ask(&peer, &Question::Directory).await
                && let Ok(Some(group)) = serde_json::from_slice::<Option<GroupId>>(&answer)
            {
                self.save_region(group, false)?;
                return Ok(Some(group));
            }
        }
        match self.parts.bucket.head(&Bootstrap::path()).await {
            Ok(_) => {
                // A restore that was faster than this answer has opened the directory.
                let mut state = self.state.write();
                if self.directory().is_none() {
                    *state = NodeState::AwaitingRestore;
                }
                Ok(None)
            }
            Err(object_store::Error::NotFound { .. }) if self.config.is_founder() => {
                self.found().await.map(Some)
            }
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(format!("the bucket cannot be asked for the region: {e}")),
        }
    }

    /// Makes the region: the directory's key, the bootstrap object, the directory's group.
    async fn found(&self) -> Result<GroupId, String> {
        let members = self
            .members()
            .await
            .ok_or("waiting for the other nodes, to found the region")?;
        let key: KeyUri = self
            .config
            .region_key
            .parse()
            .map_err(|e: kms::KmsError| e.to_string())?;
        let directory = TenantId::random();
        let (wrapped, _) =
            WrappedKey::create(&self.parts.providers, &key, directory, self.config.region)
                .await
                .map_err(|e| e.to_string())?;
        self.parts
            .keys
            .create(&wrapped)
            .await
            .map_err(|e| e.to_string())?;
        let bootstrap = Bootstrap {
            version: Bootstrap::VERSION,
            region: self.config.region,
            directory,
            key,
        };
        let bytes = serde_json::to_vec_pretty(&bootstrap).map_err(|e| e.to_string())?;
        let group = GroupId {
            tenant: directory,
            incarnation: 1,
        };
        self.parts
            .bucket
            .put_opts(
                &Bootstrap::path(),
                PutPayload::from(bytes),
                PutMode::Create.into(),
            )
            .await
            .map_err(|e| format!("the bootstrap object: {e}"))?;
        self.save_region(group, true)?;
        tracing::info!(region = %self.config.region, %group, nodes = members.len(), "the region is founded");
        self.form(group).await?;
        Ok(group)
    }

    /// All nodes of the region by id, once each has been reached.
    async fn members(&self) -> Option<BTreeMap<u64, String>> {
        let mut members = BTreeMap::from([(self.id, self.config.peer_address.to_string())]);
        for address in self.other_peers() {
            let peer = self.parts.peers.address(&address);
            peer.connected(Duration::from_secs(1)).await?;
            members.insert(peer.hello()?.node, address);
        }
        Some(members)
    }

    /// Forms the directory's group, unless it was formed before.
    async fn form(&self, group: GroupId) -> Result<(), String> {
        let opened = self.open_directory_group(group).await?;
        if opened.is_formed().await.map_err(|e| e.to_string())? {
            return Ok(());
        }
        let members = self
            .members()
            .await
            .ok_or("waiting for the other nodes, to form the directory")?;
        opened.initialize(members).await.map_err(|e| e.to_string())
    }
}
