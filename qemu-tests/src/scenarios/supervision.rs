//! OTP over kernels: groups, maintenance, policies and reload, an agent that is healed from inside, and a daemon
//! that is killed in every phase of a recovery.

use std::time::{Duration, SystemTime};

use kmorph_control::{InstanceState, InstanceView};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Scenario;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "supervision",
    about: "groups of kernels restart by their strategy, policies and groups are reloaded, maintenance watches without acting, a silent agent is restarted from inside",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

pub const KILLED: Scenario = Scenario {
    name: "supervision-killed",
    about: "kmorphd is killed in every phase of a recovery: the next one ends it, and the neighbour never notices",
    in_run: true,
    machine: MachineSpec::default,
    guest: killed,
    limit: Duration::from_secs(600),
};

const PATIENCE: Duration = Duration::from_secs(60);

fn config(strategy: Option<&str>) -> String {
    let group = strategy.map(|s| {
        format!(
            "groups:\n  - name: shop\n    strategy: {s}\n    members: [db, web]\n    restart-intensity: 20\n    restart-period: 10m\n"
        )
    });
    format!("policy:\n  restart-intensity: 50\n  restart-delay: 1ms\n{}", group.unwrap_or_default())
}

fn start(g: &Guest, strategy: Option<&str>) -> Result<()> {
    g.configure(&config(strategy))?;
    g.define("db", 1, &[2], 128)?;
    g.define("web", 2, &[3], 128)?;
    g.ctl(&["config", "check"])?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    for (name, kernel) in [("db", "6.1"), ("web", "6.12")] {
        g.ctl(&["spawn", name, &format!("--kernel=/boot/vmlinuz-{kernel}"), &initramfs])?;
    }
    Ok(())
}

