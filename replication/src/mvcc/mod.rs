//! Multi-version state of one tenant: how keys, records and events are laid out in RocksDB, how
//! they are read, and what a request does to them. Semantics are etcd's.

pub mod check;
pub mod digest;
pub mod key;
pub mod range;
pub mod record;
pub mod view;
