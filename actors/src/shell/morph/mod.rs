//! The actor of an instance's morph. It lives as long as the morph does: carries what happens to the machine
//! ([`core::morph`](crate::core::morph)) and its decisions out ([`work`]).

mod resources;
mod side;
mod work;

use std::sync::Arc;

use futures::FutureExt;
use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{EventKind, MorphSide, MorphStep, MorphView, RecoveryStep};
use kmorph_platform::InstanceSpec;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{error, info};

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use super::children::{ChildDef, Started};
use super::effects::unix_ms;
use super::instance::{Env, Instance, InstanceMsg};
use super::log::Draft;
use crate::core::morph::{Action, Event, Goal, Limits, Morph, Outcome, Phase};
use crate::core::supervisor::{ChildSpec, Restart, Shutdown};
use crate::store::MorphRecord;

pub(crate) use side::{forget, plan, recall};

/// A new kernel, as an operator wants it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) kernel: std::path::PathBuf,
    /// `None`: as the old kernel had it.
    pub(crate) initramfs: Option<std::path::PathBuf>,
    /// `None`: as the old kernel had it.
    pub(crate) cmdline: Option<String>,
    /// Physical CPU ids; empty: any that nobody has.
    pub(crate) cpus: Vec<u32>,
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
    /// Something happened to one of the kernels.
    Happened(Event),
    /// Work that was given out so has ended so.
    Done {
        work: u64,
        event: Event,
        detail: String,
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
    machine: Morph,
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
}

fn limits(args: &MorphArgs) -> Limits {
    Limits { phase: args.instance.record().policy.morph_timeout, ..Limits::default() }
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
                Action::Journal { phase, detail, committed } => self.journal(phase, &detail, committed).await,
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

    /// Have the machine's state and the step written down before anything is done.
    async fn journal(&mut self, phase: &'static str, detail: &str, committed: Option<bool>) {
        let i = &self.args.instance;
        info!(instance = %i.name, phase, "{detail}");
        // Its memory begins when its work has numbered it.
        let number = i.record().morph.as_ref().map(|m| m.number);
        let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
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
            offset_us: u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX),
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
        // After the step: a daemon killed in between takes it again. After the last one the morph is forgotten instead.
        if committed.is_none() {
            if let Some(m) = &mut i.record().morph {
                m.saved = self.machine.saved();
            }
            work::persist(i).await;
        }
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
        let (args, wanted) = (self.args.clone(), self.wanted.clone());
        let task = tokio::spawn(async move {
            let (event, detail) = work::run(&args, what, wanted).await;
            // An actor that has ended needs no answer.
            let _ = me.send_message(MorphMsg::Done { work: number, event, detail });
        });
        self.running = Some(task.abort_handle());
    }

    async fn settled(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome.clone());
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
                let (name, release) = (s.spec.name.clone(), s.release.clone());
                MorphSide { name, release, cpus: s.spec.cpus.clone(), memory_bytes: s.spec.memory_bytes }
            }),
            committed: match &self.outcome {
                Some(Outcome::Committed) => Some(true),
                Some(Outcome::RolledBack(_)) => Some(false),
                Some(Outcome::Reached(_)) | None => None,
            },
            steps: self.steps.clone(),
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
        let mut state = MorphState {
            args,
            me,
            machine,
            wanted: None,
            work: 0,
            running: None,
            deadline: None,
            waiters: vec![],
            cancels: vec![],
            began: Instant::now(),
            steps: vec![],
            outcome: None,
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
            MorphMsg::Happened(event) => state.step(event).await,
            MorphMsg::Done { work, event, detail } if work == state.work => {
                if !detail.is_empty() {
                    let at_ms = u64::try_from(state.began.elapsed().as_millis()).unwrap_or(u64::MAX);
                    let name = state.machine.phase().name().into();
                    state.steps.push(MorphStep { state: name, at_ms, detail });
                }
                state.running = None;
                state.step(event).await;
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
                Action::Undo | Action::Activate => self.begin(action),
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
pub(crate) fn dry_run(instance: &Instance, side: &InstanceSpec) -> Result<MorphView, OpError> {
    work::may_begin(instance)?;
    let r = instance.record();
    Ok(MorphView {
        name: r.spec.name.clone(),
        state: Phase::Idle.name().into(),
        from: r.release.clone(),
        release: r.release.clone(),
        side: Some(MorphSide {
            name: side.name.clone(),
            release: String::new(),
            cpus: side.cpus.clone(),
            memory_bytes: side.memory_bytes,
        }),
        ..MorphView::default()
    })
}
