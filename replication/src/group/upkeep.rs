//! What a group does by itself: the ledger and recent digests follow what is applied; checkpoints are
//! made as the log grows, and the log is purged behind them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;

use super::member::Shared;
use crate::mvcc::digest::Digests;

/// A checkpoint is made when this much was written since the last one.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Over the cap of the log a group is asked for a checkpoint this often.
const CHECKPOINT_AGAIN: Duration = Duration::from_secs(30);
/// Entries are purged unarchived only if the archive has not moved for this long.
const STALLED: Duration = Duration::from_secs(15);
const MAINTENANCE: Duration = Duration::from_secs(1);
/// Digests kept to compare with other replicas'.
const RECENT_DIGESTS: usize = 512;

/// Feeds the ledger and the recent digests.
pub(super) async fn watch_applied(
    shared: Arc<Shared>,
    recent: Arc<Mutex<VecDeque<(u64, Digests)>>>,
) {
    let mut applied = shared.store.watch();
    while applied.changed().await.is_ok() {
        let (index, digests) = {
            let standing = applied.borrow_and_update();
            (standing.index(), standing.state.as_ref().map(|s| s.digests))
        };
        shared.ledger.applied(index);
        let Some(digests) = digests else { continue };
        let mut recent = recent.lock();
        recent.push_back((index, digests));
        if recent.len() > RECENT_DIGESTS {
            recent.pop_front();
        }
    }
}

/// Makes checkpoints as the log grows, and purges the log behind checkpoint and archive.
pub(super) async fn maintain(shared: Arc<Shared>, max_log_bytes: u64) {
    let snapshot = shared.replica.dir.snapshot().ok().flatten();
    let mut at_checkpoint = snapshot.map_or(0, |found| found.state.bytes);
    let mut asked = Instant::now();
    loop {
        tokio::time::sleep(MAINTENANCE).await;
        if shared.replica.sealed().is_some() {
            continue;
        }
        let state = shared.store.state();
        if state.bytes.saturating_sub(at_checkpoint) >= CHECKPOINT_BYTES {
            at_checkpoint = state.bytes;
            let _ = shared.raft.trigger().snapshot().await;
        }
        let metrics = shared.raft.metrics().borrow_watched().clone();
        let snapshot = metrics.snapshot.map_or(0, |id| id.index);
        let purged = metrics.purged.map_or(0, |id| id.index);
        // The engine stood ahead of the log when this node started. A replica that is opened sealed
        // begins at its checkpoint, which must not lie behind what is purged.
        if purged > snapshot && asked.elapsed() > MAINTENANCE {
            asked = Instant::now();
            let _ = shared.raft.trigger().snapshot().await;
        }
        let archived = shared.archived();
        let over = shared.log.disk_bytes() > max_log_bytes;
        // A small or idle group makes no checkpoint by itself, and would hold the oldest files.
        let applied = state.applied.map_or(0, |at| at.index);
        if over && snapshot < applied && asked.elapsed() > CHECKPOINT_AGAIN {
            asked = Instant::now();
            let _ = shared.raft.trigger().snapshot().await;
        }
        let behind = match over && shared.ledger.age() > STALLED {
            true => snapshot,
            false => snapshot.min(archived),
        };
        if behind > purged {
            if behind > archived {
                tracing::error!(group = %shared.group, from = archived + 1, to = behind, "ALARM: the log is over its cap and the bucket is behind: entries are purged unarchived, and no moment among them can be restored");
            }
            let _ = shared.raft.trigger().purge_log(behind).await;
        }
    }
}
