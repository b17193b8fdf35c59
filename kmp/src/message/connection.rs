//! 0x00xx: opening and closing a connection.

use serde::{Deserialize, Serialize};

/// What a connection is for. Each instance has one of each, so bulk never delays a heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Heartbeats and commands; frames up to 64 KiB.
    #[default]
    Control,
    /// State and dumps; frames up to 1 MiB.
    Bulk,
}

impl Role {
    /// Longest frame in bytes, header included.
    pub fn frame_limit(self) -> usize {
        match self {
            Role::Control => crate::frame::CONTROL_LIMIT,
            Role::Bulk => crate::frame::BULK_LIMIT,
        }
    }
}

/// Says who speaks, or in a client's HELLO, to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// Oldest version the sender speaks.
    pub min_version: u16,
    /// Newest version the sender speaks.
    pub max_version: u16,
    /// Instance the client wants; the server's own number in a server.
    pub instance: u16,
    /// Life of the instance; 0 when the client takes any.
    pub incarnation: u64,
    /// Random number of the instance's boot; 0 when the client does not know it.
    pub boot_nonce: u64,
    /// What the connection is for.
    pub role: Role,
    /// Optional abilities by name, such as `terminate`.
    pub capabilities: Vec<String>,
    /// Kernel or software release of the sender.
    pub release: String,
}

/// Accepts a HELLO: who answers, and the version both will speak.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HelloAck {
    /// Version for the rest of the connection.
    pub version: u16,
    /// The instance's number.
    pub instance: u16,
    /// Its life.
    pub incarnation: u64,
    /// Random number of its boot.
    pub boot_nonce: u64,
    /// Role accepted.
    pub role: Role,
    /// Optional abilities by name.
    pub capabilities: Vec<String>,
    /// Kernel release of the instance.
    pub release: String,
}

/// Why a side ends the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ByeReason {
    /// Only the connection ends.
    #[default]
    Disconnect,
    /// The instance is to stop its workload and sync its file systems; BYE_ACK says that it did.
    Terminate,
    /// A reason of a later version; treated as a disconnect.
    #[serde(other)]
    Unknown,
}

/// Ends the connection. The sender sends nothing more and waits for BYE_ACK.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bye {
    /// Why.
    pub reason: ByeReason,
    /// Milliseconds until the sender stops waiting for BYE_ACK.
    pub grace_ms: u64,
}

/// Confirms a BYE. The last frame of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ByeAck {
    /// What was done, for the operator.
    pub detail: String,
}
