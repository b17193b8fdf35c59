//! A daemon that dies does not take its kernels with it; the next one takes them over.

use std::time::Duration;

use super::Scenario;
use crate::Result;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;

pub const SCENARIO: Scenario = Scenario {
    name: "readopt",
    about: "kmorphd is stopped, and killed, while kernels run: the next one takes them over undisturbed and heals them",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(300),
};

fn guest(g: &Guest) -> Result<()> {
    g.define("one", 1, &[2], 128)?;
    g.define("two", 2, &[3], 128)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "one", "--kernel=/boot/vmlinuz-6.1", &initramfs])?;
    g.ctl(&["spawn", "two", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;

    g.chapter("an ordinary stop leaves the kernels running");
    g.ctl(&["daemon", "stop"])?;
    g.check(g.online()? == "0-1", || "the stop gave CPUs of running kernels away".into())?;
    g.tool(3, "release")?;
    g.ctl(&["daemon", "start"])?;
    undisturbed(g)?;

    g.chapter("so does kill -9");
    g.kill_daemon()?;
    g.tool(4, "release")?;
    g.ctl(&["daemon", "start"])?;
    undisturbed(g)?;

    g.chapter("and the new daemon heals what it took over");
    g.tool(3, "crash")?;
    super::story::report(g, &g.recovered("one", 1, Duration::from_secs(60))?);
    g.tool(4, "hang")?;
    super::story::report(g, &g.recovered("two", 1, Duration::from_secs(60))?);
    g.ctl(&["list", "--verbose"])?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// Both are healthy in their first life.
fn undisturbed(g: &Guest) -> Result<()> {
    for name in ["one", "two"] {
        // The first answer to a ping says that the new daemon is connected.
        let until = std::time::SystemTime::now() + Duration::from_secs(10);
        while g.status(name)?.last_heartbeat_ms.is_none() && std::time::SystemTime::now() < until {
            g.pause(Duration::from_millis(50));
        }
        let v = g.healthy(name)?;
        g.check(v.incarnation == 1 && v.recoveries == 0, || format!("{name} was disturbed: {v:?}"))?;
    }
    g.ctl(&["list"]).map(|_| ())
}
