//! The actors: they carry out what [`crate::core`] decides.

mod actor;
mod children;
mod connection;
mod directory;
mod effects;
mod events;
mod groups;
mod handover;
mod heartbeat;
mod instance;
mod link;
pub mod log;
mod morph;
mod morphs;
mod one_by_one;
mod policies;
pub mod service;
mod supervisor;
mod switch;
#[cfg(test)]
mod tests;
mod topology;
mod transport;
pub mod tree;
mod view;
