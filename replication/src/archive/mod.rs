//! The archive: a tenant's Raft log and checkpoints in object storage.
//!
//! Invariants. Everything in it is ciphertext as proposed, in clear framing authenticated with the
//! region's archive key: shipping, reading back and purging need no tenant key. Creating a link is
//! the durability point: one exclusive PUT. Links form a hash chain per tenant and incarnation.
//! Being fenced ends a writer. A `closed` link is the last of its chain, ever.

pub mod archiver;
pub mod bucket;
pub mod chain;
pub mod checkpoint;
pub mod holds;
pub mod ledger;
pub mod link;
pub mod lock;
pub mod retention;
pub mod rewriting;
pub mod s3;
pub mod scrub;
pub mod survey;
pub mod window;
