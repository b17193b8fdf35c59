//! The decisions, as pure state machines.

pub mod carry;
pub mod group;
pub mod health;
pub mod measure;
pub mod morph;
pub mod policy;
pub mod recovery;
pub mod route;
pub mod standby;
pub mod supervisor;
