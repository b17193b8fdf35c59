//! 0x01xx: which kernels there are, and where.

use serde::{Deserialize, Serialize};

/// One instance of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Neighbour {
    /// Name, which it keeps when its kernel is replaced.
    pub name: String,
    /// Number, which changes with a morph.
    pub id: u16,
    /// vsock context id: where it can be connected to.
    pub cid: u32,
    /// Which of its lives this is.
    pub incarnation: u64,
    /// Whether it serves.
    pub serves: bool,
    /// Kernel release; empty while it does not run.
    pub release: String,
    /// Physical ids of its CPUs.
    pub cpus: Vec<u32>,
    /// Its memory in bytes.
    pub memory_bytes: u64,
}

/// All instances of the machine: sent to each of them when its connection is opened and whenever something changes.
/// Not answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Topology {
    /// Grows with every change; begins anew with every daemon.
    pub generation: u64,
    /// By name.
    pub instances: Vec<Neighbour>,
}
