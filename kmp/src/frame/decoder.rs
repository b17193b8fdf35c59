//! Bytes to frames.

use bytes::{Buf, BytesMut};

use super::{CRC_AT, Frame, HEADER_LEN, Header, MAGIC, checksum, u16_at, u32_at, u64_at};
use crate::message::{MessageType, Role};
use crate::version::Versions;

/// Bytes that are not a frame. The connection cannot go on: where the next frame begins is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first word is not the magic number.
    #[error("frame begins with {found:#010x}, expected the magic number {MAGIC:#010x}")]
    Magic {
        /// Word found.
        found: u32,
    },
    /// A version that was not agreed on.
    #[error("frame has KMP version {found}, expected {expected}")]
    Version {
        /// Version found.
        found: u16,
        /// Versions accepted.
        expected: Versions,
    },
    /// The frame is longer than the connection allows.
    #[error(
        "frame of type {msg_type:#06x} announces {found} bytes of payload, a frame here has at most {limit} and 32 of them are the header"
    )]
    TooLong {
        /// Message type code.
        msg_type: u16,
        /// Payload length announced.
        found: u32,
        /// Longest frame in bytes.
        limit: usize,
    },
    /// The checksum does not match.
    #[error(
        "frame of type {msg_type:#06x}, sequence {sequence}, has checksum {found:#010x}, expected {expected:#010x}"
    )]
    Checksum {
        /// Message type code.
        msg_type: u16,
        /// Sequence.
        sequence: u32,
        /// Checksum in the header.
        found: u32,
        /// Checksum of what came.
        expected: u32,
    },
    /// Bytes were fed after one of the other errors.
    #[error("the connection is unusable after a framing error")]
    Poisoned,
}

/// Finds frames in a byte stream.
///
/// Holds at most one frame: [`Decoder::feed`] takes only the bytes of the frame under way, and checks the
/// header before it makes room for the payload. After an error every call fails: a stream that lost its
/// place cannot be trusted again.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    versions: Versions,
    pub(super) buf: BytesMut,
    /// Bytes the frame under way has, once its header is known.
    need: usize,
    poisoned: bool,
}

impl Decoder {
    /// The connection turned out to have this role.
    pub fn set_role(&mut self, role: Role) {
        self.limit = role.frame_limit();
    }

    /// A decoder for a connection of this role, for the versions of this crate.
    pub fn new(role: Role) -> Decoder {
        Decoder {
            limit: role.frame_limit(),
            versions: Versions::OURS,
            buf: BytesMut::new(),
            need: HEADER_LEN,
            poisoned: false,
        }
    }

    /// Accept these versions from now on. HELLO, HELLO_ACK and ERROR are accepted in any.
    pub fn set_versions(&mut self, versions: Versions) {
        self.versions = versions;
    }

    /// Bytes held.
    pub fn buffered(&self) -> usize {
        self.buf.len()
    }

    /// Take bytes from the front of `input` until a frame is whole or `input` is empty. Call again until it
    /// returns `Ok(None)`.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.poisoned {
            return Err(FrameError::Poisoned);
        }
        let result = self.advance(input);
        self.poisoned = result.is_err();
        result
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if !self.fill(input, HEADER_LEN) {
            return Ok(None);
        }
        if self.need == HEADER_LEN {
            self.need = HEADER_LEN + self.check_header()?;
            self.buf.reserve(self.need - HEADER_LEN);
        }
        if !self.fill(input, self.need) {
            return Ok(None);
        }
        self.need = HEADER_LEN;
        self.finish().map(Some)
    }

    /// Take bytes until `want` are held.
    fn fill(&mut self, input: &mut &[u8], want: usize) -> bool {
        let n = want.saturating_sub(self.buf.len()).min(input.len());
        self.buf.extend_from_slice(&input[..n]);
        *input = &input[n..];
        self.buf.len() >= want
    }

    fn raw_header(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        raw.copy_from_slice(&self.buf[..HEADER_LEN]);
        raw
    }

    /// Length of the payload, when the header is one.
    fn check_header(&self) -> Result<usize, FrameError> {
        let raw = self.raw_header();
        let found = u32_at(&raw, 0);
        if found != MAGIC {
            return Err(FrameError::Magic { found });
        }
        let (version, msg_type) = (u16_at(&raw, 4), u16_at(&raw, 6));
        let frozen = MessageType::from_code(msg_type).is_some_and(MessageType::is_frozen);
        if !frozen && !self.versions.contains(version) {
            return Err(FrameError::Version { found: version, expected: self.versions });
        }
        let found = u32_at(&raw, 12);
        if found as usize > self.limit - HEADER_LEN {
            return Err(FrameError::TooLong { msg_type, found, limit: self.limit });
        }
        Ok(found as usize)
    }

    fn finish(&mut self) -> Result<Frame, FrameError> {
        let raw = self.raw_header();
        let header = Header {
            version: u16_at(&raw, 4),
            msg_type: u16_at(&raw, 6),
            sequence: u32_at(&raw, 8),
            payload_len: u32_at(&raw, 12),
            timestamp_ns: u64_at(&raw, 16),
        };
        let found = u32_at(&raw, CRC_AT.start);
        let expected = checksum(&raw, &self.buf[HEADER_LEN..]);
        if found != expected {
            let Header { msg_type, sequence, .. } = header;
            return Err(FrameError::Checksum { msg_type, sequence, found, expected });
        }
        let mut whole = self.buf.split();
        whole.advance(HEADER_LEN);
        Ok(Frame { header, payload: whole.freeze() })
    }
}
