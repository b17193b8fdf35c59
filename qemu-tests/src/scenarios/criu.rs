//! A program that knows nothing of kmorph goes on when its kernel is replaced: two processes, a pipe, a file and memory, taken
//! along by criu.

use std::time::Duration;

use kmorph_control::MorphView;
use tokio::time::Instant;

use super::{OFTEN, Scenario};
use crate::guest::{CRIU, Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "criu",
    about: "an unmodified program of two processes goes from 6.1 to 6.12 and back, and stays when criu fails: no number is missing",
    in_run: true,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1024M$0x40000000",
        ..MachineSpec::default()
    },
    guest,
    limit: Duration::from_secs(360),
};

/// Everything an instance needs, in the primary's memory.
const IMAGE: &str = "/run/criu.img";
/// Process id of the program in every kernel.
const PID: i32 = 10_000;
/// What it writes to.
const NUMBERS: &str = "/run/numbers";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(30);

/// Numbers the program has written, which are all there and in order.
fn numbers(g: &Guest) -> Result<u64> {
    let said = g.tool(g.status("ticker")?.cid, &format!("numbers {NUMBERS}"))?;
    said.parse().map_err(|_| format!("the numbers: {said}"))
}

/// Wait until the program has begun to write: its kernel serves before that.
fn begun(g: &Guest) -> Result<()> {
    let until = g.wait(async { Instant::now() + PATIENCE });
    while let Err(why) = numbers(g) {
        if g.wait(async { Instant::now() }) >= until {
            let log = g.command("kmorphctl", &["console", "ticker"])?.out;
            // Each look of ours is a line there, too.
            let lines = log.lines().filter(|l| !l.contains(NUMBERS));
            return Err(format!("{why}; its log: {}", lines.collect::<Vec<_>>().join(" / ")));
        }
        g.pause(LOOK);
    }
    Ok(())
}

/// Wait until the program has written more than this.
fn more(g: &Guest, than: u64) -> Result<u64> {
    let until = g.wait(async { Instant::now() + PATIENCE });
    loop {
        let now = numbers(g)?;
        if now > than {
            let pid = g.tool(g.status("ticker")?.cid, "find ticker")?;
            g.check(pid == PID.to_string(), || format!("it is process {pid}"))?;
            return Ok(now);
        }
        g.check(g.wait(async { Instant::now() }) < until, || format!("it stands at {now}"))?;
        g.pause(LOOK);
    }
}

fn morph(g: &Guest, args: &[&str]) -> Result<MorphView> {
    let done = g.command("kmorphctl", &[&["morph"], args, &["--output", "json"]].concat())?;
    g.check(done.code == 0, || format!("morph {args:?}: {}", done.err))?;
    serde_json::from_str(&done.out).context("the answer of morph")
}

fn replace(g: &Guest, series: &str) -> Result<()> {
    g.chapter(&format!("it goes to {series}"));
    let before = numbers(g)?;
    let kernel = format!("--kernel=/boot/vmlinuz-{series}");
    let view = morph(g, &["ticker", &kernel, "--auto-commit"])?;
    let b = view.blackout.clone().ok_or_else(|| format!("nothing stood still: {view:?}"))?;
    g.check(view.committed == Some(true), || format!("{view:?}"))?;
    let after = more(g, numbers(g)? + 10)?;
    let release = g.healthy("ticker")?.release;
    g.check(release.starts_with(&format!("{series}.")), || release.clone())?;
    let transfer = view.transfer.unwrap_or_default();
    g.say(&format!(
        "1 to {after}, each once, {before} of them before; process {PID} in {release}; {:.1} MiB in {} rounds; stood still for {:.0} ms: dump {:.0}, copy and restore {:.0} ({} KiB), check {:.1}, record {:.1}, go on {:.1}",
        transfer.bytes as f64 / 1_048_576.0,
        transfer.rounds,
        b.total_us as f64 / 1e3,
        b.freeze_us as f64 / 1e3,
        b.copy_us as f64 / 1e3,
        b.bytes >> 10,
        b.check_us as f64 / 1e3,
        b.record_us as f64 / 1e3,
        b.activate_us as f64 / 1e3,
    ));
    for step in view.steps.iter().filter(|s| s.detail.starts_with("round")) {
        g.say(&step.detail);
    }
    Ok(())
}

fn guest(g: &Guest) -> Result<()> {
    g.define("ticker", 1, &[2], 256)?;
    g.configure(OFTEN)?;
    let joined = [WORKLOAD, CRIU].map(std::fs::read).into_iter().collect::<std::io::Result<Vec<_>>>();
    std::fs::write(IMAGE, joined.context("the images")?.concat()).context(IMAGE)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={IMAGE}");
    let cmdline = "--kernel-cmdline=quiet criu=/ticker";
    g.ctl(&["spawn", "ticker", "--kernel=/boot/vmlinuz-6.1", &initramfs, cmdline])?;
    // criu needs far longer than a workload that is made for this.
    for (key, value) in [("morph-downtime", "5s"), ("heartbeat-timeout", "10s")] {
        g.ctl(&["policy", "set", key, "ticker", value])?;
    }
    begun(g)?;
    more(g, 20)?;
    replace(g, "6.12")?;

    g.chapter("criu cannot bring it back in the new kernel: another process has its id");
    morph(g, &["prepare", "ticker", "--kernel=/boot/vmlinuz-6.1"])?;
    let side = g.status("ticker~morph")?.cid;
    let taken = g.tool(side, &format!("occupy {PID}"))?;
    g.check(taken == PID.to_string(), || format!("process {taken} was started"))?;
    let done = g.command("kmorphctl", &["morph", "commit", "ticker"])?;
    g.say(done.err.trim());
    g.check(done.code == 13 && done.err.contains("criu restore"), || format!("{}: {}", done.code, done.err))?;
    let stands = numbers(g)?;
    more(g, stands + 10)?;

    replace(g, "6.1")?;
    g.ctl(&["terminate", "ticker"])?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.kernel_is_clean()
}
