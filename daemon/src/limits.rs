//! Every maximum, with its reason.

use std::time::Duration;

/// A client's request, as etcd has it; larger ones are INVALID_ARGUMENT.
pub const MAX_REQUEST: usize = 1_572_864;
/// A gRPC message received: a request and its envelope.
pub const MAX_MESSAGE: usize = 2_097_152;
/// Streams of one client connection: a client library opens one per request in flight.
pub const MAX_STREAMS: u32 = 4096;
/// HTTP/2 windows: a stream holds a large request, a connection many.
pub const STREAM_WINDOW: u32 = 1 << 20;
pub const CONNECTION_WINDOW: u32 = 4 << 20;
/// How long a login lasts, as etcd's simple tokens.
pub const TOKEN_LIFE: Duration = Duration::from_secs(300);
/// Logins remembered, so that a token's MAC is checked once.
pub const MAX_SESSIONS: usize = 16_384;
/// Password hashes computed at once: each takes 19 MiB and a core.
pub const MAX_LOGINS: usize = 2;
/// Bytes of keys and values of a tenant, all versions, unless it is given another quota.
pub const DEFAULT_QUOTA: u64 = 8 << 30;
/// Tenant and user names.
pub const MAX_NAME: usize = 63;
/// The log of all groups of a node on disk: hours without the bucket at a high rate.
pub const MAX_LOG: u64 = 16 << 30;
/// The least that a log may be capped to: a few of its files.
pub const MIN_LOG: u64 = 256 << 20;
/// How often every row of a replica is read and its digest counted anew, and how fast, in bytes a
/// second: a tenth of a disk's and a fiftieth of a core's speed.
pub const SCAN_EVERY: Duration = Duration::from_secs(6 * 3600);
pub const SCAN_RATE: u64 = 32 << 20;
/// Memtables of all tenants of a node together.
pub const WRITE_BUFFERS: usize = 512 << 20;
/// Block cache of one tenant.
pub const BLOCK_CACHE: usize = 64 << 20;
/// Calls to a KMS a second, of one node, unless node.toml says otherwise: three nodes with 1,000 tenants each stay below 100.
pub const KMS_RATE: f64 = 33.0;
/// How long a tenant is served while its KMS does not answer, unless it says otherwise; and the
/// longest that it may say.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(600);
pub const MAX_GRACE: Duration = Duration::from_secs(24 * 3600);
/// How often the store is asked where the bucket lies.
pub const BUCKET_PLACE: Duration = Duration::from_secs(3600);
/// How long a deleted tenant can be brought back, unless it is said otherwise.
pub const DELETION_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);
/// The newest checkpoints that retention leaves, unless a tenant says otherwise: one is damaged, another
/// serves.
pub const KEEP_CHECKPOINTS: u32 = 2;
/// How much of the directory's history is kept: it is only ever restored to its newest state.
pub const KEEP_DIRECTORY: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a request waits for a tenant that is being opened.
pub const OPENING: Duration = Duration::from_secs(5);
/// Events kept in the directory.
pub const MAX_EVENTS: usize = 1000;
/// Everything that is kept of a tenant is read back within this, at most so fast, in bytes a second.
pub const SCRUB_EVERY: Duration = Duration::from_secs(7 * 24 * 3600);
pub const SCRUB_RATE: u64 = 32 << 20;
/// Days of a tenant's objectives that are kept.
pub const OBJECTIVE_DAYS: u64 = 35;
/// What a drill reads at full speed in each phase, to measure it, and a second from there on; for how long its
/// thread may work without a pause, and one part of how many it works from there on; and its memory: a live
/// tenant keeps its own.
pub const DRILL_MEASURED: u64 = 32 << 20;
pub const DRILL_RATE: u64 = 8 << 20;
pub const DRILL_FREE: Duration = Duration::from_millis(100);
pub const DRILL_SHARE: u32 = 8;
pub const DRILL_BUFFERS: usize = 64 << 20;
pub const DRILL_CACHE: usize = 8 << 20;
/// Keys that a drill compares with the live tenant's.
pub const DRILL_SAMPLE: usize = 64;
/// Drills of a tenant that are listed.
pub const MAX_DRILLS: usize = 100;
/// How long the enhanced tier of a region that is restored has the machine to itself.
pub const TIER_FIRST: Duration = Duration::from_secs(300);
/// The longest that a restored tenant which can be read waits for a second replica.
pub const JOIN_WITHIN: Duration = Duration::from_secs(300);
/// Tenants of a region restored at once: small ones wait for the bucket and the disk most of the time.
pub const RESTORES: usize = 8;
/// Of them, those whose log is replayed and rows are counted: each takes a core.
pub const REPLAYS: usize = 2;
/// Bytes of compressed log that are replayed without compaction: a few tables, however small they were
/// compressed.
pub const BRIEF_REPLAY: u64 = 16 << 20;
