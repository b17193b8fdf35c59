//! Frames: a 32-byte little-endian header and a payload.

mod decoder;
mod encoder;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use crc::{CRC_32_ISO_HDLC, Crc, Digest, Table};

pub use decoder::{Decoder, FrameError};
pub use encoder::{EncodeError, Encoder};

/// First four bytes of a frame as a little-endian number: "KMP\0" read from the high byte down.
pub const MAGIC: u32 = 0x4B4D_5000;
/// Bytes of a header.
pub const HEADER_LEN: usize = 32;
/// Longest frame on a control connection in bytes, header included.
pub const CONTROL_LIMIT: usize = 64 << 10;
/// Longest frame on a bulk connection in bytes, header included.
pub const BULK_LIMIT: usize = 1 << 20;

/// Where the checksum lies in a header.
const CRC_AT: std::ops::Range<usize> = 24..28;

static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC);

/// A frame's header, as it travels except for magic, checksum and the reserved word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Protocol version the sender speaks here.
    pub version: u16,
    /// Message type code.
    pub msg_type: u16,
    /// Matches an answer to its request; 0 when the frame is about the connection.
    pub sequence: u32,
    /// Bytes of payload.
    pub payload_len: u32,
    /// Nanoseconds since the sender's boot.
    pub timestamp_ns: u64,
}

/// A whole, undamaged frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Header.
    pub header: Header,
    /// Payload, not yet interpreted.
    pub payload: Bytes,
}

impl Header {
    /// The header's bytes with a checksum field of zero.
    fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&self.version.to_le_bytes());
        b[6..8].copy_from_slice(&self.msg_type.to_le_bytes());
        b[8..12].copy_from_slice(&self.sequence.to_le_bytes());
        b[12..16].copy_from_slice(&self.payload_len.to_le_bytes());
        b[16..24].copy_from_slice(&self.timestamp_ns.to_le_bytes());
        b
    }
}

/// Checksum of a frame whose header is `header`: the checksum field counts as zero, the reserved word as
/// it is.
pub fn checksum(header: &[u8; HEADER_LEN], payload: &[u8]) -> u32 {
    let mut d: Digest<'_, u32, Table<16>> = CRC.digest();
    d.update(&header[..CRC_AT.start]);
    d.update(&[0; 4]);
    d.update(&header[CRC_AT.end..]);
    d.update(payload);
    d.finalize()
}

fn u16_at(b: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}
