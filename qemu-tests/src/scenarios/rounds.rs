//! Twenty crashes and recoveries in a row: nothing may leak.

use std::time::Duration;

use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "twenty-rounds",
    about: "20 crash and hang recoveries: no CPU, no byte of the pool, no socket, no file descriptor is lost",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

const ROUNDS: usize = 20;

/// What the daemon has open.
fn descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd")).context("list the daemon's descriptors")?.count())
}

/// Users of the vsock transport in the primary: each socket holds a reference on the module.
fn transport_users() -> Result<String> {
    let text = std::fs::read_to_string("/proc/modules").context("read /proc/modules")?;
    let line = text.lines().find(|l| l.starts_with("kerf_vsock ")).ok_or("kerf_vsock is not loaded")?;
    Ok(line.split_whitespace().nth(2).unwrap_or_default().to_string())
}

/// What is in use once the sockets have settled: one control connection to each of the two instances.
/// Linux keeps a socket that was connected without blocking for its connect timeout (2 s) after it
/// was closed, so those of the scenario itself go a moment later.
fn settled(g: &Guest, pid: u32) -> Result<Kept> {
    let until = std::time::SystemTime::now() + Duration::from_secs(10);
    while transport_users()? != "2" && std::time::SystemTime::now() < until {
        g.pause(Duration::from_millis(100));
    }
    Ok((descriptors(pid)?, g.daemon()?.pool_free_bytes, transport_users()?))
}

/// What one round must not change.
type Kept = (usize, u64, String);

fn guest(g: &Guest) -> Result<()> {
    g.define("phoenix", 1, &[2], 128)?;
    g.define("witness", 2, &[3], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "phoenix", "--kernel=/boot/vmlinuz-6.1", &initramfs, "--heartbeat-timeout=1"])?;
    g.ctl(&["spawn", "witness", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;
    let daemon = g.daemon()?;
    let mut first: Option<Kept> = None;
    for round in 1..=ROUNDS {
        // Every fifth round it hangs instead.
        let how = if round % 5 == 0 { "hang" } else { "crash" };
        g.tool(3, how)?;
        let steps = g.recovered("phoenix", round, Duration::from_secs(60))?;
        let last = steps.last().ok_or("no steps")?;
        g.tool(3, "release")?;
        let now = settled(g, daemon.pid)?;
        g.say(&format!(
            "round {round:2}: {how}, serving again after {:.0} ms; descriptors {}, sockets {}",
            last.offset_us as f64 / 1e3,
            now.0,
            now.2
        ));
        match &first {
            None => {
                g.check(now.2 == "2", || format!("{} sockets, not one for each instance", now.2))?;
                first = Some(now);
            }
            Some(f) => {
                g.check(*f == now, || format!("round {round}: {now:?}, after the first round {f:?}"))?
            }
        }
    }
    let w = g.heartbeat("witness")?;
    g.check(w.missed == 0, || format!("witness missed {} beats", w.missed))?;
    g.check(g.status("witness")?.incarnation == 1, || "witness was restarted".into())?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    let until = std::time::SystemTime::now() + Duration::from_secs(10);
    let mut users = transport_users()?;
    while users != "0" && std::time::SystemTime::now() < until {
        g.pause(Duration::from_millis(20));
        users = transport_users()?;
    }
    g.check(users == "0", || format!("{users} users of kerf-vsock are left"))?;
    g.kernel_is_clean()
}
