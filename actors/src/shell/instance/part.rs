//! What an instance's actor does for a morph: it owns the morph's actor, tells it what becomes of the instance, and
//! steps aside while it is decided which kernel the instance is.

use std::time::Duration;

use tokio::sync::oneshot;
use tracing::{error, warn};

use super::{Answer, InstanceActorState, InstanceMsg, MorphArgs, MorphMsg, Timer, morph};
use crate::core::morph as core;
use crate::core::recovery::Phase;
use crate::core::route::{self, Route, Target};
use crate::core::supervisor::Event as SupervisorEvent;
use crate::store::{InstanceRecord, Role};

/// Longest time an instance stands aside: then it asks the store who it is.
const PARTED_LIMIT: Duration = Duration::from_secs(20);
/// Wait before the store is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Name of the morph's actor among the instance's.
const MORPH: &str = "morph";

impl InstanceActorState {
    /// Have a morph's actor, and give it a message.
    pub(super) async fn morph(&mut self, message: Option<MorphMsg>) {
        if self.children.runs(MORPH) != Some(true) {
            let args = MorphArgs { instance: self.args.instance.clone(), env: self.args.env.clone() };
            let step = self.children.add(morph::child(args)).await;
            if step.started.is_empty() {
                // Who asked hears that nobody answers.
                return error!(instance = %self.args.instance.name, "the actor of its morph did not start");
            }
        }
        if let Some(message) = message {
            self.args.instance.morph.send(message);
        }
    }

    /// Forget the morph's actor when it has ended: the next morph has its own.
    pub(super) async fn morph_ended(&mut self) {
        if self.children.runs(MORPH) == Some(false) {
            self.children.step(SupervisorEvent::Delete(MORPH.into())).await;
        }
    }

    /// A morph has to know when one of its kernels is lost.
    pub(super) fn tell_morph(&mut self) {
        let Some(machine) = &self.machine else { return };
        let lives = matches!(machine.phase(), Phase::Booting | Phase::AwaitingService | Phase::Monitoring);
        if std::mem::replace(&mut self.lives, lives) == lives || lives {
            return;
        }
        let state = self.view().state;
        let (role, why, phase) = {
            let r = self.args.instance.record();
            (r.role.clone(), format!("{state}: {}", r.reason), r.morph.as_ref().map(|m| m.saved.phase))
        };
        match role {
            // From the commit record on it is the new one.
            Role::Own if phase == Some(core::Phase::Growing) => {
                self.args.instance.morph.send(MorphMsg::Happened(core::Event::NewGone(why)));
            }
            Role::Own if phase.is_some() => {
                self.args.instance.morph.send(MorphMsg::Happened(core::Event::OldGone(why)));
            }
            Role::Side(of) => {
                if let Some(instance) = self.args.env.directory.get(&of) {
                    instance.morph.send(MorphMsg::Happened(core::Event::NewGone(why)));
                }
            }
            // The owner is told where its standby stands anyway.
            Role::Own | Role::Standby(_) => {}
        }
    }

    /// Have the clients of what is published go where the instance is.
    pub(super) fn switch_route(&mut self) {
        let Some(machine) = &self.machine else { return };
        let i = &self.args.instance;
        let (publish, incarnation) = {
            let r = i.record();
            (r.publish.clone(), r.incarnation)
        };
        let switch = &self.args.env.switch;
        let group = || self.args.env.group_of(&i.name);
        // The other kernel may serve them already: that is for the morph to say.
        if i.is_handed_over() {
            if !switch.has(&i.name) {
                switch.route(&i.name, group, &publish, Route::Held);
            }
            return;
        }
        match machine.phase() {
            Phase::Stopped => switch.close(&i.name),
            // Its workload was told to serve.
            Phase::AwaitingService if self.beside.seated => {
                let target = Target { id: i.id(), incarnation };
                switch.route(&i.name, group, &publish, Route::Open(target));
            }
            phase => {
                let route = route::route(phase, Target { id: i.id(), incarnation });
                switch.route(&i.name, group, &publish, route);
            }
        }
    }

