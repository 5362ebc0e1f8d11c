//! `holdfastd dev`: a three-zone region in one process on loopback, for trying and developing.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kms::Region;
use kms::local::Keyfile;
use replication::archive::bucket::BucketConfig;

use crate::config::{KmsConfig, LocalKms, LogConfig, NodeConfig, TlsFiles};
use crate::node::Node;
use crate::pki;

/// Where the nodes of a region that is laid out here listen, and where their files are.
pub struct Layout {
    pub region: Region,
    pub dir: PathBuf,
    pub nodes: usize,
    /// 0: ports that are free; else client ports from here on, peer and admin ports after them.
    pub first_port: u16,
    pub bucket: BucketConfig,
}

/// Ports that nothing listens on now.
fn free_ports(count: usize) -> std::io::Result<Vec<u16>> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<_>>()?;
    held.iter()
        .map(|l| l.local_addr().map(|a| a.port()))
        .collect()
}

/// Writes certificates, a keyfile with the region's key and a node.toml for each node; answers the
/// paths of the latter.
pub fn lay_out(layout: &Layout) -> Result<Vec<PathBuf>, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (dir, region) = (&layout.dir, layout.region);
    std::fs::create_dir_all(dir).map_err(|e| text(&e))?;
    let dir = dir.canonicalize().map_err(|e| text(&e))?;
    let ports = match layout.first_port {
        0 => free_ports(3 * layout.nodes).map_err(|e| text(&e))?,
        first => (0..3 * layout.nodes as u16).map(|n| first + n).collect(),
    };
    let address = |n: usize| SocketAddr::from(([127, 0, 0, 1], ports[n]));
    let peers: Vec<SocketAddr> = (0..layout.nodes)
        .map(|n| address(layout.nodes + n))
        .collect();
    let authority = pki::Authority::create(&dir.join("ca.pem"), &dir.join("ca-key.pem"), region)?;
    authority.operator(
        region,
        "admin",
        &dir.join("operator.pem"),
        &dir.join("operator-key.pem"),
    )?;
    let keyfile = Keyfile::new(dir.join("keys.json"));
    keyfile.add("region").map_err(|e| text(&e))?;
    let mut files = Vec::new();
    for (n, zone) in ('a'..='z').take(layout.nodes).enumerate() {
        let name = format!("node{}", n + 1);
        let home = dir.join(&name);
        std::fs::create_dir_all(&home).map_err(|e| text(&e))?;
        let (cert, key) = (home.join("node.pem"), home.join("node-key.pem"));
        authority.node(region, &zone.to_string(), &name, &cert, &key)?;
        let config = NodeConfig {
            name,
            region,
            zone: zone.to_string(),
            data_dir: home.join("data"),
            peer_address: peers[n],
            client_address: address(n),
            admin_address: address(2 * layout.nodes + n),
            client_url: None,
            peers: peers.clone(),
            region_key: "local:region".into(),
            bucket: layout.bucket.clone(),
            tls: TlsFiles {
                ca: dir.join("ca.pem"),
                cert,
                key,
            },
            client_tls: None,
            max_log_bytes: None,
            scan_every_s: None,
            kms: KmsConfig {
                calls_per_s: None,
                local: Some(LocalKms {
                    keyfile: dir.join("keys.json"),
                }),
                aws: None,
            },
            log: LogConfig::default(),
        };
        let file = home.join("node.toml");
        let toml = toml::to_string(&config).map_err(|e| text(&e))?;
        kms::local::write_private(&file, toml.as_bytes()).map_err(|e| text(&e))?;
        files.push(file);
    }
    write_operator(
        &dir,
        (0..layout.nodes)
            .map(|n| address(2 * layout.nodes + n))
            .collect(),
    )?;
    Ok(files)
}

/// operator.toml, which `holdfast` reads.
fn write_operator(dir: &Path, admin: Vec<SocketAddr>) -> Result<(), String> {
    let config = crate::admin_client::OperatorConfig {
        endpoints: admin,
        ca: dir.join("ca.pem"),
        cert: dir.join("operator.pem"),
        key: dir.join("operator-key.pem"),
    };
    let toml = toml::to_string(&config).map_err(|e| e.to_string())?;
    kms::local::write_private(&dir.join("operator.toml"), toml.as_bytes())
        .map_err(|e| e.to_string())
}

/// Starts every node of a laid-out region in this process.
pub async fn start(files: &[PathBuf]) -> Result<Vec<Arc<Node>>, String> {
    let mut nodes = Vec::new();
    for file in files {
        nodes.push(Node::start(NodeConfig::load(file)?).await?);
    }
    Ok(nodes)
}
