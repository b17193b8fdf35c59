//! A morph in which something fails at a boundary: before or after something that lasts, a write of the journal or a call
//! of the platform. The daemon is killed there, or the old kernel crashes, or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use kmorph_control::{InstanceState, InstanceView};
use tokio::net::TcpStream;

use super::{OFTEN, Scenario, state};
use crate::guest::{Guest, kv};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "failures",
    about: "the daemon, the old or the new kernel fails at boundaries of morphs in both directions: one kernel serves, no data is lost",
    in_run: true,
    machine,
    guest: some,
    limit: Duration::from_secs(600),
};

/// Every boundary, in as many parts, each of which takes about as long as everything else here together.
pub const PARTS: [Scenario; 4] = [
    part("failures-1", every::<0>),
    part("failures-2", every::<1>),
    part("failures-3", every::<2>),
    part("failures-4", every::<3>),
];

const fn part(name: &'static str, guest: fn(&Guest) -> Result<()>) -> Scenario {
    Scenario {
        name,
        about: "the same at every boundary, in four parts: every fourth of them",
        in_run: false,
        machine,
        guest,
        limit: Duration::from_secs(2 * 3600),
    }
}

const PROGRAM: &str = "/usr/lib/kmorph/kmorphd-failpoints";
const ARM: &str = "/run/kmorph/arm";
const LOG: &str = "/run/kmorph/boundaries";
/// Injections of one kind in one direction, in the short form.
const FEW: usize = 2;
/// Keys that are written and read.
const KEYS: u64 = 40;
const SETTLES: Duration = Duration::from_secs(60);

fn machine() -> MachineSpec {
    MachineSpec { memory_mib: 2560, cmdline: "memmap=400M$0x40000000", ..MachineSpec::default() }
}

fn some(g: &Guest) -> Result<()> {
    story(g, |all| {
        let step = (all.len() / FEW).max(1);
        // Not the same ones for every kind.
        all.iter().copied().skip(step / 2).step_by(step).take(FEW).collect()
    })
}

fn every<const PART: u64>(g: &Guest) -> Result<()> {
    let parts = PARTS.len() as u64;
    story(g, |all| all.iter().copied().filter(|n| n % parts == PART).collect())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    DaemonKilled,
    OldCrashes,
    NewCrashes,
}

/// The daemon with boundaries.
struct Daemon(Child);

impl Daemon {
    fn start(g: &Guest) -> Result<Daemon> {
        let log = std::fs::File::options().create(true).append(true).open("/run/kmorph/kmorphd.log");
        let child = Command::new(PROGRAM)
            .env("KMORPH_FAIL_LOG", LOG)
            .env("KMORPH_FAIL_ARM", ARM)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.context("the daemon's log")?)
            .spawn()
            .context(PROGRAM)?;
        until(g, "no daemon answers", || Ok(g.daemon().is_ok()))?;
        Ok(Daemon(child))
    }

    fn ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait().context("the daemon")?.is_some())
    }
}

fn until(g: &Guest, otherwise: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let limit = SystemTime::now() + SETTLES;
    while !so()? {
        g.check(SystemTime::now() < limit, || otherwise.to_owned())?;
        g.pause(Duration::from_millis(50));
    }
    Ok(())
}

