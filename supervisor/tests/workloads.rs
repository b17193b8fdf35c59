//! Workloads on stand-ins whose kernel is replaced: one that really changes its state faster than it can be copied, and
//! one that has files open.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, dead_code)] // a test

mod common;

use std::path::{Path, PathBuf};

use common::{Daemon, Home, LIMIT};
use kmorph_control::{
    InstanceState, InstanceView, MorphArgs, MorphGoal, MorphView, OpError, PolicyChange, Request, SpawnArgs,
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Its memory. Copied in a tenth of a second or more, which is far more than morph-downtime.
const MIB: u64 = 8;

/// One after the other: what one does with all its might changes how fast the other's state is copied.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn program() -> PathBuf {
    let built = std::process::Command::new(env!("CARGO"))
        .args(["build", "--locked", "-q", "-p", "kmorphd", "--example", "kmorph-workload"])
        .status()
        .unwrap();
    assert!(built.success());
    Path::new(env!("CARGO_BIN_EXE_kmorphd")).with_file_name("examples/kmorph-workload")
}

/// A client that counts.
struct Client {
    stream: BufReader<TcpStream>,
    count: u64,
}

impl Client {
    async fn count(&mut self) {
        self.stream.write_all(b"\n").await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, self.stream.read_line(&mut answer)).await.unwrap().unwrap();
        self.count += 1;
        assert_eq!(answer, format!("{}\n", self.count));
    }
}

/// Start a workload, and be its client.
async fn start(daemon: &Daemon<'_>, home: &Home, workload: &str) -> Client {
    std::fs::copy(home.path("kernel-6.6"), home.path("kernel-6.12")).unwrap();
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let args = SpawnArgs {
        name: "one".into(),
        kernel: home.path("kernel-6.6").display().to_string(),
        cmdline: Some(format!("init={} -- {workload}", program().display())),
        initramfs: None,
        monitor: None,
        heartbeat_timeout_s: None,
        boot_timeout_s: None,
        wait: true,
        publish: vec![format!("tcp:{address}=vsock:7004,sessions").parse().unwrap()],
        handover_bytes: 0,
    };
    let _: InstanceView = daemon.call(&Request::Spawn(args)).await.unwrap();
    let stream = BufReader::new(TcpStream::connect(address).await.unwrap());
    let mut client = Client { stream, count: 0 };
    client.count().await;
    client
}

async fn policy(daemon: &Daemon<'_>, key: &str, value: &str) {
    let (key, value) = (key.into(), Some(value.into()));
    let set = Request::PolicySet { instance: "one".into(), key, value };
    let _: Vec<PolicyChange> = daemon.call(&set).await.unwrap();
}

async fn morph(
    daemon: &Daemon<'_>,
    home: &Home,
    new: bool,
    goal: MorphGoal,
    client: &mut Client,
) -> Result<MorphView, OpError> {
    let kernel = new.then(|| home.path("kernel-6.12").display().to_string());
    let args = MorphArgs {
        name: "one".into(),
        kernel,
        cmdline: None,
        initramfs: None,
        cpus: vec![],
        memory_bytes: None,
        goal,
        dry_run: false,
    };
    let request = Request::Morph(args);
    // The client is served all the time.
    let over = std::cell::Cell::new(false);
    let morphing = async {
        let mut ended = daemon.call(&request).await;
        // The one before it is just ending.
        while ended.as_ref().is_err_and(|e: &OpError| e.message.ends_with("try again")) {
            ended = daemon.call(&request).await;
        }
        over.set(true);
        ended
    };
    let counting = async {
        while !over.get() {
            client.count().await;
        }
    };
    tokio::join!(morphing, counting).0
}

#[tokio::test]
async fn one_that_is_too_fast_is_given_up_or_held_back_as_the_policy_says() {
    let _turn = TURN.lock().await;
    let home = Home::new("");
    let daemon = home.start().await;
    let mut client = start(&daemon, &home, &format!("churn {MIB}")).await;

    policy(&daemon, "morph-rounds", "4").await;
    let error = morph(&daemon, &home, true, MorphGoal::Commit, &mut client).await.unwrap_err();
    assert!(error.message.contains("changes its state faster than it can be copied"), "{error}");
    daemon.until("one", |v| v.morph.is_none() && v.state == InstanceState::Healthy).await;

    policy(&daemon, "morph-rounds", "16").await;
    policy(&daemon, "morph-dirty", "throttle").await;
    let view = morph(&daemon, &home, true, MorphGoal::Validate, &mut client).await.unwrap();
    let held = |view: &MorphView| {
        let rounds = view.steps.iter().map(|s| &*s.detail).filter(|d| d.starts_with("round "));
        let rounds: Vec<&str> = rounds.collect();
        (view.transfer.clone().unwrap(), rounds.join("\n"))
    };
    let (transfer, rounds) = held(&view);
    assert!((30..=99).contains(&transfer.throttled_percent), "{rounds}");
    assert!(rounds.contains("throttled by 30 %"), "{rounds}");
    let view = morph(&daemon, &home, false, MorphGoal::Commit, &mut client).await.unwrap();
    assert_eq!(view.committed, Some(true));
    // Nothing of it was lost on the way.
    client.count().await;
    // The new kernel's goes on unhindered, which shows: it is too fast again.
    daemon.until("one", |v| v.morph.is_none() && v.state == InstanceState::Healthy).await;
    policy(&daemon, "morph-dirty", "give-up").await;
    policy(&daemon, "morph-rounds", "3").await;
    let error = morph(&daemon, &home, true, MorphGoal::Commit, &mut client).await.unwrap_err();
    assert!(error.message.contains("changes its state faster than it can be copied"), "{error}");
    eprintln!("{rounds}");
    daemon.stop(true).await;
}

#[tokio::test]
async fn open_files_go_along_and_stay_as_they_are_when_the_morph_is_not_committed() {
    let _turn = TURN.lock().await;
    let home = Home::new("");
    let daemon = home.start().await;
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal");
    let mut client = start(&daemon, &home, &format!("journal {}", journal.display())).await;
    let there = || std::fs::read_dir(folder.path()).unwrap().count();
    let lines = || std::fs::read_to_string(&journal).unwrap().lines().count() as u64;
    const UNDONE: usize = 2;
    for before in 0..UNDONE {
        let view = morph(&daemon, &home, true, MorphGoal::Validate, &mut client).await.unwrap();
        let transfer = view.transfer.unwrap();
        // The journal, the one that is to take its place, and those of before.
        assert_eq!((transfer.sections, there()), (3, 2 + before), "{transfer:?}");
        let _: MorphView = daemon.call(&Request::MorphRollback { name: "one".into() }).await.unwrap();
        daemon.until("one", |v| v.morph.is_none() && v.state == InstanceState::Healthy).await;
        client.count().await;
        // A kernel that is removed leaves what it began in its own memory, which stand-ins do not have.
        assert_eq!(lines(), client.count);
    }
    // Every answer says that position, flags, seals and content are what they were.
    for _ in 0..3 {
        let view = morph(&daemon, &home, true, MorphGoal::Commit, &mut client).await.unwrap();
        assert_eq!(view.committed, Some(true));
        client.count().await;
        daemon.until("one", |v| v.morph.is_none() && v.state == InstanceState::Healthy).await;
        assert_eq!((there(), lines()), (1 + UNDONE, client.count));
    }
    daemon.stop(true).await;
}
