//! The first process of a stand-in.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::unix::AsyncFd;

use super::sys;

/// A handle on it.
pub struct Leader {
    fd: AsyncFd<OwnedFd>,
}

impl Leader {
    /// Needs a tokio runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Leader> {
        Ok(Leader { fd: sys::watch(fd)? })
    }

    /// SIGKILL.
    pub fn kill(&self) -> io::Result<()> {
        sys::pidfd_kill(self.fd.get_ref())
    }

    /// Wait until it is gone.
    pub async fn gone(&self) -> io::Result<()> {
        // A pidfd stays readable once its process ended.
        self.fd.readable().await.map(drop)
    }

    /// How it ended, after [`Leader::gone`]; frees its entry in the process table if it is our child.
    pub fn reap(&self) -> Option<String> {
        let fd = self.fd.get_ref().as_fd();
        match waitid(Id::PIDFd(fd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => Some(format!("exit status {code}")),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(format!("killed by {signal}")),
            // It was started by an earlier daemon, or somebody asked before.
            _ => None,
        }
    }
}
