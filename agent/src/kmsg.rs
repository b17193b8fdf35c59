//! The agent's log is the kernel log: it is the one place an operator can read from outside, alive
//! or dead (`kmorphctl console`).

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// A node of our own: /dev may not be there yet, or be the user's to fill.
const NODE: &str = "/.kmorph/kmsg";

/// Make the node. Without it the agent works silently.
pub fn set_up() {
    if !Path::new(NODE).exists() {
        // Failing leaves no way to report it.
        let _ = mknod(NODE, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(1, 11));
    }
}

/// syslog level of something that went wrong.
pub const ERROR: u8 = 3;
/// syslog level of a plain statement.
pub const INFO: u8 = 6;

/// Write one line.
pub fn log(level: u8, text: &str) {
    if let Ok(mut f) = OpenOptions::new().write(true).open(NODE) {
        // One write is one record; a full log cannot be reported anywhere else.
        let _ = f.write_all(format!("<{level}>kmorph-agent: {text}\n").as_bytes());
    }
}
