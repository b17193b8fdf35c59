//! kmorphd's supervision tree.
//!
//! Decisions are pure functions in [`core`]: state and event in, state and actions out. The actors around
//! them (the private `shell`) carry actions out and never decide. kmorphd uses [`Tree`]:
//!
//! ```text
//! root ─┬─ transport      KMP connections to the agents
//!       ├─ instances ─┬─ <name> ─┬─ heartbeat   looks at pulses, asks for heartbeats
//!       │             │          └─ recovery    journals, then fences, reclaims, boots
//!       │             └─ ...
//!       ├─ events         panic notices and the like, to the instance they are about
//!       └─ children that kmorphd adds, such as the control server
//! ```

pub mod config;
pub mod core;
mod shell;
pub mod store;
pub mod telemetry;

pub use config::{Definitions, StartError, TreeConfig};
pub use core::policy::Policy;
pub use shell::service::Service;
pub use shell::tree::Tree;
pub use store::{InstanceRecord, MemoryStore, Store, StoreError};
