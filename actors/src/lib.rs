//! kmorphd's supervision tree.
//!
//! Decisions are pure functions in [`core`]: state and event in, state and actions out. The actors around
//! them carry actions out and never decide.

pub mod core;
