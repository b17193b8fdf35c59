//! The actor of an instance's morph. It lives as long as the morph does: carries what happens to the machine
//! ([`core::morph`](crate::core::morph)) and its decisions out ([`work`]).

mod grow;
mod hand;
mod lines;
mod live;
mod record;
mod resources;
mod side;
mod standby;
mod state;
mod takeover;
mod window;
mod work;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{
    BlackoutView, EventKind, MorphSide, MorphStep, MorphView, RecoveryStep, TransferView,
};
use kmorph_platform::{Growth, InstanceSpec};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{error, info};

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use super::children::{ChildDef, Started};
use super::effects::unix_ms;
use super::instance::{Env, Instance, InstanceMsg};
use super::log::Draft;
use super::topology;
use crate::core::morph::{Action, Event, Goal, Limits, Morph, Outcome, Phase, Saved};
use crate::core::supervisor::{ChildSpec, Restart, Shutdown};
use crate::store::MorphRecord;
use hand::Hand;
use live::Live;

pub(crate) use grow::lacks;
pub(crate) use side::{forget, recall, remove};
pub(crate) use standby::{make_way, plan_with_way, standby_name, start_standby, would_use};
pub(crate) use takeover::{Seat, take_over};
pub(crate) use window::sweep;

/// A new kernel, as an operator wants it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) kernel: std::path::PathBuf,
    /// `None`: as the old kernel had it.
    pub(crate) initramfs: Option<std::path::PathBuf>,
    /// `None`: as the old kernel had it.
    pub(crate) cmdline: Option<String>,
    /// Physical CPU ids it starts with; empty: any that nobody has.
    pub(crate) cpus: Vec<u32>,
    /// Memory it starts with; `None`: as much as the instance has, if there is room.
    pub(crate) memory_bytes: Option<u64>,
}

/// Whom an operator's wish is answered to.
pub(crate) type MorphReply = oneshot::Sender<Result<MorphView, OpError>>;

/// Messages of a morph's actor.
pub(crate) enum MorphMsg {
    /// Begin, or go on.
    Go {
        goal: Goal,
        wanted: Option<Wanted>,
        reply: MorphReply,
    },
    /// Give it up.
    Cancel {
        why: String,
        reply: MorphReply,
    },
    View(MorphReply),
    /// The policy was changed.
    Policy,
    /// Something happened to one of the kernels.
    Happened(Event),
    /// Work that was given out has ended.
    Done {
        work: u64,
        done: Done,
    },
}

/// What it needs.
#[derive(Clone)]
pub(crate) struct MorphArgs {
    pub(crate) instance: Arc<Instance>,
    pub(crate) env: Arc<Env>,
}

pub(crate) struct MorphState {
    args: MorphArgs,
    me: ActorRef<MorphMsg>,
    machine: Machine,
    /// What is to be started.
    wanted: Option<Wanted>,
    /// Number of the work under way, and how it is stopped.
    work: u64,
    running: Option<AbortHandle>,
    deadline: Option<Instant>,
    waiters: Vec<(Goal, MorphReply)>,
    cancels: Vec<MorphReply>,
    began: Instant,
    steps: Vec<MorphStep>,
    outcome: Option<Outcome>,
    /// Taken by whatever work is under way.
    hand: Arc<tokio::sync::Mutex<Hand>>,
    live: Live,
    /// What the latest work left there.
    transfer: Option<TransferView>,
    blackout: Option<BlackoutView>,
    /// Steps that were taken while the workload stood still: written when it goes on.
    late: Vec<Step>,
}

/// The machine, which decides here and, while a workload stands still, where the work is done.
#[derive(Clone)]
struct Machine(Arc<Mutex<Morph>>);

impl Machine {
    fn lock(&self) -> MutexGuard<'_, Morph> {
        // A decision is whole or did not happen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> Phase {
        self.lock().phase()
    }

    fn step(&self, event: Event) -> Vec<Action> {
        self.lock().step(event)
    }

    fn saved(&self) -> Saved {
        self.lock().saved()
    }
}

