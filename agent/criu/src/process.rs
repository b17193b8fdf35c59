//! Processes: one that gets a certain id, those that descend from it, and their files.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{CString, c_char};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::{mem, ptr};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// `RAMFS_MAGIC` of linux/magic.h: the root of an initramfs without tmpfs.
const RAMFS: FsType = FsType(0x8584_58f6);
/// The last id that was given: the next process gets the one after it.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Start a program as process `pid`, in a session of its own, without input or output; its children get the ids that follow. The
/// kernel gives it that id or none: asked for as the next one, another process could get it, and keep it.
pub fn start(program: &[String], pid: i32) -> Result<(), String> {
    let name = program.first().ok_or("no program is given")?;
    let text =
        |word: &String| CString::new(word.as_str()).map_err(|_| format!("{word:?} has a NUL character"));
    let words = program.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut argv: Vec<*const c_char> = words.iter().map(|w| w.as_ptr()).collect();
    argv.push(ptr::null());
    let null =
        File::options().read(true).write(true).open("/dev/null").map_err(|e| format!("/dev/null: {e}"))?;
    let (mut failed, fails) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
    fs::write(LAST_PID, pid.to_string()).map_err(|e| format!("{LAST_PID}: {e}"))?;
    let ids = [pid];
    // SAFETY: all zeros are a value of it, and mean nothing.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    args.set_tid = ids.as_ptr() as u64;
    args.set_tid_size = 1;
    // SAFETY: without a stack and flags it is fork(2); `args` and `ids` live longer than the call. The child calls what may
    // be called after a fork with threads (signal-safety(7)), on what was made before, and never returns.
    let cloned = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match cloned {
        0 => {
            // SAFETY: as said; `argv` ends with a null pointer and its strings live.
            let why = unsafe { become_program(&argv, null.as_raw_fd()) };
            let _ = (&fails).write_all(&why.to_ne_bytes());
            // SAFETY: it ends the process and runs nothing of the parent's.
            unsafe { libc::_exit(127) }
        }
        1.. => {}
        _ => {
            return Err(match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::EEXIST) => format!("process id {pid} is taken"),
                e => format!("clone3 as process {pid}: {e}"),
            });
        }
    }
    drop(fails);
    let mut why = [0u8; 4];
    // It ends without a word when the program runs.
    match failed.read_exact(&mut why) {
        Err(_) => Ok(()),
        Ok(()) => {
            reap(pid);
            Err(format!("{name}: {}", io::Error::from_raw_os_error(i32::from_ne_bytes(why))))
        }
    }
}

/// Does not return unless it fails, with the reason.
///
/// # Safety
/// `argv` holds pointers to strings that live, and a null pointer at its end.
unsafe fn become_program(argv: &[*const c_char], null: RawFd) -> i32 {
    let why = || io::Error::last_os_error().raw_os_error().unwrap_or_default();
    // SAFETY: system calls on numbers, a set on the stack, and `argv` as promised.
    unsafe {
        // What Rust has ignored, and threads have blocked, a program does not expect.
        let mut none: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        if libc::setsid() < 0 || (0..3).any(|fd| libc::dup2(null, fd) < 0) {
            return why();
        }
        libc::execvp(argv[0], argv.as_ptr());
    }
    why()
}

/// Wait for the end of a process that was started here.
pub fn reap(pid: i32) {
    // Nobody else waits for it.
    let _ = waitpid(Pid::from_raw(pid), None);
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
        let program = ["sh", "-c", "sleep 60 & wait"].map(str::to_owned);
        // Below the smallest `pid_max` that is usual, 32768.
        let free = |pid: &i32| !Path::new(&format!("/proc/{pid}")).exists();
        let mut some = (20_000..30_000).rev().filter(free).take(100);
        if !nix::unistd::geteuid().is_root() {
            let why = start(&program, some.next().unwrap()).unwrap_err();
            assert!(why.contains(LAST_PID), "{why}");
            return;
        }
        let no_program = ["/nowhere/program".to_owned()];
        let why =
            some.find_map(|pid| start(&no_program, pid).err().filter(|e| !e.contains("taken"))).unwrap();
        assert_eq!(why, "/nowhere/program: No such file or directory (os error 2)");
        // A number nobody has as a process can still be that of a group or session.
        let pid = some.find(|pid| start(&program, *pid).is_ok()).unwrap();
        let again = start(&program, pid);
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let ran = (lives(pid), fs::read_link(format!("/proc/{pid}/fd/1")).unwrap());
        // Its child has one of the next ids; others may get some in between.
        let children = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let child = loop {
            if let Some(child) = children().split_whitespace().next() {
                break child.parse::<i32>().unwrap();
            }
            std::thread::yield_now();
        };
        for one in [pid, child] {
            kill(Pid::from_raw(one), Signal::SIGKILL).unwrap();
        }
        reap(pid);
        assert!((pid + 1..pid + 1000).contains(&child), "{child} is the child of {pid}");
        assert_eq!(ran, (true, "/dev/null".into()));
        // Its group and its session are its own.
        assert!(stat.contains(&format!(" {pid} {pid} 0 ")), "{stat}");
        assert_eq!(again.unwrap_err(), format!("process id {pid} is taken"));
        assert!(!lives(pid));
    }
}
