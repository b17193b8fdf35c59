//! A published service: clients follow the instance through morphs and restarts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kmorph_control::{InstanceView, MorphView};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::state::quantile;
use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "switch",
    about: "clients of a published service see no error while its kernel is replaced, and wait while it is restarted",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

pub(super) const ADDRESS: &str = "127.0.0.1:8080";
const SOCKET: &str = "/run/web.sock";
/// Clients that ask all the time, each time on a new connection.
const CLIENTS: usize = 8;
/// Between the questions of a client.
const PACE: Duration = Duration::from_millis(20);
/// Longest time for anything a client does.
const PATIENCE: Duration = Duration::from_secs(40);

/// What a client saw.
#[derive(Default)]
struct Seen {
    answers: u64,
    /// Releases that answered, each when it was new.
    releases: Vec<String>,
    /// Time from each question to its answer.
    took: Vec<Duration>,
    /// Longest time from an answer to the next.
    gap: Duration,
}

pub(super) async fn question() -> Result<String> {
    let ask = async {
        let mut stream = BufReader::new(TcpStream::connect(ADDRESS).await.context("connect")?);
        stream.write_all(b"release\n").await.context("ask")?;
        let mut line = String::new();
        stream.read_line(&mut line).await.context("read the answer")?;
        if line.ends_with('\n') { Ok(line.trim().to_owned()) } else { Err(format!("cut short: {line:?}")) }
    };
    timeout(PATIENCE, ask).await.map_err(|_| "no answer".to_string())?
}

async fn client(stop: Arc<AtomicBool>) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut last: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let answer = question().await.context(&format!("question {}", seen.answers))?;
        seen.took.push(asked.elapsed());
        seen.gap = seen.gap.max(last.map_or(Duration::ZERO, |l| l.elapsed()));
        last = Some(Instant::now());
        seen.answers += 1;
        let release = answer.split(' ').next().unwrap_or_default().to_owned();
        if seen.releases.last() != Some(&release) {
            seen.releases.push(release);
        }
        sleep(PACE).await;
    }
    Ok(seen)
}

struct Crowd {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<Seen>>>,
}

impl Crowd {
    fn start(g: &Guest) -> Crowd {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS).map(|_| g.beside(client(stop.clone()))).collect();
        Crowd { stop, clients }
    }

    fn end(self, g: &Guest) -> Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().map(|c| g.wait(c).context("a client")?).collect()
    }
}

/// A connection that goes on with the kernel it began with, byte by byte right.
struct Session {
    stream: BufReader<TcpStream>,
    at: u64,
}

impl Session {
    async fn open() -> Result<Session> {
        let mut stream = BufReader::new(TcpStream::connect(ADDRESS).await.context("connect")?);
        stream.write_all(b"echo\n").await.context("begin")?;
        let mut go = String::new();
        timeout(PATIENCE, stream.read_line(&mut go)).await.context("begin")?.context("begin")?;
        if go == "go\n" { Ok(Session { stream, at: 0 }) } else { Err(format!("begin: {go:?}")) }
    }

    async fn echo(&mut self) -> Result<()> {
        let (mut there, mut back) = ([0; 1000], [0; 1000]);
        tool::pattern(&mut there, self.at);
        self.stream.write_all(&there).await.context("write")?;
        let read = self.stream.read_exact(&mut back);
        timeout(PATIENCE, read).await.context("read")?.context("read")?;
        self.at += 1000;
        if there == back { Ok(()) } else { Err("the echo differs".into()) }
    }
}

async fn until_answered_by(prefix: &str) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !question().await?.starts_with(prefix) {
        if Instant::now() > until {
            return Err(format!("no answer of kernel {prefix}"));
        }
        sleep(PACE).await;
    }
    Ok(())
}

