//! What a workload uses to survive the replacement of the kernel it runs on.
//!
//! The workload runs in the old kernel and, started by that kernel's successor, once more in the new one. Both
//! connect to the `kmorph-agent` of their kernel on a Unix socket ([`hook`]) and say which *sections* of state they
//! have. During a morph the agent asks the old one for its sections, first whole, then again and again for what
//! changed, and gives them to the new one; at the end the old one is frozen, its last changes are copied, and the new
//! one is activated. At every moment at most one of the two serves.
//!
//! From the bottom up:
//!
//! * [`wire`]: the lines a workload and the agent exchange, for any language (`docs/state.md` describes them);
//! * [`hook`]: the connection to the agent, for a [`hook::Workload`];
//! * [`piece`]: pieces of sections, on their way out and in;
//! * [`handover`]: memory that belongs to no kernel and changes hands instead of being copied;
//! * [`memory`]: state in one piece of memory, tracked by page or handed over;
//! * [`files`]: open files, with their content where the new kernel does not have it;
//! * [`pace`]: how fast state may change while it is copied;
//! * [`session`]: how connections of clients, which live in the primary kernel, go on with the new kernel;
//! * [`service`]: all of it together, for a service that answers requests out of such memory;
//! * [`kv`]: such a service;
//! * [`journal`]: one with open files.
//!
//! The crate uses threads and blocking I/O and asks for no runtime.

mod agent;
pub mod files;
pub mod handover;
mod hash;
pub mod hook;
pub mod journal;
pub mod kv;
pub mod memory;
pub mod pace;
pub mod piece;
pub mod service;
pub mod session;
mod window;
pub mod wire;
