//! The system calls that have no safe wrapper: pidfds, and starting a stand-in.
#![allow(unsafe_code)] // each use says why it is sound

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A handle on process `pid` that no later process of the same number can take the place of.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: plain integers in; the result is a new descriptor (close-on-exec) or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the kernel just made this descriptor and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watch a pidfd: it becomes readable when its process ends. Needs a tokio runtime.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always names the descriptor it owns, and closes it only when dropped.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    watched.map_err(|e| e.into_parts().1)
}

/// SIGKILL. A process that is gone already is no error.
pub fn pidfd_kill(fd: &impl AsRawFd) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open as long as it is borrowed; without siginfo nothing is read.
    let done = Errno::result(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), libc::SIGKILL, none, 0)
    });
    match done {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Start `command` in a session of its own, where `lock` stays open: the lock is held until the last process
/// that inherited it is gone. Returns a handle on it.
pub fn spawn(command: &mut Command, lock: &File) -> io::Result<(u32, OwnedFd)> {
    let lock = lock.as_raw_fd();
    // SAFETY: between fork and exec only setsid and fcntl run, both async-signal-safe, and nothing is
    // allocated. `lock` is open in the parent until spawn returns, so it is open in the child.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::setsid())?;
            Errno::result(libc::fcntl(lock, libc::F_SETFD, 0))?;
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    // Nobody but us can wait for it, so the number is still its own.
    match pidfd_open(child.id()) {
        Ok(pidfd) => Ok((child.id(), pidfd)),
        Err(e) => {
            child.kill().and_then(|()| child.wait())?;
            Err(e)
        }
    }
}
