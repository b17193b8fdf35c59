//! A platform whose kernels do what a test says, in tokio's (paused) time.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kmorph_platform::*;
use kmp::io::Connection;
use kmp::message::{ByeAck, HeartbeatReq, HeartbeatRsp, Hello, Message};
use kmp::session::Event;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::service;
use super::workload::{Outcome, Workloads};
use crate::core::policy::Policy;

/// Port of the service that speaks the session protocol.
pub const SESSIONS: u32 = 6000;
const PERIOD: Duration = Duration::from_millis(10);

/// What the next call does.
#[derive(Clone, Debug)]
pub enum Next {
    Fail(&'static str),
    /// It takes this long.
    Late(Duration),
    /// A fence that leaves this CPU running.
    Partial(u32),
    /// It does not return before the gate is opened.
    Block(Arc<Notify>),
    /// It is done, and the answer is lost when the gate is opened.
    Unanswered(Arc<Notify>),
    Panic,
    /// The kernel dies of it.
    Die,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    Answers,
    Silent,
    /// Takes connections only after the kernel ran for this long.
    After(Duration),
    Never,
}

struct Kernel {
    incarnation: u64,
    release: String,
    started: Instant,
    /// Beats stopped at this count.
    frozen: Option<u64>,
    state: KernelState,
    agent: watch::Sender<Agent>,
    running: bool,
    region: MemoryRange,
    cpus: Vec<u32>,
}

impl Kernel {
    fn beats(&self) -> u64 {
        self.frozen.unwrap_or((self.started.elapsed().as_millis() / PERIOD.as_millis()) as u64 + 1)
    }
}

#[derive(Default)]
struct State {
    kernels: HashMap<InstanceId, Kernel>,
    next: HashMap<&'static str, Vec<Next>>,
    log: Vec<(Instant, String)>,
    agent: HashMap<InstanceId, Agent>,
    /// State a kernel has from its first moment.
    born: HashMap<InstanceId, KernelState>,
    no_pulse: Vec<InstanceId>,
    handovers: Vec<HandoverRegion>,
    windows: Vec<u64>,
    /// The next start under this name fails.
    fails: Option<&'static str>,
}

pub struct Fake {
    pub workloads: Arc<Workloads>,
    state: Mutex<State>,
    changed: Notify,
    events: Mutex<mpsc::Sender<PlatformEvent>>,
    source: Mutex<Option<mpsc::Receiver<PlatformEvent>>>,
}

impl Fake {
    pub fn new() -> Arc<Fake> {
        let (events, source) = mpsc::channel(64);
        Arc::new(Fake {
            workloads: Arc::default(),
            state: Mutex::default(),
            changed: Notify::new(),
            events: Mutex::new(events),
            source: Mutex::new(Some(source)),
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }

    fn kernel<T>(&self, id: u16, f: impl FnOnce(&mut Kernel) -> T) -> T {
        self.with(|s| f(s.kernels.get_mut(&InstanceId(id)).expect("the kernel runs")))
    }

    /// What the next calls of this kind do; then they succeed.
    pub fn script(&self, call: &'static str, next: &[Next]) {
        self.with(|s| s.next.insert(call, next.iter().rev().cloned().collect()));
    }

    /// The next kernel that is to be stopped is not, however often that is tried.
    pub fn never_stops(&self) {
        self.script("fence", &vec![Next::Fail("stuck"); Policy::default().fence_tries as usize]);
    }

    /// The next start of an instance of this name fails.
    pub fn fail_boot_of(&self, name: &'static str) {
        self.with(|s| s.fails = Some(name));
    }

    pub fn agent(&self, id: u16, agent: Agent) {
        self.with(|s| {
            s.agent.insert(InstanceId(id), agent);
            if let Some(k) = s.kernels.get(&InstanceId(id)) {
                k.agent.send_replace(agent);
            }
        });
    }

    pub fn born(&self, id: u16, state: KernelState) {
        self.with(|s| s.born.insert(InstanceId(id), state));
    }

    pub fn born_without_pulse(&self, id: u16) {
        self.with(|s| s.no_pulse.push(InstanceId(id)));
    }

    /// A new daemon: events can be taken again.
    pub fn rewind(&self) {
        let (events, source) = mpsc::channel(64);
        *self.source.lock().unwrap() = Some(source);
        *self.events.lock().unwrap() = events;
    }

    pub fn hang(&self, id: u16) {
        self.freeze(id);
        self.kernel(id, |k| k.agent.send_replace(Agent::Silent));
    }

    pub fn freeze(&self, id: u16) {
        self.kernel(id, |k| k.frozen = Some(k.beats()));
    }

    pub fn thaw(&self, id: u16) {
        self.kernel(id, |k| k.frozen = None);
    }

    /// The kernel panics and its notice arrives.
    pub async fn panic(&self, id: u16, reason: &str) {
        self.hang(id);
        self.kernel(id, |k| self.workloads.end((InstanceId(id), k.incarnation)));
        let incarnation = self.kernel(id, |k| {
            k.state = KernelState::Panicked(reason.into());
            k.incarnation
        });
        self.event(id, incarnation, PlatformEventKind::Panic(reason.into())).await;
    }

    /// The kernel panics and its notice is lost.
    pub fn panic_unseen(&self, id: u16) {
        self.kernel(id, |k| k.state = KernelState::Panicked("unseen".into()));
    }

    pub async fn event(&self, id: u16, incarnation: u64, kind: PlatformEventKind) {
        let event = PlatformEvent { id: InstanceId(id), incarnation, age: Duration::from_micros(40), kind };
        let events = self.events.lock().unwrap().clone();
        events.send(event).await.unwrap();
    }

    pub fn running(&self, id: u16) -> Option<u64> {
        self.with(|s| s.kernels.get(&InstanceId(id)).filter(|k| k.running).map(|k| k.incarnation))
    }

    /// What it had was taken back, by a call whose end nobody saw.
    pub fn gone(&self, id: u16) {
        self.with(|s| s.kernels.remove(&InstanceId(id)));
    }

    /// Handover regions: key, writer.
    pub fn handovers(&self) -> Vec<(u64, Option<u16>)> {
        self.with(|s| s.handovers.iter().map(|h| (h.key, h.writer.map(|w| w.0))).collect())
    }

    /// Calls so far, such as "boot 1 2" (instance, incarnation).
    pub fn log(&self) -> Vec<String> {
        self.with(|s| s.log.iter().map(|(_, l)| l.clone()).collect())
    }

    pub fn count(&self, prefix: &str) -> usize {
        self.log().iter().filter(|l| l.starts_with(prefix)).count()
    }

    /// Wait until this call was made; when it was.
    pub async fn called(&self, call: &str) -> Instant {
        let limit = Instant::now() + super::PATIENCE;
        loop {
            let changed = self.changed.notified();
            if let Some(at) = self.with(|s| s.log.iter().find(|(_, l)| l == call).map(|(at, _)| *at)) {
                return at;
            }
            if tokio::time::timeout_at(limit, changed).await.is_err() {
                panic!("{call} is never called: {:?}", self.log());
            }
        }
    }

    async fn call(&self, kind: &'static str, text: String) -> Option<Next> {
        let next = self.with(|s| {
            s.log.push((Instant::now(), text));
            s.next.get_mut(kind).and_then(Vec::pop)
        });
        self.changed.notify_waiters();
        match next {
            Some(Next::Block(gate)) => {
                gate.notified().await;
                None
            }
            Some(Next::Late(time)) => {
                tokio::time::sleep(time).await;
                None
            }
            Some(Next::Panic | Next::Die) => panic!("scripted panic in {kind}"),
            next => next,
        }
    }

    fn current(&self, id: InstanceId, asked: u64) -> Result<(), PlatformError> {
        self.with(|s| match s.kernels.get(&id) {
            None => Err(PlatformError::Unknown(id)),
            Some(k) if k.incarnation != asked => {
                Err(PlatformError::StaleIncarnation { id, asked, current: k.incarnation })
            }
            Some(_) => Ok(()),
        })
    }
}

#[async_trait]
impl Platform for Fake {
    fn kind(&self) -> PlatformKind {
        PlatformKind::Process
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        Ok(self.with(|s| {
            let lent = |apic_id| s.kernels.values().any(|k| k.cpus.contains(&apic_id));
            let cpu = |apic_id| CpuInfo {
                apic_id,
                number: apic_id,
                state: if lent(apic_id) { CpuState::Lent } else { CpuState::Online },
                owner: None,
                boot: apic_id == 0,
            };
            Inventory {
                cpus: (0..12).map(cpu).collect(),
                pool: vec![MemoryRange { base: 1 << 30, size: 2 << 30 }],
                used: s.kernels.iter().map(|(id, k)| (k.region, *id)).collect(),
                memory_block: 128 << 20,
            }
        }))
    }

    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError> {
        if let Some(Next::Fail(why)) = self.call("existing", "existing".into()).await {
            return Err(PlatformError::os("existing", why));
        }
        Ok(self.with(|s| {
            s.kernels
                .iter()
                .map(|(id, k)| ExistingInstance {
                    id: *id,
                    incarnation: k.incarnation,
                    region: k.region,
                    cpus: k.cpus.clone(),
                    running: k.running,
                })
                .collect()
        }))
    }

    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>> {
        self.source.lock().unwrap().take()
    }

    async fn check(&self, request: &BootRequest) -> Result<(), PlatformError> {
        if request.kernel == Path::new("/bad") {
            return Err(PlatformError::BadImage("/bad: not a bzImage".into()));
        }
        let taken = |k: &Kernel| k.running && k.cpus.iter().any(|c| request.spec.cpus.contains(c));
        if self.with(|s| s.kernels.values().any(taken)) {
            return Err(PlatformError::Busy(format!("CPUs {:?} are taken", request.spec.cpus)));
        }
        Ok(())
    }

    async fn boot(&self, r: &BootRequest) -> Result<Booted, PlatformError> {
        let id = r.spec.id;
        let next = self.call("boot", format!("boot {id} {}", r.incarnation)).await;
        if let Some(Next::Fail(why)) = next {
            return Err(PlatformError::BadImage(why.into()));
        }
        if self.with(|s| s.fails.take_if(|name| *name == r.spec.name)).is_some() {
            return Err(PlatformError::BadImage("it does not start".into()));
        }
        let region = MemoryRange { base: u64::from(id.0) << 30, size: r.spec.memory_bytes };
        let release = if r.kernel == Path::new("/new") { "6.18.1" } else { "6.12.9" };
        self.with(|s| {
            assert!(!s.kernels.contains_key(&id), "instance {id} is started while it owns resources");
            let agent = s.agent.get(&id).copied().unwrap_or(Agent::Answers);
            let kernel = Kernel {
                incarnation: r.incarnation,
                release: release.into(),
                started: Instant::now(),
                frozen: s.no_pulse.contains(&id).then_some(0),
                state: s.born.get(&id).cloned().unwrap_or(KernelState::Ready),
                agent: watch::Sender::new(agent),
                running: true,
                region,
                cpus: r.spec.cpus.clone(),
            };
            s.kernels.insert(id, kernel);
            self.workloads.boot((id, r.incarnation));
        });
        let took = Duration::from_millis(5);
        Ok(Booted { region, cpus: r.spec.cpus.clone(), release: release.into(), took })
    }

    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
        self.current(id, incarnation)?;
        let died = self.workloads.killed((id, incarnation));
        Ok(self.kernel(id.0, |k| PulseSample {
            state: if died { KernelState::Panicked("of a message".into()) } else { k.state.clone() },
            nonce: k.incarnation + 1000,
            cpus: vec![CpuPulse { number: 0, count: k.beats() }],
        }))
    }

    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError> {
        let next = self.call("fence", format!("fence {id} {incarnation}")).await;
        self.current(id, incarnation)?;
        let took = Duration::from_micros(150);
        match next {
            Some(Next::Fail(why)) => Err(PlatformError::os("stop", why)),
            Some(Next::Partial(cpu)) => {
                let cpus = self.kernel(id.0, |k| k.cpus.iter().map(|c| (*c, *c != cpu)).collect());
                Ok(FenceReport { cpus, complete: false, took })
            }
            _ => Ok(self.kernel(id.0, |k| {
                k.frozen = Some(k.beats());
                k.running = false;
                k.agent.send_replace(Agent::Never);
                self.workloads.end((id, k.incarnation));
                FenceReport { cpus: k.cpus.iter().map(|c| (*c, true)).collect(), complete: true, took }
            })),
        }
    }

    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        release_cpus: bool,
    ) -> Result<ReclaimReport, PlatformError> {
        let next = self.call("reclaim", format!("reclaim {id} {incarnation} {release_cpus}")).await;
        self.current(id, incarnation)?;
        if let Some(Next::Fail(why)) = next {
            return Err(PlatformError::os("reclaim", why));
        }
        self.with(|s| {
            assert!(!s.kernels[&id].running, "instance {id} is reclaimed while it runs");
            let k = s.kernels.remove(&id).expect("checked");
            Ok(ReclaimReport { region: k.region, cpus: k.cpus, took: Duration::from_micros(90) })
        })
    }

