//! Making a process of one's own.
#![allow(unsafe_code)]

use nix::unistd::{ForkResult, Pid, fork};

/// Run `body` in a child process, which ends with its result. The caller must have a single thread.
pub fn child(body: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: every caller is a process with a single thread (the agent's first stage, its guardian, a
    // stand-in's kernel; runtimes are only started in children), so no lock is held by a thread that the child
    // does not have, and the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Child => std::process::exit(body()),
        ForkResult::Parent { child } => Ok(child),
    }
}
