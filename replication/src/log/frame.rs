//! Frames of the node's log. One frame is one write and one fsync.
//!
//! `magic HFLG (4) | format (1) | kind (1) | 0 (2) | sequence (8) | body length (4) | body CRC-32
//! (4) | header CRC-32 (4)`, then the body. Integers are big-endian.
//!
//! Invariant: frame n+1 is written only after frame n is synced. So a frame that is not valid and
//! has a valid one of a higher sequence behind it is damage; without one behind it, it is a torn
//! tail, which was never acknowledged.

pub const HEADER: usize = 28;
const MAGIC: &[u8; 4] = b"HFLG";
const FORMAT: u8 = 1;
/// A body is below this; a longer length field is not believed.
pub const MAX_BODY: usize = 64 << 20;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The state of all groups, at the beginning of each segment.
    State,
    /// Records.
    Records,
    /// Written when the log falls idle: it shows that what stands before it was synced.
    Idle,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::State => 0,
            Kind::Records => 1,
            Kind::Idle => 2,
        }
    }
}

pub struct Frame<'a> {
    pub kind: Kind,
    pub sequence: u64,
    pub body: &'a [u8],
}

/// Begins a frame in `out`; the body is then appended, and `finish` called.
pub fn begin(out: &mut Vec<u8>) {
    out.clear();
    out.resize(HEADER, 0);
}

pub fn finish(out: &mut [u8], kind: Kind, sequence: u64) {
    let body = crc32fast::hash(&out[HEADER..]);
    let length = (out.len() - HEADER) as u32;
    out[..4].copy_from_slice(MAGIC);
    out[4] = FORMAT;
    out[5] = kind.code();
    out[6..8].fill(0);
    out[8..16].copy_from_slice(&sequence.to_be_bytes());
    out[16..20].copy_from_slice(&length.to_be_bytes());
    out[20..24].copy_from_slice(&body.to_be_bytes());
    let header = crc32fast::hash(&out[..24]);
    out[24..HEADER].copy_from_slice(&header.to_be_bytes());
}

/// Why no frame can be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Not a whole valid frame.
    Invalid,
    /// A valid header of another format.
    Format(u8),
}

/// The frame at the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Result<Frame<'_>, Unreadable> {
    let int = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    if bytes.len() < HEADER || &bytes[..4] != MAGIC || int(24) != crc32fast::hash(&bytes[..24]) {
        return Err(Unreadable::Invalid);
    }
    if bytes[4] != FORMAT {
        return Err(Unreadable::Format(bytes[4]));
    }
    let kind = match bytes[5] {
        0 => Kind::State,
        1 => Kind::Records,
        2 => Kind::Idle,
        _ => return Err(Unreadable::Invalid),
    };
    let length = int(16) as usize;
    let body = bytes[HEADER..].get(..length).ok_or(Unreadable::Invalid)?;
    if length > MAX_BODY || crc32fast::hash(body) != int(20) {
        return Err(Unreadable::Invalid);
    }
    Ok(Frame {
        kind,
        sequence: u64::from_be_bytes(bytes[8..16].try_into().expect("8 bytes")),
        body,
    })
}

/// Whether a valid frame with a sequence above `after` begins anywhere in `bytes`.
pub fn any_valid_after(bytes: &[u8], after: u64) -> bool {
    let starts = bytes.windows(4).enumerate();
    starts
        .filter(|(_, window)| *window == MAGIC)
        .any(|(at, _)| matches!(parse(&bytes[at..]), Ok(frame) if frame.sequence > after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_frame() {
        let mut out = Vec::new();
        begin(&mut out);
        out.extend_from_slice(b"records");
        finish(&mut out, Kind::Records, 42);
        let golden = include_str!("../../golden/log-frame-v1.hex").trim();
        assert_eq!(hex::encode(&out), golden);
        let frame = parse(&out).unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(
            (frame.kind, frame.sequence, frame.body),
            (Kind::Records, 42, &b"records"[..])
        );
    }
}
