//! What a drill sees of the bucket: it reads at a rate, and writes nothing.
//!
//! Invariants. Each phase reads its first part at full speed, which measures it, written out where it is
//! written; from there on streams wait. A restore does not wait, and its objective must not be charged with that:
//! the time in which one waited is taken off, but no more than leaves the speed of the first part.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;

use super::pace::Step;
use crate::limits;

/// Shorter waits are added up.
const SLICE: Duration = Duration::from_millis(4);
/// What was not read while nothing was asked for is not made up for, but so much.
const BURST: Duration = Duration::from_millis(20);

/// A phase's reading.
#[derive(Debug)]
struct Rate {
    began: Instant,
    bytes: u64,
    /// Bytes before there were pauses, and how long they took.
    first: (u64, Duration),
    /// That is counted as they are written.
    is_written: bool,
    /// When what was read so far is paid for.
    due: Instant,
    /// The time in which a stream waits, so far, and when that ends.
    waited: Duration,
    waiting_until: Instant,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Rate {
            began: now,
            bytes: 0,
            first: (0, Duration::ZERO),
            is_written: false,
            due: now,
            waited: Duration::ZERO,
            waiting_until: now,
        }
    }

    /// Until when to wait, so many bytes more having come by `now`.
    fn read(&mut self, bytes: u64, now: Instant) -> Option<Instant> {
        self.bytes += bytes;
        if self.bytes <= limits::DRILL_MEASURED {
            if !self.is_written {
                self.first = (self.bytes, now.saturating_duration_since(self.began));
            }
            self.due = now;
            return None;
        }
        let bytes = bytes.min(self.bytes - limits::DRILL_MEASURED);
        let costs = Duration::from_secs_f64(bytes as f64 / limits::DRILL_RATE as f64);
        self.due = self.due.max(now.checked_sub(BURST).unwrap_or(now)) + costs;
        if self.due.saturating_duration_since(now) < SLICE {
            return None;
        }
        let from = self.waiting_until.max(now);
        self.waited += self.due.saturating_duration_since(from);
        self.waiting_until = self.due;
        Some(self.due)
    }

    /// Notes that so many bytes in all are written by `now`. What is read at full speed and not written yet
    /// is still on its way then.
    fn written(&mut self, bytes: u64, now: Instant) {
        if bytes <= limits::DRILL_MEASURED / 2 {
            self.first = (bytes, now.saturating_duration_since(self.began));
            self.is_written = true;
        }
    }

    /// The phase, which ended at `now`.
    fn step(&self, now: Instant) -> Step {
        let (first, took) = self.first;
        let elapsed = now.saturating_duration_since(self.began);
        let unpaced = took.mul_f64(self.bytes as f64 / first.max(1) as f64);
        Step {
            ended: Some(now),
            paused: self.waited.min(elapsed.saturating_sub(unpaced)),
        }
    }
}

#[derive(Debug)]
pub struct Reading {
    inner: Arc<dyn ObjectStore>,
    rate: Arc<Mutex<Rate>>,
}

impl Reading {
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        let rate = Arc::new(Mutex::new(Rate::new(Instant::now())));
        Reading { inner, rate }
    }

    /// Notes how much of what was read in this phase is written.
    pub fn written(&self, bytes: u64) {
        self.rate.lock().written(bytes, Instant::now());
    }

    /// Ends a phase, and begins the next.
    pub fn step(&self) -> Step {
        let now = Instant::now();
        let mut rate = self.rate.lock();
        let step = rate.step(now);
        *rate = Rate::new(now);
        step
    }

    fn refused<T>(&self, operation: &str) -> Result<T> {
        Err(Error::NotImplemented {
            operation: operation.into(),
            implementer: self.to_string(),
        })
    }
}

impl std::fmt::Display for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reading({})", self.inner)
    }
}

async fn came(rate: Arc<Mutex<Rate>>, piece: Result<Bytes>) -> Result<Bytes> {
    let bytes = piece?;
    let due = rate.lock().read(bytes.len() as u64, Instant::now());
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
    Ok(bytes)
}

