//! A pool made of memory taken offline at run time, without any reservation.

use std::time::Duration;

use super::Scenario;
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "offlined-memory",
    about: "instances on memory blocks that were taken offline; afterwards the primary has all its memory again",
    in_run: true,
    machine: || MachineSpec { cmdline: "movablecore=900M memhp_default_state=offline", ..Default::default() },
    guest,
    limit: Duration::from_secs(120),
};

fn total() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read meminfo")?;
    text.lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| "no MemTotal".into())
}

fn guest(g: &Guest) -> Result<()> {
    let before = total()?;
    g.define("guest", 1, &[2], 192)?;
    g.configure("pool:\n  offline: 256M\n")?;
    g.ctl(&["daemon", "start"])?;
    let during = total()?;
    g.say(&format!("memory of the primary: {before} kB before, {during} kB now"));
    g.check(before - during == 256 << 10, || format!("{} kB were taken, not 256 MiB", before - during))?;
    g.ctl(&["spawn", "guest", "--kernel=/boot/vmlinuz-6.1", &format!("--initramfs={WORKLOAD}")])?;
    g.check(g.wait(tool::send(3, 8 << 20))? == 0, || "wrong bytes".into())?;
    g.tool(3, "crash")?;
    super::story::report(g, &g.recovered("guest", 1, Duration::from_secs(60))?);
    g.ctl(&["daemon", "stop", "--graceful"])?;
    let after = total()?;
    g.check(after == before, || format!("memory of the primary: {after} kB, {before} kB before"))?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    // Use what came back.
    let file = vec![0x5au8; 200 << 20];
    std::fs::write("/run/fill", &file).context("fill the memory that came back")?;
    let read = std::fs::read("/run/fill").context("read it again")?;
    g.check(read == file, || "the memory that came back does not hold what is written".into())?;
    g.kernel_is_clean()
}
