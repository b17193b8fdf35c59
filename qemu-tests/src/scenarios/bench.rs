//! Every number of SPECIFICATION.md, measured on real kernels and printed beside its promise.

use std::time::Duration;

use kmorph_control::RecoveryStep;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_LOCAL, VsockAddr, VsockListener, VsockStream};

use super::Scenario;
use crate::guest::{Guest, WORKLOAD, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bench",
    about: "measures what SPECIFICATION.md promises",
    in_run: false,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(600),
};

const A: u32 = 3;
const RECOVERIES: usize = 6;
const ROUNDS: usize = 3;
const LOOPBACK_PORT: u32 = 7100;

/// Sorted samples.
struct Samples(Vec<f64>);

impl Samples {
    fn new(mut v: Vec<f64>) -> Samples {
        v.sort_by(f64::total_cmp);
        Samples(v)
    }
    fn at(&self, share: f64) -> f64 {
        let n = self.0.len();
        if n == 0 { f64::NAN } else { self.0[((n - 1) as f64 * share).round() as usize] }
    }
    fn p50(&self) -> f64 {
        self.at(0.5)
    }
}

/// One row: what, measured, promise, verdict. Returns whether the promise was kept.
fn row(g: &Guest, what: &str, measured: &str, promise: &str, kept: bool) -> bool {
    g.figure(&format!("{what:<44} {measured:<34} {promise:<34} {}", if kept { "kept" } else { "BROKEN" }));
    kept
}

fn info(g: &Guest, what: &str, measured: &str) {
    g.figure(&format!("{what:<44} {measured}"));
}

fn guest(g: &Guest) -> Result<()> {
    let mut kept = true;
    g.figure(&format!("{:<44} {:<34} {:<34} verdict", "number", "measured", "promise"));
    g.define("a", 1, &[2], 128)?;
    g.command("kmorphctl", &["daemon", "start"]).map(|_| ())?;
    let begun = std::time::SystemTime::now();
    spawn(g, "a", "6.12")?;
    info(
        g,
        "spawn to first heartbeat, 6.12",
        &format!("{:.2} s", begun.elapsed().context("clock")?.as_secs_f64()),
    );
    kept &= transport(g)?;
    kept &= recoveries(g, "crash")?;
    kept &= recoveries(g, "hang")?;
    g.command("kmorphctl", &["daemon", "stop", "--graceful"]).map(|_| ())?;
    g.check(kept, || "a promise of SPECIFICATION.md was not kept".into())
}

fn spawn(g: &Guest, name: &str, series: &str) -> Result<()> {
    let kernel = format!("--kernel=/boot/vmlinuz-{series}");
    let initramfs = format!("--initramfs={WORKLOAD}");
    let done = g.command("kmorphctl", &["spawn", name, &kernel, &initramfs, "--heartbeat-timeout=1"])?;
    g.check(done.code == 0, || format!("spawn {name}: {}", done.err))
}

/// Between two steps of a recovery, in milliseconds.
fn offset(steps: &[RecoveryStep], phase: &str) -> Option<f64> {
    steps.iter().find(|s| s.phase == phase).map(|s| s.offset_us as f64 / 1e3)
}

fn recoveries(g: &Guest, how: &str) -> Result<bool> {
    let before = g.status("a")?.recoveries as usize;
    let (mut declared, mut fenced, mut reclaimed, mut serving) = (vec![], vec![], vec![], vec![]);
    for n in 1..=RECOVERIES {
        let sent = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("clock")?;
        g.tool(A, how)?;
        let steps = g.recovered("a", before + n, Duration::from_secs(60))?;
        let last = steps.last().ok_or("no steps")?;
        let at = |phase: &str| offset(&steps, phase);
        // From the dying kernel's own stamp for a panic, from the order to fail for a hang.
        let preparing = steps.iter().find(|s| s.phase == "PREPARING_RECOVERY").ok_or("never declared")?;
        let end = last.offset_us as f64 / 1e3;
        let declared_ms = preparing.offset_us as f64 / 1e3;
        declared.push(if how == "crash" {
            declared_ms
        } else {
            preparing.at_unix_ms as f64 - sent.as_secs_f64() * 1e3
        });
        let reclaiming = at("RECLAIMING_RESOURCES").unwrap_or(f64::NAN);
        let complete = at("RECOVERY_COMPLETE").unwrap_or(f64::NAN);
        fenced.push(reclaiming - declared_ms);
        reclaimed.push(complete - reclaiming);
        serving.push(end - complete);
    }
    let [declared, fenced, reclaimed, serving] = [declared, fenced, reclaimed, serving].map(Samples::new);
    let measured = format!("p50 {:.1} ms, max {:.1} ms", declared.p50(), declared.at(1.0));
    let kept = if how == "crash" {
        row(g, "panic notice to declared dead", &measured, "<= 20 ms", declared.p50() <= 20.0)
    } else {
        let h = g.heartbeat("a")?;
        // Both signals must be silent for the timeout; confirmation adds its probes.
        let bound = h.timeout_ms as f64 + h.interval_ms as f64 + 1500.0;
        row(
            g,
            "hang to declared dead",
            &measured,
            &format!("<= {bound:.0} ms (timeout, interval, probes)"),
            declared.p50() <= bound,
        )
    };
    for (what, s) in [
        ("  fence, confirmed", &fenced),
        ("  reclaim", &reclaimed),
        ("  new kernel until it serves", &serving),
    ] {
        info(
            g,
            &format!("{what} (after a {how})"),
            &format!("p50 {:.1} ms, max {:.1} ms", s.p50(), s.at(1.0)),
        );
    }
    Ok(kept)
}