#[async_trait]
impl ObjectStore for Reading {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let got = self.inner.get_opts(location, options).await?;
        let (meta, range) = (got.meta.clone(), got.range.clone());
        let (attributes, extensions) = (got.attributes.clone(), got.extensions.clone());
        let rate = self.rate.clone();
        let paced = got
            .into_stream()
            .then(move |piece| came(rate.clone(), piece));
        Ok(GetResult {
            payload: GetResultPayload::Stream(paced.boxed()),
            meta,
            range,
            attributes,
            extensions,
        })
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

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        self.refused("a put")
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.refused("an upload")
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let refused = self.refused("a deletion");
        futures::stream::once(async { refused }).boxed()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        self.refused("a copy")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    const SECOND: Duration = Duration::from_secs(1);
    const PART: u64 = 1 << 20;

    fn seconds(bytes: u64) -> f64 {
        bytes as f64 / limits::DRILL_RATE as f64
    }

    #[test]
    fn what_follows_the_first_part_comes_at_the_rate_and_idleness_is_not_made_up_for() {
        let mut now = Instant::now();
        let mut rate = Rate::new(now);
        now += SECOND / 4;
        assert_eq!(rate.read(limits::DRILL_MEASURED, now), None);
        let wait =
            |until: Option<Instant>, now: Instant| (until.expect("it waits") - now).as_secs_f64();
        let waits = wait(rate.read(PART, now), now);
        assert!((waits - seconds(PART)).abs() < 1e-6, "{waits}");
        // Another stream waits behind it; they wait together.
        let waits = wait(rate.read(PART, now), now);
        assert!((waits - 2.0 * seconds(PART)).abs() < 1e-6, "{waits}");
        assert!((rate.waited.as_secs_f64() - waits).abs() < 1e-6);
        // They waited for that, and then nothing is asked for in a while.
        now += 10 * SECOND;
        let waits = wait(rate.read(PART, now), now);
        let wanted = seconds(PART) - BURST.as_secs_f64();
        assert!((waits - wanted).abs() < 1e-6, "{waits}");
        // What costs less than a slice is added up.
        let little = limits::DRILL_RATE / 1000;
        now += SECOND;
        let mut pieces = 1;
        while rate.read(little, now).is_none() {
            pieces += 1;
        }
        let before = (BURST + SLICE).as_millis();
        assert!((before - 2..=before + 1).contains(&pieces), "{pieces}");
    }

    /// Reads nine times what is not paced, the first part in a quarter of a second, written in `written` if it
    /// is; answers the pauses that are taken off of what took a minute.
    fn taken_off(waited: Duration, written: Option<Duration>) -> Duration {
        let began = Instant::now();
        let mut rate = Rate::new(began);
        rate.read(limits::DRILL_MEASURED, began + SECOND / 4);
        if let Some(took) = written {
            rate.written(limits::DRILL_MEASURED / 2, began + took);
        }
        rate.read(8 * limits::DRILL_MEASURED, began + SECOND);
        rate.waited = waited;
        rate.step(began + 60 * SECOND).paused
    }

    #[test]
    fn pauses_are_those_waited_and_leave_the_speed_of_the_first_part() {
        // A bucket that became slower than the rate is not excused.
        assert_eq!(taken_off(SECOND, None), SECOND);
        let minute = 60 * SECOND;
        assert_eq!(taken_off(59 * SECOND, None), minute - 9 * SECOND / 4);
        // Nor is a disk that is slower than the bucket.
        assert_eq!(taken_off(59 * SECOND, Some(SECOND)), minute - 18 * SECOND);
    }

    #[tokio::test]
    async fn the_bucket_is_read_at_the_rate_and_is_never_written() {
        let inner = Arc::new(InMemory::new());
        let (path, excess) = (Path::from("object"), limits::DRILL_RATE / 4);
        let object = vec![7; (limits::DRILL_MEASURED + excess) as usize];
        inner.put(&path, object.clone().into()).await.unwrap();
        let reading = Reading::new(inner.clone());
        let began = Instant::now();
        let got = reading.get(&path).await.unwrap();
        assert_eq!(got.bytes().await.unwrap(), object);
        assert!(began.elapsed() >= Duration::from_millis(225));
        let step = reading.step();
        assert!(step.paused >= Duration::from_millis(200), "{step:?}");
        assert!(reading.step().paused.is_zero(), "the next phase");

        reading.put(&path, vec![].into()).await.unwrap_err();
        reading.delete(&path).await.unwrap_err();
        reading.copy(&path, &Path::from("other")).await.unwrap_err();
        assert_eq!(inner.head(&path).await.unwrap().size, object.len() as u64);
    }
}
