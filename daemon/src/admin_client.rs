//! The client side of the admin API: what `holdfast` and the tests use.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use replication::network::NodeTls;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::proto::admin::admin_client::AdminClient;

/// operator.toml.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorConfig {
    /// Admin addresses of the region's nodes; the first that answers is asked.
    pub endpoints: Vec<SocketAddr>,
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl OperatorConfig {
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        toml::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// A client of the first node that answers.
    pub async fn connect(&self) -> Result<AdminClient<Channel>, String> {
        let mut why = "operator.toml names no endpoints".to_string();
        for endpoint in &self.endpoints {
            match self.connect_to(*endpoint).await {
                Ok(client) => return Ok(client),
                Err(e) => why = format!("{endpoint}: {e}"),
            }
        }
        Err(format!("no node answers; the last said: {why}"))
    }

    pub async fn connect_to(&self, address: SocketAddr) -> Result<AdminClient<Channel>, String> {
        let tls =
            NodeTls::load(&self.ca, &self.cert, &self.key, &[b"h2"]).map_err(|e| e.to_string())?;
        let config = tls.client;
        let connector = tower::service_fn(move |_: http::Uri| {
            let config = config.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let name =
                    ServerName::try_from("holdfast.internal").map_err(std::io::Error::other)?;
                let tls = tokio_rustls::TlsConnector::from(config)
                    .connect(name, tcp)
                    .await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls))
            }
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| e.to_string())?
            .connect_timeout(Duration::from_secs(3));
        let channel = endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|e| {
                let cause = std::error::Error::source(&e).map(ToString::to_string);
                cause.unwrap_or_else(|| e.to_string())
            })?;
        Ok(AdminClient::new(channel))
    }
}