/// A step to be written down.
#[derive(Debug)]
struct Step {
    phase: &'static str,
    detail: String,
    committed: Option<bool>,
    at: Instant,
}

/// What came of work.
#[derive(Debug)]
pub(crate) struct Done {
    event: Event,
    /// What was decided on the way.
    late: Vec<Step>,
    details: Vec<(Phase, String, Instant)>,
}

/// Do work. Between the order to stand still and the moment the workload serves again nobody is asked and nothing is
/// written that can be later: it is decided here what comes next, and done at once.
async fn work_on(
    args: &MorphArgs,
    machine: &Machine,
    hand: &mut Hand,
    what: Action,
    wanted: Option<Wanted>,
) -> Option<Done> {
    let (mut late, mut details) = (vec![], vec![]);
    let mut next = Some((what, wanted));
    while let Some((what, wanted)) = next.take() {
        let (event, detail) = work::run(args, hand, what, wanted).await;
        if !detail.is_empty() {
            details.push((machine.phase(), detail, Instant::now()));
        }
        let goes_on = matches!(
            event,
            Event::Frozen | Event::Taken | Event::Recorded | Event::RecordUnknown | Event::NotActivated(_)
        );
        if !goes_on {
            return Some(Done { event, late, details });
        }
        for action in machine.step(event) {
            match action {
                Action::Journal { phase, detail, committed } => {
                    late.push(Step { phase, detail, committed, at: Instant::now() });
                }
                Action::Record
                | Action::WriteDown
                | Action::LookUpRecord
                | Action::Activate
                | Action::GiveBack => {
                    next = Some((action, None));
                }
                // Nothing rings in these phases.
                _ => {}
            }
        }
    }
    // It was decided otherwise meanwhile.
    None
}

/// Whether clients wait for this phase to end.
fn stands_still(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Withdrawing | Phase::Taken | Phase::Recording | Phase::Committing | Phase::Returning
    )
}

fn limits(args: &MorphArgs) -> Limits {
    let policy = args.instance.record().policy;
    Limits {
        phase: policy.morph_timeout,
        downtime: policy.morph_downtime,
        rounds: policy.morph_rounds,
        dirty: policy.morph_dirty,
    }
}

impl MorphState {
    fn record(&self) -> Option<MorphRecord> {
        self.args.instance.record().morph.clone()
    }

    async fn step(&mut self, event: Event) {
        let actions = self.machine.step(event);
        self.carry_out(actions).await;
    }

