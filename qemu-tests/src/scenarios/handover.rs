//! Handover memory between two kernels: who writes is one, the bytes stay where they are.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_platform::partition::{Partition, PartitionConfig};
use kmorph_platform::{BootRequest, HandoverMoved, InstanceId, InstanceSpec, Platform, PlatformError};

use super::{Scenario, window};
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "handover",
    about: "memory two kernels map: one writes, who is late gets SIGBUS, windows without a mapping, the bytes outlive both; 6.1 to 6.12 and back",
    in_run: true,
    machine: MachineSpec::default,
    guest: |g| {
        let p = g.wait(Partition::open(PartitionConfig::default())).context("open the platform")?;
        let free = g.wait(p.inventory()).context("inventory")?.free_bytes();
        refusals(g, &p)?;
        let told = story(g, &p, ["6.1", "6.12"], 1)
            .and_then(|()| afterwards(g, &p, "6.1", 11))
            .and_then(|()| g.wait(p.handover_destroy(KEY)).context("destroy"))
            .and_then(|()| story(g, &p, ["6.12", "6.1"], 2));
        told.inspect_err(|_| consoles(g, &p))?;
        g.wait(p.handover_destroy(KEY)).context("destroy")?;
        let after = g.wait(p.inventory()).context("inventory")?.free_bytes();
        g.check(after == free, || format!("{after} bytes of the pool are free, not {free}"))?;
        g.wait(p.release_all()).context("release everything")?;
        g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
        g.kernel_is_clean()
    },
    limit: Duration::from_secs(300),
};

/// The same under the other series.
pub const ON_NEWER: Scenario = Scenario {
    name: "handover-6.12",
    in_run: false,
    machine: || MachineSpec { primary: "6.12", ..Default::default() },
    ..SCENARIO
};

pub(super) const OLD: InstanceId = InstanceId(1);
pub(super) const NEW: InstanceId = InstanceId(2);
pub(super) const KEY: u64 = 0x7365_7373;
const SIZE: u64 = 64 << 20;
const LIMIT: Duration = Duration::from_secs(2);
const MOVES: usize = 60;

/// The end of both kernels' logs, for who reads the console of a failed run.
fn consoles(g: &Guest, p: &Partition) {
    for id in [OLD, NEW] {
        let Ok(log) = g.wait(p.console(id, 0)) else { continue };
        for r in &log.records[log.records.len().saturating_sub(60)..] {
            println!("instance {id}: {}", r.text);
        }
    }
}

async fn boot(p: &Partition, id: InstanceId, incarnation: u64, series: &str) -> Result<()> {
    let request = BootRequest {
        spec: InstanceSpec {
            name: format!("kernel-{id}"),
            id,
            cpus: vec![u32::from(id.0) + 1],
            memory_bytes: 128 << 20,
            memory_base: None,
        },
        incarnation,
        kernel: PathBuf::from(format!("/boot/vmlinuz-{series}")),
        initramfs: Some(WORKLOAD.into()),
        cmdline: String::new(),
        pulse_period: Duration::from_millis(10),
        growth: Default::default(),
    };
    p.boot(&request).await.context("boot")?;
    tool::dial(id.cid()).await.map(drop)
}

async fn end(p: &Partition, id: InstanceId, incarnation: u64) -> Result<()> {
    let fence = p.fence(id, incarnation).await.context("fence")?;
    if !fence.complete {
        return Err(format!("instance {id} was not seen stopped: {fence:?}"));
    }
    p.reclaim(id, incarnation, false).await.context("reclaim").map(drop)
}

/// Ask a workload, and insist on its answer.
pub(super) fn says(g: &Guest, id: InstanceId, ask: &str, want: &str) -> Result<()> {
    let got = g.tool(id.cid(), &format!("handover {ask}"))?;
    g.check(got == want, || format!("instance {id}: {ask}: {got:?} instead of {want:?}"))
}

pub(super) fn assign(g: &Guest, p: &Partition, to: Option<InstanceId>) -> Result<HandoverMoved> {
    g.wait(p.handover_assign(KEY, to, LIMIT)).context(&format!("assign to {to:?}"))
}

fn writer(g: &Guest, p: &Partition) -> Result<Option<InstanceId>> {
    let all = g.wait(p.handover_list()).context("list")?;
    all.iter().find(|r| r.key == KEY).map(|r| r.writer).ok_or_else(|| "the region is gone".into())
}