/// One transport under test: how to reach a peer that speaks the workload's protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Kerf,
    Loopback,
    Unix,
}

trait Both: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Both for T {}

async fn open(path: Path, line: &str) -> Result<BufReader<Box<dyn Both>>> {
    let stream: Box<dyn Both> = match path {
        Path::Kerf => Box::new(VsockStream::connect(VsockAddr::new(A, tool::PORT)).await.context("connect")?),
        Path::Loopback => Box::new(
            VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, LOOPBACK_PORT)).await.context("connect")?,
        ),
        Path::Unix => Box::new(UnixStream::connect("/run/bench.sock").await.context("connect")?),
    };
    let mut stream = BufReader::with_capacity(256 << 10, stream);
    stream.write_all(format!("{line}\n").as_bytes()).await.context("write")?;
    let mut go = String::new();
    stream.read_line(&mut go).await.context("read")?;
    if go.trim() == "go" { Ok(stream) } else { Err(format!("{line}: {go:?}")) }
}

/// Round trips of `size` bytes, microseconds.
async fn round_trips(path: Path, size: usize, count: usize) -> Result<Vec<f64>> {
    let mut s = open(path, "echo").await?;
    let (out, mut back) = (vec![7u8; size], vec![0u8; size]);
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        s.write_all(&out).await.context("write")?;
        s.read_exact(&mut back).await.context("read")?;
        all.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(all)
}

/// 210 KB until the last byte is acknowledged, microseconds.
async fn one_way(path: Path, count: usize) -> Result<Vec<f64>> {
    const SIZE: usize = 210_000;
    let mut s = open(path, &format!("messages {SIZE} {count}")).await?;
    let (out, mut back) = (vec![7u8; SIZE], [0u8; 1]);
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        s.write_all(&out).await.context("write")?;
        s.read_exact(&mut back).await.context("read")?;
        all.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(all)
}

/// 64 MiB in one stream, MB/s.
async fn throughput(path: Path) -> Result<f64> {
    const BYTES: u64 = 64 << 20;
    let mut s = open(path, &format!("messages {BYTES} 1")).await?;
    let buf = vec![7u8; 64 << 10];
    let began = Instant::now();
    for _ in 0..BYTES / buf.len() as u64 {
        s.write_all(&buf).await.context("write")?;
    }
    s.read_exact(&mut [0u8; 1]).await.context("read")?;
    Ok(BYTES as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// The workload's service in this kernel too, for the two comparisons.
fn serve_here(g: &Guest) -> Result<()> {
    let dir = format!(
        "/lib/modules/{}",
        std::fs::read_to_string("/proc/sys/kernel/osrelease").context("release")?.trim()
    );
    for m in ["vmw_vsock_virtio_transport_common", "vsock_loopback"] {
        let done = g.command("insmod", &[&format!("{dir}/kernel/net/vmw_vsock/{m}.ko")])?;
        g.check(done.code == 0, || format!("insmod {m}: {}", done.err))?;
    }
    g.wait(async {
        let vsock = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, LOOPBACK_PORT)).context("listen")?;
        let unix = UnixListener::bind("/run/bench.sock").context("listen")?;
        tokio::spawn(async move {
            while let Ok((s, _)) = vsock.accept().await {
                tokio::spawn(tool::one(s));
            }
        });
        tokio::spawn(async move {
            while let Ok((s, _)) = unix.accept().await {
                tokio::spawn(tool::one(s));
            }
        });
        Ok(())
    })
}

fn transport(g: &Guest) -> Result<bool> {
    serve_here(g)?;
    let paths = [Path::Unix, Path::Loopback, Path::Kerf];
    let mut small = [vec![], vec![], vec![]];
    let mut mid = [vec![], vec![], vec![]];
    let mut large = [vec![], vec![], vec![]];
    let mut flow = [vec![], vec![], vec![]];
    // In turn, so that a change of the host's speed hits all three.
    for _ in 0..ROUNDS {
        for (n, p) in paths.into_iter().enumerate() {
            g.wait(async {
                small[n].extend(round_trips(p, 32, 1000).await?);
                mid[n].extend(round_trips(p, 200, 1000).await?);
                large[n].extend(one_way(p, 60).await?);
                flow[n].push(throughput(p).await?);
                Result::Ok(())
            })?;
        }
    }
    let small = small.map(Samples::new);
    let mid = mid.map(Samples::new);
    let large = large.map(Samples::new);
    let flow = flow.map(Samples::new);
    info(g, "(p50 of)", "AF_UNIX / vsock_loopback / kerf-vsock between two kernels");
    let three = |s: &[Samples; 3], unit: f64, digits: usize, name: &str| {
        format!(
            "{:.digits$} / {:.digits$} / {:.digits$} {name}",
            s[0].p50() / unit,
            s[1].p50() / unit,
            s[2].p50() / unit
        )
    };
    let ratio = |s: &[Samples; 3]| s[1].p50() / s[2].p50();
    let mut kept = true;
    for (what, s, unit, digits, name) in [
        ("round trip, 32 bytes", &small, 1.0, 0, "us"),
        ("round trip, 200 bytes", &mid, 1.0, 0, "us"),
        ("one way and back, 210 KB", &large, 1e3, 2, "ms"),
    ] {
        kept &= row(
            g,
            what,
            &three(s, unit, digits, name),
            &format!("2x vsock_loopback: {:.2}x", ratio(s)),
            ratio(s) >= 2.0,
        );
    }
    info(g, "throughput, 64 MiB", &three(&flow, 1.0, 0, "MB/s"));
    Ok(kept)
}
