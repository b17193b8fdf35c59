//! Looks at an instance's pulse and asks its agent for heartbeats, on time, and knows when it was late itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_platform::InstanceId;
use kmp::message::{HeartbeatReq, HeartbeatRsp, Metrics};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::children::{ChildDef, Started};
use super::connection::Command;
use super::instance::{Env, InstanceMsg, SharedId};
use super::link::Link;
use super::transport::TransportMsg;
use crate::core::health::Event;
use crate::core::measure::{BeatStats, BeatTracker, PulseTracker};
use crate::core::policy::Policy;
use crate::core::supervisor::ChildSpec;
use crate::store::{InstanceRecord, Role};
use crate::telemetry::Beats;

/// Heartbeats asked for by hand that may wait for an answer.
const MAX_PINGS: usize = 16;

/// Messages of the heartbeat actor.
pub(crate) enum HeartbeatMsg {
    /// Watch this life of the instance.
    Watch(Watch),
    /// Go on watching by another policy; silence counts from now.
    Policy(Policy),
    /// Watch nothing.
    Idle,
    /// Look and ask now.
    Probe,
    /// Look at the pulse now.
    Look,
    /// Count silence from now on.
    Remeasure,
    /// A heartbeat by hand; the answer is its round trip and the life that answered.
    Ping(oneshot::Sender<(Duration, u64)>),
    /// The agent answered.
    Answer { serial: u64, rtt: Duration, answer: Box<HeartbeatRsp> },
    #[cfg(test)]
    Panic,
}

/// What is watched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    pub(crate) incarnation: u64,
    pub(crate) policy: Policy,
    /// The agent is told that its kernel is the one that serves.
    pub(crate) serves: bool,
}

impl Watch {
    /// The life that is remembered.
    pub(crate) fn of(r: &InstanceRecord) -> Watch {
        Watch { incarnation: r.incarnation, policy: r.policy, serves: r.role == Role::Own }
    }
}

/// What was read last, for views.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readings {
    pub(crate) stats: BeatStats,
    pub(crate) answered: Option<Instant>,
    pub(crate) pulse_moved: Option<Instant>,
    pub(crate) pulse_count: Option<u64>,
    pub(crate) metrics: Option<(Instant, Metrics)>,
    pub(crate) agent_restarts: u32,
}

/// [`Readings`] shared with the instance actor.
#[derive(Clone, Default)]
pub(crate) struct SharedReadings(Arc<Mutex<Readings>>);

impl SharedReadings {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Readings> {
        // Plain figures: a panic elsewhere leaves nothing half done that matters.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What it needs.
#[derive(Clone)]
pub(crate) struct HeartbeatArgs {
    pub(crate) name: String,
    pub(crate) id: SharedId,
    pub(crate) env: Arc<Env>,
    pub(crate) link: Link<HeartbeatMsg>,
    pub(crate) owner: Link<InstanceMsg>,
    pub(crate) readings: SharedReadings,
}

struct Watched {
    incarnation: u64,
    policy: Policy,
    serves: bool,
    pulse: PulseTracker,
    beats: BeatTracker,
    pings: HashMap<u64, oneshot::Sender<(Duration, u64)>>,
    pulse_error: Option<String>,
}

pub(crate) struct HeartbeatState {
    args: HeartbeatArgs,
    metrics: Beats,
    watched: Option<Watched>,
    due: Option<Instant>,
    /// Nothing was looked at yet since the watch began.
    first: bool,
}

/// Where in an interval an instance is looked at: spread evenly, so that thousands which begin at once do not go
/// on together. The fraction is that of the golden ratio.
fn phase(id: InstanceId) -> f64 {
    (f64::from(id.0) * 0.618_033_988_75).fract()
}

impl HeartbeatState {
    fn now(&self) -> Duration {
        self.args.env.now()
    }

    /// Look at once, and then in turn.
    fn begin(&mut self) {
        self.first = true;
        self.arm(Duration::ZERO);
    }

