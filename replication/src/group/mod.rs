//! One tenant's Raft group on one node: build, propose, read, membership. openraft's names stay
//! here and in `log`.

pub mod founding;
mod gather;
mod member;
mod members;
mod network;
mod propose;
mod read;
mod registry;
pub mod replica;
pub mod rewriting;
mod scan;
pub mod sealing;
mod snapshot;
mod state_machine;
mod status;
#[cfg(test)]
mod suite;
pub mod types;
mod upkeep;

pub use member::{Checkpoint, Group, GroupConfig, GroupError};
pub use propose::ProposeError;
pub use registry::{DaemonCalls, Groups};
pub use scan::ScanError;
pub use status::{GroupStatus, Role};
