//! One actor for each kernel instance: it owns the instance's state machines and its heartbeat and recovery
//! actors.

mod drive;
mod operator;
mod part;
mod standby;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use super::actor::{self, Actor, ActorCell, ActorRef, Ended, Failure};
use futures::FutureExt;
use kmorph_control::error::OpError;
use kmorph_control::views::{HealthView, HeartbeatView, InstanceState, InstanceView};
use kmorph_platform::{Growth, InstanceId, InstanceSpec, Platform, PlatformEvent};
use kmp::message::Hello;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::warn;

use super::children::{ChildDef, Children, Started, Step};
use super::directory::Directory;
use super::effects::{self, Done, EffectsArgs, EffectsMsg, Progress, Run, SharedIncident};
use super::groups::{GroupIncidents, GroupsMsg};
use super::heartbeat::{self, HeartbeatArgs, HeartbeatMsg, SharedReadings};
use super::link::Link;
use super::log::EventLog;
use super::morph::{self, MorphArgs, MorphMsg, Seat};
use super::supervisor::SupervisorMsg;
use super::switch::Switch;
use super::topology::Broadcast;
use super::transport::{Connections, TransportMsg};
use crate::config::{Definitions, Settings, TreeConfig};
use crate::core::health::{self, Health};
use crate::core::morph as core_morph;
use crate::core::policy::{Patch, Policy};
use crate::core::recovery::{Recovery, Standing};
use crate::core::supervisor::{ChildSpec, Down, Event as SupervisorEvent, Flags, Strategy};
use crate::store::{InstanceRecord, Store};
use crate::telemetry::Lag;
use standby::Beside;
pub(crate) use standby::StandbyMsg;

/// What all actors of the tree share.
pub(crate) struct Env {
    pub(crate) config: TreeConfig,
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) transport: Link<TransportMsg>,
    pub(crate) connections: Connections,
    pub(crate) lag: Lag,
    pub(crate) base: Instant,
    pub(crate) log: EventLog,
    pub(crate) groups: Link<GroupsMsg>,
    pub(crate) incidents: GroupIncidents,
    pub(crate) settings: RwLock<Settings>,
    pub(crate) directory: Directory,
    pub(crate) definitions: Arc<dyn Definitions>,
    /// The supervisor of the instances.
    pub(crate) instances: Link<SupervisorMsg>,
    /// One change of the directory at a time.
    pub(crate) admission: tokio::sync::Mutex<()>,
    /// What is published of instances.
    pub(crate) switch: Switch,
    /// Which instances there are, as all of them are told.
    pub(crate) topology: Broadcast,
}

impl Env {
    /// Time since the tree started, which the state machines count in.
    pub(crate) fn now(&self) -> Duration {
        self.base.elapsed()
    }

    /// Policies and groups, as they are configured now.
    pub(crate) fn settings(&self) -> RwLockReadGuard<'_, Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these are configured.
    pub(crate) fn set_settings(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// The policy of an instance. What operators set is left out, with a warning, when the configuration was
    /// changed behind the daemon's back so that both contradict each other.
    pub(crate) fn policy(&self, name: &str, overrides: &Patch) -> Policy {
        let settings = self.settings();
        settings.policy(name, overrides).unwrap_or_else(|error| {
            warn!(instance = %name, %error, "what operators set contradicts the configuration and is left out");
            settings.policy(name, &Patch::default()).unwrap_or(settings.defaults)
        })
    }

    /// The group an instance belongs to.
    pub(crate) fn group_of(&self, name: &str) -> Option<String> {
        let settings = self.settings();
        settings.groups.iter().find(|g| g.members.iter().any(|m| m == name)).map(|g| g.name.clone())
    }
}

/// What a start needs.
pub(crate) struct Plan {
    pub(crate) spec: InstanceSpec,
    pub(crate) policy: Policy,
    pub(crate) overrides: Patch,
    pub(crate) kernel: std::path::PathBuf,
    pub(crate) initramfs: Option<std::path::PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) publish: Vec<kmorph_control::Publish>,
    pub(crate) handover: Option<crate::store::Handover>,
    /// What it gets while it runs.
    pub(crate) growth: Growth,
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T, OpError>>;

/// Timers of an instance actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Timer {
    Health(health::Timer),
    Restart,
    Look,
    Parted,
    Standby,
}

