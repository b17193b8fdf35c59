//! Clients' connections while the kernel that serves them is replaced or lost.

use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::fake::SESSIONS;
use super::morphs::to;
use super::states::served;
use super::*;

/// A client whose connection is never broken: every answer is one more than the one before.
async fn counts(port: u16, stop: Arc<std::sync::atomic::AtomicBool>) -> u64 {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut last = 0;
    while !stop.load(Ordering::SeqCst) {
        stream.write_all(b"+").await.unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).await.unwrap();
        let count = u64::from_le_bytes(answer);
        assert!(count > last, "{count} after {last}");
        last = count;
    }
    stream.shutdown().await.unwrap();
    let mut rest = vec![];
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
    last
}

#[tokio::test]
async fn connections_of_clients_outlive_kernels() {
    let w = world().await;
    w.fake.workloads.switch_on();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let publish = format!("tcp:127.0.0.1:{port}=vsock:{SESSIONS},sessions").parse().unwrap();
    w.tree.spawn(SpawnArgs { publish: vec![publish], ..args("web") }).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..4).map(|_| tokio::spawn(counts(port, stop.clone()))).collect();
    let joined = async {
        while w.tree.status("web").await.unwrap().publish[0].open < 4 {
            w.pass(MS).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), joined).await.unwrap();
    for round in 0..3 {
        // Once it is undone at the last moment, and the clients go on where they were.
        let undone = round == 1;
        if undone {
            w.fake.workloads.script("510 COMMIT", Next::Fail("lost"));
        }
        let ended = w.tree.morph(to(MorphGoal::Commit)).await;
        assert_eq!(ended.is_err(), undone, "{ended:?}");
        if let Ok(view) = ended {
            let moved =
                view.steps.iter().any(|s| s.detail.contains("4 connections went on with the new kernel"));
            assert!(moved, "{:?}", view.steps);
        }
    }
    stop.store(true, Ordering::SeqCst);
    let mut most = 0;
    for client in clients {
        most = most.max(client.await.unwrap());
    }
    let web = w.tree.status("web").await.unwrap();
    // Every count was given out once: the next is the first that nobody has seen.
    assert_eq!(w.fake.workloads.count(web.id), most + 1);
    assert_eq!((web.publish[0].failed, web.publish[0].moved), (0, 8));
}

/// A morph whose commit the new agent carries out without ever answering: with a client that is welcomed there, and without.
async fn unanswered(client: bool) -> (World, u16, Option<TcpStream>) {
    let w = world().await;
    w.fake.workloads.switch_on();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let publish = format!("tcp:127.0.0.1:{port}=vsock:{SESSIONS},sessions").parse().unwrap();
    w.tree.spawn(SpawnArgs { publish: vec![publish], ..args("web") }).await.unwrap();
    let mut stream = None;
    if client {
        let mut one = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(once_more(&mut one).await, 1);
        stream = Some(one);
    }
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.workloads.script("511 COMMIT", Next::Unanswered(gate.clone()));
    let goes_on = async {
        match &mut stream {
            // The answer comes from the new kernel: the old one stands still.
            Some(one) => assert_eq!(once_more(one).await, 2),
            None => served(&w, 511).await,
        }
        gate.notify_one();
    };
    let asks = async {
        let limit = Instant::now() + PATIENCE;
        while !w.fake.workloads.log().iter().any(|l| l == "511 COMMIT") {
            assert!(Instant::now() < limit);
            tokio::time::sleep(MS).await;
        }
        goes_on.await;
    };
    let (ended, ()) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), asks);
    let (id, committed) = if client { (511, Ok(Some(true))) } else { (1, Err(())) };
    assert_eq!(ended.map(|v| v.committed).map_err(drop), committed);
    served(&w, id).await;
    (w, id, stream)
}

async fn once_more(stream: &mut TcpStream) -> u64 {
    let mut answer = [0; 8];
    stream.write_all(b"+").await.unwrap();
    let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut answer));
    read.await.unwrap().unwrap();
    u64::from_le_bytes(answer)
}

#[tokio::test]
async fn there_is_no_way_back_from_a_kernel_that_has_answered_a_client() {
    let (w, id, stream) = unanswered(true).await;
    let mut stream = stream.unwrap();
    assert_eq!(once_more(&mut stream).await, 3);
    assert_eq!(w.fake.workloads.count(id), 4);
}

#[tokio::test]
async fn a_kernel_that_has_answered_nobody_and_says_nothing_is_stopped_and_the_old_one_goes_on() {
    let (w, id, _) = unanswered(false).await;
    assert_eq!(w.fake.workloads.count(id), 1);
}

#[tokio::test]
async fn a_crash_resets_the_sessions_it_took_along_before_the_next_kernel_is_there() {
    let w = world().await;
    w.fake.workloads.switch_on();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let publish = format!("tcp:127.0.0.1:{port}=vsock:{SESSIONS},sessions").parse().unwrap();
    w.tree.spawn(SpawnArgs { publish: vec![publish], ..args("web") }).await.unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut answer = [0; 8];
    stream.write_all(b"+").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    w.fake.panic(1, "die").await;
    let end = tokio::time::timeout(Duration::from_secs(15), stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    gate.notify_one();
}
