//! Time: how soon a hang is seen, and whom a busy machine accuses.

use super::agent::Shares;
use super::*;
use crate::core::policy::hang_bound;

const HOUR: Duration = Duration::from_secs(3600);
const INSTANCES: u16 = 8;

/// A daemon with the default policy, but for what would end the hour early.
async fn start(machine: &Arc<Machine>, instances: u16) -> Tree {
    let defaults = Policy {
        restart_intensity: 100_000,
        restart_base: MS * 100,
        restart_max: MS * 100,
        ..Policy::default()
    };
    let platform: Arc<dyn Platform> = Arc::new(machine.clone().life());
    let config = with_defaults(defaults);
    let store = Arc::new(MemoryStore::default());
    let tree = Tree::start(config, platform, store, Arc::new(Definitions_(instances))).await.unwrap();
    for id in 1..=instances {
        tree.spawn(args(&format!("i{id}"))).await.unwrap();
    }
    tree
}

async fn serves(tree: &Tree, name: &str) {
    while tree.status(name).await.unwrap().state != InstanceState::Healthy {
        tokio::time::sleep(MS * 50).await;
    }
}

/// Hangs at random moments: how long each took to be declared dead.
async fn hangs(tree: &Tree, machine: &Machine, dice: &mut Dice, count: usize) -> Vec<Duration> {
    let mut fences = machine.fences();
    let mut took = vec![];
    for _ in 0..count {
        let id = 1 + dice.roll(u64::from(INSTANCES)) as u16;
        serves(tree, &format!("i{id}")).await;
        tokio::time::sleep(Duration::from_micros(dice.roll(2_000_000))).await;
        let since = Instant::now();
        machine.hang(InstanceId(id));
        let here = |f: &Option<(InstanceId, Instant)>| f.is_some_and(|(i, at)| i.0 == id && at > since);
        let seen = tokio::time::timeout(HOUR, fences.wait_for(here)).await.unwrap().unwrap();
        took.push(seen.map(|(_, at)| at.duration_since(since)).unwrap());
    }
    took.sort();
    took
}

fn told(what: &str, took: &[Duration], bound: Duration) {
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
    println!(
        "{what}: {} hangs, declared dead after p50 {:?}, p99 {:?}, longest {:?}; bound {bound:?}",
        took.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(test)
}

#[test]
fn every_hang_is_seen_within_the_bound() {
    run(async {
        let (machine, mut dice) = (Machine::new(Dice(1), false), Dice(2));
        let tree = start(&machine, INSTANCES).await;
        let took = hangs(&tree, &machine, &mut dice, 500).await;
        let bound = hang_bound(&Policy::default());
        told("idle machine", &took, bound);
        // The clock of the runtime counts whole milliseconds, and there are five waits.
        assert!(took[took.len() - 1] <= bound + MS * 5, "{took:?}");
        assert!(took[0] >= Policy::default().pulse_silence() - MS * 100, "declared before it can be known");
        assert_eq!(machine.broken(), Vec::<String>::new());
        tree.shutdown().await;
    });
}

/// Two for every CPU: each kernel and the daemon itself run half of the time. For an hour nobody is accused;
/// who then hangs is seen nearly as soon as ever.
#[test]
fn a_machine_with_twice_its_load_accuses_nobody() {
    run(async {
        let (machine, mut dice) = (Machine::new(Dice(3), false), Dice(4));
        let whole = HOUR + HOUR / 2;
        for id in 1..=INSTANCES {
            machine.share(InstanceId(id), Shares::half(&mut dice, whole));
        }
        let mine = Shares::half(&mut dice, whole);
        let own = tokio::spawn(async move {
            for pair in mine.slices().windows(2) {
                let ((start, end), (next, _)) = (pair[0], pair[1]);
                tokio::time::sleep(Duration::from_micros(end - start)).await;
                tokio::time::advance(Duration::from_micros(next - end)).await;
            }
        });
        let tree = start(&machine, INSTANCES).await;
        for id in 1..=INSTANCES {
            serves(&tree, &format!("i{id}")).await;
        }
        tokio::time::sleep(HOUR).await;
        let accusations = suspicions(&tree);
        assert_eq!(accusations, Vec::<String>::new());
        assert_eq!(machine.broken(), Vec::<String>::new());
        let lag = tree.lag(0.99);
        println!("twice the load: {INSTANCES} instances for {HOUR:?}, 0 suspicions; own lag p99 {lag:?}");
        assert!(lag > MS, "it was not loaded: {lag:?}");

        let took = hangs(&tree, &machine, &mut dice, 100).await;
        let bound = hang_bound(&Policy::default());
        told("twice the load", &took, bound);
        assert!(took[took.len() - 1] <= bound * 2, "{took:?}");
        own.abort();
        tree.shutdown().await;
    });
}

/// What was said against anybody.
fn suspicions(tree: &Tree) -> Vec<String> {
    let bad = [InstanceState::Suspect, InstanceState::AgentSilent, InstanceState::Recovering];
    let bad = bad.map(|s| s.to_string());
    let events = tree.events().since(&EventsArgs::default());
    let against = events.into_iter().filter(|e| e.to.as_ref().is_some_and(|to| bad.contains(to)));
    against.map(|e| format!("{:?}: {}", e.instance, e.cause)).collect()
}
