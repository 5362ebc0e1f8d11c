//! Signed statements of a node: reports and certificates that are checked offline, with the region's
//! authority alone.
//!
//! `{format, kind, body, certificate, signature}`, JSON: the body is a JSON text, signed as it stands with
//! the key of the node's certificate (ECDSA P-256, SHA-256) behind the label below.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use replication::network::Identity;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{SignatureScheme, crypto::ring::sign::any_ecdsa_type};
use serde::{Deserialize, Serialize};

use crate::config::TlsFiles;

const FORMAT: u32 = 1;
const LABEL: &[u8] = b"holdfast/v1/signed\0";

/// What a statement is. It is part of what is signed: one kind cannot stand in for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Residency,
    Destruction,
    Drill,
    Recovery,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    pub format: u32,
    pub kind: Kind,
    /// JSON text.
    pub body: String,
    /// The node's certificate, PEM.
    pub certificate: String,
    /// Hex.
    pub signature: String,
}

/// What every body says of itself.
#[derive(Deserialize)]
struct Stated {
    /// Milliseconds since 1970.
    at_ms: u64,
}

fn message(kind: Kind, body: &str) -> Vec<u8> {
    let kind = match kind {
        Kind::Residency => b"residency\0".as_slice(),
        Kind::Destruction => b"destruction\0",
        Kind::Drill => b"drill\0",
        Kind::Recovery => b"recovery\0",
    };
    [LABEL, kind, body.as_bytes()].concat()
}

/// Signs `body`, which must have a field `at_ms`, with this node's key.
pub fn sign<T: Serialize>(files: &TlsFiles, kind: Kind, body: &T) -> Result<Signed, String> {
    let at = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let body = serde_json::to_string(body).map_err(|e| e.to_string())?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| at(&files.key, &e))?;
    let key = any_ecdsa_type(&key).map_err(|e| at(&files.key, &e))?;
    let signer = key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]);
    let signer = signer.ok_or_else(|| at(&files.key, &"it is not an ECDSA P-256 key"))?;
    let signature = signer
        .sign(&message(kind, &body))
        .map_err(|e| e.to_string())?;
    // Nothing else that the file may hold.
    let certificate =
        CertificateDer::from_pem_file(&files.cert).map_err(|e| at(&files.cert, &e))?;
    let base64 = base64::engine::general_purpose::STANDARD.encode(&certificate);
    let certificate = format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n");
    Ok(Signed {
        format: FORMAT,
        kind,
        body,
        certificate,
        signature: hex::encode(signature),
    })
}

/// Checks a statement against the authority `ca`; answers who signed it. The certificate must have
/// been valid when the statement was made.
pub fn verify(signed: &Signed, ca: &CertificateDer<'_>) -> Result<Identity, String> {
    if signed.format != FORMAT {
        return Err(format!(
            "it has format {}; this version reads {FORMAT}",
            signed.format
        ));
    }
    let stated: Stated =
        serde_json::from_str(&signed.body).map_err(|e| format!("its body: {e}"))?;
    let certificate = CertificateDer::from_pem_slice(signed.certificate.as_bytes())
        .map_err(|e| format!("its certificate: {e}"))?;
    let anchor = webpki::anchor_from_trusted_cert(ca).map_err(|e| format!("the authority: {e}"))?;
    let leaf = webpki::EndEntityCert::try_from(&certificate)
        .map_err(|e| format!("its certificate: {e}"))?;
    let made = UnixTime::since_unix_epoch(Duration::from_millis(stated.at_ms));
    leaf.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        &[anchor],
        &[],
        made,
        webpki::KeyUsage::client_auth(),
        None,
        None,
    )
    .map_err(|e| format!("its certificate is not one of this authority: {e}"))?;
    let signature = hex::decode(&signed.signature).map_err(|e| format!("its signature: {e}"))?;
    leaf.verify_signature(
        webpki::ring::ECDSA_P256_SHA256,
        &message(signed.kind, &signed.body),
        &signature,
    )
    .map_err(|_| "its signature is not that of its certificate: it was changed".to_string())?;
    match Identity::of(&certificate).map_err(|e| e.to_string())? {
        node @ Identity::Node { .. } => Ok(node),
        Identity::Operator { .. } => Err("it is signed by an operator, not by a node".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;
    use kms::Region;

    #[derive(Serialize)]
    struct Body {
        at_ms: u64,
        said: &'static str,
    }

    #[test]
    fn a_statement_verifies_and_a_changed_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let make = |ca: &str| {
            let key = file(&format!("{ca}-key"));
            Authority::create(&file(ca), &key, Region::Eu).unwrap()
        };
        make("ca")
            .node(Region::Eu, "a", "node1", &file("cert"), &file("key"))
            .unwrap();
        make("other");
        let files = TlsFiles {
            ca: file("ca"),
            cert: file("cert"),
            key: file("key"),
        };
        let at_ms = crate::tenant::key::now_ms();
        let body = Body {
            at_ms,
            said: "here",
        };
        let mut signed = sign(&files, Kind::Residency, &body).unwrap();
        let ca = |name: &str| CertificateDer::from_pem_file(file(name)).unwrap();
        let by = verify(&signed, &ca("ca")).unwrap();
        assert_eq!(by.uri(), "holdfast://eu/node/a/node1");
        assert!(verify(&signed, &ca("other")).is_err());
        signed.kind = Kind::Destruction;
        assert!(verify(&signed, &ca("ca")).is_err());
        signed.kind = Kind::Residency;
        let whole = signed.body.clone();
        signed.body = whole.replace("here", "there");
        assert!(verify(&signed, &ca("ca")).unwrap_err().contains("changed"));
        // Made before its certificate was.
        signed.body = whole.replace(&at_ms.to_string(), "1000");
        assert!(verify(&signed, &ca("ca")).is_err());
    }
}
