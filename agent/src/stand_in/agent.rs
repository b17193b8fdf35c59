//! The second process of a stand-in: its agent, with good manners or without.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use kmp::io::Connection;
use kmp::message::{CpuMetrics, HealthStatus, Hello, MemoryMetrics, Message, Metrics};
use kmp::session::Event;
use kmp::stand_in::names;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::{Pid, getppid};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::sleep;

use super::Args;
use super::fault::{MANNER_SIZE, Manner};
use crate::clock::boot_ns;
use crate::guardian::Link;
use crate::kmsg;
use crate::serve::{HELLO_LIMIT, Server, on_a_runtime};
use crate::state::{Address, Over, Reach, is_morph};

/// Bytes a flooding agent keeps waiting to be written, and how often it looks whether there is room.
const FLOOD: usize = 64 << 10;
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

/// Serve until the stand-in ends. `orders` is where manners are ordered.
pub fn run(args: &Args, nonce: u64, kernel: Pid, link: Link, orders: OwnedFd) -> i32 {
    // User space ends with its kernel. The kernel may have ended before it was asked to take us along.
    if let Err(e) = set_pdeathsig(Signal::SIGKILL) {
        kmsg::log(kmsg::ERROR, &format!("the agent would outlive its kernel: {e}"));
        return 1;
    }
    if getppid() != kernel {
        return 1;
    }
    let identity = Hello {
        instance: args.id,
        incarnation: args.incarnation,
        boot_nonce: nonce,
        capabilities: vec!["terminate".into()],
        release: args.release.clone(),
        ..Hello::default()
    };
    let metrics = Metrics {
        cpu: Some(CpuMetrics { online: args.cpus as u32, ..CpuMetrics::default() }),
        memory: Some(MemoryMetrics { total: args.memory, available: args.memory, pressure: None }),
        io: None,
    };
    let server = Arc::new(Server::stand_in(identity, metrics, link));
    let workloads = Address::Path(args.dir.join(names::WORKLOADS));
    let port = args.dir.join("..").join(names::port(args.id, kmp::PORT));
    let topology = Address::Path(args.dir.join(names::TOPOLOGY));
    on_a_runtime(listen(server, &port, [workloads, topology], kernel, orders))
}

