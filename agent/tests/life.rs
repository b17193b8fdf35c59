//! A stand-in's life on the process platform: start, service, fence, reclaim, and a daemon that comes back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise"
)]

mod common;

use std::time::Duration;

use common::{AGENT, Bench, LIMIT, answer, ask, beat, config, hello, until};
use kmorph_platform::process::Process;
use kmorph_platform::{
    BootRequest, CpuState, Growth, InstanceId, KernelState, Platform, PlatformError, PlatformEventKind,
};
use kmp::io::{Connection, OpenError};
use kmp::message::{Bye, ByeReason, Message};
use kmp::session::Event;
use tokio::task::JoinSet;
use tokio::time::timeout;

const ONE: InstanceId = InstanceId(1);

#[tokio::test]
async fn a_stand_in_lives_as_a_kernel_does() {
    let mut b = Bench::new(8).await;
    let mut request = b.request(1, "quiet");
    request.spec.cpus = vec![1, 5];
    b.process.check(&request).await.unwrap();
    let booted = b.process.boot(&request).await.unwrap();
    assert_eq!((booted.release.as_str(), booted.cpus.as_slice()), ("kernel-6.6", &[1, 5][..]));
    assert_eq!((booted.region.base, booted.region.size), (4 << 30, 64 << 20));
    b.ready(1).await;

    let sample = b.process.pulse(ONE, 1).unwrap();
    assert_eq!((sample.state, sample.cpus.len()), (KernelState::Ready, 2));
    assert_ne!(sample.nonce, 0);
    assert!(b.beats_on(1).await);

    let mut link = b.connect(1).await;
    let rsp = beat(&mut link, 1).await;
    assert_eq!((rsp.incarnation, rsp.agent_restarts), (1, 0));
    assert_eq!(rsp.metrics.cpu.unwrap().online, 2);
    assert_eq!(rsp.metrics.memory.unwrap().total, 64 << 20);
    assert!(b.pids(1).contains(&rsp.agent_pid.unwrap()));

    let inventory = b.process.inventory().await.unwrap();
    let of = |n: usize| (inventory.cpus[n].state, inventory.cpus[n].owner);
    assert_eq!(
        (of(0), of(1), of(2)),
        ((CpuState::Online, None), (CpuState::Lent, Some(ONE)), (CpuState::Online, None))
    );
    assert_eq!(inventory.used, [(booted.region, ONE)]);

    // Another life is never touched.
    for stale in [
        b.process.pulse(ONE, 2).map(drop),
        b.process.fence(ONE, 2).await.map(drop),
        b.process.reclaim(ONE, 2, true).await.map(drop),
        b.process.connect(ONE, 2, kmp::PORT).await.map(drop),
    ] {
        assert_eq!(stale, Err(PlatformError::StaleIncarnation { id: ONE, asked: 2, current: 1 }));
    }
    assert_eq!(b.process.pulse(InstanceId(9), 1), Err(PlatformError::Unknown(InstanceId(9))));
    assert_eq!(b.process.reclaim(ONE, 1, true).await, Err(PlatformError::NotFenced(ONE)));
    assert!(b.process.release_all().await.unwrap_err().to_string().contains("instance 1"));

    let log = b.process.console(ONE, 0).await.unwrap();
    let texts: Vec<&str> = log.records.iter().map(|r| r.text.as_str()).collect();
    assert!(
        texts[0].contains("instance 1, incarnation 1, 2 CPUs") && texts[1].contains("quiet"),
        "{texts:?}"
    );
    assert!(b.process.console(ONE, log.next_seq).await.unwrap().records.is_empty());

    let fenced = b.process.fence(ONE, 1).await.unwrap();
    assert_eq!((fenced.complete, fenced.cpus), (true, vec![(1, true), (5, true)]));
    assert!(b.pids(1).is_empty());
    assert!(b.process.fence(ONE, 1).await.unwrap().complete, "again");
    assert!(!b.process.existing().await.unwrap()[0].running);
    assert!(b.process.console(ONE, 0).await.unwrap().records.len() >= 2, "of a dead one");
    let back = b.process.reclaim(ONE, 1, false).await.unwrap();
    assert_eq!((back.region, back.cpus), (booted.region, vec![1, 5]));
    assert!(b.process.console(ONE, 0).await.unwrap().note.unwrap().contains("last life"));
    assert_eq!(b.process.inventory().await.unwrap().cpus[5].state, CpuState::Pool);
    b.process.release_all().await.unwrap();
    assert_eq!(b.process.inventory().await.unwrap().cpus[5].state, CpuState::Online);
    assert!(b.process.existing().await.unwrap().is_empty());
    let mut left: Vec<_> = std::fs::read_dir(&b.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["events", "lock"]);
    // Being fenced is no news.
    assert!(b.events.try_recv().is_err());
}

#[tokio::test]
async fn hello_is_for_one_life_only() {
    let b = Bench::new(4).await;
    b.boot(1, "").await;
    drop(b.connect(1).await);
    for wrong in [hello(1, 2), hello(2, 1)] {
        let stream = b.raw(1).await.unwrap();
        let e = Connection::connect(stream, wrong, || 1, LIMIT).await.err().unwrap();
        assert!(matches!(e, OpenError::Refused(_)), "{e}");
    }
}

