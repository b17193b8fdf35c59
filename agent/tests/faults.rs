//! Every fault of a stand-in, and its end where it has one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise"
)]

mod common;

use std::time::Duration;

use common::{Bench, LIMIT, answer, ask, beat, fault_said, hello, silent, until};
use kmorph_platform::{InstanceId, KernelState, Platform, PlatformEventKind};
use kmp::io::{Connection, OpenError};
use kmp::message::{GUARDIAN_OFF, Message};
use kmp::session::Event;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout};

async fn serving(cmdline: &str) -> (Bench, common::Link) {
    let mut b = Bench::new(4).await;
    b.boot(1, cmdline).await;
    b.ready(1).await;
    let mut link = b.connect(1).await;
    beat(&mut link, 1).await;
    (b, link)
}

#[tokio::test]
async fn a_panic_is_told_at_once_and_stays_until_fenced() {
    let (mut b, mut link) = serving("").await;
    b.fault(1, "panic Fatal exception in interrupt").await;
    let reason = "Fatal exception in interrupt";
    b.event(1, |k| (*k == PlatformEventKind::Panic(reason.into())).then_some(())).await;
    assert_eq!(b.state(1), KernelState::Panicked(reason.into()));
    assert!(!b.beats_on(1).await);
    ask(&mut link, 2, 0);
    assert!(silent(&mut link).await);
    assert!(!b.pids(1).is_empty());
    let (ok, said) = fault_said(&b.dir, "1", "recover").await;
    assert!(!ok && said.contains("panicked"), "{said}");
    let log = b.process.console(InstanceId(1), 0).await.unwrap();
    assert!(log.records.iter().any(|r| r.level == 0 && r.text.contains("Kernel panic - not syncing: Fatal")));
    b.remove(1).await;
}

#[tokio::test]
async fn a_kernel_that_parks_itself_says_how() {
    let (mut b, _link) = serving("").await;
    b.fault(1, "park Power down").await;
    assert_eq!(b.parked(1).await, "Power down");
    assert_eq!(b.state(1), KernelState::Parked("Power down".into()));
    b.remove(1).await;
}

#[tokio::test]
async fn a_crash_is_noticed_without_a_notice() {
    let (mut b, mut link) = serving("").await;
    b.fault(1, "crash").await;
    let how = b.parked(1).await;
    assert!(how.contains("its process ended: killed by SIGKILL"), "{how}");
    assert!(answer(&mut link).await.is_none());
    assert!(matches!(b.state(1), KernelState::Parked(_)));
    until(async || b.pids(1).is_empty()).await;
    let (ok, said) = fault_said(&b.dir, "1", "crash").await;
    assert!(!ok && said.contains("is dead"), "{said}");
    b.remove(1).await;
}

#[tokio::test]
async fn a_hang_leaves_a_process_that_only_a_fence_ends() {
    let (b, mut link) = serving("").await;
    b.fault(1, "hang").await;
    ask(&mut link, 2, 0);
    assert!(silent(&mut link).await);
    assert!(!b.beats_on(1).await);
    let pids = b.pids(1);
    assert_eq!(pids.len(), 2);
    for pid in &pids {
        kill(Pid::from_raw(*pid as i32), Signal::SIGTERM).unwrap();
    }
    assert!(silent(&mut link).await);
    assert_eq!(b.pids(1), pids);
    assert_eq!(b.state(1), KernelState::Ready, "nobody said otherwise");
    b.remove(1).await;
    assert!(b.pids(1).is_empty());
}

#[tokio::test]
async fn an_agent_that_hangs_goes_on_when_it_recovers() {
    let (b, mut link) = serving("").await;
    b.fault(1, "agent-hang").await;
    ask(&mut link, 2, 0);
    assert!(silent(&mut link).await);
    assert!(b.beats_on(1).await);
    b.fault(1, "recover").await;
    let (sequence, rsp) = answer(&mut link).await.unwrap();
    assert_eq!((sequence, rsp.agent_restarts), (2, 0), "the same agent");
}

#[tokio::test]
async fn an_agent_that_exits_is_started_again_by_its_guardian() {
    let (mut b, mut link) = serving("").await;
    for n in 1..=2 {
        let before = beat(&mut link, 2).await;
        b.fault(1, "agent-exit").await;
        assert!(answer(&mut link).await.is_none(), "the connection ends");
        link = b.connect(1).await;
        let after = beat(&mut link, 2).await;
        assert_eq!(after.agent_restarts, n);
        assert_ne!(after.agent_pid, before.agent_pid);
    }
    // The kernel never stopped.
    assert!(b.beats_on(1).await);
    assert!(b.events.try_recv().is_err());
    let log = b.process.console(InstanceId(1), 0).await.unwrap();
    assert!(log.records.iter().any(|r| r.text.contains("agent started again, restart 2")));
}

