//! The whole supervisor in one thread and in simulated time, from a seed: kernels that fail in every way, a
//! slow and failing disk, daemons that die and that stand still. What must never happen is looked at in
//! every call the supervisor makes.
//!
//! A seed replays exactly: `KMORPH_SIM_SEED=<n> cargo test -p kmorph-actors simulation`. More seeds:
//! `KMORPH_SIM_SEEDS=<count>`, from `KMORPH_SIM_FROM=<n>` on.

mod agent;
mod disk;
mod load;
mod machine;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::core::group::GroupSpec;
use crate::core::policy::Standby;
use crate::core::supervisor::Strategy;
use disk::Disk;
use futures::future::join_all;
use kmorph_control::views::EventView;
use machine::{Machine, Trouble};

/// Seeds in every run of the tests.
const SEEDS: u64 = 300;
/// Faults of one run.
const FAULTS: u32 = 25;
/// Time without faults in which everything has to be well again.
const CALM: Duration = Duration::from_secs(180);
/// From so many on they are watched less closely: it is about how much there is, not how fast it goes.
const MANY: u16 = 100;

/// splitmix64 (Steele, Lea and Flood, 2014): small, and the same everywhere.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides.max(1)
    }
}

struct Definitions_(u16);

impl Definitions for Definitions_ {
    fn load(&self, name: &str) -> Result<InstanceSpec, OpError> {
        let found = self.all().into_iter().find(|s| s.name == name);
        found.ok_or_else(|| OpError::new(ErrorKind::NotFound, format!("no definition of {name}")))
    }

    fn save(&self, _: &InstanceSpec) -> Result<(), OpError> {
        Ok(())
    }

    fn all(&self) -> Vec<InstanceSpec> {
        (1..=self.0).map(|id| spec(&format!("i{id}"), id)).collect()
    }
}

/// One daemon after the other, on one machine with one disk.
struct Sim {
    seed: u64,
    dice: Dice,
    machine: Arc<Machine>,
    disk: Arc<Disk>,
    tree: Tree,
    instances: u16,
    standbys: bool,
    daemons: u64,
}

/// Whether instances have standbys in the run of this seed.
fn has_standbys(seed: u64) -> bool {
    matches!(seed % 8, 2 | 5)
}

fn settings(seed: u64, standbys: bool, instances: u16) -> TreeConfig {
    let defaults = Policy {
        standby: if standbys { Standby::Same } else { Standby::Off },
        boot_grace: Duration::from_secs(20),
        pulse_period: if instances < MANY { MS * 100 } else { MS * 1000 },
        pulse_misses: if instances < MANY { 10 } else { 4 },
        heartbeat_timeout: if instances < MANY { MS * 1000 } else { MS * 8000 },
        restart_intensity: 1000,
        restart_max: Duration::from_secs(5),
        ..Policy::default()
    };
    let mut config = with_defaults(defaults);
    config.seed = seed;
    config.store_limit = Duration::from_secs(2);
    if instances >= 4 {
        let strategy = [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne][(seed % 3) as usize];
        config.settings.groups = vec![GroupSpec {
            name: "shop".into(),
            strategy,
            intensity: 1000,
            period: Duration::from_secs(60),
            members: vec!["i1".into(), "i2".into(), "i3".into()],
        }];
    }
    config
}

async fn daemon(machine: &Arc<Machine>, disk: &Arc<Disk>, seed: u64, standbys: bool, instances: u16) -> Tree {
    let platform: Arc<dyn Platform> = Arc::new(machine.clone().life());
    let store = Arc::new(disk.clone().life());
    let settings = settings(seed, standbys, instances);
    Tree::start(settings, platform, store, Arc::new(Definitions_(instances))).await.unwrap()
}

/// A run that fails tells what it saw, when it is replayed by itself.
impl Drop for Sim {
    fn drop(&mut self) {
        if std::thread::panicking() && number("KMORPH_SIM_SEED").is_some() {
            self.machine.log().iter().for_each(|line| eprintln!("{line}"));
            for event in self.tree.events().since(&EventsArgs::default()) {
                let EventView {
                    at_unix_ms, instance, incident, incarnation, from, to, cause, effect, ..
                } = event;
                eprintln!(
                    "{at_unix_ms} {instance:?} {incarnation:?} {incident:?} {from:?}->{to:?}: {cause}; {effect}"
                );
            }
        }
    }
}

