//! An address on the primary, and the instances that are reached by it: one, or several of a group.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, select_all};
use kmorph_control::{Listen, Publish};
use tokio::sync::{Semaphore, watch};
use tokio::time::sleep;

use super::session::Going;
use super::{Counts, Shared};
use crate::core::route::Route;

/// One that does not take a connection within this time, while others of its group serve, is left to itself.
const ELSEWHERE_AFTER: Duration = Duration::from_millis(250);

/// An instance behind a door.
pub(super) struct Member {
    pub(super) publish: Publish,
    pub(super) shared: Arc<Shared>,
    pub(super) counts: Counts,
}

impl Member {
    fn route(&self) -> Route {
        *self.shared.route.borrow()
    }

    fn serves(&self) -> bool {
        matches!(self.route(), Route::Open(_))
    }

    fn is_away(&self) -> bool {
        self.shared.away.load(Ordering::Relaxed)
    }

    fn takes(&self) -> bool {
        self.serves() && !self.is_away()
    }

    fn load(&self) -> u64 {
        self.counts.open.load(Ordering::Relaxed) + self.counts.waiting.load(Ordering::Relaxed)
    }
}

/// A listener's address, and who is behind it.
pub(super) struct Door {
    pub(super) listen: Listen,
    /// Members of this group may share it.
    pub(super) group: Option<String>,
    pub(super) listening: AtomicBool,
    pub(super) places: Arc<Semaphore>,
    members: watch::Sender<Vec<Arc<Member>>>,
    /// Whose turn it is among those with the same load.
    turn: AtomicUsize,
}

impl Door {
    pub(super) fn new(group: Option<String>, first: Member, listening: bool) -> Arc<Door> {
        Arc::new(Door {
            listen: first.publish.listen.clone(),
            group,
            listening: AtomicBool::new(listening),
            places: first.shared.places.clone(),
            members: watch::Sender::new(vec![Arc::new(first)]),
            turn: AtomicUsize::new(0),
        })
    }

    /// Whether another instance of this group can be behind it, too.
    pub(super) fn admits(&self, group: Option<&str>, instance: &str) -> bool {
        self.group.is_some() && self.group.as_deref() == group && self.member(instance).is_none()
    }

    pub(super) fn join(&self, member: Member) {
        self.members.send_modify(|all| all.push(Arc::new(member)));
    }

    /// False: nobody is left.
    pub(super) fn leave(&self, instance: &str) -> bool {
        self.members.send_modify(|all| all.retain(|m| m.shared.instance != instance));
        !self.members.borrow().is_empty()
    }

    pub(super) fn member(&self, instance: &str) -> Option<Arc<Member>> {
        self.members.borrow().iter().find(|m| m.shared.instance == instance).cloned()
    }

    /// Whether the service speaks the session protocol; it does in all members, or in none.
    pub(super) fn sessions(&self) -> bool {
        self.members.borrow().first().is_some_and(|m| m.publish.sessions)
    }

    /// A connection found nobody.
    pub(super) fn failed(&self) {
        if let Some(member) = self.members.borrow().first() {
            member.counts.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Who is behind it, for messages.
    pub(super) fn names(&self) -> String {
        let members = self.members.borrow();
        members.iter().map(|m| m.shared.instance.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Whether another one than this takes connections.
    pub(super) fn others_take(&self, instance: &str) -> bool {
        self.members.borrow().iter().any(|m| m.shared.instance != instance && m.takes())
    }

    /// The member with the least connections of those that take them; `not` only when there is no other. While nobody
    /// does, whoever is first. `None` when nobody will before an operator acts.
    async fn choose(&self, not: Option<&str>) -> Option<Arc<Member>> {
        let mut members = self.members.subscribe();
        loop {
            let all = members.borrow_and_update().clone();
            // What it is waited for is looked at before it is known whether to wait.
            let mut routes: Vec<_> = all.iter().map(|m| m.shared.route.subscribe()).collect();
            if let [only] = all.as_slice() {
                return Some(only.clone());
            }
            let is = |m: &&Arc<Member>| Some(m.shared.instance.as_str()) == not;
            let takes = || all.iter().filter(|m| m.takes());
            let best = self.least(takes().filter(|m| !is(m)));
            // One that is moved away from is better than none.
            let best = best
                .or_else(|| self.least(takes()))
                .or_else(|| self.least(all.iter().filter(|m| m.serves())));
            if best.is_some() {
                return best;
            }
            if all.iter().all(|m| m.route() == Route::Closed) {
                return None;
            }
            let changes = routes.iter_mut().map(|r| Box::pin(r.changed()));
            tokio::select! {
                // Who is gone is not among the members any more.
                _ = select_all(changes) => {}
                changed = members.changed() => changed.ok()?,
            }
        }
    }

    fn least<'a>(&self, all: impl Iterator<Item = &'a Arc<Member>>) -> Option<Arc<Member>> {
        let all: Vec<&Arc<Member>> = all.collect();
        let least = all.iter().map(|m| m.load()).min()?;
        let same: Vec<&Arc<Member>> = all.into_iter().filter(|m| m.load() == least).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        same.get(turn % same.len()).map(|m| Arc::clone(m))
    }

    /// Returns when a client that waits for this member is better served by another.
    async fn better_elsewhere(&self, member: &Member) {
        let (mut members, mut route) = (self.members.subscribe(), member.shared.route.subscribe());
        let mut patience = pin!(sleep(ELSEWHERE_AFTER));
        let mut impatient = false;
        loop {
            members.mark_unchanged();
            route.mark_unchanged();
            let all = members.borrow().clone();
            let mut routes: Vec<_> = all.iter().map(|m| m.shared.route.subscribe()).collect();
            let left = !all.iter().any(|m| m.shared.instance == member.shared.instance);
            if left || ((impatient || !member.takes()) && self.others_take(&member.shared.instance)) {
                return;
            }
            let changes = routes.iter_mut().map(|r| Box::pin(r.changed()));
            tokio::select! {
                () = &mut patience, if !impatient => impatient = true,
                _ = select_all(changes) => {}
                _ = members.changed() => {}
            }
        }
    }

    /// Have a client's connection taken by a member. `attempt` connects to one, and returns nothing when it never will.
    pub(super) async fn place<T>(
        &self,
        attempt: impl Fn(Arc<Member>) -> BoxFuture<'static, Option<T>>,
    ) -> Option<(Arc<Member>, T)> {
        let mut not: Option<Arc<Member>> = None;
        let mut counted = false;
        loop {
            let member = self.choose(not.as_ref().map(|m| m.shared.instance.as_str())).await?;
            if !std::mem::replace(&mut counted, true) {
                member.counts.accepted.fetch_add(1, Ordering::Relaxed);
            }
            let _waiting = Going::on(&member.counts.waiting);
            tokio::select! {
                biased;
                taken = attempt(member.clone()) => match taken {
                    Some(taken) => return Some((member.clone(), taken)),
                    None if self.others_take(&member.shared.instance) => {}
                    None => return None,
                },
                () = self.better_elsewhere(&member) => {}
            }
            not = Some(member.clone());
        }
    }
}
