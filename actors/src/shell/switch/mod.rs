//! The traffic switch: services of instances, offered on the primary kernel. Clients connect here ([`front`]), and each
//! connection is joined to one of the kernel that is the instance at that moment ([`session`]). While no kernel is,
//! connections wait. A kernel that is replaced keeps the connections it has until they end, or the limit is reached;
//! those of a service that speaks the session protocol go on with the new kernel ([`carried`]). Members of a group can be
//! reached by the same address ([`door`]): new connections go to those that serve.

mod carried;
mod door;
mod front;
mod session;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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
use door::{Door, Member};
use front::Front;

/// Connections of one instance that are served or wait at the same time. More wait in the backlogs of the listeners.
/// A link to an instance has some 200 channels; this many of them can wait for one.
const CONNECTIONS: usize = 1024;

/// Longest wait for connections to a kernel that is about to take over.
const PARK_LIMIT: Duration = Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one insert or removal, so a panic elsewhere left it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Connections to one life of a kernel.
#[derive(Debug, Default)]
struct Lane {
    open: watch::Sender<usize>,
    cut: watch::Sender<bool>,
    /// Connections that went on with another kernel.
    moved: AtomicUsize,
}

/// The kernel that is about to take an instance over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Next {
    target: Target,
    go: Go,
}

/// Whether connections that can go on with the next kernel do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Go {
    /// They wait there.
    No,
    /// It is decided: they do as soon as they are welcomed, which a service does only when it serves.
    Welcomed,
    /// Somebody was: there is no way back.
    Passed,
    /// It has taken the instance over.
    Yes,
}

/// What one listener has seen.
#[derive(Debug, Default)]
struct Counts {
    open: AtomicU64,
    waiting: AtomicU64,
    accepted: AtomicU64,
    failed: AtomicU64,
    longest_wait_us: AtomicU64,
    moved: AtomicU64,
}

/// What the connections of an instance share.
struct Shared {
    instance: String,
    platform: Arc<dyn Platform>,
    route: watch::Sender<Route>,
    lanes: Mutex<HashMap<Target, Arc<Lane>>>,
    places: Arc<Semaphore>,
    next: watch::Sender<Option<Next>>,
    /// Connections that can go on with another kernel, and those of them that have one to the next.
    carried: AtomicUsize,
    parked: watch::Sender<usize>,
    /// New connections go to others that are reached by the same address, when there are any.
    away: AtomicBool,
    /// It is published no more.
    ended: watch::Sender<bool>,
}

impl Shared {
    /// Whether new connections go to others. Whoever chooses looks again.
    fn set_away(&self, away: bool) {
        if self.away.swap(away, Ordering::Relaxed) != away {
            self.route.send_modify(|_| {});
        }
    }

    /// Returns when it is published no more.
    async fn ended(&self) {
        // The sender lives here.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Whether who was welcomed by this kernel goes on with it now. That cannot be taken back.
    fn passes(&self, target: Target) -> bool {
        let mut passes = *self.route.borrow() == Route::Open(target);
        self.next.send_if_modified(|next| match next {
            Some(n) if n.target == target && matches!(n.go, Go::Welcomed | Go::Passed) => {
                passes = true;
                std::mem::replace(&mut n.go, Go::Passed) != Go::Passed
            }
            _ => false,
        });
        passes
    }

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
    /// Where it is reached.
    doors: Vec<Arc<Door>>,
}

/// How the connections of a kernel that was replaced ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drained {
    /// They ended by themselves.
    pub(crate) ended: usize,
    /// They go on with another kernel.
    pub(crate) moved: usize,
    /// They were reset when the time was over.
    pub(crate) cut: usize,
    /// How long it took.
    pub(crate) took: Duration,
}

/// Every published service.
pub(crate) struct Switch {
    platform: Arc<dyn Platform>,
    entries: Mutex<BTreeMap<String, Entry>>,
    fronts: Mutex<Vec<Front>>,
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
            fronts: Mutex::default(),
            closing: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    fn shared(&self, instance: &str) -> Option<Arc<Shared>> {
        lock(&self.entries).get(instance).map(|e| e.shared.clone())
    }

    /// Whether it has listeners.
    pub(crate) fn has(&self, instance: &str) -> bool {
        lock(&self.entries).contains_key(instance)
    }

    fn entry(&self, instance: &str, entry: Entry) {
        let before = lock(&self.entries).insert(instance.to_owned(), entry);
        self.retire(instance, before);
    }

