//! One node of a region: its log, peers, groups, directory and servers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kms::aws::AwsKms;
use kms::local::{Keyfile, write_private};
use kms::secret::Secret;
use kms::{KeyUri, Providers, TenantId, WrappedKey, WrappedKeyStore};
use parking_lot::RwLock;
use replication::archive::archiver::Report;
use replication::archive::chain::Tail;
use replication::archive::lock;
use replication::engine::{Budget, Ciphering, relieve};
use replication::group::Groups;
use replication::group::replica::is_quarantined;
use replication::log::NodeLog;
use replication::network::{self, Hello, NodeTls, Peers};
use replication::{GroupId, command};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config::NodeConfig;
use crate::directory::events::{self, Pending};
use crate::directory::joins::Joins;
use crate::directory::records::{LinkRecord, NodeRecord, TenantRecord};
use crate::directory::{Directory, controller};
use crate::drill;
use crate::limits;
use crate::objectives::{self, history::History};
use crate::question::{Calls, PEER_CALL, Question};
use crate::residency::BucketPlace;
use crate::retention;
use crate::scrub;
use crate::server;
use crate::tenant::{DRILL, Opening, Parts, RESTORE, Registry, deletion, rewriting, rotation};

/// How often the memtables of all tenants are looked at: what a disk's speed adds meanwhile is little.
const MEMTABLES: Duration = Duration::from_millis(200);

pub(crate) const LOOK: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    Starting,
    AwaitingRestore,
    Serving,
}

impl NodeState {
    pub fn name(self) -> &'static str {
        match self {
            NodeState::Starting => "starting",
            NodeState::AwaitingRestore => "awaiting restore",
            NodeState::Serving => "serving",
        }
    }
}

pub struct Node {
    pub config: NodeConfig,
    pub id: u64,
    pub parts: Parts,
    pub tenants: Registry,
    pub state: RwLock<NodeState>,
    directory: RwLock<Option<Directory>>,
    archive_key: RwLock<Option<Secret>>,
    /// Links made since the directory was last told.
    links: RwLock<BTreeMap<TenantId, LinkRecord>>,
    /// The newest one of the directory's chain.
    directory_link: Arc<parking_lot::Mutex<Option<(GroupId, u64)>>>,
    pub(crate) events: Pending,
    pub(crate) history: History,
    pub(crate) bucket_place: RwLock<BucketPlace>,
    /// One restore at a time.
    pub restoring: Semaphore,
    /// Which groups the other nodes do not join yet.
    pub joins: Joins,
    /// Taken by a restore of one tenant, in place.
    pub going_back: Semaphore,
    /// Taken by a drill: one at a time.
    pub drilling: Semaphore,
    /// Taken by a scrub of the archive: one at a time.
    pub scrubbing: Semaphore,
    tasks: parking_lot::Mutex<JoinSet<()>>,
}

fn node_id(dir: &Path) -> Result<u64, String> {
    let path = dir.join("node_id");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            u64::from_str_radix(text.trim(), 16).map_err(|e| format!("{}: {e}", path.display()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // 63 bits: ids travel through formats with signed integers.
            let id = u64::from_be_bytes(kms::secret::random_bytes()) >> 1;
            write_private(&path, format!("{id:016x}").as_bytes())
                .map_err(|e| format!("{}: {e}", path.display()))?;
            Ok(id)
        }
        Err(e) => Err(format!("{}: {e}", path.display())),
    }
}

async fn providers(config: &NodeConfig) -> Providers {
    let mut providers = Providers::default();
    let rate = config.kms.calls_per_s.unwrap_or(limits::KMS_RATE);
    if let Some(local) = &config.kms.local {
        providers.set_local(Arc::new(Keyfile::new(&local.keyfile)), rate);
    }
    if let Some(aws) = &config.kms.aws {
        let kms = AwsKms::connect(&aws.cloud_region, aws.endpoint.as_deref()).await;
        providers.set_aws(Arc::new(kms), rate);
    }
    providers
}

