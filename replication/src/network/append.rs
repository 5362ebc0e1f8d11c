//! The wire form of append requests, the only message whose encoding costs:
//! `vote (17) | previous (25) | committed (25) | archived index (8) | entries`, a position being
//! `1 | 24 bytes` or 25 zeros, an entry `length (4) | encoded entry`.

use bytes::Bytes;
use openraft::raft::AppendEntriesRequest;

use crate::Position;
use crate::group::types::{
    LogId, TypeConfig, decode_entry, decode_vote, encode_entry, encode_vote, log_id, position,
};

const HEAD: usize = 17 + 25 + 25 + 8;

fn put_position(id: Option<&LogId>, out: &mut Vec<u8>) {
    out.push(u8::from(id.is_some()));
    out.extend_from_slice(&id.map(position).unwrap_or_default().to_bytes());
}

fn get_position(bytes: &[u8]) -> Option<Option<LogId>> {
    let at = Position::from_bytes(bytes[1..25].try_into().ok()?);
    match bytes[0] {
        0 => Some(None),
        1 => Some(Some(log_id(at))),
        _ => None,
    }
}

/// Appends the wire form to `out`. `archived`: the last index that is durable in the bucket.
pub fn encode(request: &AppendEntriesRequest<TypeConfig>, archived: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&encode_vote(&request.vote));
    put_position(request.prev_log_id.as_ref(), out);
    put_position(request.leader_commit.as_ref(), out);
    out.extend_from_slice(&archived.to_be_bytes());
    for entry in &request.entries {
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        encode_entry(entry, out);
        let length = (out.len() - at - 4) as u32;
        out[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }
}

/// The request and the archived index; `None` if it does not parse.
pub fn decode(bytes: &Bytes) -> Option<(AppendEntriesRequest<TypeConfig>, u64)> {
    let head = bytes.get(..HEAD)?;
    let mut entries = Vec::new();
    let mut at = HEAD;
    while at < bytes.len() {
        let length = u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize;
        bytes.get(at + 4..at + 4 + length)?;
        entries.push(decode_entry(&bytes.slice(at + 4..at + 4 + length))?);
        at += 4 + length;
    }
    let request = AppendEntriesRequest {
        vote: decode_vote(&head[..17])?,
        prev_log_id: get_position(&head[17..42])?,
        leader_commit: get_position(&head[42..67])?,
        entries,
    };
    Some((request, u64::from_be_bytes(head[67..75].try_into().ok()?)))
}
