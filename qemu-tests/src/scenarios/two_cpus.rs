//! An instance with two CPUs: both pulse, either one's hang is found, both come back.

use std::time::Duration;

use super::{OFTEN, Scenario};
use crate::Result;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "two-cpus",
    about: "an instance of two CPUs, on 6.1 and on 6.12: boots both, is recovered with both, gives both back",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

fn guest(g: &Guest) -> Result<()> {
    g.define("pair", 1, &[2, 3], 160)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    for series in ["6.1", "6.12"] {
        let kernel = format!("--kernel=/boot/vmlinuz-{series}");
        g.ctl(&["spawn", "pair", &kernel, &format!("--initramfs={WORKLOAD}")])?;
        let says = g.tool(3, "release")?;
        g.say(&format!("pair: {says}"));
        g.check(says.ends_with(" 0-1"), || format!("not both CPUs run: {says}"))?;
        let before = g.status("pair")?.recoveries;
        g.tool(3, "crash")?;
        super::story::report(g, &g.recovered("pair", before as usize + 1, Duration::from_secs(90))?);
        let says = g.tool(3, "release")?;
        g.check(says.ends_with(" 0-1"), || format!("not both CPUs run after the recovery: {says}"))?;
        g.ctl(&["terminate", "pair"])?;
        g.check(g.online()? == "0-3", || "not both CPUs are back".into())?;
    }
    g.ctl(&["daemon", "stop"])?;
    g.kernel_is_clean()
}