impl Node {
    /// Starts a node: its servers listen when this returns; the region may still be forming.
    pub async fn start(config: NodeConfig) -> Result<Arc<Self>, String> {
        let at = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
        let dir = config.data_dir.clone();
        make_private(&dir).map_err(|e| at("data_dir", &e))?;
        // What a process that died was trying a restore in.
        for scratch in [DRILL, RESTORE] {
            let _ = std::fs::remove_dir_all(dir.join(scratch));
        }
        let id = node_id(&dir)?;
        let tls = NodeTls::load(&config.tls.ca, &config.tls.cert, &config.tls.key, &[])
            .map_err(|e| e.to_string())?;
        let expected = network::Identity::Node {
            region: config.region,
            zone: config.zone.clone(),
            name: config.name.clone(),
        };
        if tls.identity != expected {
            return Err(format!(
                "the certificate names {}, node.toml {}",
                tls.identity.uri(),
                expected.uri()
            ));
        }
        let bucket = config.bucket.open(config.region)?;
        let log = NodeLog::open(&dir.join("log")).map_err(|e| e.to_string())?;
        let hello = Hello {
            protocol: network::PROTOCOL,
            format: command::VERSION,
            node: id,
            name: config.name.clone(),
        };
        let peers = Peers::new(tls.clone(), hello.clone());
        let groups = Arc::new(Groups::default());
        let ciphering = match std::env::var("HOLDFAST_TEST_NULL_CIPHER").is_ok() {
            true => Ciphering::Plain,
            false => Ciphering::Encrypted,
        };
        let node = Arc::new(Node {
            id,
            parts: Parts {
                data_dir: dir.clone(),
                log,
                peers,
                groups: groups.clone(),
                budget: Budget::new(limits::WRITE_BUFFERS, limits::BLOCK_CACHE, ciphering),
                providers: providers(&config).await,
                keys: WrappedKeyStore::new(bucket.clone(), dir.join("keys")),
                max_log_bytes: config.max_log_bytes.unwrap_or(limits::MAX_LOG),
                bucket,
            },
            tenants: Registry::default(),
            state: RwLock::new(NodeState::Starting),
            directory: RwLock::new(None),
            archive_key: RwLock::new(None),
            links: RwLock::default(),
            directory_link: Arc::default(),
            events: Pending::default(),
            history: History::default(),
            bucket_place: RwLock::default(),
            restoring: Semaphore::new(1),
            joins: Joins::default(),
            going_back: Semaphore::new(1),
            drilling: Semaphore::new(1),
            scrubbing: Semaphore::new(1),
            tasks: parking_lot::Mutex::new(JoinSet::new()),
            config,
        });
        node.check_bucket().await?;
        lock::check(&node.config.bucket).await?;
        groups.set_daemon(Calls::of(&node));
        let listener = bind(node.config.peer_address).await?;
        node.spawn(network::serve(listener, tls, hello, groups));
        server::start(&node).await?;
        let own = node.clone();
        node.spawn(async move { own.join_region().await });
        Ok(node)
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().spawn(task);
    }

    pub fn directory(&self) -> Option<Directory> {
        self.directory.read().clone()
    }

    pub fn archive_key(&self) -> Option<Secret> {
        self.archive_key.read().clone()
    }

    pub fn set_archive_key(&self, key: Secret) {
        *self.archive_key.write() = Some(key);
    }

    /// Stops groups and servers. Nothing needs it to be called: a killed node loses nothing.
    pub async fn shutdown(&self) {
        for group in self.parts.groups.all() {
            group.shutdown().await;
        }
        self.tasks.lock().abort_all();
    }

    pub fn record(&self) -> NodeRecord {
        NodeRecord {
            name: self.config.name.clone(),
            id: self.id,
            zone: self.config.zone.clone(),
            peer_address: self.config.peer_address.to_string(),
            client_url: self.config.client_url(),
        }
    }

