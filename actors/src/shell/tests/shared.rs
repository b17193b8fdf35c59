//! Members of a group behind one address: clients go to those that serve. With real sockets and so in real time.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::core::group::GroupSpec;
use crate::core::policy::Key;
use crate::core::supervisor::Strategy;

const SOON: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("in time")
}

async fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

fn published(name: &str, port: u16, more: &str) -> SpawnArgs {
    let service = format!("tcp:127.0.0.1:{port}=vsock:5000{more}");
    SpawnArgs { publish: vec![service.parse().unwrap()], ..args(name) }
}

/// db and web are a group and share an address; i3 is in none.
async fn shop() -> (World, u16) {
    let mut config = config();
    config.settings.groups = vec![GroupSpec {
        name: "shop".into(),
        strategy: Strategy::OneForOne,
        intensity: 100,
        period: Duration::from_secs(600),
        members: vec!["db".into(), "web".into()],
    }];
    let (w, port) = (world_with(config).await, port().await);
    for name in ["db", "web"] {
        w.tree.spawn(published(name, port, "")).await.unwrap();
    }
    (w, port)
}

/// A connection that was greeted, and the release of the kernel that serves it.
async fn client(port: u16) -> std::io::Result<(BufReader<TcpStream>, String)> {
    let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await?);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    Ok((stream, line.trim().to_owned()))
}

async fn figures(w: &World, name: &str) -> PublishView {
    w.tree.status(name).await.unwrap().publish.swap_remove(0)
}

async fn until(w: &World, name: &str, so: impl Fn(&InstanceView) -> bool) -> InstanceView {
    soon(async {
        loop {
            let view = w.tree.status(name).await.unwrap();
            if so(&view) {
                return view;
            }
            tokio::time::sleep(MS).await;
        }
    })
    .await
}

#[tokio::test]
async fn an_address_is_shared_in_a_group_and_with_nobody_else() {
    let (w, port) = shop().await;
    let error = w.tree.spawn(published("i3", port, "")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error}");
    for word in ["in use", "db, web is published there", "only members of one group"] {
        assert!(error.message.contains(word), "{error}");
    }
    assert_eq!(w.fake.count("boot 3"), 0, "nothing was started");
    // Connections are spread over both.
    let mut clients = vec![];
    for _ in 0..10 {
        clients.push(soon(client(port)).await.unwrap());
    }
    let (db, web) = (figures(&w, "db").await, figures(&w, "web").await);
    assert_eq!((db.open, web.open, db.accepted + web.accepted), (5, 5, 10));
    // One is stopped: its connections end, the others go on, and so does the address.
    w.tree.terminate("web", false).await.unwrap();
    let mut ended = 0;
    for (stream, _) in &mut clients {
        stream.write_all(b"hello").await.unwrap_or_default();
        let mut back = [0; 5];
        ended += usize::from(soon(stream.read_exact(&mut back)).await.is_err());
    }
    assert_eq!(ended, 5);
    soon(client(port)).await.unwrap();
    // It comes back to the same address; another way to speak there is refused.
    let error = w.tree.spawn(published("web", port, ",sessions")).await.unwrap_err();
    assert!(error.message.contains("without sessions"), "{error}");
    w.tree.spawn(published("web", port, "")).await.unwrap();
    drop(clients);
    let mut clients = vec![];
    for _ in 0..6 {
        clients.push(soon(client(port)).await.unwrap());
    }
    assert!(figures(&w, "web").await.open >= 2, "it gets its share again");
    // With the last one the address is free.
    for name in ["db", "web"] {
        w.tree.terminate(name, false).await.unwrap();
    }
    w.tree.spawn(published("i3", port, "")).await.unwrap();
}

#[tokio::test]
async fn while_one_is_recovered_clients_go_to_the_other() {
    let (w, port) = shop().await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    w.fake.panic(1, "die").await;
    until(&w, "web", |v| v.state == InstanceState::Recovering).await;
    for _ in 0..4 {
        let began = Instant::now();
        soon(client(port)).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "it waited for the dead one");
    }
    assert_eq!(figures(&w, "db").await.accepted, 4);
    gate.notify_one();
    until(&w, "web", |v| v.state == InstanceState::Healthy).await;
    // While neither serves a client waits for the first that does.
    let (first, second) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
    w.fake.script("boot", &[Next::Block(first.clone()), Next::Block(second.clone())]);
    for id in [1, 2] {
        w.fake.panic(id, "die").await;
    }
    for name in ["db", "web"] {
        until(&w, name, |v| v.state == InstanceState::Recovering).await;
    }
    let (answer, ()) = tokio::join!(soon(client(port)), async {
        tokio::time::sleep(100 * MS).await;
        first.notify_one();
    });
    assert_eq!(answer.unwrap().1, "6.12.9");
    second.notify_one();
}

#[tokio::test]
async fn one_by_one_their_clients_are_moved_away_before_and_nobody_is_refused() {
    let (w, port) = shop().await;
    let (w, stop) = (Arc::new(w), Arc::new(AtomicBool::new(false)));
    for name in ["db", "web"] {
        w.tree.policy_set(name, Key::DrainTimeout, Some("300ms")).await.unwrap();
    }
    let crowd: Vec<_> = (0..4)
        .map(|_| {
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::SeqCst) {
                    let began = Instant::now();
                    let (mut stream, _) = client(port).await.expect("a greeting");
                    stream.write_all(b"hello").await.expect("written");
                    let mut back = [0; 5];
                    stream.read_exact(&mut back).await.expect("an answer");
                    longest = longest.max(began.elapsed());
                }
                longest
            })
        })
        .collect();
    // One that stays is in nobody's way for longer than the policy allows.
    let (mut stays, _) = client(port).await.unwrap();
    let group = |kernel: &str| MorphGroupArgs {
        group: "shop".into(),
        kernel: Some(kernel.into()),
        what: GroupMorph::Commit,
        one_by_one: true,
    };
    let done = soon(w.tree.morph_group(&group("/new"))).await.unwrap();
    assert!(done.iter().all(|v| v.committed == Some(true)), "{done:?}");
    for name in ["db", "web"] {
        assert_eq!(until(&w, name, |v| v.state == InstanceState::Healthy).await.release, "6.18.1");
    }
    let end = soon(stays.read_to_end(&mut vec![])).await;
    assert!(end.is_err(), "it was reset when its time was over: {end:?}");
    let events = w.tree.events().since(&EventsArgs::default());
    let moved = events.iter().filter(|e| e.cause.contains("new connections go to others of its group"));
    assert_eq!(moved.count(), 2);
    assert_eq!(w.fake.count("boot"), 4, "each had its new kernel after the one before it");
    let log = w.fake.log();
    let at = |call: &str| {
        log.iter().position(|l| l.starts_with(call)).unwrap_or_else(|| panic!("{call}: {log:?}"))
    };
    assert!(at("fence 2 1") < at("boot 510"), "there is never more than one new kernel: {log:?}");
    // The second fails: the first gets its former kernel back.
    w.fake.fail_boot_of("web~morph");
    let error = soon(w.tree.morph_group(&group("/boot/vmlinuz"))).await.unwrap_err();
    assert!(error.message.contains("these were morphed back to their former kernel: db"), "{error}");
    for name in ["db", "web"] {
        assert_eq!(until(&w, name, |v| v.state == InstanceState::Healthy).await.release, "6.18.1");
    }
    stop.store(true, Ordering::SeqCst);
    for client in crowd {
        let longest = soon(client).await.unwrap();
        assert!(longest < Duration::from_secs(10), "{longest:?}");
    }
}
