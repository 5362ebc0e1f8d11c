//! The KMS behind one trait: wrap and unwrap under a customer's key, with an exact context.
//!
//! An error says what happened, because it is acted upon differently: the KMS
//! *refused* (proof that the key was taken away), it *could not be asked* (no proof of anything),
//! the ciphertext does not belong to this key and context (swapped or damaged), the key lies outside the
//! jurisdiction, or it cannot be asked for here at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::lease::boottime;
use crate::meter::Meter;
use crate::{Region, TenantId};

/// A queue for a provider beyond which sealed tenants do not try their keys.
const BUSY: Duration = Duration::from_secs(1);

/// Why a KMS refused: each is proof that the key is not to be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Disabled,
    PendingDeletion,
    PendingImport,
    Unavailable,
    AccessDenied,
    NotFound,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Refusal::Disabled => "disabled",
            Refusal::PendingDeletion => "pending deletion",
            Refusal::PendingImport => "pending import",
            Refusal::Unavailable => "unavailable",
            Refusal::AccessDenied => "access denied",
            Refusal::NotFound => "not found",
        })
    }
}

#[derive(Debug, Error)]
pub enum KmsError {
    #[error("the KMS refuses key {key}: {refusal}. {hint}")]
    Refused {
        key: String,
        refusal: Refusal,
        hint: &'static str,
    },
    #[error("the KMS of key {key} cannot be asked: {cause}")]
    Unreachable { key: String, cause: String },
    #[error("key {key} does not open this ciphertext in this context: it was swapped or damaged")]
    WrongCiphertext { key: String },
    /// It lies outside the jurisdiction.
    #[error("{0}")]
    Outside(String),
    #[error("{0}")]
    Invalid(String),
}

impl KmsError {
    pub fn refused(key: &KeyUri, refusal: Refusal) -> Self {
        let hint = match refusal {
            Refusal::Disabled => "Enable it to resume",
            Refusal::PendingDeletion => "Cancel the deletion and enable it to resume",
            Refusal::PendingImport => "Import its material again to resume",
            Refusal::Unavailable => "Its custom key store must be connected",
            Refusal::AccessDenied => {
                "Its policy must allow Encrypt, Decrypt and DescribeKey to this node"
            }
            Refusal::NotFound => "A deleted key cannot be brought back",
        };
        KmsError::Refused {
            key: key.to_string(),
            refusal,
            hint,
        }
    }
}

/// Names a KEK: `local:NAME`, or the full ARN of an AWS KMS key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyUri {
    Local(String),
    Aws { arn: String, cloud_region: String },
}

impl KeyUri {
    /// Whether it may have replicas in other cloud regions.
    pub fn is_multi_region(&self) -> bool {
        matches!(self, KeyUri::Aws { arn, .. } if arn.contains(":key/mrk-"))
    }

    /// Refuses a key whose name says that it lies outside `region`.
    pub fn check_jurisdiction(&self, region: Region) -> Result<(), KmsError> {
        let KeyUri::Aws { arn, cloud_region } = self else {
            return Ok(());
        };
        region
            .admits(&format!("KMS key {arn}"), cloud_region)
            .map_err(KmsError::Outside)?;
        Ok(())
    }
}

impl std::fmt::Display for KeyUri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeyUri::Local(name) => write!(f, "local:{name}"),
            KeyUri::Aws { arn, .. } => f.write_str(arn),
        }
    }
}

impl std::str::FromStr for KeyUri {
    type Err = KmsError;
    fn from_str(s: &str) -> Result<Self, KmsError> {
        if let Some(name) = s.strip_prefix("local:") {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
            if !name.is_empty() && name.len() <= 128 && name.chars().all(plain) {
                return Ok(KeyUri::Local(name.to_string()));
            }
            return Err(KmsError::Invalid(format!(
                "\"{s}\" is not a local key: after local: come 1 to 128 letters, digits, '-', '_' or '.'"
            )));
        }
        let parts: Vec<&str> = s.splitn(6, ':').collect();
        match parts[..] {
            ["arn", partition, "kms", cloud_region, _, id]
                if partition.starts_with("aws") && id.starts_with("key/") =>
            {
                Ok(KeyUri::Aws {
                    arn: s.to_string(),
                    cloud_region: cloud_region.to_string(),
                })
            }
            _ => Err(KmsError::Invalid(format!(
                "\"{s}\" is not a key; use local:NAME or arn:aws:kms:REGION:ACCOUNT:key/ID"
            ))),
        }
    }
}