    fn arm(&mut self, after: Duration) {
        self.due = Some(Instant::now() + after);
    }

    fn watch(&mut self, Watch { incarnation, policy, serves }: Watch) {
        let now = self.now();
        self.watched = Some(Watched {
            incarnation,
            policy,
            serves,
            pulse: PulseTracker::new(policy.pulse_silence(), now),
            beats: BeatTracker::new(policy.heartbeat_interval(), policy.heartbeat_timeout, now),
            pings: HashMap::new(),
            pulse_error: None,
        });
        *self.args.readings.lock() = Readings::default();
        self.begin();
    }

    fn policy(&mut self, policy: Policy) {
        let now = self.now();
        let Some(w) = &mut self.watched else { return };
        w.policy = policy;
        w.pulse.set_silence(policy.pulse_silence(), now);
        w.beats.set_times(policy.heartbeat_interval(), policy.heartbeat_timeout, now);
        self.begin();
    }

    fn tell(&self, incarnation: u64, event: Event) {
        self.args.owner.send(InstanceMsg::Seen { incarnation, event });
    }

    fn tick(&mut self) {
        let Some(due) = self.due.take() else { return };
        let lag = due.elapsed();
        let now = self.now();
        self.args.env.lag.record(lag, now);
        let Some(w) = &mut self.watched else { return };
        let (incarnation, interval) = (w.incarnation, w.policy.sample_interval());
        if lag > w.policy.lag_limit() {
            warn!(instance = %self.args.name, ?lag, "the supervisor itself was late: measuring anew");
            w.pulse.remeasure(now);
            w.beats.remeasure(now);
            self.tell(incarnation, Event::OwnPause(lag));
        }
        self.look();
        self.beats();
        let first = std::mem::take(&mut self.first);
        self.arm(if first { interval.mul_f64(phase(self.args.id.get())) } else { interval });
    }

    fn look(&mut self) {
        let now = self.now();
        let Some(w) = &mut self.watched else { return };
        let incarnation = w.incarnation;
        let events = match self.args.env.platform.pulse(self.args.id.get(), incarnation) {
            Ok(sample) => {
                w.pulse_error = None;
                w.pulse.look(now, &sample)
            }
            Err(error) => {
                let text = error.to_string();
                if w.pulse_error.as_ref() != Some(&text) {
                    warn!(instance = %self.args.name, incarnation, %error, "the pulse cannot be read");
                    w.pulse_error = Some(text);
                }
                w.pulse.blind(now)
            }
        };
        let mut readings = self.args.readings.lock();
        readings.pulse_moved = w.pulse.moved().map(|at| self.args.env.base + at);
        readings.pulse_count = w.pulse.slowest();
        drop(readings);
        if let Some(moved) = w.pulse.moved() {
            self.metrics.pulse_age(now.saturating_sub(moved));
        }
        for event in events {
            self.tell(incarnation, event);
        }
    }

    fn beats(&mut self) {
        let now = self.now();
        let Some(w) = &mut self.watched else { return };
        let incarnation = w.incarnation;
        let (missed, event) = w.beats.tick(now);
        let due = w.beats.due(now);
        self.args.readings.lock().stats = w.beats.stats();
        if missed > 0 {
            self.metrics.missed(missed);
        }
        if let Some(event) = event {
            self.tell(incarnation, event);
        }
        if due {
            self.ask();
        }
    }

    fn ask(&mut self) -> Option<u64> {
        let now = self.now();
        let w = self.watched.as_mut()?;
        let serial = w.beats.send(now);
        let (id, incarnation, to) = (self.args.id.get(), w.incarnation, self.args.link.clone());
        // As long as another kernel may have taken over nobody begins to serve.
        let undecided = self.args.env.directory.get(&self.args.name).is_some_and(|i| i.is_handed_over());
        let serves = w.serves && !undecided;
        let request = HeartbeatReq { metrics: true, guardian_ms: w.policy.guardian_ms(), serves };
        let beat = Command::Beat { serial, request, to };
        if let Err(command) = self.args.env.connections.command(id, incarnation, beat) {
            self.args.env.transport.send(TransportMsg::Beat { id, incarnation, command });
        }
        Some(serial)
    }

