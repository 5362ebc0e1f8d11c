//! A region of daemon processes on loopback, in a directory of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use daemon::admin_client::OperatorConfig;
use daemon::config::{AwsKms, NodeConfig};
use daemon::dev::{Layout, lay_out};
use daemon::proto::admin::{
    CreateTenantRequest, NodeStatusRequest, NodeStatusResponse, ShowTenantRequest, Tenant,
};
use etcd_client::{Client, ConnectOptions, GetOptions};
use kms::Region as Jurisdiction;
use kms::local::Keyfile;
use replication::archive::bucket::BucketConfig;

use crate::netns::Network;
use crate::servers::{self, CLOUD_REGION};

pub const PASSWORD: &str = "correct horse";

/// One daemon process.
pub struct NodeProcess {
    pub config: NodeConfig,
    pub file: PathBuf,
    /// Put before the daemon's command line, such as `fiu-run -x`.
    pub wrapper: Vec<String>,
    child: Option<Child>,
}

impl NodeProcess {
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn signal(&self, signal: libc::c_int) {
        if let Some(pid) = self.pid() {
            // SAFETY: a signal to a child of this process.
            #[allow(unsafe_code)]
            unsafe {
                libc::kill(pid as libc::pid_t, signal);
            }
        }
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }
}

/// A region. Dropping it kills its processes and removes its files.
pub struct Region {
    pub dir: tempfile::TempDir,
    pub nodes: Vec<NodeProcess>,
    /// Set before every start.
    pub environment: Vec<(String, String)>,
}

impl Drop for Region {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.kill();
        }
        if std::thread::panicking() || std::env::var("HOLDFAST_KEEP").is_ok() {
            let name = self.dir.path().file_name().unwrap_or_default();
            let name = format!("holdfast-failed-{}", name.to_string_lossy());
            let kept = std::env::temp_dir().join(name);
            let _ = std::fs::rename(self.dir.path(), &kept);
            eprintln!("the region's files and logs are kept in {}", kept.display());
        }
    }
}

