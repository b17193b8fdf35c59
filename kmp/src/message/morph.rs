//! 0x03xx: handing over from an old kernel to a new one.
//!
//! `morph` numbers a morph and makes its messages idempotent across connections.

use serde::{Deserialize, Serialize};

use super::{Blob, Reply};

/// A morph begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphPrepare {
    /// Morph.
    pub morph: u64,
    /// Release of the old kernel.
    pub from_release: String,
    /// Release of the new kernel.
    pub to_release: String,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// A kind of state a side can export or import.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Section {
    /// What it is, such as `kmorph,memory-v1`.
    pub compatible: String,
    /// Name among sections of its kind.
    pub name: String,
    /// Bytes to expect, 0 when unknown.
    pub size: u64,
}

/// What a side can hand over or take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphNegotiate {
    /// Morph.
    pub morph: u64,
    /// Abilities by name.
    pub capabilities: Vec<String>,
    /// Sections offered, or in the answer accepted.
    pub sections: Vec<Section>,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// A piece of a section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphTransferState {
    /// Morph.
    pub morph: u64,
    /// Round: 0 is the full state, later rounds are what changed.
    pub round: u32,
    /// Index of the section in the accepted list.
    pub section: u32,
    /// Where in the section the piece belongs.
    pub offset: u64,
    /// The piece.
    pub data: Blob,
    /// Last piece of the section in this round.
    pub last: bool,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// Digest of a whole section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SectionDigest {
    /// Index of the section in the accepted list.
    pub section: u32,
    /// Algorithm, such as `sha256`.
    pub algorithm: String,
    /// Digest.
    pub digest: Blob,
}

/// What the sender sent, for the receiver to compare with what it has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphValidate {
    /// Morph.
    pub morph: u64,
    /// Digest of every section.
    pub digests: Vec<SectionDigest>,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// The decision is in the journal: the new kernel serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphCommit {
    /// Morph.
    pub morph: u64,
    /// Number of the commit record in the journal.
    pub record: u64,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// The old kernel goes on; the new one throws received state away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphRollback {
    /// Morph.
    pub morph: u64,
    /// Why.
    pub reason: String,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}
