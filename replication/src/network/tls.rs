//! Who a node is: certificates name region, zone and node as `holdfast://REGION/node/ZONE/NAME`,
//! operators as `holdfast://REGION/operator/NAME`.

use std::path::Path;
use std::sync::Arc;

use kms::Region;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

#[derive(Debug, Error)]
pub enum TlsError {
    #[error("{file}: {cause}")]
    File { file: String, cause: String },
    #[error("the peer's certificate is not one of this system's: {0}")]
    Foreign(String),
    #[error("the peer lies in jurisdiction {theirs}, this node in {ours}: refused")]
    OtherRegion { theirs: Region, ours: Region },
}

/// Whom a certificate names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    Node {
        region: Region,
        zone: String,
        name: String,
    },
    Operator {
        region: Region,
        name: String,
    },
}

impl Identity {
    pub fn uri(&self) -> String {
        match self {
            Identity::Node { region, zone, name } => {
                format!("holdfast://{region}/node/{zone}/{name}")
            }
            Identity::Operator { region, name } => format!("holdfast://{region}/operator/{name}"),
        }
    }

    fn parse(uri: &str) -> Option<Identity> {
        let mut parts = uri.strip_prefix("holdfast://")?.split('/');
        let region = parts.next()?.parse().ok()?;
        let identity = match (parts.next()?, parts.next()?, parts.next()) {
            ("node", zone, Some(name)) => Identity::Node {
                region,
                zone: zone.to_string(),
                name: name.to_string(),
            },
            ("operator", name, None) => Identity::Operator {
                region,
                name: name.to_string(),
            },
            _ => return None,
        };
        parts.next().is_none().then_some(identity)
    }

    /// Reads the identity of a verified certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Identity, TlsError> {
        let foreign = |what: &str| TlsError::Foreign(what.to_string());
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|_| foreign("it does not parse"))?;
        let names = parsed
            .subject_alternative_name()
            .ok()
            .flatten()
            .ok_or_else(|| foreign("it has no subject alternative name"))?;
        let mut uris = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Identity::parse(uri),
                _ => None,
            });
        uris.next()
            .ok_or_else(|| foreign("it names no holdfast:// identity"))
    }

    pub fn region(&self) -> Region {
        match self {
            Identity::Node { region, .. } | Identity::Operator { region, .. } => *region,
        }
    }

    /// Refuses an identity of another region.
    pub fn check_region(&self, ours: Region) -> Result<(), TlsError> {
        let theirs = self.region();
        if theirs == ours {
            return Ok(());
        }
        Err(TlsError::OtherRegion { theirs, ours })
    }
}

/// A node's certificate, key and authority, and whom they name.
#[derive(Clone)]
pub struct NodeTls {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
    pub identity: Identity,
}

impl NodeTls {
    /// Loads PEM files. `alpn`: protocols offered, for the admin port; empty between nodes.
    pub fn load(ca: &Path, cert: &Path, key: &Path, alpn: &[&[u8]]) -> Result<Self, TlsError> {
        let at = |file: &Path| {
            let file = file.display().to_string();
            move |cause: String| TlsError::File {
                file: file.clone(),
                cause,
            }
        };
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(ca).map_err(|e| at(ca)(e.to_string()))? {
            let root = root.map_err(|e| at(ca)(e.to_string()))?;
            roots.add(root).map_err(|e| at(ca)(e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
            .and_then(Iterator::collect)
            .map_err(|e| at(cert)(e.to_string()))?;
        let first = chain
            .first()
            .ok_or_else(|| at(cert)("it holds no certificate".into()))?;
        let identity = Identity::of(first)?;
        let private = PrivateKeyDer::from_pem_file(key).map_err(|e| at(key)(e.to_string()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| at(ca)(e.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| at(cert)(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), private.clone_key())
            .map_err(|e| at(cert)(e.to_string()))?;
        server.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| at(cert)(e.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, private)
            .map_err(|e| at(cert)(e.to_string()))?;
        client.alpn_protocols = alpn.iter().take(1).map(|p| p.to_vec()).collect();
        Ok(NodeTls {
            server: Arc::new(server),
            client: Arc::new(client),
            identity,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_parse_whole_or_not_at_all() {
        let node = Identity::Node {
            region: Region::Eu,
            zone: "a".into(),
            name: "n1".into(),
        };
        assert_eq!(Identity::parse(&node.uri()), Some(node.clone()));
        for bad in [
            "holdfast://eu/node/a",
            "holdfast://eu/node/a/n/x",
            "holdfast://fr/node/a/n",
            "https://eu/node/a/n",
            "holdfast://eu/operator/x/y",
        ] {
            assert_eq!(Identity::parse(bad), None, "{bad}");
        }
        assert!(node.check_region(Region::Us).is_err());
    }
}
