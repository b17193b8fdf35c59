//! Processes: one that gets a certain id, those that descend from it, and their files.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::{Pid, getpid, setsid};

/// `RAMFS_MAGIC` of linux/magic.h: the root of an initramfs without tmpfs.
const RAMFS: FsType = FsType(0x8584_58f6);
/// Others may take the id in between: so often it is tried again.
const TRIES: usize = 20;
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Start a program as process `pid`, in a session of its own, without input or output.
pub fn start(program: &[String], pid: i32) -> Result<Child, String> {
    let (name, args) = program.split_first().ok_or("no program is given")?;
    let mut why = String::new();
    for _ in 0..TRIES {
        fs::write(LAST_PID, (pid - 1).to_string()).map_err(|e| format!("{LAST_PID}: {e}"))?;
        let mut command = Command::new(name);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let check = move || {
            if getpid().as_raw() != pid {
                // Only a number of the system comes through to the parent.
                return Err(Errno::EADDRINUSE.into());
            }
            setsid().map(drop).map_err(io::Error::from)
        };
        // SAFETY: between fork and exec; two system calls and an error without allocation.
        unsafe { command.pre_exec(check) };
        match command.spawn() {
            Ok(child) => return Ok(child),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => why = format!("process id {pid} is taken"),
            Err(e) => return Err(format!("{name}: {e}")),
        }
    }
    Err(why)
}

/// Whether there is such a process that has not ended.
pub fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state comes behind the name, which is in brackets and may have anything in it.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The process and all that descend from it, itself first.
pub fn tree(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        next += 1;
        let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else { continue };
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let new = children.split_ascii_whitespace().filter_map(|c| c.parse().ok());
            for child in new {
                if !all.contains(&child) {
                    all.push(child);
                }
            }
        }
    }
    all
}

/// Tell the process and all that descend from it.
pub fn signal(pid: i32, signal: Signal) -> Result<(), String> {
    for one in tree(pid) {
        match kill(Pid::from_raw(one), signal) {
            // It has ended.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(format!("{signal} to process {one}: {e}")),
        }
    }
    Ok(())
}

/// Files that these processes have open and that are in memory of this kernel: the next one does not have them.
pub fn files(pid: i32) -> Result<BTreeSet<PathBuf>, String> {
    let mut all = BTreeSet::new();
    for one in tree(pid) {
        let dir = format!("/proc/{one}/fd");
        let entries = fs::read_dir(&dir).map_err(|e| format!("{dir}: {e}"))?;
        for entry in entries.flatten() {
            let Ok(path) = fs::read_link(entry.path()) else { continue };
            // Neither devices, pipes and sockets, nor what has no name.
            let Ok(meta) = fs::metadata(&path) else { continue };
            let kind = meta.file_type();
            if kind.is_file() && !kind.is_char_device() && meta.nlink() > 0 && in_memory(&path)? {
                all.insert(path);
            }
        }
    }
    Ok(all)
}

fn in_memory(path: &Path) -> Result<bool, String> {
    let system = statfs(path).map_err(|e| format!("{}: {e}", path.display()))?.filesystem_type();
    Ok(system == TMPFS_MAGIC || system == RAMFS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_gets_its_id_or_it_is_said_that_another_has_it() {
        let program = ["sleep".to_owned(), "60".to_owned()];
        // Below the smallest `pid_max` that is usual, 32768.
        let free = |pid: &i32| !Path::new(&format!("/proc/{pid}")).exists();
        let mut some = (20_000..30_000).rev().filter(free).take(100);
        if !nix::unistd::geteuid().is_root() {
            let started = start(&program, some.next().unwrap());
            assert!(started.as_ref().is_err_and(|why| why.contains(LAST_PID)), "{started:?}");
            return;
        }
        // A number nobody has as a process can still be that of a group or session.
        let (pid, mut child) = some.find_map(|pid| Some((pid, start(&program, pid).ok()?))).unwrap();
        let again = start(&program, pid).map(|mut other| other.kill());
        let ran = (child.id(), lives(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(ran, (pid as u32, true));
        assert_eq!(again.unwrap_err(), format!("process id {pid} is taken"));
        assert!(!lives(pid));
    }
}
