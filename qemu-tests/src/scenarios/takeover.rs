//! The new kernel of a morph lands on one spare CPU and half of the memory, and takes over the rest of the old one's.

use std::time::{Duration, SystemTime};

use kmorph_control::{BlackoutView, RecoveryStep};

use super::state::{self, Crowd, Seen};
use super::{OFTEN, Scenario};
use crate::guest::Guest;
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "takeover",
    about: "two CPUs and 256 MiB go from 6.1 to 6.12 and back on a machine that has one CPU and 128 MiB to spare",
    in_run: true,
    machine: || MachineSpec { memory_mib: 2560, cmdline: "memmap=400M$0x40000000", ..MachineSpec::default() },
    guest,
    limit: Duration::from_secs(480),
};

const CLIENTS: usize = 4;
/// SPECIFICATION.md: what comes after the commit beside the interruption itself.
const LONGER: f64 = 1.5;
/// So long nothing is done before a morph.
const CALM: Duration = Duration::from_secs(1);
const KEYS: u64 = 200;
/// A kernel keeps some of its memory for itself, the same in every life.
const SLACK_MIB: u64 = 24;

fn guest(g: &Guest) -> Result<()> {
    g.define("store", 1, &[2, 3], 256)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    state::spawn(g, 4)?;
    g.ctl(&["policy", "set", "morph-downtime", "store", "50ms"])?;
    let free = g.daemon()?.pool_free_bytes;
    let whole = memory(g)?;

    g.chapter("the new kernel starts on what is there, serves, and gets what the old one had");
    g.ctl(&["morph", "prepare", "store", "--kernel=/boot/vmlinuz-6.12", "--dry-run"])?;
    let crowd = Crowd::start(g, CLIENTS, KEYS);
    let mut blackouts = vec![];
    let mut ends = vec![];
    let mut calm = vec![];
    for (n, series) in ["6.12", "6.1", "6.12", "6.1"].into_iter().enumerate() {
        calm.push(SystemTime::now());
        g.pause(CALM);
        let (view, blackout) = state::morph(g, series)?;
        for step in view.steps.iter().filter(|s| s.state == "MORPH_GROWING" || s.state == "RUNNING") {
            g.say(&format!("{:.2} s {}", step.at_ms as f64 / 1e3, step.detail));
        }
        g.check(view.steps.iter().any(|s| s.state == "MORPH_GROWING"), || format!("it had all: {view:?}"))?;
        ends.push(SystemTime::now());
        has_everything(g, whole, free)?;
        g.say(&format!("morph {n}: CPUs {:?}", g.status("store")?.cpus));
        blackouts.push(blackout);
    }
    let seen = crowd.end(g)?;
    let answered: u64 = seen.iter().map(|s| s.answers).sum();
    let mut took: Vec<Duration> = seen.iter().flat_map(|s| s.took.clone()).collect();
    let gap: Vec<Duration> =
        blackouts.iter().filter_map(|b| seen.iter().map(|s| s.around(b)).max()).collect();
    let came =
        |b: &BlackoutView| SystemTime::UNIX_EPOCH + Duration::from_micros(b.began_unix_us + b.total_us);
    let later: Vec<Duration> =
        blackouts.iter().zip(&ends).map(|(b, end)| longest(&seen, came(b), *end)).collect();
    let before: Vec<Duration> = calm.iter().map(|from| longest(&seen, *from, *from + CALM)).collect();
    g.say(&format!(
        "{answered} answers on {CLIENTS} connections, a request takes p50 {:.1?}; longest gap around the commit {gap:.1?}, while CPUs and memory came {later:.1?}, in {CALM:?} before each morph {before:.1?}",
        state::quantile(&mut took, 0.5),
    ));
    let mean = |all: &[Duration]| all.iter().sum::<Duration>() / all.len().max(1) as u32;
    let (around, since, before) = (mean(&gap), mean(&later), mean(&before));
    // The longest gap of a longer time is a little longer anyway.
    g.check(since <= around.mul_f64(LONGER) + state::PACE, || {
        format!(
            "CPUs and memory that came stopped the service for {since:?}, the morph itself for {around:?}; the longest gap before a morph is {before:?}"
        )
    })?;

    g.chapter("its definition has followed, and its own agent knows where it is");
    let store = g.status("store")?;
    let defined = std::fs::read_to_string("/var/lib/kerf/instances/store.dts").context("the definition")?;
    g.check(defined.contains(&format!("id = <{:#x}>;", store.id)), || defined.clone())?;
    let told = g.tool(store.cid, "topology")?;
    g.check(told.contains(&format!("\"cid\":{},", store.cid)) && told.contains("\"serves\":true"), || told)?;

    g.chapter("the CPUs it got work, and a fence stops them too");
    let cid = g.status("store")?.cid;
    for _ in 0..2 {
        g.tool(cid, "hog 1")?;
    }
    g.tool(cid, "crash")?;
    let healed = |steps: &[RecoveryStep]| steps.last().is_some_and(|s| s.phase == "RECOVERY_COMPLETE");
    g.follow(Duration::from_secs(60), healed)?;
    has_everything(g, whole, free)?;

    g.chapter("a morph that is rolled back leaves what was there");
    g.ctl(&["morph", "prepare", "store", "--kernel=/boot/vmlinuz-6.12", "--memory=128M"])?;
    // Its tables name the CPU it is to get, but the old kernel runs there.
    let tried = g.tool(g.status("store~morph")?.cid, "online 1")?;
    g.check(tried.trim() == "EBUSY", || format!("onlining a CPU that was not granted: {tried}"))?;
    g.ctl(&["morph", "rollback", "store"])?;
    has_everything(g, whole, free)?;
    g.ctl(&["terminate", "store"])?;
    let after = g.daemon()?;
    g.check(after.pool_free_bytes == free + (256 << 20), || format!("the pool is not whole: {after:?}"))?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.kernel_is_clean()
}

