//! How a tenant's data gets to more than one place, and back.
//!
//! One tenant is one Raft group, one RocksDB instance, one data key. Commands are sealed before
//! they are proposed; `log` keeps them, `network` carries them, `machine` alone applies them to
//! `engine`, `archive` ships them to object storage and `restore` replays them.

pub mod archive;
pub mod clock;
pub mod command;
pub mod engine;
pub mod failpoint;
pub mod group;
pub mod log;
pub mod machine;
pub mod mvcc;
pub mod network;
pub mod position;
pub mod restore;

pub use position::{GroupId, Position};

/// Messages compiled from `proto/`.
#[allow(clippy::all, clippy::unwrap_used, missing_docs, rustdoc::all)]
pub mod proto {
    macro_rules! package {
        ($module:ident, $file:literal) => {
            pub mod $module {
                include!(concat!(env!("OUT_DIR"), "/", $file, ".rs"));
            }
        };
    }
    package!(mvccpb, "mvccpb");
    package!(authpb, "authpb");
    package!(etcdserverpb, "etcdserverpb");
    // prost nests a package by its dots and refers to its siblings from there.
    pub mod holdfast {
        package!(command, "holdfast.command");
    }
    pub use holdfast::command;
}
