//! How long clients wait while the kernel under a service is replaced, beside what one does without morphs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use kmorph_control::BlackoutView;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::bench::{Samples, info, row};
use super::state::{self, Crowd, Seen};
use super::{OFTEN, Scenario};
use crate::guest::Guest;
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bench-blackout",
    about: "measures the interruption of a service by a morph",
    in_run: false,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1280M$0x40000000",
        ..MachineSpec::default()
    },
    guest,
    limit: Duration::from_secs(900),
};

const MORPHS: usize = 50;
/// Keys of the client: a page each.
const KEYS: u64 = 200;
/// Morphs with each size of handover memory.
const HANDOVERS: usize = 15;
const RESTARTS: usize = 5;
/// SPECIFICATION.md.
const ROUND_TRIPS: f64 = 20.0;

fn guest(g: &Guest) -> Result<()> {
    g.define("store", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.command("kmorphctl", &["daemon", "start"]).map(|_| ())?;
    state::spawn(g, 1)?;
    // Emulated, a round that copies next to nothing takes longer than the production limit now and then.
    g.command("kmorphctl", &["policy", "set", "morph-downtime", "store", "50ms"]).map(|_| ())?;
    let own = OwnGaps::start(g);
    let (all, seen) = morphs(g, MORPHS)?;
    let own = own.end(g)?;
    let samples = |f: fn(&BlackoutView) -> u64| Samples::new(all.iter().map(|b| f(b) as f64 / 1e3).collect());
    let gaps = gaps(&all, &seen);
    let took: Vec<f64> = seen.iter().flat_map(|s| &s.took).map(|d| d.as_secs_f64() * 1e3).collect();
    let request = Samples::new(took);
    let trips = (gaps.p50() - state::PACE.as_secs_f64() * 1e3) / request.p50();
    let measured = format!("p50 {:.1} ms, p99 {:.1} ms, {trips:.1} requests", gaps.p50(), gaps.at(0.99));
    let what = format!("longest gap of a client, {MORPHS} morphs");
    let kept = row(g, &what, &measured, "<= 20 requests + the pace, p50", trips <= ROUND_TRIPS);
    info(g, "  a request, p50 and p99", &format!("{:.2} ms, {:.2} ms", request.p50(), request.at(0.99)));
    info(
        g,
        "  the machine's own gaps: late for 1 ms",
        &format!("p50 {:.2} ms, p99 {:.2} ms, {:.1} ms at most", own.p50(), own.at(0.99), own.at(1.0)),
    );
    let total = samples(|b| b.total_us);
    info(
        g,
        "  the workload stands still",
        &format!("p50 {:.1} ms, p99 {:.1} ms", total.p50(), total.at(0.99)),
    );
    let phases: [fn(&BlackoutView) -> u64; 5] =
        [|b| b.freeze_us, |b| b.copy_us, |b| b.check_us, |b| b.record_us, |b| b.activate_us];
    let phases: Vec<String> = phases.iter().map(|f| format!("{:.1}", samples(*f).p50())).collect();
    info(g, "  freeze, copy, check, record, activate", &format!("p50 {} ms", phases.join(", ")));
    let mut proxied = vec![];
    for _ in 0..RESTARTS {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        g.wait(state::fill(1))?;
        let asks = g.beside(async move {
            let (mut longest, mut last) = (Duration::ZERO, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                // A connection that is lost with its kernel is followed by one that waits for the next.
                if state::fill(1).await.is_ok() {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                sleep(state::PACE).await;
            }
            longest
        });
        g.command("kmorphctl", &["recover", "store"]).map(|_| ())?;
        g.wait(state::fill(1))?;
        stop.store(true, Ordering::Relaxed);
        proxied.push(g.wait(asks).context("the client")?.as_secs_f64() * 1e3);
    }
    let proxy = Samples::new(proxied).p50();
    info(
        g,
        "  a proxy restart: the client waits for the next kernel",
        &format!("p50 {proxy:.0} ms, {:.0} times the gap", proxy / gaps.p50()),
    );
    let mut restarts = vec![];
    for _ in 0..RESTARTS {
        let began = SystemTime::now();
        g.command("kmorphctl", &["terminate", "store"]).map(|_| ())?;
        state::spawn(g, 1)?;
        g.wait(state::fill(1))?;
        restarts.push(began.elapsed().context("clock")?.as_secs_f64() * 1e3);
    }
    let restart = Samples::new(restarts).p50();
    info(
        g,
        "  the same kernel stopped and booted",
        &format!("p50 {restart:.0} ms, {:.0} times the gap", restart / gaps.p50()),
    );
    g.command("kmorphctl", &["terminate", "store"]).map(|_| ())?;
    let kept = in_handover_memory(g)? && kept;
    g.command("kmorphctl", &["daemon", "stop", "--graceful"]).map(|_| ())?;
    g.check(kept, || "a promise of SPECIFICATION.md was not kept".into())
}

/// How late somebody is who sleeps for a millisecond and needs nobody: what the emulated machine and its host cost alone.
struct OwnGaps {
    stop: Arc<AtomicBool>,
    sleeps: JoinHandle<Vec<f64>>,
}

impl OwnGaps {
    fn start(g: &Guest) -> OwnGaps {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let sleeps = g.beside(async move {
            let mut late = vec![];
            while !stopped.load(Ordering::Relaxed) {
                let due = Instant::now() + Duration::from_millis(1);
                sleep_until(due).await;
                late.push(due.elapsed().as_secs_f64() * 1e3);
            }
            late
        });
        OwnGaps { stop, sleeps }
    }

    fn end(self, g: &Guest) -> Result<Samples> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(Samples::new(g.wait(self.sleeps).context("who sleeps")?))
    }
}

fn morphs(g: &Guest, count: usize) -> Result<(Vec<BlackoutView>, Vec<Seen>)> {
    let crowd = Crowd::start(g, 1, KEYS);
    let mut all = vec![];
    for n in 0..count {
        all.push(state::morph(g, if n % 2 == 0 { "6.12" } else { "6.1" })?.1);
    }
    Ok((all, crowd.end(g)?))
}

/// The longest gap of a client around each morph, milliseconds.
fn gaps(all: &[BlackoutView], seen: &[Seen]) -> Samples {
    let gaps = all.iter().filter_map(|b| seen.iter().map(|s| s.around(b)).max());
    Samples::new(gaps.map(|d| d.as_secs_f64() * 1e3).collect())
}

/// Whether the interruption grows with the memory that changes hands.
fn in_handover_memory(g: &Guest) -> Result<bool> {
    let mut p50 = vec![];
    for mib in [2, 512] {
        state::spawn_in_handover_memory(g, mib)?;
        let (all, seen) = morphs(g, HANDOVERS)?;
        let (gaps, total) =
            (gaps(&all, &seen), Samples::new(all.iter().map(|b| b.total_us as f64 / 1e3).collect()));
        info(
            g,
            &format!("longest gap of a client, {mib} MiB change hands"),
            &format!("p50 {:.1} ms; stands still p50 {:.1} ms", gaps.p50(), total.p50()),
        );
        p50.push(gaps.p50());
        g.command("kmorphctl", &["terminate", "store"]).map(|_| ())?;
    }
    let ratio = p50.last().copied().unwrap_or(f64::NAN) / p50.first().copied().unwrap_or(f64::NAN);
    Ok(row(g, "  512 MiB beside 2 MiB", &format!("{ratio:.2}x"), "<= 1.2x", ratio <= 1.2))
}
