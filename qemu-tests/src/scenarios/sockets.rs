//! What stream sockets promise, checked between two kernels from either side.

use std::time::{Duration, SystemTime};

use kmorph_platform::partition::Partition;
use kmorph_platform::{InstanceId, Platform};

use super::Scenario;
use super::transport::{boot, end};
use crate::guest::{Guest, pingpong, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "vsock-sockets",
    about: "close, half-close, shutdown before the accept, abort, epoll, non-blocking connect, many sockets, module unload: from either kernel",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(480),
};

/// The same checks again and again, for who looks for what happens once in a hundred runs.
pub const AGAIN: Scenario = Scenario {
    name: "vsock-again",
    about: "the checks of vsock-sockets, fifty times; not part of the tests",
    in_run: false,
    machine: MachineSpec::default,
    guest: again,
    limit: Duration::from_secs(3000),
};

fn again(g: &Guest) -> Result<()> {
    let port = tool::CHECK_PORT.to_string();
    let mut here =
        std::process::Command::new("vsock_check").args(["serve", &port]).spawn().context("vsock_check")?;
    for round in 0..10 {
        for series in ["6.12", "6.1"] {
            g.chapter(&format!("round {round}: an instance on {series}"));
            let platform = g.wait(boot(series))?;
            for _ in 0..5 {
                checks(g, &platform, &port)?;
            }
            g.wait(end(&platform))?;
        }
    }
    here.kill().and_then(|()| here.wait()).context("end vsock_check")?;
    g.kernel_is_clean()
}

/// The checks take 5 s.
const HANGS_AFTER: Duration = Duration::from_secs(60);
const MODULE: &str = "kerf_vsock";
const MESSAGES: usize = 1000;

fn guest(g: &Guest) -> Result<()> {
    let port = tool::CHECK_PORT.to_string();
    let mut here =
        std::process::Command::new("vsock_check").args(["serve", &port]).spawn().context("vsock_check")?;
    for series in ["6.1", "6.12"] {
        g.chapter(&format!("an instance on {series}"));
        let platform = g.wait(boot(series))?;
        checks(g, &platform, &port)?;
        let rmmod = g.command("rmmod", &[MODULE])?;
        g.check(rmmod.code != 0, || "the transport could be unloaded while it was used".into())?;
        counters(g)?;
        g.wait(end(&platform))?;
    }
    here.kill().and_then(|()| here.wait()).context("end vsock_check")?;
    g.chapter("the modules go and come back");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("release")?;
    for (program, arguments) in [
        ("rmmod", MODULE.to_string()),
        ("rmmod", "kmorph".into()),
        ("insmod", format!("/lib/modules/{}/extra/kmorph.ko", release.trim())),
        ("insmod", format!("/lib/modules/{}/extra/kerf-vsock.ko", release.trim())),
    ] {
        // The platform's own task lets go of the device a moment after the platform.
        let until = SystemTime::now() + Duration::from_secs(10);
        let mut done = g.command(program, &[&arguments])?;
        while done.code != 0 && program == "rmmod" && SystemTime::now() < until {
            g.pause(Duration::from_millis(50));
            done = g.command(program, &[&arguments])?;
        }
        g.check(done.code == 0, || format!("{program} {arguments}: {}", done.err))?;
    }
    let platform = g.wait(boot("6.1"))?;
    g.check(g.wait(tool::send(3, 1 << 20))? == 0, || "wrong bytes after the reload".into())?;
    g.wait(end(&platform))?;
    g.kernel_is_clean()
}

/// Every check, from the primary and from the instance.
fn checks(g: &Guest, platform: &Partition, port: &str) -> Result<()> {
    let run = std::process::Command::new("vsock_check")
        .args(["run", "3", port])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("vsock_check")?;
    let pid = run.id();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(run.wait_with_output()));
    let out = match ended.recv_timeout(HANGS_AFTER) {
        Ok(out) => out.context("vsock_check")?,
        Err(_) => {
            state(g, platform, pid)?;
            return Err(format!("vsock_check hangs: no end within {HANGS_AFTER:?}"));
        }
    };
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    g.say(&text);
    g.check(out.status.success(), || format!("from the primary: {text}"))?;
    let there = g.tool(3, "vsock-check 2");
    if there.is_err() {
        state(g, platform, pid)?;
    }
    let there = there?;
    g.say(&there.replace("; ", "\n"));
    g.check(there.starts_with("0 "), || format!("from the instance: {there}"))
}

/// For who reads why something hung: the transport on this side, where each thread of the client sleeps, the
/// instance's pulse and the end of its log.
fn state(g: &Guest, platform: &Partition, client: u32) -> Result<()> {
    for name in ["stats", "links", "channels"] {
        let path = format!("/sys/module/kerf_vsock/parameters/{name}");
        g.say(&std::fs::read_to_string(path).context(name)?);
    }
    for task in std::fs::read_dir(format!("/proc/{client}/task")).into_iter().flatten().flatten() {
        for name in ["wchan", "stack", "syscall"] {
            if let Ok(text) = std::fs::read_to_string(task.path().join(name)) {
                g.say(&format!("{name}: {text}"));
            }
        }
    }
    for _ in 0..3 {
        g.say(&format!("{:?}", platform.pulse(InstanceId(1), 1).context("pulse")?));
        g.pause(Duration::from_millis(100));
    }
    let log = g.wait(platform.console(InstanceId(1), 0)).context("console")?;
    for record in &log.records[log.records.len().saturating_sub(60)..] {
        g.say(&record.text);
    }
    Ok(())
}

/// One of the transport's counters in this kernel.
fn counter(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/sys/module/kerf_vsock/parameters/stats").context("counters")?;
    let line = text
        .lines()
        .find(|l| l.split_whitespace().next() == Some(name))
        .ok_or_else(|| format!("no counter {name}"))?;
    line.split_whitespace().nth(1).unwrap_or_default().parse().context(name)
}

/// A message of up to 255 bytes rings at most once, by the doorbells really rung while a known number
/// of them is sent; and nothing impossible was seen.
fn counters(g: &Guest) -> Result<()> {
    let mut stream = pingpong::connect(3, pingpong::PORT)?;
    let before = counter("kicks")?;
    pingpong::times(&mut stream, 255, MESSAGES, true)?;
    let rung = counter("kicks")? - before;
    let lost = counter("lost_doorbells")?;
    g.say(&format!("{MESSAGES} messages of 255 bytes rang {rung} times; {lost} lost doorbells"));
    // One more for the order that starts the exchange.
    g.check(rung <= MESSAGES as u64 + 1, || format!("{rung} interrupts for {MESSAGES} small messages"))?;
    let bad = counter("bad_values")?;
    g.check(bad == 0, || format!("{bad} impossible values"))
}
