//! Device tree source, compiled by dtc.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{KerfError, Tree};

/// dtc needs milliseconds; longer means it is stuck (on a pipe it was told to include, say).
const LIMIT: Duration = Duration::from_secs(10);

/// Compile a source file and read the result.
pub fn compile(file: &Path) -> Result<Tree, KerfError> {
    let io = |why: String| KerfError::Io { what: format!("compile {} with dtc", file.display()), why };
    let child = Command::new("dtc")
        .args(["-q", "-I", "dts", "-O", "dtb", "-o", "-"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| match e.kind() {
            ErrorKind::NotFound => io("dtc is not installed (package device-tree-compiler)".into()),
            _ => io(e.to_string()),
        })?;
    let pid = Pid::from_raw(child.id() as i32);
    let (send, done) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver is gone after the limit: then nobody wants the result.
        let _ = send.send(child.wait_with_output());
    });
    let output = match done.recv_timeout(LIMIT) {
        Ok(output) => output.map_err(|e| io(e.to_string()))?,
        Err(_) => {
            // The waiting thread has not reaped it, so the id is still this child's.
            let killed = kill(pid, Signal::SIGKILL);
            return Err(io(format!("no end within {LIMIT:?} (killed: {killed:?})")));
        }
    };
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let message = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
        return Err(KerfError::Source { file: file.into(), message });
    }
    Tree::from_blob(&file.display().to_string(), &output.stdout)
}
