//! A link: one object of a tenant's chain.
//!
//! `magic HFLK (4) | format (1) | header length (4) | header (JSON) | entries | MAC (32)`; an entry
//! is `length (4) | encoded entry`. The MAC is BLAKE3 keyed with the region's archive key over all
//! that stands before it. See docs/formats/README.md.

use bytes::Bytes;
use kms::Secret;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::group::types::entry_position;
use crate::machine::State;
use crate::mvcc::digest::Digests;
use crate::{GroupId, Position};

const MAGIC: &[u8; 4] = b"HFLK";
pub const FORMAT: u8 = 1;
const HEAD: usize = 9;
const MAC: usize = 32;

/// Names the incarnation that a closed chain goes on in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Closed {
    pub incarnation: u32,
    /// Random id of the restore that closed it.
    pub restore: String,
}

/// Where the first link of an incarnation begins: the end of the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    pub incarnation: u32,
    /// The closing link.
    pub link: u64,
    pub position: Position,
    /// Revision after the jump.
    pub revision: i64,
    /// Of a restore to an earlier moment: what it began from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// The moment that a restore went back to. `Base::position` is of this incarnation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    pub incarnation: u32,
    /// Of the entry at `position`, only the commands up to this revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
    /// When it was gone back, milliseconds since 1970: the effective time goes on from there.
    pub at_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    pub group: GroupId,
    /// Counts from 1.
    pub number: u64,
    /// BLAKE3 of the link before, in hex; empty for the first.
    pub previous: String,
    /// The term of the leader that wrote it.
    pub term: u64,
    /// Random id of the writer.
    pub writer: String,
    /// The last position that this link and those before it cover.
    pub last: Option<Position>,
    pub entries: u32,
    /// State at `last`; absent when `last` is not where a batch ended, or passed while the tenant was
    /// sealed.
    pub state: Option<LinkState>,
    /// Milliseconds since 1970.
    pub written_ms: u64,
    pub closed: Option<Closed>,
    pub base: Option<Base>,
}

