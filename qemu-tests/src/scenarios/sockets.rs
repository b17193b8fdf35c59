//! What stream sockets promise, checked between two kernels from either side.

use std::time::Duration;

use super::Scenario;
use super::transport::{boot, end};
use crate::guest::{Guest, pingpong, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "vsock-sockets",
    about: "close, half-close, abort, epoll, non-blocking connect, many sockets, module unload: from either kernel",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(240),
};

const MODULE: &str = "kerf_vsock";
const MESSAGES: usize = 1000;

fn guest(g: &Guest) -> Result<()> {
    let port = tool::CHECK_PORT.to_string();
    let mut here =
        std::process::Command::new("vsock_check").args(["serve", &port]).spawn().context("vsock_check")?;
    for series in ["6.1", "6.12"] {
        g.chapter(&format!("an instance on {series}"));
        let platform = g.wait(boot(series))?;
        let done = g.command("vsock_check", &["run", "3", &port])?;
        g.say(&done.out);
        g.check(done.code == 0, || format!("from the primary: {}", done.out))?;
        let there = g.tool(3, "vsock-check 2")?;
        g.say(&there.replace("; ", "\n"));
        g.check(there.starts_with("0 "), || format!("from the instance: {there}"))?;
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
        let done = g.command(program, &[&arguments])?;
        g.check(done.code == 0, || format!("{program} {arguments}: {}", done.err))?;
    }
    let platform = g.wait(boot("6.1"))?;
    g.check(g.wait(tool::send(3, 1 << 20))? == 0, || "wrong bytes after the reload".into())?;
    g.wait(end(&platform))?;
    g.kernel_is_clean()
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
