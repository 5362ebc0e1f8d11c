//! What a drill sees of the bucket: it reads at a rate, and writes nothing.
//!
//! Invariants. Each phase reads its first part at full speed, which measures it; from there on one stream at a
//! time waits, so that what was slept is time of the clock. A restore does not wait, and its objective must not
//! be charged with that: what was slept is taken off, but no more than leaves the speed of the first part.

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
use tokio::sync::Mutex;

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
    /// Bytes read before there were pauses, and how long they took.
    first: (u64, Duration),
    /// When what was read so far is paid for.
    due: Instant,
    slept: Duration,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Rate {
            began: now,
            bytes: 0,
            first: (0, Duration::ZERO),
            due: now,
            slept: Duration::ZERO,
        }
    }

    /// How long to wait, so many bytes having come by `now`.
    fn pause(&mut self, bytes: u64, now: Instant) -> Duration {
        self.bytes += bytes;
        if self.bytes <= limits::DRILL_MEASURED {
            self.first = (self.bytes, now.saturating_duration_since(self.began));
            self.due = now;
            return Duration::ZERO;
        }
        let bytes = bytes.min(self.bytes - limits::DRILL_MEASURED);
        let costs = Duration::from_secs_f64(bytes as f64 / limits::DRILL_RATE as f64);
        self.due = self.due.max(now.checked_sub(BURST).unwrap_or(now)) + costs;
        let pause = self.due.saturating_duration_since(now);
        match pause < SLICE {
            true => Duration::ZERO,
            false => pause,
        }
    }

    /// The phase, which ended at `now`.
    fn step(&self, now: Instant) -> Step {
        let (first, took) = self.first;
        let elapsed = now.saturating_duration_since(self.began);
        let unpaced = took.mul_f64(self.bytes as f64 / first.max(1) as f64);
        Step {
            ended: Some(now),
            paused: self.slept.min(elapsed.saturating_sub(unpaced)),
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

    /// Ends a phase, and begins the next.
    pub async fn step(&self) -> Step {
        let now = Instant::now();
        let mut rate = self.rate.lock().await;
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
    // Held while it waits: the others wait with it.
    let mut rate = rate.lock().await;
    let from = Instant::now();
    let pause = rate.pause(bytes.len() as u64, from);
    if !pause.is_zero() {
        tokio::time::sleep(pause).await;
        rate.slept += from.elapsed();
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
        assert_eq!(rate.pause(limits::DRILL_MEASURED, now), Duration::ZERO);
        let slept = rate.pause(PART, now).as_secs_f64();
        assert!((slept - seconds(PART)).abs() < 1e-6, "{slept}");
        // It waits for that, and then nothing is asked for in a while.
        now += 10 * SECOND;
        let slept = rate.pause(PART, now).as_secs_f64();
        let wanted = seconds(PART) - BURST.as_secs_f64();
        assert!((slept - wanted).abs() < 1e-6, "{slept}");
        // What costs less than a slice is added up.
        let little = limits::DRILL_RATE / 1000;
        now += SECOND;
        assert_eq!(rate.pause(little, now), Duration::ZERO);
        let mut pieces = 1;
        while rate.pause(little, now).is_zero() {
            pieces += 1;
        }
        let before = (BURST + SLICE).as_millis();
        assert!((before - 2..=before).contains(&pieces), "{pieces}");
    }

    /// Reads nine times what is not paced, the first part in a quarter of a second; answers the pauses
    /// that are taken off of what took a minute.
    fn taken_off(slept: Duration) -> Duration {
        let began = Instant::now();
        let mut rate = Rate::new(began);
        rate.pause(limits::DRILL_MEASURED, began + SECOND / 4);
        rate.pause(8 * limits::DRILL_MEASURED, began + SECOND);
        rate.slept = slept;
        rate.step(began + 60 * SECOND).paused
    }

    #[test]
    fn pauses_are_those_slept_and_leave_the_speed_of_the_first_part() {
        // A bucket that became slower than the rate is not excused.
        assert_eq!(taken_off(SECOND), SECOND);
        assert_eq!(taken_off(59 * SECOND), 60 * SECOND - 9 * SECOND / 4);
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
        let step = reading.step().await;
        assert!(step.paused >= Duration::from_millis(200), "{step:?}");
        assert!(reading.step().await.paused.is_zero(), "the next phase");

        reading.put(&path, vec![].into()).await.unwrap_err();
        reading.delete(&path).await.unwrap_err();
        reading.copy(&path, &Path::from("other")).await.unwrap_err();
        assert_eq!(inner.head(&path).await.unwrap().size, object.len() as u64);
    }
}