    pub fn is_restoring(&self) -> bool {
        self.restoring.available_permits() == 0
    }

    /// Notes links as the archiver makes them; the directory is told at intervals.
    pub fn report(self: &Arc<Self>) -> Report {
        let weak = Arc::downgrade(self);
        Arc::new(move |group: GroupId, tail: &Tail| {
            if let Some(node) = weak.upgrade() {
                let record = LinkRecord {
                    tenant: group.tenant,
                    incarnation: group.incarnation,
                    link: tail.number,
                };
                node.links.write().insert(group.tenant, record);
            }
        })
    }

    pub fn take_links(&self) -> Vec<LinkRecord> {
        std::mem::take(&mut *self.links.write())
            .into_values()
            .collect()
    }

    pub(crate) fn other_peers(&self) -> Vec<String> {
        let own = self.config.peer_address;
        self.config
            .peers
            .iter()
            .filter(|p| **p != own)
            .map(ToString::to_string)
            .collect()
    }

    pub(crate) async fn open_directory_group(
        &self,
        id: GroupId,
    ) -> Result<Arc<replication::group::Group>, String> {
        if let Some(open) = self.parts.groups.get(id) {
            return Ok(open);
        }
        let key: KeyUri = self.config.region_key.parse().map_err(text)?;
        let wrapped = self
            .parts
            .keys
            .load(id.tenant, 1, &key)
            .await
            .map_err(text)?;
        let keys = WrappedKey::unwrap(&[wrapped], &self.parts.providers).await;
        let keys = Arc::new(keys.map_err(text)?);
        let archive_key = keys.archive_key();
        self.set_archive_key(archive_key.clone());
        let opening = Opening {
            id,
            keys: Ok(keys),
            rpo: Duration::ZERO,
            archive_key,
            report: self.directory_report(),
            // One is enough: a change is answered once it is in the bucket.
            min_voters: 1,
            begun: None,
        };
        let opened = self.parts.open(opening).await;
        opened.map_err(|why| match is_quarantined(&self.parts.replica_dir(id)) {
            // Nothing rebuilds the directory, which says who is to be in a group.
            true => format!("{why}, of the directory: remove the node's data directory, so that it comes back as a new node"),
            false => why,
        })
    }

    /// What the directory's archiver tells of each link.
    pub fn directory_report(&self) -> Report {
        let newest = self.directory_link.clone();
        Arc::new(move |group, tail| *newest.lock() = Some((group, tail.number)))
    }

    /// The newest link of the directory's chain that this node has made, 0 if none.
    pub fn newest_directory_link(&self, group: GroupId) -> u64 {
        let newest = *self.directory_link.lock();
        let of_group = newest.filter(|(of, _)| *of == group);
        of_group.map_or(0, |(_, number)| number)
    }

    /// Opens the directory here and starts what watches it.
    pub async fn open_directory(self: &Arc<Self>, id: GroupId) -> Result<(), String> {
        let group = self.open_directory_group(id).await?;
        {
            // A restore and the start of the node may both come here.
            let mut directory = self.directory.write();
            if directory.is_some() {
                return Ok(());
            }
            *directory = Some(Directory::new(group));
        }
        let (own, second, third) = (self.clone(), self.clone(), self.clone());
        self.spawn(async move { controller::open_tenants(own).await });
        self.spawn(async move { controller::keep_records(second).await });
        self.spawn(async move { controller::keep_members(third).await });
        let own = self.clone();
        self.spawn(async move { controller::compare_digests(own).await });
        let own = self.clone();
        self.spawn(async move { own.serve_when_current().await });
        let own = self.clone();
        self.spawn(async move { controller::scan_replicas(own).await });
        let own = self.clone();
        self.spawn(async move { events::keep(own).await });
        let own = self.clone();
        self.spawn(async move { rotation::keep(own).await });
        let own = self.clone();
        self.spawn(async move { rewriting::keep(own).await });
        let own = self.clone();
        self.spawn(async move { drill::keep(own).await });
        let own = self.clone();
        self.spawn(async move { objectives::keep_rpo(own).await });
        let own = self.clone();
        self.spawn(async move { objectives::keep_rto(own).await });
        let own = self.clone();
        self.spawn(async move { objectives::history::keep(own).await });
        let own = self.clone();
        self.spawn(async move { retention::keep(own).await });
        let own = self.clone();
        self.spawn(async move { scrub::keep(own).await });
        let own = self.clone();
        self.spawn(async move { own.watch_bucket().await });
        let own = self.clone();
        self.spawn(async move { own.watch_memtables().await });
        let own = self.clone();
        self.spawn(async move { deletion::keep(own).await });
        Ok(())
    }

