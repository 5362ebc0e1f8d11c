//! The archiver of one group: on the leader, ships committed entries as links, and checkpoints.
//!
//! Invariants. Only entries that are committed are shipped: this node has applied them, or let them
//! pass while the tenant is sealed. No key of the tenant is needed. A link is
//! created behind the one that this writer has read; another's link in its place is adopted or
//! ends this writer. Failures of the bucket are retried for ever with backoff, the ledger grows
//! meanwhile, and no write is refused because of them. A closed chain fences the group.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use openraft::async_runtime::WatchReceiver;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::chain::{Chain, ChainError, Created, Tail};
use super::checkpoint::{self, Manifest};
use super::link::{Header, LinkState};
use crate::Position;
use crate::group::{Checkpoint, Group};
use crate::machine::Standing;

/// A link is cut at this size, if its time has not come before.
const MAX_LINK: usize = 4 << 20;
/// A checkpoint is uploaded once this much was shipped since the last one.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// And after so many links: a restore reads each one behind the newest checkpoint.
const CHECKPOINT_LINKS: u64 = 1000;
/// The longest that a write waits for its link, however long the RPO: links cost little.
const MAX_INTERVAL: Duration = Duration::from_secs(5);
const MIN_RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(5);
/// A new leader waits so long for the bucket to say whether its chain was closed.
const FIRST_LOOK: Duration = Duration::from_secs(2);
/// How often an idle leader looks whether its chain was closed.
const LOOK: Duration = Duration::from_secs(5);
/// How often it looks for a checkpoint that it was asked for.
const SOON: Duration = Duration::from_millis(200);

/// Told of each link that this node created, or adopted in the place of its own.
pub type Report = Arc<dyn Fn(crate::GroupId, &Tail) + Send + Sync>;

pub struct Archiver {
    chain: Chain,
    writer: String,
    /// A link is cut when this has passed since the oldest entry that it would hold.
    interval: Duration,
    report: Report,
}

/// Runs as long as the group is open; idle while another node leads. `begun`: the end of a chain that was
/// begun for this group just now.
pub async fn run(
    group: Arc<Group>,
    chain: Chain,
    rpo: Duration,
    report: Report,
    mut begun: Option<Tail>,
) {
    let archiver = Archiver {
        chain,
        writer: hex::encode(kms::secret::random_bytes::<8>()),
        interval: (rpo / 2).min(MAX_INTERVAL),
        report,
    };
    let mut retry = MIN_RETRY;
    // One receiver for all rounds: a fresh one has seen nothing, and would not wait.
    let mut metrics = group.shared().raft.metrics();
    loop {
        if group.is_fenced() {
            return;
        }
        if !group.is_leader() {
            if metrics.changed().await.is_err() {
                return;
            }
            continue;
        }
        // A leader of another term looks at its chain anew: an upload that takes long is given up
        // for it, and taken up again.
        let term = archiver.term(&group);
        let wait = group.shared().raft.wait(None);
        let over = wait.metrics(
            |m| m.current_term != term || !m.state.is_leader(),
            "another term",
        );
        let led = tokio::select! {
            led = archiver.lead(&group, begun.take(), &mut retry) => led,
            _ = over => Ok(()),
        };
        match led {
            Ok(()) => {}
            Err(ChainError::Closed(incarnation)) => {
                tracing::error!(group = %group.id(), incarnation, "the chain is closed: a restore has taken this tenant over");
                group.fence().await;
                return;
            }
            Err(e) => {
                // Once per round of backoff; the ledger's age is the alarm.
                tracing::warn!(group = %group.id(), error = %e, retry_ms = retry.as_millis() as u64, "archiving does not succeed; it is tried again");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(MAX_RETRY);
            }
        }
    }
}

