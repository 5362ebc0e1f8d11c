//! Whether a replica is what it should be: its rows, counted anew, have its running digest.
//!
//! Invariant. A replica that is quarantined takes part in nothing any more, also after a restart; until
//! that is on record it can be withdrawn.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::member::Group;
use crate::engine::EngineError;
use crate::mvcc::digest::Hasher;

/// A scan that is ahead of its rate by this much sleeps.
const SCAN_STEP: Duration = Duration::from_millis(20);

/// What a scan of a replica found.
#[derive(Debug, Error)]
pub enum ScanError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("its rows do not have its digest at revision {0}")]
    Digest(i64),
}

impl ScanError {
    /// Whether the replica is damaged; else it could not be read this time.
    pub fn is_damage(&self) -> bool {
        match self {
            ScanError::Digest(_) => true,
            ScanError::Engine(e) => e.is_damage(),
        }
    }
}

impl Group {
    /// Counts the digests anew from every row, reading at most `rate` bytes a second, and compares
    /// them with the running ones of the same moment. Blocking.
    pub fn scan(&self, rate: u64) -> Result<(), ScanError> {
        let keys = self.keys().ok_or(EngineError::Sealed)?;
        let hasher = Hasher::new(&keys);
        drop(keys);
        let (started, mut read) = (Instant::now(), 0u64);
        let pace = |bytes: usize| {
            read += bytes as u64;
            let due = Duration::from_secs_f64(read as f64 / rate as f64);
            let ahead = due.saturating_sub(started.elapsed());
            // In steps that are worth a sleep.
            if ahead > SCAN_STEP {
                std::thread::sleep(ahead);
            }
            self.sealed().is_none()
        };
        let (found, state) = self.store().scan_digests(&hasher, pace)?;
        match found == state.digests {
            true => Ok(()),
            false => Err(ScanError::Digest(state.revision)),
        }
    }

    /// Ends this replica, which is damaged: it comes back as a new one, from its peers.
    /// Answers whether that is on record; else it is found again after a restart.
    pub async fn quarantine(&self) -> bool {
        tracing::error!(group = %self.id(), "ALARM: this replica is damaged and stops, until it is rebuilt from its peers");
        let noted = self.replica().dir.quarantine();
        if let Err(e) = &noted {
            tracing::error!(group = %self.id(), error = %e, "the quarantine is not recorded: the damage is found again after a restart");
        }
        self.set_quarantined(true);
        let _ = self.raft().shutdown().await;
        noted.is_ok()
    }

    /// Says that this replica holds nothing, for a quarantine that may yet be withdrawn.
    pub fn set_quarantined(&self, is: bool) {
        self.shared().quarantined.store(is, Ordering::Release);
    }

    pub fn is_quarantined(&self) -> bool {
        self.shared().quarantined.load(Ordering::Acquire)
    }
}
