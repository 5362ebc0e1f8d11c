//! The `aws` provider: AWS KMS, or anything that speaks its protocol at a configured endpoint.
//!
//! Calls are bounded to five seconds and are not retried here: the caller knows whether a refusal
//! or a time-out matters. Credentials come from the environment, as AWS tools take them.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region as AwsRegion, SdkConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_smithy_http_client::{Builder as HttpBuilder, tls};
use zeroize::Zeroizing;

use crate::{Context, KeyUri, KmsError, Provider, Refusal};

const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A client of one KMS endpoint.
pub struct AwsKms {
    client: Client,
}

impl AwsKms {
    /// `endpoint`: a URL, or none for AWS's own in `cloud_region`.
    pub async fn connect(cloud_region: &str, endpoint: Option<&str>) -> Self {
        AwsKms {
            client: Client::new(&sdk_config(cloud_region, endpoint).await),
        }
    }
}

/// How clients of AWS's services, or of what speaks like them at `endpoint`, are made.
pub async fn sdk_config(cloud_region: &str, endpoint: Option<&str>) -> SdkConfig {
    let http = HttpBuilder::new()
        .tls_provider(tls::Provider::Rustls(
            tls::rustls_provider::CryptoMode::Ring,
        ))
        .build_https();
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_timeout(CALL_TIMEOUT);
    let mut config = aws_config::defaults(BehaviorVersion::latest())
        .region(AwsRegion::new(cloud_region.to_string()))
        .http_client(http)
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts.build());
    if let Some(endpoint) = endpoint {
        config = config.endpoint_url(endpoint);
    }
    config.load().await
}

fn arn(key: &KeyUri) -> Result<&str, KmsError> {
    match key {
        KeyUri::Aws { arn, .. } => Ok(arn),
        KeyUri::Local(_) => Err(KmsError::Invalid(format!("{key} is not an AWS key"))),
    }
}

fn context(ctx: &Context) -> HashMap<String, String> {
    let pairs = ctx.pairs().into_iter();
    pairs.map(|(k, v)| (k.to_string(), v)).collect()
}

fn error<E, R>(key: &KeyUri, e: &SdkError<E, R>) -> KmsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    let unreachable = |cause: String| KmsError::Unreachable {
        key: key.to_string(),
        cause,
    };
    let service = match e {
        SdkError::ServiceError(service) => service,
        SdkError::TimeoutError(_) => {
            return unreachable(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
        }
        _ => return unreachable(DisplayErrorContext(e).to_string()),
    };
    let meta = service.err().meta();
    let message = meta.message().unwrap_or_default();
    match meta.code().unwrap_or_default() {
        "DisabledException" => KmsError::refused(key, Refusal::Disabled),
        "KMSInvalidStateException" if message.contains("pending import") => {
            KmsError::refused(key, Refusal::PendingImport)
        }
        "KMSInvalidStateException" if message.contains("navailable") => {
            KmsError::refused(key, Refusal::Unavailable)
        }
        "KMSInvalidStateException" => KmsError::refused(key, Refusal::PendingDeletion),
        "NotFoundException" => KmsError::refused(key, Refusal::NotFound),
        "AccessDeniedException" => KmsError::refused(key, Refusal::AccessDenied),
        "InvalidCiphertextException" | "IncorrectKeyException" => KmsError::WrongCiphertext {
            key: key.to_string(),
        },
        code => unreachable(format!("{code}: {message}")),
    }
}

#[async_trait]
impl Provider for AwsKms {
    async fn wrap(&self, key: &KeyUri, plain: &[u8], ctx: &Context) -> Result<Vec<u8>, KmsError> {
        let answer = self
            .client
            .encrypt()
            .key_id(arn(key)?)
            .plaintext(Blob::new(plain))
            .set_encryption_context(Some(context(ctx)))
            .send()
            .await
            .map_err(|e| error(key, &e))?;
        let blob = answer.ciphertext_blob();
        blob.map(|b| b.as_ref().to_vec())
            .ok_or_else(|| KmsError::Invalid(format!("the KMS of {key} answered no ciphertext")))
    }

    async fn unwrap(
        &self,
        key: &KeyUri,
        wrapped: &[u8],
        ctx: &Context,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let answer = self
            .client
            .decrypt()
            .key_id(arn(key)?)
            .ciphertext_blob(Blob::new(wrapped))
            .set_encryption_context(Some(context(ctx)))
            .send()
            .await
            .map_err(|e| error(key, &e))?;
        let plain = answer.plaintext;
        plain
            .map(|b| Zeroizing::new(b.into_inner()))
            .ok_or_else(|| KmsError::Invalid(format!("the KMS of {key} answered no plaintext")))
    }

    async fn locations(&self, key: &KeyUri) -> Result<Vec<String>, KmsError> {
        let answer = self
            .client
            .describe_key()
            .key_id(arn(key)?)
            .send()
            .await
            .map_err(|e| error(key, &e))?;
        let described = answer
            .key_metadata()
            .and_then(|m| m.multi_region_configuration());
        let described = described.ok_or_else(|| {
            KmsError::Invalid(format!(
                "the KMS of {key} does not say where its replicas lie"
            ))
        })?;
        let primary = described.primary_key().into_iter();
        let all = primary.chain(described.replica_keys());
        Ok(all.filter_map(|k| k.region().map(String::from)).collect())
    }
}
