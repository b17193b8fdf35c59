//! The protocol of kmorphd's control socket: length-delimited MessagePack, versioned.
//!
//! A client sends a [`Hello`], gets one back, then sends [`Request`]s; each gets zero or more
//! [`Reply::Item`]s and ends with one [`Reply::Done`] or [`Reply::Error`].

pub mod error;
mod publish;
pub mod views;
mod wire;

pub use error::{ErrorKind, OpError};
pub use publish::{Listen, Publish, PublishError};
pub use views::*;
pub use wire::{
    Client, ClientError, Hello, MAX_FRAME, Next, PROTOCOL_VERSION, Reply, Request, codec, decode, encode,
};