    async fn grow(
        &self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        _: Duration,
    ) -> Result<Grown, PlatformError> {
        let next =
            self.call("grow", format!("grow {id} {:?} {}", growth.cpus, growth.memory_bytes >> 20)).await;
        self.current(id, incarnation)?;
        match next {
            Some(Next::Fail(why)) => return Err(PlatformError::os("grow", why)),
            // Everything but that CPU.
            Some(Next::Partial(cpu)) => {
                let cpus = growth.cpus.iter().copied().filter(|c| *c != cpu).collect();
                let failed = vec![format!("CPU {cpu} does not come")];
                return Ok(Grown { cpus, failed, ..Grown::default() });
            }
            _ => {}
        }
        self.with(|s| {
            for (other, k) in &s.kernels {
                let both = k.cpus.iter().find(|c| *other != id && growth.cpus.contains(c));
                assert_eq!(both, None, "instance {id} gets a CPU that instance {other} has");
            }
            let k = s.kernels.get_mut(&id).expect("checked");
            let new: Vec<u32> = growth.cpus.iter().copied().filter(|c| !k.cpus.contains(c)).collect();
            k.cpus.extend(new);
            let memory = MemoryRange { base: 1 << 41, size: growth.memory_bytes };
            let memory = if memory.size > 0 { vec![memory] } else { vec![] };
            Ok(Grown { cpus: growth.cpus.clone(), memory, ..Grown::default() })
        })
    }

