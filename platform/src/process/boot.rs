//! Starting a stand-in.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use kmp::stand_in::names;
use nix::unistd::{AccessFlags, access};
use tokio::time::Instant;

use super::claim::Claim;
use super::leader::Leader;
use super::state::{Live, Task};
use super::{Inner, events, find, sys};
use crate::{BootRequest, Booted, InstanceId, MemoryRange, PlatformError, file};

/// Check a request and everything it names; the release of its kernel.
pub fn prepare(inner: &Inner, r: &BootRequest) -> Result<String, PlatformError> {
    if r.incarnation == 0 {
        return Err(PlatformError::Invalid(format!(
            "{} is to start as incarnation 0; 1 is the first",
            r.spec.name
        )));
    }
    if r.spec.name.contains('\0') || r.cmdline.contains('\0') {
        return Err(PlatformError::Invalid("a name or command line contains a NUL character".into()));
    }
    let agent = &inner.config.agent;
    let usable = file::readable("agent", agent).map_err(|e| e.to_string()).and_then(|_| {
        access(agent, AccessFlags::X_OK)
            .map_err(|e| format!("the agent {} cannot be run: {e}", agent.display()))
    });
    if let Err(why) = usable {
        return Err(PlatformError::Unavailable(format!("{why}; give the path of kmorph-agent")));
    }
    let release = inner.releases.of(&r.kernel)?;
    if let Some(initramfs) = &r.initramfs {
        file::readable("initramfs", initramfs)?;
    }
    Ok(release)
}

/// Check a request without changing anything.
pub fn check(inner: &Inner, r: &BootRequest) -> Result<(), PlatformError> {
    prepare(inner, r)?;
    inner.state().place(&r.spec, inner.config.cpus, inner.pool()).map(drop)
}

/// Claim, write the claim down, start. Undone when a step fails. Blocks; needs the runtime's context.
pub fn boot(inner: &Arc<Inner>, r: &BootRequest) -> Result<Booted, PlatformError> {
    let began = Instant::now();
    let release = prepare(inner, r)?;
    let region = {
        let mut state = inner.state();
        let region = state.place(&r.spec, inner.config.cpus, inner.pool())?;
        state.booting.insert(r.spec.id, (region, r.spec.cpus.clone()));
        region
    };
    let result = vacate(inner, r.spec.id).and_then(|()| {
        start(inner, r, region, &release).inspect_err(|_| {
            inner.state().live.remove(&r.spec.id);
            if let Err(error) = inner.folder.clear(r.spec.id) {
                tracing::error!(instance = %r.spec.id, %error, "a start that failed left something behind");
            }
        })
    });
    let mut state = inner.state();
    state.booting.remove(&r.spec.id);
    result?;
    for cpu in &r.spec.cpus {
        state.pooled.remove(cpu);
    }
    Ok(Booted { region, cpus: r.spec.cpus.clone(), release, took: began.elapsed() })
}

/// Remove what a reclaim left that could not remove everything: nothing of it is claimed any more.
fn vacate(inner: &Inner, id: InstanceId) -> Result<(), PlatformError> {
    let dir = inner.folder.instance(id);
    if !dir.exists() {
        return Ok(());
    }
    match find::all_gone(&dir).map_err(|e| PlatformError::os(format!("look at {}", dir.display()), e))? {
        true => inner.folder.clear(id),
        false => Err(PlatformError::Busy(format!(
            "{} is still in use by a stand-in nobody claims; restart kmorphd to have it stopped",
            dir.display()
        ))),
    }
}

fn start(
    inner: &Arc<Inner>,
    r: &BootRequest,
    region: MemoryRange,
    release: &str,
) -> Result<(), PlatformError> {
    let id = r.spec.id;
    let dir = inner.folder.instance(id);
    let make = |e| PlatformError::os(format!("make {}", dir.display()), e);
    DirBuilder::new().mode(0o700).create(&dir).map_err(make)?;
    let lock = File::create_new(dir.join(names::LOCK)).map_err(make)?;
    lock.try_lock().map_err(|e| PlatformError::os(format!("lock {}", dir.display()), e))?;
    Claim::new(r, region, release).write(&dir)?;
    let control = file(&dir, names::CONTROL)?;
    let console = file(&dir, names::CONSOLE)?;
    let live = Live {
        incarnation: r.incarnation,
        region,
        extents: vec![],
        cpus: r.spec.cpus.clone(),
        control: Some(Arc::new(control)),
        leader: None,
        fencing: false,
        ended: None,
        watch: None,
    };
    // Known before it runs: its first notice is not that of a stranger.
    inner.state().live.insert(id, live);
    let pidfd = spawn(inner, r, region, release, &dir, &console, &lock)?;
    // From here on it is the stand-in's alone.
    drop(lock);
    adopt(inner, r.spec.id, r.incarnation, pidfd).inspect_err(|_| {
        // A daemon that ends cannot watch it any more; without its claim nobody would know it.
        if let Err(error) = find::end(&dir) {
            tracing::error!(instance = %id, %error, "a stand-in that cannot be watched could not be ended");
        }
    })
}

/// Take a running stand-in's first process under watch.
pub fn adopt(
    inner: &Arc<Inner>,
    id: InstanceId,
    incarnation: u64,
    pidfd: std::os::fd::OwnedFd,
) -> Result<(), PlatformError> {
    let leader = Leader::new(pidfd).map_err(|e| PlatformError::os(format!("watch instance {id}"), e))?;
    let leader = Arc::new(leader);
    let mut state = inner.state();
    let live = state.current(id, incarnation)?;
    let watch = events::watch(Arc::downgrade(inner), id, incarnation, leader.clone());
    live.watch = Some(Task(tokio::spawn(watch).abort_handle()));
    live.leader = Some(leader);
    Ok(())
}

fn file(dir: &Path, name: &str) -> Result<File, PlatformError> {
    let path = dir.join(name);
    OpenOptions::new()
        .read(true)
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| PlatformError::os(format!("make {}", path.display()), e))
}

fn spawn(
    inner: &Inner,
    r: &BootRequest,
    region: MemoryRange,
    release: &str,
    dir: &Path,
    console: &File,
    lock: &File,
) -> Result<std::os::fd::OwnedFd, PlatformError> {
    let agent = &inner.config.agent;
    let what = |e: std::io::Error| {
        let hint = match e.raw_os_error() {
            Some(nix::libc::EMFILE | nix::libc::ENFILE) => {
                " (each instance needs three: raise LimitNOFILE or ulimit -n)"
            }
            Some(nix::libc::EAGAIN) => " (too many processes: raise TasksMax or ulimit -u)",
            _ => "",
        };
        PlatformError::os(format!("start {} as instance {}{hint}", agent.display(), r.spec.id), e)
    };
    let mut command = Command::new(agent);
    command.arg("stand-in").arg("--dir").arg(dir);
    for (name, value) in [
        ("--id", r.spec.id.to_string()),
        ("--incarnation", r.incarnation.to_string()),
        ("--name", r.spec.name.clone()),
        ("--pulse-period-ms", r.pulse_period.as_millis().max(1).to_string()),
        ("--cpus", r.spec.cpus.len().to_string()),
        ("--memory", region.size.to_string()),
        ("--release", release.to_owned()),
    ] {
        command.arg(name).arg(value);
    }
    command.arg("--").arg(&r.cmdline);
    command.env_clear().current_dir("/").stdin(Stdio::null());
    command.stdout(console.try_clone().map_err(what)?).stderr(console.try_clone().map_err(what)?);
    sys::spawn(&mut command, lock).map(|(_, pidfd)| pidfd).map_err(what)
}
