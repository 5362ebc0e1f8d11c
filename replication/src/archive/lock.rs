//! Object Lock: what the archive writes can be neither deleted nor replaced for some days, whoever asks.
//!
//! Invariants. A link, a manifest, a file of a checkpoint and the bootstrap are locked by the request that
//! writes them, so there is no moment at which they lie there unlocked. Wrapped keys never are: destroying a
//! key would be a lie. The scrub, which reads everything that is kept within its period, asks when each lock
//! ends and renews it before it lapses (`MIN_DAYS` is two periods); what the window does not need any more it
//! leaves alone, so that it can go. What the store refuses to renew is said and does not hold up the rest.

use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, ObjectLockMode};
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    UploadPart,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::OnceCell;

use super::bucket::{Bootstrap, BucketConfig};
use super::s3::{self, BucketLock, S3};

/// Two periods of the scrub, which renews locks.
pub const MIN_DAYS: u32 = 14;
/// As AWS has it.
pub const MAX_DAYS: u32 = 36_500;
const DAY_S: i64 = 24 * 3600;
const DAY_MS: u64 = DAY_S.unsigned_abs() * 1000;

/// How long what is written is locked, and against whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectLock {
    pub mode: Mode,
    pub days: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Who has the permission to bypass it can delete.
    Governance,
    /// Nobody can, the account's owner included.
    Compliance,
}

impl ObjectLock {
    /// What is wrong with it, if anything.
    pub fn problem(&self) -> Option<String> {
        let valid = (MIN_DAYS..=MAX_DAYS).contains(&self.days);
        (!valid).then(|| format!("bucket.object_lock.days: use {MIN_DAYS} to {MAX_DAYS}: a scrub renews locks each week, and may be late once"))
    }

    fn length_ms(&self) -> u64 {
        u64::from(self.days) * DAY_MS
    }

    /// Whether the lock of what was written then stands for certain, milliseconds since 1970.
    pub fn stands(&self, written_ms: u64, now_ms: u64) -> bool {
        written_ms + self.length_ms() > now_ms
    }

    fn until(&self) -> DateTime {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        DateTime::from_secs(now + i64::from(self.days) * DAY_S)
    }

    fn mode(&self) -> ObjectLockMode {
        match self.mode {
            Mode::Governance => ObjectLockMode::Governance,
            Mode::Compliance => ObjectLockMode::Compliance,
        }
    }
}

/// Whether an object is one of those that are locked.
fn is_archive(object: &Path) -> bool {
    let parts: Vec<_> = object.parts().collect();
    match &parts[..] {
        [_] => *object == Bootstrap::path(),
        [tenants, _, files, _] if tenants.as_ref() == "tenants" => files.as_ref() == "files",
        [tenants, _, _, kind, _] if tenants.as_ref() == "tenants" => {
            matches!(kind.as_ref(), "chain" | "checkpoints")
        }
        _ => false,
    }
}

/// The bucket of S3 that locks are set in; made at first use, since the library's client is.
#[derive(Clone, Debug)]
pub struct Locks {
    config: BucketConfig,
    lock: ObjectLock,
    s3: Arc<OnceCell<S3>>,
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Generic {
        store: "S3",
        source: source.into(),
    }
}

/// What the object store's library would say of it.
fn error<E>(object: &Path, e: SdkError<E>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let (path, said) = (object.to_string(), DisplayErrorContext(&e).to_string());
    match e.as_service_error().and_then(ProvideErrorMetadata::code) {
        // The latter of two that write it at once.
        Some("PreconditionFailed" | "ConditionalRequestConflict") => Error::AlreadyExists {
            path,
            source: said.into(),
        },
        Some("AccessDenied") => Error::PermissionDenied {
            path,
            source: said.into(),
        },
        _ => failed(said),
    }
}

impl Locks {
    /// Of a bucket that has some set; none otherwise.
    pub fn of(config: &BucketConfig) -> Option<Self> {
        Some(Locks {
            lock: config.object_lock?,
            config: config.clone(),
            s3: Arc::default(),
        })
    }

    async fn s3(&self) -> Result<&S3> {
        let open = || async {
            let opened = s3::opened(&self.config).await.map_err(failed)?;
            opened.ok_or_else(|| failed("only a bucket of S3 has an Object Lock"))
        };
        self.s3.get_or_try_init(open).await
    }

