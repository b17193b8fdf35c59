//! 0x02xx: recovery of a failed instance, and crash capture by the survivors.
//!
//! `incident` numbers a recovery and makes its messages idempotent across connections.

use serde::{Deserialize, Serialize};

use super::{Blob, Reply};

/// A range of physical memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Range {
    /// First byte.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// An instance failed and is being fenced: stop using what it shared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecoverPrepare {
    /// Recovery.
    pub incident: u64,
    /// Instance that failed.
    pub instance: u16,
    /// Its life that ended.
    pub incarnation: u64,
    /// What it was declared dead for.
    pub cause: String,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// These resources of a failed instance go back to the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecoverReclaim {
    /// Recovery.
    pub incident: u64,
    /// Instance that failed.
    pub instance: u16,
    /// Its life that ended.
    pub incarnation: u64,
    /// Physical ids of its CPUs.
    pub cpus: Vec<u32>,
    /// Its memory.
    pub memory: Vec<Range>,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// A recovery is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecoverComplete {
    /// Recovery.
    pub incident: u64,
    /// Instance.
    pub instance: u16,
    /// Its new life; 0 when it was not started again.
    pub incarnation: u64,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// Asks a surviving kernel to read slices of a dead one's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmcoreStart {
    /// Recovery.
    pub incident: u64,
    /// Dead instance.
    pub instance: u16,
    /// Slices to read.
    pub slices: Vec<Range>,
    /// Encodings the daemon reads, best first, such as `zstd`; `none` is always read.
    pub encodings: Vec<String>,
    /// Leave out pages of zeroes.
    pub skip_zero: bool,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// A piece of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmcoreData {
    /// Recovery.
    pub incident: u64,
    /// Physical address of the first byte.
    pub address: u64,
    /// Bytes of memory this piece stands for.
    pub length: u64,
    /// How `data` is encoded; empty for not at all.
    pub encoding: String,
    /// The bytes; empty when all of them are zero.
    pub data: Blob,
}

/// Every piece was sent, or the capture failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmcoreComplete {
    /// Recovery.
    pub incident: u64,
    /// Number of VMCORE_DATA messages.
    pub pieces: u64,
    /// Bytes of memory they stand for.
    pub bytes: u64,
    /// Whether all slices were read, and if not, why.
    pub outcome: Reply,
}
