//! The agent's log is the kernel log: it is the one place an operator can read from outside, alive
//! or dead (`kmorphctl console`). A stand-in's is its console file.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Whence, lseek};

use crate::clock;

/// A node of our own: /dev may not be there yet, or be the user's to fill.
const NODE: &str = "/.kmorph/kmsg";

/// Make the node. Without it the agent works silently.
pub fn set_up() {
    if !Path::new(NODE).exists() {
        // Failing leaves no way to report it.
        let _ = mknod(NODE, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(1, 11));
    }
}

/// syslog level of a kernel's last words.
pub const EMERGENCY: u8 = 0;
/// syslog level of something that went wrong.
pub const ERROR: u8 = 3;
/// syslog level of a plain statement.
pub const INFO: u8 = 6;

/// Bytes of a console file that stay.
const KEPT: i64 = 128 << 10;

/// When a stand-in started; unset in a real kernel.
static STARTED: OnceLock<Duration> = OnceLock::new();

/// Log to stderr from now on, which is a stand-in's console file.
pub fn to_console() {
    STARTED.get_or_init(clock::now);
}

/// Write one line.
pub fn log(level: u8, text: &str) {
    if let Some(started) = STARTED.get() {
        console(level, clock::now().saturating_sub(*started), text);
    } else if let Ok(mut f) = OpenOptions::new().write(true).open(NODE) {
        // One write is one record; a full log cannot be reported anywhere else.
        let _ = f.write_all(format!("<{level}>kmorph-agent: {text}\n").as_bytes());
    }
}

fn console(level: u8, since: Duration, text: &str) {
    let since = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let stderr = std::io::stderr();
    // As above, there is no other place to report to.
    let _ = stderr.lock().write_all(kmp::stand_in::log_line(level, since, text).as_bytes());
    // What is old goes back to the file system; the places of what stays do not change.
    if let Ok(end) = lseek(&stderr, 0, Whence::SeekCur)
        && end > KEPT
    {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // A file system that cannot do it keeps the whole log.
        let _ = fallocate(&stderr, hole, 0, (end - KEPT) & !4095);
    }
}