    async fn put(&self, object: &Path, body: Bytes, create: bool) -> Result<PutResult> {
        let s3 = self.s3().await?;
        let put = s3
            .uploads
            .put_object()
            .bucket(&s3.bucket)
            .key(s3.key(object))
            .body(ByteStream::from(body))
            .set_if_none_match(create.then(|| "*".to_string()))
            .object_lock_mode(self.lock.mode())
            .object_lock_retain_until_date(self.lock.until());
        let put = put.send().await.map_err(|e| error(object, e))?;
        Ok(PutResult {
            e_tag: put.e_tag().map(String::from),
            version: put.version_id().map(String::from),
            extensions: Default::default(),
        })
    }

    /// When the lock of an object ends, seconds since 1970; 0: it has none; none: there is no such object.
    async fn ends(&self, s3: &S3, object: &Path) -> Result<Option<i64>> {
        let asked = s3
            .uploads
            .get_object_retention()
            .bucket(&s3.bucket)
            .key(s3.key(object))
            .send()
            .await;
        match asked {
            Ok(told) => {
                let ends = told.retention().and_then(|r| r.retain_until_date());
                Ok(Some(ends.map_or(0, DateTime::secs)))
            }
            Err(e) => match e.as_service_error().and_then(ProvideErrorMetadata::code) {
                Some("NoSuchObjectLockConfiguration") => Ok(Some(0)),
                Some("NoSuchKey" | "NoSuchVersion" | "MethodNotAllowed") => Ok(None),
                _ => Err(error(object, e)),
            },
        }
    }

    /// Renews the lock of an object if it may lapse before the next scrub; answers why the store does not,
    /// if it refuses.
    pub async fn renew(&self, object: &Path) -> Result<Option<String>> {
        let s3 = self.s3().await?;
        let soon = OffsetDateTime::now_utc().unix_timestamp() + i64::from(MIN_DAYS) * DAY_S;
        // Retention may have taken it away meanwhile.
        if self.ends(s3, object).await?.is_none_or(|ends| ends > soon) {
            return Ok(None);
        }
        let retention = aws_sdk_s3::types::ObjectLockRetention::builder()
            .mode(self.lock.mode().as_str().into())
            .retain_until_date(self.lock.until());
        let renewed = s3
            .uploads
            .put_object_retention()
            .bucket(&s3.bucket)
            .key(s3.key(object))
            .retention(retention.build())
            .send()
            .await;
        match renewed {
            Ok(_) => Ok(None),
            Err(e) => match e.as_service_error().and_then(ProvideErrorMetadata::code) {
                Some(code @ ("AccessDenied" | "InvalidRequest" | "ObjectLocked")) => {
                    Ok(Some(code.to_string()))
                }
                Some("NoSuchKey" | "MethodNotAllowed") => Ok(None),
                _ => Err(error(object, e)),
            },
        }
    }
}

/// A bucket whose links, manifests and files are locked as they are written.
#[derive(Debug)]
pub struct Locking {
    inner: Arc<dyn ObjectStore>,
    locks: Locks,
}

impl Locking {
    pub fn new(inner: Arc<dyn ObjectStore>, locks: Locks) -> Self {
        Locking { inner, locks }
    }
}