/// Keys, sizes and instances that cannot be.
fn refusals(g: &Guest, p: &Partition) -> Result<()> {
    use PlatformError::{Busy, Invalid, Unknown};
    for (key, size) in [(0, SIZE), (KEY, 0), (KEY, SIZE + 4096)] {
        let e = g.wait(p.handover_create(key, size));
        g.check(matches!(e, Err(Invalid(_))), || format!("key {key:#x}, size {size:#x}: {e:?}"))?;
    }
    let e = g.wait(p.handover_create(KEY, 1 << 40));
    g.check(matches!(e, Err(Busy(_))), || format!("a terabyte: {e:?}"))?;
    let e = g.wait(p.handover_assign(KEY, None, LIMIT));
    g.check(matches!(e, Err(Invalid(_))), || format!("assign no region: {e:?}"))?;
    let e = g.wait(p.handover_destroy(KEY));
    g.check(matches!(e, Err(Invalid(_))), || format!("destroy no region: {e:?}"))?;
    let e = g.wait(p.handover_share(KEY, OLD, 1));
    g.check(matches!(e, Err(Unknown(OLD))), || format!("share with nobody: {e:?}"))
}

fn story(g: &Guest, p: &Partition, [old, new]: [&str; 2], incarnation: u64) -> Result<()> {
    g.chapter(&format!("from {old} to {new}"));
    let range = g.wait(p.handover_create(KEY, SIZE)).context("create")?;
    let e = g.wait(p.handover_create(KEY, SIZE));
    g.check(matches!(e, Err(PlatformError::Busy(_))), || format!("the same key again: {e:?}"))?;
    let both = async { tokio::try_join!(boot(p, OLD, incarnation, old), boot(p, NEW, incarnation, new)) };
    g.wait(both)?;
    g.say(&format!("both kernels run; region of {} MiB at {:#x}", SIZE >> 20, range.base));

    says(g, OLD, &format!("open {KEY}"), "error: select: ENOENT: No such file or directory")?;
    let e = g.wait(p.handover_assign(KEY, Some(OLD), LIMIT));
    g.check(matches!(e, Err(PlatformError::Invalid(_))), || format!("assign without a share: {e:?}"))?;
    for id in [OLD, NEW] {
        g.wait(p.handover_share(KEY, id, incarnation)).context("share")?;
    }
    assign(g, p, Some(OLD))?;
    says(g, OLD, &format!("open {KEY}"), &format!("{SIZE} 1 1"))?;
    says(g, NEW, &format!("open {KEY}"), &format!("{SIZE} 1 0"))?;
    let e = g.wait(p.handover_destroy(KEY));
    g.check(matches!(e, Err(PlatformError::Busy(_))), || format!("destroy while shared: {e:?}"))?;
    for id in [OLD, NEW] {
        says(g, id, &format!("refused {KEY}"), "ENOENT EBUSY EINVAL EINVAL EINVAL EINVAL ok")?;
        says(g, id, &format!("memtype {} {SIZE}", range.base), "write-back")?;
    }

    says(g, OLD, &format!("fill {KEY} 5"), "filled")?;
    says(g, NEW, &format!("check {KEY} 5"), "0")?;
    for id in [OLD, NEW] {
        // The entry is there: what looks for its page structures without care ends the kernel.
        says(g, id, &format!("futex {KEY}"), "EFAULT")?;
    }
    says(g, NEW, &format!("fill {KEY} 6"), "error: write: EFAULT: Bad address")?;
    says(g, NEW, &format!("poke {KEY}"), "signal 7")?;
    says(g, OLD, &format!("write {KEY}"), "writing")?;
    let moved = assign(g, p, Some(NEW))?;
    says(g, OLD, &format!("died {KEY}"), "signal 7")?;
    g.say(&format!("the old kernel's busy writer got SIGBUS; revoked in {:?}", moved.revoke));
    says(g, NEW, &format!("await {KEY} writable"), "2 1")?;
    says(g, NEW, &format!("check {KEY} 5"), "0")?;
    says(g, NEW, &format!("fill {KEY} 7"), "filled")?;
    says(g, OLD, &format!("check {KEY} 7"), "0")?;
    says(g, OLD, &format!("poke {KEY}"), "signal 7")?;
    moves(g, p)?;
    window::story(g, p, incarnation)?;

    silent(g, p, incarnation)?;
    says(g, NEW, &format!("check {KEY} 7"), "0")?;
    says(g, NEW, &format!("poke {KEY}"), "exit 0")?;
    g.wait(end(p, NEW, incarnation))?;
    g.check(writer(g, p)?.is_none(), || "a stopped kernel is the writer".into())
}