fn finish(g: &Guest) -> Result<()> {
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// Look until it is so.
fn until(g: &Guest, name: &str, what: &str, so: impl Fn(&InstanceView) -> bool) -> Result<InstanceView> {
    let limit = SystemTime::now() + PATIENCE;
    loop {
        let view = g.status(name);
        match &view {
            Ok(v) if so(v) => return view,
            _ if SystemTime::now() > limit => return Err(format!("{name} is never {what}: {view:?}")),
            _ => g.pause(Duration::from_millis(20)),
        }
    }
}

fn serves(g: &Guest, name: &str, incarnation: u64) -> Result<InstanceView> {
    until(g, name, &format!("in service as incarnation {incarnation}"), |v| {
        v.state == InstanceState::Healthy && v.incarnation == incarnation
    })
}

/// Both members, by incarnation.
fn lives(g: &Guest, db: u64, web: u64) -> Result<()> {
    serves(g, "db", db)?;
    serves(g, "web", web)?;
    // It hears of its members, and after a reload anew, while others are served.
    let limit = SystemTime::now() + PATIENCE;
    loop {
        let group = g.ctl(&["group", "show", "shop"])?;
        if group.contains("UP") {
            return Ok(());
        }
        g.check(SystemTime::now() < limit, || format!("the group is not up: {group}"))?;
        g.pause(Duration::from_millis(20));
    }
}

fn guest(g: &Guest) -> Result<()> {
    start(g, Some("rest-for-one"))?;
    g.ctl(&["group", "list"])?;

    g.chapter("rest-for-one: the database takes its proxy along, not the other way round");
    g.tool(3, "crash")?;
    lives(g, 2, 2)?;
    g.tool(4, "crash")?;
    lives(g, 2, 3)?;
    let one = g.command("kmorphctl", &["recovery-log", "--output", "json"])?.out;
    let incident = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).context("read a step")?;
        let text = value["instance"].as_str().unwrap_or_default().to_owned();
        Result::Ok((value["incident"].as_u64().unwrap_or_default(), text))
    };
    let steps = one.lines().map(incident).collect::<Result<Vec<_>>>()?;
    let shared = |n: u64, name: &str| steps.iter().any(|(i, s)| *i == n && s == name);
    g.check(shared(1, "db") && shared(1, "web"), || format!("not one incident: {steps:?}"))?;
    g.check(!shared(2, "db") && shared(2, "web"), || format!("the second is web's alone: {steps:?}"))?;

    g.chapter("one-for-all after a reload, which touches nobody");
    g.configure(&config(Some("one-for-all")))?;
    g.ctl(&["daemon", "reload"])?;
    lives(g, 2, 3)?;
    g.tool(4, "hang")?;
    lives(g, 3, 4)?;

    g.chapter("maintenance: watched, not acted on");
    g.configure(&config(None))?;
    g.ctl(&["daemon", "reload"])?;
    g.ctl(&["maintenance", "on", "web"])?;
    g.tool(4, "hang")?;
    until(g, "web", "unresponsive", |v| v.state == InstanceState::Suspect)?;
    // Longer than any recovery takes to begin.
    g.pause(Duration::from_secs(4));
    let web = g.status("web")?;
    g.check(web.incarnation == 4 && web.maintenance && web.incident.is_none(), || {
        format!("it was acted on: {web:?}")
    })?;
    g.ctl(&["status", "web"])?;
    g.ctl(&["maintenance", "off", "web"])?;
    serves(g, "web", 5)?;

    g.chapter("policies: set, exported, imported");
    g.ctl(&["policy", "set", "heartbeat-timeout", "web", "2"])?;
    g.ctl_fails(&["policy", "set", "heartbeat-timeout", "web", "soon"], 6, &["heartbeat-timeout", "50ms"])?;
    g.ctl_fails(&["policy", "set", "hart-beat", "web", "2"], 2, &["hart-beat", "heartbeat-timeout"])?;
    let text = g.command("kmorphctl", &["policy", "export"])?.out;
    g.check(text.contains("web") && text.contains("2s"), || format!("the export lacks it: {text}"))?;
    std::fs::write("/tmp/policies.yaml", text.replace("2s", "3s")).context("write policies")?;
    g.ctl(&["policy", "import", "/tmp/policies.yaml", "--dry-run"])?;
    g.check(g.status("web")?.heartbeat_timeout_ms == 2000, || "a dry run changed something".into())?;
    g.ctl(&["policy", "import", "/tmp/policies.yaml"])?;
    g.check(g.status("web")?.heartbeat_timeout_ms == 3000, || "the import changed nothing".into())?;
    g.ctl(&["policy", "unset", "heartbeat-timeout", "web"])?;
    g.ctl(&["policy", "show", "--instance", "web"])?;

    g.chapter("a bad configuration changes nothing");
    g.configure("policy:\n  auto-heal: maybe\n")?;
    g.ctl_fails(&["config", "check"], 6, &["kmorphd.conf:2:14", "policy.auto-heal", "enabled, disabled"])?;
    g.ctl_fails(&["daemon", "reload"], 6, &["kmorphd.conf:2:14", "policy.auto-heal"])?;
    g.configure(&config(None))?;

    g.chapter("a silent agent is restarted by its guardian; its kernel is not touched");
    g.tool(4, "kill-agent")?;
    until(g, "web", "with a new agent", |v| v.agent_restarts == 1 && v.state == InstanceState::Healthy)?;
    g.tool(4, "stop-agent")?;
    until(g, "web", "with another new agent", |v| {
        v.agent_restarts == 2 && v.state == InstanceState::Healthy
    })?;
    serves(g, "web", 5)?;
    serves(g, "db", 3)?;
    let events = g.command("kmorphctl", &["events", "--output", "json"])?.out;
    for word in ["guardian", "RECOVERING", "\"incident\":1", "maintenance", "reloaded"] {
        g.check(events.contains(word), || format!("{word} is not among the events"))?;
    }
    finish(g)
}

fn killed(g: &Guest) -> Result<()> {
    start(g, None)?;
    let phases = ["DETECTING_FAILURE", "PREPARING_RECOVERY", "RECLAIMING_RESOURCES", "RESTARTING"];
    for (phase, n) in phases.into_iter().zip(1..) {
        g.chapter(&format!("killed at {phase}"));
        let pid = g.daemon()?.pid;
        g.tool(3, "crash")?;
        let incidents = |steps: &[kmorph_control::RecoveryStep]| steps.iter().map(|s| s.incident).max();
        g.follow(PATIENCE, |steps| {
            let last = incidents(steps);
            let seen = steps.iter().any(|s| Some(s.incident) == last && s.phase == phase);
            let begun = steps.iter().filter(|s| s.phase == "DETECTING_FAILURE").count() >= n;
            // Nothing is between the sight of the step and the end of the daemon.
            seen && begun && kill(Pid::from_raw(pid as i32), Signal::SIGKILL).is_ok()
        })?;
        g.gone(pid)?;
        g.ctl(&["daemon", "start"])?;
        let db = until(g, "db", "back", |v| v.state == InstanceState::Healthy && v.incarnation > n as u64)?;
        g.say(&format!("db serves as incarnation {}", db.incarnation));
        let web = serves(g, "web", 1)?;
        g.check(web.recoveries == 0, || format!("the neighbour was touched: {web:?}"))?;
    }
    g.ctl(&["recovery-log", "--instance=db"])?;
    g.check(g.online()? == "0-1", || "CPUs of running kernels were given away".into())?;
    finish(g)
}