impl Region {
    /// Lays out three nodes with a directory as bucket, with keys `acme` and `globex`.
    pub fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let url = format!("file://{}", dir.path().join("bucket").display());
        let bucket = BucketConfig {
            url,
            cloud_region: None,
            endpoint: None,
            object_lock: None,
        };
        Self::with_bucket(dir, bucket)
    }

    pub fn with_bucket(dir: tempfile::TempDir, bucket: BucketConfig) -> Result<Self> {
        Self::in_jurisdiction(Jurisdiction::Eu, dir, bucket)
    }

    pub fn in_jurisdiction(
        jurisdiction: Jurisdiction,
        dir: tempfile::TempDir,
        bucket: BucketConfig,
    ) -> Result<Self> {
        let files = lay_out(&Layout {
            region: jurisdiction,
            dir: dir.path().to_path_buf(),
            nodes: 3,
            first_port: 0,
            bucket,
        })
        .map_err(anyhow::Error::msg)?;
        let keyfile = Keyfile::new(dir.path().join("keys.json"));
        for key in ["acme", "globex"] {
            keyfile.add(key)?;
        }
        let node = |file: PathBuf| {
            let config = NodeConfig::load(&file).map_err(anyhow::Error::msg)?;
            Ok(NodeProcess {
                config,
                file,
                wrapper: Vec::new(),
                child: None,
            })
        };
        Ok(Region {
            nodes: files.into_iter().map(node).collect::<Result<_>>()?,
            dir,
            environment: Vec::new(),
        })
    }

    /// Changes the nodes' configurations before they start.
    pub fn configure(&mut self, change: impl Fn(usize, &mut NodeConfig)) -> Result<()> {
        for (n, node) in self.nodes.iter_mut().enumerate() {
            change(n, &mut node.config);
            std::fs::write(&node.file, toml::to_string(&node.config)?)?;
        }
        let mut operator = self.operator()?;
        operator.endpoints = self.nodes.iter().map(|n| n.config.admin_address).collect();
        let file = self.dir.path().join("operator.toml");
        Ok(std::fs::write(file, toml::to_string(&operator)?)?)
    }

    /// Has the nodes ask the KMS at `endpoint`, before they start.
    pub fn on_kms(&mut self, endpoint: &str) -> Result<()> {
        self.environment.extend(servers::credentials());
        self.configure(|_, config| {
            config.kms.aws = Some(AwsKms {
                cloud_region: CLOUD_REGION.into(),
                endpoint: Some(endpoint.to_string()),
            });
        })
    }

    /// Puts each node in a network namespace of its own.
    pub fn move_into(&mut self, network: &Network) -> Result<()> {
        let ports = |a: &SocketAddr| a.port();
        let peers: Vec<SocketAddr> = self
            .nodes
            .iter()
            .enumerate()
            .map(|(n, node)| SocketAddr::new(network.ip(n), ports(&node.config.peer_address)))
            .collect();
        self.configure(|n, config| {
            config.peer_address = peers[n];
            config.client_address.set_ip(network.ip(n));
            config.admin_address.set_ip(network.ip(n));
            config.peers.clone_from(&peers);
        })?;
        for (n, node) in self.nodes.iter_mut().enumerate() {
            node.wrapper = network.wrapper(n);
        }
        Ok(())
    }

    /// Starts all nodes and waits until they serve.
    pub async fn started() -> Result<Self> {
        let mut region = Self::new()?;
        region.start_all()?;
        region.serving().await?;
        Ok(region)
    }

    pub fn keyfile(&self) -> Keyfile {
        Keyfile::new(self.dir.path().join("keys.json"))
    }

    pub fn bucket(&self) -> PathBuf {
        self.dir.path().join("bucket")
    }

    pub fn start_all(&mut self) -> Result<()> {
        (0..self.nodes.len()).try_for_each(|n| self.start(n))
    }

    pub fn start(&mut self, n: usize) -> Result<()> {
        let log = self.log_file(n);
        let out = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)?;
        let node = &mut self.nodes[n];
        ensure!(node.child.is_none(), "node {n} runs already");
        let daemon = crate::binary("holdfastd");
        let mut command = match node.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(daemon);
                command
            }
            None => Command::new(daemon),
        };
        command
            .args(["run", "--config"])
            .arg(&node.file)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out);
        node.child = Some(command.spawn()?);
        Ok(())
    }

    pub fn log_file(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("node{}.log", n + 1))
    }

    pub fn log(&self, n: usize) -> String {
        std::fs::read_to_string(self.log_file(n)).unwrap_or_default()
    }

    pub fn kill_all(&mut self) {
        self.nodes.iter_mut().for_each(NodeProcess::kill);
    }

    /// Removes every node's data directory: the disks are gone.
    pub fn lose_disks(&self) -> Result<()> {
        for node in &self.nodes {
            std::fs::remove_dir_all(&node.config.data_dir)?;
        }
        Ok(())
    }

    pub fn operator(&self) -> Result<OperatorConfig> {
        OperatorConfig::load(&self.dir.path().join("operator.toml")).map_err(anyhow::Error::msg)
    }

    /// State of node `n`, or why it does not answer.
    pub async fn state(&self, n: usize) -> Result<String> {
        Ok(self.status(n).await?.state)
    }

    pub async fn status(&self, n: usize) -> Result<NodeStatusResponse> {
        let address = self.nodes[n].config.admin_address;
        let mut client = self
            .operator()?
            .connect_to(address)
            .await
            .map_err(anyhow::Error::msg)?;
        Ok(client.node_status(NodeStatusRequest {}).await?.into_inner())
    }

    /// Waits until every running node serves.
    pub async fn serving(&mut self) -> Result<()> {
        self.all_in("serving").await
    }

    pub async fn all_in(&mut self, wanted: &str) -> Result<()> {
        for n in 0..self.nodes.len() {
            if self.nodes[n].child.is_none() {
                continue;
            }
            let deadline = Instant::now() + Duration::from_secs(30);
            loop {
                if let Some(status) = self.nodes[n].ended() {
                    bail!("node {n} ended ({status}):\n{}", tail(&self.log(n)));
                }
                let state = self.state(n).await.unwrap_or_else(|e| e.to_string());
                if state == wanted {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "node {n} is {state}, not {wanted}:\n{}",
                    tail(&self.log(n))
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    pub async fn create_tenant(
        &self,
        name: &str,
        tier: &str,
        rpo_ms: u64,
        rto_ms: u64,
    ) -> Result<()> {
        self.create_tenant_with(name, tier, rpo_ms, rto_ms, &format!("local:{name}"), "app")
            .await
    }

    /// Creates an enhanced tenant whose first user has this name.
    pub async fn create_tenant_of(&self, name: &str, rpo_ms: u64, user: &str) -> Result<()> {
        self.create_tenant_with(
            name,
            "enhanced",
            rpo_ms,
            60_000,
            &format!("local:{name}"),
            user,
        )
        .await
    }

    pub async fn create_tenant_with(
        &self,
        name: &str,
        tier: &str,
        rpo_ms: u64,
        rto_ms: u64,
        key: &str,
        user: &str,
    ) -> Result<()> {
        let mut client = self
            .operator()?
            .connect()
            .await
            .map_err(anyhow::Error::msg)?;
        let request = CreateTenantRequest {
            name: name.into(),
            tier: tier.into(),
            rpo_ms: (rpo_ms > 0).then_some(rpo_ms),
            rto_ms,
            key: key.into(),
            user: user.into(),
            password: PASSWORD.into(),
            quota_bytes: 0,
            key_grace_s: None,
        };
        client
            .create_tenant(request)
            .await
            .map_err(|e| anyhow::anyhow!("{}", e.message()))?;
        Ok(())
    }

    /// A tenant as node `n` sees it.
    pub async fn tenant(&self, n: usize, name: &str) -> Result<Tenant> {
        let address = self.nodes[n].config.admin_address;
        let mut client = self
            .operator()?
            .connect_to(address)
            .await
            .map_err(anyhow::Error::msg)?;
        let request = ShowTenantRequest { name: name.into() };
        Ok(client
            .show_tenant(request)
            .await
            .map_err(|e| anyhow::anyhow!("{}", e.message()))?
            .into_inner())
    }

    /// Index of the running node that leads a tenant, once there is one.
    pub async fn leader(&self, name: &str) -> Result<usize> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for n in 0..self.nodes.len() {
                if self.nodes[n].child.is_some()
                    && let Ok(Ok(tenant)) =
                        tokio::time::timeout(Duration::from_secs(2), self.tenant(n, name)).await
                    && tenant.leader == self.nodes[n].config.name
                {
                    return Ok(n);
                }
            }
            ensure!(Instant::now() < deadline, "tenant {name} has no leader");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// An etcd client of tenant `name`, logged in at these nodes.
    pub async fn client_at(&self, name: &str, nodes: &[usize]) -> Result<Client> {
        let endpoints: Vec<String> = nodes
            .iter()
            .map(|n| self.nodes[*n].config.client_address.to_string())
            .collect();
        connect(&endpoints, name).await
    }

    pub async fn client(&self, name: &str) -> Result<Client> {
        self.client_at(name, &[0, 1, 2]).await
    }

    /// All keys and values of a tenant. A node that is away, or still being filled, says so: another is
    /// asked.
    pub async fn rows(&self, name: &str) -> Result<BTreeMap<String, String>> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut client = self.client(name).await?;
            let all = GetOptions::new().with_all_keys();
            match client.get("", Some(all)).await {
                Ok(found) => {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let rows = found.kvs().iter();
                    return Ok(rows.map(|kv| (text(kv.key()), text(kv.value()))).collect());
                }
                Err(e) => ensure!(Instant::now() < deadline, "{name}: {e}"),
            }
        }
    }

    /// Waits until everything that was acknowledged is in the bucket.
    pub async fn archived(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        // What is written meanwhile need not be.
        let applied = self.tenant(self.leader(name).await?, name).await?.applied;
        loop {
            let archived = self.tenant(self.leader(name).await?, name).await?.archived;
            if archived >= applied {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "tenant {name} is not archived: {archived} of {applied}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until all three replicas stand at one revision with one digest.
    pub async fn same_everywhere(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut seen = Vec::new();
            for n in 0..self.nodes.len() {
                let tenant = self.tenant(n, name).await;
                seen.push(tenant.map(|t| (t.revision, t.digest, t.problem, t.voters.len())));
            }
            let same = seen.iter().all(|s| match (s, &seen[0]) {
                (Ok(s), Ok(first)) => s == first && s.2.is_empty() && s.3 == self.nodes.len(),
                _ => false,
            });
            if same {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the replicas of {name} differ: {seen:?}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until node 0 says of a tenant what is wanted.
    pub async fn until(
        &self,
        name: &str,
        within: Duration,
        wanted: impl Fn(&Tenant) -> bool,
    ) -> Result<Tenant> {
        let deadline = Instant::now() + within;
        loop {
            let shown = self.tenant(0, name).await?;
            if wanted(&shown) {
                return Ok(shown);
            }
            ensure!(Instant::now() < deadline, "after {within:?}: {shown:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Runs `holdfast`, which must succeed; answers what it printed.
    pub async fn operate(&self, arguments: &[&str]) -> Result<String> {
        let (ok, said) = self.holdfast(arguments).await?;
        ensure!(ok, "holdfast {}: {said}", arguments.join(" "));
        Ok(said)
    }

    /// Has retention leave little more of a tenant than its newest checkpoint.
    pub async fn keep_little(&self, tenant: &str) -> Result<()> {
        let window = ["--keep", "1s", "--keep-checkpoints", "1"];
        let set = [&["tenant", "set", tenant], &window[..]].concat();
        self.operate(&set).await.map(drop)
    }

    /// Has `holdfast` verify a signed statement; answers whether it holds, and what it printed.
    pub async fn verify(&self, signed: &str) -> Result<(bool, String)> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let (file, ca) = (path("signed.json"), path("ca.pem"));
        std::fs::write(&file, signed)?;
        self.holdfast(&["certificate", "verify", &file, "--ca", &ca])
            .await
    }

    /// Runs `holdfast`; answers whether it succeeded, and what it printed.
    pub async fn holdfast(&self, arguments: &[&str]) -> Result<(bool, String)> {
        let mut command = tokio::process::Command::new(crate::binary("holdfast"));
        command
            .arg("--config")
            .arg(self.dir.path().join("operator.toml"))
            .args(arguments);
        let out = command
            .stdin(Stdio::null())
            .output()
            .await
            .context("holdfast")?;
        let printed = [out.stdout, out.stderr].concat();
        Ok((
            out.status.success(),
            String::from_utf8_lossy(&printed).into_owned(),
        ))
    }

    /// Loses every node and every disk, and restores from the bucket.
    pub async fn lose_and_restore(&mut self) -> Result<(bool, String)> {
        self.kill_all();
        self.lose_disks()?;
        self.start_all()?;
        self.all_in("awaiting restore").await?;
        let restored = self.holdfast(&["restore", "region"]).await?;
        // The other nodes join what was restored onto the first.
        self.serving().await?;
        Ok(restored)
    }

    pub fn client_address(&self, n: usize) -> SocketAddr {
        self.nodes[n].config.client_address
    }
}

/// The end of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Logs in as the tenant's first user.
pub async fn connect(endpoints: &[String], tenant: &str) -> Result<Client> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let options = ConnectOptions::new()
            .with_user(format!("app@{tenant}"), PASSWORD)
            .with_connect_timeout(Duration::from_secs(2))
            .with_timeout(Duration::from_secs(12));
        match Client::connect(endpoints, Some(options)).await {
            Ok(client) => return Ok(client),
            Err(e) if Instant::now() >= deadline => return Err(e).context("logging in"),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
