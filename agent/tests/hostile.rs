//! What a daemon finds on disk and on its socket may be half done, old, or a lie.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise"
)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use common::{Bench, config, until};
use kmorph_platform::process::Process;
use kmorph_platform::{InstanceId, KernelState, Platform, PlatformError, PlatformEventKind};
use kmp::stand_in::{Control, Notice, NoticeKind, State};

const SEVEN: InstanceId = InstanceId(7);

/// A folder as a daemon leaves it that is killed after it claimed and before it started anything.
fn claimed(dir: &Path, id: u16, cpu: u32, base: u64) -> PathBuf {
    let folder = dir.join(id.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    File::create(folder.join("lock")).unwrap();
    let claim = format!(
        r#"{{"version":1,"id":{id},"incarnation":3,"name":"x","cpus":[{cpu}],"region":{{"base":{base},"size":67108864}},"kernel":"/k","release":"6"}}"#
    );
    std::fs::write(folder.join("claim"), claim).unwrap();
    folder
}

fn run_dir() -> (tempfile::TempDir, PathBuf) {
    use std::os::unix::fs::DirBuilderExt;
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    std::fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    (temp, dir)
}

/// Somebody else's process, and when it started.
fn innocent() -> (Child, u64) {
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    let ticks = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
    (child, ticks)
}

fn control(id: u16, incarnation: u64) -> Control {
    Control {
        state: State::Ready,
        instance: id,
        incarnation,
        nonce: 5,
        stamp_ns: 1,
        start_ticks: 1,
        pid: 4_000_000,
        text: String::new(),
        beats: vec![3],
    }
}

#[tokio::test]
async fn a_daemon_killed_between_claim_and_start_is_cleaned_up_after() {
    let (_temp, dir) = run_dir();
    claimed(&dir, 7, 2, 4 << 30);
    let p = Process::open(config(&dir, 4)).await.unwrap();
    let found = p.existing().await.unwrap();
    assert_eq!((found.len(), found[0].id, found[0].incarnation, found[0].running), (1, SEVEN, 3, false));
    assert_eq!((found[0].cpus.as_slice(), found[0].region.base), (&[2][..], 4 << 30));
    assert!(matches!(p.pulse(SEVEN, 3).unwrap().state, KernelState::Parked(_)));
    assert!(p.console(SEVEN, 0).await.unwrap().note.is_some());
    assert!(p.fence(SEVEN, 3).await.unwrap().complete);
    p.reclaim(SEVEN, 3, true).await.unwrap();
    assert!(p.existing().await.unwrap().is_empty() && !dir.join("7").exists());
}

/// A folder in use that the platform does not know of is neither used nor emptied.
#[tokio::test]
async fn a_start_in_a_folder_in_use_is_refused() {
    let b = Bench::new(16).await;
    let folder = claimed(&b.dir, 7, 7, 4 << 30);
    let held = File::open(folder.join("lock")).unwrap();
    held.try_lock().unwrap();
    let e = b.process.boot(&b.request(7, "")).await.unwrap_err();
    assert!(matches!(&e, PlatformError::Busy(text) if text.contains("still in use")), "{e}");
    assert!(folder.join("claim").exists() && folder.join("lock").exists());
    assert_eq!(b.process.inventory().await.unwrap().used, []);
    drop(held);
    b.boot(7, "").await;
    b.remove(7).await;
}

#[tokio::test]
async fn a_process_that_has_the_number_now_is_never_touched() {
    let (_temp, dir) = run_dir();
    let (mut child, ticks) = innocent();
    for (id, start_ticks) in [(7, ticks), (8, ticks + 5)] {
        let folder = claimed(&dir, id, u32::from(id), (4 << 30) + u64::from(id) * (64 << 20));
        let lie = Control { pid: child.id(), start_ticks, ..control(id, 3) };
        std::fs::write(folder.join("control"), lie.encode()).unwrap();
    }
    // Instance 7's lock is even held, by this process, which is no stand-in either.
    let held = File::open(dir.join("7/lock")).unwrap();
    held.try_lock().unwrap();
    let p = Process::open(config(&dir, 16)).await.unwrap();
    let running: Vec<bool> = p.existing().await.unwrap().iter().map(|e| e.running).collect();
    assert_eq!(running, [true, false]);
    assert!(p.fence(InstanceId(8), 3).await.unwrap().complete);
    let report = p.fence(SEVEN, 3).await.unwrap();
    assert_eq!((report.complete, report.cpus.as_slice()), (false, &[(7, false)][..]));
    assert_eq!(p.reclaim(SEVEN, 3, true).await, Err(PlatformError::NotFenced(SEVEN)));
    assert!(child.try_wait().unwrap().is_none(), "it lives");
    drop(held);
    assert!(p.fence(SEVEN, 3).await.unwrap().complete);
    p.reclaim(SEVEN, 3, true).await.unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn claims_that_cannot_be_believed_are_given_up() {
    let (_temp, dir) = run_dir();
    claimed(&dir, 1, 2, 4 << 30);
    claimed(&dir, 2, 2, 8 << 30); // the CPU of instance 1
    claimed(&dir, 3, 3, 4 << 30); // its memory
    claimed(&dir, 4, 0, 16 << 30); // the boot CPU
    for (id, junk) in [(5, "{"), (6, ""), (7, "\0\0\0")] {
        let folder = claimed(&dir, id, 5, 32 << 30);
        std::fs::write(folder.join("claim"), junk).unwrap();
    }
    std::fs::create_dir(dir.join("8")).unwrap(); // nothing was claimed yet
    std::fs::write(dir.join("9_9000"), "").unwrap(); // a socket of nobody
    let p = Process::open(config(&dir, 8)).await.unwrap();
    let found: Vec<u16> = p.existing().await.unwrap().iter().map(|e| e.id.0).collect();
    assert_eq!(found, [1]);
    let mut left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["1", "events", "lock"]);
}

#[tokio::test]
async fn a_running_stand_in_without_a_claim_is_stopped() {
    let b = Bench::new(4).await;
    b.boot(1, "").await;
    drop(b.connect(1).await);
    std::fs::remove_file(b.dir.join("1/claim")).unwrap();
    let b = b.restart().await;
    assert!(b.process.existing().await.unwrap().is_empty());
    until(async || b.pids(1).is_empty()).await;
    b.boot(1, "").await;
    drop(b.connect(1).await);
}

#[tokio::test]
async fn a_lock_that_a_stranger_holds_is_an_error_that_says_what_to_do() {
    let (_temp, dir) = run_dir();
    std::fs::create_dir(dir.join("1")).unwrap();
    let held = File::create(dir.join("1/lock")).unwrap();
    held.try_lock().unwrap();
    let e = Process::open(config(&dir, 4)).await.map(drop).unwrap_err().to_string();
    assert!(e.contains("fuser -v") && e.contains("no valid claim"), "{e}");
}

#[tokio::test]
async fn a_stand_in_that_lies_in_its_control_file_is_an_error_in_words() {
    let mut b = Bench::new(4).await;
    b.boot(1, "").await;
    b.ready(1).await;
    drop(b.connect(1).await);
    b.fault(1, "pulse-stop").await;
    // The daemon keeps the file open, so the lies go into the same one.
    let file = File::options().write(true).open(b.dir.join("1/control")).unwrap();
    let write = |bytes: &[u8]| {
        file.set_len(0).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    };
    let one = InstanceId(1);
    let garbage: Vec<u8> = (0..500u32).map(|n| (n * 7) as u8).collect();
    for (lie, want) in [
        (garbage, "magic"),
        (vec![0; 1 << 20], "bytes"),
        (control(2, 1).encode(), "instance 2"),
        (control(1, 9).encode(), "incarnation 9"),
        (Control { beats: vec![1; 4], ..control(1, 1) }.encode(), "4 CPUs"),
        (Control { nonce: 0, ..control(1, 1) }.encode(), "nonce"),
        (control(1, 1).encode()[..100].to_vec(), "100 bytes"),
    ] {
        write(&lie);
        let e = b.process.pulse(one, 1).unwrap_err().to_string();
        assert!(e.contains(want) && e.contains("1/control"), "{want}: {e}");
    }
    write(&[]);
    assert_eq!(b.state(1), KernelState::Absent);
    write(&control(1, 1).encode());
    assert_eq!(b.state(1), KernelState::Ready);
    b.remove(1).await;
}

#[tokio::test]
async fn datagrams_that_lie_change_nothing() {
    let mut b = Bench::new(4).await;
    b.boot(1, "").await;
    b.ready(1).await;
    let socket = UnixDatagram::unbound().unwrap();
    let to = b.dir.join("events");
    let notice = |instance, incarnation, stamp_ns| {
        Notice { kind: NoticeKind::Panic, instance, incarnation, stamp_ns, text: "a lie".into() }.encode()
    };
    let mut long = notice(1, 1, 1);
    long.resize(4096, 0);
    for lie in [vec![], vec![0xff; 90], long, notice(2, 1, 1), notice(1, 2, 1), notice(0, 0, 0)] {
        socket.send_to(&lie, &to).unwrap();
    }
    // A stamp from the future is no age; what is well formed is the stand-in's own word.
    socket.send_to(&notice(1, 1, u64::MAX), &to).unwrap();
    let event = b.events.recv().await.unwrap();
    assert_eq!((event.id.0, event.incarnation, event.age.as_nanos()), (1, 1, 0));
    assert_eq!(event.kind, PlatformEventKind::Panic("a lie".into()));
    assert!(b.events.try_recv().is_err());
}

#[tokio::test]
async fn a_noisy_stand_in_keeps_its_log_small() {
    let b = Bench::new(4).await;
    b.boot(1, "").await;
    drop(b.connect(1).await);
    // Every refused HELLO is a line in the log.
    let refused = async || {
        let stream = b.raw(1).await.unwrap();
        kmp::io::Connection::connect(stream, common::hello(1, 9), || 1, common::LIMIT).await.err().unwrap()
    };
    let path = b.dir.join("1/console");
    let size = || std::fs::metadata(&path).unwrap().len();
    until(async || {
        for _ in 0..100 {
            refused().await;
        }
        size() > 300 << 10
    })
    .await;
    use std::os::unix::fs::MetadataExt;
    let on_disk = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(on_disk <= 160 << 10, "{on_disk} bytes of {} are kept", size());
    let log = b.process.console(InstanceId(1), 0).await.unwrap();
    assert!(log.records.len() > 100 && log.note.is_some());
    assert!(log.records.iter().all(|r| r.text.contains("not opened")), "{:?}", log.records.first());
    assert!(log.next_seq > 300 << 10);
}
