//! How fast state goes from one kernel to another, beside a bare copy between the same two kernels: into memory that both
//! have, and out of it.

use std::time::Duration;

use kmorph_control::MorphView;

use super::bench::{Samples, info, row};
use super::state;
use super::{OFTEN, Scenario};
use crate::guest::Guest;
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bench-transfer",
    about: "measures how fast state is copied to another kernel beside a bare copy between the same two kernels",
    in_run: false,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1024M$0x40000000",
        ..MachineSpec::default()
    },
    guest,
    limit: Duration::from_secs(400),
};

const MIB: u32 = 64;
/// A page each: nearly all of it.
const KEYS: u64 = 16_000;
const ROUNDS: usize = 3;
/// SPECIFICATION.md.
const SHARE: f64 = 0.5;

/// What was seen with one new kernel.
struct Seen {
    /// MiB a second: state; and a bare copy into memory that both have, out of it, and both.
    state: f64,
    into: f64,
    out: f64,
    copy: f64,
    shared_mib: f64,
    sent_mib: f64,
}

/// Copy everything to a new kernel, which is removed again.
fn transfer(g: &Guest) -> Result<Seen> {
    let args = ["morph", "store", "--kernel=/boot/vmlinuz-6.12", "--output", "json"];
    let done = g.command("kmorphctl", &args)?;
    g.check(done.code == 0, || format!("morph: {}", done.err))?;
    let view: MorphView = serde_json::from_str(&done.out).context("the answer of morph")?;
    let copies = |instance: &str, how: &str| -> Result<f64> {
        let answer = g.tool(g.status(instance)?.cid, &format!("handover copies {how}"))?;
        answer.parse().map_err(|_| format!("{instance}: {answer}"))
    };
    let (into, out) = (copies("store", "in")?, copies("store~morph", "out")?);
    let back = g.command("kmorphctl", &["morph", "rollback", "store"])?;
    g.check(back.code == 0, || format!("rollback: {}", back.err))?;
    let first = view.steps.iter().find(|s| s.detail.starts_with("round 0"));
    g.say(first.map_or("", |s| &s.detail));
    let t = view.transfer.clone().ok_or_else(|| format!("nothing was copied: {view:?}"))?;
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    Ok(Seen {
        state: t.full_mib_per_s,
        into,
        out,
        copy: 1.0 / (1.0 / into + 1.0 / out),
        shared_mib: mib(t.shared_bytes),
        sent_mib: mib(t.sent_bytes),
    })
}

/// The rate of the state beside that of the copies, p50.
fn rates(g: &Guest, what: &str) -> Result<f64> {
    let all = (0..ROUNDS).map(|_| transfer(g)).collect::<Result<Vec<Seen>>>()?;
    let of = |f: fn(&Seen) -> f64| Samples::new(all.iter().map(f).collect());
    let rates = of(|s| s.state);
    let (shared, sent) = (of(|s| s.shared_mib).p50(), of(|s| s.sent_mib).p50());
    let text = format!(
        "p50 {:.0} MiB/s, {:.0} to {:.0}; {shared:.1} MiB through shared memory, {sent:.1} MiB sent",
        rates.p50(),
        rates.at(0.0),
        rates.at(1.0)
    );
    info(g, what, &text);
    let copy = of(|s| s.copy);
    let text = format!(
        "p50 {:.0} MiB/s, {:.0} to {:.0}; into shared memory {:.0}, out of it {:.0}",
        copy.p50(),
        copy.at(0.0),
        copy.at(1.0),
        of(|s| s.into).p50(),
        of(|s| s.out).p50()
    );
    info(g, "  a bare copy from one to the other", &text);
    Ok(rates.p50() / copy.p50())
}

fn guest(g: &Guest) -> Result<()> {
    g.define("store", 1, &[2], 256)?;
    g.configure(OFTEN)?;
    g.command("kmorphctl", &["daemon", "start"]).map(|_| ())?;
    state::start(g, MIB, &[&format!("--handover-memory={MIB}M")])?;
    g.command("kmorphctl", &["policy", "set", "morph-downtime", "store", "1s"]).map(|_| ())?;
    g.wait(state::noise(KEYS))?;
    let noise = rates(g, "state copied to another kernel, noise")?;
    g.wait(state::fill(KEYS))?;
    let zeros = rates(g, "  the same, nearly all zeros")?;
    let least = noise.min(zeros);
    let text = format!("{:.0} % and {:.0} %", noise * 100.0, zeros * 100.0);
    let kept = row(g, "state copied, beside a bare copy", &text, ">= 50 %, p50", least >= SHARE);
    g.command("kmorphctl", &["terminate", "store"]).map(|_| ())?;
    g.command("kmorphctl", &["daemon", "stop", "--graceful"]).map(|_| ())?;
    g.check(kept, || "a promise of SPECIFICATION.md was not kept".into())
}