    /// Has the largest memtables written out before all of them together come to their bound.
    async fn watch_memtables(&self) {
        loop {
            tokio::time::sleep(MEMTABLES).await;
            let excess = self.parts.budget.excess();
            if excess == 0 {
                continue;
            }
            let groups = self.parts.groups.all();
            let engines = groups.iter().filter_map(|g| g.store().engine().ok());
            let engines: Vec<_> = engines.collect();
            let relieved = tokio::task::spawn_blocking(move || relieve(engines, excess)).await;
            if let Ok(Err(e)) = relieved {
                tracing::warn!(error = %e, "memtables of a tenant are not written out");
            }
        }
    }

    /// Asks where the bucket lies until that is known, and again at intervals.
    async fn watch_bucket(&self) {
        loop {
            let known = self.bucket_place.read().at_ms > 0;
            tokio::time::sleep(if known {
                limits::BUCKET_PLACE
            } else {
                PEER_CALL
            })
            .await;
            if let Err(why) = self.check_bucket().await {
                tracing::error!(%why, "ALARM: the bucket does not lie where it must");
                self.refused_place(why);
            }
        }
    }

    /// Serves once this node's replica of the directory votes and is up to date: what it does not
    /// hold then does not exist.
    async fn serve_when_current(&self) {
        let Some(directory) = self.directory() else {
            return;
        };
        let group = directory.group();
        loop {
            let votes = group.status().voters.contains(&self.id);
            if votes && group.is_current().await {
                *self.state.write() = NodeState::Serving;
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether this node has a connection to another, or is it.
    pub fn is_connected(&self, other: &NodeRecord) -> bool {
        let peer = || self.parts.peers.node(other.id, &other.peer_address);
        other.id == self.id || peer().connection().is_some()
    }

    /// Names and zones of the region's nodes that this node has no connection to.
    pub fn unreachable(&self) -> Vec<String> {
        let nodes = self.directory().and_then(|d| d.nodes().ok());
        let nodes = nodes.unwrap_or_default().into_iter().map(|f| f.record);
        nodes
            .filter(|n| !self.is_connected(n))
            .map(|n| format!("{} (zone {})", n.name, n.zone))
            .collect()
    }

    /// Registers this node, here or through a peer that can.
    pub async fn register(&self) -> Result<(), String> {
        let record = self.record();
        let directory = self.directory().ok_or("there is no directory yet")?;
        let member = directory.group().status().voters.contains(&self.id);
        if member {
            return directory.register(&record).await.map_err(|e| e.to_string());
        }
        for peer in self.other_peers() {
            if self
                .ask(&peer, &Question::Register(record.clone()))
                .await
                .is_some()
            {
                return Ok(());
            }
        }
        Err("no peer could register this node".into())
    }

    /// The registered nodes of a tenant's placement.
    pub fn placed(&self, record: &TenantRecord) -> Vec<NodeRecord> {
        let nodes = self.directory().and_then(|d| d.nodes().ok());
        let nodes = nodes.unwrap_or_default().into_iter().map(|f| f.record);
        nodes
            .filter(|n| record.placement.contains(&n.name))
            .collect()
    }
}

pub async fn bind(address: std::net::SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}"))
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn make_private(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}
