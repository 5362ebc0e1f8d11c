//! `holdfast init`: the files of a new region.

use std::process::ExitCode;

use daemon::dev::{Layout, lay_out};
use replication::archive::bucket::BucketConfig;

use crate::args::Init;

pub fn run(init: Init) -> Result<ExitCode, String> {
    if init.nodes < 3 {
        return Err("a region needs three nodes in three zones or more: two cannot survive the loss of either".into());
    }
    if init.nodes > 9 {
        return Err("init lays out up to nine nodes; add others with their own node.toml".into());
    }
    if init.dir.join("ca.pem").exists() {
        return Err(format!(
            "{} holds a region's certificates already; choose another --dir",
            init.dir.display()
        ));
    }
    let url = match init.bucket {
        Some(url) => url,
        None => {
            let dir = std::path::absolute(init.dir.join("bucket")).map_err(|e| e.to_string())?;
            format!("file://{}", dir.display())
        }
    };
    if let Some(cloud) = &init.cloud_region {
        init.region.admits("bucket", cloud)?;
    }
    let files = lay_out(&Layout {
        region: init.region,
        dir: init.dir.clone(),
        nodes: init.nodes,
        first_port: init.port,
        bucket: BucketConfig {
            url,
            cloud_region: init.cloud_region,
            endpoint: init.endpoint,
            object_lock: None,
        },
    })?;
    println!("Wrote a certificate authority, operator.toml and, for each node, a certificate and:");
    for file in &files {
        println!("  {}", file.display());
    }
    println!(
        "Keep ca-key.pem and keys.json away from the nodes' disks; they are in {}.",
        init.dir.display()
    );
    println!("Start each node with: holdfastd run --config NODE.TOML");
    Ok(ExitCode::SUCCESS)
}
