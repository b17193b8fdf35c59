//! Messages to bytes.

use bytes::{BufMut, BytesMut};

use super::{CRC_AT, HEADER_LEN, Header, checksum};
use crate::message::{Message, MessageType, Role};

/// A message that cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// It is longer than the connection carries.
    #[error("{kind} makes a frame of {len} bytes; a {role:?} connection carries {limit}")]
    TooLong {
        /// Message type.
        kind: MessageType,
        /// Frame length in bytes.
        len: usize,
        /// Role of the connection.
        role: Role,
        /// Its limit in bytes.
        limit: usize,
    },
    /// The payload could not be written.
    #[error("payload of {kind}: {detail}")]
    Payload {
        /// Message type.
        kind: MessageType,
        /// What the encoder said.
        detail: String,
    },
}

/// Appends frames to a buffer. Allocates only when the buffer has to grow.
#[derive(Clone, Debug)]
pub struct Encoder {
    role: Role,
    version: u16,
}

impl Encoder {
    /// The connection turned out to have this role.
    pub fn set_role(&mut self, role: Role) {
        self.role = role;
    }

    /// An encoder for a connection of this role.
    pub fn new(role: Role) -> Encoder {
        Encoder { role, version: crate::VERSION }
    }

    /// Stamp frames with the version that was agreed on.
    pub fn set_version(&mut self, version: u16) {
        self.version = version;
    }

    /// Append one frame. On an error `out` is as it was.
    pub fn encode(
        &self,
        message: &Message,
        sequence: u32,
        timestamp_ns: u64,
        out: &mut BytesMut,
    ) -> Result<(), EncodeError> {
        let kind = message.kind();
        let start = out.len();
        out.put_bytes(0, HEADER_LEN);
        if let Err(e) = message.write_payload(&mut (&mut *out).writer()) {
            out.truncate(start);
            return Err(EncodeError::Payload { kind, detail: e.to_string() });
        }
        let len = out.len() - start;
        let limit = self.role.frame_limit();
        if len > limit {
            out.truncate(start);
            return Err(EncodeError::TooLong { kind, len, role: self.role, limit });
        }
        let mut header = Header {
            version: self.version,
            msg_type: kind as u16,
            sequence,
            payload_len: (len - HEADER_LEN) as u32,
            timestamp_ns,
        }
        .to_bytes();
        let crc = checksum(&header, &out[start + HEADER_LEN..]);
        header[CRC_AT].copy_from_slice(&crc.to_le_bytes());
        out[start..start + HEADER_LEN].copy_from_slice(&header);
        Ok(())
    }
}
