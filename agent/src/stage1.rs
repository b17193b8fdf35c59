//! What the agent does as PID 1, before the user's init takes over.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::wait;
use nix::unistd::{execv, pipe, pipe2, setsid};

use crate::{fork, guardian, kmsg, modules};

/// The agent's own procfs: the user's init finds /proc as it expects it, unmounted.
pub const PROC: &str = "/.kmorph/proc";
const MODULES: &str = "/.kmorph/modules";
const SELF: &str = "/.kmorph/agent";

/// What the kernel command line says to the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Cmdline {
    control: Option<u64>,
    /// Number of this instance.
    pub instance: u16,
    /// Which of its lives this is.
    pub incarnation: u64,
    init: String,
}

fn parse(line: &str) -> Cmdline {
    // What follows "--" is for init.
    let words = line.split_ascii_whitespace().take_while(|w| *w != "--");
    let mut out = Cmdline { control: None, instance: 0, incarnation: 0, init: "/init".into() };
    for word in words {
        if let Some(v) = word.strip_prefix("kmorph.control=") {
            out.control = u64::from_str_radix(v.trim_start_matches("0x"), 16).ok();
        } else if let Some(v) = word.strip_prefix("kmorph.instance=") {
            out.instance = v.parse().unwrap_or(0);
        } else if let Some(v) = word.strip_prefix("kmorph.incarnation=") {
            out.incarnation = v.parse().unwrap_or(0);
        } else if let Some(v) = word.strip_prefix("rdinit=")
            && v != SELF
        {
            out.init = v.into();
        }
    }
    out
}

/// Load the substrate, start the server, become the user's init.
pub fn run() -> ExitCode {
    kmsg::set_up();
    if let Err(e) = std::fs::create_dir_all(PROC).map_err(|e| e.to_string()).and_then(|()| {
        mount(Some("proc"), PROC, Some("proc"), MsFlags::empty(), None::<&str>).map_err(|e| e.to_string())
    }) {
        kmsg::log(kmsg::ERROR, &format!("no procfs at {PROC}: {e}; there will be no metrics"));
    }
    let line = std::fs::read_to_string(Path::new(PROC).join("cmdline")).unwrap_or_default();
    let cmdline = parse(&line);
    match cmdline.control {
        None => kmsg::log(
            kmsg::ERROR,
            "no kmorph.control= on the command line: this kernel was not started by kmorphd",
        ),
        Some(control) => match modules::load_all(Path::new(MODULES), control) {
            Ok(n) => kmsg::log(kmsg::INFO, &format!("{n} modules loaded")),
            Err(e) => kmsg::log(kmsg::ERROR, &e),
        },
    }
    let before_init = split(&cmdline).unwrap_or_else(|e| {
        kmsg::log(kmsg::ERROR, &format!("cannot start the server: {e}"));
        None
    });
    become_init(&cmdline.init, before_init)
}

/// What the first agent has of PID 1.
pub struct First {
    /// It is told here that the server listens.
    ready: OwnedFd,
    /// Ends when it became the user's init.
    begun: OwnedFd,
}

/// Leave a child, with a mount namespace of its own: the guardian, which starts the server. Returns when the
/// server says that it is ready, with what PID 1 is to hold until it becomes the user's init.
fn split(cmdline: &Cmdline) -> nix::Result<Option<OwnedFd>> {
    let (listens, ready) = pipe()?;
    let (begun, before_init) = pipe2(OFlag::O_CLOEXEC)?;
    let (mut theirs, mut ours) = (Some(First { ready, begun }), Some((listens, before_init)));
    fork::child(|| {
        drop(ours.take());
        match theirs.take().map(|first| alone().map(|()| first)) {
            Some(Ok(first)) => guardian::run(first, cmdline),
            Some(Err(e)) => {
                kmsg::log(kmsg::ERROR, &format!("cannot start the server: {e}"));
                1
            }
            None => 1,
        }
    })?;
    drop(theirs);
    let Some((listens, before_init)) = ours else { return Ok(None) };
    // The server listens before the user's init starts: a first connection is never refused.
    let mut byte = [0u8; 1];
    if std::fs::File::from(listens).read(&mut byte).unwrap_or(0) == 0 {
        kmsg::log(kmsg::ERROR, "the server ended before it was ready");
    }
    Ok(Some(before_init))
}

/// A session and a view of the file systems of its own: the user's init may change its own as it likes.
fn alone() -> nix::Result<()> {
    setsid()?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
}

impl First {
    /// Tell PID 1 that the server listens; what is left is how it becomes the user's init.
    pub fn say_ready(self) -> OwnedFd {
        if let Err(e) = std::fs::File::from(self.ready).write_all(b"r") {
            kmsg::log(kmsg::ERROR, &format!("cannot tell PID 1 that the server listens: {e}"));
        }
        self.begun
    }
}

/// Exec the user's init with the arguments the kernel gave us; without one, stay and reap. `before_init` is closed
/// either way.
fn become_init(init: &str, before_init: Option<OwnedFd>) -> ExitCode {
    if let Err(e) = umount2(PROC, MntFlags::MNT_DETACH) {
        kmsg::log(kmsg::ERROR, &format!("cannot unmount {PROC}: {e}"));
    }
    let args: Vec<CString> = std::iter::once(init.to_string())
        .chain(std::env::args().skip(1))
        .filter_map(|a| CString::new(a).ok())
        .collect();
    if Path::new(init).exists() {
        if let Some(path) = args.first()
            && let Err(e) = execv(path, &args)
        {
            kmsg::log(kmsg::ERROR, &format!("cannot run {init}: {e}"));
        }
    } else {
        kmsg::log(kmsg::INFO, &format!("no {init} in the initramfs: the agent stays the only process"));
    }
    drop(before_init);
    loop {
        // PID 1 must never end (the kernel would panic); with no child left it waits for a signal.
        if wait().is_err() {
            nix::unistd::pause();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_control_page_and_the_users_init() {
        let line = "quiet rdinit=/sbin/my-init a kmorph.control=0x40080000 kmorph.instance=3 kmorph.incarnation=12 \
                    rdinit=/.kmorph/agent -- rdinit=/no kmorph.instance=9";
        let want = Cmdline {
            control: Some(0x4008_0000),
            instance: 3,
            incarnation: 12,
            init: "/sbin/my-init".into(),
        };
        assert_eq!(parse(line), want);
        assert_eq!(parse("kmorph.control=zz").control, None);
        assert_eq!(parse("").init, "/init");
    }
}
