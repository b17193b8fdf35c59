//! A machine with CPUs and memory that looks at everything the supervisor asks of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kmorph_platform::*;
use tokio::sync::{mpsc, watch};

use super::agent::{Agent, Shares};
use super::*;

const BEAT: Duration = Duration::from_millis(100);

/// What is wrong with a kernel that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    None,
    /// Its agent does not answer.
    AgentSilent,
    /// Nobody can connect to it.
    Unreachable,
}

struct Kernel {
    incarnation: u64,
    /// The instance it is, or waits for.
    of: String,
    /// Its workload was told to serve.
    serves: Arc<AtomicBool>,
    started: Instant,
    frozen: Option<u64>,
    state: KernelState,
    trouble: watch::Sender<Trouble>,
    /// Its CPUs run.
    running: bool,
    /// It has ended: it hangs or has panicked.
    dead: bool,
    /// Its pulse stopped, or its user space was out of reach, for a while in this life. Both together look
    /// like death; one alone does not.
    pulse_stopped: bool,
    agent_troubled: bool,
    /// Its agent has answered a heartbeat: until then trouble with it is a boot that failed.
    served: Arc<AtomicBool>,
    /// When it has its CPU; absent: always.
    shares: Option<Arc<Shares>>,
    region: MemoryRange,
    cpus: Vec<u32>,
}

impl Kernel {
    fn beats(&self) -> u64 {
        let beaten =
            |at: Instant| (at.duration_since(self.started).as_millis() / BEAT.as_millis()) as u64 + 1;
        let now = Instant::now();
        let last = self.shares.as_ref().map_or(now, |s| s.last(now).max(self.started));
        self.frozen.unwrap_or_else(|| beaten(last))
    }
}

struct State {
    dice: Dice,
    kernels: BTreeMap<InstanceId, Kernel>,
    alive: Arc<AtomicBool>,
    events: Option<mpsc::Sender<PlatformEvent>>,
    /// Whether instances 1 to 3 are a group.
    grouped: bool,
    shares: BTreeMap<InstanceId, Arc<Shares>>,
    /// The last fence that was asked for.
    fenced: watch::Sender<Option<(InstanceId, Instant)>>,
    /// Calls that fail, still.
    fumbles: u32,
    /// Fences that stop some CPUs only, still.
    half_fences: u32,
    /// CPUs that no instance is defined with.
    spare: u32,
    /// Lives in which something was done to an instance, or that were ended by the supervisor.
    harmed: BTreeSet<(String, u64)>,
    log: Vec<String>,
    /// What must never happen and did. A panic in a call would only end the task that made it.
    broken: Vec<String>,
    began: Instant,
}

pub(super) struct Machine(Mutex<State>);

/// The machine as one daemon has it.
pub(super) struct Life {
    machine: Arc<Machine>,
    alive: Arc<AtomicBool>,
    source: Mutex<Option<mpsc::Receiver<PlatformEvent>>>,
}

impl Machine {
    pub(super) fn new(dice: Dice, grouped: bool) -> Arc<Machine> {
        Machine::with_spare(dice, grouped, 0)
    }

    /// With so many CPUs that no instance is defined with.
    pub(super) fn with_spare(dice: Dice, grouped: bool, spare: u32) -> Arc<Machine> {
        Arc::new(Machine(Mutex::new(State {
            dice,
            kernels: BTreeMap::new(),
            alive: Arc::default(),
            events: None,
            grouped,
            shares: BTreeMap::new(),
            fenced: watch::Sender::new(None),
            fumbles: 0,
            half_fences: 0,
            spare,
            harmed: BTreeSet::new(),
            log: vec![],
            broken: vec![],
            began: Instant::now(),
        })))
    }

    pub(super) fn life(self: Arc<Machine>) -> Life {
        let alive = Arc::new(AtomicBool::new(true));
        let (events, source) = mpsc::channel(64);
        self.with(|s| (s.alive, s.events) = (alive.clone(), Some(events)));
        Life { machine: self, alive, source: Mutex::new(Some(source)) }
    }

    pub(super) fn end_life(&self) {
        self.with(|s| {
            s.alive.store(false, Ordering::SeqCst);
            s.events = None;
            s.say("the daemon is killed".into());
        });
    }