impl Sim {
    async fn new(seed: u64, instances: Option<u16>) -> Sim {
        let mut dice = Dice(seed);
        let instances = instances.unwrap_or(2 + dice.roll(5) as u16);
        let standbys = has_standbys(seed) && instances < MANY;
        // Sometimes there are not enough for all.
        let spare = if standbys { u32::from(instances) * (3 + (seed % 2) as u32) + 3 } else { 0 };
        let machine = Machine::with_spare(Dice(dice.roll(u64::MAX)), instances >= 4, spare);
        let disk = Disk::new(Dice(dice.roll(u64::MAX)));
        let tree = daemon(&machine, &disk, seed, standbys, instances).await;
        let sim = Sim { seed, dice, machine, disk, tree, instances, standbys, daemons: 1 };
        let start = |id| sim.tree.spawn(args(&format!("i{id}")));
        let mut started = join_all((1..=instances).map(start));
        // Definitions are read by another thread. What goes on first must not depend on how fast that is.
        assert!(futures::poll!(&mut started).is_pending());
        let (read, all_read) = std::sync::mpsc::channel();
        drop(tokio::task::spawn_blocking(move || read.send(())));
        all_read.recv().unwrap();
        for view in started.await {
            view.unwrap();
        }
        sim
    }

    async fn step(&mut self) {
        let pause = Duration::from_millis(self.dice.roll(4000));
        tokio::time::sleep(pause).await;
        let mut id = InstanceId(1 + self.dice.roll(u64::from(self.instances)) as u16);
        if self.standbys {
            // Any kernel: one that waits, or one that did.
            let kernels = self.machine.kernels();
            id = kernels.get(self.dice.roll(kernels.len() as u64) as usize).copied().unwrap_or(id);
        }
        match self.dice.roll(18) {
            0..=2 => self.machine.panic(id, true),
            3 => self.machine.panic(id, false),
            4 | 5 => self.machine.hang(id),
            6 => self.machine.trouble(id, Trouble::AgentSilent),
            7 => self.machine.trouble(id, Trouble::Unreachable),
            8 => self.machine.heal(id),
            9 => self.disk.spoil(),
            10 => self.disk.mend(),
            11 => self.machine.fumble(),
            12 => self.machine.half_fence(),
            13 => self.machine.stop_pulse(id),
            14 => self.machine.partition(),
            // The daemon stands still while the world goes on.
            15 | 16 => tokio::time::advance(Duration::from_millis(1500 + self.dice.roll(20_000))).await,
            _ => self.kill().await,
        }
    }

    /// kill -9, and another daemon some time later.
    async fn kill(&mut self) {
        self.nobody_is_accused();
        self.machine.end_life();
        self.disk.end_life();
        if self.disk.lost() {
            self.machine.forget_service();
        }
        self.tree.kill_for_test();
        let gone = Duration::from_millis(self.dice.roll(3000));
        tokio::time::sleep(gone).await;
        self.daemons += 1;
        // A daemon that cannot read its journal does not start: somebody mends the disk first.
        self.disk.mend();
        let seed = self.seed ^ self.daemons;
        self.tree = daemon(&self.machine, &self.disk, seed, self.standbys, self.instances).await;
    }

    /// Nothing was ever said against a life to which nothing was done.
    fn nobody_is_accused(&self) {
        let accusations = [InstanceState::Suspect, InstanceState::AgentSilent].map(|s| s.to_string());
        for event in self.tree.events().since(&EventsArgs::default()) {
            let (Some(name), Some(to), Some(life)) = (event.instance, event.to, event.incarnation) else {
                continue;
            };
            let of = name.trim_end_matches("~standby");
            if accusations.contains(&to) && !self.machine.harmed(of, life) {
                self.machine.accuse(format!("{name} was {to} and nothing was done to its life {life}"));
            }
        }
    }

    /// No more faults: everything has to be well, or be said to need an operator.
    async fn settle(&mut self) {
        self.disk.mend();
        self.machine.calm();
        tokio::time::sleep(CALM).await;
        self.nobody_is_accused();
        assert_eq!(self.machine.broken(), Vec::<String>::new());
        let (beside, views): (Vec<InstanceView>, Vec<InstanceView>) =
            self.tree.list().await.into_iter().partition(|v| v.name.contains('~'));
        self.standbys_are_well(&beside, &views);
        assert_eq!(views.len(), usize::from(self.instances), "an instance was forgotten: {views:?}");
        for view in &views {
            let wants_operator = matches!(view.state, InstanceState::PartialFence | InstanceState::Degraded);
            assert!(
                view.state == InstanceState::Healthy || wants_operator,
                "it is not well {CALM:?} after the last fault: {view:?}"
            );
            assert!(!wants_operator || !view.advice.is_empty(), "nobody is told what to do: {view:?}");
        }
        let mut open: BTreeMap<(u64, String), bool> = BTreeMap::new();
        for step in self.disk.steps() {
            *open.entry((step.incident, step.instance.clone())).or_default() |= step.recovered.is_some();
        }
        for ((incident, instance), ended) in open {
            let state = views.iter().find(|v| v.name == instance).map(|v| v.state);
            assert!(
                ended || self.disk.lost() || state == Some(InstanceState::PartialFence),
                "incident {incident} of {instance} never ended; it is {state:?}"
            );
        }
        self.tree.shutdown().await;
    }
}

