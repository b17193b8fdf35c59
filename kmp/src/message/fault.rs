//! 0x0Fxx: a request failed, or has to wait.

use serde::{Deserialize, Serialize};

/// What kind of failure an ERROR reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// No common version; the text names both. The connection ends.
    Version,
    /// The HELLO was meant for another instance, life or boot. The connection ends.
    WrongInstance,
    /// The frame was damaged, or a message came in a state that does not allow it. The connection ends.
    Protocol,
    /// The message type or an ability it needs is not known here.
    Unsupported,
    /// The payload could not be read.
    BadPayload,
    /// What the request names does not exist, or its state does not allow it.
    Conflict,
    /// The sender may not do this.
    Denied,
    /// It did not work; the text says why.
    Failed,
    /// A code of a later version.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A request failed. Carries the sequence of the request, or 0 when it is about the connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Error {
    /// Kind.
    pub code: ErrorCode,
    /// For the operator: what, where, what was found and what was expected.
    pub message: String,
}

impl Error {
    /// A new error.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Error {
        Error { code, message: message.into() }
    }
}

/// A request cannot be served now. Carries the sequence of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Retry {
    /// Send the same request again after this many milliseconds at the earliest.
    pub after_ms: u64,
    /// Why.
    pub reason: String,
}
