//! One process that answers for all instances: a Unix socket for each, and an agent's answers behind it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kmp::io::Connection;
use kmp::message::{ByeAck, CpuMetrics, HeartbeatRsp, Hello, IoMetrics, MemoryMetrics, Message, Metrics};
use kmp::session::Event;
use kmp::stand_in::names;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{MissedTickBehavior, interval};

use crate::platform::{INCARNATION, RELEASE};
use crate::{Context, Result, process};

const HELLO_LIMIT: Duration = Duration::from_secs(30);
const BACKLOG_TOLD: Duration = Duration::from_secs(1);

fn clock() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Serve until standard input ends. Prints `ready` and then, every second, how many heartbeats were answered.
pub fn run(dir: &Path, first: u16, count: u16) -> Result<()> {
    process::raise_descriptors()?;
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    rt.block_on(async {
        let answered = Arc::new(AtomicU64::new(0));
        for id in first..first + count {
            let path = dir.join(names::port(id, kmp::PORT));
            let listener = UnixListener::bind(&path).context(&path.display().to_string())?;
            let answered = answered.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(one(id, stream, answered.clone()));
                }
            });
        }
        println!("ready {count}");
        let mut ticks = interval(BACKLOG_TOLD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut input, mut nothing) = (tokio::io::stdin(), [0; 64]);
        loop {
            tokio::select! {
                _ = ticks.tick() => println!("answered {}", answered.load(Ordering::Relaxed)),
                read = input.read(&mut nothing) => if read.unwrap_or(0) == 0 { return Ok(()) },
            }
        }
    })
}

/// What an agent measures.
fn metrics() -> Metrics {
    let pressure = Some(0.5);
    Metrics {
        cpu: Some(CpuMetrics { online: 2, busy_percent: 12.5, load1: 0.25, pressure }),
        memory: Some(MemoryMetrics { total: 256 << 20, available: 128 << 20, pressure }),
        io: Some(IoMetrics { probe_us: 250, pressure }),
    }
}

async fn one(id: u16, stream: UnixStream, answered: Arc<AtomicU64>) {
    let identity = Hello {
        instance: id,
        incarnation: INCARNATION,
        boot_nonce: u64::from(id),
        release: RELEASE.into(),
        ..Hello::default()
    };
    let Ok((mut c, _)) = Connection::accept(stream, identity, clock, HELLO_LIMIT).await else { return };
    let metrics = metrics();
    loop {
        match c.next().await {
            Event::Message { header, message: Message::HeartbeatReq(_) } => {
                let answer = HeartbeatRsp {
                    incarnation: INCARNATION,
                    uptime_ns: Some(clock()),
                    agent_pid: Some(71),
                    metrics: metrics.clone(),
                    agent_restarts: 0,
                };
                if c.queue(header.sequence, &answer.into()).is_err() {
                    return;
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Event::Message { message: Message::Bye(_), .. } => {
                // The supervisor ends either way.
                let _ = c.confirm_bye(ByeAck::default()).await;
                return;
            }
            Event::Closed { .. } => return,
            Event::Message { .. } | Event::Unreadable { .. } | Event::Open { .. } => {}
        }
    }
}