/// Both kernels are gone; a third one sees what they have left, until it is taken from it.
fn afterwards(g: &Guest, p: &Partition, series: &str, incarnation: u64) -> Result<()> {
    g.wait(boot(p, NEW, incarnation, series))?;
    g.wait(p.handover_share(KEY, NEW, incarnation)).context("share")?;
    says(g, NEW, &format!("open {KEY}"), &format!("{SIZE} 0 0"))?;
    says(g, NEW, &format!("check {KEY} 7"), "0")?;
    g.say("both kernels are gone, a third one reads the same bytes");
    g.wait(p.handover_unshare(KEY, NEW, incarnation)).context("unshare")?;
    says(g, NEW, &format!("await {KEY} writable"), "error: state: ENOENT: No such file or directory")?;
    says(g, NEW, &format!("read {KEY}"), "error: read: EFAULT: Bad address")?;
    g.wait(end(p, NEW, incarnation))
}

/// To and fro, each kernel writing to every page in its turn.
fn moves(g: &Guest, p: &Partition) -> Result<()> {
    for id in [OLD, NEW] {
        says(g, id, &format!("contend {KEY}"), "contending")?;
    }
    says_held(g, NEW, 1)?;
    let mut took = Vec::new();
    for n in 0..MOVES as u64 {
        let to = if n.is_multiple_of(2) { OLD } else { NEW };
        took.push(assign(g, p, Some(to))?);
        says_held(g, to, if to == OLD { n / 2 + 1 } else { n / 2 + 2 })?;
    }
    let figure = |what: &str, pick: fn(&HandoverMoved) -> Duration| {
        let mut all: Vec<Duration> = took.iter().map(pick).collect();
        all.sort_unstable();
        g.say(&format!("{MOVES} moves, {what}: p50 {:?}, max {:?}", all[all.len() / 2], all[all.len() - 1]));
    };
    figure("revocation", |m| m.revoke);
    figure("whole call", |m| m.took);
    Ok(())
}

fn says_held(g: &Guest, id: InstanceId, times: u64) -> Result<()> {
    let got = g.tool(id.cid(), &format!("handover held {KEY} {times}"))?;
    g.check(got.parse::<u64>().is_ok_and(|n| n >= times), || format!("instance {id}: {got}"))
}

/// The writer hangs: it keeps the region until it is seen stopped.
fn silent(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    assign(g, p, Some(OLD))?;
    window::before_hang(g, p, incarnation)?;
    g.tool(OLD.cid(), "hang")?;
    // The order is answered before it is carried out; that the pulse stands still tells when it is.
    let mut before = p.pulse(OLD, incarnation).context("pulse")?;
    let mut same = 0;
    while same < 3 {
        g.pause(Duration::from_millis(300));
        let now = p.pulse(OLD, incarnation).context("pulse")?;
        same = if now == before { same + 1 } else { 0 };
        before = now;
    }
    let limit = Duration::from_millis(30);
    let e = g.wait(p.handover_assign(KEY, Some(NEW), limit));
    g.check(matches!(e, Err(PlatformError::Timeout { .. })), || format!("a hung writer: {e:?}"))?;
    g.check(writer(g, p)? == Some(OLD), || "the hung kernel is not the writer any more".into())?;
    says(g, NEW, &format!("poke {KEY}"), "signal 7")?;
    window::hung(g, p)?;
    g.say("a hung writer does not confirm: ETIMEDOUT, and it is the writer still");
    let fence = g.wait(p.fence(OLD, incarnation)).context("fence")?;
    g.check(fence.complete, || format!("{fence:?}"))?;
    window::fenced(g, p)?;
    let moved = assign(g, p, Some(NEW))?;
    g.check(moved.revoke.is_zero(), || format!("a stopped writer was waited for: {moved:?}"))?;
    says(g, NEW, &format!("await {KEY} writable"), "2 1")?;
    g.wait(p.reclaim(OLD, incarnation, false)).context("reclaim").map(drop)
}