    /// Whoever decides needs so much longer.
    pub(super) fn stand_aside(&mut self, limit: Duration) {
        if self.parted {
            self.arm(Timer::Parted, limit + PARTED_LIMIT);
        }
    }

    /// The old kernel of a morph that was committed has stopped: nobody needs this instance any more.
    pub(super) fn side_stopped(&self) {
        let Role::Side(of) = self.args.instance.record().role.clone() else { return };
        let owner = self.args.env.directory.get(&of);
        // Until it is decided the morph itself removes what it started.
        let undecided = owner.is_some_and(|o| {
            let decided = [core::Phase::Committing, core::Phase::Growing];
            o.record().morph.as_ref().is_some_and(|m| !decided.contains(&m.saved.phase))
        });
        if !undecided {
            tokio::spawn(morph::forget(self.args.env.clone(), self.args.instance.name.clone()));
        }
    }

    pub(super) fn part(&mut self, reply: oneshot::Sender<Result<InstanceRecord, String>>) {
        let phase = self.machine.as_ref().map(|m| m.phase());
        // Nobody waits for what was overtaken.
        self.waiters.retain(|w| !w.reply.is_closed());
        if phase != Some(Phase::Monitoring) || self.asking.is_some() || !self.waiters.is_empty() {
            let state = self.view().state;
            // Who asked may have given up waiting.
            drop(reply.send(Err(format!("{} is {state}", self.args.instance.name))));
            return;
        }
        self.run(vec![], None);
        self.parted = true;
        self.unwatch();
        self.machine = None;
        self.arm(Timer::Parted, PARTED_LIMIT);
        let record = Box::new(self.args.instance.record().clone());
        self.answer(Answer::Parted(reply, record));
    }

    /// Carry it out when it is known what there is.
    pub(super) fn put_off(&mut self, wish: InstanceMsg) {
        if let InstanceMsg::SetPolicy { policy, overrides, .. } = &wish {
            // It has in it what was set before: the next one has this.
            let mut r = self.args.instance.record();
            r.policy = *policy;
            r.overrides.clone_from(overrides);
        }
        self.deferred.push(wish);
    }

    /// What was said last of maintenance, and waits.
    pub(super) fn maintained(&self) -> Option<bool> {
        self.deferred.iter().rev().find_map(|wish| match wish {
            InstanceMsg::Maintenance { on, .. } => Some(*on),
            _ => None,
        })
    }

    /// Go on as what is remembered says: as the same kernel, or as another.
    pub(super) fn unite(&mut self) {
        if !std::mem::take(&mut self.parted) {
            return;
        }
        self.disarm(Timer::Parted);
        self.first_notice = None;
        self.agent_restarts = 0;
        self.booted = None;
        self.look_at_platform();
    }

    /// Nobody said how it was decided: the store knows.
    pub(super) fn recall(&mut self) {
        if self.parted {
            warn!(instance = %self.args.instance.name, "nobody said which kernel it is: asking the journal");
            let (env, link) = (self.args.env.clone(), self.args.instance.link.clone());
            let (name, epoch) = (self.args.instance.name.clone(), self.epoch);
            tokio::spawn(async move {
                let found = morph::recall(&env, &name).await;
                link.send(InstanceMsg::Recalled { epoch, found: Box::new(found) });
            });
        }
    }

    pub(super) fn recalled(&mut self, found: Result<InstanceRecord, String>) {
        if !self.parted {
            return;
        }
        match found {
            Ok(mut record) => {
                // The policies that wait build on it.
                record.set_as(&self.args.instance.record());
                self.args.instance.become_record(record);
                self.unite();
            }
            Err(error) => {
                error!(instance = %self.args.instance.name, %error, "the journal does not say which kernel it is: asking again");
                self.arm(Timer::Parted, ASK_AGAIN);
            }
        }
    }
}