    /// From its next start on it has its CPU at these times only.
    pub(super) fn share(&self, id: InstanceId, shares: Shares) {
        self.with(|s| s.shares.insert(id, Arc::new(shares)));
    }

    /// Fences that are asked for, as they come.
    pub(super) fn fences(&self) -> watch::Receiver<Option<(InstanceId, Instant)>> {
        self.with(|s| s.fenced.subscribe())
    }

    /// That a kernel served is written nowhere: the next daemon takes it for one that is starting.
    pub(super) fn forget_service(&self) {
        self.with(|s| s.kernels.values().for_each(|k| k.served.store(false, Ordering::SeqCst)));
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    pub(super) fn broken(&self) -> Vec<String> {
        self.with(|s| s.broken.clone())
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.with(|s| s.log.clone())
    }

    fn harm(&self, id: InstanceId, what: &str, f: impl FnOnce(&mut Kernel)) {
        self.with(|s| {
            if let Some(k) = s.kernels.get_mut(&id).filter(|k| k.running) {
                s.harmed.insert((k.of.clone(), k.incarnation));
                f(k);
                let text = format!("{id} {what}");
                s.say(text);
            }
        });
    }

    pub(super) fn hang(&self, id: InstanceId) {
        self.harm(id, "hangs", |k| {
            k.dead = true;
            k.frozen = Some(k.beats());
            k.trouble.send_replace(Trouble::AgentSilent);
        });
    }

    /// A panic; its notice may be lost.
    pub(super) fn panic(&self, id: InstanceId, noticed: bool) {
        self.harm(id, "panics", |k| {
            k.dead = true;
            k.frozen = Some(k.beats());
            k.state = KernelState::Panicked("simulated".into());
            k.trouble.send_replace(Trouble::AgentSilent);
        });
        self.with(|s| {
            let Some(k) = s.kernels.get(&id).filter(|k| k.running && noticed) else { return };
            let kind = PlatformEventKind::Panic("simulated".into());
            let event = PlatformEvent { id, incarnation: k.incarnation, age: Duration::ZERO, kind };
            if let Some(events) = &s.events {
                // A full queue loses it: the pulse says the same.
                let _ = events.try_send(event);
            }
        });
    }

    pub(super) fn trouble(&self, id: InstanceId, trouble: Trouble) {
        self.harm(id, &format!("{trouble:?}"), |k| {
            k.agent_troubled = true;
            k.trouble.send_replace(trouble);
        });
    }

    /// Nobody can connect to anybody.
    pub(super) fn partition(&self) {
        let ids: Vec<InstanceId> = self.with(|s| s.kernels.keys().copied().collect());
        ids.into_iter().for_each(|id| self.trouble(id, Trouble::Unreachable));
    }

    /// Its pulse stops, and its agent answers.
    pub(super) fn stop_pulse(&self, id: InstanceId) {
        self.harm(id, "has no pulse", |k| {
            k.pulse_stopped = true;
            k.frozen = Some(k.beats());
        });
    }

    /// The next fence leaves a CPU running.
    pub(super) fn half_fence(&self) {
        self.with(|s| s.half_fences = 1 + s.dice.roll(4) as u32);
    }

    /// Whether something was done to this life.
    pub(super) fn harmed(&self, of: &str, incarnation: u64) -> bool {
        self.with(|s| s.harmed.contains(&(of.to_owned(), incarnation)))
    }

    /// Every kernel there is.
    pub(super) fn kernels(&self) -> Vec<InstanceId> {
        self.with(|s| s.kernels.keys().copied().collect())
    }

    /// Instances of which several kernels that run were told to serve.
    fn served_twice(&self) {
        self.with(|s| {
            let mut serving: BTreeMap<&str, InstanceId> = BTreeMap::new();
            for (id, k) in s.kernels.iter().filter(|(_, k)| k.running && k.serves.load(Ordering::SeqCst)) {
                if let Some(other) = serving.insert(&k.of, *id) {
                    s.broken.push(format!("{} and {other} serve both as {}", id, k.of));
                }
            }
        });
    }

    pub(super) fn accuse(&self, text: String) {
        self.with(|s| s.broken.push(text));
    }

    /// A living kernel is well again.
    pub(super) fn heal(&self, id: InstanceId) {
        self.harm(id, "is healed", |k| {
            if !k.dead {
                k.frozen = None;
                k.trouble.send_replace(Trouble::None);
            }
        });
    }

    /// The next calls fail.
    pub(super) fn fumble(&self) {
        self.with(|s| s.fumbles = 1 + s.dice.roll(3) as u32);
    }

    pub(super) fn calm(&self) {
        let ids: Vec<InstanceId> = self.with(|s| {
            (s.fumbles, s.half_fences) = (0, 0);
            s.kernels.keys().copied().collect()
        });
        ids.into_iter().for_each(|id| self.heal(id));
    }
}

impl State {
    fn say(&mut self, text: String) {
        self.log.push(format!("{:>9.3} {text}", self.began.elapsed().as_secs_f64()));
    }
}

impl Life {
    /// A call takes a while, and may fail.
    async fn call(&self, text: String) -> Result<(), PlatformError> {
        let (wait, fails) = self.machine.with(|s| {
            let fails = s.fumbles > 0 && s.dice.roll(2) == 0;
            s.fumbles -= u32::from(fails);
            s.say(format!("{text}{}", if fails { " (fails)" } else { "" }));
            let slow = if s.dice.roll(20) == 0 { 3000 } else { 40 };
            (Duration::from_millis(s.dice.roll(slow)), fails)
        });
        tokio::time::sleep(wait).await;
        if !self.alive.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if fails { Err(PlatformError::os("simulated", "it fails")) } else { Ok(()) }
    }

