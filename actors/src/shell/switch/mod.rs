//! The traffic switch: services of instances, offered on the primary kernel. Clients connect here ([`front`]), and each
//! connection is joined to one of the kernel that is the instance at that moment ([`session`]). While no kernel is,
//! connections wait. A kernel that is replaced keeps the connections it has until they end, or the limit is reached.

mod front;
mod session;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::{Publish, PublishView};
use kmorph_platform::Platform;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::core::route::{Route, Target};
use front::Front;

/// Connections of one instance that are served or wait at the same time. More wait in the backlogs of the listeners.
/// A link to an instance has some 200 channels; this many of them can wait for one.
const CONNECTIONS: usize = 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one insert or removal, so a panic elsewhere left it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connections to one life of a kernel.
#[derive(Debug, Default)]
struct Lane {
    open: watch::Sender<usize>,
    cut: watch::Sender<bool>,
}

/// What one listener has seen.
#[derive(Debug, Default)]
struct Counts {
    open: AtomicU64,
    waiting: AtomicU64,
    accepted: AtomicU64,
    failed: AtomicU64,
    longest_wait_us: AtomicU64,
}

/// What the connections of an instance share.
struct Shared {
    instance: String,
    platform: Arc<dyn Platform>,
    route: watch::Sender<Route>,
    lanes: Mutex<HashMap<Target, Arc<Lane>>>,
    places: Arc<Semaphore>,
}

impl Shared {
    fn lane(&self, target: Target) -> Arc<Lane> {
        lock(&self.lanes).entry(target).or_default().clone()
    }

    fn set(&self, route: Route) {
        self.route.send_if_modified(|r| std::mem::replace(r, route) != route);
        // Lanes of lives that are over and that nobody uses.
        let current = *self.route.borrow();
        lock(&self.lanes).retain(|t, lane| current == Route::Open(*t) || *lane.open.borrow() > 0);
    }
}

struct Entry {
    shared: Arc<Shared>,
    fronts: Vec<Front>,
}

/// How the connections of a kernel that was replaced ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drained {
    /// They ended by themselves.
    pub(crate) ended: usize,
    /// They were reset when the time was over.
    pub(crate) cut: usize,
    /// How long it took.
    pub(crate) took: Duration,
}

/// Every published service.
pub(crate) struct Switch {
    platform: Arc<dyn Platform>,
    entries: Mutex<BTreeMap<String, Entry>>,
    /// Listeners that are being closed: their addresses are free when these have ended.
    closing: Mutex<Vec<JoinHandle<()>>>,
    /// The daemon ends: nothing is published any more.
    ended: AtomicBool,
}

