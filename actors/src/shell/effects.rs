//! Carries out what a recovery decided: journals it, then does it. Long work runs in tasks of its own whose
//! results come back to the instance as messages, so this actor is always there for the next order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_control::views::{EventKind, RecoveryStep};
use kmorph_platform::{BootRequest, Booted, ExistingInstance, FenceReport, PlatformError, ReclaimReport};
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::children::{ChildDef, Started};
use super::handover::Use;
use super::instance::{Env, InstanceMsg, SharedId};
use super::link::Link;
use super::log::Draft;
use super::morph::{Seat, take_over};
use crate::core::supervisor::ChildSpec;
use crate::store::{InstanceRecord, StoreError};
use crate::telemetry;

/// Console records kept for the report of a failed start.
const CONSOLE_LINES: usize = 20;
/// Between two tries to start a kernel on what another one is about to leave.
const BUSY_AGAIN: Duration = Duration::from_millis(50);
/// Longest time to read a console.
const CONSOLE_LIMIT: Duration = Duration::from_secs(2);

/// Something to write down.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    /// A failure was first noticed then: number an incident.
    Open { noticed: Instant },
    /// A step.
    Journal { phase: &'static str, detail: String, recovered: Option<bool>, at: Instant, at_unix_ms: u64 },
}

/// Something to do, with what it needs.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// See what the platform has of the instance.
    Look,
    Boot {
        request: Box<BootRequest>,
        /// Something it needs may be another kernel's for a moment.
        patient: bool,
    },
    Fence {
        incarnation: u64,
    },
    Reclaim {
        incarnation: u64,
        release_cpus: bool,
        /// Its CPUs.
        own: Vec<u32>,
        /// CPUs besides its own, or of its own, that the primary gets back then.
        also: Vec<u32>,
    },
    Capture,
    /// Have the standby become the instance.
    TakeOver,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Done {
    Look(Result<Vec<ExistingInstance>, String>),
    Boot(Result<Booted, String>, Vec<String>),
    Fence(Result<FenceReport, String>, Vec<String>),
    Reclaim(Result<Option<ReclaimReport>, String>),
    Capture(Result<String, String>),
    TakeOver(Result<String, String>),
}

/// One decision's worth of work.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// Which life of the instance actor asks.
    pub(crate) epoch: u64,
    /// Number within that life.
    pub(crate) op: u64,
    pub(crate) orders: Vec<Order>,
    pub(crate) record: Box<InstanceRecord>,
    pub(crate) effect: Option<Effect>,
}

/// Messages of the recovery actor.
pub(crate) enum EffectsMsg {
    Run(Box<Run>),
    /// Tell this, after what was asked for before.
    Announce(Box<Draft>),
    #[cfg(test)]
    Panic,
}

/// The incident that is open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incident {
    pub(crate) number: u64,
    pub(crate) noticed: Instant,
}

/// What outlives the actors of an instance.
#[derive(Clone, Default)]
pub(crate) struct SharedIncident(Arc<Mutex<(Option<Incident>, Option<u64>)>>);

impl SharedIncident {
    pub(crate) fn get(&self) -> Option<Incident> {
        self.lock().0
    }

    pub(crate) fn set(&self, incident: Option<Incident>) {
        let mut inner = self.lock();
        inner.0 = incident;
        if let Some(incident) = incident {
            inner.1 = Some(incident.number);
        }
    }

    /// The open incident, or the one that ended just now.
    fn latest(&self) -> Option<u64> {
        self.lock().1
    }

    fn forget(&self) {
        self.lock().1 = None;
    }

