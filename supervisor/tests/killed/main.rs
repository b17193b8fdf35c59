//! The daemon is killed before and after everything that lasts: each journal write, start, fence and reclaim of a
//! story in which an instance is started, crashes, is healed and is terminated, of a morph, and of a standby. The next
//! daemon puts all in order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    dead_code,
    reason = "a test stops at a surprise, and does not use all of common"
)]

#[path = "../common/mod.rs"]
mod common;
mod standby;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use common::{Home, LIMIT};
use kmorph_control::{
    Client, InstanceState, InstanceView, MorphArgs, MorphGoal, MorphView, OpError, Request, SpawnArgs,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// More boundaries than the story has.
const MOST: u64 = 500;
/// Stories told at the same time.
const TOGETHER: u64 = 6;
const MEMORY: u64 = 64 << 20;

fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--locked", "-q", "-p", "kmorphd", "--example", "kmorphd-failpoints"])
            .status()
            .unwrap();
        assert!(built.success());
        Path::new(env!("CARGO_BIN_EXE_kmorphd")).with_file_name("examples/kmorphd-failpoints")
    })
}

/// How far the story came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Started,
    Spawning,
    Serving,
    Crashed,
    Healed,
    Terminating,
    Terminated,
}

async fn ask<T: DeserializeOwned>(home: &Home, request: &Request) -> Result<T, OpError> {
    let talk = async { Client::connect(&home.socket()).await?.call(request).await };
    timeout(LIMIT, talk).await.unwrap()
}

async fn view(home: &Home) -> Result<InstanceView, OpError> {
    ask(home, &Request::Status { name: "one".into() }).await
}

fn spawn(home: &Home) -> Request {
    Request::Spawn(SpawnArgs {
        name: "one".into(),
        kernel: home.path("kernel-6.6").display().to_string(),
        cmdline: None,
        initramfs: None,
        monitor: None,
        heartbeat_timeout_s: None,
        boot_timeout_s: None,
        wait: true,
        publish: vec![],
        handover_bytes: 0,
    })
}

/// The story, until the daemon is gone.
async fn tell(home: &Home, stage: &mut Stage) -> Result<(), OpError> {
    *stage = Stage::Spawning;
    let one: InstanceView = ask(home, &spawn(home)).await?;
    assert_eq!((one.state, one.incarnation), (InstanceState::Healthy, 1));
    *stage = Stage::Serving;
    home.fault(1, &["panic"]);
    *stage = Stage::Crashed;
    let limit = Instant::now() + LIMIT;
    loop {
        let one = view(home).await?;
        if one.state == InstanceState::Healthy && one.incarnation == 2 && one.incident.is_none() {
            break;
        }
        assert!(Instant::now() < limit, "it is never healed: {one:?}");
        sleep(Duration::from_millis(5)).await;
    }
    *stage = Stage::Healed;
    let terminate = Request::Terminate { name: "one".into(), force: false };
    *stage = Stage::Terminating;
    let one: InstanceView = ask(home, &terminate).await?;
    assert_eq!(one.state, InstanceState::Stopped);
    *stage = Stage::Terminated;
    Ok(())
}