    async fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                // The workload stands still and waits for nothing that can be written later. The decision itself is
                // written with the commit record.
                Action::Journal { phase, detail, committed } if stands_still(self.machine.phase()) => {
                    self.late.push(Step { phase, detail, committed, at: Instant::now() });
                }
                Action::Journal { phase, detail, committed } => {
                    let now = Step { phase, detail, committed, at: Instant::now() };
                    for step in std::mem::take(&mut self.late).into_iter().chain([now]) {
                        self.journal(step).await;
                    }
                    if committed.is_none() {
                        self.remember().await;
                    }
                }
                Action::Arm(after) => self.deadline = Some(Instant::now() + after),
                Action::Disarm => self.deadline = None,
                Action::Settled(outcome) => self.settled(outcome).await,
                Action::Alert(text) => {
                    error!(instance = %self.args.instance.name, "operator needed: {text}");
                    self.say(Draft::new(EventKind::Notice, text).effect("an operator has to look at it"));
                }
                // Told to the one who asked.
                Action::Refuse(_) => {}
                work => self.begin(work),
            }
        }
    }

    /// Have a step written down.
    async fn journal(&mut self, Step { phase, detail, committed, at }: Step) {
        let detail = detail.as_str();
        let i = &self.args.instance;
        info!(instance = %i.name, phase, "{detail}");
        // Its memory begins when its work has numbered it.
        let number = i.record().morph.as_ref().map(|m| m.number);
        let since = at.saturating_duration_since(self.began);
        let at_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        self.steps.push(MorphStep { state: phase.into(), at_ms, detail: detail.into() });
        let mut draft = Draft::new(EventKind::Morph, detail).transition(None, phase);
        draft.incident = number;
        self.say(draft);
        let Some(number) = number else { return };
        let step = RecoveryStep {
            incident: number,
            instance: i.name.clone(),
            incarnation: i.record().incarnation,
            at_unix_ms: unix_ms(),
            offset_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
            phase: phase.to_owned(),
            detail: detail.to_owned(),
            recovered: committed,
        };
        let journal = self.args.env.store.journal(&step);
        match tokio::time::timeout(self.args.env.config.store_limit, journal).await {
            Ok(Ok(())) => {}
            // Its history is less than the morph itself.
            Ok(Err(error)) => error!(instance = %i.name, %error, "store: a step of the morph is missing"),
            Err(_) => error!(instance = %i.name, "store: took too long for a step of the morph"),
        }
    }

    /// Have the machine's state written down before anything is done. A daemon killed after the step and before this
    /// takes it again.
    async fn remember(&self) {
        let i = &self.args.instance;
        if let Some(m) = &mut i.record().morph {
            m.saved = self.machine.saved();
        }
        work::persist(i).await;
    }

    fn say(&self, draft: Draft) {
        let i = &self.args.instance;
        let incarnation = i.record().incarnation;
        self.args.env.log.say(draft.of(&i.name, self.args.env.group_of(&i.name), incarnation));
    }

    /// Begin work. What was under way is stopped: its answer means nothing any more.
    fn begin(&mut self, what: Action) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
        self.work += 1;
        let (me, number) = (self.me.clone(), self.work);
        let (args, wanted, hand) = (self.args.clone(), self.wanted.clone(), self.hand.clone());
        let machine = self.machine.clone();
        let task = tokio::spawn(async move {
            // What was under way lets go of it when it has ended.
            let mut hand = hand.lock().await;
            let done = work_on(&args, &machine, &mut hand, what, wanted).await;
            drop(hand);
            if let Some(done) = done {
                // An actor that has ended needs no answer.
                let _ = me.send_message(MorphMsg::Done { work: number, done });
            }
        });
        self.running = Some(task.abort_handle());
    }

    async fn settled(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
        if outcome == Outcome::Committed {
            // Before anybody is told: who starts the instance anew starts what it is now.
            let (spec, incarnation) = {
                let r = self.args.instance.record();
                (r.spec.clone(), r.incarnation)
            };
            topology::follow(&self.args.env, spec, incarnation).await;
            self.args.env.topology.changed();
        }
        let view = self.view();
        match &outcome {
            Outcome::Reached(goal) => {
                let reached = *goal;
                for (_, reply) in self.waiters.extract_if(.., |(goal, _)| *goal <= reached) {
                    // Who asked may have given up waiting.
                    let _ = reply.send(Ok(view.clone()));
                }
                return;
            }
            Outcome::Committed => {
                for (_, reply) in self.waiters.drain(..) {
                    let _ = reply.send(Ok(view.clone()));
                }
            }
            Outcome::RolledBack(why) => {
                let text = format!("instance {}: the old kernel goes on: {why}", self.args.instance.name);
                for (_, reply) in self.waiters.drain(..) {
                    let _ = reply.send(Err(OpError::new(ErrorKind::MorphFailed, text.clone())));
                }
            }
        }
        for reply in self.cancels.drain(..) {
            let _ = reply.send(Ok(view.clone()));
        }
        self.args.instance.record().morph = None;
        work::persist(&self.args.instance).await;
        self.me.stop();
    }

    async fn go(&mut self, goal: Goal, wanted: Option<Wanted>, reply: MorphReply) {
        let name = &self.args.instance.name;
        let refused = |text: String| Err(OpError::new(ErrorKind::Conflict, text));
        match (self.machine.phase(), &wanted) {
            (Phase::Idle, None) => {
                let text = format!(
                    "instance {name}: no morph is prepared: kmorphctl morph prepare {name} --kernel=..."
                );
                // Who asked may have given up waiting.
                drop(reply.send(refused(text)));
                return self.me.stop();
            }
            (Phase::Idle, Some(_)) => {
                if let Err(error) = work::may_begin(&self.args.instance) {
                    drop(reply.send(Err(error)));
                    return self.me.stop();
                }
                self.wanted = wanted;
            }
            (_, Some(_)) => {
                let text = format!("instance {name}: a morph is under way: commit it or roll it back");
                return drop(reply.send(refused(text)));
            }
            (_, None) => {}
        }
        let actions = self.machine.step(Event::Go(goal));
        if let Some(Action::Refuse(why)) = actions.iter().find(|a| matches!(a, Action::Refuse(_))) {
            return drop(reply.send(refused(format!("instance {name}: {why}"))));
        }
        self.waiters.push((goal, reply));
        self.carry_out(actions).await;
    }

    async fn cancel(&mut self, why: String, reply: MorphReply) {
        let actions = self.machine.step(Event::Cancel(why));
        if let Some(Action::Refuse(why)) = actions.iter().find(|a| matches!(a, Action::Refuse(_))) {
            let text = format!("instance {}: {why}", self.args.instance.name);
            // Who asked may have given up waiting.
            drop(reply.send(Err(OpError::new(ErrorKind::Conflict, text))));
            if self.machine.phase() == Phase::Idle {
                self.me.stop();
            }
            return;
        }
        self.cancels.push(reply);
        self.carry_out(actions).await;
    }

    fn view(&self) -> MorphView {
        let record = self.record();
        let side = record.as_ref().and_then(|m| self.args.env.directory.get(&m.side));
        let i = self.args.instance.record();
        let transfer = self.live.show(self.transfer.clone());
        MorphView {
            name: i.spec.name.clone(),
            number: record.as_ref().map_or(0, |m| m.number),
            state: self.machine.phase().name().into(),
            waits_for: match self.machine.phase() {
                Phase::Prepared => {
                    format!("kmorphctl morph validate {0}, or kmorphctl morph commit {0}", i.spec.name)
                }
                Phase::Validated => format!("kmorphctl morph commit {}", i.spec.name),
                _ => String::new(),
            },
            from: record.map(|m| m.from).unwrap_or_default(),
            release: i.release.clone(),
            side: side.map(|s| {
                let s = s.record();
                morph_side(&s.spec, &s.growth, s.release.clone())
            }),
            committed: match &self.outcome {
                Some(Outcome::Committed) => Some(true),
                Some(Outcome::RolledBack(_)) => Some(false),
                Some(Outcome::Reached(_)) | None => None,
            },
            steps: self.steps.clone(),
            transfer,
            blackout: self.blackout.clone(),
        }
    }

    /// See what work has left.
    fn look_at_hand(&mut self) {
        if let Ok(hand) = self.hand.try_lock() {
            (self.transfer, self.blackout) = (hand.transfer.clone(), hand.blackout());
        }
    }
}

