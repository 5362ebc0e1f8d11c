//! What a tenant's state machine knows besides rows: positions, revisions, digests, time.

use crate::Position;
use crate::engine::{Cf, Engine, EngineError};
use crate::mvcc::digest::{Digest, Digests};
use crate::mvcc::range::Bounds;

const FORMAT: u8 = 1;
const LENGTH: usize = 1 + 1 + Position::LENGTH + 5 * 8 + 3 * 32;
const KEY: &[u8] = b"state";
const MEMBERSHIP: &[u8] = b"membership";

/// State at an applied position. One row of column family `meta`; see docs/formats/README.md.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub applied: Option<Position>,
    pub revision: i64,
    /// Reads below this revision are refused.
    pub compacted: i64,
    /// Effective time of the last entry, milliseconds since 1970; it never goes back.
    pub time_ms: u64,
    /// Bytes of keys and values of all versions kept, which the quota counts.
    pub bytes: u64,
    pub auth_revision: u64,
    pub digests: Digests,
}

impl State {
    /// An empty tenant: etcd's empty store is at revision 1.
    pub fn empty() -> Self {
        State {
            revision: 1,
            auth_revision: 1,
            ..State::default()
        }
    }

    pub fn bounds(&self) -> Bounds {
        Bounds {
            revision: self.revision,
            compacted: self.compacted,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(LENGTH);
        out.push(FORMAT);
        out.push(u8::from(self.applied.is_some()));
        out.extend_from_slice(&self.applied.unwrap_or_default().to_bytes());
        let ints = [
            self.revision as u64,
            self.compacted as u64,
            self.time_ms,
            self.bytes,
            self.auth_revision,
        ];
        for int in ints {
            out.extend_from_slice(&int.to_be_bytes());
        }
        for digest in [self.digests.keys, self.digests.auth, self.digests.leases] {
            out.extend_from_slice(&digest.to_bytes());
        }
        out
    }

    pub fn decode(row: &[u8]) -> Result<Self, EngineError> {
        match row.first() {
            Some(&FORMAT) if row.len() == LENGTH => {}
            Some(&format) if format != FORMAT => return Err(EngineError::Format(format)),
            _ => return Err(EngineError::Damaged("state")),
        }
        let position = Position::from_bytes(row[2..26].try_into().expect("24 bytes"));
        let int = |n: usize| {
            let at = 26 + 8 * n;
            u64::from_be_bytes(row[at..at + 8].try_into().expect("8 bytes"))
        };
        let digest = |n: usize| {
            let at = 66 + 32 * n;
            Digest::from_bytes(row[at..at + 32].try_into().expect("32 bytes"))
        };
        Ok(State {
            applied: (row[1] == 1).then_some(position),
            revision: int(0) as i64,
            compacted: int(1) as i64,
            time_ms: int(2),
            bytes: int(3),
            auth_revision: int(4),
            digests: Digests {
                keys: digest(0),
                auth: digest(1),
                leases: digest(2),
            },
        })
    }

    /// The state that an engine stands at; an engine without one is empty.
    pub fn read(engine: &Engine) -> Result<Self, EngineError> {
        match engine.get(Cf::Meta, KEY)? {
            Some(row) => Self::decode(&row),
            None => Ok(Self::empty()),
        }
    }

    pub fn write(&self, engine: &Engine, batch: &mut rocksdb::WriteBatch) {
        batch.put_cf(engine.cf(Cf::Meta), KEY, self.encode());
    }

    /// The membership that an engine stands at, in the form that the group gave it.
    pub fn read_membership(engine: &Engine) -> Result<Option<Vec<u8>>, EngineError> {
        engine.get(Cf::Meta, MEMBERSHIP)
    }

    pub fn write_membership(engine: &Engine, batch: &mut rocksdb::WriteBatch, membership: &[u8]) {
        batch.put_cf(engine.cf(Cf::Meta), MEMBERSHIP, membership);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_encoding_and_refuses_another_format() {
        let state = State {
            applied: Some(Position {
                term: 3,
                node: 9,
                index: 77,
            }),
            revision: 12,
            compacted: 4,
            time_ms: 5,
            bytes: 6,
            auth_revision: 7,
            digests: Digests {
                auth: Digest::from_bytes([3; 32]),
                ..Digests::default()
            },
        };
        let mut row = state.encode();
        assert_eq!(State::decode(&row).unwrap(), state);
        assert!(State::decode(&row[..row.len() - 1]).is_err());
        row[0] = 2;
        assert!(matches!(State::decode(&row), Err(EngineError::Format(2))));
    }
}