#[tokio::test]
async fn terminate_is_confirmed_and_hurts_nobody() {
    let b = Bench::new(4).await;
    let mut bystander = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    b.boot(1, "").await;
    let mut link = b.connect(1).await;
    link.close(Bye { reason: ByeReason::Terminate, grace_ms: 1000 });
    let Event::Message { message: Message::ByeAck(ack), .. } = timeout(LIMIT, link.next()).await.unwrap()
    else {
        panic!("no BYE_ACK")
    };
    assert!(ack.detail.contains("no processes to end"), "{}", ack.detail);
    assert!(bystander.try_wait().unwrap().is_none());
    // The kernel goes on until it is fenced, as a real one does.
    assert!(b.beats_on(1).await);
    b.remove(1).await;
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[tokio::test]
async fn nothing_is_given_to_two() {
    let b = Bench::new(4).await;
    b.boot(1, "").await;
    let text = |e: Result<_, PlatformError>| match e {
        Err(PlatformError::Busy(text)) => text,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("taken twice"),
    };
    let mut second = b.request(2, "");
    second.spec.cpus = vec![1];
    assert!(text(b.process.check(&second).await).contains("instance 1 has"));
    assert!(text(b.process.boot(&second).await.map(drop)).contains("instance 1 has"));
    let mut same = b.request(1, "");
    same.spec.cpus = vec![3];
    assert!(text(b.process.boot(&same).await.map(drop)).contains("already runs"));
    // Ten starts at once of what fits once.
    let mut third = b.request(3, "");
    third.spec.cpus = vec![3];
    let mut starts = JoinSet::new();
    for _ in 0..10 {
        let (process, third) = (b.process.clone(), third.clone());
        starts.spawn(async move { process.boot(&third).await });
    }
    let all = starts.join_all().await;
    assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 1);
    assert!((1..=2).contains(&b.pids(3).len()));
    // A second daemon in the same folder is told why not.
    let e = Process::open(config(&b.dir, 4)).await.map(drop).unwrap_err();
    assert!(e.to_string().contains("another daemon"), "{e}");
}

#[tokio::test]
async fn what_a_request_names_is_checked() {
    let b = Bench::new(4).await;
    type Harm = fn(&mut BootRequest);
    let cases: [(&str, Harm); 6] = [
        ("no-such-kernel", |r| r.kernel = "/no-such-kernel".into()),
        ("not a regular file", |r| r.kernel = "/".into()),
        ("initramfs", |r| r.initramfs = Some("/no-such".into())),
        ("CPU 9", |r| r.spec.cpus = vec![9]),
        ("incarnation 0", |r| r.incarnation = 0),
        ("NUL", |r| r.cmdline = "a\0b".into()),
    ];
    for (want, harm) in cases {
        let mut request = b.request(1, "");
        harm(&mut request);
        for e in [b.process.check(&request).await.unwrap_err(), b.process.boot(&request).await.unwrap_err()] {
            assert!(e.to_string().contains(want), "{want}: {e}");
        }
    }
    let dir = b.dir.parent().unwrap().join("other");
    let mut no_agent = config(&dir, 4);
    no_agent.agent = b.kernel();
    let other = Process::open(no_agent).await.unwrap();
    let e = other.boot(&b.request(1, "")).await.unwrap_err().to_string();
    assert!(e.contains("cannot be run") && e.contains("kmorph-agent"), "{e}");
    assert_eq!(other.inventory().await.unwrap().used, []);
}

#[tokio::test]
async fn a_start_that_fails_gives_everything_back() {
    let b = Bench::new(4).await;
    let dir = b.dir.parent().unwrap().join("other");
    let script = b.dir.parent().unwrap().join("no-program");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut broken = config(&dir, 4);
    broken.agent = script;
    let other = Process::open(broken).await.unwrap();
    let e = other.boot(&b.request(1, "")).await.unwrap_err().to_string();
    assert!(e.contains("start ") && e.contains("no-program"), "{e}");
    assert_eq!(other.inventory().await.unwrap().used, []);
    assert!(other.existing().await.unwrap().is_empty());
    assert!(!dir.join("1").exists());
}

