//! A service whose memory and clients go along when its kernel is replaced.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use kmorph_control::{BlackoutView, MorphView};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD, kv};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "state",
    about: "a store with 64 MiB and eight clients goes to and fro between 6.1 and 6.12 twenty times: no answer is lost, repeated or reset",
    in_run: true,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1024M$0x40000000",
        ..MachineSpec::default()
    },
    guest,
    limit: Duration::from_secs(720),
};

pub const HANDOVER: Scenario = Scenario {
    name: "state-handover",
    about: "the same with 512 MiB that change hands instead of being copied",
    in_run: true,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1280M$0x40000000",
        ..MachineSpec::default()
    },
    guest: handover,
    limit: Duration::from_secs(480),
};

pub(super) const ADDRESS: &str = "127.0.0.1:8080";
const CLIENTS: usize = 8;
/// Morphs in a row, to and fro: it ends where it began.
const IN_A_ROW: u32 = 20;
/// Between the requests of a client.
pub(super) const PACE: Duration = Duration::from_millis(25);
/// The same for 512 MiB.
const ALL_KEYS: u64 = 16_000;
/// The longest gap around a morph is at most so many requests long (SPECIFICATION.md).
const ROUND_TRIPS: u32 = 20;
/// Keys of each client: a page each, 8 MiB together.
const KEYS: u64 = 2000;

/// What a client saw.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) answers: u64,
    /// When answers came, and the time since the one before, where requests are sent at a constant rate.
    pub(super) gaps: Vec<(SystemTime, Duration)>,
    pub(super) took: Vec<Duration>,
    last_served: u64,
    /// What every key has to have.
    known: Known,
}

type Known = BTreeMap<u64, u64>;

impl Seen {
    /// The longest gap that touches an interruption.
    pub(super) fn around(&self, b: &BlackoutView) -> Duration {
        let at = |us| SystemTime::UNIX_EPOCH + Duration::from_micros(us);
        let (from, to) = (at(b.began_unix_us), at(b.began_unix_us + b.total_us));
        let touches = |(end, gap): &&(SystemTime, Duration)| *end >= from && *end - *gap <= to;
        self.gaps.iter().filter(touches).map(|(_, gap)| *gap).max().unwrap_or_default()
    }
}

/// Ask at a constant rate on one connection, and know every value.
async fn client(number: u64, keys: u64, known: Known, stop: Arc<AtomicBool>) -> Result<Seen> {
    let mut seen = Seen { known, ..Seen::default() };
    let stream = TcpStream::connect(ADDRESS).await.context("connect")?;
    stream.set_nodelay(true).context("nodelay")?;
    let mut kv = kv::client::Client::new(stream);
    // A sequence of its own for each client, the same in every run.
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut last: Option<Instant> = None;
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let key = number * keys + (random >> 33) % keys;
        let asked = Instant::now();
        let answers = seen.answers;
        let what = || format!("client {number}, request {answers}");
        if random & (1 << 32) == 0 {
            kv.put(key, random).await.context(&what())?;
            seen.known.insert(key, random);
        } else {
            let value = kv.get(key).await.context(&what())?;
            let want = seen.known.get(&key).copied().unwrap_or(0);
            if value != want {
                return Err(format!("{}: key {key} has {value}, not {want}", what()));
            }
        }
        let now = Instant::now();
        seen.took.push(now - asked);
        seen.gaps.extend(last.map(|l| (SystemTime::now(), now - l)));
        (seen.answers, seen.last_served, last) = (seen.answers + 1, kv.served, Some(now));
        due = (due + PACE).max(now);
        sleep_until(due).await;
    }
    Ok(seen)
}

/// Write so many pages; how many requests were served after that.
pub(super) async fn fill(pages: u64) -> Result<u64> {
    let mut kv = kv::client::Client::new(TcpStream::connect(ADDRESS).await.context("connect")?);
    for first in (0..pages).step_by(500) {
        // What a client expects of a key it has not written.
        kv.clear(first..pages.min(first + 500)).await?;
    }
    Ok(kv.served)
}

