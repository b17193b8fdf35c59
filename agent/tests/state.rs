//! The example workloads, and workloads that misbehave: their state goes from one stand-in to another.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    missing_docs,
    reason = "a test stops at a surprise"
)]

mod common;
mod workload;

use common::{Bench, LIMIT, until};
use kmp::message::MorphTransferState;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout};
use workload::{Example, Kernel, Session, examples};

/// Two kernels with a workload each, the first of which serves, and a client.
async fn two(b: &Bench, example: &Example) -> (Kernel, Kernel, Session) {
    let mut old = Kernel::boot(b, 1).await;
    let mut new = Kernel::boot(b, 2).await;
    old.run(b, example);
    new.run(b, example);
    old.serves(b).await;
    let mut client = Session::begin(b, 1).await;
    for n in 1..=3 {
        assert_eq!(client.ask().await, n);
    }
    let offered = old.offers().await;
    assert_eq!(offered[0].name, "counter/state");
    let reply = new.negotiate(offered).await.1;
    assert!(reply.ok, "{reply:?}");
    (old, new, client)
}

#[tokio::test]
async fn examples_go_on_counting_in_the_new_kernel_and_keep_their_clients() {
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, mut new, mut client) = two(&b, &example).await;
        let (pieces, reply, _) = old.export(0, false).await;
        assert!(reply.ok && !pieces.is_empty(), "{reply:?}");
        assert!(new.import(0, pieces).await.ok);
        let (pieces, ..) = old.export(1, false).await;
        assert_eq!(pieces.len(), 0, "{}: nothing changed", example.name);
        assert!(new.import(1, pieces).await.ok);
        assert_eq!(client.ask().await, 4);

        let (pieces, reply, digests) = old.export(2, true).await;
        assert!(reply.ok, "{reply:?}");
        // What is asked now nobody takes but the new one.
        client.send(b"\n").await;
        assert_eq!(new.import_last(2, pieces).await, digests.unwrap(), "{}", example.name);

        let parked = client.park(&b, 2).await;
        let (a, b) = (new.commit(true).await, old.commit(false).await);
        assert!(a.ok && b.ok, "{a:?} {b:?}");
        client.moves(parked).await;
        assert_eq!(client.answer().await, 5, "{}: taken by the new one", example.name);
        for n in 6..=8 {
            assert_eq!(client.ask().await, n);
        }
        assert!(new.commit(true).await.ok, "said again it changes nothing");
        // A client that says it is done is answered first.
        client.send_end(b"\n").await;
        assert_eq!(client.answer().await, 9);
        assert!(client.ended().await, "{}", example.name);
    }
}

#[tokio::test]
async fn a_morph_that_is_rolled_back_changes_nothing_for_the_clients_of_an_example() {
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, mut new, mut client) = two(&b, &example).await;
        let (pieces, ..) = old.export(0, true).await;
        assert!(new.import(0, pieces).await.ok);
        client.send(b"\n\n").await;
        assert!(client.silent().await, "{}: it takes requests while it is frozen", example.name);
        let (a, c) = (old.roll_back(true).await, new.roll_back(false).await);
        assert!(a.ok && c.ok, "{a:?} {c:?}");
        assert_eq!((client.answer().await, client.answer().await), (4, 5), "{}", example.name);
        // The next one is committed. What was imported first is forgotten.
        let offered = old.offers().await;
        assert!(new.negotiate(offered).await.1.ok);
        let (pieces, _, digests) = old.export(0, true).await;
        assert_eq!(new.import_last(0, pieces).await, digests.unwrap());
        let parked = client.park(&b, 2).await;
        assert!(new.commit(true).await.ok && old.commit(false).await.ok);
        client.moves(parked).await;
        assert_eq!(client.ask().await, 6, "{}", example.name);
        // A session nobody began, or that was let go of, is not gone on with.
        assert!(!Session::is_known(&b, 2, 1).await, "{}", example.name);
        let id = client.leave();
        until(async || !Session::is_known(&b, 2, id).await).await;
    }
}

