//! The transport between real kernels: load, churn, and peers that die at the worst moment.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{interval, timeout};
use tokio_vsock::{VsockAddr, VsockStream};

use super::{OFTEN, Scenario};
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "vsock-soak",
    about: "data both ways between kernels, every byte checked; thousands of connections; the peer dies mid-write, \
            mid-connect, mid-close and idle",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

const A: u32 = 3;
const B: u32 = 4;
/// Nothing may hang on a dead peer longer than this, on any host.
const AT_ONCE: Duration = Duration::from_secs(10);

fn guest(g: &Guest) -> Result<()> {
    g.define("a", 1, &[2], 128)?;
    g.define("b", 2, &[3], 128)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.ctl(&["spawn", "a", "--kernel=/boot/vmlinuz-6.1", &initramfs])?;
    g.ctl(&["spawn", "b", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;

    g.chapter("both ways at once, with both kernels");
    let bad = g.wait(async {
        let (w, x, y, z) = tokio::join!(
            tool::send(A, 32 << 20),
            tool::receive(A, 32 << 20),
            tool::send(B, 32 << 20),
            tool::receive(B, 32 << 20)
        );
        Result::Ok(w? + x? + y? + z?)
    })?;
    g.check(bad == 0, || format!("{bad} wrong bytes"))?;
    g.say("128 MiB, every byte checked");

    g.chapter("between the two instances, without the primary");
    between(g)?;

    g.chapter("many connections, one after the other and at once");
    g.wait(async {
        for n in 0..500 {
            tool::churn(if n % 2 == 0 { A } else { B }).await.context(&format!("connection {n}"))?;
        }
        let many: Vec<_> =
            (0..40).map(|n| tokio::spawn(tool::churn(if n % 2 == 0 { A } else { B }))).collect();
        for (n, one) in many.into_iter().enumerate() {
            one.await.context("a task")?.context(&format!("parallel connection {n}"))?;
        }
        Result::Ok(())
    })?;
    g.say("500 in turn, 40 at once");
    g.wait(async {
        let e = VsockStream::connect(VsockAddr::new(A, 9999))
            .await
            .err()
            .ok_or("a port nobody listens on took a connection")?;
        match e.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ECONNRESET) => Result::Ok(()),
            _ => Err(format!("a port nobody listens on: {e}")),
        }
    })?;

    for (round, how) in ["crash", "hang", "crash"].iter().enumerate() {
        g.chapter(&format!("the peer dies ({how}) under sockets in every state"));
        let outcome = g.wait(die(how));
        g.say(&outcome?);
        g.recovered("a", round + 1, Duration::from_secs(60))?;
        let bad = g.wait(tool::send(A, 1 << 20))?;
        g.check(bad == 0, || format!("{bad} wrong bytes after the recovery"))?;
        between(g)?;
    }
    let w = g.heartbeat("b")?;
    g.check(w.missed == 0, || format!("b missed {} beats", w.missed))?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// Data and connections from each instance to the other.
fn between(g: &Guest) -> Result<()> {
    for (from, to) in [(A, B), (B, A)] {
        let bad = g.tool(from, &format!("send {to} 8388608"))?;
        g.check(bad == "0", || format!("CID {from} to CID {to}: {bad}"))?;
        let made = g.tool(from, &format!("churn {to} 50"))?;
        g.check(made == "50", || format!("CID {from} to CID {to}: {made}"))?;
    }
    g.say("CID 3 and CID 4: 8 MiB and 50 connections each way, every byte checked");
    Ok(())
}

/// Connect again and again; how often it worked, and how it failed at last.
async fn connect_until_it_fails() -> (usize, std::io::Error) {
    let mut pace = interval(Duration::from_millis(20));
    let mut made = Vec::new();
    loop {
        match VsockStream::connect(VsockAddr::new(A, tool::PORT)).await {
            Ok(stream) => made.push(stream), // kept open, so it dies with the peer
            // A connect ends by itself after 2 s, too; the next one is under way when the peer is dead then.
            Err(e) if e.raw_os_error() == Some(libc::ETIMEDOUT) => {}
            Err(e) => return (made.len(), e),
        }
        pace.tick().await;
    }
}

/// Sockets that read, write, poll, connect and close while their peer dies: each must end at once.
async fn die(how: &str) -> Result<String> {
    let mut idle = tool::open(A, "echo").await?;
    let reader = tokio::spawn(async move {
        let mut b = [0u8; 1];
        idle.read(&mut b).await
    });
    let mut full = tool::open(A, "messages 1000000 1000000").await?;
    let writer = tokio::spawn(async move {
        let buf = vec![1u8; 64 << 10];
        loop {
            full.write_all(&buf).await?;
        }
        #[allow(unreachable_code)]
        std::io::Result::Ok(())
    });
    let mut closing = tool::open(A, "echo").await?;
    closing.write_all(&[7; 1000]).await.context("write")?;
    let mut order = tool::open_raw(A, how).await?;
    let mut answer = [0u8; 1];
    order.read_exact(&mut answer).await.context("read the answer")?;
    closing.shutdown().await.context("shut down")?;
    drop(closing); // mid-close
    drop(order);
    let connects = tokio::spawn(connect_until_it_fails());
    let read =
        timeout(AT_ONCE, reader).await.map_err(|_| "a reader hangs on the dead peer")?.context("a task")?;
    let wrote =
        timeout(AT_ONCE, writer).await.map_err(|_| "a writer hangs on the dead peer")?.context("a task")?;
    let reset = |r: Option<i32>| r == Some(libc::ECONNRESET);
    let read_error = read.as_ref().err().and_then(std::io::Error::raw_os_error);
    if !reset(read_error) {
        return Err(format!("a reader got {read:?} instead of ECONNRESET"));
    }
    let write_error = wrote.as_ref().err().and_then(std::io::Error::raw_os_error);
    if !reset(write_error) {
        return Err(format!("a writer got {wrote:?} instead of ECONNRESET"));
    }
    let (made, error) = timeout(AT_ONCE, connects)
        .await
        .map_err(|_| "a connect hangs on the dead peer")?
        .context("a task")?;
    let code = error.raw_os_error();
    // To a kernel that hangs a connect is always under way; a panicked one may be known dead before.
    let expected = reset(code) || (how == "crash" && matches!(code, Some(libc::ENETUNREACH | libc::ENODEV)));
    if !expected {
        return Err(format!("a connect under way while the peer died ({how}) got: {error}"));
    }
    Ok(format!("reader and writer: connection reset; connects: {made} made, then: {error}"))
}