#[tokio::test]
async fn an_agent_that_is_to_stay_away_comes_back_when_it_recovers() {
    let (b, mut link) = serving("").await;
    b.fault(1, "agent-exit stay").await;
    assert!(answer(&mut link).await.is_none());
    // Longer than the guardian's first wait.
    assert!(b.beats_on(1).await);
    assert!(timeout(common::SILENCE, until(async || b.raw(1).await.is_ok())).await.is_err());
    b.fault(1, "recover").await;
    let mut link = b.connect(1).await;
    assert_eq!(beat(&mut link, 1).await.agent_restarts, 1);
}

#[tokio::test]
async fn a_guardian_that_is_told_to_restart_nothing_does_not() {
    let (b, mut link) = serving("").await;
    ask(&mut link, 2, GUARDIAN_OFF);
    answer(&mut link).await.unwrap();
    b.fault(1, "agent-exit").await;
    assert!(answer(&mut link).await.is_none());
    assert!(timeout(common::SILENCE, until(async || b.raw(1).await.is_ok())).await.is_err());
    assert!(b.beats_on(1).await);
}

#[tokio::test]
async fn a_guardian_that_is_told_to_watch_restarts_a_stuck_agent() {
    let (b, mut link) = serving("").await;
    ask(&mut link, 2, 250);
    let stuck = answer(&mut link).await.unwrap().1.agent_pid;
    b.fault(1, "agent-hang").await;
    let mut link = b.connect(1).await;
    let rsp = beat(&mut link, 1).await;
    assert_eq!(rsp.agent_restarts, 1);
    assert_ne!(rsp.agent_pid, stuck);
    let log = b.process.console(InstanceId(1), 0).await.unwrap();
    assert!(log.records.iter().any(|r| r.text.contains("is stuck and is killed")));
}

#[tokio::test]
async fn a_watched_agent_that_is_well_is_left_alone() {
    let (b, mut link) = serving("").await;
    ask(&mut link, 2, 200);
    let pid = answer(&mut link).await.unwrap().1.agent_pid;
    // Five watchdog times, counted in beats of the pulse.
    let goal = b.beats(1) + 100;
    until(async || b.beats(1) >= goal).await;
    ask(&mut link, 3, 200);
    let rsp = answer(&mut link).await.unwrap().1;
    assert_eq!((rsp.agent_restarts, rsp.agent_pid), (0, pid));
}

#[tokio::test]
async fn a_slow_agent_is_late_until_it_recovers() {
    let (b, mut link) = serving("").await;
    b.fault(1, "slow 150").await;
    let began = Instant::now();
    beat(&mut link, 2).await;
    assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
    b.fault(1, "slow 3600000").await;
    ask(&mut link, 3, 0);
    assert!(silent(&mut link).await);
    b.fault(1, "recover").await;
    assert_eq!(answer(&mut link).await.unwrap().0, 3);
}

#[tokio::test]
async fn a_liar_lies_in_three_ways() {
    let (b, mut link) = serving("").await;
    b.fault(1, "lie").await;
    let (mut life, mut number, mut figures) = (0, 0, 0);
    for sequence in 10..16 {
        ask(&mut link, sequence, 0);
        let (answered, rsp) = answer(&mut link).await.unwrap();
        if answered != sequence {
            number += 1;
        } else if rsp.incarnation != 1 {
            life += 1;
        } else if rsp.metrics.cpu.unwrap().online == u32::MAX {
            figures += 1;
        }
    }
    assert_eq!((life, number, figures), (2, 2, 2));
    b.fault(1, "recover").await;
    let rsp = beat(&mut link, 20).await;
    assert_eq!((rsp.incarnation, rsp.metrics.cpu.unwrap().online), (1, 1));
}

#[tokio::test]
async fn a_flood_ends_when_it_recovers() {
    let (b, mut link) = serving("").await;
    b.fault(1, "flood").await;
    for _ in 0..10_000 {
        let event = timeout(LIMIT, link.next()).await.unwrap();
        assert!(matches!(event, Event::Message { message: Message::HealthStatus(_), .. }), "{event:?}");
    }
    // Requests are still answered in between.
    beat(&mut link, 2).await;
    b.fault(1, "recover").await;
    beat(&mut link, 3).await;
    until(async || silent(&mut link).await).await;
}

