//! An instance's standby: what its actor knows of it and has done about it; and what the standby's own actor tells it.

use kmorph_control::views::{EventKind, StandbyView};
use tokio::sync::oneshot;
use tracing::info;

use super::super::handover::Use;
use super::super::log::Draft;
use super::super::morph::{self, Wanted};
use super::{InstanceActorState, InstanceMsg, Timer};
use crate::core::health::State as HealthState;
use crate::core::policy;
use crate::core::recovery::{Event as RecoveryEvent, Phase as Recovery};
use crate::core::standby::{Action, Event, Phase, Standby, Want};
use crate::store::Role;
use crate::telemetry;

/// About standbys.
pub(crate) enum StandbyMsg {
    /// Something happened to it; set when work that an actor's life gave out has ended.
    Happened { epoch: Option<u64>, event: Event },
    /// To the standby: where does it stand?
    Report,
    /// A morph to this kernel takes it, if it is that. Its name.
    Claim { wanted: Wanted, reply: oneshot::Sender<Option<String>> },
    /// It is to give back what it has; answered when it has done so.
    GiveWay { whom: String, reply: oneshot::Sender<()> },
}

/// What is remembered in a life of the actor.
#[derive(Default)]
pub(super) struct Beside {
    /// Absent while there is none and none is wanted.
    machine: Option<Box<Standby>>,
    /// The recovery was told that it is ready.
    told: bool,
    /// Of a standby itself: what its owner was told last.
    said: Option<Event>,
    /// Who waits until it has given way.
    waiting: Vec<oneshot::Sender<()>>,
    /// The kernel of the instance was its standby, and was told to serve.
    pub(super) seated: bool,
}

impl InstanceActorState {
    /// After each message: is it what it should be?
    pub(super) fn look_at_standby(&mut self) {
        if let Some((want, rest)) = self.wanted_standby() {
            if self.beside.machine.is_none() && want.is_some() {
                self.beside.machine = Some(Box::default());
            }
            if self.beside.machine.is_some() {
                self.standby(Event::Want { want, rest });
            }
        }
        let over = self.beside.machine.as_ref().is_some_and(|m| m.is_over());
        if over {
            self.beside.machine = None;
        }
        self.tell_recovery();
        let there = |p| !matches!(p, Phase::None | Phase::Waiting);
        if !self.beside.machine.as_ref().is_some_and(|m| there(m.phase())) {
            for reply in self.beside.waiting.drain(..) {
                // Who asked may have given up waiting.
                let _ = reply.send(());
            }
        }
        self.say_where_it_stands(false);
    }

    /// What is wanted and whether the instance is at rest. `None`: nobody knows now.
    fn wanted_standby(&self) -> Option<(Option<Want>, bool)> {
        let phase = self.machine.as_ref()?.phase();
        let r = self.args.instance.record();
        let kernel = match r.policy.standby {
            policy::Standby::Off => None,
            policy::Standby::Same => Some(r.kernel.as_path()),
            policy::Standby::Kernel(image) => Some(image.path()),
        };
        let kernel = kernel.filter(|_| r.role == Role::Own && phase != Recovery::Stopped);
        if kernel.is_none() && self.beside.machine.is_none() {
            return None;
        }
        let want = kernel.map(|kernel| Want {
            kernel: kernel.to_owned(),
            initramfs: r.initramfs.clone(),
            cmdline: r.cmdline.clone(),
            cpus: r.spec.cpus.len(),
            memory_bytes: r.spec.memory_bytes,
            handover: r.handover.map(|h| h.key),
        });
        let healthy = *self.health.state() == HealthState::Healthy;
        let rest = phase == Recovery::Monitoring && healthy && r.morph.is_none() && self.asking.is_none();
        Some((want, rest))
    }

    /// A daemon before this one, or a life of this actor, may have left one.
    pub(super) fn find_standby(&mut self) {
        let i = &self.args.instance;
        if i.record().role != Role::Own || self.beside.machine.is_some() {
            return;
        }
        let Some(other) = self.args.env.directory.get(&morph::standby_name(&i.name)) else { return };
        let found = {
            let r = other.record();
            match &r.role {
                Role::Standby(_) => Event::Found(Want {
                    kernel: r.kernel.clone(),
                    initramfs: r.initramfs.clone(),
                    cmdline: r.cmdline.clone(),
                    cpus: r.spec.cpus.len(),
                    memory_bytes: r.spec.memory_bytes,
                    handover: r.handover.map(|h| h.key),
                }),
                Role::Side(_) | Role::Own => Event::FoundInUse,
            }
        };
        let mut machine = Box::<Standby>::default();
        if let Some((want, _)) = self.wanted_standby() {
            machine.step(Event::Want { want, rest: false });
        }
        self.beside.machine = Some(machine);
        self.standby(found);
    }