/// One morph under load: `from` and `to` begin the releases of the kernels.
fn morph(g: &Guest, kernel: &str, from: &str, to: &str) -> Result<()> {
    let crowd = Crowd::start(g);
    let mut session = g.wait(Session::open())?;
    g.wait(session.echo())?;
    g.ctl(&["morph", "web", &format!("--kernel=/boot/vmlinuz-{kernel}")])?;
    g.wait(session.echo())?;
    let before = g.status("web")?;
    // The commit waits for the session, which goes on until new clients have the new kernel.
    let released = to.to_owned();
    let old_goes_on = g.beside(async move {
        until_answered_by(&released).await?;
        for _ in 0..10 {
            session.echo().await?;
        }
        Result::Ok(session.at)
    });
    let out = g.ctl(&["morph", "commit", "web", "--output", "json"])?;
    let view: MorphView = serde_json::from_str(&out).context("the answer of morph")?;
    let echoed = g.wait(old_goes_on).context("the session")?.context("the session")?;
    g.check(echoed == 12_000, || format!("the session echoed {echoed} bytes"))?;
    let drained = view.steps.iter().any(|s| s.detail.contains("ended by themselves within"));
    g.check(view.committed == Some(true) && drained, || format!("the report: {view:?}"))?;
    let seen = crowd.end(g)?;
    for s in &seen {
        let right = matches!(s.releases.as_slice(), [a, b] if a.starts_with(from) && b.starts_with(to));
        g.check(right, || format!("a client was answered by {:?}", s.releases))?;
    }
    let mut took: Vec<Duration> = seen.iter().flat_map(|s| s.took.clone()).collect();
    g.say(&format!(
        "{} answers to {CLIENTS} clients, none lost; longest gap {:.1?}; a question takes p50 {:.1?}, p99 {:.1?}, longest {:.1?}",
        seen.iter().map(|s| s.answers).sum::<u64>(),
        seen.iter().map(|s| s.gap).max().unwrap_or_default(),
        quantile(&mut took, 0.5),
        quantile(&mut took, 0.99),
        quantile(&mut took, 1.0),
    ));
    let after = g.healthy("web")?;
    g.check(failed(&after) == failed(&before), || format!("connections were lost: {after:?}"))
}

fn failed(view: &InstanceView) -> u64 {
    view.publish.iter().map(|p| p.failed).sum()
}

fn guest(g: &Guest) -> Result<()> {
    g.define("web", 1, &[2], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let tcp = format!("--publish=tcp:{ADDRESS}=vsock:{}", tool::PORT);
    let unix = format!("--publish=unix:{SOCKET}=vsock:{}", tool::PORT);
    let initramfs = format!("--initramfs={WORKLOAD}");
    let spawn = ["spawn", "web", "--kernel=/boot/vmlinuz-6.1", &initramfs, &tcp, &unix];

    g.chapter("an address that is taken starts nothing");
    let taken = g.wait(tokio::net::TcpListener::bind(ADDRESS)).context("bind")?;
    g.ctl_fails(&spawn, 5, &["cannot publish", ADDRESS, "in use"])?;
    g.check(g.daemon()?.cpus_lent == 0, || "a CPU was lent".into())?;
    drop(taken);

    g.chapter("clients reach the instance on the primary");
    g.ctl(&spawn)?;
    g.wait(until_answered_by("6.1."))?;
    let local = g.wait(async {
        let mut stream = BufReader::new(UnixStream::connect(SOCKET).await.context("connect")?);
        stream.write_all(b"release\n").await.context("ask")?;
        let mut line = String::new();
        stream.read_line(&mut line).await.context("read the answer")?;
        Result::Ok(line)
    })?;
    g.check(local.starts_with("6.1."), || format!("by the Unix socket: {local:?}"))?;
    g.ctl(&["status", "web"])?;

    g.chapter("its kernel is replaced under load, twice");
    morph(g, "6.12", "6.1.", "6.12.")?;
    morph(g, "6.1", "6.12.", "6.1.")?;

    g.chapter("a connection that does not end in time is reset, not cut short");
    g.ctl(&["policy", "set", "drain-timeout", "web", "0s"])?;
    let mut session = g.wait(Session::open())?;
    g.wait(session.echo())?;
    g.ctl(&["morph", "web", "--kernel=/boot/vmlinuz-6.12", "--auto-commit"])?;
    is_reset(g, session)?;

    g.chapter("its kernel crashes: the connection is reset, the next one waits for the next kernel");
    let mut session = g.wait(Session::open())?;
    g.wait(session.echo())?;
    let incarnation = g.status("web")?.incarnation;
    g.tool(g.status("web")?.cid, "crash")?;
    is_reset(g, session)?;
    g.wait(until_answered_by("6.12."))?;
    let web = g.healthy("web")?;
    g.check(web.incarnation == incarnation + 1, || format!("answered by {web:?}"))?;

    g.chapter("the next daemon publishes it again; a stopped instance is not published");
    g.ctl(&["daemon", "stop"])?;
    g.ctl(&["daemon", "start"])?;
    g.wait(async {
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(ADDRESS).await.is_err() && Instant::now() < until {
            sleep(PACE).await;
        }
    });
    g.wait(until_answered_by("6.12."))?;
    g.ctl(&["terminate", "web"])?;
    let refused = g.wait(TcpStream::connect(ADDRESS)).is_err();
    g.check(refused && !std::path::Path::new(SOCKET).exists(), || "it is still published".into())?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

fn is_reset(g: &Guest, mut session: Session) -> Result<()> {
    let end = g.wait(async { timeout(PATIENCE, session.stream.read_u8()).await }).context("its end")?;
    let reset = end.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
    g.check(reset, || format!("the connection ended with {end:?}"))
}