    fn ping(&mut self, reply: oneshot::Sender<(Duration, u64)>) {
        let Some(serial) = self.ask() else { return };
        if let Some(w) = &mut self.watched {
            w.pings.retain(|_, p| !p.is_closed());
            // A dropped reply tells the one who asked.
            if w.pings.len() < MAX_PINGS {
                w.pings.insert(serial, reply);
            }
        }
    }

    fn answer(&mut self, serial: u64, rtt: Duration, answer: HeartbeatRsp) {
        let now = self.now();
        let Some(w) = &mut self.watched else { return };
        if answer.incarnation != 0 && answer.incarnation != w.incarnation {
            debug!(instance = %self.args.name, incarnation = answer.incarnation, "answer of another life ignored");
            return;
        }
        let incarnation = w.incarnation;
        if w.beats.answer(serial, rtt, now) {
            self.metrics.answered(rtt);
        }
        if let Some(reply) = w.pings.remove(&serial) {
            // Who asked may have given up waiting.
            let _ = reply.send((rtt, incarnation));
        }
        let mut readings = self.args.readings.lock();
        readings.stats = w.beats.stats();
        readings.answered = Some(Instant::now());
        let restarts = answer.agent_restarts;
        if readings.agent_restarts != restarts {
            readings.agent_restarts = restarts;
            self.args.owner.send(InstanceMsg::AgentRestarted { incarnation, restarts });
        }
        let m = answer.metrics;
        if m.cpu.is_some() || m.memory.is_some() || m.io.is_some() {
            readings.metrics = Some((Instant::now(), m));
        }
        drop(readings);
        self.tell(incarnation, Event::HeartbeatOk(rtt));
    }
}

/// The actor.
pub(crate) struct Heartbeat;

impl Actor for Heartbeat {
    type Msg = HeartbeatMsg;
    type State = HeartbeatState;
    type Arguments = HeartbeatArgs;

    async fn pre_start(
        &self,
        _: ActorRef<HeartbeatMsg>,
        args: HeartbeatArgs,
    ) -> Result<HeartbeatState, Failure> {
        let metrics = Beats::of(&args.name);
        Ok(HeartbeatState { args, metrics, watched: None, due: None, first: true })
    }

    fn due(&self, state: &HeartbeatState) -> Option<Instant> {
        state.due
    }

    async fn tick(&self, _: ActorRef<HeartbeatMsg>, state: &mut HeartbeatState) -> Result<(), Failure> {
        state.tick();
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<HeartbeatMsg>,
        message: HeartbeatMsg,
        state: &mut HeartbeatState,
    ) -> Result<(), Failure> {
        state.args.link.taken();
        match message {
            HeartbeatMsg::Watch(watch) => state.watch(watch),
            HeartbeatMsg::Policy(policy) => state.policy(policy),
            HeartbeatMsg::Idle => {
                state.due = None;
                state.watched = None;
            }
            HeartbeatMsg::Probe => {
                state.look();
                state.ask();
            }
            HeartbeatMsg::Look => state.look(),
            HeartbeatMsg::Remeasure => {
                let now = state.now();
                if let Some(w) = &mut state.watched {
                    w.pulse.remeasure(now);
                    w.beats.remeasure(now);
                }
            }
            HeartbeatMsg::Ping(reply) => state.ping(reply),
            HeartbeatMsg::Answer { serial, rtt, answer } => state.answer(serial, rtt, *answer),
            #[cfg(test)]
            HeartbeatMsg::Panic => panic!("asked to panic"),
        }
        Ok(())
    }
}

/// The actor as a child.
pub(crate) fn child(args: HeartbeatArgs) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let link = args.link.clone();
            let actor = actor::spawn_linked(Heartbeat, args, parent).await.map_err(|e| e.to_string())?;
            link.set(actor.clone());
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("heartbeat"), start }
}