impl Sim {
    /// Every instance that serves has its standby, or it is said why not.
    fn standbys_are_well(&self, beside: &[InstanceView], views: &[InstanceView]) {
        if !self.standbys {
            assert_eq!(beside, []);
            return;
        }
        for view in views.iter().filter(|v| v.state == InstanceState::Healthy) {
            let standby = view.standby.as_ref().expect("one is wanted");
            assert!(
                standby.state == "ready" || !standby.reason.is_empty(),
                "it has no standby, and nobody knows why: {view:?}"
            );
        }
        for side in beside {
            let stuck = side.state == InstanceState::PartialFence || side.state == InstanceState::Degraded;
            assert!(side.standby_of.is_some() || stuck, "something is left: {side:?}");
        }
    }
}

/// One run; what happened, in words.
fn play(seed: u64) -> Vec<String> {
    play_with(seed, None, FAULTS)
}

fn runtime() -> tokio::runtime::Runtime {
    // Definitions are read by another thread: with one of them in the order they are asked for.
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .max_blocking_threads(1)
        .build()
        .unwrap()
}

fn play_with(seed: u64, instances: Option<u16>, faults: u32) -> Vec<String> {
    runtime().block_on(async {
        let mut sim = Sim::new(seed, instances).await;
        for _ in 0..faults {
            sim.step().await;
        }
        sim.settle().await;
        sim.machine.log()
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

/// Seeds share nothing, so each thread takes the next one.
#[test]
fn simulation() {
    if let Some(seed) = number("KMORPH_SIM_SEED") {
        for line in play(seed) {
            eprintln!("{line}");
        }
        return;
    }
    let from = number("KMORPH_SIM_FROM").unwrap_or(1);
    let next = AtomicU64::new(from);
    let end = from + number("KMORPH_SIM_SEEDS").unwrap_or(SEEDS);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let one = || {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        (seed < end).then(|| (seed, std::panic::catch_unwind(|| play(seed)).is_err()))
    };
    let one = &one;
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..threads).map(|_| scope.spawn(move || std::iter::from_fn(one).collect::<Vec<_>>())).collect();
        all.into_iter()
            .flat_map(|t| t.join().unwrap())
            .filter(|(_, failed)| *failed)
            .map(|(s, _)| s)
            .collect()
    });
    let Some(seed) = failed.iter().min() else { return };
    panic!(
        "seeds {failed:?} fail; replay one with KMORPH_SIM_SEED={seed} cargo test -p kmorph-actors simulation"
    );
}

/// Faults come to single instances and to all of them, so the machinery is the same; what differs is how much
/// happens at once.
#[test]
fn two_thousand_instances() {
    play_with(7, Some(2000), 8);
}

/// Seeds that found something: a late supervisor that believes what it sees (3), taking back after a fence that
/// failed (4), an incident that is never closed (7), a kernel stopped for what the one before did because the
/// journal did not know it (176, 215, 273), a member of a group that was given up while it was started and
/// forgotten (2462, 2579).
#[test]
fn seeds_that_found_something() {
    for seed in [3, 4, 7, 176, 215, 273, 2462, 2579] {
        play(seed);
    }
}

/// Standbys do become instances in the runs that have them.
#[test]
fn standbys_take_over_in_the_simulation() {
    let taken = |seed| {
        runtime().block_on(async {
            let mut sim = Sim::new(seed, None).await;
            for _ in 0..FAULTS {
                sim.step().await;
            }
            sim.settle().await;
            sim.disk.steps().iter().filter(|s| s.detail.contains(" takes over from instance ")).count()
        })
    };
    let taken = [2, 5, 10, 13].map(taken);
    assert!(taken.iter().sum::<usize>() >= 5, "{taken:?}");
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [3, 13, 14, 159] {
        let (first, second) = (play(seed), play(seed));
        for (n, (a, b)) in first.iter().zip(&second).enumerate() {
            assert_eq!(a, b, "line {n} of seed {seed}");
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
        assert!(first.len() > 20, "{first:?}");
    }
}
