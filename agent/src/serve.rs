//! The KMP server of the instance.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kmp::io::Connection;
use kmp::message::{
    ByeAck, ByeReason, Error as ErrorMessage, ErrorCode, HeartbeatRsp, Hello, Message, MessageType, Metrics,
};
use kmp::session::Event;
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, sync};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::kmsg;
use crate::metrics::Sampler;
use crate::stage1::{self, Cmdline};

/// A client has this long to say HELLO.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Connections at once; the daemon needs two.
const MAX_CONNECTIONS: usize = 16;
/// Metrics older than this are measured anew for a heartbeat that asks.
const FRESH: Duration = Duration::from_millis(200);
/// After a failed accept: descriptors or memory may be short for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Nanoseconds since boot: what KMP headers carry.
fn clock() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(|t| (t.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec() as u64))
        .unwrap_or(0)
}

/// Metrics, shared by all connections.
struct Gauges {
    sampler: Sampler,
    last: Option<(Instant, Metrics)>,
}

impl Gauges {
    fn metrics(&mut self) -> Metrics {
        if let Some((at, m)) = &self.last
            && at.elapsed() < FRESH
        {
            return m.clone();
        }
        let m = self.sampler.sample();
        self.last = Some((Instant::now(), m.clone()));
        m
    }
}

struct Server {
    identity: Hello,
    gauges: Mutex<Gauges>,
}

/// Serve until the kernel ends. `ready` is told once the port is open.
pub fn run(ready: OwnedFd, cmdline: &Cmdline) -> ExitCode {
    // The out-of-memory killer takes everything else first: a silent agent looks like a dead user space.
    if let Err(e) = std::fs::write(Path::new(stage1::PROC).join("self/oom_score_adj"), "-1000") {
        kmsg::log(kmsg::ERROR, &format!("cannot protect the agent from the OOM killer: {e}"));
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(rt) => rt,
        Err(e) => {
            kmsg::log(kmsg::ERROR, &format!("cannot start the server: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let release =
        nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let server = Arc::new(Server {
        identity: Hello {
            instance: cmdline.instance,
            incarnation: cmdline.incarnation,
            capabilities: vec!["terminate".into()],
            release,
            ..Hello::default()
        },
        gauges: Mutex::new(Gauges {
            sampler: Sampler::new(Path::new(stage1::PROC), Path::new("/.kmorph/probe")),
            last: None,
        }),
    });
    match runtime.block_on(listen(server, ready)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            kmsg::log(kmsg::ERROR, &e);
            ExitCode::FAILURE
        }
    }
}

async fn listen(server: Arc<Server>, ready: OwnedFd) -> Result<(), String> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, kmp::PORT))
        .map_err(|e| format!("cannot listen on vsock port {}: {e}", kmp::PORT))?;
    stage1::say_ready(ready);
    kmsg::log(kmsg::INFO, &format!("listening on vsock port {}", kmp::PORT));
    let room = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("accept: {e}"));
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Only the primary kernel commands an instance.
        if peer.cid() != VMADDR_CID_HOST {
            kmsg::log(kmsg::ERROR, &format!("refused a connection from CID {}", peer.cid()));
            continue;
        }
        let Ok(permit) = room.clone().try_acquire_owned() else {
            kmsg::log(kmsg::ERROR, &format!("refused a connection: {MAX_CONNECTIONS} are open"));
            continue;
        };
        let server = server.clone();
        tokio::spawn(async move {
            server.connection(stream).await;
            drop(permit);
        });
    }
}

