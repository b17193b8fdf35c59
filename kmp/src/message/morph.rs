//! 0x03xx: handing over from an old kernel to a new one.
//!
//! `morph` numbers a morph and makes its messages idempotent across connections.

use serde::{Deserialize, Serialize};

use super::wire::is_zero;
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
    /// Bytes to expect at most, 0 when unknown.
    pub size: u64,
    /// Version of its layout. A side takes sections of its own version and of earlier ones.
    pub version: u32,
}

/// Among the capabilities: pieces go from kernel to kernel, and not through the daemon.
pub const DIRECT: &str = "direct";

/// What a side can hand over or take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphNegotiate {
    /// Morph.
    pub morph: u64,
    /// Abilities by name.
    pub capabilities: Vec<String>,
    /// In the answer of a side that takes state with [`DIRECT`]: what the other side has to say to be let in.
    #[serde(skip_serializing_if = "is_zero")]
    pub token: u64,
    /// Memory that both kernels have and the one with the state writes, by its key; 0: there is none. In the answer of
    /// the side that takes state: 0 when it cannot be used.
    #[serde(skip_serializing_if = "is_zero")]
    pub window: u64,
    /// Sections offered, or in the answer accepted. A request without any asks for offers.
    pub sections: Vec<Section>,
    /// How long to wait for workloads that are still starting, milliseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub wait_ms: u64,
    /// In the answer: this side knows how the new kernel takes over by itself, see [`MorphTransferState::takes_over`].
    #[serde(skip_serializing_if = "is_zero")]
    pub takes_over: bool,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// A piece of a section; a request for a round of them; the end of a round.
///
/// The side that has the state is asked with an empty one, and answers with pieces and an end, all with the sequence of
/// the request. The side that takes it gets pieces, which it does not answer, and an end, which it does.
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
    /// Nothing more comes in this round.
    pub last: bool,
    /// In a request to who sends: have the workload stand still first. To who takes, in the end of a round: it does so. Both
    /// answers are followed by MORPH_VALIDATE with the digests.
    #[serde(skip_serializing_if = "is_zero")]
    pub freeze: bool,
    /// In a request: have the workload change its state at no more than the rest of its pace, in percent, from now
    /// on; 0 lifts that; absent leaves it as it is. In the end of that round: what is kept by every workload that
    /// has a section. The detail of the reply says why that is less than was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<u8>,
    /// In a request: give the pieces to the kernel of this instance, 0: to whoever asks.
    #[serde(skip_serializing_if = "is_zero")]
    pub peer: u16,
    /// In a request with `peer`: what that one said in its [`MorphNegotiate`].
    #[serde(skip_serializing_if = "is_zero")]
    pub token: u64,
    /// In a request with `peer`: the key of the memory that pieces are put into, 0: none.
    #[serde(skip_serializing_if = "is_zero")]
    pub window: u64,
    /// In the end of a round that went directly: bytes of it that were put into that memory.
    #[serde(skip_serializing_if = "is_zero")]
    pub shared: u64,
    /// In the end of a round: its pieces went from kernel to kernel.
    #[serde(skip_serializing_if = "is_zero")]
    pub direct: bool,
    /// In the end of a round that went directly: bytes of its pieces.
    #[serde(skip_serializing_if = "is_zero")]
    pub bytes: u64,
    /// The others of them, as they were sent: some are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub sent: u64,
    /// In the end of a round that froze the workload: how long that took, nanoseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub froze_ns: u64,
    /// With `freeze`, to who sends: the digests go to the other kernel, too, and only a round that is whole is ended
    /// there. To who takes: take over as soon as everything is in place and has these digests, without another word.
    /// Without `freeze` it is a rehearsal.
    #[serde(skip_serializing_if = "is_zero")]
    pub takes_over: bool,
    /// In the answer of who takes: it has taken over. When the reply is not ok its workloads do not serve yet.
    #[serde(skip_serializing_if = "is_zero")]
    pub took_over: bool,
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

/// What all sections have come to: on both sides the same, or something went wrong. Without digests it asks for them.
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

/// The decision is in the journal: one kernel serves, the other never again. Said again it changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphCommit {
    /// Morph.
    pub morph: u64,
    /// This kernel is the one that serves: its workloads are activated. The other's are retired.
    pub serves: bool,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}

/// The old kernel goes on; the new one throws received state away. Said again it changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MorphRollback {
    /// Morph.
    pub morph: u64,
    /// Why.
    pub reason: String,
    /// This kernel is the one that goes on: its workloads are thawed. The other's forget what they received.
    pub serves: bool,
    /// In the answer of a kernel that is to forget: it has taken over, and forgets nothing. Otherwise it never will.
    #[serde(skip_serializing_if = "is_zero")]
    pub took_over: bool,
    /// Set in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
}
