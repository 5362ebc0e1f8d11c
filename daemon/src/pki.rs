//! Certificates of a region: an authority, its nodes and operators. Private keys are mode 0600.

use std::path::Path;

use kms::Region;
use kms::local::write_private;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use replication::network::Identity;
use time::{Duration, OffsetDateTime};

const CA_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 825;

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

fn save(path: &Path, pem: &str) -> Result<(), String> {
    write_private(path, pem.as_bytes()).map_err(|e| format!("{}: {e}", path.display()))
}

fn named(common: &str, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(days);
    params
}

impl Authority {
    /// Makes an authority and saves it.
    pub fn create(cert: &Path, key: &Path, region: Region) -> Result<Self, String> {
        let mut params = named(&format!("holdfast {region}"), CA_DAYS);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pair = KeyPair::generate().map_err(|e| e.to_string())?;
        let made = params.self_signed(&pair).map_err(|e| e.to_string())?;
        save(cert, &made.pem())?;
        save(key, &pair.serialize_pem())?;
        Ok(Authority {
            issuer: Issuer::new(params, pair),
        })
    }

    /// Loads a saved one.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, String> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let pair = KeyPair::from_pem(&read(key)?).map_err(|e| format!("{}: {e}", key.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&read(cert)?, pair)
            .map_err(|e| format!("{}: {e}", cert.display()))?;
        Ok(Authority { issuer })
    }

    pub fn node(
        &self,
        region: Region,
        zone: &str,
        name: &str,
        cert: &Path,
        key: &Path,
    ) -> Result<(), String> {
        let identity = Identity::Node {
            region,
            zone: zone.into(),
            name: name.into(),
        };
        let usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(name, &identity, usages, cert, key)
    }

    pub fn operator(
        &self,
        region: Region,
        name: &str,
        cert: &Path,
        key: &Path,
    ) -> Result<(), String> {
        let identity = Identity::Operator {
            region,
            name: name.into(),
        };
        self.issue(
            name,
            &identity,
            vec![ExtendedKeyUsagePurpose::ClientAuth],
            cert,
            key,
        )
    }

    fn issue(
        &self,
        common: &str,
        identity: &Identity,
        usages: Vec<ExtendedKeyUsagePurpose>,
        cert: &Path,
        key: &Path,
    ) -> Result<(), String> {
        let mut params = named(common, LEAF_DAYS);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        let uri = identity
            .uri()
            .try_into()
            .map_err(|e: rcgen::Error| e.to_string())?;
        let host = "holdfast.internal"
            .try_into()
            .map_err(|e: rcgen::Error| e.to_string())?;
        params.subject_alt_names = vec![SanType::DnsName(host), SanType::URI(uri)];
        let pair = KeyPair::generate().map_err(|e| e.to_string())?;
        let made = params
            .signed_by(&pair, &self.issuer)
            .map_err(|e| e.to_string())?;
        save(cert, &made.pem())?;
        save(key, &pair.serialize_pem())
    }
}