fn story(g: &Guest, choose: impl Fn(&[u64]) -> Vec<u64>) -> Result<()> {
    g.define("store", 1, &[2, 3], 256)?;
    g.configure(OFTEN)?;
    std::fs::create_dir_all("/run/kmorph").context("/run/kmorph")?;
    let mut daemon = Daemon::start(g)?;
    state::spawn(g, 1)?;
    g.ctl(&["policy", "set", "morph-downtime", "store", "200ms"])?;
    let free = g.daemon()?.pool_free_bytes;
    let mut data = Data::default();
    g.wait(data.write())?;

    g.chapter("the boundaries of a morph, in both directions");
    let mut todo: BTreeMap<&str, Vec<(Kind, u64)>> = BTreeMap::new();
    for to in ["6.12", "6.1"] {
        arm(0, "")?;
        state::morph(g, to)?;
        settled(g, free)?;
        g.wait(data.check(Expect::Whole))?;
        let all = boundaries()?;
        g.say(&format!("to {to}: {} boundaries", all.len()));
        let numbers: Vec<u64> = all.iter().map(|(n, _)| *n).collect();
        let boots = all.iter().find(|(_, what)| what == "after boot").map_or(0, |(n, _)| *n);
        let later: Vec<u64> = numbers.iter().copied().filter(|n| *n > boots).collect();
        let list = todo.entry(to).or_default();
        list.extend(choose(&numbers).into_iter().map(|n| (Kind::DaemonKilled, n)));
        list.extend(choose(&numbers).into_iter().map(|n| (Kind::OldCrashes, n)));
        // Before that there is none.
        list.extend(choose(&later).into_iter().map(|n| (Kind::NewCrashes, n)));
        // All kinds in all phases from the beginning on, in the same order every time.
        list.sort_by_key(|(kind, n)| (n * 3 + *kind as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32);
    }

    g.chapter("something fails at each");
    let (mut done, mut outcomes) = (0, BTreeMap::<(Kind, &str), u32>::new());
    while todo.values().any(|list| !list.is_empty()) {
        let before = g.healthy("store")?;
        let (from, to) = if before.release.starts_with("6.1.") { ("6.1", "6.12") } else { ("6.12", "6.1") };
        let Some((kind, n)) = todo.get_mut(to).and_then(Vec::pop) else {
            // All that is left is in the other direction.
            state::morph(g, to)?;
            settled(g, free)?;
            continue;
        };
        g.wait(data.write())?;
        let new = if before.id == 511 { 512 } else { 513 };
        let crash = |cid: u32| format!("/usr/bin/kmorph-qemu ask {cid} crash");
        match kind {
            Kind::DaemonKilled => arm(n, "")?,
            Kind::OldCrashes => arm(n, &crash(before.cid))?,
            Kind::NewCrashes => arm(n, &crash(new))?,
        }
        let kernel = format!("--kernel=/boot/vmlinuz-{to}");
        let told = g.command("kmorphctl", &["morph", "store", &kernel, "--auto-commit"])?;
        if kind == Kind::DaemonKilled {
            until(g, &format!("boundary {n}: the daemon was not killed"), || daemon.ended())?;
            daemon = Daemon::start(g)?;
        }
        let after = settled(g, free)?;
        let took_over = after.release.starts_with(&format!("{to}."));
        let whole = match kind {
            Kind::DaemonKilled => Expect::Whole,
            // A kernel that crashed took with it what nobody else had. One that did so while the new one was still being
            // started was healed, and handed over what it had then: nothing.
            Kind::OldCrashes if took_over && n < copies()? => {
                let healed = after.recoveries - before.recoveries;
                g.check(healed == 1, || format!("boundary {n}: {healed} recoveries of one crash"))?;
                Expect::Fresh
            }
            Kind::OldCrashes if took_over => Expect::Whole,
            Kind::NewCrashes if !took_over => Expect::Whole,
            Kind::OldCrashes | Kind::NewCrashes => Expect::WholeOrFresh,
        };
        let at = boundaries()?.into_iter().find(|(m, _)| *m == n).map(|(_, what)| what).unwrap_or_default();
        let found = g.wait(data.check(whole)).map_err(|e| {
            format!("{kind:?} at boundary {n} ({at}) from {from} to {to}, told {}: {e}", told.code)
        })?;
        let outcome = match (took_over, found) {
            (true, Found::Whole) => "committed",
            (false, Found::Whole) => "rolled back",
            (_, Found::Fresh) => "crashed with its data",
        };
        *outcomes.entry((kind, outcome)).or_default() += 1;
        g.say(&format!("{from} to {to}, {kind:?} at {n} ({at}): {outcome}"));
        done += 1;
    }
    g.say(&format!("{done} failures: {outcomes:?}"));
    for kind in [Kind::DaemonKilled, Kind::OldCrashes, Kind::NewCrashes] {
        g.check(outcomes.keys().any(|(k, _)| *k == kind), || format!("{kind:?} was never tried"))?;
    }
    g.ctl(&["daemon", "stop", "--graceful"])?;
    until(g, "the daemon does not end", || daemon.ended())?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// At the n-th boundary from now on this command is run; the daemon is killed when it is empty.
fn arm(n: u64, command: &str) -> Result<()> {
    std::fs::write(LOG, "").context(LOG)?;
    std::fs::write(format!("{ARM}.new"), format!("{n} {command}\n")).context(ARM)?;
    std::fs::rename(format!("{ARM}.new"), ARM).context(ARM)
}

/// What was passed since then.
fn boundaries() -> Result<Vec<(u64, String)>> {
    let text = std::fs::read_to_string(Path::new(LOG)).context(LOG)?;
    let all = text.lines().filter_map(|l| l.split_once(' '));
    Ok(all.filter_map(|(n, what)| Some((n.parse().ok()?, what.to_owned()))).collect())
}

/// The boundary before which nothing of the old kernel's state is with the new one.
fn copies() -> Result<u64> {
    let agreed = |(_, what): &(u64, String)| what.contains("MORPH_TRANSFERRING");
    boundaries()?.into_iter().find(agreed).map(|(n, _)| n).ok_or_else(|| "nothing was copied".into())
}

/// Exactly one kernel is the instance, it serves, it has what it is to have, and nothing is left of another one.
fn settled(g: &Guest, free: u64) -> Result<InstanceView> {
    let mut last = String::new();
    let limit = SystemTime::now() + SETTLES;
    loop {
        if let (Ok(v), Ok(d)) = (g.status("store"), g.daemon()) {
            let exact = d.running == 1 && d.cpus_lent == 2 && d.cpus_online == 2 && d.pool_free_bytes == free;
            if v.state == InstanceState::Healthy && v.morph.is_none() && v.incident.is_none() && exact {
                let memory = v.memory_bytes >> 20;
                g.check(v.cpus.len() == 2 && memory == 256 && v.advice.is_empty(), || format!("{v:?}"))?;
                return Ok(v);
            }
            last = format!("{v:?} {d:?}");
        }
        g.check(SystemTime::now() < limit, || format!("it does not come to rest: {last}"))?;
        g.pause(Duration::from_millis(50));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Whole,
    Fresh,
    WholeOrFresh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Whole,
    Fresh,
}

/// What the store has to have.
#[derive(Default)]
struct Data {
    known: BTreeMap<u64, u64>,
    next: u64,
}

async fn store() -> Result<kv::client::Client<TcpStream>> {
    Ok(kv::client::Client::new(TcpStream::connect(state::ADDRESS).await.context("connect")?))
}

impl Data {
    /// Change every key.
    async fn write(&mut self) -> Result<()> {
        let mut store = store().await?;
        for key in 0..KEYS {
            self.next += 1;
            store.put(key, self.next).await?;
            self.known.insert(key, self.next);
        }
        Ok(())
    }

    /// Everything is there, or nothing is: never a part.
    async fn check(&mut self, expect: Expect) -> Result<Found> {
        let mut store = store().await?;
        let mut found = BTreeMap::new();
        for key in self.known.keys() {
            found.insert(*key, store.get(*key).await?);
        }
        if found == self.known && expect != Expect::Fresh {
            return Ok(Found::Whole);
        }
        let values: BTreeSet<u64> = found.values().copied().collect();
        if expect != Expect::Whole && values == BTreeSet::from([0]) {
            self.known.clear();
            return Ok(Found::Fresh);
        }
        let wrong: Vec<_> = found.iter().filter(|(k, v)| self.known.get(k) != Some(v)).take(5).collect();
        Err(format!("the store has {wrong:?} where {:?} belongs", self.known.iter().next()))
    }
}
