//! A region above 4 GiB.

use std::time::Duration;

use super::Scenario;
use crate::Result;
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "high-memory",
    about: "an instance whose memory lies above 4 GiB boots, is recovered and gives its memory back",
    in_run: true,
    machine: || MachineSpec { memory_mib: 6144, cmdline: "memmap=512M$0x110000000", ..Default::default() },
    guest,
    limit: Duration::from_secs(120),
};

fn guest(g: &Guest) -> Result<()> {
    g.define("high", 1, &[2], 160)?;
    g.ctl(&["daemon", "start"])?;
    g.ctl(&["spawn", "high", "--kernel=/boot/vmlinuz-6.12", &format!("--initramfs={WORKLOAD}")])?;
    let base = g.status("high")?.memory_base.unwrap_or(0);
    g.check(base >= 1 << 32, || format!("its memory lies at {base:#x}"))?;
    g.say(&format!("memory at {base:#x}"));
    g.check(g.wait(tool::send(3, 8 << 20))? == 0, || "wrong bytes".into())?;
    g.tool(3, "crash")?;
    super::story::report(g, &g.recovered("high", 1, Duration::from_secs(60))?);
    g.check(g.wait(tool::receive(3, 8 << 20))? == 0, || "wrong bytes after the recovery".into())?;
    g.ctl(&["terminate", "high"])?;
    g.ctl(&["daemon", "stop"])?;
    g.kernel_is_clean()
}
