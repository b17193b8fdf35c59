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
//!       ├─ groups         groups of instances that fail and start together
//!       ├─ events         panic notices and the like, to the instance they are about
//!       └─ children that kmorphd adds, such as the control server
//! ```

pub mod config;
pub mod core;
mod shell;
pub mod store;
pub mod telemetry;

pub use config::{Definitions, Settings, StartError, TreeConfig};
pub use core::group::GroupSpec;
pub use core::policy::{Key, Patch, Policy, PolicyError, Source};
pub use core::supervisor::Strategy;
pub use shell::log::{EventLog, wanted};
pub use shell::service::Service;
pub use shell::tree::Tree;
pub use store::{InstanceRecord, MemoryStore, Store, StoreError};
