//! How fast failures are found and healed, beside the promises of SPECIFICATION.md.

use std::time::Duration;

use kmorph_control::RecoveryStep;

use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bench-recovery",
    about: "measures detection and recovery beside their promises",
    in_run: false,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

const A: u32 = 3;
const RECOVERIES: usize = 6;
/// The order to hang has to arrive and a module has to be loaded until the kernel hangs.
const ORDER_MS: f64 = 100.0;

/// Sorted samples.
pub(super) struct Samples(Vec<f64>);

impl Samples {
    pub(super) fn new(mut v: Vec<f64>) -> Samples {
        v.sort_by(f64::total_cmp);
        Samples(v)
    }
    pub(super) fn at(&self, share: f64) -> f64 {
        let n = self.0.len();
        if n == 0 { f64::NAN } else { self.0[((n - 1) as f64 * share).round() as usize] }
    }
    pub(super) fn p50(&self) -> f64 {
        self.at(0.5)
    }
}

/// One row: what, measured, promise, verdict. Returns whether the promise was kept.
pub(super) fn row(g: &Guest, what: &str, measured: &str, promise: &str, kept: bool) -> bool {
    g.figure(&format!("{what:<44} {measured:<34} {promise:<34} {}", if kept { "kept" } else { "BROKEN" }));
    kept
}

pub(super) fn info(g: &Guest, what: &str, measured: &str) {
    g.figure(&format!("{what:<44} {measured}"));
}

fn guest(g: &Guest) -> Result<()> {
    let mut kept = true;
    g.figure(&format!("{:<44} {:<34} {:<34} verdict", "number", "measured", "promise"));
    g.define("a", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.command("kmorphctl", &["daemon", "start"]).map(|_| ())?;
    let begun = std::time::SystemTime::now();
    spawn(g, "a", "6.12")?;
    info(
        g,
        "spawn to first heartbeat, 6.12",
        &format!("{:.2} s", begun.elapsed().context("clock")?.as_secs_f64()),
    );
    kept &= recoveries(g, "crash")?;
    kept &= recoveries(g, "hang")?;
    g.command("kmorphctl", &["daemon", "stop", "--graceful"]).map(|_| ())?;
    g.check(kept, || "a promise of SPECIFICATION.md was not kept".into())
}

fn spawn(g: &Guest, name: &str, series: &str) -> Result<()> {
    let kernel = format!("--kernel=/boot/vmlinuz-{series}");
    let initramfs = format!("--initramfs={WORKLOAD}");
    let done = g.command("kmorphctl", &["spawn", name, &kernel, &initramfs, "--heartbeat-timeout=1"])?;
    g.check(done.code == 0, || format!("spawn {name}: {}", done.err))
}

/// Between two steps of a recovery, in milliseconds.
fn offset(steps: &[RecoveryStep], phase: &str) -> Option<f64> {
    steps.iter().find(|s| s.phase == phase).map(|s| s.offset_us as f64 / 1e3)
}

fn recoveries(g: &Guest, how: &str) -> Result<bool> {
    let before = g.status("a")?.recoveries as usize;
    let (mut declared, mut fenced, mut reclaimed) = (vec![], vec![], vec![]);
    let (mut loaded, mut serving) = (vec![], vec![]);
    for n in 1..=RECOVERIES {
        let sent = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("clock")?;
        g.tool(A, how)?;
        let steps = g.recovered("a", before + n, Duration::from_secs(60))?;
        let last = steps.last().ok_or("no steps")?;
        let at = |phase: &str| offset(&steps, phase);
        // From the dying kernel's own stamp for a panic, from the order to fail for a hang.
        let preparing = steps.iter().find(|s| s.phase == "PREPARING_RECOVERY").ok_or("never declared")?;
        let end = last.offset_us as f64 / 1e3;
        let declared_ms = preparing.offset_us as f64 / 1e3;
        declared.push(if how == "crash" {
            declared_ms
        } else {
            preparing.at_unix_ms as f64 - sent.as_secs_f64() * 1e3
        });
        let reclaiming = at("RECLAIMING_RESOURCES").unwrap_or(f64::NAN);
        let restarting = at("RESTARTING").unwrap_or(f64::NAN);
        fenced.push(reclaiming - declared_ms);
        reclaimed.push(restarting - reclaiming);
        // The second step of that name is the kernel's START.
        let started =
            steps.iter().rfind(|s| s.phase == "RESTARTING").map_or(f64::NAN, |s| s.offset_us as f64 / 1e3);
        loaded.push(started - restarting);
        serving.push(end - started);
    }
    let [declared, fenced, reclaimed, loaded, serving] =
        [declared, fenced, reclaimed, loaded, serving].map(Samples::new);
    let measured = format!("p50 {:.1} ms, max {:.1} ms", declared.p50(), declared.at(1.0));
    let kept = if how == "crash" {
        row(g, "panic notice to declared dead", &measured, "<= 20 ms", declared.p50() <= 20.0)
    } else {
        let h = g.heartbeat("a")?;
        // The policy's own bound: silence of the pulse, one look at it, and the confirming probes. The
        // measure starts with the order, so it has the loading of the failing module in it.
        let bound = h.hang_bound_ms as f64;
        let promise = format!("<= {bound:.0} ms (computed) + {ORDER_MS:.0} ms");
        row(g, "hang to declared dead", &measured, &promise, declared.p50() <= bound + ORDER_MS)
    };
    for (what, s) in [
        ("  fence, confirmed", &fenced),
        ("  reclaim", &reclaimed),
        ("  new kernel loaded", &loaded),
        ("  START to HELLO and service", &serving),
    ] {
        info(
            g,
            &format!("{what} (after a {how})"),
            &format!("p50 {:.1} ms, max {:.1} ms", s.p50(), s.at(1.0)),
        );
    }
    Ok(kept)
}