impl Server {
    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) {
        let (mut c, _) = match Connection::accept(stream, self.identity.clone(), clock, HELLO_LIMIT).await {
            Ok(opened) => opened,
            Err(e) => return kmsg::log(kmsg::ERROR, &format!("a connection was not opened: {e}")),
        };
        loop {
            match c.next().await {
                Event::Message { header, message } => match message {
                    Message::Bye(bye) => {
                        let detail = self.end(bye.reason, Duration::from_millis(bye.grace_ms)).await;
                        if let Err(e) = c.confirm_bye(ByeAck { detail }).await {
                            kmsg::log(kmsg::ERROR, &format!("cannot confirm BYE: {e}"));
                        }
                        return;
                    }
                    other => {
                        let answer = self.answer(&other);
                        if let Some(answer) = answer
                            && let Err(e) = c.queue(header.sequence, &answer)
                        {
                            return kmsg::log(kmsg::ERROR, &format!("cannot answer: {e}"));
                        }
                    }
                },
                Event::Unreadable { .. } | Event::Open { .. } => {} // the session answers by itself
                Event::Closed { .. } => return,
            }
        }
    }

    /// What a message is answered with. A repeated heartbeat is simply answered again.
    fn answer(&self, message: &Message) -> Option<Message> {
        match message {
            Message::HeartbeatReq(req) => Some(
                HeartbeatRsp {
                    incarnation: self.identity.incarnation,
                    uptime_ns: Some(clock()),
                    agent_pid: Some(std::process::id()),
                    metrics: if req.metrics {
                        self.gauges.lock().unwrap_or_else(PoisonError::into_inner).metrics()
                    } else {
                        Metrics::default()
                    },
                }
                .into(),
            ),
            // Told to all survivors; there is nothing to do for them in an instance yet, and no answer.
            Message::RecoverPrepare(_) | Message::RecoverReclaim(_) | Message::RecoverComplete(_) => None,
            Message::Error(_) | Message::Retry(_) => None,
            other => Some(unsupported(other.kind())),
        }
    }

    /// The daemon says BYE: for good, or because the instance is to end.
    async fn end(&self, reason: ByeReason, grace: Duration) -> String {
        if reason != ByeReason::Terminate {
            return "closed".into();
        }
        kmsg::log(kmsg::INFO, "kmorphd ends this instance");
        // As shutdown does: everyone is told, what is dirty is written, nothing is waited for longer
        // than the daemon waits. PID 1 gets no signal: its end would be a panic.
        let told = kill_others(Signal::SIGTERM);
        let synced = timeout(grace.mul_f64(0.8), tokio::task::spawn_blocking(sync)).await.is_ok();
        format!(
            "{told} processes told to end, file systems {}",
            if synced { "synced" } else { "not synced in time" }
        )
    }
}

fn unsupported(kind: MessageType) -> Message {
    ErrorMessage {
        code: ErrorCode::Unsupported,
        message: format!("this agent does not handle {}", kind.name()),
    }
    .into()
}

/// Signal every process but kernel threads, PID 1 and this one; how many.
fn kill_others(signal: Signal) -> usize {
    let Ok(entries) = std::fs::read_dir(stage1::PROC) else { return 0 };
    entries
        .filter_map(|e| e.ok()?.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| *pid > 1 && *pid as u32 != std::process::id())
        .filter(|pid| {
            let cmdline = Path::new(stage1::PROC).join(pid.to_string()).join("cmdline");
            std::fs::read(cmdline).is_ok_and(|c| !c.is_empty())
        })
        .filter(|pid| kill(Pid::from_raw(*pid), signal).is_ok())
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp::message::{Bye, HeartbeatReq, VmcoreStart};

    fn server() -> Server {
        let probe = std::env::temp_dir().join(format!("kmorph-agent-test-{}", std::process::id()));
        Server {
            identity: Hello { instance: 3, incarnation: 9, release: "6.1-test".into(), ..Hello::default() },
            gauges: Mutex::new(Gauges { sampler: Sampler::new(Path::new("/proc"), &probe), last: None }),
        }
    }

    async fn message<S: AsyncRead + AsyncWrite + Unpin>(c: &mut Connection<S>) -> (u32, Message) {
        match c.next().await {
            Event::Message { header, message } => (header.sequence, message),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn answers_heartbeats_refuses_the_unknown_and_confirms_bye() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let s = server();
        let client = async {
            let target = Hello { instance: 3, incarnation: 9, ..Hello::default() };
            let (mut c, peer) = Connection::connect(ours, target, clock, HELLO_LIMIT).await.unwrap();
            assert_eq!((peer.incarnation, peer.release.as_str()), (9, "6.1-test"));
            c.queue(1, &HeartbeatReq { metrics: true }.into()).unwrap();
            let (seq, m) = message(&mut c).await;
            let Message::HeartbeatRsp(rsp) = m else { panic!("{m:?}") };
            assert_eq!((seq, rsp.incarnation), (1, 9));
            assert!(rsp.metrics.memory.unwrap().total > 0);
            c.queue(2, &HeartbeatReq { metrics: false }.into()).unwrap();
            let (_, m) = message(&mut c).await;
            assert!(matches!(m, Message::HeartbeatRsp(r) if r.metrics == Metrics::default()));
            c.queue(3, &VmcoreStart::default().into()).unwrap();
            let (seq, m) = message(&mut c).await;
            assert!(
                matches!(m, Message::Error(e) if e.code == ErrorCode::Unsupported && e.message.contains("VMCORE_START"))
            );
            assert_eq!(seq, 3);
            c.close(Bye::default());
            assert!(matches!(message(&mut c).await.1, Message::ByeAck(a) if a.detail == "closed"));
        };
        tokio::join!(client, s.connection(theirs));
    }

    #[tokio::test]
    async fn a_daemon_that_means_another_life_is_refused() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let s = server();
        let client = async {
            let target = Hello { instance: 3, incarnation: 8, ..Hello::default() };
            let e = Connection::connect(ours, target, clock, HELLO_LIMIT).await.unwrap_err();
            assert!(matches!(e, kmp::io::OpenError::Refused(_)), "{e}");
        };
        tokio::join!(client, s.connection(theirs));
    }
}
