//! Windows: what the old kernel writes and the new one reads, without a mapping and without a signal.

use std::time::Duration;

use kmorph_platform::partition::Partition;
use kmorph_platform::{InstanceId, Platform, PlatformError, WINDOW};

use super::handover::{KEY as REGION, NEW, OLD, assign, says};
use crate::guest::Guest;
use crate::{Context, Result};

const KEY: u64 = WINDOW | 0x77;
const SIZE: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(2);
/// How often the region moves to and fro under a writer that copies from its mapping of it.
const ROUNDS: usize = 10;
/// What must not be in the log of a kernel that copies.
const BAD: [&str; 5] = ["WARNING:", "BUG:", "usercopy: ", "general protection", "hung_task"];
/// `errno` of a call that lost its right, or its region.
const LOST: [&str; 2] = ["EPERM", "ENODEV"];

fn free(g: &Guest, p: &Partition) -> Result<u64> {
    Ok(g.wait(p.inventory()).context("inventory")?.free_bytes())
}

fn all(g: &Guest, p: &Partition, want: &[u64]) -> Result<()> {
    let got = g.wait(p.windows()).context("windows")?;
    g.check(got == want, || format!("windows are {got:x?}, not {want:x?}"))?;
    let regions = g.wait(p.handover_list()).context("list")?;
    g.check(!regions.iter().any(|r| r.key & WINDOW != 0), || format!("listed as regions: {regions:?}"))
}

fn open(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    let (from, to) = ((OLD, incarnation), (NEW, incarnation));
    g.wait(p.window_open(KEY, SIZE, from, to)).context("open the window")?;
    all(g, p, &[KEY])?;
    says(g, OLD, &format!("window open {KEY}"), &format!("{SIZE} 1 1"))?;
    says(g, NEW, &format!("window open {KEY}"), &format!("{SIZE} 1 0"))
}

fn refusals(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    let (from, to, third) = ((OLD, incarnation), (NEW, incarnation), (InstanceId(3), 1));
    for (key, size, to) in [(REGION, SIZE, to), (KEY, 0, to), (KEY, SIZE + 4096, to), (KEY, SIZE, from)] {
        let e = g.wait(p.window_open(key, size, from, to));
        g.check(matches!(e, Err(PlatformError::Invalid(_))), || format!("{key:#x}, {size:#x}: {e:?}"))?;
    }
    let e = g.wait(p.window_open(KEY, SIZE, from, third));
    g.check(matches!(e, Err(PlatformError::Unknown(InstanceId(3)))), || format!("to nobody: {e:?}"))?;
    let e = g.wait(p.window_open(KEY, SIZE, (OLD, incarnation + 1), to));
    g.check(matches!(e, Err(PlatformError::StaleIncarnation { .. })), || format!("another life: {e:?}"))?;
    let e = g.wait(p.window_open(KEY, 1 << 40, from, to));
    g.check(matches!(e, Err(PlatformError::Busy(_))), || format!("a terabyte: {e:?}"))?;
    let e = g.wait(p.window_close(REGION, LIMIT));
    g.check(matches!(e, Err(PlatformError::Invalid(_))), || format!("close a region: {e:?}"))?;
    let e = g.wait(p.handover_create(KEY, SIZE));
    g.check(matches!(e, Err(PlatformError::Invalid(_))), || format!("a region with its key: {e:?}"))?;
    g.wait(p.window_close(KEY, LIMIT)).context("close no window")?;
    all(g, p, &[])
}