/// Write so many pages with what cannot be compressed.
pub(super) async fn noise(pages: u64) -> Result<u64> {
    let mut kv = kv::client::Client::new(TcpStream::connect(ADDRESS).await.context("connect")?);
    for first in (0..pages).step_by(500) {
        kv.many("noise", first..pages.min(first + 500), first + 1).await?;
    }
    Ok(kv.served)
}

pub(super) struct Crowd {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<Seen>>>,
}

impl Crowd {
    pub(super) fn start(g: &Guest, clients: usize, keys: u64) -> Crowd {
        Crowd::again(g, std::iter::repeat_with(Seen::default).take(clients).collect(), keys)
    }

    /// Clients that know what those before them did.
    fn again(g: &Guest, before: Vec<Seen>, keys: u64) -> Crowd {
        let stop = Arc::new(AtomicBool::new(false));
        let one = |(n, seen): (u64, Seen)| g.beside(client(n, keys, seen.known, stop.clone()));
        let clients = (0..).zip(before).map(one).collect();
        Crowd { stop, clients }
    }

    pub(super) fn end(self, g: &Guest) -> Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().map(|c| g.wait(c).context("a client")?).collect()
    }
}

pub(super) fn quantile(all: &mut [Duration], share: f64) -> Duration {
    all.sort_unstable();
    all.get(((all.len() as f64 - 1.0) * share) as usize).copied().unwrap_or_default()
}

/// A store whose memory is copied.
pub(super) fn spawn(g: &Guest, mib: u32) -> Result<()> {
    start(g, mib, &[])
}

/// A store in handover memory.
pub(super) fn spawn_in_handover_memory(g: &Guest, mib: u32) -> Result<()> {
    start(g, 0, &[&format!("--handover-memory={mib}M")])
}

pub(super) fn start(g: &Guest, mib: u32, more: &[&str]) -> Result<()> {
    let publish = format!("--publish=tcp:{ADDRESS}=vsock:{},sessions", kv::PORT);
    let (initramfs, cmdline) =
        (format!("--initramfs={WORKLOAD}"), format!("--kernel-cmdline=quiet kv={mib}"));
    let args = ["spawn", "store", "--kernel=/boot/vmlinuz-6.1", &initramfs, &cmdline, &publish];
    let done = g.command("kmorphctl", &[&args[..], more].concat())?;
    g.check(done.code == 0, || format!("spawn store: {}", done.err))
}

/// Replace the kernel; what the report says of the interruption.
pub(super) fn morph(g: &Guest, series: &str) -> Result<(MorphView, BlackoutView)> {
    let kernel = format!("--kernel=/boot/vmlinuz-{series}");
    let done = g.command("kmorphctl", &["morph", "store", &kernel, "--auto-commit", "--output", "json"])?;
    g.check(done.code == 0, || format!("morph to {series}: {}", done.err))?;
    let view: MorphView = serde_json::from_str(&done.out).context("the answer of morph")?;
    let blackout = view.blackout.clone().ok_or_else(|| format!("nothing stood still: {view:?}"))?;
    g.check(view.committed == Some(true), || format!("the report: {view:?}"))?;
    g.say(&format!(
        "to {series}: {} rounds, {:.1} MiB at {:.0} MiB/s; stood still for {:.2} ms: freeze {:.2}, copy {:.2} ({} KiB), check {:.2}, record {:.2}, activate {:.2}",
        view.transfer.as_ref().map_or(0, |t| t.rounds),
        view.transfer.as_ref().map_or(0.0, |t| t.bytes as f64 / 1_048_576.0),
        view.transfer.as_ref().map_or(0.0, |t| t.mib_per_s),
        blackout.total_us as f64 / 1e3,
        blackout.freeze_us as f64 / 1e3,
        blackout.copy_us as f64 / 1e3,
        blackout.bytes >> 10,
        blackout.check_us as f64 / 1e3,
        blackout.record_us as f64 / 1e3,
        blackout.activate_us as f64 / 1e3,
    ));
    for step in view.steps.iter().filter(|s| s.detail.starts_with("round")) {
        g.say(&step.detail);
    }
    Ok((view, blackout))
}