impl Drop for MorphState {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

/// The actor.
pub(crate) struct MorphActor;

impl Actor for MorphActor {
    type Msg = MorphMsg;
    type State = MorphState;
    type Arguments = MorphArgs;

    async fn pre_start(&self, me: ActorRef<MorphMsg>, args: MorphArgs) -> Result<MorphState, Failure> {
        args.instance.morph.set(me.clone());
        let saved = args.instance.record().morph.as_ref().map(|m| m.saved.clone()).unwrap_or_default();
        let (machine, actions) = Morph::resume(limits(&args), saved);
        let live = Live::default();
        let mut state = MorphState {
            args,
            me,
            machine: Machine(Arc::new(Mutex::new(machine))),
            wanted: None,
            work: 0,
            running: None,
            deadline: None,
            waiters: vec![],
            cancels: vec![],
            began: Instant::now(),
            steps: vec![],
            outcome: None,
            hand: Arc::new(tokio::sync::Mutex::new(Hand::new(live.clone()))),
            live,
            transfer: None,
            blackout: None,
            late: vec![],
        };
        // Started by the actor it would have to ask: what it has to do begins with its first turn.
        state.resume(actions);
        Ok(state)
    }

    fn due(&self, state: &MorphState) -> Option<Instant> {
        state.deadline
    }