/// Messages of an instance actor.
pub(crate) enum InstanceMsg {
    // Operators.
    Spawn {
        plan: Box<Plan>,
        wait: bool,
        reply: Reply<InstanceView>,
    },
    Terminate {
        force: bool,
        reply: Reply<InstanceView>,
    },
    Recover {
        reply: Reply<InstanceView>,
    },
    SetPolicy {
        policy: Policy,
        overrides: Patch,
        reply: Option<oneshot::Sender<()>>,
    },
    Maintenance {
        on: bool,
        reply: oneshot::Sender<InstanceView>,
    },
    /// What its group wants of it.
    Group(GroupOrder),
    /// Groups were changed: say where it stands.
    Regroup,
    View(oneshot::Sender<InstanceView>),
    HeartbeatView(oneshot::Sender<HeartbeatView>),
    HealthView(oneshot::Sender<HealthView>),
    // What is seen of the instance.
    /// Its guardian restarted its agent; so often in this life.
    AgentRestarted {
        incarnation: u64,
        restarts: u32,
    },
    Seen {
        incarnation: u64,
        event: health::Event,
    },
    Platform(PlatformEvent),
    ChannelUp {
        incarnation: u64,
        peer: Hello,
    },
    ChannelDown {
        incarnation: u64,
        why: String,
    },
    /// For the actor of its morph, which is started when there is none.
    Morph(MorphMsg),
    /// About a standby.
    Standby(StandbyMsg),
    /// Write down what is remembered; answered when that is done.
    Persist(oneshot::Sender<()>),
    /// Stop watching, decide nothing, and wait to be told who it is. Refused when it is not merely watched.
    Part(oneshot::Sender<Result<InstanceRecord, String>>),
    /// Stand aside for so much longer.
    StandAside(Duration),
    /// Go on from what is remembered now.
    Unite,
    /// What the journal has of it.
    Recalled {
        epoch: u64,
        found: Box<Result<InstanceRecord, String>>,
    },
    /// Look at the pulse now: an event may have been lost.
    Look,
    // What comes of decisions.
    Ran {
        epoch: u64,
        op: u64,
    },
    Done {
        epoch: u64,
        done: Done,
    },
    Asked {
        epoch: u64,
        result: Result<String, String>,
    },
    Timer {
        timer: Timer,
        round: u64,
    },
    /// The daemon ends: stop the actors, leave the instance alone.
    Quit,
    #[cfg(test)]
    Panic,
}

impl InstanceMsg {
    /// Whether it means as much later. What is set has to wait when the instance stands aside, for it has to be set in whatever
    /// becomes of it, and when others wait that were there before: `behind`.
    fn can_wait(&self, behind: bool) -> bool {
        match self {
            InstanceMsg::Spawn { .. }
            | InstanceMsg::Terminate { .. }
            | InstanceMsg::Recover { .. }
            | InstanceMsg::Group(_) => true,
            InstanceMsg::SetPolicy { .. } | InstanceMsg::Maintenance { .. } => behind,
            _ => false,
        }
    }
}

/// What a group wants of a member.
#[derive(Clone, Debug)]
pub(crate) enum GroupOrder {
    /// Stop, to be started again later; why.
    Stop(String),
    Start,
    /// Stay stopped; why.
    GiveUp(String),
}

/// Why an agent is being asked to stop its workload.
#[derive(Clone, Debug)]
enum Asking {
    Terminate,
    Group(String),
}

/// The number of an instance, shared by its actors.
#[derive(Clone)]
pub(crate) struct SharedId(Arc<AtomicU16>);

impl SharedId {
    fn new(id: InstanceId) -> SharedId {
        SharedId(Arc::new(AtomicU16::new(id.0)))
    }

    pub(crate) fn get(&self) -> InstanceId {
        InstanceId(self.0.load(Ordering::Relaxed))
    }

    fn set(&self, id: InstanceId) {
        self.0.store(id.0, Ordering::Relaxed);
    }
}

/// An instance as others know it: its name, number, link, and what outlives its actor.
pub(crate) struct Instance {
    pub(crate) name: String,
    number: SharedId,
    pub(crate) link: Link<InstanceMsg>,
    pub(crate) heartbeat: Link<HeartbeatMsg>,
    pub(crate) recovery: Link<EffectsMsg>,
    pub(crate) morph: Link<MorphMsg>,
    record: Mutex<InstanceRecord>,
    readings: SharedReadings,
    incident: SharedIncident,
    gate: Arc<tokio::sync::Mutex<()>>,
    progress: Progress,
    seat: Seat,
    epoch: AtomicU64,
}