impl Serialize for KeyUri {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyUri {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The encryption context {tenant, region, purpose}. A ciphertext opens under exactly the context
/// that it was made under.
#[derive(Clone, Debug)]
pub struct Context {
    pub tenant: TenantId,
    pub region: Region,
    pub purpose: &'static str,
}

impl Context {
    pub fn pairs(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("tenant", self.tenant.to_string()),
            ("region", self.region.to_string()),
            ("purpose", self.purpose.to_string()),
        ])
    }

    /// One unambiguous byte string, for providers without a context of their own.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (k, v) in self.pairs() {
            for part in [k, &v] {
                out.extend_from_slice(&(part.len() as u32).to_be_bytes());
                out.extend_from_slice(part.as_bytes());
            }
        }
        out
    }
}

/// A KMS. Plaintexts are at most 4 KiB. Calls are bounded in time by the provider.
#[async_trait]
pub trait Provider: Send + Sync {
    async fn wrap(&self, key: &KeyUri, plain: &[u8], ctx: &Context) -> Result<Vec<u8>, KmsError>;
    async fn unwrap(
        &self,
        key: &KeyUri,
        wrapped: &[u8],
        ctx: &Context,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError>;
    /// The cloud regions that hold the key or a replica of it, as the KMS says; none for a key that
    /// is in no cloud.
    async fn locations(&self, key: &KeyUri) -> Result<Vec<String>, KmsError>;
}

/// The providers a node is configured with, by kind of key. Every call goes through the provider's
/// meter.
#[derive(Clone, Default)]
pub struct Providers {
    local: Option<Arc<Metered>>,
    aws: Option<Arc<Metered>>,
}

/// A provider and the rate at which it is asked.
struct Metered {
    provider: Arc<dyn Provider>,
    meter: Meter,
}

impl Metered {
    /// Tells the meter whether there was an answer.
    fn noted<T>(&self, answer: Result<T, KmsError>) -> Result<T, KmsError> {
        let silent = matches!(&answer, Err(KmsError::Unreachable { .. }));
        self.meter.answered(!silent);
        answer
    }
}

impl Providers {
    /// `rate`: calls a second, at most.
    pub fn set_local(&mut self, provider: Arc<dyn Provider>, rate: f64) {
        let meter = Meter::new(rate);
        self.local = Some(Arc::new(Metered { provider, meter }));
    }

    /// `rate`: calls a second, at most.
    pub fn set_aws(&mut self, provider: Arc<dyn Provider>, rate: f64) {
        let meter = Meter::new(rate);
        self.aws = Some(Arc::new(Metered { provider, meter }));
    }

    fn of(&self, key: &KeyUri) -> Result<&Arc<Metered>, KmsError> {
        let (provider, section) = match key {
            KeyUri::Local(_) => (&self.local, "[kms.local]"),
            KeyUri::Aws { .. } => (&self.aws, "[kms.aws]"),
        };
        provider.as_ref().ok_or_else(|| {
            KmsError::Invalid(format!(
                "no provider for key {key}: node.toml has no {section} section"
            ))
        })
    }

    /// The provider of `key`, once it is this call's turn.
    async fn turn(&self, key: &KeyUri) -> Result<&Metered, KmsError> {
        let of = self.of(key)?;
        of.meter.turn().await;
        Ok(of)
    }

    pub async fn wrap(
        &self,
        key: &KeyUri,
        plain: &[u8],
        ctx: &Context,
    ) -> Result<Vec<u8>, KmsError> {
        let of = self.turn(key).await?;
        of.noted(of.provider.wrap(key, plain, ctx).await)
    }

