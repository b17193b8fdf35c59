//! Many stand-ins at once. `KMORPH_STAND_INS` says how many; the default is 200.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise and prints what it measured"
)]

mod common;

use std::time::Duration;

use common::{Bench, beat, seconds};
use kmorph_platform::{InstanceId, Platform};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Bytes that a process has for itself: private, and by fair share of what is shared.
fn memory(pid: u32) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let kib = |name: &str| -> u64 {
        text.lines()
            .filter_map(|l| l.strip_prefix(name)?.split_ascii_whitespace().next()?.parse::<u64>().ok())
            .sum()
    };
    Some(((kib("Private_Clean:") + kib("Private_Dirty:")) << 10, kib("Pss:") << 10))
}

/// CPU time of a process in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0 };
    rest.split_ascii_whitespace().skip(11).take(2).filter_map(|w| w.parse::<u64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let n: u16 = std::env::var("KMORPH_STAND_INS").ok().and_then(|v| v.parse().ok()).unwrap_or(200);
    let b = Bench::new(u32::from(n) + 1).await;
    let began = Instant::now();
    let mut set = JoinSet::new();
    for id in 1..=n {
        let (process, mut request) = (b.process.clone(), b.request(id, ""));
        request.pulse_period = Duration::from_millis(500);
        set.spawn(async move { process.boot(&request).await.unwrap() });
    }
    set.join_all().await;
    println!("{n} started in {:.2} s", seconds(began));
    let mut links = vec![];
    for id in 1..=n {
        links.push(b.connect(id).await);
    }
    println!("{n} serve after {:.2} s", seconds(began));

    let began = Instant::now();
    for link in &mut links {
        beat(link, 1).await;
    }
    println!("{n} heartbeats one after the other: {:.0} us each", seconds(began) * 1e6 / f64::from(n));

    let began = Instant::now();
    for id in 1..=n {
        b.process.pulse(InstanceId(id), 1).unwrap();
    }
    println!("one look at a pulse: {:.1} us", seconds(began) * 1e6 / f64::from(n));

    let pids: Vec<u32> = (1..=n).step_by(usize::from(n / 20).max(1)).flat_map(|id| b.pids(id)).collect();
    let sampled = pids.len() as u64 / 2;
    let (private, pss) = pids
        .iter()
        .filter_map(|pid| memory(*pid))
        .fold((0, 0), |(private, pss), m| (private + m.0, pss + m.1));
    println!(
        "private {} KiB, Pss {} KiB for each stand-in",
        (private / sampled) >> 10,
        (pss / sampled) >> 10
    );
    assert!(private / sampled < 1536 << 10, "{} bytes of memory for each stand-in", private / sampled);

    let before: u64 = pids.iter().map(|pid| ticks(*pid)).sum();
    let goal = b.beats(1) + 6;
    common::until(async || b.beats(1) >= goal).await;
    let used: u64 = pids.iter().map(|pid| ticks(*pid)).sum::<u64>() - before;
    println!("{used} ticks of CPU for {sampled} stand-ins in 3 s without a daemon's questions");

    let began = Instant::now();
    let mut set = JoinSet::new();
    for id in 1..=n {
        let process = b.process.clone();
        set.spawn(async move {
            assert!(process.fence(InstanceId(id), 1).await.unwrap().complete);
            process.reclaim(InstanceId(id), 1, true).await.unwrap()
        });
    }
    set.join_all().await;
    println!("{n} fenced and reclaimed in {:.2} s", seconds(began));
    assert!(b.process.existing().await.unwrap().is_empty());
    assert_eq!(b.process.inventory().await.unwrap().used, []);
}
