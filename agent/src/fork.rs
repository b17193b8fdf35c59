//! Making a process of one's own.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
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

/// Have the program that is started end when this process does.
pub fn ends_with_parent(command: &mut Command) {
    let die_with_it = || Ok(set_pdeathsig(Signal::SIGKILL)?);
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(die_with_it) };
}