    fn with_kernel<T>(
        &self,
        id: InstanceId,
        asked: u64,
        f: impl FnOnce(&mut Kernel) -> T,
    ) -> Result<T, PlatformError> {
        self.machine.with(|s| match s.kernels.get_mut(&id) {
            None => Err(PlatformError::Unknown(id)),
            Some(k) if k.incarnation != asked => {
                Err(PlatformError::StaleIncarnation { id, asked, current: k.incarnation })
            }
            Some(k) => Ok(f(k)),
        })
    }
}

#[async_trait]
impl Platform for Life {
    fn kind(&self) -> PlatformKind {
        PlatformKind::Process
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        Ok(self.machine.with(|s| {
            if s.spare == 0 {
                return Inventory::default();
            }
            let owner =
                |apic_id| s.kernels.iter().find(|(_, k)| k.cpus.contains(&apic_id)).map(|(id, _)| *id);
            let cpu = |apic_id| CpuInfo {
                apic_id,
                number: apic_id,
                state: if owner(apic_id).is_some() { CpuState::Lent } else { CpuState::Online },
                owner: owner(apic_id),
                boot: apic_id == 0,
            };
            Inventory {
                cpus: (0..s.spare).map(cpu).collect(),
                pool: vec![MemoryRange { base: 1 << 30, size: 600 << 30 }],
                memory_block: 0,
                used: s.kernels.iter().map(|(id, k)| (k.region, *id)).collect(),
            }
        }))
    }

    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError> {
        Ok(self.machine.with(|s| {
            let found = s.kernels.iter().map(|(id, k)| ExistingInstance {
                id: *id,
                incarnation: k.incarnation,
                region: k.region,
                cpus: k.cpus.clone(),
                running: k.running,
            });
            found.collect()
        }))
    }

    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>> {
        self.source.lock().unwrap().take()
    }

    async fn check(&self, _: &BootRequest) -> Result<(), PlatformError> {
        Ok(())
    }