    fn fresh(&self, instance: &str, route: Route) -> Arc<Shared> {
        Arc::new(Shared {
            instance: instance.to_owned(),
            platform: self.platform.clone(),
            route: watch::Sender::new(route),
            lanes: Mutex::default(),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            next: watch::Sender::new(None),
            carried: AtomicUsize::new(0),
            parked: watch::Sender::new(0),
            away: AtomicBool::new(false),
            ended: watch::Sender::new(false),
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
    /// not any more. An address that is taken can be shared with members of the same group only.
    pub(crate) fn publish(
        &self,
        instance: &str,
        group: Option<String>,
        wanted: &[Publish],
    ) -> Result<(), OpError> {
        self.close(instance);
        if wanted.is_empty() {
            return Ok(());
        }
        let mut entry = Entry { shared: self.fresh(instance, Route::Held), doors: vec![] };
        for publish in wanted {
            match self.open(&entry.shared, publish, group.clone()) {
                Ok(door) => entry.doors.push(door),
                Err(why) => {
                    self.retire(instance, Some(entry));
                    let text = format!("instance {instance}: cannot publish {publish}: {why}");
                    return Err(OpError::new(ErrorKind::Busy, text));
                }
            }
        }
        for publish in wanted {
            info!(%instance, %publish, "published");
        }
        self.entry(instance, entry);
        Ok(())
    }

    /// Have an instance behind a door: a new one, or one that others of its group have.
    fn open(
        &self,
        shared: &Arc<Shared>,
        publish: &Publish,
        group: Option<String>,
    ) -> Result<Arc<Door>, String> {
        let member =
            || Member { publish: publish.clone(), shared: shared.clone(), counts: Counts::default() };
        let mut fronts = lock(&self.fronts);
        let Some(front) = fronts.iter().find(|f| f.door.listen == publish.listen) else {
            let front = front::listen(group, member()).map_err(|e| e.to_string())?;
            let door = front.door.clone();
            fronts.push(front);
            return Ok(door);
        };
        let door = front.door.clone();
        if !door.admits(group.as_deref(), &shared.instance) {
            return Err(format!(
                "the address is in use: {} is published there; only members of one group can share an address",
                door.names()
            ));
        }
        if door.sessions() != publish.sessions {
            return Err(format!(
                "the address is in use: {} is published there, {} sessions",
                door.names(),
                if door.sessions() { "with" } else { "without" }
            ));
        }
        door.join(member());
        Ok(door)
    }

    /// From now on new connections take this route. Listeners that a daemon before this one had are opened; those that
    /// cannot be yet are tried again until they can.
    pub(crate) fn route(
        &self,
        instance: &str,
        group: impl Fn() -> Option<String>,
        publish: &[Publish],
        route: Route,
    ) {
        if let Some(shared) = self.shared(instance) {
            return shared.set(route);
        }
        if publish.is_empty() || self.ended.load(Ordering::Relaxed) {
            return;
        }
        let shared = self.fresh(instance, route);
        let mut doors = vec![];
        for publish in publish {
            let opened = self.open(&shared, publish, group());
            let door = opened.unwrap_or_else(|_| {
                let member =
                    Member { publish: publish.clone(), shared: shared.clone(), counts: Counts::default() };
                let front = front::listen_in_time(group(), member);
                let door = front.door.clone();
                lock(&self.fronts).push(front);
                door
            });
            doors.push(door);
        }
        self.entry(instance, Entry { shared, doors });
    }

    /// Have new connections go to others that are reached by the same address, or not. Whether there are any.
    pub(crate) fn away(&self, instance: &str, away: bool) -> bool {
        let (shared, doors) = {
            let entries = lock(&self.entries);
            let Some(entry) = entries.get(instance) else { return false };
            (entry.shared.clone(), entry.doors.clone())
        };
        shared.set_away(away);
        doors.iter().any(|d| d.others_take(instance))
    }

    /// Wait until its connections have ended, but for those that can go on with another kernel, or the time is over. How
    /// many are left.
    pub(crate) async fn emptied(&self, instance: &str, limit: Duration) -> usize {
        let Some(shared) = self.shared(instance) else { return 0 };
        let Route::Open(target) = *shared.route.borrow() else { return 0 };
        let mut open = shared.lane(target).open.subscribe();
        let stay = |open: usize| open.saturating_sub(shared.carried.load(Ordering::Relaxed));
        let ended = open.wait_for(|n| stay(*n) == 0);
        // Those that are left are told of by whoever goes on.
        let _ = timeout(limit, ended).await;
        stay(*shared.lane(target).open.borrow())
    }

    /// From now on new connections go to this kernel.
    pub(crate) fn redirect(&self, instance: &str, target: Target) {
        if let Some(shared) = self.shared(instance) {
            shared.set(Route::Open(target));
            shared.set_away(false);
        }
    }

    /// This kernel is about to take the instance over: connections that can go on with it connect to it beforehand.
    pub(crate) async fn park(&self, instance: &str, target: Target) {
        let Some(shared) = self.shared(instance) else { return };
        let mut parked = shared.parked.subscribe();
        shared.next.send_replace(Some(Next { target, go: Go::No }));
        // Those that are not ready in time connect when it has.
        let ready = parked.wait_for(|n| *n >= shared.carried.load(Ordering::Relaxed));
        let _ = timeout(PARK_LIMIT, ready).await;
    }

    /// It is decided that this kernel takes it over: connections that wait there go on with it when they are welcomed.
    pub(crate) fn decide(&self, instance: &str, target: Target) {
        self.turn(instance, target, Go::No, Go::Welcomed);
    }

    /// Take that back. False when somebody goes on with it already.
    pub(crate) fn take_back(&self, instance: &str, target: Target) -> bool {
        self.turn(instance, target, Go::Welcomed, Go::No) != Some(Go::Passed)
    }

    /// Change how it stands with the next kernel, if it is as expected. How it stood.
    fn turn(&self, instance: &str, target: Target, from: Go, to: Go) -> Option<Go> {
        let mut stood = None;
        self.shared(instance)?.next.send_if_modified(|next| {
            let Some(n) = next.as_mut().filter(|n| n.target == target) else { return false };
            stood = Some(n.go);
            let turns = n.go == from;
            if turns {
                n.go = to;
            }
            turns
        });
        stood
    }

    /// Wait until somebody goes on with it: it serves. For ever when nobody does.
    pub(crate) async fn passed(&self, instance: &str, target: Target) {
        if let Some(shared) = self.shared(instance) {
            let mut next = shared.next.subscribe();
            let passed = next.wait_for(|n| *n == Some(Next { target, go: Go::Passed }));
            if passed.await.is_ok() {
                return;
            }
        }
        std::future::pending().await
    }

    /// It has taken it over: all connections that can go on with it do.
    pub(crate) fn release(&self, instance: &str, target: Target) {
        let Some(shared) = self.shared(instance) else { return };
        shared.set(Route::Open(target));
        shared.set_away(false);
        // Nobody who waits for it misses that it goes: it stays until there is another.
        shared.next.send_replace(Some(Next { target, go: Go::Yes }));
    }

    /// It will not take it over.
    pub(crate) fn unpark(&self, instance: &str) {
        if let Some(shared) = self.shared(instance) {
            shared.next.send_replace(None);
            shared.set_away(false);
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
            let moved = lane.moved.load(Ordering::Relaxed);
            let ended = before.saturating_sub(moved);
            return Some(Drained { ended, moved, cut: 0, took: began.elapsed() });
        }
        let cut = *lane.open.borrow();
        warn!(%instance, cut, ?limit, "connections to the old kernel did not end in time: they are reset");
        lane.cut.send_replace(true);
        let moved = lane.moved.load(Ordering::Relaxed);
        Some(Drained { ended: before.saturating_sub(cut + moved), moved, cut, took: began.elapsed() })
    }

    /// Nothing of it is published any more.
    pub(crate) fn close(&self, instance: &str) {
        let before = lock(&self.entries).remove(instance);
        self.retire(instance, before);
    }

    /// Nothing is published any more, or will be.
    pub(crate) fn close_all(&self) {
        self.ended.store(true, Ordering::Relaxed);
        for (instance, entry) in std::mem::take(&mut *lock(&self.entries)) {
            self.retire(&instance, Some(entry));
        }
    }

    fn retire(&self, instance: &str, entry: Option<Entry>) {
        let Some(entry) = entry else { return };
        entry.shared.ended.send_replace(true);
        let mut closing = lock(&self.closing);
        closing.retain(|c| !c.is_finished());
        for door in entry.doors {
            // It may have been replaced by an entry that is behind the same door.
            let still = door.member(instance).is_some_and(|m| Arc::ptr_eq(&m.shared, &entry.shared));
            if !still || door.leave(instance) {
                continue;
            }
            let mut fronts = lock(&self.fronts);
            let empty = fronts.extract_if(.., |f| Arc::ptr_eq(&f.door, &door));
            closing.extend(empty.map(Front::close));
        }
    }

    /// What operators see.
    pub(crate) fn view(&self, instance: &str, publish: &[Publish]) -> Vec<PublishView> {
        let entries = lock(&self.entries);
        let doors = entries.get(instance).map_or(&[][..], |e| &e.doors);
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let of = |publish: &Publish| {
            let door = doors.iter().find(|d| d.listen == publish.listen);
            let Some((door, member)) = door.and_then(|d| Some((d, d.member(instance)?))) else {
                return PublishView { publish: publish.to_string(), ..PublishView::default() };
            };
            let c = &member.counts;
            PublishView {
                publish: publish.to_string(),
                listening: door.listening.load(Ordering::Relaxed),
                open: get(&c.open),
                waiting: get(&c.waiting),
                accepted: get(&c.accepted),
                failed: get(&c.failed),
                longest_wait_us: get(&c.longest_wait_us),
                moved: get(&c.moved),
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