#[tokio::test]
async fn an_example_takes_requests_as_fast_as_its_answers_are_confirmed() {
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, mut new, mut client) = two(&b, &example).await;
        // The answers are several times what may be kept, and come in more than one frame.
        for _ in 0..4 {
            client.send(&[b'\n'; 40_000]).await;
        }
        for n in 4..1000 {
            assert_eq!(client.answer().await, n, "{}", example.name);
        }
        let (pieces, reply, digests) = old.export(0, true).await;
        assert!(reply.ok, "{}: {reply:?}", example.name);
        assert_eq!(new.import_last(0, pieces).await, digests.unwrap(), "{}", example.name);
        let parked = client.park(&b, 2).await;
        assert!(new.commit(true).await.ok && old.commit(false).await.ok);
        client.moves(parked).await;
        for n in 1000..=160_003 {
            assert_eq!(client.answer().await, n, "{}", example.name);
        }
    }
}

#[tokio::test]
async fn state_goes_from_kernel_to_kernel_and_through_the_daemon_when_that_cannot_be() {
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, mut new, mut client) = two(&b, &example).await;
        let offered = old.offers().await;
        let token = new.lets_in(offered).await;
        assert_ne!(token, 0);
        // Nobody listens in that kernel, if there is one.
        let (came, end) = old.give(0, 77, token, false).await;
        assert!(came > 0 && !end.direct && end.reply.unwrap().ok);
        let (came, end) = old.give(0, 2, token, false).await;
        assert!(came == 0 && end.direct && end.reply.unwrap().ok, "{}", example.name);
        assert!(end.bytes > 0 && end.sent <= end.bytes, "{} of {}", end.sent, end.bytes);
        let reply = new.taken(0).await;
        assert!(reply.ok, "{}: {reply:?}", example.name);
        assert_eq!(client.ask().await, 4);
        // It may be asked what it has come to before anything is sent.
        let gives = async {
            let (came, end) = old.give(1, 2, token, true).await;
            assert!(came == 0 && end.direct && end.froze_ns > 0);
            old.digests().await
        };
        let (came, sent) = tokio::join!(new.taken_last(1), gives);
        assert_eq!(came, sent, "{}", example.name);
        let parked = client.park(&b, 2).await;
        assert!(new.commit(true).await.ok && old.commit(false).await.ok);
        client.moves(parked).await;
        assert_eq!(client.ask().await, 5, "{}", example.name);
    }
}

#[tokio::test]
async fn state_that_does_not_arrive_fails_the_round_in_words() {
    let [example, _] = examples();
    let b = Bench::new(4).await;
    let (mut old, mut new, _client) = two(&b, &example).await;
    let offered = old.offers().await;
    let token = new.lets_in(offered).await;
    assert!(old.give(0, 2, token, false).await.1.direct);
    // The daemon lets go of the old kernel: so does that of the new one.
    old.hang_up();
    let reply = new.taken(1).await;
    assert!(
        !reply.ok && reply.detail.contains("state comes no more: the other kernel closed it"),
        "{reply:?}"
    );
    let path = b.dir.join(kmp::stand_in::names::port(2, kmp::STATE_PORT));
    assert!(UnixStream::connect(path).await.is_err(), "it listens for one kernel, and no longer");
}

#[tokio::test]
async fn an_example_that_is_throttled_answers_more_slowly_until_that_is_lifted_or_nobody_is_there_to_lift_it()
{
    const ASKED: u32 = 20;
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, _new, mut client) = two(&b, &example).await;
        let mut ask = async || {
            let began = Instant::now();
            for _ in 0..ASKED {
                client.ask().await;
            }
            began.elapsed()
        };
        assert!(old.export(0, false).await.1.ok);
        let free = ask().await;
        let (throttled, reply) = old.throttle(95).await;
        assert_eq!((throttled, reply.ok, reply.detail.as_str()), (Some(95), true, ""), "{}", example.name);
        // The example has seen no higher pace than this, and keeps the time between two changes.
        let least = |factor| free * factor * (ASKED - 1) / ASKED;
        let held = ask().await;
        assert!(held >= least(20), "{}: {free:?}, {held:?}", example.name);
        assert_eq!(old.throttle(0).await.0, Some(0));
        let lifted = ask().await;
        assert!(lifted < held / 2, "{}: {held:?}, {lifted:?}", example.name);
        assert_eq!(old.throttle(95).await.0, Some(95));
        old.hang_up();
        // One that was asked before that still takes its time.
        until(async || ask().await < held / 2).await;
    }
}