async fn listen(
    server: Arc<Server>,
    path: &Path,
    [workloads, topology]: [Address; 2],
    kernel: Pid,
    orders: OwnedFd,
) -> Result<(), String> {
    let what = |e: io::Error| format!("cannot listen on {}: {e}", path.display());
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(what(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(what)?;
    if let Some(dir) = path.parent() {
        server.reaches(Reach::Folder(dir.to_owned(), server.identity().instance));
    }
    server.hear_workloads(workloads);
    server.tell_topology(topology);
    kmsg::log(kmsg::INFO, "agent: listening");
    let orders = pipe::Receiver::from_owned_fd(orders).map_err(|e| format!("the pipe for orders: {e}"))?;
    let (manners, manner) = watch::channel(Manner::Normal);
    tokio::spawn(obey(server.clone(), orders, manners));
    let serving = server.clone();
    let accept = async || listener.accept().await.map(|(stream, _)| Some(stream));
    server.listen(accept, move |stream| connection(serving.clone(), stream, kernel, manner.clone())).await
}

/// Take up the manners that are ordered, for as long as there is a kernel to order them.
async fn obey(server: Arc<Server>, mut orders: pipe::Receiver, manners: watch::Sender<Manner>) {
    let mut order = [0; MANNER_SIZE];
    while orders.read_exact(&mut order).await.is_ok() {
        if let Some(manner) = Manner::decode(order) {
            manners.send_replace(manner);
            server.obeyed();
        }
    }
}

async fn connection(
    server: Arc<Server>,
    stream: UnixStream,
    kernel: Pid,
    mut manner: watch::Receiver<Manner>,
) {
    if manner.wait_for(|m| *m != Manner::HalfOpen).await.is_err() {
        return;
    }
    let last = Arc::new(AtomicBool::new(false));
    let stream = Mortal { stream, last: last.clone(), kernel };
    let (mut c, peer) =
        match Connection::accept(stream, server.identity().clone(), boot_ns, HELLO_LIMIT).await {
            Ok(opened) => opened,
            Err(e) => return kmsg::log(kmsg::ERROR, &format!("a connection was not opened: {e}")),
        };
    let _held = server.held(&peer);
    let mut lies = 0;
    loop {
        let now = *manner.borrow_and_update();
        if now == Manner::Flood && flood(&mut c).is_err() {
            return;
        }
        let event = tokio::select! {
            event = c.next() => event,
            changed = manner.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
            () = sleep(FLOOD_PAUSE), if now == Manner::Flood => continue,
        };
        // An order that has come meanwhile counts for this message already.
        let Ok(now) = manner.wait_for(|m| *m != Manner::HalfOpen).await.map(|m| *m) else { return };
        let (header, message) = match event {
            Event::Message { message: Message::Bye(bye), .. } => return server.bye(&mut c, bye).await,
            Event::Message { header, message } => (header, message),
            Event::Unreadable { .. } | Event::Open { .. } => continue,
            Event::Closed { .. } => return,
        };
        if is_morph(&message) && !matches!(now, Manner::DieMidMessage) {
            match server.morph(&mut c, header.sequence, message).await {
                Ok(()) => continue,
                Err(Over(why)) => {
                    return kmsg::log(kmsg::INFO, &format!("a connection for a morph ended: {why}"));
                }
            }
        }
        let (mut sequence, mut answer) = (header.sequence, server.answer(&message));
        match now {
            Manner::Slow(ms) => {
                tokio::select! {
                    () = sleep(Duration::from_millis(ms.into())) => {}
                    _ = manner.wait_for(|m| *m != now) => {}
                }
            }
            Manner::Lie => {
                lies += 1;
                (sequence, answer) = (bend(lies, sequence, answer.as_mut()), answer);
            }
            Manner::DieMidMessage => last.store(true, Ordering::Relaxed),
            Manner::Normal | Manner::Flood | Manner::HalfOpen => {}
        }
        if let Some(answer) = answer
            && let Err(e) = c.queue(sequence, &answer)
        {
            return kmsg::log(kmsg::ERROR, &format!("cannot answer: {e}"));
        }
    }
}

/// Frames nobody asked for, as many as may wait.
fn flood(c: &mut Connection<Mortal>) -> Result<(), kmp::session::SendError> {
    let noise: Message = HealthStatus { reason: "flood".into(), ..HealthStatus::default() }.into();
    while c.backlog() < FLOOD {
        c.queue(0, &noise)?;
    }
    Ok(())
}

/// Make an answer a lie, each of three kinds in turn; the sequence to send it with.
fn bend(turn: u32, sequence: u32, answer: Option<&mut Message>) -> u32 {
    let Some(Message::HeartbeatRsp(rsp)) = answer else { return sequence };
    match turn % 3 {
        0 => rsp.incarnation = rsp.incarnation.wrapping_add(1),
        1 => return sequence ^ 0x5a5a_5a5a,
        _ => {
            rsp.uptime_ns = Some(u64::MAX);
            rsp.metrics = Metrics {
                cpu: Some(CpuMetrics {
                    online: u32::MAX,
                    busy_percent: f64::NAN,
                    load1: f64::NEG_INFINITY,
                    pressure: Some(-1e30),
                }),
                memory: Some(MemoryMetrics { total: 1, available: u64::MAX, pressure: Some(1e30) }),
                io: None,
            };
        }
    }
    sequence
}

/// A stream whose next write may be the last thing the stand-in does.
struct Mortal {
    stream: UnixStream,
    last: Arc<AtomicBool>,
    kernel: Pid,
}

impl AsyncRead for Mortal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Mortal {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.last.load(Ordering::Relaxed) {
            // Whether all of the half fits does not matter.
            let _ = self.stream.try_write(&buf[..buf.len() / 2]);
            // The parent takes this process along; it is asked first, and is the parent as long as it lives.
            if getppid() == self.kernel {
                let _ = kill(self.kernel, Signal::SIGKILL);
            }
            let _ = raise(Signal::SIGKILL);
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
