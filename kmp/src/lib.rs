//! The Kernel Morphing Protocol (KMP).
//!
//! kmorphd speaks it with the agent inside every kernel instance, on vsock port [`PORT`]. This crate
//! does no I/O: bytes go in, events come out, and time is an argument. From the bottom up:
//!
//! * [`frame`]: the 32-byte header, its checksum, and the [`frame::Decoder`] that finds frames in bytes
//!   that arrive in any pieces;
//! * [`message`]: every message and its MessagePack payload;
//! * [`session`]: one connection from HELLO to BYE, as a pure table;
//! * [`requests`]: outstanding requests, retries and answers kept for repeated requests;
//! * [`backoff`]: exponential backoff with seeded jitter;
//! * [`stand_in`]: what kernel stand-ins (processes instead of kernels) share with their platform.
//!
//! With the feature `tokio`, [`io::Connection`] runs a session on a byte stream. The protocol itself is
//! described for implementers in `docs/protocol.md`.

pub mod backoff;
pub mod frame;
#[cfg(feature = "tokio")]
pub mod io;
pub mod message;
pub mod requests;
pub mod session;
pub mod stand_in;
pub mod version;

/// vsock port the agent listens on.
pub const PORT: u32 = 9000;
/// vsock port on which the agent of a kernel that takes state hears the kernel that has it.
pub const STATE_PORT: u32 = 9001;

/// Protocol version of this crate.
pub const VERSION: u16 = 1;

/// Oldest version this crate still speaks: the one before [`VERSION`], and never 0.
pub const MIN_VERSION: u16 = if VERSION > 1 { VERSION - 1 } else { 1 };
