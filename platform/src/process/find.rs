//! Telling a stand-in's processes from all others: a number alone proves nothing, it may be used again.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kmp::stand_in::names;

use super::sys;

/// Fields of `/proc/<pid>/stat`, counted from 1: the session, and when it started in clock ticks since boot.
const SESSION: usize = 6;
const START_TICKS: usize = 22;

fn parse_stat(stat: &str, field: usize) -> Option<u64> {
    // The name may contain anything, so count from its closing bracket: what follows is field 3.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(field - 3)?.parse().ok()
}

fn stat(pid: u32, field: usize) -> Option<u64> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, field)
}

/// Whether the process was started as the stand-in of this folder.
fn is_stand_in(pid: u32, dir: &Path) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let words: Vec<&[u8]> = cmdline.split(|b| *b == 0).collect();
    words.get(1) == Some(&&b"stand-in"[..])
        && words.windows(2).take(8).any(|w| w[0] == b"--dir" && w[1] == dir.as_os_str().as_bytes())
}

/// Whether the process has the lock file open.
fn holds(pid: u32, lock: (u64, u64)) -> bool {
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.filter_map(Result::ok)
        .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|m| (m.dev(), m.ino()) == lock))
}

fn is_mine(pid: u32) -> bool {
    let owner = std::fs::metadata(format!("/proc/{pid}")).map(|m| m.uid());
    owner.is_ok_and(|uid| uid == nix::unistd::geteuid().as_raw())
}

fn lock_identity(dir: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(dir.join(names::LOCK)).ok().map(|m| (m.dev(), m.ino()))
}

/// A handle on the process, if it is the stand-in of this folder and started when stated.
pub fn verified(pid: u32, ticks: Option<u64>, dir: &Path) -> Option<OwnedFd> {
    if pid <= 1 || pid == std::process::id() {
        return None;
    }
    // First the handle, then the questions: their answers are then about the process it means, or about one
    // that was given the number later, which cannot have an equal start time, command line and lock.
    let fd = sys::pidfd_open(pid).ok()?;
    // A folder that was half removed has no lock any more; then its own user's processes are believed.
    let ours = |pid| match lock_identity(dir) {
        Some(lock) => holds(pid, lock),
        None => is_mine(pid),
    };
    let same = ticks.is_none_or(|t| stat(pid, START_TICKS) == Some(t)) && is_stand_in(pid, dir) && ours(pid);
    same.then_some(fd)
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().to_string_lossy().parse::<u32>().ok())
}

/// Every process of the stand-in of this folder. Looks at all processes, so it is for the rare case.
pub fn all(dir: &Path) -> Vec<(u32, OwnedFd)> {
    pids().filter_map(|pid| Some((pid, verified(pid, None, dir)?))).collect()
}

/// The first process of the stand-in of this folder: it leads their session.
pub fn leader(dir: &Path) -> Option<OwnedFd> {
    all(dir).into_iter().find(|(pid, _)| stat(*pid, SESSION) == Some(u64::from(*pid))).map(|(_, fd)| fd)
}

/// How often processes that are being killed are looked at again, and the wait between.
const LOOKS: u32 = 100;
const PAUSE_MS: u16 = 10;

/// Kill every process of the stand-in of this folder and see them gone. Blocks, for a second at most.
pub fn end(dir: &Path) -> std::io::Result<()> {
    for _ in 0..LOOKS {
        if all_gone(dir)? {
            return Ok(());
        }
        for (_, fd) in all(dir) {
            sys::pidfd_kill(&fd)?;
        }
        let _ = nix::poll::poll(&mut [], PAUSE_MS);
    }
    Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "its lock is still held"))
}

/// Whether no process of the stand-in is left: none holds its lock.
pub fn all_gone(dir: &Path) -> std::io::Result<bool> {
    let file = match File::open(dir.join(names::LOCK)) {
        // It is made before anything is started. Somebody removed it, so only the processes can tell.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(!pids().any(|pid| is_stand_in(pid, dir)));
        }
        file => file?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(std::fs::TryLockError::WouldBlock) => Ok(false),
        Err(std::fs::TryLockError::Error(e)) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_whatever_the_name_is() {
        let line = "12 (a) b) 9) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 998877 20";
        assert_eq!((parse_stat(line, START_TICKS), parse_stat(line, SESSION)), (Some(998_877), Some(3)));
        assert_eq!(parse_stat("12 (x) S 1", START_TICKS), None);
        assert_eq!(parse_stat("", START_TICKS), None);
        assert!(stat(std::process::id(), START_TICKS).unwrap() > 0);
    }

    // One after the other: a lock is held for a moment by what another test starts.
    #[test]
    fn stand_ins_and_nobody_else_are_found() {
        nobody_else_is_taken_for_a_stand_in();
        one_whose_folder_was_half_removed_is_ended();
    }

    fn one_whose_folder_was_half_removed_is_ended() {
        let (dir, scripts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(scripts.path().join("stand-in"), "read forever").unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["stand-in", "--dir", dir.path().to_str().unwrap()])
            .current_dir(scripts.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its command line is there a moment after it was started.
        while all_gone(dir.path()).unwrap() {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        }
        assert_eq!(all(dir.path()).len(), 1);
        end(dir.path()).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(all_gone(dir.path()).unwrap());
    }

    fn nobody_else_is_taken_for_a_stand_in() {
        let d = tempfile::tempdir().unwrap();
        let lock = File::create(d.path().join("lock")).unwrap();
        lock.try_lock().unwrap();
        assert!(!all_gone(d.path()).unwrap());
        // This process holds the lock and is none.
        assert!(holds(std::process::id(), lock_identity(d.path()).unwrap()));
        assert!(!is_stand_in(std::process::id(), d.path()));
        assert!(all(d.path()).is_empty());
        let ticks = stat(std::process::id(), START_TICKS);
        assert!(verified(std::process::id(), ticks, d.path()).is_none());
        drop(lock);
        assert!(all_gone(d.path()).unwrap());
    }
}
