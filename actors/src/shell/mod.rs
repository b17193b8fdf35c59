//! The actors: they carry out what [`crate::core`] decides.

mod actor;
mod children;
mod connection;
mod directory;
mod effects;
mod events;
mod groups;
mod heartbeat;
mod instance;
mod link;
pub mod log;
mod morph;
mod morphs;
mod policies;
pub mod service;
mod supervisor;
mod switch;
#[cfg(test)]
mod tests;
mod transport;
pub mod tree;
mod view;