    async fn tick(&self, _: ActorRef<MorphMsg>, state: &mut MorphState) -> Result<(), Failure> {
        state.deadline = None;
        state.step(Event::Timeout).await;
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<MorphMsg>,
        message: MorphMsg,
        state: &mut MorphState,
    ) -> Result<(), Failure> {
        state.args.instance.morph.taken();
        match message {
            MorphMsg::Go { goal, wanted, reply } => state.go(goal, wanted, reply).await,
            MorphMsg::Cancel { why, reply } => state.cancel(why, reply).await,
            MorphMsg::View(reply) => {
                let view = state.view();
                // Who asked may have given up waiting.
                drop(reply.send(Ok(view)));
                if state.machine.phase() == Phase::Idle && state.running.is_none() {
                    state.me.stop();
                }
            }
            MorphMsg::Policy => {
                let limits = limits(&state.args);
                state.step(Event::Limits(limits)).await;
            }
            MorphMsg::Happened(event) => state.step(event).await,
            MorphMsg::Done { work, done } if work == state.work => {
                state.deadline = state.deadline.filter(|_| !stands_still(state.machine.phase()));
                for (phase, detail, at) in done.details {
                    let since = at.saturating_duration_since(state.began);
                    let at_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
                    state.steps.push(MorphStep { state: phase.name().into(), at_ms, detail });
                }
                state.late.extend(done.late);
                state.running = None;
                state.look_at_hand();
                state.step(done.event).await;
            }
            MorphMsg::Done { .. } => {}
        }
        Ok(())
    }
}

impl MorphState {
    /// What a machine that goes on has to do at once.
    fn resume(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Undo | Action::Activate | Action::Grow | Action::Withdraw | Action::WriteDown => {
                    self.begin(action);
                }
                Action::Journal { detail, .. } => {
                    let instance = self.args.instance.clone();
                    if let Some(m) = &mut instance.record().morph {
                        m.saved = self.machine.saved();
                    }
                    info!(instance = %instance.name, %detail, "going on with its morph");
                }
                _ => {}
            }
        }
    }
}

/// The actor as a child of its instance's. One that fails is started anew and goes on from what is remembered.
pub(crate) fn child(args: MorphArgs) -> ChildDef {
    let mut spec = ChildSpec::new("morph");
    spec.restart = Restart::Transient;
    spec.shutdown = Shutdown::Limit(args.env.config.shutdown_limit);
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let actor = actor::spawn_linked(MorphActor, args, parent).await.map_err(|e| e.to_string())?;
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec, start }
}

/// Have an instance's actor give its morph a message.
pub(crate) fn send(instance: &Instance, message: MorphMsg) -> bool {
    instance.link.send(InstanceMsg::Morph(message))
}

/// What a morph would begin with.
pub(crate) fn dry_run(
    instance: &Instance,
    side: &InstanceSpec,
    growth: &Growth,
) -> Result<MorphView, OpError> {
    work::may_begin(instance)?;
    let r = instance.record();
    Ok(MorphView {
        name: r.spec.name.clone(),
        state: Phase::Idle.name().into(),
        from: r.release.clone(),
        release: r.release.clone(),
        side: Some(morph_side(side, growth, String::new())),
        ..MorphView::default()
    })
}

fn morph_side(spec: &InstanceSpec, growth: &Growth, release: String) -> MorphSide {
    MorphSide {
        name: spec.name.clone(),
        release,
        cpus: spec.cpus.clone(),
        memory_bytes: spec.memory_bytes,
        later_cpus: growth.cpus.clone(),
        later_memory_bytes: growth.memory_bytes,
    }
}