    fn lock(&self) -> MutexGuard<'_, (Option<Incident>, Option<u64>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The latest work that was carried out, by epoch and number: what is sent again after this actor was
/// restarted is not done twice.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<Mutex<(u64, u64)>>);

impl Progress {
    fn lock(&self) -> MutexGuard<'_, (u64, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What it needs.
#[derive(Clone)]
pub(crate) struct EffectsArgs {
    pub(crate) name: String,
    pub(crate) id: SharedId,
    pub(crate) env: Arc<Env>,
    pub(crate) link: Link<EffectsMsg>,
    pub(crate) owner: Link<InstanceMsg>,
    pub(crate) incident: SharedIncident,
    /// One effect of an instance at a time, whatever becomes of the actor that began it.
    pub(crate) gate: Arc<tokio::sync::Mutex<()>>,
    pub(crate) progress: Progress,
    pub(crate) seat: Seat,
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl EffectsArgs {
    /// A call to the store within its limit. A store that fails is reported, and recovery goes on: a dead
    /// kernel that is not fenced is worse than a step that is not written down.
    async fn store<T>(&self, what: &str, call: impl Future<Output = Result<T, StoreError>>) -> Option<T> {
        let limit = self.env.config.store_limit;
        match timeout(limit, call).await {
            Ok(Ok(value)) => Some(value),
            Ok(Err(error)) => {
                error!(instance = %self.name, %error, "store: cannot {what}");
                None
            }
            Err(_) => {
                error!(instance = %self.name, ?limit, "store: took too long to {what}");
                None
            }
        }
    }

    async fn run(&self, mut run: Run) {
        if *self.progress.lock() >= (run.epoch, run.op) {
            return;
        }
        let mut steps = Vec::new();
        let mut ended = None;
        for order in &run.orders {
            match order {
                Order::Open { noticed } => {
                    let number = self.number().await;
                    self.incident.set(Some(Incident { number, noticed: *noticed }));
                }
                Order::Journal { phase, detail, recovered, at, at_unix_ms } => {
                    let step = self.step(&run.record, phase, detail, *recovered, *at, *at_unix_ms);
                    if let (Some(_), Some(recovered)) = (&step, recovered) {
                        let noticed = self.incident.get().map_or(*at, |i| i.noticed);
                        ended = Some((*recovered, at.saturating_duration_since(noticed)));
                        self.incident.set(None);
                    }
                    steps.extend(step);
                }
            }
        }
        run.record.incident = self.incident.get().map_or(0, |i| i.number);
        let seat = self.seat.settled(&mut run.record).await;
        self.store("write down what comes next", self.env.store.commit(&run.record, &steps)).await;
        drop(seat);
        for step in steps {
            let mut draft = Draft::new(EventKind::Recovery, step.detail)
                .of(&self.name, self.env.group_of(&self.name), step.incarnation)
                .transition(None, step.phase);
            draft.incident = Some(step.incident);
            self.env.log.say(draft);
        }
        if let Some((recovered, took)) = ended {
            telemetry::recovery_end(&self.name, recovered, took);
        }
        *self.progress.lock() = (run.epoch, run.op);
        self.owner.send(InstanceMsg::Ran { epoch: run.epoch, op: run.op });
        if let Some(effect) = run.effect {
            self.begin(run.epoch, effect, Use::of(&run.record));
        }
    }

    /// The number of a new incident. Failures in a group that follow from one another share one.
    async fn number(&self) -> u64 {
        let group = self.env.group_of(&self.name);
        if let Some(number) = group.as_ref().and_then(|g| self.env.incidents.get(g)) {
            return number;
        }
        // One that cannot be numbered in turn takes the wall clock: no other has that number.
        let number = self.store("number an incident", self.env.store.next_incident()).await;
        let number = number.unwrap_or_else(unix_ms);
        match group {
            Some(group) => self.env.incidents.open(&group, number),
            None => number,
        }
    }

    /// A step as it is written down; none outside an incident.
    fn step(
        &self,
        record: &InstanceRecord,
        phase: &'static str,
        detail: &str,
        recovered: Option<bool>,
        at: Instant,
        at_unix_ms: u64,
    ) -> Option<RecoveryStep> {
        let Some(incident) = self.incident.get() else {
            info!(instance = %self.name, incarnation = record.incarnation, phase, "{detail}");
            return None;
        };
        let offset = at.saturating_duration_since(incident.noticed);
        info!(
            instance = %self.name, incarnation = record.incarnation, incident = incident.number, phase,
            offset_us = offset.as_micros() as u64, "{detail}"
        );
        telemetry::recovery_step(phase);
        Some(RecoveryStep {
            incident: incident.number,
            instance: self.name.clone(),
            incarnation: record.incarnation,
            at_unix_ms,
            offset_us: u64::try_from(offset.as_micros()).unwrap_or(u64::MAX),
            phase: phase.to_owned(),
            detail: detail.to_owned(),
            recovered,
        })
    }

    /// Start the effect in a task of its own and see to it that a result comes back.
    fn begin(&self, epoch: u64, effect: Effect, handover: Option<Use>) {
        let (args, owner) = (self.clone(), self.owner.clone());
        let lost = lost(&effect);
        let task = tokio::spawn(async move {
            let _gate = args.gate.lock().await;
            args.carry_out(effect, handover).await
        });
        tokio::spawn(async move {
            let done = match task.await {
                Ok(done) => done,
                Err(error) => lost(error.to_string()),
            };
            owner.send(InstanceMsg::Done { epoch, done });
        });
    }

    async fn carry_out(&self, effect: Effect, handover: Option<Use>) -> Done {
        let (platform, id, limit) = (&self.env.platform, self.id.get(), self.env.config.effect_limit);
        match effect {
            Effect::Look => {
                Done::Look(within(limit, "ask the platform what runs", platform.existing()).await)
            }
            Effect::Boot { request, patient } => match self.boot(&request, patient, handover).await {
                Ok(booted) => Done::Boot(Ok(booted), vec![]),
                Err(why) => Done::Boot(Err(why), self.console().await),
            },
            Effect::Fence { incarnation } => {
                let fenced = timeout(limit, platform.fence(id, incarnation)).await;
                let result = match fenced {
                    // Nothing of it is there, so nothing of it can run.
                    Ok(Err(PlatformError::Unknown(_))) => {
                        Ok(FenceReport { cpus: vec![], complete: true, took: Duration::ZERO })
                    }
                    Ok(result) => result.map_err(|e| e.to_string()),
                    Err(_) => Err(format!("stopping its CPUs took longer than {limit:?}")),
                };
                Done::Fence(result, self.console().await)
            }
            Effect::Reclaim { incarnation, release_cpus, own, mut also } => {
                let reclaimed = timeout(limit, platform.reclaim(id, incarnation, release_cpus)).await;
                if let (Ok(Ok(_) | Err(PlatformError::Unknown(_))), Some(handover)) = (&reclaimed, handover) {
                    handover.after_reclaim(&**platform).await;
                }
                // A daemon before this one has taken it back, and perhaps not seen to the rest.
                if release_cpus && matches!(reclaimed, Ok(Err(PlatformError::Unknown(_)))) {
                    also.extend(own);
                }
                if !also.is_empty()
                    && let Err(error) = platform.release_cpus(&also).await
                {
                    warn!(instance = %self.name, cpus = ?also, %error, "CPUs that nobody uses stay in the pool");
                }
                match reclaimed {
                    Ok(Err(PlatformError::Unknown(_))) => Done::Reclaim(Ok(None)),
                    Ok(result) => Done::Reclaim(result.map(Some).map_err(|e| e.to_string())),
                    Err(_) => Done::Reclaim(Err(format!("it took longer than {limit:?}"))),
                }
            }
            Effect::Capture => Done::Capture(Err("this daemon has no dump writer".into())),
            Effect::TakeOver => {
                Done::TakeOver(take_over(&self.env, &self.name, &self.seat, self.incident.get()).await)
            }
        }
    }

    /// Start a kernel, with the memory it hands over. Not limited from here: a start that is dropped half-way would leave
    /// nobody responsible.
    async fn boot(
        &self,
        request: &BootRequest,
        patient: bool,
        handover: Option<Use>,
    ) -> Result<Booted, String> {
        let platform = &*self.env.platform;
        let Some(handover) = handover else {
            return self.start(request, patient).await.map_err(|e| e.to_string());
        };
        handover.before_boot(platform, self.env.config.effect_limit).await?;
        let booted = match self.start(request, patient).await {
            Ok(booted) => booted,
            Err(error) => {
                handover.after_reclaim(platform).await;
                return Err(error.to_string());
            }
        };
        let (id, incarnation) = (request.spec.id, request.incarnation);
        let Err(why) = handover.after_boot(platform, id, incarnation).await else { return Ok(booted) };
        // A start that fails leaves nothing behind.
        let undone = async {
            let fenced = platform.fence(id, incarnation).await?;
            if fenced.complete { platform.reclaim(id, incarnation, true).await.map(drop) } else { Ok(()) }
        };
        match undone.await {
            Ok(()) => handover.after_reclaim(platform).await,
            Err(error) => error!(instance = %self.name, %error, "a start that failed left something behind"),
        }
        Err(why)
    }

    /// Start a kernel, as soon as what it needs is free.
    async fn start(&self, request: &BootRequest, patient: bool) -> Result<Booted, PlatformError> {
        let until = Instant::now() + self.env.config.effect_limit;
        loop {
            match self.env.platform.boot(request).await {
                Err(PlatformError::Busy(_)) if patient && Instant::now() < until => sleep(BUSY_AGAIN).await,
                done => return done,
            }
        }
    }

    /// The last lines of the instance's console.
    async fn console(&self) -> Vec<String> {
        match timeout(CONSOLE_LIMIT, self.env.platform.console(self.id.get(), 0)).await {
            Ok(Ok(log)) => {
                let skip = log.records.len().saturating_sub(CONSOLE_LINES);
                log.records.into_iter().skip(skip).map(|r| r.text).collect()
            }
            Ok(Err(error)) => {
                warn!(instance = %self.name, %error, "its console cannot be read");
                vec![]
            }
            Err(_) => {
                warn!(instance = %self.name, limit = ?CONSOLE_LIMIT, "reading its console took too long");
                vec![]
            }
        }
    }
}

async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = Result<T, PlatformError>>,
) -> Result<T, String> {
    match timeout(limit, call).await {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err(format!("to {what} took longer than {limit:?}")),
    }
}

/// What an effect comes to when its task panicked.
fn lost(effect: &Effect) -> fn(String) -> Done {
    match effect {
        Effect::Look => |e| Done::Look(Err(e)),
        Effect::Boot { .. } => |e| Done::Boot(Err(e), vec![]),
        Effect::Fence { .. } => |e| Done::Fence(Err(e), vec![]),
        Effect::Reclaim { .. } => |e| Done::Reclaim(Err(e)),
        Effect::Capture => |e| Done::Capture(Err(e)),
        Effect::TakeOver => |e| Done::TakeOver(Err(e)),
    }
}

/// The actor.
pub(crate) struct Effects;

impl Actor for Effects {
    type Msg = EffectsMsg;
    type State = EffectsArgs;
    type Arguments = EffectsArgs;

    async fn pre_start(&self, _: ActorRef<EffectsMsg>, args: EffectsArgs) -> Result<EffectsArgs, Failure> {
        Ok(args)
    }

    async fn handle(
        &self,
        _: ActorRef<EffectsMsg>,
        message: EffectsMsg,
        state: &mut EffectsArgs,
    ) -> Result<(), Failure> {
        state.link.taken();
        match message {
            // Boxed: most of the time there is nothing to do, and memory for it is not kept.
            EffectsMsg::Run(run) => Box::pin(state.run(*run)).await,
            EffectsMsg::Announce(mut draft) => {
                draft.incident = state.incident.latest().filter(|_| draft.kind == EventKind::State);
                if state.incident.get().is_none() {
                    // What follows belongs to no incident.
                    state.incident.forget();
                }
                state.env.log.say(*draft);
            }
            #[cfg(test)]
            EffectsMsg::Panic => panic!("asked to panic"),
        }
        Ok(())
    }
}

/// The actor as a child.
pub(crate) fn child(args: EffectsArgs) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let link = args.link.clone();
            let actor = actor::spawn_linked(Effects, args, parent).await.map_err(|e| e.to_string())?;
            link.set(actor.clone());
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("recovery"), start }
}
