//! One tenant's RocksDB.
//!
//! Invariants. The write-ahead log is off and flushes are atomic over column families: after a
//! crash the engine stands at one applied entry, no later than its last write, and the Raft log
//! replays the rest. Every file is encrypted (`env`). Closing does not flush. The instances of a
//! node share one write-buffer budget and the process's background threads; each has a block cache
//! of its own, so that its blocks can be erased with it.

mod budget;
pub mod env;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kms::TenantKeys;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamilyDescriptor, CompactOptions,
    DB, FlushOptions, InfoLogger, LogLevel, Options, WriteBatch, WriteOptions, properties,
};
use thiserror::Error;

pub use budget::{Budget, relieve};
pub use env::Ciphering;

/// Column families; see docs/ARCHITECTURE.md for what each holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cf {
    Kv,
    Rev,
    Hist,
    Lease,
    Auth,
    Meta,
}

impl Cf {
    pub const ALL: [Cf; 6] = [Cf::Kv, Cf::Rev, Cf::Hist, Cf::Lease, Cf::Auth, Cf::Meta];

    fn name(self) -> &'static str {
        match self {
            Cf::Kv => "kv",
            Cf::Rev => "rev",
            Cf::Hist => "hist",
            Cf::Lease => "lease",
            Cf::Auth => "auth",
            Cf::Meta => "meta",
        }
    }
}

#[derive(Debug, Error)]
pub enum EngineError {
    /// RocksDB's class of error only: its text can quote keys.
    #[error("the tenant's engine failed: {0:?}")]
    RocksDb(rocksdb::ErrorKind),
    #[error("a file of the engine is damaged")]
    Corrupt,
    #[error("a row in the engine is damaged: {0}")]
    Damaged(&'static str),
    #[error(
        "engine format {0} is not known to this version of holdfastd; run the version that wrote it, or a newer one"
    )]
    Format(u8),
    #[error("the tenant is sealed: its key may not be used now")]
    Sealed,
    #[error("{0}")]
    Io(String),
}

impl From<rocksdb::Error> for EngineError {
    fn from(e: rocksdb::Error) -> Self {
        match e.kind() {
            rocksdb::ErrorKind::Corruption => EngineError::Corrupt,
            kind => EngineError::RocksDb(kind),
        }
    }
}

impl From<EngineError> for std::io::Error {
    fn from(e: EngineError) -> Self {
        std::io::Error::other(e)
    }
}

impl EngineError {
    /// Whether what is on the disk is damaged; else it could not be read this time.
    pub fn is_damage(&self) -> bool {
        matches!(self, EngineError::Corrupt | EngineError::Damaged(_))
    }
}

const MEMTABLE: usize = 32 << 20;
const BLOOM_BITS: f64 = 10.0;

/// An open engine. Dropping it closes RocksDB.
pub struct Engine {
    db: DB,
    path: PathBuf,
    unlogged: WriteOptions,
}

impl Engine {
    /// Opens the engine in `path`, which is made if it does not exist.
    pub fn open(path: &Path, keys: Arc<TenantKeys>, budget: &Budget) -> Result<Self, EngineError> {
        let env = env::encrypted_env(keys, budget.ciphering).map_err(EngineError::Io)?;
        // A sealed tenant's engine is closed without writing.
        let mut options =
            Options::default().get_options_from_string("avoid_flush_during_shutdown=true")?;
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_env(&env);
        options.set_atomic_flush(true);
        // A thread for each open would cost more than small engines, of which there are many, take to open.
        options.set_max_file_opening_threads(1);
        options.set_write_buffer_manager(&budget.write_buffers);
        // RocksDB's words can quote keys: only that it complained is logged.
        options.set_info_logger(InfoLogger::new_callback_logger(
            LogLevel::Error,
            |level, _| {
                if matches!(level, LogLevel::Error | LogLevel::Fatal) {
                    tracing::error!("RocksDB reports an error in a tenant's engine");
                }
            },
        ));
        let cache = Cache::new_lru_cache(budget.cache_bytes);
        let families = Cf::ALL.map(|cf| {
            let mut options = Self::family_options(cf, &cache, &env);
            options.set_disable_auto_compactions(!budget.compacts);
            ColumnFamilyDescriptor::new(cf.name(), options)
        });
        let db = DB::open_cf_descriptors(&options, path, families)?;
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        Ok(Engine {
            db,
            path: path.to_path_buf(),
            unlogged,
        })
    }

