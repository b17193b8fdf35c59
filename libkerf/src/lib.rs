//! Instance definitions as kerf writes them: device trees, in source (DTS) or binary (DTB) form,
//! read into a typed model and validated.
//!
//! The forms are those of the upstream multikernel ABI (its Documentation/multikernel) and of kerf
//! 0.4: all cells are big-endian, CPU ids are physical ids (x86: APIC ids).

mod dir;
mod dts;
mod error;
mod instance;
mod tree;
mod write;

pub use dir::{INSTANCES, Loaded, load_all, load_named};
pub use dts::compile;
pub use error::KerfError;
pub use instance::{Instance, instances_of};
pub use tree::{Node, Tree};
pub use write::{save_named, source};