/// Both kernels run, and the new one is the writer of the region, which both have mapped.
pub(super) fn story(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    let before = free(g, p)?;
    refusals(g, p, incarnation)?;
    open(g, p, incarnation)?;
    g.check(free(g, p)? == before - SIZE, || "the window takes no memory, or too much".into())?;
    let e = g.wait(p.window_open(KEY, SIZE, (OLD, incarnation), (NEW, incarnation)));
    g.check(matches!(e, Err(PlatformError::Busy(_))), || format!("the same key again: {e:?}"))?;
    for id in [OLD, NEW] {
        says(g, id, "window keys", &format!("[{REGION}]"))?;
    }

    says(g, OLD, &format!("window put {KEY} 9"), &SIZE.to_string())?;
    says(g, NEW, &format!("window check {KEY} 9"), "0")?;
    says(g, OLD, &format!("window check {KEY} 9"), "0")?;
    says(g, NEW, &format!("window write {KEY}"), "EPERM")?;
    let ends = "0 0 ENOSPC ENOSPC 3 3 EINVAL 0 EINVAL 100 10 10 120 EBADFD EBADFD EBADFD";
    says(g, OLD, &format!("window ends {KEY}"), ends)?;
    g.say("the new kernel reads through a window what the old one writes, byte by byte");

    // Buffers that are handover memory themselves.
    says(g, OLD, &format!("window from {KEY} {REGION}"), &SIZE.to_string())?;
    says(g, NEW, &format!("window same {KEY} {REGION}"), "0")?;
    says(g, NEW, &format!("window into {KEY} {REGION}"), &SIZE.to_string())?;
    says(g, OLD, &format!("window into {KEY} {REGION}"), "EFAULT")?;
    says(g, NEW, &format!("window from {KEY} {REGION}"), "EPERM")?;

    says(g, OLD, &format!("window busy {KEY}"), "busy")?;
    says(g, OLD, &format!("window busy {KEY} {REGION}"), "busy")?;
    for n in 0..ROUNDS {
        assign(g, p, Some(if n % 2 == 0 { OLD } else { NEW }))?;
    }
    g.wait(p.window_close(KEY, LIMIT)).context("close the window")?;
    let how = g.tool(OLD.cid(), "handover window ended")?;
    let lost = how.split(' ').count() == 2 && how.split(' ').all(|e| LOST.contains(&e));
    g.check(lost, || format!("two busy writers ended with {how:?}"))?;
    g.say(&format!("it is closed under two busy writers, who get {how} and no signal"));
    for id in [OLD, NEW] {
        says(g, id, &format!("window read {KEY}"), "ENODEV")?;
        says(g, id, &format!("window write {KEY}"), "ENODEV")?;
        says(g, id, &format!("window open {KEY}"), "error: select: ENOENT: No such file or directory")?;
    }
    g.wait(p.window_close(KEY, LIMIT)).context("close it again")?;
    for id in [OLD, NEW] {
        let log = g.wait(p.console(id, 0)).context("console")?;
        let bad = log.records.iter().find(|r| BAD.iter().any(|b| r.text.contains(b)));
        g.check(bad.is_none(), || format!("the log of instance {id} says: {bad:?}"))?;
    }
    all(g, p, &[])?;
    let after = free(g, p)?;
    g.check(after == before, || format!("{after} bytes of the pool are free, not {before}"))
}

/// Before the writer hangs.
pub(super) fn before_hang(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    open(g, p, incarnation)?;
    says(g, OLD, &format!("window put {KEY} 3"), &SIZE.to_string())
}

/// It hangs: it cannot be told to write no more.
pub(super) fn hung(g: &Guest, p: &Partition) -> Result<()> {
    let limit = Duration::from_millis(30);
    for _ in 0..2 {
        let e = g.wait(p.window_close(KEY, limit));
        g.check(matches!(e, Err(PlatformError::Timeout { .. })), || format!("a hung writer: {e:?}"))?;
        let text = e.err().map(|e| e.to_string()).unwrap_or_default();
        g.check(text.contains("from instance 1") && text.contains("fence it"), || text.clone())?;
    }
    all(g, p, &[KEY])?;
    says(g, NEW, &format!("window check {KEY} 3"), "0")
}

/// It was fenced.
pub(super) fn fenced(g: &Guest, p: &Partition) -> Result<()> {
    says(g, NEW, &format!("window check {KEY} 3"), "0")?;
    g.wait(p.window_close(KEY, LIMIT)).context("close the window of a fenced writer")?;
    all(g, p, &[])?;
    says(g, NEW, &format!("window read {KEY}"), "ENODEV")?;
    g.say("the window of a hung writer cannot be closed before its fence, and can be after it");
    Ok(())
}
