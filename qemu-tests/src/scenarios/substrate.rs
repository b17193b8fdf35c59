//! The platform alone, without a daemon: boot, pulse, heartbeat, log, crash notice, fence, reclaim.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_platform::partition::{Partition, PartitionConfig};
use kmorph_platform::{
    BootRequest, InstanceId, InstanceSpec, KernelState, Platform, PlatformError, PlatformEvent,
    PlatformEventKind,
};
use kmp::io::Connection;
use kmp::message::{HeartbeatReq, Hello, Message};
use kmp::session::Event;
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, sleep, timeout};

use super::Scenario;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "substrate",
    about: "the platform without a daemon: boot, pulse, heartbeat, kernel log, panic notice, confirmed fence, reclaim",
    in_run: true,
    machine: MachineSpec::default,
    guest: |g| g.wait(story(g)),
    limit: Duration::from_secs(120),
};

/// The same on the other series.
pub const ON_NEWER: Scenario = Scenario {
    name: "substrate-6.12",
    machine: || MachineSpec { primary: "6.12", ..Default::default() },
    ..SCENARIO
};

const ID: InstanceId = InstanceId(1);

async fn event(
    events: &mut Receiver<PlatformEvent>,
    want: fn(&PlatformEventKind) -> bool,
) -> Result<PlatformEvent> {
    let limit = Duration::from_secs(40);
    let find = async {
        while let Some(e) = events.recv().await {
            if want(&e.kind) {
                return Ok(e);
            }
        }
        Err("no more events".to_string())
    };
    timeout(limit, find).await.map_err(|_| "the event did not come".to_string())?
}

async fn story(g: &Guest) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("release")?;
    let online = g.online()?;
    let p = Partition::open(PartitionConfig::default()).await.context("open the platform")?;
    let mut events = p.take_events().ok_or("no events")?;
    let inventory = p.inventory().await.context("inventory")?;
    g.say(&format!("primary {}: CPUs {online}, pool {:?}", release.trim(), inventory.pool));
    for (incarnation, series) in [(1u64, "6.1"), (2, "6.12")] {
        let request = BootRequest {
            spec: InstanceSpec {
                name: "a".into(),
                id: ID,
                cpus: vec![2],
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
        p.check(&request).await.context("check")?;
        let booted = p.boot(&request).await.context("boot")?;
        g.say(&format!("{} started in {:?} at {:#x}", booted.release, booted.took, booted.region.base));
        event(&mut events, |k| matches!(k, PlatformEventKind::Ready)).await.context("its module")?;
        event(&mut events, |k| matches!(k, PlatformEventKind::LinkUp)).await.context("its link")?;
        g.say("its modules are up");
        let first = p.pulse(ID, incarnation).context("pulse")?;
        heartbeat(g, &p, incarnation).await?;
        let second = p.pulse(ID, incarnation).context("pulse")?;
        g.check(second.state == KernelState::Ready && second.nonce != 0, || format!("{second:?}"))?;
        g.check(second.cpus[0].count > first.cpus[0].count, || format!("no pulse: {first:?} {second:?}"))?;
        let log = p.console(ID, 0).await.context("console")?;
        g.check(log.records.iter().any(|r| r.text.contains("Linux version")), || {
            format!("no log: {:?}", log.note)
        })?;
        let stale = p.fence(ID, incarnation + 7).await;
        g.check(matches!(stale, Err(PlatformError::StaleIncarnation { .. })), || format!("{stale:?}"))?;
        let early = p.reclaim(ID, incarnation, false).await;
        g.check(early == Err(PlatformError::NotFenced(ID)), || format!("reclaimed while it ran: {early:?}"))?;

        crash().await?;
        let e = event(&mut events, |k| matches!(k, PlatformEventKind::Panic(_)))
            .await
            .context("its panic notice")?;
        g.say(&format!("panic notice, {:?} old: {:?}", e.age, e.kind));
        let fence = p.fence(ID, incarnation).await.context("fence")?;
        g.check(fence.complete && fence.cpus == [(2, true)], || format!("{fence:?}"))?;
        let log = p.console(ID, 0).await.context("console after death")?;
        g.check(log.records.iter().any(|r| r.text.contains("Kernel panic")), || {
            "the panic is not in the log".into()
        })?;
        let last = p.pulse(ID, incarnation).context("pulse")?;
        let reclaim = p.reclaim(ID, incarnation, incarnation == 2).await.context("reclaim")?;
        g.say(&format!(
            "fenced in {:?}, reclaimed in {:?}; it beat {} times",
            fence.took,
            reclaim.took,
            last.cpus.first().map_or(0, |c| c.count)
        ));
        g.check(p.pulse(ID, incarnation) == Err(PlatformError::Unknown(ID)), || {
            "it still has a pulse".into()
        })?;
    }
    p.release_all().await.context("release everything")?;
    g.check(g.online()? == online, || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

async fn crash() -> Result<()> {
    let mut order = crate::guest::tool::open_raw(ID.cid(), "crash").await?;
    let mut answer = String::new();
    tokio::io::AsyncBufReadExt::read_line(&mut order, &mut answer).await.context("order the crash")?;
    Ok(())
}

async fn heartbeat(g: &Guest, p: &Partition, incarnation: u64) -> Result<()> {
    let limit = Duration::from_secs(5);
    // The agent listens a moment after the link is up; nothing but trying tells when.
    let until = Instant::now() + Duration::from_secs(20);
    let stream = loop {
        match p.connect(ID, incarnation, kmp::PORT).await {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > until => return Err(e.to_string()),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    };
    let target = Hello { instance: ID.0, incarnation, ..Hello::default() };
    let (mut c, peer) = Connection::connect(stream, target, || 0, limit).await.context("HELLO")?;
    c.queue(1, &HeartbeatReq { metrics: true, ..HeartbeatReq::default() }.into()).context("queue")?;
    match timeout(limit, c.next()).await.map_err(|_| "no heartbeat".to_string())? {
        Event::Message { message: Message::HeartbeatRsp(r), .. } => {
            g.say(&format!("agent of {} answers: {:?}", peer.release, r.metrics.memory));
            Ok(())
        }
        other => Err(format!("{other:?}")),
    }
}