impl Instance {
    /// An instance as it is remembered.
    pub(crate) fn new(record: InstanceRecord) -> Instance {
        let incident = SharedIncident::default();
        if record.incident != 0 {
            // When it was noticed is not remembered: offsets go on from now.
            incident.set(Some(effects::Incident { number: record.incident, noticed: Instant::now() }));
        }
        Instance {
            name: record.spec.name.clone(),
            number: SharedId::new(record.spec.id),
            link: Link::new("instance"),
            heartbeat: Link::new("heartbeat"),
            recovery: Link::new("recovery"),
            morph: Link::new("morph"),
            record: Mutex::new(record),
            readings: SharedReadings::default(),
            incident,
            gate: Arc::default(),
            progress: Progress::default(),
            seat: Seat::default(),
            epoch: AtomicU64::new(0),
        }
    }

    /// Its number. A morph gives it another: that of the new kernel.
    pub(crate) fn id(&self) -> InstanceId {
        self.number.get()
    }

    /// From now on it has this number.
    pub(crate) fn renumber(&self, id: InstanceId) {
        self.number.set(id);
    }

    /// From now on it is another kernel: this is what is remembered of it.
    pub(crate) fn become_record(&self, record: InstanceRecord) {
        self.number.set(record.spec.id);
        *self.record() = record;
    }

    /// Whether another kernel may have taken over from this one by itself, and nobody knows yet.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.record().morph.as_ref().is_some_and(|m| m.handed_over)
    }

    /// What is remembered of it.
    pub(crate) fn record(&self) -> MutexGuard<'_, InstanceRecord> {
        // A panic between two assignments leaves a record that resuming corrects by looking at the platform.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone)]
pub(crate) struct InstanceArgs {
    pub(crate) instance: Arc<Instance>,
    pub(crate) env: Arc<Env>,
}

/// Somebody waits for this.
struct Waiter {
    wish: Wish,
    reply: Reply<InstanceView>,
}

/// What somebody is told when it is written down, so that no daemon after this one knows less than he does.
enum Answer {
    Operator(Reply<InstanceView>, Result<InstanceView, OpError>),
    Policy(oneshot::Sender<()>),
    Maintenance(oneshot::Sender<InstanceView>, InstanceView),
    Parted(oneshot::Sender<Result<InstanceRecord, String>>, Box<InstanceRecord>),
}