fn guest(g: &Guest) -> Result<()> {
    g.define("store", 1, &[2], 256)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    spawn(g, 64)?;
    let free = g.daemon()?.pool_free_bytes;
    g.ctl(&["policy", "set", "morph-downtime", "store", "50ms"])?;

    g.chapter("every page of the store is written, so that all of it has to be copied");
    let filled = g.wait(fill(16_000))?;
    g.check(filled == 16_000, || format!("{filled} requests were served"))?;

    g.chapter("its kernel is replaced while eight clients read and write");
    let crowd = Crowd::start(g, CLIENTS, KEYS);
    let mut blackouts = vec![];
    for n in 0..IN_A_ROW {
        let (view, blackout) = morph(g, if n % 2 == 0 { "6.12" } else { "6.1" })?;
        let shared = view.transfer.map_or(0, |t| t.shared_bytes);
        g.check(shared > 60 << 20, || format!("morph {n}: {shared} bytes went through shared memory"))?;
        blackouts.push(blackout);
    }
    let seen = crowd.end(g)?;
    let answered: u64 = seen.iter().map(|s| s.answers).sum();
    let served = seen.iter().map(|s| s.last_served).max().unwrap_or_default();
    g.check(served == filled + answered, || {
        format!("{answered} answers, and {} requests were served", served - filled)
    })?;
    let mut took: Vec<Duration> = seen.iter().flat_map(|s| s.took.clone()).collect();
    let request = quantile(&mut took, 0.5);
    let mut gaps: Vec<Duration> =
        blackouts.iter().filter_map(|b| seen.iter().map(|s| s.around(b)).max()).collect();
    g.say(&format!(
        "{answered} answers on {CLIENTS} connections, none lost, repeated or reset; a request takes p50 {request:.1?}; longest gap of any client around each morph {gaps:.1?}, with {PACE:?} between requests",
    ));
    let gap = quantile(&mut gaps, 0.5);
    g.check(gap <= request * ROUND_TRIPS + PACE, || {
        format!("a gap of {gap:?} is more than {ROUND_TRIPS} times {request:?}")
    })?;
    let store = g.healthy("store")?;
    let moved = u64::from(IN_A_ROW) * CLIENTS as u64;
    g.check(store.publish[0].failed == 0 && store.publish[0].moved == moved, || format!("{store:?}"))?;
    let after = g.daemon()?.pool_free_bytes;
    g.check(after == free, || format!("{after} bytes of the pool are free, {free} were"))?;
    g.ctl(&["status", "store"])?;

    g.chapter("whoever fails while state is copied: the store goes on, and knows everything");
    let crowd = Crowd::again(g, seen, KEYS);
    let morphing = begin(g, "6.12")?;
    until_copying(g)?;
    g.tool(g.status("store~morph")?.cid, "crash")?;
    let (code, err) = g.wait(morphing).context("the morph")?;
    g.say(&format!("the new kernel crashed: {}", err.trim()));
    g.check(code == 13 && err.contains("the old kernel goes on"), || format!("exit code {code}: {err}"))?;
    let seen = crowd.end(g)?;
    g.check(seen.iter().all(|s| s.answers > 0), || "a client was not answered".into())?;
    let before = g.wait(served_so_far())?;
    let morphing = begin(g, "6.12")?;
    until_copying(g)?;
    g.kill_daemon()?;
    g.wait(morphing).context("the morph")?;
    g.ctl(&["daemon", "start"])?;
    alone(g)?;
    let after = g.wait(served_so_far())?;
    g.check(after == before + 1, || {
        format!("{after} requests were served, {before} before the daemon was killed")
    })?;
    let kernel = g.healthy("store")?.release;
    g.check(kernel.starts_with("6.1."), || format!("kernel {kernel} serves"))?;

    g.chapter("and the next morph is as good as the first");
    let crowd = Crowd::again(g, seen, KEYS);
    morph(g, "6.12")?;
    crowd.end(g)?;
    let after = g.daemon()?.pool_free_bytes;
    g.check(after == free, || format!("{after} bytes of the pool are free, {free} were"))?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

fn handover(g: &Guest) -> Result<()> {
    g.define("store", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let free = g.daemon()?.pool_free_bytes;
    spawn_in_handover_memory(g, 512)?;
    g.ctl(&["policy", "set", "morph-downtime", "store", "50ms"])?;

    g.chapter("the kernel is replaced while eight clients read and write all over the memory");
    let crowd = Crowd::start(g, CLIENTS, ALL_KEYS);
    for series in ["6.12", "6.1", "6.12"] {
        let (view, _) = morph(g, series)?;
        let copied = view.transfer.map_or(u64::MAX, |t| t.bytes);
        g.check(copied < 1 << 20, || format!("{copied} bytes were copied"))?;
    }
    let seen = crowd.end(g)?;
    let answered: u64 = seen.iter().map(|s| s.answers).sum();
    let served = seen.iter().map(|s| s.last_served).max().unwrap_or_default();
    g.check(served == answered, || format!("{answered} answers, and {served} requests were served"))?;
    g.say(&format!("{answered} answers on {CLIENTS} connections, none lost, repeated or reset"));
    let store = g.healthy("store")?;
    g.check(store.publish[0].failed == 0 && store.publish[0].moved == 3 * CLIENTS as u64, || {
        format!("{store:?}")
    })?;
    g.ctl(&["status", "store"])?;

    g.chapter("a new kernel that dies before the commit leaves the memory with the old one");
    let crowd = Crowd::again(g, seen, ALL_KEYS);
    g.ctl(&["morph", "prepare", "store", "--kernel=/boot/vmlinuz-6.1"])?;
    g.tool(g.status("store~morph")?.cid, "crash")?;
    alone(g)?;
    let seen = crowd.end(g)?;
    g.check(seen.iter().all(|s| s.answers > 0), || "a client was not answered".into())?;

    g.chapter("and it is given back to the pool with the instance");
    g.ctl(&["terminate", "store"])?;
    let after = g.daemon()?.pool_free_bytes;
    g.check(after == free, || format!("{after} bytes of the pool are free, {free} were"))?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

async fn served_so_far() -> Result<u64> {
    let mut kv = kv::client::Client::new(TcpStream::connect(ADDRESS).await.context("connect")?);
    kv.get(0).await?;
    Ok(kv.served)
}

/// A morph beside the scenario; its exit code and what it said.
fn begin(g: &Guest, series: &str) -> Result<JoinHandle<(i32, String)>> {
    let mut command = tokio::process::Command::new("kmorphctl");
    command.args(["morph", "store", &format!("--kernel=/boot/vmlinuz-{series}"), "--auto-commit"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(g.beside(async move {
        match command.output().await {
            Ok(out) => (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&out.stderr).into_owned()),
            Err(e) => (-1, e.to_string()),
        }
    }))
}

fn until_copying(g: &Guest) -> Result<()> {
    let until = SystemTime::now() + Duration::from_secs(60);
    while g.status("store")?.morph.as_deref() != Some("MORPH_TRANSFERRING") {
        g.check(SystemTime::now() < until, || "nothing is copied".into())?;
        g.pause(Duration::from_millis(20));
    }
    Ok(())
}

/// Nothing is left of a morph.
fn alone(g: &Guest) -> Result<()> {
    let until = SystemTime::now() + Duration::from_secs(60);
    while g.status("store")?.morph.is_some() || g.daemon()?.running != 1 {
        g.check(SystemTime::now() < until, || "something is left of the morph".into())?;
        g.pause(Duration::from_millis(100));
    }
    Ok(())
}
