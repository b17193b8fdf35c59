//! Workloads that are written in other languages, the examples for users, and one with open files, on real kernels.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kmorph_control::MorphView;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::{OFTEN, Scenario};
use crate::guest::{Guest, PYTHON, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "state-languages",
    about: "the examples in Python and C, and a service with open files, go from 6.1 to 6.12 with a client connected: no number is missing or comes twice",
    in_run: true,
    machine: || MachineSpec {
        memory_mib: 3072,
        cmdline: "memmap=1024M$0x40000000",
        ..MachineSpec::default()
    },
    guest,
    limit: Duration::from_secs(360),
};

const ADDRESS: &str = "127.0.0.1:8080";
/// The port the examples serve on.
const PORT: u32 = 5000;
/// Between the requests of the client.
const PACE: Duration = Duration::from_millis(10);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(40);

/// Ask on one connection until told to stop, and insist on every number: how many there were, and the longest wait.
async fn client(stop: Arc<AtomicBool>, answered: watch::Sender<u64>) -> Result<(u64, Duration)> {
    let mut stream = BufReader::new(TcpStream::connect(ADDRESS).await.context("connect")?);
    stream.get_ref().set_nodelay(true).context("nodelay")?;
    let (mut last, mut longest, mut line) = (0, Duration::ZERO, String::new());
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        stream.write_all(b"\n").await.context("ask")?;
        line.clear();
        let read = timeout(PATIENCE, stream.read_line(&mut line));
        read.await.map_err(|_| format!("no answer after {last}"))?.context("read the answer")?;
        let number: u64 = line.trim().parse().map_err(|e| format!("answer {line:?} after {last}: {e}"))?;
        if number != last + 1 {
            return Err(format!("{number} came after {last}"));
        }
        // The first one waits until the service has started.
        if last > 0 {
            longest = longest.max(asked.elapsed());
        }
        last = number;
        answered.send_replace(last);
        due = (due + PACE).max(Instant::now());
        sleep_until(due).await;
    }
    Ok((last, longest))
}

fn language(g: &Guest, initramfs: &str, what: &str) -> Result<()> {
    let publish = format!("--publish=tcp:{ADDRESS}=vsock:{PORT},sessions");
    let (initramfs, cmdline) =
        (format!("--initramfs={initramfs}"), format!("--kernel-cmdline=quiet {what}={PORT}"));
    g.ctl(&["spawn", "counter", "--kernel=/boot/vmlinuz-6.1", &initramfs, &cmdline, &publish])?;
    // An emulated machine takes longer for the little there is to copy.
    g.ctl(&["policy", "set", "morph-downtime", "counter", "200ms"])?;
    let stop = Arc::new(AtomicBool::new(false));
    let (answered, answers) = watch::channel(0);
    let asking = g.beside(client(stop.clone(), answered));
    let more = |than: u64| {
        let mut answers = answers.clone();
        let wait = async { timeout(PATIENCE, answers.wait_for(|n| *n > than)).await.map(|r| r.map(|n| *n)) };
        // When the client has given up, it says why below.
        match g.wait(wait) {
            Ok(Ok(n)) => n,
            _ => 0,
        }
    };
    let before = more(20);
    let args = ["morph", "counter", "--kernel=/boot/vmlinuz-6.12", "--auto-commit", "--output", "json"];
    let done = g.command("kmorphctl", &args)?;
    let during = *answers.borrow();
    let after = more(during + 20);
    stop.store(true, Ordering::Relaxed);
    let (asked, longest) = g.wait(asking).context("the client")?.context("the client")?;
    g.check(done.code == 0, || format!("morph: {}", done.err))?;
    let view: MorphView = serde_json::from_str(&done.out).context("the answer of morph")?;
    let blackout = view.blackout.clone().ok_or_else(|| format!("nothing stood still: {view:?}"))?;
    g.check(view.committed == Some(true), || format!("the report: {view:?}"))?;
    g.check(before > 20 && after > during, || format!("{before} answers before, {after} at last"))?;
    g.say(&format!(
        "1 to {asked}, each once; {} of them while the morph went on; longest wait {longest:.1?}; stood still for {:.1} ms: freeze {:.1}, copy {:.1} ({} B), check {:.1}, record {:.1}, activate {:.1}",
        during - before,
        blackout.total_us as f64 / 1e3,
        blackout.freeze_us as f64 / 1e3,
        blackout.copy_us as f64 / 1e3,
        blackout.bytes,
        blackout.check_us as f64 / 1e3,
        blackout.record_us as f64 / 1e3,
        blackout.activate_us as f64 / 1e3,
    ));
    let counter = g.healthy("counter")?;
    let publish = &counter.publish[0];
    g.check(counter.release.starts_with("6.12.") && publish.failed == 0 && publish.moved == 1, || {
        format!("{counter:?}")
    })?;
    g.ctl(&["terminate", "counter"])?;
    Ok(())
}

fn guest(g: &Guest) -> Result<()> {
    g.define("counter", 1, &[2], 256)?;
    g.configure(OFTEN)?;
    g.ctl(&["daemon", "start"])?;
    for (name, initramfs, what) in [
        ("written in Python", PYTHON, "counter"),
        ("written in C", WORKLOAD, "counter"),
        ("with open files", WORKLOAD, "journal"),
    ] {
        g.chapter(&format!("a service {name} goes to another kernel"));
        language(g, initramfs, what).context(name)?;
    }
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.kernel_is_clean()
}