impl Answer {
    fn give(self) {
        // Who asked may have given up waiting.
        match self {
            Answer::Operator(reply, result) => drop(reply.send(result)),
            Answer::Policy(reply) => drop(reply.send(())),
            Answer::Maintenance(reply, view) => drop(reply.send(view)),
            Answer::Parted(reply, record) => drop(reply.send(Ok(*record))),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Start,
    Serve,
    Recover,
    Stop,
}

pub(crate) struct InstanceActorState {
    args: InstanceArgs,
    children: Children,
    epoch: u64,
    health: Health,
    /// Absent until the platform was asked what there is.
    machine: Option<Recovery>,
    next_op: u64,
    /// Work the recovery actor has not acknowledged.
    unacknowledged: VecDeque<Run>,
    waiters: Vec<Waiter>,
    /// Answers, each with the work that has to be acknowledged before.
    answers: VecDeque<(u64, Answer)>,
    /// Wishes that came before the platform was asked.
    deferred: Vec<InstanceMsg>,
    timers: HashMap<Timer, AbortHandle>,
    /// Which setting of each timer is valid.
    rounds: HashMap<Timer, u64>,
    round: u64,
    watching: bool,
    channel: Option<Hello>,
    first_notice: Option<Instant>,
    /// The agent is being asked to stop its workload.
    asking: Option<Asking>,
    console: Vec<String>,
    booted: Option<Instant>,
    shown: Option<InstanceState>,
    /// Where the group was told that it stands.
    told: Option<Standing>,
    agent_restarts: u32,
    /// It waits to be told who it is.
    parted: bool,
    /// Its kernel runs, or is being started.
    lives: bool,
    /// Its standby.
    beside: Beside,
}

impl Drop for InstanceActorState {
    fn drop(&mut self) {
        for timer in self.timers.values() {
            timer.abort();
        }
    }
}

/// Its own actors may fail this often before the instance actor itself is started anew.
const FLAGS: Flags = Flags {
    strategy: Strategy::OneForOne,
    intensity: 5,
    period: Duration::from_secs(10),
    auto_shutdown: crate::core::supervisor::AutoShutdown::Never,
};

/// The actor.
pub(crate) struct InstanceActor;

impl Actor for InstanceActor {
    type Msg = InstanceMsg;
    type State = InstanceActorState;
    type Arguments = InstanceArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<InstanceMsg>,
        args: InstanceArgs,
    ) -> Result<InstanceActorState, Failure> {
        let (instance, env) = (&args.instance, &args.env);
        // Its own actors may have something to say before this one is up.
        instance.link.set(myself.clone());
        let children = vec![
            heartbeat::child(HeartbeatArgs {
                name: instance.name.clone(),
                id: instance.number.clone(),
                env: env.clone(),
                link: instance.heartbeat.clone(),
                owner: instance.link.clone(),
                readings: instance.readings.clone(),
            }),
            effects::child(EffectsArgs {
                name: instance.name.clone(),
                id: instance.number.clone(),
                env: env.clone(),
                link: instance.recovery.clone(),
                owner: instance.link.clone(),
                incident: instance.incident.clone(),
                gate: instance.gate.clone(),
                progress: instance.progress.clone(),
                seat: instance.seat.clone(),
            }),
        ];
        let mut children = Children::new(myself.cell(), &instance.name, FLAGS, children)?;
        children.step(SupervisorEvent::Start).await;
        if !children.all_run() {
            children.abandon().await;
            return Err(format!("an actor of instance {} did not start", instance.name).into());
        }
        let policy = instance.record().policy;
        let epoch = instance.epoch.fetch_add(1, Ordering::Relaxed) + 1;
        let seed = env.config.seed ^ (u64::from(instance.id().0) << 32);
        let mut state = InstanceActorState {
            children,
            epoch,
            health: Health::new(policy, seed),
            machine: None,
            next_op: 0,
            unacknowledged: VecDeque::new(),
            waiters: Vec::new(),
            answers: VecDeque::new(),
            deferred: Vec::new(),
            timers: HashMap::new(),
            rounds: HashMap::new(),
            round: 0,
            watching: false,
            channel: None,
            first_notice: None,
            asking: None,
            console: Vec::new(),
            booted: None,
            shown: None,
            told: None,
            agent_restarts: 0,
            parted: false,
            lives: false,
            beside: Beside::default(),
            args,
        };
        if state.args.instance.record().maintenance {
            state.health.step(Duration::ZERO, health::Event::Maintenance(true));
        }
        state.look_at_platform();
        // Nothing is left to do for one that has ended.
        state.args.instance.record().morph.take_if(|m| m.saved.phase == core_morph::Phase::Idle);
        if state.args.instance.record().morph.is_some() {
            // A daemon before began it, or its actor was started anew with this one.
            Box::pin(state.morph(None)).await;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<InstanceMsg>,
        message: InstanceMsg,
        state: &mut InstanceActorState,
    ) -> Result<(), Failure> {
        state.args.instance.link.taken();
        if let InstanceMsg::Quit = message {
            // Boxed, as below: memory for what is rare is not kept.
            let step = Box::pin(state.quit()).await;
            return settle(state, &step);
        }
        if let InstanceMsg::Morph(message) = message {
            Box::pin(state.morph(Some(message))).await;
            return Ok(());
        }
        if let InstanceMsg::Spawn { .. } = &message {
            Box::pin(state.make_room()).await;
        }
        state.message(message);
        state.look_at_standby();
        state.show();
        state.stand(false);
        Ok(())
    }

    async fn child_ended(
        &self,
        myself: ActorRef<InstanceMsg>,
        ended: Ended,
        state: &mut InstanceActorState,
    ) -> Result<(), Failure> {
        let step = Box::pin(state.children.ended(ended)).await;
        Box::pin(state.morph_ended()).await;
        for child in &step.started {
            warn!(instance = %state.args.instance.name, actor = %child, "actor was started anew");
            state.child_is_back(child);
        }
        if step.down == Some(Down::Shutdown) {
            myself.stop();
        }
        settle(state, &step)
    }
}

fn settle(state: &InstanceActorState, step: &Step) -> Result<(), Failure> {
    match step.down {
        None | Some(Down::Shutdown) => Ok(()),
        Some(why) => Err(format!("actors of instance {} fail: {why:?}", state.args.instance.name).into()),
    }
}

/// An instance as a child of the instances' supervisor.
pub(crate) fn child(args: InstanceArgs) -> ChildDef {
    let mut spec = ChildSpec::new(args.instance.name.clone());
    // Its own two actors have this long each.
    let limit = args.env.config.shutdown_limit;
    spec.shutdown = crate::core::supervisor::Shutdown::Limit(limit * 2);
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let actor = actor::spawn_linked(InstanceActor, args, parent).await.map_err(|e| e.to_string())?;
            let cell = actor.cell();
            let stop = move || {
                // An actor that is gone needs no stop.
                let _ = actor.send_message(InstanceMsg::Quit);
            };
            Ok(Started { cell, stop: Box::new(stop) })
        }
        .boxed()
    });
    ChildDef { spec, start }
}
