//! Both series in both roles: a 6.12 primary with a 6.1 and a 6.12 instance.

use std::time::Duration;

use super::Scenario;
use crate::Result;
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "swapped",
    about: "a 6.12 primary supervises a 6.1 and a 6.12 instance; the two talk to each other through nobody",
    in_run: true,
    machine: || MachineSpec { primary: "6.12", ..Default::default() },
    guest,
    limit: Duration::from_secs(150),
};

fn guest(g: &Guest) -> Result<()> {
    g.define("old", 1, &[2], 128)?;
    g.define("new", 2, &[3], 128)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "old", "--kernel=/boot/vmlinuz-6.1", &initramfs])?;
    g.ctl(&["spawn", "new", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;
    for cid in [3, 4] {
        let bad = g.wait(tool::send(cid, 4 << 20))? + g.wait(tool::receive(cid, 4 << 20))?;
        g.check(bad == 0, || format!("CID {cid}: {bad} wrong bytes"))?;
        g.say(&format!("CID {cid} ({}): 4 MiB each way, every byte checked", g.tool(cid, "release")?));
    }
    for (name, cid) in [("old", 3), ("new", 4)] {
        g.tool(cid, "crash")?;
        super::story::report(g, &g.recovered(name, 1, Duration::from_secs(60))?);
        g.check(g.wait(tool::send(cid, 1 << 20))? == 0, || "wrong bytes after the recovery".into())?;
    }
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}