    async fn boot(&self, r: &BootRequest) -> Result<Booted, PlatformError> {
        let id = r.spec.id;
        self.call(format!("boot {id} as {}", r.incarnation)).await?;
        let region = MemoryRange { base: u64::from(id.0) << 30, size: r.spec.memory_bytes };
        self.machine.with(|s| {
            for (other, k) in &s.kernels {
                if k.region.overlaps(&region) || k.cpus.iter().any(|c| r.spec.cpus.contains(c)) {
                    s.broken.push(format!("{id} is started on what {other} owns"));
                }
            }
            let kernel = Kernel {
                incarnation: r.incarnation,
                of: r.spec.name.trim_end_matches("~standby").to_owned(),
                serves: Arc::default(),
                started: Instant::now(),
                frozen: None,
                state: KernelState::Ready,
                trouble: watch::Sender::new(Trouble::None),
                running: true,
                dead: false,
                pulse_stopped: false,
                agent_troubled: false,
                served: Arc::default(),
                shares: s.shares.get(&id).cloned(),
                region,
                cpus: r.spec.cpus.clone(),
            };
            s.kernels.insert(id, kernel);
        });
        Ok(Booted { region, cpus: r.spec.cpus.clone(), release: "6.12.9".into(), took: BEAT })
    }

    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
        self.with_kernel(id, incarnation, |k| PulseSample {
            state: k.state.clone(),
            nonce: k.incarnation + 1000,
            cpus: vec![CpuPulse { number: 0, count: k.beats() }],
        })
    }

    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError> {
        self.machine.with(|s| s.fenced.send_replace(Some((id, Instant::now()))));
        self.call(format!("fence {id} {incarnation}")).await?;
        let member = |of: &str| ["i1", "i2", "i3"].contains(&of);
        let grouped = self.machine.with(|s| s.grouped && s.kernels.get(&id).is_some_and(|k| member(&k.of)));
        // Members of a group are stopped for others; everybody else only for what was done to them.
        let guilty = self.with_kernel(id, incarnation, |k| {
            let boot_failed = !k.served.load(Ordering::SeqCst) && (k.pulse_stopped || k.agent_troubled);
            k.dead || !k.running || boot_failed || (k.pulse_stopped && k.agent_troubled)
        })?;
        if !guilty && !grouped {
            self.machine
                .accuse(format!("{id} is fenced, and its incarnation {incarnation} never looked dead"));
        }
        let half = self.machine.with(|s| {
            if let Some(k) = s.kernels.get(&id) {
                s.harmed.insert((k.of.clone(), incarnation));
            }
            let half = s.half_fences > 0;
            s.half_fences -= u32::from(half);
            half
        });
        if half {
            return self.with_kernel(id, incarnation, |k| FenceReport {
                cpus: k.cpus.iter().map(|c| (*c, false)).collect(),
                complete: false,
                took: BEAT,
            });
        }
        self.with_kernel(id, incarnation, |k| {
            k.frozen = Some(k.beats());
            k.running = false;
            k.trouble.send_replace(Trouble::Unreachable);
            let cpus = k.cpus.iter().map(|c| (*c, true)).collect();
            FenceReport { cpus, complete: true, took: BEAT }
        })
    }

    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        _: bool,
    ) -> Result<ReclaimReport, PlatformError> {
        self.call(format!("reclaim {id} {incarnation}")).await?;
        let running = self.with_kernel(id, incarnation, |k| k.running)?;
        self.machine.with(|s| {
            if running {
                s.broken.push(format!("{id} is taken back while its CPUs may run"));
            }
            let k = s.kernels.remove(&id).ok_or(PlatformError::Unknown(id))?;
            Ok(ReclaimReport { region: k.region, cpus: k.cpus, took: BEAT })
        })
    }

    async fn release_cpus(&self, _: &[u32]) -> Result<(), PlatformError> {
        Ok(())
    }

    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        _: u32,
    ) -> Result<Box<dyn Stream>, PlatformError> {
        let (agent, since) = self.with_kernel(id, incarnation, |k| {
            let (trouble, served, shares) = (k.trouble.subscribe(), k.served.clone(), k.shares.clone());
            let (serves, machine) = (k.serves.clone(), self.machine.clone());
            let told = Box::new(move || {
                if !serves.swap(true, Ordering::SeqCst) {
                    machine.served_twice();
                }
            });
            (Agent { id, incarnation, trouble, served, shares, told }, k.started.elapsed())
        })?;
        if *agent.trouble.borrow() == Trouble::Unreachable || since < Duration::from_millis(300) {
            return Err(PlatformError::os("connect", "connection refused"));
        }
        let (here, there) = tokio::io::duplex(4096);
        tokio::spawn(agent.serve(there));
        Ok(Box::new(here))
    }

    async fn console(&self, _: InstanceId, _: u64) -> Result<ConsoleLog, PlatformError> {
        Ok(ConsoleLog::default())
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        Ok(())
    }
}
