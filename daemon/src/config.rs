//! node.toml. Unknown fields are refused; all errors are reported at once.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use kms::Region;
use replication::archive::bucket::BucketConfig;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    pub name: String,
    pub region: Region,
    pub zone: String,
    pub data_dir: PathBuf,
    /// Peers reach this node here.
    pub peer_address: SocketAddr,
    /// Clients reach this node here.
    pub client_address: SocketAddr,
    /// Operators and Prometheus reach this node here.
    pub admin_address: SocketAddr,
    /// What clients are told to dial, if not the address above.
    pub client_url: Option<String>,
    /// Peer addresses of the region's nodes; the first founds the region.
    pub peers: Vec<SocketAddr>,
    /// The region's own key, for the directory.
    pub region_key: String,
    pub bucket: BucketConfig,
    pub tls: TlsFiles,
    /// TLS towards clients; without it they speak plaintext.
    pub client_tls: Option<ClientTls>,
    /// Bytes of log above which entries go although the bucket has been away too long to take
    /// them; no moment among those can be restored.
    pub max_log_bytes: Option<u64>,
    /// Seconds between two scans of a replica against its digest.
    pub scan_every_s: Option<u64>,
    #[serde(default)]
    pub kms: KmsConfig,
    #[serde(default)]
    pub log: LogConfig,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KmsConfig {
    pub local: Option<LocalKms>,
    pub aws: Option<AwsKms>,
    /// Calls a second to one provider, at most.
    pub calls_per_s: Option<f64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalKms {
    pub keyfile: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AwsKms {
    pub cloud_region: String,
    pub endpoint: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// One JSON object a line instead of text.
    #[serde(default)]
    pub json: bool,
    /// A filter such as `info` or `holdfast_replication=debug`.
    pub filter: Option<String>,
}

impl NodeConfig {
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let config: NodeConfig =
            toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        let problems = config.problems();
        if problems.is_empty() {
            return Ok(config);
        }
        Err(format!("{}:\n  {}", path.display(), problems.join("\n  ")))
    }

    /// Everything that is wrong, so that it can be put right at once.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self
            .kms
            .calls_per_s
            .is_some_and(|rate| !(1.0..=10_000.0).contains(&rate))
        {
            found.push("kms.calls_per_s: use 1 to 10000".into());
        }
        for (what, name) in [("name", &self.name), ("zone", &self.zone)] {
            let plain = name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
            if name.is_empty() || name.len() > crate::limits::MAX_NAME || !plain {
                found.push(format!(
                    "{what} \"{name}\": use 1 to 63 letters, digits, '-' or '_'"
                ));
            }
        }
        if self.peers.len() < 3 {
            found.push(format!(
                "peers: {} are named; a region needs three nodes in three zones",
                self.peers.len()
            ));
        }
        if !self.peers.contains(&self.peer_address) {
            found.push(format!(
                "peers: this node's own peer_address {} is not among them",
                self.peer_address
            ));
        }
        match self.region_key.parse::<kms::KeyUri>() {
            Ok(key) => found.extend(
                key.check_jurisdiction(self.region)
                    .err()
                    .map(|e| format!("region_key: {e}")),
            ),
            Err(e) => found.push(format!("region_key: {e}")),
        }
        let mut files = vec![
            ("tls.ca", &self.tls.ca),
            ("tls.cert", &self.tls.cert),
            ("tls.key", &self.tls.key),
        ];
        if let Some(tls) = &self.client_tls {
            files.extend([("client_tls.cert", &tls.cert), ("client_tls.key", &tls.key)]);
        }
        for (what, file) in files {
            if !file.is_file() {
                found.push(format!("{what}: {} is not a file", file.display()));
            }
        }
        if self.bucket.url.starts_with("s3:") && self.bucket.cloud_region.is_none() {
            found.push(
                "bucket.cloud_region: an s3 bucket needs it, to be checked against the region"
                    .into(),
            );
        }
        if let Some(lock) = &self.bucket.object_lock {
            found.extend(lock.problem());
            if !self.bucket.url.starts_with("s3:") {
                found.push("bucket.object_lock: only a bucket of S3 has an Object Lock".into());
            }
        }
        if self
            .max_log_bytes
            .is_some_and(|bytes| bytes < crate::limits::MIN_LOG)
        {
            found.push(format!(
                "max_log_bytes: below {} the log has no room for its own files",
                crate::limits::MIN_LOG
            ));
        }
        if let Some(cloud) = &self.bucket.cloud_region {
            found.extend(self.region.admits("bucket", cloud).err());
        }
        if let Some(aws) = &self.kms.aws {
            found.extend(self.region.admits("kms.aws", &aws.cloud_region).err());
        }
        found
    }

    /// The node that founds the region.
    pub fn is_founder(&self) -> bool {
        self.peers.first() == Some(&self.peer_address)
    }

    pub fn client_url(&self) -> String {
        let scheme = if self.client_tls.is_some() {
            "https"
        } else {
            "http"
        };
        self.client_url
            .clone()
            .unwrap_or_else(|| format!("{scheme}://{}", self.client_address))
    }
}