/// MiB the instance's kernel says it has.
fn memory(g: &Guest) -> Result<u64> {
    let until = SystemTime::now() + Duration::from_secs(20);
    loop {
        let answer = g.tool(g.status("store")?.cid, "memory")?;
        if let Ok(kib) = answer.trim().parse::<u64>() {
            return Ok(kib >> 10);
        }
        g.check(SystemTime::now() < until, || format!("no memory: {answer}"))?;
        g.pause(Duration::from_millis(100));
    }
}

/// Both CPUs are online in it, it has all of its memory, and nothing is left of another kernel.
fn has_everything(g: &Guest, whole: u64, free: u64) -> Result<()> {
    let store = g.healthy("store")?;
    let release = g.tool(store.cid, "release")?;
    g.check(release.trim().ends_with(" 0-1"), || format!("CPUs online in it: {release}"))?;
    let memory = memory(g)?;
    g.check(memory.abs_diff(whole) <= SLACK_MIB, || format!("it has {memory} MiB, it had {whole}"))?;
    let until = SystemTime::now() + Duration::from_secs(20);
    loop {
        let (v, d) = (g.status("store")?, g.daemon()?);
        let kept = d.cpus_lent == 2 && d.cpus_online == 2 && d.pool_free_bytes == free && d.running == 1;
        if kept && v.morph.is_none() {
            g.check(v.cpus.len() == 2 && v.memory_bytes == 256 << 20 && v.advice.is_empty(), || {
                format!("{v:?}")
            })?;
            return Ok(());
        }
        g.check(SystemTime::now() < until, || format!("something is left: {v:?} {d:?}"))?;
        g.pause(Duration::from_millis(50));
    }
}

/// The longest gap of a client between two moments.
fn longest(seen: &[Seen], from: SystemTime, end: SystemTime) -> Duration {
    let gaps = seen.iter().flat_map(|s| &s.gaps);
    gaps.filter(|(at, gap)| *at - *gap >= from && *at <= end).map(|(_, gap)| *gap).max().unwrap_or_default()
}
