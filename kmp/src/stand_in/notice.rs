//! A notice of a stand-in to the daemon: one datagram.

use super::{Fields, TEXT, VERSION, cut, field_text};

const MAGIC: u32 = u32::from_le_bytes(*b"KMEV");
const HEAD: usize = 36;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeKind {
    /// The stand-in pulses.
    Ready,
    /// It panicked.
    Panic,
    /// It stopped itself.
    Parked,
}

/// A notice, all little-endian: magic `KMEV`, version u32, kind u32 (1 ready, 2 panic, 3 parked), instance u16,
/// bytes of text u16, incarnation u64, stamp u64 (nanoseconds since the machine's boot), zero u32, text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What happened.
    pub kind: NoticeKind,
    /// To which instance.
    pub instance: u16,
    /// In which of its lives.
    pub incarnation: u64,
    /// When, nanoseconds since the machine's boot.
    pub stamp_ns: u64,
    /// Reason of a panic, or how it stopped.
    pub text: String,
}

/// A datagram that is no notice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoticeError(String);

impl Notice {
    /// Most bytes of a notice.
    pub const MAX_LEN: usize = HEAD + TEXT;

    /// The datagram.
    pub fn encode(&self) -> Vec<u8> {
        let text = cut(&self.text);
        let mut out = Vec::with_capacity(HEAD + text.len());
        let kind: u32 = match self.kind {
            NoticeKind::Ready => 1,
            NoticeKind::Panic => 2,
            NoticeKind::Parked => 3,
        };
        for v in [MAGIC, VERSION, kind] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        out.extend_from_slice(&self.instance.to_le_bytes());
        out.extend_from_slice(&(text.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.incarnation.to_le_bytes());
        out.extend_from_slice(&self.stamp_ns.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(text);
        out
    }

    /// Read a datagram.
    pub fn decode(bytes: &[u8]) -> Result<Notice, NoticeError> {
        let bad = |what: String| Err(NoticeError(what));
        if bytes.len() < HEAD || bytes.len() > Notice::MAX_LEN {
            return bad(format!("{} bytes; {HEAD} to {} are possible", bytes.len(), Notice::MAX_LEN));
        }
        let mut f = Fields(bytes);
        let (magic, version, kind) = (f.u32(), f.u32(), f.u32());
        if magic != MAGIC || version != VERSION {
            return bad(format!("magic {magic:#010x} and layout {version}; layout {VERSION} is read"));
        }
        let kind = match kind {
            1 => NoticeKind::Ready,
            2 => NoticeKind::Panic,
            3 => NoticeKind::Parked,
            other => return bad(format!("kind {other}; 1 to 3 are known")),
        };
        let (instance, text_len) = (f.u16(), usize::from(f.u16()));
        let (incarnation, stamp_ns) = (f.u64(), f.u64());
        if bytes.len() != HEAD + text_len {
            return bad(format!("it states {text_len} bytes of text and has {}", bytes.len() - HEAD));
        }
        Ok(Notice { kind, instance, incarnation, stamp_ns, text: field_text(&bytes[HEAD..]) })
    }
}
