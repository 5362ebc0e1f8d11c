//! Stored rows: the latest record of a key (`kv`), events by revision (`rev`), history (`hist`).

use bytes::Bytes;

use crate::proto::mvccpb::KeyValue;

/// The latest version of a live key, as column family `kv` holds it:
/// `create (8) | mod (8) | version (8) | lease (8) | value`, integers big-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub create: i64,
    pub modified: i64,
    pub version: i64,
    pub lease: i64,
    pub value: Bytes,
}

const HEADER: usize = 32;

fn int(bytes: &[u8], at: usize) -> i64 {
    i64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.value.len());
        for field in [self.create, self.modified, self.version, self.lease] {
            out.extend_from_slice(&field.to_be_bytes());
        }
        out.extend_from_slice(&self.value);
        out
    }

    /// `None` if the row is cut short.
    pub fn decode(row: &[u8]) -> Option<Record> {
        if row.len() < HEADER {
            return None;
        }
        Some(Record {
            create: int(row, 0),
            modified: int(row, 8),
            version: int(row, 16),
            lease: int(row, 24),
            value: Bytes::copy_from_slice(&row[HEADER..]),
        })
    }

    pub fn into_key_value(self, key: Bytes) -> KeyValue {
        KeyValue {
            key,
            create_revision: self.create,
            mod_revision: self.modified,
            version: self.version,
            value: self.value,
            lease: self.lease,
        }
    }
}

/// What happened to a key at a revision, as column family `rev` holds it:
/// `kind (1) | key length (4) | key | record`; a tombstone has no record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub key: Bytes,
    /// `None`: the key was deleted.
    pub record: Option<Record>,
}

pub const PUT: u8 = 0;
pub const DELETE: u8 = 1;

impl Event {
    pub fn encode_put(key: &[u8], record: &[u8]) -> Vec<u8> {
        Self::encode(PUT, key, record)
    }

    pub fn encode_delete(key: &[u8]) -> Vec<u8> {
        Self::encode(DELETE, key, &[])
    }

    fn encode(kind: u8, key: &[u8], record: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(5 + key.len() + record.len());
        out.push(kind);
        out.extend_from_slice(&(key.len() as u32).to_be_bytes());
        out.extend_from_slice(key);
        out.extend_from_slice(record);
        out
    }

    pub fn decode(row: &[u8]) -> Option<Event> {
        let kind = *row.first()?;
        let length = u32::from_be_bytes(row.get(1..5)?.try_into().ok()?) as usize;
        let key = Bytes::copy_from_slice(row.get(5..5 + length)?);
        let record = match kind {
            PUT => Some(Record::decode(&row[5 + length..])?),
            DELETE => None,
            _ => return None,
        };
        Some(Event { key, record })
    }
}
