//! `holdfastd`: one node of a region, or a whole small one for developers.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use holdfast_daemon::admin_client::OperatorConfig;
use holdfast_daemon::config::{LogConfig, NodeConfig};
use holdfast_daemon::dev::{self, Layout};
use holdfast_daemon::logging;
use holdfast_daemon::node::Node;
use holdfast_daemon::proto::admin::CreateTenantRequest;
use kms::Region;
use kms::local::Keyfile;
use replication::archive::bucket::BucketConfig;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(version, about = "Region-sharded storage and backup daemon")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one node.
    Run {
        /// The node's node.toml.
        #[arg(long)]
        config: PathBuf,
    },
    /// Runs a three-zone region in this process, on loopback, for trying it out.
    Dev {
        /// Where its files go; a fresh temporary directory, removed at the end, if not given.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// The first of nine ports; free ones if 0.
        #[arg(long, default_value_t = 2379)]
        port: u16,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let forbidden = kms::guarded::forbid_dumps();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ended = match Arguments::parse().command {
        Command::Run { config } => run(config, forbidden).await,
        Command::Dev { dir, port } => run_dev(dir, port).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("holdfastd: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn until_stopped() -> Result<(), String> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}

/// `no_dumps`: core dumps are forbidden.
async fn run(path: PathBuf, no_dumps: bool) -> Result<(), String> {
    let config = NodeConfig::load(&path)?;
    logging::start(&config.log);
    if !no_dumps {
        tracing::warn!("the kernel does not let this process forbid core dumps");
    }
    let node = Node::start(config).await?;
    tracing::info!(node = %node.config.name, region = %node.config.region, zone = %node.config.zone, clients = %node.config.client_address, "node is up");
    until_stopped().await?;
    tracing::info!("stopping");
    node.shutdown().await;
    Ok(())
}

async fn run_dev(dir: Option<PathBuf>, port: u16) -> Result<(), String> {
    logging::start(&LogConfig {
        filter: Some("warn,openraft=off".into()),
        ..LogConfig::default()
    });
    let started = Instant::now();
    let temporary = dir.is_none();
    let dir = dir.unwrap_or_else(|| {
        let tag = hex::encode(kms::secret::random_bytes::<6>());
        std::env::temp_dir().join(format!("holdfast-dev-{tag}"))
    });
    let fresh = !dir.join("operator.toml").exists();
    let files = match fresh {
        true => dev::lay_out(&Layout {
            region: Region::Eu,
            bucket: BucketConfig {
                url: format!(
                    "file://{}",
                    std::path::absolute(dir.join("bucket"))
                        .map_err(|e| e.to_string())?
                        .display()
                ),
                cloud_region: None,
                endpoint: None,
                object_lock: None,
            },
            dir: dir.clone(),
            nodes: 3,
            first_port: port,
        })?,
        false => (1..=3)
            .map(|n| dir.join(format!("node{n}/node.toml")))
            .collect(),
    };
    let nodes = dev::start(&files).await?;
    let endpoints: Vec<String> = nodes
        .iter()
        .map(|n| n.config.client_address.to_string())
        .collect();
    if fresh {
        Keyfile::new(dir.join("keys.json"))
            .add("acme")
            .map_err(|e| e.to_string())?;
        create_tenant(&dir).await?;
    }
    println!(
        "A region of three zones is ready after {:.1} s; its files are in {}.",
        started.elapsed().as_secs_f64(),
        dir.display()
    );
    println!("Tenant acme, user app, password development. Try:\n");
    println!("  export ETCDCTL_ENDPOINTS={}", endpoints.join(","));
    println!("  etcdctl --user app@acme:development put greeting hello");
    println!("  etcdctl --user app@acme:development get greeting\n");
    println!(
        "Operators: holdfast --config {} tenant list",
        dir.join("operator.toml").display()
    );
    until_stopped().await?;
    for node in &nodes {
        node.shutdown().await;
    }
    if temporary {
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok(())
}

async fn create_tenant(dir: &std::path::Path) -> Result<(), String> {
    let operator = OperatorConfig::load(&dir.join("operator.toml"))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut client = operator.connect().await?;
        let asked = client.create_tenant(CreateTenantRequest {
            name: "acme".into(),
            tier: "enhanced".into(),
            rpo_ms: Some(1000),
            rto_ms: 60_000,
            key: "local:acme".into(),
            user: "app".into(),
            password: "development".into(),
            quota_bytes: 0,
            key_grace_s: None,
        });
        match asked.await {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() >= deadline => {
                return Err(format!("tenant acme: {}", e.message()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}