    fn standby(&mut self, event: Event) {
        let Some(machine) = &mut self.beside.machine else { return };
        let before = machine.ready();
        let actions = machine.step(event);
        let ready = machine.ready();
        if before != ready {
            telemetry::standby_ready(&self.args.instance.name, ready);
        }
        for action in actions {
            self.do_standby(action);
        }
    }

    fn do_standby(&mut self, action: Action) {
        let (env, instance) = (self.args.env.clone(), self.args.instance.clone());
        let epoch = Some(self.epoch);
        match action {
            Action::Start(want) => {
                tokio::spawn(async move {
                    for event in morph::start_standby(&env, &instance, &want).await {
                        instance.link.send(InstanceMsg::Standby(StandbyMsg::Happened { epoch, event }));
                    }
                });
            }
            Action::Remove => {
                tokio::spawn(async move {
                    // That nothing is left of it is said when it is forgotten.
                    if let Err(why) = morph::remove(&env, &morph::standby_name(&instance.name)).await {
                        let event = Event::NotRemoved(why);
                        instance.link.send(InstanceMsg::Standby(StandbyMsg::Happened { epoch, event }));
                    }
                });
            }
            Action::Ask => {
                if let Some(other) = env.directory.get(&morph::standby_name(&instance.name)) {
                    other.link.send(InstanceMsg::Standby(StandbyMsg::Report));
                }
            }
            Action::Arm(after) => self.arm(Timer::Standby, after),
            Action::Disarm => self.disarm(Timer::Standby),
            Action::Say(text) => {
                info!(instance = %instance.name, "{text}");
                self.announce(Draft::new(EventKind::Notice, text));
            }
            // Seen by whoever claimed it.
            Action::Claimed => {}
        }
    }

    /// Take it, if it is ready.
    fn claim_standby(&mut self) -> bool {
        let ready = self.beside.machine.as_ref().is_some_and(|m| m.ready());
        if ready {
            self.standby(Event::Claim);
        }
        ready
    }

    /// The recovery wants it. False: it is not ready any more.
    pub(super) fn claim_for_recovery(&mut self) -> bool {
        let claimed = self.claim_standby();
        if claimed {
            telemetry::standby_used(&self.args.instance.name, "recovery");
        }
        claimed
    }

    /// The recovery could not use it.
    pub(super) fn standby_is_back(&mut self) {
        self.standby(Event::Back);
    }

    pub(super) fn standby_timer(&mut self) {
        let waits = self.beside.machine.as_ref().is_some_and(|m| m.phase() == Phase::Waiting);
        let name = morph::standby_name(&self.args.instance.name);
        if waits && self.args.env.directory.get(&name).is_some() {
            // Started by a life of this actor that did not see how that ended.
            self.beside.machine = None;
            return self.find_standby();
        }
        self.standby(Event::Timer);
    }

    pub(super) fn standby_message(&mut self, message: StandbyMsg) {
        match message {
            StandbyMsg::Happened { epoch, event } => {
                if epoch.is_none_or(|e| e == self.epoch) {
                    let removed = event == Event::Removed;
                    self.standby(event);
                    if removed {
                        self.standby_is_gone();
                    }
                }
            }
            StandbyMsg::Report => self.say_where_it_stands(true),
            StandbyMsg::Claim { wanted, reply } => {
                let fits = self.fits(&wanted) && self.claim_standby();
                if fits {
                    telemetry::standby_used(&self.args.instance.name, "morph");
                }
                // Who asked waits as long as an actor may take.
                let _ = reply.send(fits.then(|| morph::standby_name(&self.args.instance.name)));
            }
            StandbyMsg::GiveWay { whom, reply } => {
                self.standby(Event::GiveWay(whom));
                self.beside.waiting.push(reply);
            }
        }
    }

