//! What a kernel stand-in and the process platform share beside KMP: the control file, notices, and the
//! names of files. Bytes only; a reader believes nothing of what it finds.
//!
//! The whole is described in `docs/process-platform.md`.

mod control;
mod notice;

pub use control::{Control, ControlError, MAX_CPUS, State};
pub use notice::{Notice, NoticeError, NoticeKind};

/// Version of both layouts.
pub const VERSION: u32 = 1;
/// Bytes of text in a control file or a notice.
pub const TEXT: usize = 128;

/// Names of files in the folder of an instance, and of sockets and windows in the folder above.
pub mod names {
    /// Control file.
    pub const CONTROL: &str = "control";
    /// Log: stdout and stderr of the stand-in.
    pub const CONSOLE: &str = "console";
    /// Lock file, held as long as any process of the stand-in lives.
    pub const LOCK: &str = "lock";
    /// Socket on which faults are ordered.
    pub const FAULT: &str = "fault";
    /// Socket workloads connect to with their state.
    pub const WORKLOADS: &str = "workloads";
    /// Socket that tells which instances there are.
    pub const TOPOLOGY: &str = "topology";
    /// Socket of the daemon for notices, in the folder above.
    pub const EVENTS: &str = "events";

    /// Name of the socket that stands for a port of the instance, in the folder above.
    pub fn port(instance: u16, port: u32) -> String {
        format!("{}_{port}", u32::from(instance) + 2)
    }

    /// Name of the file that is a window between two instances, in the folder above.
    pub fn window(key: u64) -> String {
        format!("window-{key:016x}")
    }
}

/// A log line as the console file has it: `<level>,<nanoseconds since start>;<text>`.
pub fn log_line(level: u8, since_start_ns: u64, text: &str) -> String {
    // One line is one record, whatever the text is.
    let text = text.replace(['\n', '\r'], " ");
    format!("{level},{since_start_ns};{text}\n")
}

/// Take a log line apart; `None` when it is something else, such as a panic's own words.
pub fn parse_log_line(line: &str) -> Option<(u8, u64, &str)> {
    let (head, text) = line.split_once(';')?;
    let (level, ns) = head.split_once(',')?;
    let level = level.parse().ok().filter(|l| *l <= 7)?;
    Some((level, ns.parse().ok()?, text))
}

/// Text of a fixed field: up to the stated length, lossy, without control characters.
fn field_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The longest beginning of `text` that fits a field.
fn cut(text: &str) -> &[u8] {
    let mut end = text.len().min(TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}

/// Little-endian fields in order. Reading past the end gives zeros, which callers have ruled out by length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests;
