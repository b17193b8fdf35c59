//! One connection of a client: it waits for a kernel, then is joined to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use kmorph_platform::Stream;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use super::door::{Door, Member};
use super::{Lane, Shared};
use crate::core::route::{Route, Target};

/// Longest wait for a kernel that takes the connection.
pub(super) const WAIT_LIMIT: Duration = Duration::from_secs(30);
/// Wait after the first connect that failed; it doubles.
pub(super) const FIRST_WAIT: Duration = Duration::from_millis(5);
/// Longest wait between two tries.
pub(super) const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// For each direction of a connection.
const BUFFER: usize = 16 << 10;

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides closed it.
    Orderly,
    /// Something was or may have been lost.
    Broken,
}

/// Counts what is going on, for as long as it lives.
pub(super) struct Going<'a>(&'a AtomicU64);

impl<'a> Going<'a> {
    pub(super) fn on(count: &'a AtomicU64) -> Going<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Going(count)
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place in a lane. Whoever drains the lane sees it.
pub(super) struct InLane(pub(super) Arc<Lane>);

impl InLane {
    pub(super) fn new(lane: Arc<Lane>) -> InLane {
        lane.open.send_modify(|n| *n += 1);
        InLane(lane)
    }
}

impl Drop for InLane {
    fn drop(&mut self) {
        self.0.open.send_modify(|n| *n -= 1);
    }
}

/// Serve a client until it or the service ends.
pub(super) async fn run<S>(client: &mut S, door: &Door) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let began = Instant::now();
    let placed = door.place(|m| async move { dial(&m.shared, m.publish.port).await }.boxed());
    let Some((member, (mut service, lane))) = timeout_at(began + WAIT_LIMIT, placed).await.unwrap_or(None)
    else {
        door.failed();
        debug!(instance = %door.names(), "no kernel took a client's connection");
        return Ended::Broken;
    };
    let Member { shared, counts, .. } = &*member;
    let waited = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    counts.longest_wait_us.fetch_max(waited, Ordering::Relaxed);
    let _open = Going::on(&counts.open);
    let mut cut = lane.0.cut.subscribe();
    let copied = tokio::select! {
        copied = copy_bidirectional_with_sizes(client, &mut service, BUFFER, BUFFER) => copied.is_ok(),
        // The lane outlives its users: the only way this ends is that it is cut.
        _ = cut.wait_for(|cut| *cut) => false,
        // Published no more, while others still are at this address.
        () = shared.ended() => return Ended::Orderly,
    };
    if copied {
        return Ended::Orderly;
    }
    counts.failed.fetch_add(1, Ordering::Relaxed);
    Ended::Broken
}

/// Connect to the kernel that is the instance. `None` when there will be none.
async fn dial(shared: &Shared, port: u32) -> Option<(Box<dyn Stream>, InLane)> {
    let mut route = shared.route.subscribe();
    let mut wait = FIRST_WAIT;
    loop {
        let now = *route.borrow_and_update();
        match now {
            Route::Closed => return None,
            // The sender lives in `shared`.
            Route::Held => route.changed().await.ok()?,
            Route::Open(target) => match join(shared, &mut route, target, port).await {
                Some(joined) => return Some(joined),
                None => {
                    // It may not listen yet, or it is dying, which will be found out. Tried again, here or elsewhere.
                    tokio::select! {
                        changed = route.changed() => {
                            changed.ok()?;
                            wait = FIRST_WAIT;
                        }
                        () = sleep(wait) => wait = (wait * 2).min(LONGEST_WAIT),
                    }
                }
            },
        }
    }
}

async fn join(
    shared: &Shared,
    route: &mut watch::Receiver<Route>,
    target: Target,
    port: u32,
) -> Option<(Box<dyn Stream>, InLane)> {
    // Before the second look at the route: who changes the route and then drains the lane finds it.
    let lane = InLane::new(shared.lane(target));
    if route.has_changed().unwrap_or(true) {
        return None;
    }
    tokio::select! {
        connected = shared.platform.connect(target.id, target.incarnation, port) => match connected {
            Ok(stream) => Some((stream, lane)),
            Err(error) => {
                debug!(instance = %shared.instance, %error, "not joined yet");
                None
            }
        },
        // A kernel that is being replaced gets nothing new. The value is seen by the next look, because
        // waiting in this way does not mark it as seen.
        () = changed(route.clone()) => None,
    }
}

async fn changed(mut route: watch::Receiver<Route>) {
    // A sender that is gone changes nothing any more, and ends every connection with it.
    let _ = route.changed().await;
}
