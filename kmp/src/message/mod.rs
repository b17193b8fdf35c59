//! Messages and their payloads.
//!
//! A payload is one MessagePack map with field names as keys. A reader skips fields it does not know and
//! takes the default for fields that are missing, so sides of different releases understand each other.

mod connection;
mod fault;
mod health;
mod morph;
mod recovery;
mod topology;
mod wire;

use serde::{Deserialize, Serialize};

pub use connection::*;
pub use fault::*;
pub use health::*;
pub use morph::*;
pub use recovery::*;
pub use topology::*;
pub use wire::Blob;

/// Outcome of a request whose answer has the same message type: absent in the request, present in the
/// answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reply {
    /// Whether it was done.
    pub ok: bool,
    /// What was done, or why not.
    pub detail: String,
}

/// A payload that cannot be read. The frame around it was whole, so the connection goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A message type this side does not know.
    #[error("message type {0:#06x} is not known to KMP version {version}", version = crate::VERSION)]
    UnknownType(u16),
    /// The payload is not what its type asks for.
    #[error("payload of {name}: {detail}")]
    Payload {
        /// Message name.
        name: &'static str,
        /// What is wrong.
        detail: String,
    },
}

macro_rules! messages {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal;)*) => {
        /// Message types and their codes on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum MessageType { $($(#[$doc])* $variant = $code,)* }

        impl MessageType {
            /// Every type, by code.
            pub const ALL: &'static [MessageType] = &[$(MessageType::$variant,)*];

            /// The type with this code.
            pub fn from_code(code: u16) -> Option<MessageType> {
                match code { $($code => Some(MessageType::$variant),)* _ => None }
            }

            /// Name as the protocol document has it.
            pub fn name(self) -> &'static str {
                match self { $(MessageType::$variant => $name,)* }
            }
        }

        /// A message: its type and payload.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(clippy::large_enum_variant, reason = "messages are handled one at a time; a box would allocate for every heartbeat")]
        pub enum Message { $($(#[$doc])* $variant($variant),)* }

        impl Message {
            /// The type.
            pub fn kind(&self) -> MessageType {
                match self { $(Message::$variant(_) => MessageType::$variant,)* }
            }

            /// Write the payload. Errors only when `out` does.
            pub fn write_payload(&self, out: &mut impl std::io::Write) -> Result<(), rmp_serde::encode::Error> {
                match self { $(Message::$variant(p) => rmp_serde::encode::write_named(out, p),)* }
            }

            /// Read the payload of a message type.
            pub fn read(code: u16, payload: &[u8]) -> Result<Message, MessageError> {
                match MessageType::from_code(code) {
                    None => Err(MessageError::UnknownType(code)),
                    $(Some(MessageType::$variant) => wire::read($name, payload).map(Message::$variant),)*
                }
            }
        }

        $(impl From<$variant> for Message {
            fn from(payload: $variant) -> Message { Message::$variant(payload) }
        })*
    };
}

messages! {
    /// Opens a connection.
    Hello = 0x0001, "HELLO";
    /// Accepts it.
    HelloAck = 0x0002, "HELLO_ACK";
    /// Ends it.
    Bye = 0x0003, "BYE";
    /// Confirms the end; nothing follows.
    ByeAck = 0x0004, "BYE_ACK";
    /// Asks whether user space lives.
    HeartbeatReq = 0x0101, "HEARTBEAT_REQ";
    /// It does; with metrics.
    HeartbeatRsp = 0x0102, "HEARTBEAT_RSP";
    /// A report nobody asked for.
    HealthStatus = 0x0103, "HEALTH_STATUS";
    /// To every instance: which kernels there are, and where.
    Topology = 0x0104, "TOPOLOGY";
    /// To surviving kernels: an instance failed and is being recovered.
    RecoverPrepare = 0x0201, "RECOVER_PREPARE";
    /// To surviving kernels: these resources of a failed instance go back to the pool.
    RecoverReclaim = 0x0202, "RECOVER_RECLAIM";
    /// To surviving kernels: the recovery is over.
    RecoverComplete = 0x0203, "RECOVER_COMPLETE";
    /// Asks a surviving kernel to read memory of a dead one.
    VmcoreStart = 0x0204, "VMCORE_START";
    /// A piece of it.
    VmcoreData = 0x0205, "VMCORE_DATA";
    /// All pieces were sent.
    VmcoreComplete = 0x0206, "VMCORE_COMPLETE";
    /// A morph begins.
    MorphPrepare = 0x0301, "MORPH_PREPARE";
    /// What each side can hand over.
    MorphNegotiate = 0x0302, "MORPH_NEGOTIATE";
    /// A piece of state.
    MorphTransferState = 0x0303, "MORPH_TRANSFER_STATE";
    /// Digests of what was received.
    MorphValidate = 0x0304, "MORPH_VALIDATE";
    /// The new kernel takes over.
    MorphCommit = 0x0305, "MORPH_COMMIT";
    /// The old kernel goes on.
    MorphRollback = 0x0306, "MORPH_ROLLBACK";
    /// A request failed.
    Error = 0x0F00, "ERROR";
    /// A request cannot be served now.
    Retry = 0x0F01, "RETRY";
}

impl MessageType {
    /// Types whose frames every version can read, so that versions can be refused in words.
    pub fn is_frozen(self) -> bool {
        matches!(self, MessageType::Hello | MessageType::HelloAck | MessageType::Error)
    }
}

impl std::fmt::Display for MessageType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