    async fn release_cpus(&self, cpus: &[u32]) -> Result<(), PlatformError> {
        self.call("release", format!("release {cpus:?}")).await;
        Ok(())
    }

    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        port: u32,
    ) -> Result<Box<dyn Stream>, PlatformError> {
        self.current(id, incarnation)?;
        if port == SESSIONS {
            let refused = || PlatformError::os("connect", "connection refused");
            return self.workloads.connect((id, incarnation)).ok_or_else(refused);
        }
        if port != 9000 {
            let (release, life) = self.kernel(id.0, |k| (k.release.clone(), k.agent.subscribe()));
            return Ok(service::connect(release, life));
        }
        if let Some(Next::Panic) = self.with(|s| s.next.get_mut("connect").and_then(Vec::pop)) {
            panic!("scripted panic in connect");
        }
        let (agent, since, release) =
            self.kernel(id.0, |k| (k.agent.subscribe(), k.started.elapsed(), k.release.clone()));
        let now = *agent.borrow();
        let listens = match now {
            Agent::Answers | Agent::Silent => true,
            Agent::After(t) => since >= t,
            Agent::Never => false,
        };
        if !listens {
            return Err(PlatformError::os("connect", "connection refused"));
        }
        let (here, there) = tokio::io::duplex(4096);
        let dies = self.events.lock().unwrap().clone();
        tokio::spawn(serve(there, id, incarnation, release, agent, self.workloads.clone(), dies));
        Ok(Box::new(here))
    }