    /// Answers the plaintext, and when the KMS was asked, on the clock of `boottime`.
    pub async fn unwrap(
        &self,
        key: &KeyUri,
        wrapped: &[u8],
        ctx: &Context,
    ) -> Result<(Zeroizing<Vec<u8>>, Duration), KmsError> {
        let of = self.turn(key).await?;
        let sent = boottime();
        let plain = of.noted(of.provider.unwrap(key, wrapped, ctx).await)?;
        Ok((plain, sent))
    }

    /// Refuses a key that is not wholly inside `region`; answers the cloud regions it lies in. The
    /// KMS is asked about keys that may have replicas.
    pub async fn check_jurisdiction(
        &self,
        key: &KeyUri,
        region: Region,
    ) -> Result<Vec<String>, KmsError> {
        let KeyUri::Aws { arn, cloud_region } = key else {
            return Ok(Vec::new());
        };
        key.check_jurisdiction(region)?;
        if !key.is_multi_region() {
            return Ok(vec![cloud_region.clone()]);
        }
        let of = self.turn(key).await?;
        let found = of.noted(of.provider.locations(key).await)?;
        for place in &found {
            region
                .admits(&format!("a replica of multi-region KMS key {arn}"), place)
                .map_err(KmsError::Outside)?;
        }
        Ok(found)
    }

    /// Whether calls about `key` wait so long for their turn that one which can wait had better not
    /// be made.
    pub fn is_busy(&self, key: &KeyUri) -> bool {
        self.of(key).is_ok_and(|of| of.meter.queue() > BUSY)
    }

    /// Calls made so far, of both kinds of keys.
    pub fn calls(&self) -> u64 {
        let of = [&self.local, &self.aws].into_iter().flatten();
        of.map(|p| p.meter.calls()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_uris() {
        assert_eq!(
            "local:acme".parse::<KeyUri>().unwrap().to_string(),
            "local:acme"
        );
        for bad in [
            "",
            "acme",
            "local:",
            "local:a/b",
            "arn:aws:s3:::b",
            "arn:aws:kms:eu-west-1:1:alias/x",
        ] {
            assert!(bad.parse::<KeyUri>().is_err(), "{bad}");
        }
        let outside: KeyUri = "arn:aws:kms:eu-west-2:1:key/x".parse().unwrap();
        let e = outside
            .check_jurisdiction(Region::Eu)
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("eu-west-2") && e.contains("jurisdiction eu"),
            "{e}"
        );
    }

    /// A KMS that answers where a multi-region key lies.
    struct Placed(Vec<String>);

    #[async_trait]
    impl Provider for Placed {
        async fn wrap(&self, _: &KeyUri, _: &[u8], _: &Context) -> Result<Vec<u8>, KmsError> {
            Err(KmsError::Invalid("not asked here".into()))
        }
        async fn unwrap(
            &self,
            _: &KeyUri,
            _: &[u8],
            _: &Context,
        ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
            Err(KmsError::Invalid("not asked here".into()))
        }
        async fn locations(&self, _: &KeyUri) -> Result<Vec<String>, KmsError> {
            Ok(self.0.clone())
        }
    }

    #[tokio::test]
    async fn replicas_of_a_multi_region_key_are_checked() {
        let key: KeyUri = "arn:aws:kms:eu-west-1:1:key/mrk-1".parse().unwrap();
        let asked = |places: &[&str]| {
            let mut providers = Providers::default();
            let places = places.iter().map(|p| p.to_string()).collect();
            providers.set_aws(Arc::new(Placed(places)), 100.0);
            providers
        };
        let inside = asked(&["eu-west-1", "eu-north-1"]);
        assert!(inside.check_jurisdiction(&key, Region::Eu).await.is_ok());
        let outside = asked(&["eu-west-1", "us-east-1"]);
        let refused = outside.check_jurisdiction(&key, Region::Eu).await;
        let why = refused.unwrap_err().to_string();
        assert!(
            why.contains("us-east-1") && why.contains("jurisdiction eu"),
            "{why}"
        );
    }
}