#[tokio::test]
async fn the_next_daemon_takes_up_what_runs_and_what_died() {
    let mut b = Bench::new(8).await;
    for id in [1, 2, 3] {
        b.boot(id, "").await;
        b.ready(id).await;
    }
    let nonce = b.process.pulse(ONE, 1).unwrap().nonce;
    let mut link = b.connect(1).await;
    beat(&mut link, 1).await;
    b.fault(2, "crash").await;
    b.parked(2).await;
    let mut b = b.restart().await;
    // It was never disturbed: the same boot, the same connection.
    let running: Vec<(u16, u64, bool)> =
        b.process.existing().await.unwrap().iter().map(|e| (e.id.0, e.incarnation, e.running)).collect();
    assert_eq!(running, [(1, 1, true), (2, 1, false), (3, 1, true)]);
    assert_eq!(b.process.pulse(ONE, 1).unwrap().nonce, nonce);
    assert!(b.beats_on(1).await);
    beat(&mut link, 2).await;
    assert!(matches!(b.state(2), KernelState::Parked(how) if how.contains("no daemon")));
    let inventory = b.process.inventory().await.unwrap();
    assert_eq!(inventory.used.len(), 3);
    assert!(matches!(b.process.boot(&b.request(1, "")).await, Err(PlatformError::Busy(_))));
    // Ends are noticed as before, and notices arrive at the new daemon.
    b.fault(3, "crash").await;
    assert!(b.parked(3).await.contains("its process ended"));
    b.fault(1, "panic after all").await;
    b.event(1, |k| (*k == PlatformEventKind::Panic("after all".into())).then_some(())).await;
    for id in [1, 2, 3] {
        b.remove(id).await;
    }
    b.boot(1, "").await;
    b.ready(1).await;
}

#[tokio::test]
async fn a_boot_nobody_waits_for_is_still_whole() {
    let b = Bench::new(4).await;
    let request = b.request(1, "");
    {
        let boot = b.process.boot(&request);
        tokio::pin!(boot);
        // Begun, then given up.
        assert!(poll_once(boot.as_mut()).await);
    }
    until(async || b.process.existing().await.unwrap().iter().any(|e| e.running)).await;
    let mut link = b.connect(1).await;
    ask(&mut link, 5, 0);
    assert_eq!(answer(&mut link).await.unwrap().0, 5);
    b.remove(1).await;
}

/// Poll a future once; whether it is still under way.
async fn poll_once<F: Future + Unpin>(mut f: F) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut f).poll(cx).is_pending())).await
}

#[test]
fn the_program_explains_itself() {
    let run = |args: &[&str]| std::process::Command::new(AGENT).args(args).output().unwrap();
    let help = run(&["--help"]);
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.status.success() && text.contains("kmorph-agent fault") && text.contains("stand-in --dir"));
    let nothing = run(&[]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("first process of a kernel instance"));
    assert_eq!(run(&["fault", "--dir", "/x"]).status.code(), Some(2));
    assert_eq!(run(&["stand-in", "--id", "1"]).status.code(), Some(2));
}

#[tokio::test]
async fn a_stand_in_gets_more_while_it_runs_and_the_next_daemon_knows() {
    let mut b = Bench::new(6).await;
    b.boot(1, "").await;
    b.boot(2, "").await;
    b.ready(1).await;
    let growth = |cpus: &[u32], mib: u64| Growth { cpus: cpus.to_vec(), memory_bytes: mib << 20 };
    let limit = Duration::from_secs(5);
    let id = InstanceId(1);
    for (growth, want) in [
        (growth(&[2], 0), "CPU 2, which instance 2 has"),
        (growth(&[0], 0), "boot processor"),
        (growth(&[6], 0), "it has 0 to 5"),
        (growth(&[3], 1 << 40), "no 1099511627776 MiB"),
    ] {
        let error = b.process.grow(id, 1, &growth, limit).await.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let stale = b.process.grow(id, 9, &growth(&[3], 0), limit).await.unwrap_err();
    assert!(matches!(stale, PlatformError::StaleIncarnation { .. }), "{stale}");
    let more = growth(&[3, 4], 32);
    for _ in 0..2 {
        let grown = b.process.grow(id, 1, &more, limit).await.unwrap();
        assert_eq!((grown.cpus.as_slice(), grown.memory_bytes() >> 20), (&[3, 4][..], 32));
        assert!(grown.failed.is_empty(), "{grown:?}");
    }
    assert_eq!(b.process.pulse(id, 1).unwrap().cpus.len(), 3);
    let used: u64 = b.process.inventory().await.unwrap().used.iter().map(|(r, _)| r.size >> 20).sum();
    assert_eq!(used, 64 + 32 + 64);

    let b = b.restart().await;
    let i = b.process.inventory().await.unwrap();
    let lent: Vec<u32> = i.cpus.iter().filter(|c| c.owner == Some(id)).map(|c| c.apic_id).collect();
    assert_eq!(lent, [1, 3, 4]);
    assert_eq!(i.used.iter().map(|(r, _)| r.size >> 20).sum::<u64>(), 160);
    assert_eq!(b.process.pulse(id, 1).unwrap().cpus.len(), 3);
    // One that stands still does not take it up; what it was given is its own all the same.
    b.fault(1, "hang").await;
    let late = b.process.grow(id, 1, &growth(&[3, 4, 5], 32), Duration::from_millis(100)).await.unwrap();
    assert!(late.failed.iter().any(|f| f.contains("did not answer within 100ms")), "{late:?}");
    b.remove(1).await;
    b.remove(2).await;
    let i = b.process.inventory().await.unwrap();
    assert!(i.used.is_empty() && i.cpus.iter().all(|c| c.owner.is_none()), "{i:?}");
}