impl Header {
    /// Whether what leads to it is in no link but only in a checkpoint: entries that were purged before
    /// they were archived, or the state of the tenant that this one is a copy of. (Not asked of a link
    /// that repeats where the one before it ended.)
    pub fn is_gap(&self) -> bool {
        let bare = self.entries == 0 && self.closed.is_none() && self.base.is_none();
        bare && self.last.is_some()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkState {
    pub revision: i64,
    pub time_ms: u64,
    pub digests: Digests,
}

impl From<&State> for LinkState {
    fn from(state: &State) -> Self {
        LinkState {
            revision: state.revision,
            time_ms: state.time_ms,
            digests: state.digests,
        }
    }
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum LinkError {
    #[error("it is cut short")]
    Truncated,
    #[error("it has format {0}; this version reads {FORMAT}")]
    Format(u8),
    #[error("it does not authenticate: damaged, or not this region's")]
    Forged,
    #[error("it authenticates and does not parse: {0}")]
    Malformed(String),
    #[error("it belongs to group {0}")]
    OtherGroup(GroupId),
    #[error("it is link {found} and lies where {wanted} belongs")]
    OtherNumber { found: u64, wanted: u64 },
}

/// A link that was read and authenticated.
#[derive(Clone, Debug)]
pub struct Link {
    pub header: Header,
    /// Encoded entries.
    pub entries: Vec<Bytes>,
    /// BLAKE3 of the whole object, in hex.
    pub hash: String,
}

fn mac(key: &Secret, bytes: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(key.expose(), bytes).as_bytes()
}

/// BLAKE3 of an object, in hex.
pub fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

pub fn encode(key: &Secret, header: &Header, entries: &[Bytes]) -> Vec<u8> {
    let json = serde_json::to_vec(header).expect("a header of strings and numbers is JSON");
    let size: usize = entries.iter().map(|e| 4 + e.len()).sum();
    let mut out = Vec::with_capacity(HEAD + json.len() + size + MAC);
    out.extend_from_slice(MAGIC);
    out.push(FORMAT);
    out.extend_from_slice(&(json.len() as u32).to_be_bytes());
    out.extend_from_slice(&json);
    for entry in entries {
        out.extend_from_slice(&(entry.len() as u32).to_be_bytes());
        out.extend_from_slice(entry);
    }
    let tag = mac(key, &out);
    out.extend_from_slice(&tag);
    out
}

/// Authenticates and parses link `number` of `group`.
pub fn decode(key: &Secret, group: GroupId, number: u64, bytes: &Bytes) -> Result<Link, LinkError> {
    if bytes.len() < HEAD + MAC {
        return Err(LinkError::Truncated);
    }
    if &bytes[..4] != MAGIC {
        return Err(LinkError::Forged);
    }
    if bytes[4] != FORMAT {
        return Err(LinkError::Format(bytes[4]));
    }
    let end = bytes.len() - MAC;
    // blake3's Hash compares in constant time.
    let found = blake3::keyed_hash(key.expose(), &bytes[..end]);
    let tag: [u8; 32] = bytes[end..].try_into().map_err(|_| LinkError::Truncated)?;
    if found != blake3::Hash::from(tag) {
        return Err(LinkError::Forged);
    }
    let malformed = |what: &str| LinkError::Malformed(what.to_string());
    let length = u32::from_be_bytes(bytes[5..9].try_into().expect("4 bytes")) as usize;
    let json = bytes[HEAD..end]
        .get(..length)
        .ok_or_else(|| malformed("header"))?;
    let header: Header = serde_json::from_slice(json).map_err(|e| malformed(&e.to_string()))?;
    if header.group != group {
        return Err(LinkError::OtherGroup(header.group));
    }
    if header.number != number {
        return Err(LinkError::OtherNumber {
            found: header.number,
            wanted: number,
        });
    }
    let mut entries = Vec::with_capacity(header.entries as usize);
    let mut at = HEAD + length;
    while at < end {
        let size = bytes[at..end].get(..4).ok_or_else(|| malformed("entry"))?;
        let size = u32::from_be_bytes(size.try_into().expect("4 bytes")) as usize;
        if at + 4 + size > end {
            return Err(malformed("entry"));
        }
        let entry = bytes.slice(at + 4..at + 4 + size);
        entry_position(&entry).ok_or_else(|| malformed("entry"))?;
        entries.push(entry);
        at += 4 + size;
    }
    if entries.len() != header.entries as usize {
        return Err(malformed("number of entries"));
    }
    Ok(Link {
        header,
        entries,
        hash: hash(bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kms::TenantId;

    fn sample() -> (Secret, GroupId, Vec<u8>) {
        let key = Secret::from_slice(&[3; 32]).unwrap();
        let group = GroupId {
            tenant: TenantId([1; 16]),
            incarnation: 2,
        };
        let last = Position {
            term: 1,
            node: 7,
            index: 5,
        };
        let mut entry = last.to_bytes().to_vec();
        entry.push(0);
        let header = Header {
            group,
            number: 4,
            previous: "ab".into(),
            term: 1,
            writer: "w".into(),
            last: Some(last),
            entries: 1,
            state: Some(LinkState {
                revision: 9,
                time_ms: 10,
                digests: Digests::default(),
            }),
            written_ms: 11,
            closed: None,
            base: None,
        };
        let bytes = encode(&key, &header, &[entry.into()]);
        (key, group, bytes)
    }

    #[test]
    fn golden_link() {
        let (key, group, bytes) = sample();
        let golden = include_str!("../../golden/link-v1.hex").trim();
        assert_eq!(hex::encode(&bytes), golden);
        let link = decode(&key, group, 4, &bytes.into()).unwrap();
        assert_eq!(link.entries.len(), 1);
    }

    #[test]
    fn every_flip_every_cut_and_every_other_place_is_refused() {
        let (key, group, bytes) = sample();
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 1;
            assert!(decode(&key, group, 4, &bad.into()).is_err(), "flip at {i}");
            assert!(
                decode(&key, group, 4, &bytes[..i].to_vec().into()).is_err(),
                "cut at {i}"
            );
        }
        let bytes = Bytes::from(bytes);
        assert!(decode(&key, group, 5, &bytes).is_err());
        let other = GroupId {
            incarnation: 3,
            ..group
        };
        assert_eq!(
            decode(&key, other, 4, &bytes).unwrap_err(),
            LinkError::OtherGroup(group)
        );
        let foreign = Secret::from_slice(&[4; 32]).unwrap();
        assert_eq!(
            decode(&foreign, group, 4, &bytes).unwrap_err(),
            LinkError::Forged
        );
    }
}
