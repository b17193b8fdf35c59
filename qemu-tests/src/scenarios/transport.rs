//! The transport between two kernels beside vsock_loopback and AF_UNIX, in the same guest and run.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use kmorph_platform::partition::{Partition, PartitionConfig};
use kmorph_platform::{BootRequest, InstanceId, InstanceSpec, Platform};
use vsock::VMADDR_CID_LOCAL;

use super::Scenario;
use super::bench::{Samples, info, row};
use crate::guest::relay::{self, Moves};
use crate::guest::{Guest, WORKLOAD, pingpong, tool};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bench-transport",
    about: "measures kerf-vsock between two kernels beside vsock_loopback and AF_UNIX",
    in_run: false,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(300),
};

const A: u32 = 3;
const ROUNDS: usize = 3;

fn guest(g: &Guest) -> Result<()> {
    let platform = g.wait(boot("6.12"))?;
    let kept = transport(g)?;
    g.wait(end(&platform))?;
    g.check(kept, || "a promise of SPECIFICATION.md was not kept".into())
}

/// Stop the instance and give everything back.
pub(super) async fn end(platform: &Partition) -> Result<()> {
    platform.fence(InstanceId(1), 1).await.context("fence")?;
    platform.reclaim(InstanceId(1), 1, true).await.context("reclaim")?;
    platform.release_all().await.context("release")
}

/// An instance without a daemon: nothing else runs while the transport is measured.
pub(super) async fn boot(series: &str) -> Result<Partition> {
    let p = Partition::open(PartitionConfig::default()).await.context("open the platform")?;
    let request = BootRequest {
        spec: InstanceSpec {
            name: "a".into(),
            id: InstanceId(1),
            cpus: vec![3],
            memory_bytes: 128 << 20,
            memory_base: None,
        },
        incarnation: 1,
        kernel: PathBuf::from(format!("/boot/vmlinuz-{series}")),
        initramfs: Some(WORKLOAD.into()),
        cmdline: String::new(),
        pulse_period: Duration::from_millis(10),
        growth: Default::default(),
    };
    p.boot(&request).await.context("boot")?;
    drop(tool::dial(A).await?);
    Ok(p)
}

const PATHS: usize = 3;

/// One round over one transport.
struct Round {
    small: Vec<f64>,
    mid: Vec<f64>,
    large: Vec<f64>,
    flow: f64,
}

fn round<S: Read + Write>(mut s: S) -> Result<Round> {
    Ok(Round {
        small: pingpong::times(&mut s, 32, 1000, true)?,
        mid: pingpong::times(&mut s, 200, 1000, true)?,
        large: pingpong::times(&mut s, 210_000, 60, false)?,
        flow: pingpong::flow(&mut s, 64 << 20)?,
    })
}

/// The same service in this kernel, on another CPU than the client, for the two comparisons.
fn serve_here(g: &Guest) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("release")?;
    for m in ["vmw_vsock_virtio_transport_common", "vsock_loopback"] {
        let path = format!("/lib/modules/{}/kernel/net/vmw_vsock/{m}.ko", release.trim());
        let done = g.command("insmod", &[&path])?;
        g.check(done.code == 0, || format!("insmod {m}: {}", done.err))?;
    }
    pingpong::listen(pingpong::PORT, Some(1))?;
    let unix = UnixListener::bind("/run/bench.sock").context("listen")?;
    std::thread::spawn(move || {
        for stream in unix.incoming().flatten() {
            std::thread::spawn(move || {
                if pingpong::pin(1).is_ok() {
                    pingpong::serve(stream);
                }
            });
        }
    });
    Ok(())
}

/// What the switch does with a client's bytes, beside splice(2).
fn relays(g: &Guest) -> Result<()> {
    let measured = std::thread::spawn(|| {
        pingpong::pin(0)?;
        let mut all: [[Vec<f64>; 2]; 2] = Default::default();
        for _ in 0..ROUNDS {
            for (both, size) in all.iter_mut().zip(relay::SIZES) {
                for (rates, moves) in both.iter_mut().zip([Moves::Copied, Moves::Spliced]) {
                    rates.push(relay::flow(A, 64 << 20, moves, size)?);
                }
            }
        }
        Result::Ok(all)
    });
    let all = measured.join().map_err(|_| "the measuring thread failed".to_string())??;
    for (both, size) in all.into_iter().zip(relay::SIZES) {
        let [copied, spliced] = both.map(|rates| Samples::new(rates).p50());
        let text = format!("{copied:.0} / {spliced:.0} MB/s, {:.2}x", spliced / copied);
        info(g, &format!("64 MiB of a TCP client, {} KiB copied / spliced", size >> 10), &text);
    }
    Ok(())
}

fn transport(g: &Guest) -> Result<bool> {
    serve_here(g)?;
    let mut rounds: [Vec<Round>; PATHS] = Default::default();
    // On a thread of its own, kept on CPU 0; in turn, so that a change of the host's speed hits all three.
    let measured = std::thread::spawn(move || {
        pingpong::pin(0)?;
        for _ in 0..ROUNDS {
            rounds[0].push(round(UnixStream::connect("/run/bench.sock").context("connect")?)?);
            rounds[1].push(round(pingpong::connect(VMADDR_CID_LOCAL, pingpong::PORT)?)?);
            rounds[2].push(round(pingpong::connect(A, pingpong::PORT)?)?);
        }
        Result::Ok(rounds)
    });
    let rounds = measured.join().map_err(|_| "the measuring thread failed".to_string())??;
    let gather = |pick: fn(&Round) -> Vec<f64>| -> [Samples; PATHS] {
        std::array::from_fn(|n| Samples::new(rounds[n].iter().flat_map(pick).collect()))
    };
    let small = gather(|r| r.small.clone());
    let mid = gather(|r| r.mid.clone());
    let large = gather(|r| r.large.clone());
    let flow = gather(|r| vec![r.flow]);
    info(g, "(p50 of)", "AF_UNIX / vsock_loopback / kerf-vsock between two kernels");
    let three = |s: &[Samples; PATHS], unit: f64, digits: usize, name: &str| {
        let v: Vec<String> = s.iter().map(|s| format!("{:.digits$}", s.p50() / unit)).collect();
        format!("{} {name}", v.join(" / "))
    };
    let ratio = |s: &[Samples; PATHS]| s[1].p50() / s[2].p50();
    let mut kept = true;
    for (what, s, unit, digits, name) in [
        ("round trip, 32 bytes", &small, 1.0, 0, "us"),
        ("round trip, 200 bytes", &mid, 1.0, 0, "us"),
        ("one way and acknowledged, 210 KB", &large, 1e3, 2, "ms"),
    ] {
        let promise = format!("2x vsock_loopback: {:.2}x", ratio(s));
        kept &= row(g, what, &three(s, unit, digits, name), &promise, ratio(s) >= 2.0);
    }
    info(g, "throughput, 64 MiB", &three(&flow, 1.0, 0, "MB/s"));
    relays(g)?;
    Ok(kept)
}
