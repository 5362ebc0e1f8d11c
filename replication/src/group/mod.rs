//! One tenant's Raft group on one node: build, propose, read, membership. openraft's names stay
//! here and in `log`.

mod gather;
mod member;
mod network;
mod propose;
mod read;
mod registry;
pub mod replica;
mod snapshot;
mod state_machine;
#[cfg(test)]
mod suite;
pub mod types;

pub use member::{Checkpoint, Group, GroupConfig, GroupError, GroupStatus, Role, ScanError};
pub use propose::ProposeError;
pub use registry::{DaemonCalls, Groups};
