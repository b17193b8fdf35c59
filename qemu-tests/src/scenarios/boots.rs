//! Starts, one after the other: whether a kernel comes up every time.

use std::time::Duration;

use super::{OFTEN, Scenario};
use crate::Result;
use crate::guest::{Guest, WORKLOAD};
use crate::host::{EMULATOR_CRASH, MachineSpec};

pub const SCENARIO: Scenario = Scenario {
    name: "boots",
    about: "200 starts of an instance of two CPUs, 6.1 and 6.12 in turn: every one comes up",
    in_run: false,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(3600),
};

const STARTS: usize = 200;

fn guest(g: &Guest) -> Result<()> {
    g.define("pair", 1, &[2, 3], 160)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let (mut emulator, mut others) = (0, vec![]);
    for n in 1..=STARTS {
        let series = if n % 2 == 0 { "6.12" } else { "6.1" };
        let kernel = format!("--kernel=/boot/vmlinuz-{series}");
        let done = g.command("kmorphctl", &["spawn", "pair", &kernel, &format!("--initramfs={WORKLOAD}")])?;
        if done.code == 0 {
            let says = g.tool(3, "release")?;
            g.check(says.ends_with(" 0-1"), || format!("not both CPUs run: {says}"))?;
            let ended = g.command("kmorphctl", &["terminate", "pair"])?;
            g.check(ended.code == 0, || ended.err)?;
        } else if done.err.contains(EMULATOR_CRASH) {
            emulator += 1;
        } else {
            others.push(format!("start {n}, {series}: {}", done.err));
        }
        if n % 10 == 0 || done.code != 0 {
            g.say(&format!(
                "{n} starts: {emulator} ended by the emulator's int3 crash, {} otherwise",
                others.len()
            ));
        }
    }
    g.check(others.is_empty(), || others.join("\n"))?;
    g.check(emulator < STARTS / 4, || format!("the emulator ended {emulator} of {STARTS} starts"))?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.ctl(&["daemon", "stop"])?;
    g.kernel_is_clean()
}
