//! The control file of a stand-in: its pulse, and the last word of its kernel.

use super::{Fields, TEXT, VERSION, cut, field_text};

const MAGIC: u64 = u64::from_le_bytes(*b"KMCTLST1");
/// Bytes before the counters.
const HEAD: usize = 80 + TEXT;
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// Most CPUs a stand-in can have.
pub const MAX_CPUS: usize = 64;

/// State word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It pulses.
    Ready,
    /// It panicked; the text is the reason.
    Panicked,
    /// It stopped itself; the text says how.
    Parked,
}

/// What a control file holds, all little-endian:
///
/// | bytes | field |
/// | --- | --- |
/// | 0–7 | magic, `KMCTLST1` |
/// | 8–11 | version, 1 |
/// | 12–15 | state: 1 ready, 2 panicked, 3 parked |
/// | 16–17 | instance |
/// | 18–19 | CPUs, 1 to 64 |
/// | 20–23 | CRC-32 of everything else (the field itself counts as zero) |
/// | 24–31 | incarnation |
/// | 32–39 | nonce of this start, not 0 |
/// | 40–47 | when it was written, nanoseconds since the machine's boot |
/// | 48–55 | when its process started, clock ticks since boot (`/proc/<pid>/stat` field 22) |
/// | 56–59 | process id |
/// | 60–63 | bytes of text |
/// | 64–79 | zero |
/// | 80–207 | text |
/// | 208– | a beat counter (u64) for each CPU |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// State word.
    pub state: State,
    /// Instance number.
    pub instance: u16,
    /// Its life.
    pub incarnation: u64,
    /// Random number of this start.
    pub nonce: u64,
    /// When this was written, nanoseconds since the machine's boot.
    pub stamp_ns: u64,
    /// When its process started, in clock ticks.
    pub start_ticks: u64,
    /// Process that writes the file.
    pub pid: u32,
    /// Reason of a panic, or how it stopped.
    pub text: String,
    /// Beats of each CPU.
    pub beats: Vec<u64>,
}

/// A control file that cannot be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Nothing was written yet.
    #[error("it is empty: the stand-in has not come as far as writing it")]
    Empty,
    /// It changed while it was read, or is damaged. Worth another look.
    #[error("its checksum is wrong")]
    Torn,
    /// A field makes no sense.
    #[error("{0}")]
    Bad(String),
}

impl Control {
    /// Most bytes a control file has.
    pub const MAX_LEN: usize = HEAD + 8 * MAX_CPUS;

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let text = cut(&self.text);
        let beats = &self.beats[..self.beats.len().min(MAX_CPUS)];
        let mut out = Vec::with_capacity(HEAD + 8 * beats.len());
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&VERSION.to_le_bytes());
        let state: u32 = match self.state {
            State::Ready => 1,
            State::Panicked => 2,
            State::Parked => 3,
        };
        out.extend_from_slice(&state.to_le_bytes());
        out.extend_from_slice(&self.instance.to_le_bytes());
        out.extend_from_slice(&(beats.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for v in [self.incarnation, self.nonce, self.stamp_ns, self.start_ticks] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        out.extend_from_slice(&self.pid.to_le_bytes());
        out.extend_from_slice(&(text.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(text);
        out.resize(HEAD, 0);
        for v in beats {
            out.extend_from_slice(&v.to_le_bytes());
        }
        let crc = CRC.checksum(&out);
        out[20..24].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Read the bytes of a control file.
    pub fn decode(bytes: &[u8]) -> Result<Control, ControlError> {
        let bad = |what: String| Err(ControlError::Bad(what));
        if bytes.is_empty() {
            return Err(ControlError::Empty);
        }
        if bytes.len() < HEAD || bytes.len() > Control::MAX_LEN {
            return bad(format!("it has {} bytes; {HEAD} to {} are possible", bytes.len(), Control::MAX_LEN));
        }
        let mut f = Fields(bytes);
        let (magic, version, state) = (f.u64(), f.u32(), f.u32());
        if magic != MAGIC {
            return bad("it does not begin with the magic KMCTLST1".into());
        }
        if version != VERSION {
            return bad(format!("it has layout {version}; this release reads layout {VERSION}"));
        }
        let (instance, cpus, crc) = (f.u16(), usize::from(f.u16()), f.u32());
        let mut digest = CRC.digest();
        digest.update(&bytes[..20]);
        digest.update(&[0; 4]);
        digest.update(&bytes[24..]);
        if digest.finalize() != crc {
            return Err(ControlError::Torn);
        }
        let state = match state {
            1 => State::Ready,
            2 => State::Panicked,
            3 => State::Parked,
            other => return bad(format!("its state word is {other}; 1 to 3 are known")),
        };
        if cpus == 0 || cpus > MAX_CPUS || bytes.len() != HEAD + 8 * cpus {
            return bad(format!("it states {cpus} CPUs in {} bytes", bytes.len()));
        }
        let (incarnation, nonce, stamp_ns, start_ticks) = (f.u64(), f.u64(), f.u64(), f.u64());
        let (pid, text_len) = (f.u32(), f.u32() as usize);
        if nonce == 0 {
            return bad("its nonce is 0".into());
        }
        if pid == 0 || i32::try_from(pid).is_err() {
            return bad(format!("its process id is {pid}"));
        }
        if text_len > TEXT {
            return bad(format!("its text has {text_len} bytes; {TEXT} fit"));
        }
        let text = field_text(&bytes[80..80 + text_len]);
        let mut f = Fields(&bytes[HEAD..]);
        let beats = (0..cpus).map(|_| f.u64()).collect();
        Ok(Control { state, instance, incarnation, nonce, stamp_ns, start_ticks, pid, text, beats })
    }
}