#[tokio::test]
async fn death_in_the_middle_of_a_message() {
    let (mut b, mut link) = serving("").await;
    b.fault(1, "die-mid-message").await;
    ask(&mut link, 2, 0);
    match timeout(LIMIT, link.next()).await.unwrap() {
        Event::Closed { detail, .. } => {
            assert!(detail.contains("closed the stream") || detail.contains("reset"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
    assert!(b.parked(1).await.contains("killed by SIGKILL"));
    until(async || b.pids(1).is_empty()).await;
}

#[tokio::test]
async fn half_of_an_answer_arrives_before_that_death() {
    let (b, mut link) = serving("").await;
    ask(&mut link, 2, 0);
    let whole = {
        let mut payload = Vec::new();
        let rsp = answer(&mut link).await.unwrap().1;
        Message::from(rsp).write_payload(&mut payload).unwrap();
        32 + payload.len()
    };
    // Spoken by hand, to see the bytes.
    let mut raw = b.raw(1).await.unwrap();
    let mut session = kmp::session::Session::client(hello(1, 1));
    session.start(1);
    let mut buf = [0; 4096];
    tokio::io::AsyncWriteExt::write_all(&mut raw, session.output()).await.unwrap();
    session.output().clear();
    let n = timeout(LIMIT, raw.read(&mut buf)).await.unwrap().unwrap();
    session.receive(&buf[..n], 1);
    b.fault(1, "die-mid-message").await;
    let request: Message = kmp::message::HeartbeatReq { metrics: true, ..Default::default() }.into();
    session.send(5, &request, 1).unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut raw, session.output()).await.unwrap();
    let got = timeout(LIMIT, raw.read(&mut buf)).await.unwrap().unwrap();
    assert!(got > 0 && got < whole && got.abs_diff(whole / 2) <= 8, "{got} of {whole} bytes");
}

#[tokio::test]
async fn half_open_takes_connections_and_says_nothing() {
    let (b, mut link) = serving("").await;
    b.fault(1, "half-open").await;
    ask(&mut link, 2, 0);
    assert!(silent(&mut link).await);
    let stream = b.raw(1).await.unwrap();
    let e = Connection::connect(stream, hello(1, 1), || 1, common::SILENCE).await.err().unwrap();
    assert!(matches!(e, OpenError::TimedOut(_)), "{e}");
    assert!(b.beats_on(1).await);
    b.fault(1, "recover").await;
    assert_eq!(answer(&mut link).await.unwrap().0, 2);
    drop(b.connect(1).await);
}

#[tokio::test]
async fn a_pulse_stops_alone() {
    let (b, mut link) = serving("").await;
    b.fault(1, "pulse-stop").await;
    assert!(!b.beats_on(1).await);
    beat(&mut link, 2).await;
    b.fault(1, "recover").await;
    assert!(b.beats_on(1).await);
}

#[tokio::test]
async fn faults_from_the_command_line() {
    let mut b = Bench::new(8).await;
    b.boot(1, "quiet kmorph.fault=panic:no:luck@50ms").await;
    b.boot(2, "kmorph.fault=never-serve").await;
    b.boot(3, "kmorph.fault=crash@20ms").await;
    b.boot(4, "kmorph.fault=boom").await;
    let mut panicked = false;
    let mut crashed = false;
    while !(panicked && crashed) {
        let event = timeout(LIMIT, b.events.recv()).await.unwrap().unwrap();
        panicked |= event.id.0 == 1 && event.kind == PlatformEventKind::Panic("no luck".into());
        crashed |= event.id.0 == 3 && matches!(event.kind, PlatformEventKind::Parked(_));
    }
    until(async || b.state(2) == KernelState::Ready).await;
    assert!(b.beats_on(2).await);
    assert!(timeout(common::SILENCE, until(async || b.raw(2).await.is_ok())).await.is_err());
    drop(b.connect(4).await);
    let log = b.process.console(InstanceId(4), 0).await.unwrap();
    assert!(log.records.iter().any(|r| r.level == 3 && r.text.contains("no fault \"boom\"")));
}

#[tokio::test]
async fn orders_that_cannot_be_given_are_refused_in_words() {
    let (b, _link) = serving("").await;
    for (id, fault, want) in [
        ("2", "crash", "no instance 2"),
        ("2", "crash", "there are 1"),
        ("x", "crash", "no number"),
        ("1", "boom", "no fault \"boom\""),
        ("1", "slow", "milliseconds"),
        ("1", "never-serve", "for a start"),
    ] {
        let (ok, said) = fault_said(&b.dir, id, fault).await;
        assert!(!ok && said.contains(want), "{id} {fault}: {said}");
    }
    b.fault(1, "agent-exit stay").await;
    until(async || b.raw(1).await.is_err()).await;
    let (ok, said) = fault_said(&b.dir, "1", "slow 5").await;
    assert!(!ok && said.contains("does not run"), "{said}");
    let (ok, said) = fault_said(&b.dir.join("none"), "1", "crash").await;
    assert!(!ok && said.contains("does not exist"), "{said}");
    assert!(b.beats_on(1).await);
}