    fn family_options(cf: Cf, cache: &Cache, env: &rocksdb::Env) -> Options {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(cache);
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        let mut options = Options::default();
        options.set_env(env);
        options.set_write_buffer_size(MEMTABLE);
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
        if matches!(cf, Cf::Kv | Cf::Auth) {
            table.set_bloom_filter(BLOOM_BITS, false);
        }
        if cf == Cf::Kv {
            options.set_memtable_whole_key_filtering(true);
            // 27 bits for each of the keys with values of 256 bytes, and a third of a MB of an idle tenant.
            options.set_memtable_prefix_bloom_ratio(0.01);
        }
        options.set_block_based_table_factory(&table);
        options
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn db(&self) -> &DB {
        &self.db
    }

    pub fn cf(&self, cf: Cf) -> &rocksdb::ColumnFamily {
        self.db
            .cf_handle(cf.name())
            .expect("every column family is opened with the engine")
    }

    pub fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.db.get_cf(self.cf(cf), key)?)
    }

    /// Applies `batch` atomically, in memory: durability is the Raft log's.
    pub fn write(&self, batch: WriteBatch) -> Result<(), EngineError> {
        Ok(self.db.write_opt(batch, &self.unlogged)?)
    }

    /// Whether a table of `cf` is under a generation before `generation`.
    fn has_older(&self, cf: Cf, generation: u32) -> Result<bool, EngineError> {
        for table in self.db.live_files()? {
            if table.column_family_name != cf.name() {
                continue;
            }
            let path = self.path.join(table.name.trim_start_matches('/'));
            match env::generation_of_file(&path) {
                Ok(under) if under.is_some_and(|under| under < generation) => return Ok(true),
                Ok(_) => {}
                // Written anew since.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(EngineError::Io(e.to_string())),
            }
        }
        Ok(false)
    }

    /// Writes tables under generations before `generation` anew, beside reads and writes. Blocking.
    pub fn rewrite_tables(&self, generation: u32) -> Result<(), EngineError> {
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        options.set_exclusive_manual_compaction(false);
        // The first time, a table that is alone on the topmost level is only moved.
        for cf in Cf::ALL.into_iter().chain(Cf::ALL) {
            if self.has_older(cf, generation)? {
                self.db
                    .compact_range_cf_opt(self.cf(cf), None::<&[u8]>, None::<&[u8]>, &options);
            }
        }
        Ok(())
    }

    /// Bytes of its memtables.
    fn memtables(&self) -> Result<u64, EngineError> {
        let mut bytes = 0;
        for cf in Cf::ALL {
            let size = self
                .db
                .property_int_value_cf(self.cf(cf), properties::SIZE_ALL_MEM_TABLES)?;
            bytes += size.unwrap_or(0);
        }
        Ok(bytes)
    }

    /// Writes the memtables of all column families out together. Blocking.
    fn flush(&self) -> Result<(), EngineError> {
        let families = Cf::ALL.map(|cf| self.cf(cf));
        Ok(self.db.flush_cfs_opt(&families, &FlushOptions::default())?)
    }

    /// Ends what runs in the background, so that whoever waits for it is done.
    pub fn stop(&self) {
        self.db.cancel_all_background_work(false);
    }

    /// Flushes all column families together and links the files into `target`, which must not
    /// exist.
    pub fn checkpoint(&self, target: &Path) -> Result<(), EngineError> {
        Ok(Checkpoint::new(&self.db)?.create_checkpoint(target)?)
    }
}

/// Links every file of `from` into `to`, which must not exist, and syncs the directory. Files that
/// RocksDB has finished are never written again, so that a link is a copy.
pub fn link_dir(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name() != "LOCK" {
            std::fs::hard_link(entry.path(), to.join(entry.file_name()))?;
        }
    }
    std::fs::File::open(to)?.sync_all()
}