impl Switch {
    pub(crate) fn new(platform: Arc<dyn Platform>) -> Switch {
        Switch {
            platform,
            entries: Mutex::default(),
            closing: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    fn shared(&self, instance: &str) -> Option<Arc<Shared>> {
        lock(&self.entries).get(instance).map(|e| e.shared.clone())
    }

    fn entry(&self, instance: &str, fronts: Vec<Front>, shared: Arc<Shared>) {
        for front in &fronts {
            info!(%instance, publish = %front.publish, "published");
        }
        let before = lock(&self.entries).insert(instance.to_owned(), Entry { shared, fronts });
        self.retire(before);
    }

    fn fresh(&self, instance: &str, route: Route) -> Arc<Shared> {
        Arc::new(Shared {
            instance: instance.to_owned(),
            platform: self.platform.clone(),
            route: watch::Sender::new(route),
            lanes: Mutex::default(),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
        })
    }

    /// Wait until the addresses of listeners that were closed are free.
    pub(crate) async fn settle(&self) {
        let closing = std::mem::take(&mut *lock(&self.closing));
        for closed in closing {
            // It was aborted: there is nothing else it could end with.
            let _ = closed.await;
        }
    }

    /// Listen for clients of an instance that is about to be started; they wait. What was published of it before is
    /// not any more.
    pub(crate) fn publish(&self, instance: &str, wanted: &[Publish]) -> Result<(), OpError> {
        self.close(instance);
        if wanted.is_empty() {
            return Ok(());
        }
        let shared = self.fresh(instance, Route::Held);
        let mut fronts = vec![];
        for publish in wanted {
            let front = front::listen(publish, &shared).map_err(|e| {
                let text = format!("instance {instance}: cannot publish {publish}: {e}");
                OpError::new(ErrorKind::Busy, text)
            });
            match front {
                Ok(front) => fronts.push(front),
                Err(error) => {
                    self.retire(Some(Entry { shared, fronts }));
                    return Err(error);
                }
            }
        }
        self.entry(instance, fronts, shared);
        Ok(())
    }

    /// From now on new connections take this route. Listeners that a daemon before this one had are opened; those that
    /// cannot be yet are tried again until they can.
    pub(crate) fn route(&self, instance: &str, publish: &[Publish], route: Route) {
        if let Some(shared) = self.shared(instance) {
            return shared.set(route);
        }
        if publish.is_empty() || self.ended.load(Ordering::Relaxed) {
            return;
        }
        let shared = self.fresh(instance, route);
        let fronts = publish.iter().map(|p| front::listen_in_time(p, &shared)).collect();
        self.entry(instance, fronts, shared);
    }

    /// From now on new connections go to this kernel.
    pub(crate) fn redirect(&self, instance: &str, target: Target) {
        if let Some(shared) = self.shared(instance) {
            shared.set(Route::Open(target));
        }
    }

    /// Wait until the connections to this kernel have ended; reset those that have not when the time is over. `None`
    /// when nothing is published.
    pub(crate) async fn drain(&self, instance: &str, target: Target, limit: Duration) -> Option<Drained> {
        let shared = self.shared(instance)?;
        let Some(lane) = lock(&shared.lanes).get(&target).cloned() else { return Some(Drained::default()) };
        let began = Instant::now();
        let mut open = lane.open.subscribe();
        let before = *open.borrow();
        if timeout(limit, open.wait_for(|n| *n == 0)).await.is_ok() {
            return Some(Drained { ended: before, cut: 0, took: began.elapsed() });
        }
        let cut = *lane.open.borrow();
        warn!(%instance, cut, ?limit, "connections to the old kernel did not end in time: they are reset");
        lane.cut.send_replace(true);
        Some(Drained { ended: before.saturating_sub(cut), cut, took: began.elapsed() })
    }

    /// Nothing of it is published any more.
    pub(crate) fn close(&self, instance: &str) {
        let before = lock(&self.entries).remove(instance);
        self.retire(before);
    }

    /// Nothing is published any more, or will be.
    pub(crate) fn close_all(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for entry in std::mem::take(&mut *lock(&self.entries)).into_values() {
            self.retire(Some(entry));
        }
    }

    fn retire(&self, entry: Option<Entry>) {
        let Some(entry) = entry else { return };
        let mut closing = lock(&self.closing);
        closing.retain(|c| !c.is_finished());
        closing.extend(entry.fronts.into_iter().map(Front::close));
    }

    /// What operators see.
    pub(crate) fn view(&self, instance: &str, publish: &[Publish]) -> Vec<PublishView> {
        let entries = lock(&self.entries);
        let fronts = entries.get(instance).map_or(&[][..], |e| &e.fronts);
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let of = |publish: &Publish| {
            let Some(front) = fronts.iter().find(|f| f.publish == *publish) else {
                return PublishView { publish: publish.to_string(), ..PublishView::default() };
            };
            let c = &front.counts;
            PublishView {
                publish: publish.to_string(),
                listening: front.listening.load(Ordering::Relaxed),
                open: get(&c.open),
                waiting: get(&c.waiting),
                accepted: get(&c.accepted),
                failed: get(&c.failed),
                longest_wait_us: get(&c.longest_wait_us),
            }
        };
        publish.iter().map(of).collect()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.close_all();
    }
}
