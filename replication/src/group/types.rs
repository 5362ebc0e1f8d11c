//! openraft's types for a tenant's group, and their encodings.

use std::fmt;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;
use serde::{Deserialize, Serialize};

use crate::Position;
use crate::machine;
use crate::proto::command::Reply;

/// A sealed batch of commands. Printed as its length only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed(pub Bytes);

impl fmt::Display for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sealed, {} bytes", self.0.len())
    }
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The replies to a batch, in its order. They stay on the node that applied it.
#[derive(Default, Serialize, Deserialize)]
pub struct Answer {
    #[serde(skip)]
    pub replies: Vec<Reply>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} replies", self.replies.len())
    }
}

openraft::declare_raft_types!(
    pub TypeConfig:
        D = Sealed,
        R = Answer,
        NodeId = u64,
        Node = openraft::BasicNode,
        AsyncRuntime = openraft_rt_tokio::TokioRuntime,
);

pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;

pub fn position(id: &LogId) -> Position {
    Position {
        term: id.leader_id.term,
        node: id.leader_id.node_id,
        index: id.index,
    }
}

pub fn log_id(at: Position) -> LogId {
    let leader = LeaderId {
        term: at.term,
        node_id: at.node,
    };
    LogId::new(leader.to_committed(), at.index)
}

const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// `position (24) | kind (1) | payload`, the form of an entry in logs, on wires and in the archive.
pub fn encode_entry(entry: &Entry, out: &mut Vec<u8>) {
    out.extend_from_slice(&position(&entry.log_id).to_bytes());
    match &entry.payload {
        EntryPayload::Blank => out.push(BLANK),
        EntryPayload::Normal(sealed) => {
            out.push(NORMAL);
            out.extend_from_slice(&sealed.0);
        }
        EntryPayload::Membership(membership) => {
            out.push(MEMBERSHIP);
            serde_json::to_writer(out, membership).expect("a membership is JSON");
        }
    }
}

/// The position of an encoded entry.
pub fn entry_position(bytes: &[u8]) -> Option<Position> {
    Some(Position::from_bytes(bytes.get(..24)?.try_into().ok()?))
}

pub fn decode_entry(bytes: &Bytes) -> Option<Entry> {
    let log_id = log_id(entry_position(bytes)?);
    let payload = match *bytes.get(24)? {
        BLANK => EntryPayload::Blank,
        NORMAL => EntryPayload::Normal(Sealed(bytes.slice(25..))),
        MEMBERSHIP => EntryPayload::Membership(serde_json::from_slice(&bytes[25..]).ok()?),
        _ => return None,
    };
    Some(Entry { log_id, payload })
}

/// The entry as the machine takes it.
pub fn machine_entry(entry: Entry) -> machine::Entry {
    let payload = match entry.payload {
        EntryPayload::Blank => machine::Payload::Blank,
        EntryPayload::Normal(sealed) => machine::Payload::Sealed(sealed.0),
        EntryPayload::Membership(membership) => {
            let stored = StoredMembership::new(Some(entry.log_id), membership);
            machine::Payload::Membership(encode_membership(&stored))
        }
    };
    machine::Entry {
        position: position(&entry.log_id),
        payload,
    }
}

pub fn encode_membership(membership: &StoredMembership) -> Vec<u8> {
    serde_json::to_vec(membership).expect("a membership is JSON")
}

pub fn decode_membership(bytes: &[u8]) -> Option<StoredMembership> {
    serde_json::from_slice(bytes).ok()
}

pub fn encode_vote(vote: &Vote) -> [u8; 17] {
    let mut out = [0u8; 17];
    out[..8].copy_from_slice(&vote.leader_id.term.to_be_bytes());
    out[8..16].copy_from_slice(&vote.leader_id.node_id.to_be_bytes());
    out[16] = u8::from(vote.committed);
    out
}

pub fn decode_vote(bytes: &[u8]) -> Option<Vote> {
    let bytes: &[u8; 17] = bytes.try_into().ok()?;
    let int = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    Some(match bytes[16] {
        0 => Vote::new(int(0), int(8)),
        1 => Vote::new_committed(int(0), int(8)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_entry() {
        let entry = Entry {
            log_id: log_id(Position {
                term: 3,
                node: 9,
                index: 77,
            }),
            payload: EntryPayload::Normal(Sealed(Bytes::from_static(b"sealed"))),
        };
        let mut bytes = Vec::new();
        encode_entry(&entry, &mut bytes);
        let golden = include_str!("../../golden/log-entry-v1.hex").trim();
        assert_eq!(hex::encode(&bytes), golden);
        assert_eq!(decode_entry(&Bytes::from(bytes)), Some(entry));
    }
}
