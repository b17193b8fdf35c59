//! Taking up what an earlier daemon left, whatever it was doing when it ended.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use kmp::stand_in::{Control, names};

use super::claim::Claim;
use super::state::Live;
use super::{Inner, boot, find, folder, sys, view};
use crate::{InstanceId, PlatformError};

/// How often something that is about to change is looked at again, and the wait between.
const LOOKS: u32 = 100;
const PAUSE_MS: u16 = 10;

/// Adopt every instance with a claim, and remove what has none. Blocks; needs the runtime's context.
pub fn adopt(inner: &Arc<Inner>) -> Result<(), PlatformError> {
    for id in inner.folder.instances()? {
        let dir = inner.folder.instance(id);
        let claim = Claim::read(&dir, id).and_then(|claim| match claim {
            Some(claim) => owner_conflict(inner, &claim).map_or(Ok(Some(claim)), Err),
            None => Ok(None),
        });
        match claim {
            Ok(Some(claim)) => one(inner, &dir, claim)?,
            Ok(None) => {
                // The daemon ended before it had claimed, or after it had given up everything.
                sweep(inner, id, &dir)?;
            }
            Err(why) => {
                tracing::error!(instance = %id, %why, "a claim that cannot be believed is given up");
                sweep(inner, id, &dir)?;
            }
        }
    }
    let known = |id: InstanceId| inner.state().live.contains_key(&id);
    inner.folder.sweep_sockets(known)
}

fn owner_conflict(inner: &Inner, claim: &Claim) -> Option<String> {
    let state = inner.state();
    state.live.iter().find_map(|(owner, l)| {
        let cpu = l.cpus.iter().find(|c| claim.cpus.contains(c));
        match cpu {
            Some(cpu) => Some(format!("instance {} claims CPU {cpu}, which instance {owner} has", claim.id)),
            None => std::iter::once(&l.region)
                .chain(&l.extents)
                .any(|r| r.overlaps(&claim.region) || claim.extents.iter().any(|e| e.overlaps(r)))
                .then(|| format!("instance {} claims memory that instance {owner} has", claim.id)),
        }
    })
}

fn one(inner: &Arc<Inner>, dir: &Path, claim: Claim) -> Result<(), PlatformError> {
    let (id, incarnation) = (claim.id, claim.incarnation);
    let control = folder::open_plain(&dir.join(names::CONTROL)).ok();
    let stated = control.as_ref().and_then(|c| view::read_control(c).ok());
    if claim.cpus.iter().any(|c| *c >= inner.config.cpus) || claim.region.end() > inner.pool().end() {
        tracing::warn!(instance = %id, "it was started under a larger configuration and keeps what it has");
    }
    let life = life(dir, stated.as_ref())?;
    let live = Live {
        incarnation,
        region: claim.region,
        extents: claim.extents,
        cpus: claim.cpus,
        control: control.map(Arc::new),
        leader: None,
        fencing: false,
        ended: matches!(life, Life::Ended).then(|| "its process ended while no daemon ran".into()),
        watch: None,
    };
    inner.state().live.insert(id, live);
    match life {
        Life::Runs(pidfd) => boot::adopt(inner, id, incarnation, pidfd),
        Life::Ended => Ok(()),
        Life::Unclear => {
            tracing::error!(
                instance = %id, dir = %dir.display(),
                "its lock is held, and by no process that was started as this stand-in: its end will not be noticed"
            );
            Ok(())
        }
    }
}

enum Life {
    Runs(OwnedFd),
    Ended,
    /// Somebody holds its lock, and it is not the stand-in.
    Unclear,
}

/// Find out whether the stand-in of a folder runs.
fn life(dir: &Path, stated: Option<&Control>) -> Result<Life, PlatformError> {
    for _ in 0..LOOKS {
        if gone(dir)? {
            return Ok(Life::Ended);
        }
        // What it says of itself is only a hint where to look: the rest must fit.
        let leader = stated
            .and_then(|c| find::verified(c.pid, Some(c.start_ticks), dir))
            .or_else(|| find::leader(dir));
        if let Some(pidfd) = leader {
            return Ok(Life::Runs(pidfd));
        }
        // Either the first process is just being started, or it ended and the others follow it.
        pause();
    }
    Ok(Life::Unclear)
}

fn gone(dir: &Path) -> Result<bool, PlatformError> {
    find::all_gone(dir).map_err(|e| PlatformError::os(format!("look at the lock in {}", dir.display()), e))
}

/// Before the platform works nothing else waits for this thread.
fn pause() {
    let _ = nix::poll::poll(&mut [], PAUSE_MS);
}

/// Stop and remove what nobody owns.
fn sweep(inner: &Inner, id: InstanceId, dir: &Path) -> Result<(), PlatformError> {
    for _ in 0..LOOKS {
        if gone(dir)? {
            return inner.folder.clear(id);
        }
        for (pid, fd) in find::all(dir) {
            tracing::warn!(instance = %id, pid, "a stand-in without an owner is killed");
            sys::pidfd_kill(&fd).map_err(|e| PlatformError::os(format!("kill process {pid}"), e))?;
        }
        pause();
    }
    Err(PlatformError::Unavailable(format!(
        "{} has no valid claim, and its lock is held by a process that is no stand-in; `fuser -v {}/lock` says which: \
         end it, then start kmorphd again",
        dir.display(),
        dir.display()
    )))
}
