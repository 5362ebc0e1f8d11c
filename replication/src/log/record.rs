//! Records in a frame's body: `kind (1) | group (20) | length (4) | payload`.
//!
//! Entries are sealed; votes, positions and memberships are in clear, so that a group whose key
//! is away can restart, vote and replicate.

use crate::group::types::{self, Vote};
use crate::{GroupId, Position};

const APPEND: u8 = 1;
const TRUNCATE: u8 = 2;
const PURGE: u8 = 3;
const VOTE: u8 = 4;
const COMMITTED: u8 = 5;
const DROP: u8 = 6;
const MOVED: u8 = 7;

/// Bytes of a record before its payload.
pub const HEADER: usize = 25;

/// One change of a group's log.
#[derive(Debug, PartialEq)]
pub enum Record<'a> {
    /// An encoded entry, behind the last one.
    Append(&'a [u8]),
    /// An entry that was written before, moved out of an old segment.
    Moved(&'a [u8]),
    /// Entries above this index are gone; 0 stands for all, index 0 included, when `None`.
    Truncate(Option<u64>),
    /// Entries up to here are gone.
    Purge(Position),
    Vote(Vote),
    Committed(Option<Position>),
    /// The group is no more.
    Drop,
}

pub fn encode(group: GroupId, record: &Record<'_>, out: &mut Vec<u8>) {
    let kind = match record {
        Record::Append(_) => APPEND,
        Record::Moved(_) => MOVED,
        Record::Truncate(_) => TRUNCATE,
        Record::Purge(_) => PURGE,
        Record::Vote(_) => VOTE,
        Record::Committed(_) => COMMITTED,
        Record::Drop => DROP,
    };
    out.push(kind);
    out.extend_from_slice(&group.to_bytes());
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    match record {
        Record::Append(entry) | Record::Moved(entry) => out.extend_from_slice(entry),
        Record::Truncate(after) => {
            if let Some(after) = after {
                out.extend_from_slice(&after.to_be_bytes());
            }
        }
        Record::Purge(at) => out.extend_from_slice(&at.to_bytes()),
        Record::Vote(vote) => out.extend_from_slice(&types::encode_vote(vote)),
        Record::Committed(at) => {
            if let Some(at) = at {
                out.extend_from_slice(&at.to_bytes());
            }
        }
        Record::Drop => {}
    }
    let length = (out.len() - length_at - 4) as u32;
    out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
}

/// The records of a body with the offset of each payload in it; `None` if they do not parse.
pub fn decode(body: &[u8]) -> Option<Vec<(GroupId, Record<'_>, usize)>> {
    let mut records = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let head = body.get(at..at + HEADER)?;
        let group = GroupId::from_bytes(head[1..21].try_into().ok()?);
        let length = u32::from_be_bytes(head[21..25].try_into().ok()?) as usize;
        let payload = body.get(at + HEADER..at + HEADER + length)?;
        let record = match head[0] {
            APPEND => Record::Append(payload),
            MOVED => Record::Moved(payload),
            TRUNCATE if payload.is_empty() => Record::Truncate(None),
            TRUNCATE => Record::Truncate(Some(u64::from_be_bytes(payload.try_into().ok()?))),
            PURGE => Record::Purge(Position::from_bytes(payload.try_into().ok()?)),
            VOTE => Record::Vote(types::decode_vote(payload)?),
            COMMITTED if payload.is_empty() => Record::Committed(None),
            COMMITTED => Record::Committed(Some(Position::from_bytes(payload.try_into().ok()?))),
            DROP if payload.is_empty() => Record::Drop,
            _ => return None,
        };
        records.push((group, record, at + HEADER));
        at += HEADER + length;
    }
    Some(records)
}