fn local(object: &str, e: std::io::Error) -> ChainError {
    ChainError::Store {
        object: object.into(),
        cause: object_store::Error::Generic {
            store: "local disk",
            source: Box::new(e),
        },
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

impl Archiver {
    /// Ships while this node leads.
    async fn lead(
        &self,
        group: &Group,
        begun: Option<Tail>,
        retry: &mut Duration,
    ) -> Result<(), ChainError> {
        let term = self.term(group);
        let mut tail = match begun {
            Some(tail) => {
                group.shared().clear_writes(term);
                tail
            }
            None => self.first_look(group, term).await?,
        };
        group.note_archived(tail.last_index());
        self.bridge(group, &mut tail).await?;
        let mut known: Vec<(u64, u64, String)> =
            vec![(tail.number, tail.last_index(), tail.hash.clone())];
        let mut shipped = 0u64;
        let (mut since_checkpoint, mut links, mut uploaded) = (0u64, 0u64, 0u64);
        // Beside the links: however long a checkpoint takes, writes are archived.
        let mut uploads = JoinSet::new();
        let mut applied = group.store().watch();
        let (mut looked, mut soon) = (Instant::now(), Instant::now());
        // The newest request that a checkpoint is being made for.
        let mut seen = group.shared().served.load(Ordering::Relaxed);
        // A leader of another term looks anew.
        while group.is_leader() && !group.is_fenced() && self.term(group) == term {
            let (wanted, served) = (&group.shared().wanted, &group.shared().served);
            while let Some(done) = uploads.try_join_next() {
                match self.uploaded(group, done) {
                    true => served.store(seen, Ordering::Relaxed),
                    false => (uploaded, links) = (0, links.max(CHECKPOINT_LINKS)),
                }
            }
            // Asked for until it is there: this leader may end before.
            let asked = wanted.load(Ordering::Relaxed);
            let late = asked > served.load(Ordering::Relaxed) && Instant::now() >= soon;
            if uploads.is_empty() && (asked > seen || late) {
                if asked > seen {
                    // Not one of before, but the same one again if nothing was written since.
                    uploaded = tail.last_index().saturating_sub(1);
                }
                seen = asked;
                // Again if it is late: one that was being made may have been too old.
                group.make_checkpoint().await;
                soon = Instant::now() + LOOK;
                links = links.max(CHECKPOINT_LINKS);
            }
            let state = applied.borrow_and_update().clone();
            if state.index() <= tail.last_index() {
                let due = links >= CHECKPOINT_LINKS;
                let pause = match due && Instant::now() < soon {
                    true => SOON,
                    false => LOOK,
                };
                tokio::select! {
                    _ = applied.changed() => continue,
                    () = group.shared().asked.notified() => continue,
                    () = tokio::time::sleep(pause) => {}
                }
                if looked.elapsed() >= LOOK {
                    self.look(group, &mut tail).await?;
                    looked = Instant::now();
                }
                if due && self.checkpoint(group, &known, &mut uploaded, &mut uploads) {
                    (since_checkpoint, links) = (0, 0);
                }
                continue;
            }
            let due = Instant::now() + self.interval;
            let state = self.gather(group, &tail, &mut applied, state, due).await;
            let size = self.ship(group, &mut tail, &state).await?;
            *retry = MIN_RETRY;
            shipped += size;
            since_checkpoint += size;
            links += 1;
            known.push((tail.number, tail.last_index(), tail.hash.clone()));
            if known.len() > 4096 {
                known.remove(0);
            }
            if since_checkpoint >= CHECKPOINT_BYTES || links >= CHECKPOINT_LINKS {
                match self.checkpoint(group, &known, &mut uploaded, &mut uploads) {
                    true => (since_checkpoint, links) = (0, 0),
                    // It is uploaded after a later link.
                    false if links % CHECKPOINT_LINKS == 0 => group.make_checkpoint().await,
                    false => {}
                }
            }
        }
        tracing::debug!(group = %group.id(), shipped, "no longer leading");
        Ok(())
    }

    /// Finds the end of the chain before this leader's first write: if a restore has closed it,
    /// nothing may be acknowledged any more. A bucket that does not answer holds nobody up.
    async fn first_look(&self, group: &Group, term: u64) -> Result<Tail, ChainError> {
        let mut look = std::pin::pin!(self.chain.tail());
        let found = match tokio::time::timeout(FIRST_LOOK, &mut look).await {
            Ok(found) => found,
            Err(_) => {
                tracing::warn!(group = %group.id(), "the bucket does not say whether the chain is closed; writes go on without it");
                group.shared().clear_writes(term);
                look.await
            }
        };
        if let Ok(tail) = &found
            && let Some(closed) = tail.closed()
        {
            return Err(ChainError::Closed(closed.incarnation));
        }
        group.shared().clear_writes(term);
        found
    }

    /// Where the log was purged beyond the end of the chain, a checkpoint takes the place of what
    /// is gone: the states between cannot be restored any more.
    async fn bridge(&self, group: &Group, tail: &mut Tail) -> Result<(), ChainError> {
        let purged = group.shared().log.purged();
        let Some(purged) = purged.filter(|at| at.index > tail.last_index()) else {
            return Ok(());
        };
        let found = group.checkpoint().map_err(|e| local("the checkpoint", e))?;
        let found = found.and_then(|c| c.state.applied.map(|at| (c, at)));
        let Some((checkpoint, position)) = found.filter(|(_, at)| at.index >= purged.index) else {
            let none = std::io::Error::other("there is none that covers what was purged");
            return Err(local("the checkpoint", none));
        };
        tracing::error!(group = %group.id(), from = tail.last_index() + 1, to = position.index, "these entries were purged before they were archived: a checkpoint takes their place, and no moment between can be restored");
        let state = checkpoint.state;
        let behind = (tail.number, tail.hash.clone());
        let manifest = Manifest::new(self.chain.group(), &state, position, behind);
        checkpoint::upload(&self.chain, checkpoint.files, manifest).await?;
        let header = Header {
            term: self.term(group),
            last: Some(position),
            state: Some(LinkState::from(&state)),
            ..self.blank()
        };
        self.create(group, tail, header, &[]).await
    }

    /// Waits until the link is due or full; answers the newest state to ship.
    async fn gather(
        &self,
        group: &Group,
        tail: &Tail,
        applied: &mut tokio::sync::watch::Receiver<Standing>,
        mut state: Standing,
        due: Instant,
    ) -> Standing {
        if self.interval.is_zero() {
            return state;
        }
        while group.is_leader() {
            let to = state.index();
            // Entries are batches of up to 1 MiB: counting them is enough to bound the wait.
            if to.saturating_sub(tail.last_index()) >= 64
                && self.pending_bytes(group, tail, to) >= MAX_LINK
            {
                break;
            }
            match tokio::time::timeout_at(due, applied.changed()).await {
                Ok(Ok(())) => state = applied.borrow_and_update().clone(),
                _ => break,
            }
            tokio::time::sleep_until(due.min(Instant::now() + Duration::from_millis(20))).await;
        }
        state
    }

    fn pending_bytes(&self, group: &Group, tail: &Tail, to: u64) -> usize {
        let log = &group.shared().log;
        let read = log.read(tail.last_index() + 1, to + 1, MAX_LINK);
        read.map_or(0, |entries| {
            entries.iter().map(|(_, bytes)| bytes.len()).sum()
        })
    }

    /// Creates links until `state` is covered, or one link if there is more than fits.
    async fn ship(&self, group: &Group, tail: &mut Tail, to: &Standing) -> Result<u64, ChainError> {
        let end = to.index();
        let log = &group.shared().log;
        let start = match tail.header.is_none() {
            // The first entry of a log has index 0.
            true => 0,
            false => tail.last_index() + 1,
        };
        let read = log
            .read(start, end + 1, MAX_LINK)
            .map_err(|e| local("the node's log", e))?;
        let Some((last, _)) = read.last() else {
            // Purged beyond the cap while the bucket was away.
            let before = tail.number;
            self.bridge(group, tail).await?;
            if tail.number > before {
                return Ok(0);
            }
            let missing = std::io::Error::other("entries that are not archived are not there");
            return Err(local("the node's log", missing));
        };
        let last = *last;
        let entries: Vec<_> = read.into_iter().map(|(_, bytes)| bytes).collect();
        let size = entries.iter().map(|e| e.len() as u64).sum();
        let header = Header {
            term: self.term(group),
            last: Some(last),
            // Absent of a sealed tenant: a later link closes the gap.
            state: to
                .state
                .as_ref()
                .filter(|state| state.applied == Some(last))
                .map(LinkState::from),
            ..self.blank()
        };
        self.create(group, tail, header, &entries).await?;
        Ok(size)
    }

    fn blank(&self) -> Header {
        Header {
            group: self.chain.group(),
            number: 0,
            previous: String::new(),
            term: 0,
            writer: self.writer.clone(),
            last: None,
            entries: 0,
            state: None,
            written_ms: now_ms(),
            closed: None,
            base: None,
        }
    }

    fn term(&self, group: &Group) -> u64 {
        group.shared().raft.metrics().borrow_watched().current_term
    }

    async fn create(
        &self,
        group: &Group,
        tail: &mut Tail,
        header: Header,
        entries: &[bytes::Bytes],
    ) -> Result<(), ChainError> {
        let term = header.term;
        match self.chain.create(tail, header, entries).await? {
            Created::Ours(next) => *tail = *next,
            Created::Theirs(theirs) => *tail = self.chain.adopt(tail, &theirs, term)?,
        }
        group.note_archived(tail.last_index());
        (self.report)(group.id(), tail);
        Ok(())
    }

    /// Looks whether the next link exists, which only another writer can have made.
    async fn look(&self, group: &Group, tail: &mut Tail) -> Result<(), ChainError> {
        match self.chain.read(tail.number + 1).await {
            Ok(theirs) => {
                *tail = self.chain.adopt(tail, &theirs, self.term(group))?;
                group.note_archived(tail.last_index());
                Ok(())
            }
            Err(ChainError::Missing(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Answers whether an upload succeeded.
    fn uploaded(
        &self,
        group: &Group,
        done: Result<Result<Position, ChainError>, JoinError>,
    ) -> bool {
        let done = done.unwrap_or_else(|e| Err(local("the checkpoint", std::io::Error::other(e))));
        match &done {
            Ok(at) => tracing::info!(group = %group.id(), %at, "a checkpoint is in the bucket"),
            Err(e) => {
                tracing::warn!(group = %group.id(), error = %e, "a checkpoint is not in the bucket; it is tried again after the next link");
            }
        }
        done.is_ok()
    }

    /// Begins to upload this node's newest checkpoint, if links cover it; answers whether it did.
    fn checkpoint(
        &self,
        group: &Group,
        known: &[(u64, u64, String)],
        uploaded: &mut u64,
        uploads: &mut JoinSet<Result<Position, ChainError>>,
    ) -> bool {
        if !uploads.is_empty() {
            return false;
        }
        let found = group.checkpoint().inspect_err(|e| {
            // It may just have been replaced by a newer one, which is uploaded after the next link.
            tracing::warn!(group = %group.id(), error = %e, "the checkpoint cannot be opened; it is tried again");
        });
        let Ok(Some(Checkpoint { state, files })) = found else {
            return false;
        };
        let Some(position) = state.applied.filter(|at| at.index > *uploaded) else {
            return false;
        };
        let Some((link, _, hash)) = known
            .iter()
            .rev()
            .find(|(_, last, _)| *last <= position.index)
        else {
            return false;
        };
        let behind = (*link, hash.clone());
        let manifest = Manifest::new(self.chain.group(), &state, position, behind);
        let chain = self.chain.clone();
        uploads.spawn(async move {
            checkpoint::upload(&chain, files, manifest)
                .await
                .map(|_| position)
        });
        *uploaded = position.index;
        true
    }
}