/// Start the daemon that kills itself at the n-th boundary, and whether it lived to answer.
async fn start(home: &Home, n: u64) -> (Child, bool) {
    let log = std::fs::File::options().create(true).append(true).open(home.path("log")).unwrap();
    let mut child = Command::new(program())
        .arg("--config")
        .arg(home.path("kmorphd.conf"))
        .arg("--socket")
        .arg(home.socket())
        .env("KMORPH_FAIL_AT", n.to_string())
        .env("KMORPH_FAIL_LOG", home.path("boundaries"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let limit = Instant::now() + LIMIT;
    loop {
        if Client::connect(&home.socket()).await.is_ok() {
            return (child, true);
        }
        if child.try_wait().unwrap().is_some() {
            return (child, false);
        }
        assert!(Instant::now() < limit, "no daemon: {}", home.log());
        sleep(Duration::from_millis(5)).await;
    }
}

/// Folders of instances in the run-time folder.
fn claims(home: &Home) -> usize {
    let entries = std::fs::read_dir(home.path("run")).unwrap();
    entries.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().parse::<u16>().is_ok()).count()
}

/// CPUs, memory and folders are those of the instances that run, and no others.
async fn exact(home: &Home, daemon: &common::Daemon<'_>, running: usize, when: &str) {
    let machine = daemon.status().await;
    let used = machine.pool_bytes - machine.pool_free_bytes;
    assert_eq!(machine.running, running, "{when}");
    assert_eq!((machine.cpus_lent, used), (running, running as u64 * MEMORY), "{when}: {machine:?}");
    assert_eq!(claims(home), running, "{when}");
}

/// One story with a daemon killed at boundary `n`, and its end. False: it has no such boundary.
async fn killed_at(n: u64) -> bool {
    let home = Home::new("");
    let daemon = home.start().await;
    daemon.spawn("two").await;
    daemon.stop(false).await;
    let neighbour = home.pid(2);
    assert!(neighbour.is_some());

    let (mut child, answered) = start(&home, n).await;
    let mut stage = Stage::Started;
    let told = if answered { tell(&home, &mut stage).await } else { Ok(()) };
    if stage == Stage::Terminated && child.try_wait().unwrap().is_none() {
        kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    }
    let ended = timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    let boundaries = std::fs::read_to_string(home.path("boundaries")).unwrap_or_default();
    let last = boundaries.lines().last().unwrap_or("").to_owned();
    let when = format!("killed at {last} ({stage:?}, {told:?})");
    if ended.success() {
        assert_eq!(stage, Stage::Terminated, "{when}");
        assert!((boundaries.lines().count() as u64) < n, "{when}");
        return false;
    }
    assert_eq!(ended.signal(), Some(9), "{when}");

    let daemon = home.start().await;
    let settled = [InstanceState::Healthy, InstanceState::Stopped, InstanceState::Defined];
    let one = daemon.until("one", |v| settled.contains(&v.state) && v.incident.is_none()).await;
    match stage {
        // A start under way is ended or undone; what was undone can be done again.
        Stage::Started | Stage::Spawning => assert!(one.incarnation <= 2, "{when}: {one:?}"),
        Stage::Serving | Stage::Crashed | Stage::Healed => {
            assert_eq!(one.state, InstanceState::Healthy, "{when}: {one:?}");
            assert!((2..=3).contains(&one.incarnation), "{when}: {one:?}");
        }
        Stage::Terminating | Stage::Terminated => {}
    }
    let two = daemon.until("two", |v| v.state == InstanceState::Healthy).await;
    assert_eq!((two.incarnation, home.pid(2)), (1, neighbour), "{when}: the neighbour");
    let serves = one.state == InstanceState::Healthy;
    exact(&home, &daemon, 1 + usize::from(serves), &when).await;
    let open = daemon.steps().await;
    let incidents: std::collections::BTreeSet<u64> = open.iter().map(|s| s.incident).collect();
    for incident in incidents {
        let ended = open.iter().any(|s| s.incident == incident && s.recovered.is_some());
        assert!(ended, "{when}: incident {incident} is open: {open:?}");
    }
    if !serves {
        let one: InstanceView = ask(&home, &spawn(&home)).await.unwrap();
        assert_eq!(one.state, InstanceState::Healthy, "{when}");
    }
    exact(&home, &daemon, 2, &when).await;
    daemon.stop(true).await;
    assert_eq!((home.stand_ins(), claims(&home)), (0, 0), "{when}");
    true
}

/// One morph with a daemon killed at boundary `n`, and its end. False: it has no such boundary.
async fn killed_in_a_morph_at(n: u64) -> bool {
    let home = Home::new("");
    std::fs::copy(home.path("kernel-6.6"), home.path("kernel-6.12")).unwrap();
    let daemon = home.start().await;
    daemon.spawn("one").await;
    daemon.spawn("two").await;
    daemon.stop(false).await;
    let (old, neighbour) = (home.pid(1), home.pid(2));
    assert!(old.is_some() && neighbour.is_some());

    let (mut child, answered) = start(&home, n).await;
    let morph = Request::Morph(MorphArgs {
        name: "one".into(),
        kernel: Some(home.path("kernel-6.12").display().to_string()),
        cmdline: None,
        initramfs: None,
        cpus: vec![],
        // It lands on half of it, so that there is something to get of the old one.
        memory_bytes: Some(MEMORY / 2),
        goal: MorphGoal::Commit,
        dry_run: false,
    });
    let mut told = None;
    if answered && all_serve(&home).await.is_ok() {
        told = Some(ask::<MorphView>(&home, &morph).await);
        // The old kernel is stopped after the answer.
        while one_alone(&home).await == Some(false) {
            sleep(Duration::from_millis(5)).await;
        }
    }
    if child.try_wait().unwrap().is_none() && matches!(told, Some(Ok(_))) {
        kill(Pid::from_raw(child.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    }
    let ended = timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    let boundaries = std::fs::read_to_string(home.path("boundaries")).unwrap_or_default();
    let last = boundaries.lines().last().unwrap_or("").to_owned();
    let when = format!("killed at {last}, told {told:?}");
    if ended.success() {
        assert!((boundaries.lines().count() as u64) < n, "{when}");
        assert!(boundaries.contains("grow"), "{when}: {boundaries}");
        return false;
    }
    assert_eq!(ended.signal(), Some(9), "{when}");

    let daemon = home.start().await;
    let settled = |v: &InstanceView| v.state == InstanceState::Healthy && v.morph.is_none();
    let one = daemon.until("one", settled).await;
    let decided = boundaries.contains("after decide");
    if decided || !last.contains("decide") {
        // Between the write and its end both are possible.
        assert_eq!(one.id == 511, decided, "{when}: {one:?}");
    }
    assert_eq!(one.memory_bytes, MEMORY, "{when}: {one:?}");
    assert_eq!(one.release, if one.id == 511 { "kernel-6.12" } else { "kernel-6.6" }, "{when}: {one:?}");
    if one.id == 1 {
        assert_eq!((one.incarnation, home.pid(1)), (1, old), "{when}: the old kernel was disturbed");
    }
    let limit = Instant::now() + LIMIT;
    while one_alone(&home).await != Some(true) {
        assert!(Instant::now() < limit, "{when}: a side is left: {}", home.log());
        sleep(Duration::from_millis(5)).await;
    }
    let two = daemon.until("two", |v| v.state == InstanceState::Healthy).await;
    assert_eq!((two.incarnation, home.pid(2)), (1, neighbour), "{when}: the neighbour");
    exact(&home, &daemon, 2, &when).await;
    // And again: nothing is in the way.
    let again: MorphView = ask(&home, &morph).await.unwrap();
    assert_eq!(again.committed, Some(true), "{when}");
    daemon.stop(true).await;
    assert_eq!((home.stand_ins(), claims(&home)), (0, 0), "{when}");
    true
}

async fn all_serve(home: &Home) -> Result<(), OpError> {
    loop {
        let all: Vec<InstanceView> = ask(home, &Request::List).await?;
        if all.iter().filter(|i| i.state == InstanceState::Healthy).count() == 2 {
            return Ok(());
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Whether no side of a morph is there; `None` when no daemon answers.
async fn one_alone(home: &Home) -> Option<bool> {
    let all: Vec<InstanceView> = ask(home, &Request::List).await.ok()?;
    Some(all.iter().all(|i| i.side_of.is_none()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_boundary_of_a_morph_one_kernel_serves_and_nothing_is_left() {
    at_each(killed_in_a_morph_at).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_every_boundary_the_next_daemon_puts_all_in_order() {
    at_each(killed_at).await;
}

/// Tell a story again and again, each time with a daemon that is killed a boundary later, until it has no more of them.
async fn at_each<F: Future<Output = bool>>(killed_at: impl Fn(u64) -> F) {
    // Built before anything that has a limit is under way.
    program();
    let (mut first, mut kills) = (1, 0);
    while first < MOST {
        let all = futures::future::join_all((first..first + TOGETHER).map(&killed_at)).await;
        kills += all.iter().filter(|killed| **killed).count();
        if !all.iter().all(|killed| *killed) {
            // Each has at least: two incidents' worth of journal, two starts, a fence and a reclaim each.
            eprintln!("{kills} kills");
            assert!(kills >= 20, "only {kills} boundaries were reached");
            return;
        }
        first += TOGETHER;
    }
    panic!("the story has no end");
}
