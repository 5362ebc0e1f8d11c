//! Apply: the only writer of a tenant's state.
//!
//! Invariants. Apply is deterministic: time and ids arrive in the entry. Data, applied position,
//! membership and digests change in one write batch, so that the engine stands at one entry at any
//! moment. Replies leave after that write. An entry that does not open is an error of this
//! replica, which stops; one whose key generation is not here seals the replica until it is. None is
//! skipped. One that was applied before changes nothing.

mod apply;
mod latest;
mod state;
mod store;
mod txn;

pub use apply::{Applied, Entry, Machine, MachineError, Payload, Until, check_command};
pub use state::State;
pub use store::{Standing, Store};
