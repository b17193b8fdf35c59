//! `kmorph-agent fault`: order a fault from outside.

use std::io::{ErrorKind, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kmp::stand_in::names;

use super::fault::Fault;
use crate::usage;

/// How long an answer is waited for.
const LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at whether who was asked is still there.
const LOOK: Duration = Duration::from_millis(50);

/// Order a fault and say what came of it.
pub fn order(args: &[String]) -> ExitCode {
    let [option, dir, id, fault @ ..] = args else {
        return usage("fault needs --dir DIR, the number of an instance and a fault");
    };
    if option != "--dir" || fault.is_empty() {
        return usage("fault needs --dir DIR, the number of an instance and a fault");
    }
    let fault = fault.join(" ");
    if let Err(why) = Fault::parse(&fault) {
        return usage(&why);
    }
    match send(Path::new(dir), id, &fault) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // Nothing can be done when even this cannot be written.
            let _ = writeln!(std::io::stderr(), "kmorph-agent: {why}");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::disallowed_methods)] // a command of its own, which has no runtime
fn send(dir: &Path, id: &str, fault: &str) -> Result<(), String> {
    if id.parse::<u16>().map(|n| n.to_string()).as_deref() != Ok(id) {
        return Err(format!("{id:?} is no number of an instance"));
    }
    let path = dir.join(id).join(names::FAULT);
    let socket = answered().map_err(|e| format!("a socket to be answered on: {e}"))?;
    let dead = || format!("instance {id} is dead: its process is gone");
    if let Err(e) = socket.send_to(fault.as_bytes(), &path) {
        return Err(match e.kind() {
            ErrorKind::NotFound => format!("there is no instance {id} in {}{}", dir.display(), others(dir)),
            ErrorKind::ConnectionRefused => dead(),
            _ => format!("{}: {e}", path.display()),
        });
    }
    let (mut buf, until) = ([0; 512], Instant::now() + LIMIT);
    loop {
        match socket.recv(&mut buf) {
            Ok(n) if &buf[..n] == b"ok" => return Ok(()),
            Ok(n) => return Err(String::from_utf8_lossy(&buf[..n]).into_owned()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) => return Err(format!("no answer of instance {id}: {e}")),
        }
        // A process that was ending took the order, and nobody says that it will not be read.
        if gone(&path) {
            return Err(dead());
        }
        if Instant::now() >= until {
            return Err(format!(
                "instance {id} did not answer within {LIMIT:?}: it panicked, parked or hangs already"
            ));
        }
    }
}

/// Whether nobody holds the socket at this path any more.
fn gone(path: &Path) -> bool {
    let tried = UnixDatagram::unbound().and_then(|s| s.connect(path));
    tried.is_err_and(|e| matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound))
}

/// A socket with a name, so that it can be answered.
fn answered() -> std::io::Result<UnixDatagram> {
    let name = format!("kmorph-fault-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    socket.set_read_timeout(Some(LOOK))?;
    Ok(socket)
}

/// The instances that are there, in words.
fn others(dir: &Path) -> String {
    let mut ids: Vec<u16> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().to_string_lossy().parse().ok())
        .collect();
    ids.sort_unstable();
    match ids.as_slice() {
        [] if dir.is_dir() => ", nor any other".into(),
        [] => ", which does not exist".into(),
        ids => {
            let list: Vec<String> = ids.iter().take(20).map(u16::to_string).collect();
            format!("; there are {}{}", list.join(", "), if ids.len() > 20 { ", …" } else { "" })
        }
    }
}
