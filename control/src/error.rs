//! Errors a request can end with, and the exit codes they give.

use serde::{Deserialize, Serialize};

/// What kind of failure it was. The kind decides kmorphctl's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The command line or a parameter is wrong.
    Usage,
    /// No such instance, definition or file.
    NotFound,
    /// The instance or a resource is in a state that does not allow it.
    Conflict,
    /// A CPU, memory or name is taken.
    Busy,
    /// A definition, kernel image, initramfs or module is not usable.
    BadInput,
    /// The caller may not do this.
    Denied,
    /// It did not happen in time.
    Timeout,
    /// The kernel did not come up.
    BootFailed,
    /// CPUs could not be seen stopped; nothing was taken back.
    PartialFence,
    /// The two sides speak different versions.
    Version,
    /// No daemon answers.
    NoDaemon,
    /// A morph was rolled back: the old kernel goes on.
    MorphFailed,
    /// Anything else; the text says what.
    Internal,
}

impl ErrorKind {
    /// Exit code of kmorphctl: stable, documented in docs/operations.md.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Internal => 1,
            ErrorKind::Usage => 2,
            ErrorKind::NotFound => 3,
            ErrorKind::Conflict => 4,
            ErrorKind::Busy => 5,
            ErrorKind::BadInput => 6,
            ErrorKind::Denied => 7,
            ErrorKind::Timeout => 8,
            ErrorKind::BootFailed => 9,
            ErrorKind::PartialFence => 10,
            ErrorKind::Version => 11,
            ErrorKind::NoDaemon => 12,
            ErrorKind::MorphFailed => 13,
        }
    }
}

/// A failed request: one message that says what, where and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct OpError {
    /// Kind.
    pub kind: ErrorKind,
    /// Message for the operator.
    pub message: String,
}

impl OpError {
    /// A new error.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        OpError { kind, message: message.into() }
    }
}
