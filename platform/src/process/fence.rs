//! Stopping a stand-in, seeing it stopped, and taking back what it had.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::{Inner, blocking, find, sys, view};
use crate::{FenceReport, InstanceId, PlatformError, ReclaimReport};

/// How long the end of a stand-in is waited for: a process that takes longer hangs in its kernel.
const LIMIT: Duration = Duration::from_secs(2);
/// First wait for processes that end with their first one, and the longest between looks.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(50);
/// After this the others are killed one by one: they should have ended by themselves.
const PATIENCE: Duration = Duration::from_millis(10);

/// Stop every process of an instance.
pub async fn fence(
    inner: &Arc<Inner>,
    id: InstanceId,
    incarnation: u64,
) -> Result<FenceReport, PlatformError> {
    let began = Instant::now();
    let until = began + LIMIT;
    let (cpus, leader) = {
        let mut state = inner.state();
        let live = state.current(id, incarnation)?;
        live.fencing = true;
        (live.cpus.clone(), live.leader.clone())
    };
    let dir = inner.folder.instance(id);
    let mut why = None;
    if let Some(leader) = &leader {
        leader.kill().map_err(|e| PlatformError::os(format!("kill the process of instance {id}"), e))?;
        match timeout_at(until, leader.gone()).await {
            Ok(Ok(())) => drop(leader.reap()),
            Ok(Err(e)) => why = Some(format!("its end cannot be waited for: {e}")),
            Err(_) => why = Some(format!("its process did not end within {LIMIT:?} of SIGKILL")),
        }
    }
    if why.is_none() {
        why = others(&dir, began, until).await?;
    }
    let complete = why.is_none();
    let mut state = inner.state();
    let live = state.current(id, incarnation)?;
    if let Some(why) = why {
        tracing::error!(instance = %id, incarnation, dir = %dir.display(), %why, "not seen stopped");
    } else {
        live.ended.get_or_insert_with(|| "its process ended: it was fenced".into());
    }
    Ok(FenceReport {
        cpus: cpus.into_iter().map(|c| (c, complete)).collect(),
        complete,
        took: began.elapsed(),
    })
}

/// Wait until nobody holds the lock. The reason when somebody still does.
async fn others(
    dir: &std::path::Path,
    began: Instant,
    until: Instant,
) -> Result<Option<String>, PlatformError> {
    let mut pause = FIRST_PAUSE;
    loop {
        let look = PathBuf::from(dir);
        let kill = began.elapsed() >= PATIENCE;
        let gone = blocking(move || {
            let what = |e| PlatformError::os(format!("look at the lock in {}", look.display()), e);
            if find::all_gone(&look).map_err(what)? {
                return Ok(true);
            }
            for (pid, fd) in if kill { find::all(&look) } else { vec![] } {
                tracing::warn!(pid, "a process of a stand-in outlived it and is killed");
                sys::pidfd_kill(&fd).map_err(|e| PlatformError::os(format!("kill process {pid}"), e))?;
            }
            Ok(false)
        })
        .await?;
        if gone {
            return Ok(None);
        }
        if Instant::now() >= until {
            return Ok(Some(format!(
                "after {LIMIT:?} a process still holds {}/lock; `fuser -v` on it says which",
                dir.display()
            )));
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Take back what a stopped instance had. Blocks.
pub fn reclaim(
    inner: &Inner,
    id: InstanceId,
    incarnation: u64,
    release_cpus: bool,
) -> Result<ReclaimReport, PlatformError> {
    let began = Instant::now();
    inner.state().current(id, incarnation)?;
    let dir = inner.folder.instance(id);
    let gone = find::all_gone(&dir)
        .map_err(|e| PlatformError::os(format!("look at the lock in {}", dir.display()), e))?;
    if !gone {
        return Err(PlatformError::NotFenced(id));
    }
    match view::console(inner, id, 0) {
        Ok(log) => drop(inner.state().last_log.insert(id, log)),
        Err(error) => tracing::warn!(instance = %id, %error, "the log of the last life could not be kept"),
    }
    inner.folder.clear(id)?;
    let mut state = inner.state();
    state.current(id, incarnation)?;
    let live = state.live.remove(&id).ok_or(PlatformError::Unknown(id))?;
    for cpu in &live.cpus {
        match release_cpus {
            true => state.pooled.remove(cpu),
            false => state.pooled.insert(*cpu),
        };
    }
    Ok(ReclaimReport { region: live.region, cpus: live.cpus.clone(), took: began.elapsed() })
}
