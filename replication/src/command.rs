//! Sealing a batch of commands into a log entry, and opening it.
//!
//! A batch is encoded (prost), compressed (zstd) and sealed under the tenant's key before it is
//! proposed. From there on, logs, peers and bucket see ciphertext. See docs/formats/README.md.

use std::sync::Arc;

use bytes::Bytes;
use kms::{Opener, Purpose, SealError, Sealer, TenantKeys};
use parking_lot::{Mutex, RwLock};
use prost::Message;
use thiserror::Error;
use zstd::bulk::{Compressor, Decompressor};

use crate::GroupId;
use crate::proto::command::{Batch, Command};

/// The version of the batch format that this build writes and reads.
pub const VERSION: u32 = 1;
const ZSTD_LEVEL: i32 = 1;
/// An entry opens to at most this many bytes: a batch's cap and room for one large request.
const MAX_OPENED: usize = 16 << 20;

#[derive(Debug, Error)]
pub enum OpenError {
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("an authenticated entry does not decode: {0}")]
    Decode(String),
    #[error("entry format {0} is not known to this version of holdfastd, which reads {VERSION}")]
    Version(u32),
}

/// Seals and opens the entries of one group.
pub struct EntryCodec {
    keys: Arc<TenantKeys>,
    incarnation: u32,
    sealer: RwLock<Arc<Sealer>>,
    opener: Opener,
    // Kept: making one costs more than using it on a small batch.
    compressor: Mutex<Compressor<'static>>,
    decompressor: Mutex<Decompressor<'static>>,
}

fn sealer(keys: &TenantKeys, incarnation: u32) -> Sealer {
    Sealer::new(keys, incarnation, Purpose::LogEntry)
}

impl EntryCodec {
    pub fn new(keys: &Arc<TenantKeys>, group: GroupId) -> Self {
        EntryCodec {
            keys: keys.clone(),
            incarnation: group.incarnation,
            sealer: RwLock::new(Arc::new(sealer(keys, group.incarnation))),
            opener: Opener::new(keys.clone(), group.incarnation, Purpose::LogEntry),
            compressor: Mutex::new(
                Compressor::new(ZSTD_LEVEL).expect("a compressor of a valid level is made"),
            ),
            decompressor: Mutex::new(Decompressor::new().expect("a decompressor is made")),
        }
    }

    /// Lets go of what was derived of generations before `oldest`.
    pub fn forget_before(&self, oldest: u32) {
        self.opener.forget_before(oldest);
        if self.sealer.read().generation() < oldest {
            self.sealer();
        }
    }

    /// A sealer of the generation that seals now.
    fn sealer(&self) -> Arc<Sealer> {
        let current = self.sealer.read().clone();
        if current.generation() == self.keys.sealing() {
            return current;
        }
        let newer = Arc::new(sealer(&self.keys, self.incarnation));
        *self.sealer.write() = newer.clone();
        newer
    }

    /// `time_ms`: the leader's clock, milliseconds since 1970. Gives the commands back.
    pub fn seal(&self, commands: Vec<Command>, time_ms: u64) -> (Vec<u8>, Vec<Command>) {
        let batch = Batch {
            version: VERSION,
            time_ms,
            commands,
        };
        let plain = batch.encode_to_vec();
        let compressed = self.compressor.lock().compress(&plain);
        let compressed = compressed.expect("compressing in memory succeeds");
        (self.sealer().seal(&compressed), batch.commands)
    }

    pub fn open(&self, sealed: &[u8]) -> Result<Batch, OpenError> {
        let compressed = self.opener.open(sealed)?;
        let decode = |e: &dyn std::fmt::Display| OpenError::Decode(e.to_string());
        let size = match zstd::zstd_safe::get_frame_content_size(&compressed) {
            Ok(Some(size)) if size <= MAX_OPENED as u64 => size as usize,
            _ => return Err(decode(&"it does not say a size, or too large a one")),
        };
        let plain = self.decompressor.lock().decompress(&compressed, size);
        let plain = Bytes::from(plain.map_err(|e| decode(&e))?);
        // Keys and values are slices of `plain`.
        let batch = Batch::decode(plain).map_err(|e| decode(&e))?;
        match batch.version {
            VERSION => Ok(batch),
            other => Err(OpenError::Version(other)),
        }
    }
}
