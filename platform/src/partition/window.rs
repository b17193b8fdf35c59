//! Windows: handover memory that the old kernel of a morph writes and the new one reads.

use std::time::Duration;

use tokio::time::Instant;

use super::{Inner, check, handover};
use crate::{HandoverRegion, InstanceId, PlatformError, WINDOW, window};

/// How long kernels may take to let go of a window that could not be made. They have just been given it.
const UNDO_LIMIT: Duration = Duration::from_secs(1);
/// What is left at least for an instance when another one has used the time up: an answer takes microseconds.
const LEAST: Duration = Duration::from_millis(1);

fn find(inner: &Inner, key: u64) -> Result<Option<HandoverRegion>, PlatformError> {
    Ok(handover::list(inner)?.into_iter().find(|r| r.key == key))
}

pub(super) fn open(
    inner: &Inner,
    key: u64,
    size: u64,
    from: (InstanceId, u64),
    to: (InstanceId, u64),
) -> Result<(), PlatformError> {
    window::check(key, size, from.0, to.0)?;
    for (id, incarnation) in [from, to] {
        check(&inner.state(), id, incarnation)?;
    }
    handover::create(inner, key, size)?;
    let given = handover::share(inner, key, from.0, from.1)
        .and_then(|()| handover::share(inner, key, to.0, to.1))
        .and_then(|()| handover::assign(inner, key, Some(from.0), UNDO_LIMIT).map(drop));
    let Err(why) = given else { return Ok(()) };
    match close(inner, key, UNDO_LIMIT) {
        Ok(()) => Err(why),
        // It can be taken back when the kernel that does not answer is fenced.
        Err(left) => Err(PlatformError::Busy(format!(
            "{why}; and window {key:#x} is left, because of: {left}; fence the instance that does not answer, then \
             close the window"
        ))),
    }
}

pub(super) fn close(inner: &Inner, key: u64, limit: Duration) -> Result<(), PlatformError> {
    window::check_key(key)?;
    match take_back(inner, key, limit) {
        // Another call, or the fence of an instance, may have been faster with the step that failed.
        Err(error) if find(inner, key)?.is_some() => Err(error),
        _ => Ok(()),
    }
}

/// What can be done about an instance that does not confirm.
fn unanswered(key: u64, id: InstanceId, limit: Duration, error: PlatformError) -> PlatformError {
    match error {
        PlatformError::Timeout { .. } => PlatformError::Timeout {
            what: format!(
                "taking window {key:#x} from instance {id}, which has it still (fence it, then close the window again),"
            ),
            limit,
        },
        error => error,
    }
}

fn take_back(inner: &Inner, key: u64, limit: Duration) -> Result<(), PlatformError> {
    let until = Instant::now() + limit;
    let Some(window) = find(inner, key)? else { return Ok(()) };
    if let Some(writer) = window.writer {
        handover::assign(inner, key, None, limit).map_err(|e| unanswered(key, writer, limit, e))?;
    }
    for id in window.shared {
        // Who is not alive any more has been fenced, and has no share.
        let Some(incarnation) = inner.state().live.get(&id).map(|l| l.incarnation) else { continue };
        let left = until.saturating_duration_since(Instant::now()).max(LEAST);
        let gone = handover::unshare(inner, key, id, incarnation, left);
        let shared = |w: HandoverRegion| w.shared.contains(&id);
        if let Err(error) = gone
            && find(inner, key)?.is_some_and(shared)
        {
            return Err(unanswered(key, id, limit, error));
        }
    }
    handover::destroy(inner, key)
}

pub(super) fn list(inner: &Inner) -> Result<Vec<u64>, PlatformError> {
    Ok(handover::list(inner)?.into_iter().map(|r| r.key).filter(|key| key & WINDOW != 0).collect())
}
