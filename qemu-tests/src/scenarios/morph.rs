//! One kernel takes an instance over from another.

use std::time::Duration;

use kmorph_control::{InstanceState, MorphView, RecoveryStep};

use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "morph",
    about: "6.1 becomes 6.12 and 6.12 becomes 6.1 in a running instance; what fails before the commit is rolled back",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

/// Morphs to and fro at the end.
const ROUNDS: u32 = 4;

fn guest(g: &Guest) -> Result<()> {
    g.define("web", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "web", "--kernel=/boot/vmlinuz-6.1", &initramfs])?;
    let free = g.daemon()?.pool_free_bytes;

    g.chapter("a new kernel is started beside the old one, validated, and takes over");
    g.ctl(&["morph", "prepare", "web", "--kernel=/boot/vmlinuz-6.12", "--dry-run"])?;
    g.ctl(&["morph", "prepare", "web", "--kernel=/boot/vmlinuz-6.12"])?;
    let side = g.status("web~morph")?;
    g.check(side.release.starts_with("6.12") && side.id != 1, || format!("the new kernel is {side:?}"))?;
    g.ctl(&["morph", "validate", "web"])?;
    let v = g.status("web")?;
    g.check(v.release.starts_with("6.1.") && v.incarnation == 1, || format!("before the commit: {v:?}"))?;
    g.ctl(&["morph", "commit", "web"])?;
    runs(g, "6.12.", 2, free)?;
    g.ctl(&["status", "web"])?;

    g.chapter("the new kernel is healed as the old one was");
    let cid = g.status("web")?.cid;
    g.tool(cid, "crash")?;
    let healed = |steps: &[RecoveryStep]| steps.last().is_some_and(|s| s.phase == "RECOVERY_COMPLETE");
    g.follow(Duration::from_secs(60), healed)?;
    runs(g, "6.12.", 3, free)?;

    g.chapter("a new kernel that dies before the commit is removed; the old one notices nothing");
    g.ctl(&["morph", "web", "--kernel=/boot/vmlinuz-6.1"])?;
    let side = g.status("web~morph")?;
    let missed = g.heartbeat("web")?.missed;
    g.tool(side.cid, "crash")?;
    runs(g, "6.12.", 3, free)?;
    g.check(g.heartbeat("web")?.missed == missed, || "the old kernel missed heartbeats".into())?;

    g.chapter(
        "a daemon that is killed while an operator thinks: the next one waits too, and rolls back when told",
    );
    g.ctl(&["morph", "prepare", "web", "--kernel=/boot/vmlinuz-6.1"])?;
    g.kill_daemon()?;
    g.ctl(&["daemon", "start"])?;
    g.ctl(&["morph", "status", "web"])?;
    g.until_healthy("web~morph")?;
    g.ctl(&["morph", "rollback", "web"])?;
    runs(g, "6.12.", 3, free)?;

    g.chapter("to and fro");
    for round in 0..ROUNDS {
        let (to, release) = if round % 2 == 0 { ("6.1", "6.1.") } else { ("6.12", "6.12.") };
        let kernel = format!("--kernel=/boot/vmlinuz-{to}");
        let out = g.ctl(&["morph", "web", &kernel, "--auto-commit", "--output", "json"])?;
        let view: MorphView = serde_json::from_str(&out).context("the answer of morph")?;
        g.check(view.committed == Some(true), || format!("round {round}: {view:?}"))?;
        runs(g, release, 4 + u64::from(round), free)?;
    }
    g.ctl(&["recovery-log", "--instance", "web"])?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// web runs this release, and nothing is left of a morph.
fn runs(g: &Guest, release: &str, incarnation: u64, free: u64) -> Result<()> {
    let until = std::time::SystemTime::now() + Duration::from_secs(30);
    loop {
        let (v, d) = (g.status("web")?, g.daemon()?);
        let rest = v.state == InstanceState::Healthy
            && v.morph.is_none()
            && d.running == 1
            && d.pool_free_bytes == free
            && d.cpus_lent == 1;
        if rest {
            g.check(v.release.starts_with(release) && v.incarnation == incarnation, || {
                format!("not kernel {release} in incarnation {incarnation}: {v:?}")
            })?;
            return Ok(());
        }
        g.check(std::time::SystemTime::now() < until, || {
            format!("something is left of a morph: {v:?} {d:?}")
        })?;
        g.pause(Duration::from_millis(100));
    }
}
