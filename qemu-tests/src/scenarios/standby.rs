//! A second kernel waits beside an instance, and is the instance after a crash, or the new kernel of a morph.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use kmorph_control::{MorphView, RecoveryStep};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::switch::{ADDRESS, question};
use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "standby",
    about: "a crashed kernel's service goes on in a kernel that waited for that; a morph to it starts none",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

/// SPECIFICATION.md: how many times sooner a standby serves than a kernel that is started.
const SOONER: f64 = 5.0;
/// Between the questions of the client.
const PACE: Duration = Duration::from_millis(10);

/// A client that asks all the time, each time on a new connection: the longest time without an answer.
struct Client {
    stop: Arc<AtomicBool>,
    asks: JoinHandle<Result<Duration>>,
}

impl Client {
    fn start(g: &Guest) -> Client {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let asks = g.beside(async move {
            let (mut gap, mut last) = (Duration::ZERO, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                // A question that the kernel dies of is asked again.
                if question().await.is_ok() {
                    gap = gap.max(last.elapsed());
                    last = Instant::now();
                }
                sleep(PACE).await;
            }
            Ok(gap)
        });
        Client { stop, asks }
    }

    fn end(self, g: &Guest) -> Result<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        g.wait(self.asks).context("the client")?
    }
}

/// Wait until web's standby is ready, with a kernel of this release.
fn armed(g: &Guest, release: &str) -> Result<()> {
    let until = SystemTime::now() + Duration::from_secs(60);
    loop {
        let standby = g.status("web")?.standby;
        if standby.as_ref().is_some_and(|s| s.state == "ready" && s.release.starts_with(release)) {
            return Ok(());
        }
        g.check(SystemTime::now() < until, || format!("no standby with {release}: {standby:?}"))?;
        g.pause(Duration::from_millis(20));
    }
}

/// One crash: from declared dead to serving again, and the longest gap of a client.
fn crash(g: &Guest, n: usize, release: &str) -> Result<(Duration, Duration, Vec<RecoveryStep>)> {
    let client = Client::start(g);
    g.tool(g.status("web")?.cid, "crash")?;
    let steps = g.recovered("web", n, Duration::from_secs(60))?;
    let at = |phase: &str| steps.iter().find(|s| s.phase == phase).map(|s| s.offset_us);
    let (dead, served) = (at("PREPARING_RECOVERY"), at("RECOVERY_COMPLETE"));
    let took = dead.zip(served).map(|(a, b)| Duration::from_micros(b.saturating_sub(a)));
    let answer = g.wait(question())?;
    g.check(answer.starts_with(release), || format!("answered by {answer:?}, not by {release}"))?;
    Ok((took.ok_or("a step is missing")?, client.end(g)?, steps))
}

fn took_over(steps: &[RecoveryStep]) -> bool {
    steps.iter().any(|s| s.phase == "TAKING_OVER")
}

fn guest(g: &Guest) -> Result<()> {
    g.define("web", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let publish = format!("--publish=tcp:{ADDRESS}=vsock:{}", tool::PORT);
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "web", "--kernel=/boot/vmlinuz-6.1", &initramfs, &publish])?;

    g.chapter("without a standby a kernel has to be started");
    let (boot, boot_gap, steps) = crash(g, 1, "6.1.")?;
    g.check(!took_over(&steps), || format!("{steps:?}"))?;

    g.chapter("with one the service goes on there, and another one is started");
    g.ctl(&["policy", "set", "standby", "web", "same"])?;
    armed(g, "6.1.")?;
    g.ctl(&["status", "web"])?;
    g.ctl(&["list"])?;
    let (same, same_gap, steps) = crash(g, 2, "6.1.")?;
    g.check(took_over(&steps), || format!("{steps:?}"))?;
    g.ctl(&["recovery-log", "--instance=web", "--since=20s"])?;

    g.chapter("a standby with another kernel: a morph to it starts none");
    g.ctl(&["policy", "set", "standby", "web", "/boot/vmlinuz-6.12"])?;
    armed(g, "6.12.")?;
    let began = SystemTime::now();
    let out = g.ctl(&["morph", "prepare", "web", "--kernel=/boot/vmlinuz-6.12", "--output", "json"])?;
    let took = began.elapsed().context("clock")?;
    let view: MorphView = serde_json::from_str(&out).context("the answer of morph")?;
    let taken = view.steps.iter().any(|s| s.detail.contains("no kernel had to be started"));
    g.check(taken, || format!("the report: {view:?}"))?;
    g.check(took < boot, || format!("prepare took {took:?}"))?;
    // In force when this one is used up.
    g.ctl(&["policy", "set", "standby", "web", "/boot/vmlinuz-6.1"])?;
    g.ctl(&["morph", "commit", "web"])?;
    let v = g.healthy("web")?;
    g.check(v.release.starts_with("6.12."), || format!("after the morph: {v:?}"))?;

    g.chapter("6.12 crashes: 6.1 goes on");
    armed(g, "6.1.")?;
    // The end of the morph is one of those that are counted.
    let (other, other_gap, steps) = crash(g, 4, "6.1.")?;
    g.check(took_over(&steps), || format!("{steps:?}"))?;
    let (taken, taken_gap) = (same.max(other), same_gap.max(other_gap));
    let ratio = boot.as_secs_f64() / taken.as_secs_f64();
    g.say(&format!(
        "declared dead to serving again: {same:.1?} and {other:.1?} with a standby, {boot:.1?} with a start ({ratio:.0} times); longest gap of a client {taken_gap:.1?} and {boot_gap:.1?}"
    ));
    g.check(ratio >= SOONER, || format!("a standby is only {ratio:.1} times sooner"))?;
    armed(g, "6.1.")?;

    g.chapter("a standby that dies is replaced; the instance notices nothing");
    let missed = g.heartbeat("web")?.missed;
    g.tool(g.status("web~standby")?.cid, "crash")?;
    let until = SystemTime::now() + Duration::from_secs(60);
    loop {
        let gone = g.status("web")?.standby.is_none_or(|s| s.state != "ready");
        if gone {
            break;
        }
        g.check(SystemTime::now() < until, || "nobody notices that the standby died".into())?;
        g.pause(Duration::from_millis(10));
    }
    armed(g, "6.1.")?;
    g.check(g.heartbeat("web")?.missed == missed, || "web missed heartbeats".into())?;

    g.chapter("the next daemon finds it again");
    let before = g.status("web~standby")?;
    g.kill_daemon()?;
    g.ctl(&["daemon", "start"])?;
    armed(g, "6.1.")?;
    let after = g.status("web~standby")?;
    g.check((after.id, after.incarnation) == (before.id, before.incarnation), || format!("{after:?}"))?;

    g.chapter("turned off, it is gone");
    g.ctl(&["policy", "set", "standby", "web", "off"])?;
    while g.daemon()?.cpus_lent > 1 {
        g.check(SystemTime::now() < until, || "its CPU is not back".into())?;
        g.pause(Duration::from_millis(20));
    }
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}