#[tokio::test]
async fn a_workload_that_cannot_be_throttled_is_said_to_be_so_and_copied_all_the_same() {
    for (knows, answer, want) in [
        ("", None, "workload counter does not know how to be throttled"),
        (" knows=x,throttle", Some("error not today\n"), "workload counter, throttle percent=30: not today"),
        (" knows=throttle", Some("ok\n"), ""),
    ] {
        let b = Bench::new(4).await;
        let mut kernel = Kernel::boot(&b, 1).await;
        let mut stream = BufReader::new(kernel.workload(&b).await);
        let hello = COUNTER.replace("state=new\n", &format!("state=active{knows}\n"));
        stream.write_all(hello.as_bytes()).await.unwrap();
        let answers = async {
            let mut asked = String::new();
            if let Some(answer) = answer {
                stream.read_line(&mut asked).await.unwrap();
                assert_eq!(std::mem::take(&mut asked), "throttle percent=30\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            stream.read_line(&mut asked).await.unwrap();
            assert_eq!(asked, "export section=state full=0\n");
            stream.write_all(b"done\n").await.unwrap();
            // Who may be held back is let go when nobody is there to do it.
            if answer.is_some() {
                asked.clear();
                stream.read_line(&mut asked).await.unwrap();
                assert_eq!(asked, "throttle percent=0\n");
            }
        };
        let asks = async {
            assert_eq!(kernel.offers().await.len(), 1);
            let (throttled, reply) = kernel.throttle(30).await;
            let percent = if want.is_empty() { 30 } else { 0 };
            assert_eq!((throttled, reply.ok, reply.detail.as_str()), (Some(percent), true, want));
            kernel.hang_up();
        };
        let both = async { tokio::join!(answers, asks) };
        timeout(LIMIT, both).await.unwrap();
    }
}

#[tokio::test]
async fn the_end_of_a_session_goes_along() {
    for example in examples() {
        let b = Bench::new(4).await;
        let (mut old, mut new, mut client) = two(&b, &example).await;
        client.send_end(b"\n").await;
        assert_eq!(client.answer().await, 4);
        assert!(client.ended().await);
        // The switch lost the old kernel before it heard of the end.
        let (pieces, _, digests) = old.export(0, true).await;
        assert_eq!(new.import_last(0, pieces).await, digests.unwrap());
        let parked = client.park(&b, 2).await;
        assert!(new.commit(true).await.ok && old.commit(false).await.ok);
        client.moves(parked).await;
        assert!(client.ended().await, "{}", example.name);
    }
}

#[tokio::test]
async fn an_example_that_is_frozen_stays_so_until_an_agent_says_otherwise() {
    for example in examples() {
        let dir = tempfile::tempdir().unwrap();
        let agent = UnixListener::bind(dir.path().join("agent")).unwrap();
        let mut child =
            example.start(&dir.path().join("agent"), &dir.path().join("clients")).spawn().unwrap();
        let meet = async || {
            let mut stream = BufReader::new(timeout(LIMIT, agent.accept()).await.unwrap().unwrap().0);
            let mut hello = String::new();
            while !hello.ends_with("ready\n") {
                assert_ne!(timeout(LIMIT, stream.read_line(&mut hello)).await.unwrap().unwrap(), 0);
            }
            (stream, hello)
        };
        let said = async |stream: &mut BufReader<UnixStream>, orders: &str, answers: usize| {
            stream.write_all(orders.as_bytes()).await.unwrap();
            let mut all = vec![];
            for _ in 0..answers {
                let mut line = String::new();
                timeout(LIMIT, stream.read_line(&mut line)).await.unwrap().unwrap();
                let piece = line.strip_prefix("piece offset=0 bytes=");
                if let Some(bytes) = piece {
                    let mut piece = vec![0; bytes.trim().parse().unwrap()];
                    stream.read_exact(&mut piece).await.unwrap();
                }
                all.push(line.split([' ', '\n']).next().unwrap().to_owned());
            }
            all.join(" ")
        };
        let (mut stream, hello) = meet().await;
        assert!(
            hello.starts_with("hello version=1 name=counter state=new knows=throttle\nsection name=state "),
            "{hello}"
        );
        if example.name == "counter.py" {
            let shown: String = hello.lines().map(|l| format!("    {l}\n")).collect();
            assert!(include_str!("../../docs/state.md").contains(&shown), "the manual says something else");
        }
        // Many at once, answered in order.
        let orders = "freeze\nactivate\nactivate\nexport section=state full=1\nfreeze\n\
                      export section=state full=0\ndigest section=state\nimported section=state\n";
        let answers = said(&mut stream, orders, 9).await;
        assert_eq!(answers, "error ok ok piece done ok done digest error", "{}", example.name);
        drop(stream);
        let (mut stream, hello) = meet().await;
        assert!(hello.starts_with("hello version=1 name=counter state=frozen "), "{hello}");
        assert_eq!(
            said(&mut stream, "activate\nthaw\ndiscard\nretire\nactivate\n", 5).await,
            "error ok error ok error"
        );
        drop(stream);
        assert!(meet().await.1.contains("state=retired"));
        child.kill().await.unwrap();
    }
}

const COUNTER: &str = "hello version=1 name=counter state=new\n\
    section name=state compatible=test,fake version=1 size=100\nready\n";

#[tokio::test]
async fn a_workload_that_makes_no_sense_is_refused_and_the_log_says_why() {
    let b = Bench::new(4).await;
    let kernel = Kernel::boot(&b, 1).await;
    let long = format!("hello version=1 name={}\n", "x".repeat(2000));
    let twice = COUNTER.replace("ready", "section name=state compatible=a version=1 size=1\nready");
    for (said, why) in [
        ("\u{1}\u{2}garbage\n", "is not known"),
        ("ready\n", "before hello"),
        ("hello version=2 name=a state=new\n", "it speaks version 2, this agent speaks version 1"),
        ("hello version=1 name=a/b state=new\n", "name= is missing or wrong"),
        (&long, "a line is longer than 1024 bytes"),
        (&twice, "names section state twice"),
        (&format!("{COUNTER}done\n"), "it says something it was not asked"),
    ] {
        let mut stream = kernel.workload(&b).await;
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut rest = vec![];
        // The agent ends the connection; what it did not read may reset it.
        let _ = timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("it ends");
        kernel.logs(&b, why).await;
    }
}

#[tokio::test]
async fn a_workload_that_fails_in_a_morph_fails_the_morph_in_words() {
    // What it answers to `imported` and `digest`, what the daemon is told, and what the log says.
    for (imported, digest, told, logged) in [
        ("error no room left\n", "", "workload counter, imported section=state: no room left", ""),
        ("dance\n", "", "workload counter: its connection is lost", "\"dance\" is not known"),
        ("piece offset=0 bytes=9\n", "", "workload counter: its connection is lost", "it answers imported"),
        (&"x".repeat(2000), "", "workload counter: its connection is lost", "longer than 1024 bytes"),
        ("ok\n", "error no sum\n", "workload counter, digest section=state: no sum", ""),
        ("ok\n", "digest value=01020\n", "workload counter: its connection is lost", "in hexadecimal"),
        ("ok\n", "ok\n", "workload counter: its connection is lost", "it answers digest"),
    ] {
        let b = Bench::new(4).await;
        let mut kernel = Kernel::boot(&b, 1).await;
        let mut stream = BufReader::new(kernel.workload(&b).await);
        stream.write_all(COUNTER.as_bytes()).await.unwrap();
        let answers = async {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            assert_eq!(line, "import section=state offset=7 bytes=3\n");
            let mut piece = [0; 3];
            stream.read_exact(&mut piece).await.unwrap();
            for answer in [imported, digest] {
                line.clear();
                // It is over when the agent has heard enough.
                if stream.read_line(&mut line).await.unwrap_or(0) > 0 {
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        };
        let asks = async {
            let section = kmp::message::Section {
                name: "counter/state".into(),
                compatible: "test,fake".into(),
                version: 1,
                size: 3,
            };
            assert!(kernel.negotiate(vec![section]).await.1.ok);
            let piece =
                MorphTransferState { morph: 7, offset: 7, data: vec![1; 3].into(), ..Default::default() };
            let mut reply = kernel.import(0, vec![piece]).await;
            if reply.ok {
                reply = kernel.validate().await.reply.unwrap();
            }
            assert!(!reply.ok && reply.detail.contains(told), "{imported:?} {digest:?}: {reply:?}");
            kernel.logs(&b, logged).await;
            // Nobody asks it for more.
            kernel.hang_up();
            b.remove(1).await;
        };
        tokio::join!(answers, asks);
    }
}