    /// Whether the standby is what a morph wants.
    fn fits(&self, wanted: &Wanted) -> bool {
        let r = self.args.instance.record();
        let have = self.beside.machine.as_ref().and_then(|m| m.have());
        let size = |h: &Want| h.cpus == r.spec.cpus.len() && h.memory_bytes == r.spec.memory_bytes;
        have.is_some_and(|h| {
            size(h)
                && wanted.cpus.is_empty()
                && wanted.memory_bytes.is_none()
                && h.kernel == wanted.kernel
                && h.initramfs == wanted.initramfs.clone().or_else(|| r.initramfs.clone())
                && h.cmdline == *wanted.cmdline.as_ref().unwrap_or(&r.cmdline)
                && h.handover == r.handover.map(|h| h.key)
        })
    }

    /// Nothing of it is left: handover memory that it mapped can be given back.
    fn standby_is_gone(&self) {
        let stopped = self.machine.as_ref().is_some_and(|m| m.phase() == Recovery::Stopped);
        if let (true, Some(used)) = (stopped, Use::of(&self.args.instance.record())) {
            let env = self.args.env.clone();
            tokio::spawn(async move { used.after_reclaim(&*env.platform).await });
        }
    }

    /// A recovery can use it when it is ready. It cannot take over handover memory: a kernel that died may have been in the
    /// middle of a change, so the instance begins with fresh memory, which a kernel that maps the old one is in the way of.
    fn tell_recovery(&mut self) {
        let Some(phase) = self.machine.as_ref().map(|m| m.phase()) else {
            self.beside.told = false;
            return;
        };
        let there = self.beside.machine.as_ref();
        let handover = self.args.instance.record().handover.is_some();
        let is = |p| there.is_some_and(|m| m.phase() == p);
        let recovers = matches!(
            phase,
            Recovery::PreparingRecovery
                | Recovery::CapturingVmcore
                | Recovery::ReclaimingResources
                | Recovery::Booting
                | Recovery::Restarting
        );
        if handover && recovers && (is(Phase::Armed) || is(Phase::Arming)) {
            self.standby(Event::GiveWay("the instance, which begins with fresh handover memory".into()));
        }
        let ready = !handover && self.beside.machine.as_ref().is_some_and(|m| m.ready());
        if std::mem::replace(&mut self.beside.told, ready) != ready {
            self.recovery(RecoveryEvent::Standby(ready));
        }
    }

    /// Of a standby: its owner knows where it stands.
    fn say_where_it_stands(&mut self, anyhow: bool) {
        let Role::Standby(of) = &self.args.instance.record().role.clone() else { return };
        // One that stands aside is being taken.
        let Some(phase) = self.machine.as_ref().map(|m| m.phase()) else { return };
        let event = match phase {
            Recovery::Monitoring => Event::Ready(*self.health.state() == HealthState::Healthy),
            Recovery::Booting | Recovery::AwaitingService => Event::Ready(false),
            _ => Event::Gone(self.args.instance.record().reason.clone()),
        };
        if !anyhow && self.beside.said.as_ref() == Some(&event) {
            return;
        }
        self.beside.said = Some(event.clone());
        if let Some(owner) = self.args.env.directory.get(of) {
            owner.link.send(InstanceMsg::Standby(StandbyMsg::Happened { epoch: None, event }));
        }
    }

    /// What operators see.
    pub(super) fn standby_view(&self) -> Option<StandbyView> {
        let machine = self.beside.machine.as_ref()?;
        let name = morph::standby_name(&self.args.instance.name);
        let state = match machine.phase() {
            Phase::None | Phase::Waiting => "none",
            Phase::Arming => "starting",
            Phase::Armed if machine.ready() => "ready",
            Phase::Armed => "not-ready",
            Phase::Using => "in-use",
            Phase::Removing => "being-removed",
        };
        let mut view =
            StandbyView { state: state.into(), reason: machine.why().to_owned(), ..Default::default() };
        if let Some(other) = self.args.env.directory.get(&name) {
            let r = other.record();
            view.release.clone_from(&r.release);
            if matches!(r.saved.phase, Recovery::PartialFence | Recovery::Degraded) {
                view.reason = format!("what is left of a kernel is in the way: kmorphctl status {name}");
            }
        }
        view.name = name;
        Some(view)
    }
}