    async fn window_open(
        &self,
        key: u64,
        _: u64,
        from: (InstanceId, u64),
        to: (InstanceId, u64),
    ) -> Result<(), PlatformError> {
        if let Some(Next::Fail(why)) = self.call("window", format!("window {} {}", from.0, to.0)).await {
            return Err(PlatformError::os("window", why));
        }
        for (id, incarnation) in [from, to] {
            self.current(id, incarnation)?;
        }
        self.with(|s| {
            assert!(key & WINDOW != 0 && !s.windows.contains(&key), "{key:#x}");
            s.windows.push(key);
        });
        Ok(())
    }

    async fn window_close(&self, key: u64, _: Duration) -> Result<(), PlatformError> {
        if let Some(Next::Fail(why)) = self.call("close", "close the window".into()).await {
            return Err(PlatformError::os("close a window", why));
        }
        self.with(|s| s.windows.retain(|k| *k != key));
        Ok(())
    }

    async fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        Ok(self.with(|s| s.windows.clone()))
    }

    async fn handover_create(&self, key: u64, size: u64) -> Result<MemoryRange, PlatformError> {
        self.call("handover", format!("handover create {size}")).await;
        self.with(|s| {
            if s.handovers.iter().any(|h| h.key == key) {
                return Err(PlatformError::Busy(format!("there is a handover region {key} already")));
            }
            let range = MemoryRange { base: 1 << 40, size };
            s.handovers.push(HandoverRegion { key, range, writer: None, shared: vec![] });
            Ok(range)
        })
    }

    async fn handover_share(&self, key: u64, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
        self.current(id, incarnation)?;
        self.with(|s| {
            let region = s.handovers.iter_mut().find(|h| h.key == key);
            let region = region.ok_or_else(|| PlatformError::Invalid("no such region".into()))?;
            region.shared.push(id);
            Ok(())
        })
    }

    async fn handover_assign(
        &self,
        key: u64,
        id: Option<InstanceId>,
        limit: Duration,
    ) -> Result<HandoverMoved, PlatformError> {
        let to = id.map_or(0, |id| id.0);
        if let Some(Next::Fail(_)) = self.call("assign", format!("handover assign {to}")).await {
            return Err(PlatformError::Timeout { what: "revoking the writer".into(), limit });
        }
        self.with(|s| {
            let running = |id: &InstanceId| s.kernels.get(id).is_some_and(|k| k.running);
            assert!(id.is_none_or(|id| running(&id)), "a writer that does not run");
            let region = s.handovers.iter_mut().find(|h| h.key == key).expect("there is one");
            assert!(id.is_none_or(|id| region.shared.contains(&id)), "it is not shared with {id:?}");
            region.writer = id;
        });
        Ok(HandoverMoved { revoke: Duration::ZERO, took: Duration::ZERO })
    }

    async fn handover_destroy(&self, key: u64) -> Result<(), PlatformError> {
        self.with(|s| {
            let running: Vec<InstanceId> =
                s.kernels.iter().filter(|(_, k)| k.running).map(|(id, _)| *id).collect();
            let region = s.handovers.iter().find(|h| h.key == key).expect("there is one");
            if region.shared.iter().any(|id| running.contains(id)) {
                return Err(PlatformError::Busy("it is shared".into()));
            }
            s.handovers.retain(|h| h.key != key);
            Ok(())
        })
    }

    async fn handover_list(&self) -> Result<Vec<HandoverRegion>, PlatformError> {
        Ok(self.with(|s| s.handovers.clone()))
    }

    async fn console(&self, id: InstanceId, _: u64) -> Result<ConsoleLog, PlatformError> {
        let records = (0..30)
            .map(|n| ConsoleRecord { seq: n, ts_ns: n, level: 6, text: format!("instance {id} line {n}") })
            .collect();
        Ok(ConsoleLog { records, next_seq: 30, note: None })
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        Ok(())
    }
}

