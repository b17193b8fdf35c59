//! The README's story: two kernels of different series, a crash, a hang, and everything given back.

use std::time::Duration;

use kmorph_control::{InstanceState, RecoveryStep};

use super::Scenario;
use crate::Result;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "story",
    about: "two kernels of different series run side by side, crash, hang, are healed, and give everything back",
    in_run: true,
    machine: MachineSpec::default,
    guest: tell,
    limit: Duration::from_secs(170),
};

const WEB: u32 = 3;
const DB: u32 = 4;

fn tell(g: &Guest) -> Result<()> {
    let before = g.online()?;
    g.chapter("A stock Debian kernel has the machine; kerf has defined two instances");
    g.define("web-server", 1, &[2], 128)?;
    g.define("database", 2, &[3], 128)?;
    g.say(&format!("primary: Linux {}, CPUs online: {before}", release()?));
    g.ctl(&["daemon", "start"])?;

    g.chapter("Each instance gets a kernel of its own");
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "web-server", "--kernel=/boot/vmlinuz-6.1", &initramfs, "--heartbeat-timeout=1"])?;
    g.ctl(&["spawn", "database", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;
    g.say(&format!("CPUs online in the primary now: {}", g.online()?));
    g.ctl(&["list"])?;
    g.ctl(&["status", "web-server"])?;
    g.ctl(&["heartbeat", "database"])?;
    g.ctl(&["health", "database"])?;
    g.ctl(&["ping", "web-server"])?;
    g.ctl(&["ping", "database"])?;
    for (name, cid, series) in [("web-server", WEB, "6.1."), ("database", DB, "6.12.")] {
        let says = g.tool(cid, "release")?;
        g.check(says.starts_with(series), || format!("{name} runs {says}, not {series}"))?;
    }
    let online = g.online()?;
    g.check(online == "0-1", || format!("the primary still has CPUs {online}"))?;

    g.chapter("web-server's kernel crashes (sysrq c, from inside)");
    let database = g.heartbeat("database")?;
    g.tool(WEB, "crash")?;
    let steps = g.recovered("web-server", 1, Duration::from_secs(60))?;
    report(g, &steps);
    undisturbed(g, "database", &database)?;
    kernel_log(g, "web-server")?;
    g.ctl(&["list"])?;

    g.chapter("database's kernel hangs with interrupts off");
    let web = g.heartbeat("web-server")?;
    g.tool(DB, "hang")?;
    let steps = g.recovered("database", 1, Duration::from_secs(60))?;
    report(g, &steps);
    undisturbed(g, "web-server", &web)?;

    metrics(g)?;

    g.chapter("What happened, step by step");
    let log = g.ctl(&["recovery-log"])?;
    for phase in ["DETECTING_FAILURE", "PREPARING_RECOVERY", "RECLAIMING_RESOURCES", "RECOVERY_COMPLETE"] {
        let n = log.lines().filter(|l| l.contains(phase)).count();
        g.check(n >= 2, || format!("{phase} is {n} times in the recovery log, not twice"))?;
    }
    for (name, cid) in [("web-server", WEB), ("database", DB)] {
        let v = g.healthy(name)?;
        g.check(v.incarnation == 2 && v.recoveries == 1, || format!("{name}: {v:?}"))?;
        g.tool(cid, "release")?;
    }

    g.chapter("Everything goes back to the primary");
    g.tool(WEB, "ends-slowly")?;
    g.ctl(&["terminate", "web-server"])?;
    let log = g.command("kmorphctl", &["console", "web-server"])?.out;
    g.check(log.contains("workload: ended in order"), || format!("its workload was cut off: {log}"))?;
    g.ctl(&["terminate", "database"])?;
    let after = g.online()?;
    g.say(&format!("CPUs online in the primary: {after}"));
    g.check(after == before, || format!("CPUs online: {after}, {before} at the start"))?;
    let d = g.daemon()?;
    g.check(d.pool_free_bytes == d.pool_bytes && d.running == 0, || {
        format!("something was not given back: {d:?}")
    })?;
    g.check(g.status("database")?.state == InstanceState::Stopped, || "database is not STOPPED".into())?;
    g.ctl(&["daemon", "stop"])?;
    g.kernel_is_clean()
}

fn release() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|e| e.to_string())?.trim().to_string())
}

/// The recovery in one look: phases with their times.
pub fn report(g: &Guest, steps: &[RecoveryStep]) {
    for s in steps {
        g.say(&format!("  {:+10.1} ms  {:<21} {}", s.offset_us as f64 / 1e3, s.phase, s.detail));
    }
}

/// The other instance never missed a beat: same life, no missed heartbeat.
fn undisturbed(g: &Guest, name: &str, before: &kmorph_control::HeartbeatView) -> Result<()> {
    let now = g.heartbeat(name)?;
    let v = g.healthy(name)?;
    g.say(&format!(
        "{name}: {} heartbeats answered meanwhile, {} missed",
        now.received - before.received,
        now.missed - before.missed
    ));
    g.check(now.missed == before.missed && now.received > before.received, || {
        format!("{name} missed beats: {now:?}")
    })?;
    g.check(v.incident.is_none(), || format!("{name} has an incident"))
}

/// The kernel's log is read from its memory, without any device.
fn kernel_log(g: &Guest, name: &str) -> Result<()> {
    let out = g.command("kmorphctl", &["console", name])?;
    g.check(out.out.contains("Linux version"), || {
        format!("the console of {name} shows no kernel log: {}{}", out.out, out.err)
    })
}

/// What Prometheus would read.
fn metrics(g: &Guest) -> Result<()> {
    let out = g.command("/bin/busybox", &["wget", "-q", "-O", "-", "http://127.0.0.1:9464/metrics"])?;
    let wanted = [
        "kmorph_heartbeat_rtt_seconds_bucket{instance=\"database\"",
        "kmorph_pulse_age_seconds{instance=\"web-server\"}",
        "kmorph_recoveries_total{instance=\"web-server\",result=\"recovered\"} 1",
        "kmorph_instance_state{instance=\"database\",state=\"RUNNING\"} 1",
        "kmorph_loop_lag_seconds",
    ];
    match wanted.iter().find(|w| !out.out.contains(**w)) {
        None => Ok(()),
        Some(missing) => Err(format!("{missing} is not among the metrics: {}{}", out.out, out.err)),
    }
}