impl std::fmt::Display for Locking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Locking({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Locking {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        if !is_archive(location) {
            return self.inner.put_opts(location, payload, opts).await;
        }
        let create = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => {
                return Err(Error::NotImplemented {
                    operation: "an update in place".into(),
                    implementer: self.to_string(),
                });
            }
        };
        self.locks.put(location, payload.into(), create).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        if !is_archive(location) {
            return self.inner.put_multipart_opts(location, opts).await;
        }
        Ok(Box::new(
            LockedUpload::begin(&self.locks, location.clone()).await?,
        ))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// An object that goes up in parts.
#[derive(Debug)]
struct LockedUpload {
    s3: S3,
    object: Path,
    id: String,
    begun: i32,
    parts: Arc<Mutex<Vec<CompletedPart>>>,
}

impl LockedUpload {
    async fn begin(locks: &Locks, object: Path) -> Result<Self> {
        let s3 = locks.s3().await?.clone();
        let begun = s3
            .uploads
            .create_multipart_upload()
            .bucket(&s3.bucket)
            .key(s3.key(&object))
            .object_lock_mode(locks.lock.mode())
            .object_lock_retain_until_date(locks.lock.until())
            .send()
            .await
            .map_err(|e| error(&object, e))?;
        let id = begun.upload_id().unwrap_or_default().to_string();
        Ok(LockedUpload {
            s3,
            object,
            id,
            begun: 0,
            parts: Arc::default(),
        })
    }
}

#[async_trait]
impl MultipartUpload for LockedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.begun += 1;
        let (number, parts, object) = (self.begun, self.parts.clone(), self.object.clone());
        let part = self
            .s3
            .uploads
            .upload_part()
            .bucket(&self.s3.bucket)
            .key(self.s3.key(&object))
            .upload_id(&self.id)
            .part_number(number)
            .body(ByteStream::from(Bytes::from(data)));
        Box::pin(async move {
            let done = part.send().await.map_err(|e| error(&object, e))?;
            let part = CompletedPart::builder()
                .part_number(number)
                .set_e_tag(done.e_tag)
                .set_checksum_crc32(done.checksum_crc32);
            parts.lock().push(part.build());
            Ok(())
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let mut parts = std::mem::take(&mut *self.parts.lock());
        parts.sort_by_key(CompletedPart::part_number);
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts));
        let done = self
            .s3
            .uploads
            .complete_multipart_upload()
            .bucket(&self.s3.bucket)
            .key(self.s3.key(&self.object))
            .upload_id(&self.id)
            .multipart_upload(parts.build())
            .send()
            .await
            .map_err(|e| error(&self.object, e))?;
        Ok(PutResult {
            e_tag: done.e_tag().map(String::from),
            version: done.version_id().map(String::from),
            extensions: Default::default(),
        })
    }

    async fn abort(&mut self) -> Result<()> {
        let given_up = self
            .s3
            .uploads
            .abort_multipart_upload()
            .bucket(&self.s3.bucket)
            .key(self.s3.key(&self.object))
            .upload_id(&self.id)
            .send()
            .await;
        given_up.map(drop).map_err(|e| error(&self.object, e))
    }
}

/// Why the bucket cannot be used as it is set up, if the store says so: it has no Object Lock and one is
/// wanted, or it locks everything by itself, wrapped keys too.
pub async fn check(config: &BucketConfig) -> std::result::Result<(), String> {
    let s3 = match s3::opened(config).await? {
        Some(s3) => s3,
        None if config.object_lock.is_none() => return Ok(()),
        None => return Err("a directory has no Object Lock: remove bucket.object_lock".into()),
    };
    let url = &config.url;
    match (s3.bucket_lock().await, &config.object_lock) {
        (BucketLock::ByItself(time), _) => Err(format!(
            "bucket {url} locks every object by itself (a default retention of {time}): wrapped keys could not be destroyed in it; remove its default retention and set bucket.object_lock in node.toml"
        )),
        (BucketLock::Absent, Some(_)) => Err(format!(
            "bucket {url} has no Object Lock: enable it (with versions), or remove bucket.object_lock from node.toml"
        )),
        (BucketLock::NotSaid, Some(_)) => {
            tracing::warn!(bucket = %url, "the store does not say yet whether the bucket has an Object Lock");
            Ok(())
        }
        (BucketLock::Enabled, _) | (_, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_locked_and_keys_are_not() {
        let locked = |path: &str| is_archive(&Path::from(path));
        assert!(locked("tenants/ab/0000000001/chain/00000000000000000001"));
        assert!(locked("tenants/ab/0000000001/checkpoints/1-x"));
        assert!(locked("tenants/ab/files/cd"));
        assert!(!locked("tenants/ab/keys/1"));
        assert!(!locked("tenants/ab/0000000001/retired/1-x"));
        assert!(!locked("tenants/ab/ledger/1"));
        assert!(locked("bootstrap.json"));
        assert!(!locked("certificates/ab.json"));
    }

    #[test]
    fn a_lock_stands_for_its_days() {
        let lock = ObjectLock {
            mode: Mode::Governance,
            days: 35,
        };
        assert!(lock.stands(0, 35 * DAY_MS - 1));
        assert!(!lock.stands(0, 35 * DAY_MS));
        assert!(lock.problem().is_none());
        assert!(ObjectLock { days: 13, ..lock }.problem().is_some());
    }
}
