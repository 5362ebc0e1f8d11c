//! Frames on a connection: `length (4) | kind (1) | id (8) | payload`, integers big-endian.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A frame is below this: a replication message and its header.
pub const MAX_FRAME: usize = 32 << 20;
const HEAD: usize = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Hello = 0,
    /// `service (1) | group (20) | body`
    Request = 1,
    /// `1 | body` or `0 | error text`
    Response = 2,
    /// `group (20)`: opens a stream of appends.
    StreamOpen = 3,
    StreamItem = 4,
    StreamEnd = 5,
    StreamReply = 6,
    /// The stream is over; an error text, or nothing.
    StreamClosed = 7,
    /// Asks for a sign of life.
    Ping = 8,
    Pong = 9,
}

impl Kind {
    fn from_code(code: u8) -> Option<Kind> {
        use Kind::*;
        [
            Hello,
            Request,
            Response,
            StreamOpen,
            StreamItem,
            StreamEnd,
            StreamReply,
            StreamClosed,
            Ping,
            Pong,
        ]
        .into_iter()
        .find(|k| *k as u8 == code)
    }
}

pub struct Frame {
    pub kind: Kind,
    pub id: u64,
    pub payload: Bytes,
}

/// Begins a frame; the payload is appended, then `finish` is called.
pub fn begin(kind: Kind, id: u64, room: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + HEAD + room);
    out.extend_from_slice(&[0; 4]);
    out.push(kind as u8);
    out.extend_from_slice(&id.to_be_bytes());
    out
}

pub fn finish(mut out: Vec<u8>) -> Bytes {
    let length = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out.into()
}

pub fn encode(kind: Kind, id: u64, payload: &[u8]) -> Bytes {
    let mut out = begin(kind, id, payload.len());
    out.extend_from_slice(payload);
    finish(out)
}

/// Reads frames off a connection.
pub struct Reader<R> {
    io: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub fn new(io: R) -> Self {
        Reader {
            io,
            buffer: BytesMut::with_capacity(64 << 10),
        }
    }

    /// The next frame; `None` at the end of the connection.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if self.buffer.len() >= 4 {
                let length =
                    u32::from_be_bytes(self.buffer[..4].try_into().expect("4 bytes")) as usize;
                if !(HEAD..=MAX_FRAME).contains(&length) {
                    return Err(io::Error::other("a frame's length is not believable"));
                }
                if self.buffer.len() >= 4 + length {
                    self.buffer.advance(4);
                    let mut frame = self.buffer.split_to(length).freeze();
                    let kind = Kind::from_code(frame.get_u8())
                        .ok_or_else(|| io::Error::other("a frame's kind is not known"))?;
                    let id = frame.get_u64();
                    return Ok(Some(Frame {
                        kind,
                        id,
                        payload: frame,
                    }));
                }
                self.buffer.reserve(4 + length - self.buffer.len());
            } else {
                self.buffer.reserve(64 << 10);
            }
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }
}
