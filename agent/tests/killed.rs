//! A daemon that is killed, at any moment, leaves stand-ins that go on and nothing the next one cannot sort out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::{Bench, LIMIT, beat, config, until};
use kmorph_platform::process::Process;
use kmorph_platform::{InstanceId, Platform};
use tokio::task::JoinSet;
use tokio::time::timeout;

const DIR: &str = "KMORPH_TEST_DAEMON_DIR";
const INSTANCES: u16 = 24;

/// Not a test of its own: this program started again is the daemon that is killed.
#[tokio::test]
async fn daemon() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let b = Bench::new(2).await; // for its requests only
    let p = std::sync::Arc::new(Process::open(config(Path::new(&dir), 64)).await.unwrap());
    let mut set = JoinSet::new();
    for id in 1..=INSTANCES {
        let (p, mut request) = (p.clone(), b.request(id, ""));
        request.kernel = "/proc/self/exe".into();
        set.spawn(async move { p.boot(&request).await.unwrap() });
    }
    set.join_all().await;
    std::fs::write(Path::new(&dir).join("all-started"), "").unwrap();
    std::future::pending::<()>().await;
}

/// Start a daemon in `dir` and kill it when `when` holds.
async fn kill_daemon(dir: &Path, when: impl Fn() -> bool) {
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "daemon"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until(async || when()).await;
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[tokio::test]
async fn stand_ins_outlive_their_daemon() {
    let b = Bench::new(64).await;
    let dir = b.dir.clone();
    let home = b.vacate();
    kill_daemon(&dir, || dir.join("all-started").exists()).await;
    let b = home.open(64).await;
    let existing = b.process.existing().await.unwrap();
    assert_eq!(existing.iter().filter(|e| e.running).count(), usize::from(INSTANCES));
    for id in 1..=INSTANCES {
        let mut link = b.connect(id).await;
        assert_eq!(beat(&mut link, 1).await.agent_restarts, 0);
        assert!(b.beats(id) > 0);
        b.remove(id).await;
    }
    assert!(b.process.existing().await.unwrap().is_empty());
}

#[tokio::test]
async fn killed_in_the_middle_of_starting() {
    let mut b = Bench::new(64).await;
    for stop in [1, 3, 6, 9, 12, 15, 18, 21] {
        let dir = b.dir.clone();
        let home = b.vacate();
        let with =
            |file: &str| (1..=INSTANCES).filter(|id| dir.join(id.to_string()).join(file).exists()).count();
        // A folder that does not say yet what it is for is no instance: one at least has to be.
        kill_daemon(&dir, || with("") >= stop && with("claim") > 0).await;
        // A child between fork and exec is still the daemon's copy, for a moment.
        b = home.open(64).await;
        let existing = b.process.existing().await.unwrap();
        assert!(!existing.is_empty());
        for e in &existing {
            if e.running {
                drop(timeout(LIMIT, b.connect(e.id.0)).await.unwrap());
            }
            b.remove(e.id.0).await;
        }
        assert!(b.process.existing().await.unwrap().is_empty());
        assert_eq!(b.process.inventory().await.unwrap().used, []);
        for id in 1..=INSTANCES {
            assert_eq!(b.pids(id), [0; 0], "instance {id} after {stop}");
            assert!(!dir.join(id.to_string()).exists());
            assert!(
                b.process.console(InstanceId(id), 0).await.is_ok() || !existing.iter().any(|e| e.id.0 == id)
            );
        }
    }
}
