//! What is seen goes into the state machines, and what they decide is carried out.

use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::EventKind;
use kmorph_platform::{BootRequest, Growth, PlatformEvent, PlatformEventKind};
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};

use super::super::effects::{Done, Effect, EffectsMsg, Order, Run, unix_ms};
use super::super::groups::GroupsMsg;
use super::super::heartbeat::{HeartbeatMsg, Watch};
use super::super::log::Draft;
use super::super::morph::{MorphMsg, standby_name};
use super::super::transport::TransportMsg;
use super::super::{topology, view};
use super::{Answer, Asking, GroupOrder, InstanceActorState, InstanceMsg, Timer, Wish};
use crate::core::health::{self, Cause, Missing, Notice, State as HealthState};
use crate::core::policy::{Patch, Policy};
use crate::core::recovery::{self, Duties, Event, Found, Outcome, Phase, Recovery};
use crate::core::supervisor::Event as SupervisorEvent;
use crate::shell::children::Step;
use crate::store::Role;
use crate::telemetry;

/// Wait before the platform is asked again after it did not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl InstanceActorState {
    pub(super) fn message(&mut self, message: InstanceMsg) {
        match message {
            InstanceMsg::View(reply) => drop(reply.send(self.view())),
            InstanceMsg::HeartbeatView(reply) => {
                let i = &self.args.instance;
                let view = view::heartbeat(&i.name, &i.record().policy, &i.readings.lock());
                drop(reply.send(view));
            }
            InstanceMsg::HealthView(reply) => {
                let i = &self.args.instance;
                let view = view::health(&i.name, &i.readings.lock());
                drop(reply.send(view));
            }
            InstanceMsg::Ran { epoch, op } if epoch == self.epoch => {
                self.unacknowledged.retain(|r| r.op > op);
                self.unacknowledged.shrink_to_fit();
                self.answer_up_to(op);
            }
            InstanceMsg::Done { epoch, done } if epoch == self.epoch => self.done(done),
            InstanceMsg::Ran { .. } | InstanceMsg::Done { .. } => {}
            InstanceMsg::Timer { timer, round } => self.timer(timer, round),
            // A wish has to wait until it is known what there is.
            wish if self.machine.is_none() && wish.can_wait(self.parted || !self.deferred.is_empty()) => {
                self.put_off(wish);
            }
            InstanceMsg::SetPolicy { policy, overrides, reply } => {
                self.set_policy(policy, overrides);
                if let Some(reply) = reply {
                    self.answer(Answer::Policy(reply));
                }
            }
            InstanceMsg::Maintenance { on, reply } => {
                self.maintenance(on);
                self.answer(Answer::Maintenance(reply, self.view()));
            }
            InstanceMsg::Regroup => self.regroup(),
            InstanceMsg::Standby(message) => self.standby_message(message),
            InstanceMsg::StandAside(limit) => self.stand_aside(limit),
            InstanceMsg::Unite => self.unite(),
            InstanceMsg::Recalled { epoch, found } if epoch == self.epoch => self.recalled(*found),
            // Everything else is of a kernel that is not known.
            _ if self.machine.is_none() => {}
            InstanceMsg::Spawn { plan, wait, reply } => self.spawn(*plan, wait, reply),
            InstanceMsg::Terminate { force, reply } => self.terminate(force, reply),
            InstanceMsg::Group(order) => self.group(order),
            InstanceMsg::Recover { reply } if matches!(self.asking, Some(Asking::Terminate)) => {
                let text = format!("instance {}: it is being terminated", self.args.instance.name);
                // Who asked may have given up waiting.
                drop(reply.send(Err(OpError::new(ErrorKind::Conflict, text))));
            }
            InstanceMsg::Recover { reply } => self.operator(Event::OperatorRecover, Wish::Recover, reply),
            InstanceMsg::Asked { epoch, result } => {
                if epoch == self.epoch {
                    self.asked(result);
                }
            }
            InstanceMsg::Seen { incarnation, event } => {
                // An agent that ends its workload answers nothing else meanwhile.
                let busy = self.asking.is_some() && matches!(event, health::Event::HeartbeatMissed(_));
                if incarnation == self.incarnation() && !busy {
                    self.health(event);
                }
            }
            InstanceMsg::AgentRestarted { incarnation, restarts } => {
                if incarnation == self.incarnation() {
                    self.agent_restarts = restarts;
                    warn!(instance = %self.args.instance.name, restarts, "its guardian restarted its agent");
                    let cause = format!("its guardian restarted its agent ({restarts} in this life)");
                    self.announce(Draft::new(EventKind::Notice, cause).effect("its kernel was not touched"));
                }
            }
            InstanceMsg::ChannelUp { incarnation, peer } => {
                if incarnation == self.incarnation() {
                    self.args.instance.record().release.clone_from(&peer.release);
                    self.channel = Some(peer);
                    self.health(health::Event::ChannelUp);
                    // What was asked before there was a connection has no answer.
                    self.args.instance.heartbeat.send(HeartbeatMsg::Probe);
                }
            }
            InstanceMsg::ChannelDown { incarnation, why } => {
                if incarnation == self.incarnation() {
                    self.channel = None;
                    self.health(health::Event::ChannelDown(why));
                }
            }
            InstanceMsg::Platform(event) => self.platform(event),
            InstanceMsg::Look => drop(self.args.instance.heartbeat.send(HeartbeatMsg::Look)),
            InstanceMsg::Persist(reply) => {
                self.run(vec![], None);
                self.answer(Answer::Policy(reply));
            }
            InstanceMsg::Part(reply) => self.part(reply),
            InstanceMsg::Quit | InstanceMsg::Morph(_) | InstanceMsg::Recalled { .. } => {}
            #[cfg(test)]
            InstanceMsg::Panic => panic!("asked to panic"),
        }
    }

    pub(super) fn incarnation(&self) -> u64 {
        self.args.instance.record().incarnation
    }

    fn now(&self) -> Duration {
        self.args.env.now()
    }

    fn set_policy(&mut self, policy: Policy, overrides: Patch) {
        {
            let mut r = self.args.instance.record();
            (r.policy, r.overrides) = (policy, overrides);
        }
        self.run(vec![], None);
        self.use_policy(policy);
    }

    /// From now on this policy is in force. Every wait that is under way begins again.
    pub(super) fn use_policy(&mut self, policy: Policy) {
        if self.watching {
            self.args.instance.heartbeat.send(HeartbeatMsg::Policy(policy));
        }
        if self.args.instance.record().morph.is_some() {
            self.args.instance.morph.send(MorphMsg::Policy);
        }
        self.health(health::Event::PolicyChanged(Box::new(policy)));
        if let Some(machine) = &mut self.machine {
            machine.set_policy(policy);
        }
        self.recovery(Event::PolicyChanged);
    }

    fn maintenance(&mut self, on: bool) {
        if std::mem::replace(&mut self.args.instance.record().maintenance, on) == on {
            return;
        }
        self.run(vec![], None);
        let (cause, effect) = if on {
            ("an operator turned maintenance on", "it is watched and not acted on")
        } else {
            ("an operator turned maintenance off", "failures are acted on again")
        };
        info!(instance = %self.args.instance.name, on, "maintenance");
        self.announce(Draft::new(EventKind::Maintenance, cause).effect(effect));
        self.health(health::Event::Maintenance(on));
        self.recovery(Event::Maintenance(on));
    }

    // Its group.

    fn regroup(&mut self) {
        let grouped = self.args.env.group_of(&self.args.instance.name).is_some();
        self.recovery(Event::Grouped(grouped));
        self.stand(true);
    }

    fn group(&mut self, order: GroupOrder) {
        match order {
            GroupOrder::Stop(why) => {
                let serves = self.machine.as_ref().is_some_and(|m| m.phase() == Phase::Monitoring);
                let maintenance = self.args.instance.record().maintenance;
                if serves && !maintenance && self.channel.is_some() && self.asking.is_none() {
                    self.asking = Some(Asking::Group(why));
                    self.ask();
                } else if self.asking.is_none() {
                    self.recovery(Event::GroupStop(why));
                }
            }
            GroupOrder::Start => self.recovery(Event::GroupStart),
            GroupOrder::GiveUp(why) => self.recovery(Event::GroupGiveUp(why)),
        }
        // The group waits for an answer, also when there was nothing to do.
        if self.asking.is_none() {
            self.stand(true);
        }
    }

    /// Tell the group where the instance stands, when that changed.
    pub(super) fn stand(&mut self, anyhow: bool) {
        let Some(machine) = &self.machine else { return };
        let standing = machine.standing();
        if self.told.replace(standing) == Some(standing) && !anyhow {
            return;
        }
        let member = self.args.instance.name.clone();
        if self.args.env.group_of(&member).is_some() {
            self.args.env.groups.send(GroupsMsg::Standing { member, standing });
        }
    }

    /// Have an event told after everything that was journaled before it.
    pub(super) fn announce(&self, draft: Draft) {
        let i = &self.args.instance;
        let draft = draft.of(&i.name, self.args.env.group_of(&i.name), self.incarnation());
        i.recovery.send(EffectsMsg::Announce(Box::new(draft)));
    }

    fn platform(&mut self, event: PlatformEvent) {
        if event.incarnation != self.incarnation() {
            return;
        }
        let cause = match &event.kind {
            PlatformEventKind::Panic(reason) => Some(Cause::Panic(reason.clone())),
            PlatformEventKind::Parked(how) => Some(Cause::Parked(how.clone())),
            _ => None,
        };
        if let Some(cause) = cause {
            // It happened when the instance stamped it.
            let noticed = Instant::now().checked_sub(event.age).unwrap_or_else(Instant::now);
            self.first_notice.get_or_insert(noticed);
            // A kernel that dies before its start was reported is not watched yet.
            if self.machine.as_ref().is_some_and(|m| m.phase() == Phase::Booting) {
                self.recovery(Event::Declared(cause, "while it was being started".into()));
                return;
            }
        }
        match event.kind {
            PlatformEventKind::Ready => self.health(health::Event::KernelReady),
            PlatformEventKind::Panic(reason) => self.health(health::Event::PanicNotice(reason)),
            PlatformEventKind::Parked(how) => self.health(health::Event::Parked(how)),
            PlatformEventKind::Left => self.health(health::Event::KernelLeft),
            PlatformEventKind::LinkUp | PlatformEventKind::LinkDown | PlatformEventKind::Lost(_) => {}
        }
    }

    // Health.

    fn health(&mut self, event: health::Event) {
        let actions = self.health.step(self.now(), event);
        self.judge(actions);
    }

    fn judge(&mut self, actions: Vec<health::Action>) {
        let heartbeat = self.args.instance.heartbeat.clone();
        for action in actions {
            match action {
                health::Action::ProbeNow => drop(heartbeat.send(HeartbeatMsg::Probe)),
                health::Action::Remeasure => drop(heartbeat.send(HeartbeatMsg::Remeasure)),
                health::Action::Arm(timer, after) => self.arm(Timer::Health(timer), after),
                health::Action::Disarm(timer) => self.disarm(Timer::Health(timer)),
                health::Action::Declare { cause, evidence } => {
                    warn!(instance = %self.args.instance.name, %cause, %evidence, "declared dead");
                    self.first_notice.get_or_insert_with(Instant::now);
                    match self.asking.take() {
                        // It is to be stopped anyhow.
                        Some(Asking::Terminate) => self.recovery(Event::OperatorTerminate),
                        Some(Asking::Group(why)) => self.recovery(Event::GroupStop(why)),
                        None => self.recovery(Event::Declared(cause, evidence)),
                    }
                }
                health::Action::Notify(notice) => self.notice(notice),
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        let name = &self.args.instance.name;
        match notice {
            Notice::Healthy => {
                info!(instance = %name, "serves");
                self.first_notice = None;
                self.args.instance.record().reason = "kernel and user space live".into();
                self.recovery(Event::Serving);
            }
            Notice::Suspect(missing) => {
                info!(instance = %name, ?missing, "suspected: probing");
                self.first_notice.get_or_insert_with(Instant::now);
                let coming_up = self.machine.as_ref().is_some_and(|m| m.phase() == Phase::AwaitingService);
                if coming_up && missing == Missing::Pulse {
                    self.no_pulse();
                }
            }
            Notice::AgentSilent => {
                warn!(instance = %name, "its user space does not answer while its kernel lives");
                self.first_notice = None;
            }
            Notice::CpuStuck(cpu, since) => {
                warn!(instance = %name, cpu, ?since, "one of its CPUs is stuck");
                let cause = format!("its CPU {cpu} has not beaten for {since:?} while others have");
                self.announce(Draft::new(EventKind::Notice, cause).effect("the operator is told"));
            }
            Notice::NoSubstrate => {
                warn!(instance = %name, "its substrate was unloaded: it has no pulse any more");
                let draft =
                    Draft::new(EventKind::Notice, "its substrate was unloaded: it has no pulse any more");
                self.announce(draft.effect("it is watched by heartbeats alone"));
            }
            Notice::Withheld(cause) => {
                warn!(instance = %name, %cause, "would be declared dead: it is in maintenance");
                let draft = Draft::new(EventKind::Notice, format!("it would be declared dead: {cause}"));
                self.announce(draft.effect("nothing: it is in maintenance"));
            }
        }
    }

    /// Its grace is over, its agent answers and its pulse never moved: it is not killed for that, but it is not
    /// what was waited for either.
    fn no_pulse(&mut self) {
        let name = &self.args.instance.name;
        warn!(instance = %name, "its agent answers, its kernel has no pulse");
        let text = format!(
            "instance {name}: its agent answers, but its kernel has no pulse (is kmorph.ko loaded in it?); it is left running"
        );
        let error = OpError::new(ErrorKind::Timeout, text);
        for waiter in self.waiters.extract_if(.., |w| w.wish != Wish::Stop) {
            // Who asked may have given up waiting.
            let _ = waiter.reply.send(Err(error.clone()));
        }
    }

    // Recovery.

    pub(super) fn recovery(&mut self, event: Event) {
        let now = self.now();
        if let Some(machine) = &mut self.machine {
            let actions = machine.step(now, event);
            self.carry_out(actions);
        }
    }

    pub(super) fn carry_out(&mut self, actions: Vec<recovery::Action>) {
        use recovery::Action as A;
        let (mut orders, mut effect, mut settled) = (Vec::new(), None, Vec::new());
        let mut lost = false;
        for action in actions {
            match action {
                A::OpenIncident => {
                    let noticed = *self.first_notice.get_or_insert_with(Instant::now);
                    orders.push(Order::Open { noticed });
                }
                A::Journal { phase, detail, recovered } => {
                    let mut record = self.args.instance.record();
                    record.reason.clone_from(&detail);
                    record.recoveries += u64::from(recovered == Some(true));
                    drop(record);
                    let (at, at_unix_ms) = (Instant::now(), unix_ms());
                    orders.push(Order::Journal { phase, detail, recovered, at, at_unix_ms });
                }
                A::Fence => effect = Some(Effect::Fence { incarnation: self.incarnation() }),
                A::Capture => effect = Some(Effect::Capture),
                A::Reclaim { release_cpus } => {
                    effect = Some(self.reclaim(release_cpus));
                }
                A::Boot => effect = Some(self.boot()),
                A::TakeOver if self.claim_for_recovery() => effect = Some(Effect::TakeOver),
                A::TakeOver => lost = true,
                A::Watch { adopted } => self.watch(adopted),
                A::Unwatch => self.unwatch(),
                A::ArmRestart(after) => self.arm(Timer::Restart, after),
                A::DisarmRestart => self.disarm(Timer::Restart),
                // Where it stands is told after every step.
                A::Held => {}
                A::Settled(outcome) => settled.push(outcome),
                A::Alert(text) => error!(instance = %self.args.instance.name, "operator needed: {text}"),
                A::Refuse(_) => {}
            }
        }
        if !orders.is_empty() || effect.is_some() {
            self.run(orders, effect);
        }
        if lost {
            self.recovery(Event::NotTakenOver("it is not ready any more".into()));
        }
        for outcome in settled {
            self.settled(&outcome);
            if outcome == Outcome::Stopped {
                self.side_stopped();
            }
        }
    }

    fn boot(&mut self) -> Effect {
        self.channel = None;
        self.beside.seated = false;
        self.console.clear();
        let beside = self.args.env.directory.get(&standby_name(&self.args.instance.name));
        let beside = beside.map_or(0, |s| s.record().incarnation);
        let mut r = self.args.instance.record();
        // Starts are counted over both.
        r.incarnation = r.incarnation.max(beside) + 1;
        r.region = None;
        r.release.clear();
        // One side of a morph gets it when it is the instance; a new start has everything at once.
        let growth = match r.role {
            Role::Side(_) => r.growth.clone(),
            Role::Own | Role::Standby(_) => Growth::default(),
        };
        let awaited = std::mem::replace(&mut r.growth, growth.clone());
        Effect::Boot {
            request: Box::new(BootRequest {
                spec: r.spec.clone(),
                incarnation: r.incarnation,
                kernel: r.kernel.clone(),
                initramfs: r.initramfs.clone(),
                cmdline: r.cmdline.clone(),
                pulse_period: r.policy.pulse_period,
                growth,
            }),
            patient: r.role == Role::Own && !awaited.is_empty(),
        }
    }

    /// What an instance that is stopped leaves to others: its CPUs go back to the primary, except those which the new
    /// kernel of a morph that was committed is about to get.
    fn reclaim(&self, release_cpus: bool) -> Effect {
        let (role, incarnation, cpus, growth) = {
            let r = self.args.instance.record();
            (r.role.clone(), r.incarnation, r.spec.cpus.clone(), r.growth.cpus.clone())
        };
        let Role::Side(of) = role else {
            // What it was about to get nobody has.
            let also = if release_cpus { growth } else { vec![] };
            return Effect::Reclaim { incarnation, release_cpus, own: cpus, also };
        };
        let heir = self.args.env.directory.get(&of);
        let kept = heir.map(|i| i.record().growth.cpus.clone()).unwrap_or_default();
        if kept.is_empty() || !release_cpus {
            return Effect::Reclaim { incarnation, release_cpus, own: cpus, also: vec![] };
        }
        let also = cpus.into_iter().filter(|c| !kept.contains(c)).collect();
        Effect::Reclaim { incarnation, release_cpus: false, own: vec![], also }
    }

    /// Have this written down and done.
    pub(super) fn run(&mut self, orders: Vec<Order>, effect: Option<Effect>) {
        let mut record = self.args.instance.record();
        if let Some(machine) = &self.machine {
            record.saved = machine.saved();
        }
        let record = Box::new(record.clone());
        self.next_op += 1;
        let run = Run { epoch: self.epoch, op: self.next_op, orders, record, effect };
        self.unacknowledged.push_back(run.clone());
        self.args.instance.recovery.send(EffectsMsg::Run(Box::new(run)));
    }

    fn watch(&mut self, adopted: bool) {
        let watch = Watch::of(&self.args.instance.record());
        self.watching = true;
        self.args.instance.heartbeat.send(HeartbeatMsg::Watch(watch));
        self.health(if adopted { health::Event::Adopted } else { health::Event::Booted });
    }

    pub(super) fn unwatch(&mut self) {
        self.watching = false;
        self.beside.seated = false;
        self.asking = None;
        self.channel = None;
        let (id, incarnation) = (self.args.instance.id(), self.incarnation());
        self.args.instance.heartbeat.send(HeartbeatMsg::Idle);
        // Every connection is closed before its instance is fenced, so none reaches a successor.
        self.args.env.transport.send(TransportMsg::Close { id, incarnation });
        let actions = self.health.step(self.now(), health::Event::Reset);
        self.judge(actions);
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Look(found) => self.found(found),
            Done::Boot(Ok(booted), _) => {
                let mut r = self.args.instance.record();
                r.region = Some(booted.region);
                r.release.clone_from(&booted.release);
                r.booted_unix_ms = Some(unix_ms());
                let incarnation = r.incarnation;
                drop(r);
                self.booted = Some(Instant::now());
                self.recovery(Event::Booted(format!(
                    "kernel {} was started as incarnation {incarnation} in {:.1} ms",
                    booted.release,
                    booted.took.as_secs_f64() * 1e3
                )));
            }
            Done::Boot(Err(error), console) => {
                self.console = console;
                self.recovery(Event::BootError(error));
            }
            Done::Fence(result, console) => {
                self.console = console;
                self.recovery(match result {
                    Ok(report) => {
                        let stopped = report.cpus.iter().filter(|c| c.1).count();
                        let running: Vec<u32> = report.cpus.iter().filter(|c| !c.1).map(|c| c.0).collect();
                        let us = report.took.as_micros();
                        let detail = if report.complete {
                            format!("{stopped} CPUs were seen stopped after {us} us")
                        } else {
                            format!(
                                "{stopped} CPUs were seen stopped, CPUs {running:?} were not, within {us} us"
                            )
                        };
                        Event::FenceDone { complete: report.complete, detail }
                    }
                    Err(error) => Event::FenceError(format!("its CPUs could not be stopped: {error}")),
                });
            }
            Done::Reclaim(Ok(report)) => {
                let mut r = self.args.instance.record();
                r.region = None;
                r.release.clear();
                drop(r);
                self.booted = None;
                self.recovery(Event::Reclaimed(match report {
                    Some(r) => format!(
                        "{} MiB and {} CPUs were taken back in {} us",
                        r.region.size >> 20,
                        r.cpus.len(),
                        r.took.as_micros()
                    ),
                    None => "nothing was held".into(),
                }));
            }
            Done::Reclaim(Err(error)) => self.recovery(Event::ReclaimError(error)),
            Done::TakeOver(Ok(detail)) => {
                (self.booted, self.beside.seated) = (None, true);
                let (env, spec) = (self.args.env.clone(), self.args.instance.record().spec.clone());
                let incarnation = self.incarnation();
                tokio::spawn(async move { topology::follow(&env, spec, incarnation).await });
                self.recovery(Event::TookOver(detail));
            }
            Done::TakeOver(Err(why)) => {
                self.standby_is_back();
                self.recovery(Event::NotTakenOver(why));
            }
            Done::Capture(Ok(detail)) => self.recovery(Event::CaptureDone(detail)),
            Done::Capture(Err(error)) => self.recovery(Event::CaptureFailed(error)),
        }
    }

    // Beginning.

    /// Find out what there is of this instance before anything is decided.
    pub(super) fn look_at_platform(&mut self) {
        let never_started = self.args.instance.record().incarnation == 0;
        if never_started {
            return self.begin(Found::Nothing);
        }
        self.run(vec![], Some(Effect::Look));
    }

    fn found(&mut self, found: Result<Vec<kmorph_platform::ExistingInstance>, String>) {
        if self.machine.is_some() {
            return;
        }
        match found {
            Err(error) => {
                error!(instance = %self.args.instance.name, %error, "the platform does not say what runs: asking again");
                self.arm(Timer::Look, LOOK_AGAIN);
            }
            Ok(existing) => {
                let found = match existing.into_iter().find(|e| e.id == self.args.instance.id()) {
                    None => Found::Nothing,
                    Some(e) => {
                        let mut r = self.args.instance.record();
                        if e.incarnation != r.incarnation {
                            warn!(
                                instance = %self.args.instance.name, found = e.incarnation,
                                remembered = r.incarnation, "another incarnation than remembered"
                            );
                            if e.incarnation > r.incarnation {
                                r.saved = r.saved.outdated();
                            }
                            r.incarnation = e.incarnation;
                        }
                        r.region = Some(e.region);
                        if e.running { Found::Running } else { Found::Stopped }
                    }
                };
                self.begin(found);
            }
        }
    }

    fn begin(&mut self, found: Found) {
        let (policy, saved, maintenance) = {
            let r = self.args.instance.record();
            (r.policy, r.saved, self.maintained().unwrap_or(r.maintenance))
        };
        let grouped = self.args.env.group_of(&self.args.instance.name).is_some();
        let duties = Duties { maintenance, grouped };
        let seed = self.args.env.config.seed ^ u64::from(self.args.instance.id().0);
        let (machine, actions) = Recovery::resume(policy, seed, saved, found, self.now(), duties);
        self.machine = Some(machine);
        self.find_standby();
        self.carry_out(actions);
        // An order of its group that waits is answered by where it stands then.
        if !self.deferred.iter().any(|wish| matches!(wish, InstanceMsg::Group(_))) {
            self.stand(true);
        }
        if self.machine.as_ref().is_some_and(|m| m.phase() == Phase::Stopped) {
            self.side_stopped();
        }
        for wish in std::mem::take(&mut self.deferred) {
            self.message(wish);
        }
    }

    // Answers.

    /// Give this answer as soon as all that was decided before it is written down, or cannot be.
    pub(super) fn answer(&mut self, answer: Answer) {
        match self.unacknowledged.back() {
            Some(run) => self.answers.push_back((run.op, answer)),
            None => answer.give(),
        }
    }

    fn answer_up_to(&mut self, op: u64) {
        let ready = self.answers.partition_point(|(after, _)| *after <= op);
        for (_, answer) in self.answers.drain(..ready) {
            answer.give();
        }
        self.answers.shrink_to_fit();
    }

    // Timers.

    pub(super) fn arm(&mut self, timer: Timer, after: Duration) {
        self.disarm(timer);
        self.round += 1;
        let (link, round) = (self.args.instance.link.clone(), self.round);
        let task = tokio::spawn(async move {
            sleep(after).await;
            link.send(InstanceMsg::Timer { timer, round });
        });
        self.timers.insert(timer, task.abort_handle());
        self.rounds.insert(timer, round);
    }

    pub(super) fn disarm(&mut self, timer: Timer) {
        if let Some(task) = self.timers.remove(&timer) {
            task.abort();
        }
        self.rounds.remove(&timer);
    }

    fn timer(&mut self, timer: Timer, round: u64) {
        // One that was replaced while its message was under way means nothing.
        if self.rounds.get(&timer) != Some(&round) {
            return;
        }
        self.disarm(timer);
        match timer {
            Timer::Health(health::Timer::Grace) => self.health(health::Event::GraceExpired),
            Timer::Health(health::Timer::Probe) => self.health(health::Event::ProbeTimer),
            Timer::Restart => self.recovery(Event::RestartTimer),
            Timer::Look => self.run(vec![], Some(Effect::Look)),
            Timer::Parted => self.recall(),
            Timer::Standby => self.standby_timer(),
        }
    }

    // Its own actors.

    pub(super) fn child_is_back(&mut self, child: &str) {
        match child {
            "heartbeat" if self.watching => {
                let watch = Watch::of(&self.args.instance.record());
                self.args.instance.heartbeat.send(HeartbeatMsg::Watch(watch));
            }
            "recovery" => {
                for run in &self.unacknowledged {
                    self.args.instance.recovery.send(EffectsMsg::Run(Box::new(run.clone())));
                }
            }
            _ => {}
        }
    }

    pub(super) async fn quit(&mut self) -> Step {
        self.recovery(Event::Shutdown);
        let gone = OpError::new(ErrorKind::NoDaemon, "the daemon ends; the instance is left as it is");
        for waiter in self.waiters.drain(..) {
            // Who asked may have given up waiting.
            let _ = waiter.reply.send(Err(gone.clone()));
        }
        for timer in std::mem::take(&mut self.timers).into_values() {
            timer.abort();
        }
        self.rounds.clear();
        self.answer_up_to(u64::MAX);
        self.children.step(SupervisorEvent::Shutdown).await
    }

    // Views.

    pub(super) fn view(&self) -> kmorph_control::views::InstanceView {
        let i = &self.args.instance;
        let state = self.state();
        let mut view = view::instance(
            &i.record(),
            state,
            self.booted,
            i.incident.get(),
            &i.readings.lock(),
            self.watching,
        );
        view.group = self.args.env.group_of(&i.name);
        view.agent_restarts = self.agent_restarts;
        view.standby = self.standby_view();
        view.handover_bytes = i.record().handover.map_or(0, |h| h.bytes);
        view.publish = self.args.env.switch.view(&i.name, &i.record().publish);
        view
    }

    fn state(&self) -> kmorph_control::views::InstanceState {
        if let (true, Some(shown)) = (self.parted, self.shown) {
            return shown;
        }
        let Some(machine) = &self.machine else { return kmorph_control::views::InstanceState::Starting };
        let started = self.args.instance.record().incarnation > 0;
        view::state(machine.phase(), machine.saved(), self.health.state(), started)
    }

    /// Publish the state when it changed.
    pub(super) fn show(&mut self) {
        if self.parted {
            return;
        }
        let state = self.state();
        let before = self.shown.replace(state);
        if matches!(self.health.state(), HealthState::Suspect { .. } | HealthState::AgentSilent) {
            self.args.instance.record().reason = view::trouble(self.health.state());
        }
        if before != Some(state) {
            telemetry::instance_state(&self.args.instance.name, state);
            let record = self.args.instance.record();
            let draft = Draft::new(EventKind::State, record.reason.clone())
                .transition(before.map(|s| s.to_string()), state.to_string())
                .effect(view::advice(&record, state));
            drop(record);
            self.announce(draft);
            self.args.env.topology.changed();
        }
        self.tell_morph();
        self.switch_route();
    }

    pub(super) fn console_text(&self) -> String {
        if self.console.is_empty() {
            return String::new();
        }
        format!("; last lines of its console:\n{}", self.console.join("\n"))
    }

    fn settled(&mut self, outcome: &Outcome) {
        let view = self.view();
        let console = self.console_text();
        let name = self.args.instance.name.clone();
        for waiter in std::mem::take(&mut self.waiters) {
            match super::operator::answer(&name, waiter.wish, outcome, &view, &console) {
                Some(result) => self.answer(Answer::Operator(waiter.reply, result)),
                None => self.waiters.push(waiter),
            }
        }
    }
}