async fn serve(
    stream: tokio::io::DuplexStream,
    id: InstanceId,
    incarnation: u64,
    release: String,
    mut agent: watch::Receiver<Agent>,
    workloads: Arc<Workloads>,
    dies: mpsc::Sender<PlatformEvent>,
) {
    let identity = Hello { instance: id.0, incarnation, release, ..Hello::default() };
    let limit = Duration::from_secs(1);
    let Ok((mut connection, _)) = Connection::accept(stream, identity, || 0, limit).await else { return };
    loop {
        let event = tokio::select! {
            event = connection.next() => event,
            changed = agent.changed() => {
                if changed.is_err() || *agent.borrow() == Agent::Never {
                    return;
                }
                continue;
            }
        };
        let silent = *agent.borrow() == Agent::Silent;
        match event {
            Event::Message {
                header,
                message: Message::HeartbeatReq(HeartbeatReq { metrics, serves, .. }),
            } if !silent => {
                workloads.heartbeat((id, incarnation), serves);
                let mut answer = HeartbeatRsp { incarnation, ..HeartbeatRsp::default() };
                if metrics {
                    answer.metrics.io = Some(kmp::message::IoMetrics { probe_us: 7, pressure: None });
                }
                connection.queue(header.sequence, &answer.into()).unwrap();
            }
            Event::Message { message: Message::Bye(_), .. } if !silent => {
                let _ = connection.confirm_bye(ByeAck { detail: "stopped".into() }).await;
                return;
            }
            Event::Closed { .. } => return,
            Event::Message { message: Message::Topology(topology), .. } => {
                workloads.hear((id, incarnation), topology);
            }
            Event::Message { header, message } if !silent => {
                match workloads.message((id, incarnation), message).await {
                    Outcome::Answers(answers) => {
                        for answer in answers {
                            connection.queue(header.sequence, &answer).unwrap();
                        }
                    }
                    Outcome::Dies => {
                        workloads.kill((id, incarnation));
                        let kind = PlatformEventKind::Panic("of a message".into());
                        let event = PlatformEvent { id, incarnation, age: Duration::ZERO, kind };
                        dies.send(event).await.unwrap();
                        return;
                    }
                    Outcome::Lost => return,
                }
            }
            _ => {}
        }
    }
}
