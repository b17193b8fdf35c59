//! Published services: clients reach the kernel that is the instance, through restarts and morphs. With real sockets
//! and so in real time: paused time would run ahead of them.

use std::io::ErrorKind as Io;
use std::path::PathBuf;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::*;

const SOON: Duration = Duration::from_secs(30);

/// A port nobody listens on.
async fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

fn published(services: &[String]) -> SpawnArgs {
    SpawnArgs { publish: services.iter().map(|s| s.parse().unwrap()).collect(), ..args("web") }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("in time")
}

/// A client, and the release of the kernel that serves it.
async fn client(port: u16) -> (BufReader<TcpStream>, String) {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    greeted(BufReader::new(stream)).await
}

async fn greeted<S: tokio::io::AsyncRead + Unpin>(mut stream: BufReader<S>) -> (BufReader<S>, String) {
    let mut line = String::new();
    soon(stream.read_line(&mut line)).await.unwrap();
    (stream, line.trim().to_owned())
}

async fn echoes(stream: &mut BufReader<TcpStream>) {
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    soon(stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"hello");
}

async fn is_reset(mut stream: BufReader<TcpStream>) {
    let end = soon(stream.read_to_end(&mut vec![])).await;
    assert_eq!(end.map_err(|e| e.kind()), Err(Io::ConnectionReset));
}

async fn view(w: &World, wanted: impl Fn(&PublishView) -> bool) -> PublishView {
    let look = async {
        loop {
            let view = w.tree.status("web").await.unwrap().publish.swap_remove(0);
            if wanted(&view) {
                return view;
            }
            tokio::time::sleep(MS).await;
        }
    };
    soon(look).await
}

#[tokio::test]
async fn clients_reach_it_by_tcp_and_by_unix_sockets_while_it_is_there() {
    let (w, port) = (world().await, port().await);
    let path = std::env::temp_dir().join(format!("kmorph-switch-{}.sock", std::process::id()));
    // A daemon that was killed left this.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let services =
        [format!("tcp:127.0.0.1:{port}=vsock:5000"), format!("unix:{}=vsock:5001", path.display())];
    w.tree.spawn(published(&services)).await.unwrap();
    let (mut tcp, release) = client(port).await;
    assert_eq!(release, "6.12.9");
    echoes(&mut tcp).await;
    let (unix, release) = greeted(BufReader::new(UnixStream::connect(&path).await.unwrap())).await;
    assert_eq!(release, "6.12.9");
    let v = view(&w, |v| v.open == 1).await;
    assert_eq!((v.accepted, v.failed, v.waiting, v.listening), (1, 0, 0, true));
    // What a client has sent is answered after it has said that there is no more.
    tcp.write_all(b"last").await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut rest = String::new();
    soon(tcp.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "last");
    drop(unix);
    view(&w, |v| v.open == 0 && v.failed == 0).await;

    w.tree.terminate("web", false).await.unwrap();
    let refused = async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            tokio::time::sleep(MS).await;
        }
    };
    soon(refused).await;
    assert!(!path.exists());
    // At once at the same address.
    w.tree.spawn(published(&services)).await.unwrap();
    assert_eq!(client(port).await.1, "6.12.9");
    w.tree.shutdown().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn an_address_that_is_taken_starts_nothing() {
    let w = world().await;
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = other.local_addr().unwrap().port();
    let path = std::env::temp_dir().join(format!("kmorph-switch-file-{}", std::process::id()));
    std::fs::write(&path, "not a socket").unwrap();
    let file = format!("unix:{}=vsock:5000", path.display());
    for taken in [format!("tcp:127.0.0.1:{port}=vsock:5000"), file] {
        let free = format!("tcp:127.0.0.1:{}=vsock:5000", super::switch::port().await);
        let error = w.tree.spawn(published(&[free, taken.clone()])).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy, "{error}");
        assert!(error.message.contains(&taken) && error.message.contains("in use"), "{error}");
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "not a socket");
    std::fs::remove_file(PathBuf::from(&path)).unwrap();
    assert_eq!(w.fake.count("boot"), 0);
    drop(other);
    w.tree.spawn(published(&[format!("tcp:127.0.0.1:{port}=vsock:5000")])).await.unwrap();
    assert_eq!(client(port).await.1, "6.12.9");
    w.tree.shutdown().await;
}

#[tokio::test]
async fn clients_wait_while_it_is_restarted_and_lost_connections_are_reset() {
    let (w, port) = (world().await, port().await);
    w.tree.spawn(published(&[format!("tcp:127.0.0.1:{port}=vsock:5000")])).await.unwrap();
    let (mut lost, _) = client(port).await;
    echoes(&mut lost).await;
    w.fake.panic(1, "die").await;
    w.fake.called("fence 1 1").await;
    // While there is no kernel.
    let (mut waited, release) = client(port).await;
    assert_eq!(release, "6.12.9");
    echoes(&mut waited).await;
    is_reset(lost).await;
    assert_eq!(w.shows("web", InstanceState::Healthy).await.incarnation, 2);
    let v = view(&w, |v| v.open == 1).await;
    assert_eq!((v.accepted, v.failed), (2, 1));
    w.tree.shutdown().await;
}

#[tokio::test]
async fn a_morph_sends_new_clients_to_the_new_kernel_and_lets_the_old_ones_end() {
    let (w, port) = (world().await, port().await);
    w.tree.spawn(published(&[format!("tcp:127.0.0.1:{port}=vsock:5000")])).await.unwrap();
    let (mut old, _) = client(port).await;
    let to = |kernel: &str| MorphArgs {
        name: "web".into(),
        kernel: Some(kernel.into()),
        cmdline: None,
        initramfs: None,
        cpus: vec![],
        memory_bytes: None,
        goal: MorphGoal::Commit,
        dry_run: false,
    };
    let new_clients = async {
        loop {
            let (mut new, release) = client(port).await;
            echoes(&mut new).await;
            if release == "6.18.1" {
                break;
            }
            tokio::time::sleep(MS).await;
        }
        // Decided, and the old kernel goes on with what it began.
        echoes(&mut old).await;
        assert_eq!(w.fake.count("fence"), 0);
        drop(old);
    };
    let (view_of, ()) = tokio::join!(w.tree.morph(to("/new")), new_clients);
    let committed = view_of.unwrap();
    assert_eq!(committed.committed, Some(true));
    let said = committed
        .steps
        .iter()
        .any(|s| s.detail.contains("connections to the old kernel ended by themselves"));
    assert!(said, "{committed:?}");
    w.fake.called("fence 1 1").await;
    assert_eq!(view(&w, |v| v.open == 0).await.failed, 0);

    // Who does not end in time is reset; the next morph does not wait at all.
    w.tree.policy_set("web", crate::Key::DrainTimeout, Some("0s")).await.unwrap();
    let (cut, release) = client(port).await;
    assert_eq!(release, "6.18.1");
    let committed = w.tree.morph(to("/boot/vmlinuz")).await.unwrap();
    assert!(committed.steps.iter().any(|s| s.detail.contains("1 were reset")), "{committed:?}");
    is_reset(cut).await;
    assert_eq!(client(port).await.1, "6.12.9");
    w.tree.shutdown().await;
}

#[tokio::test]
async fn another_daemon_publishes_what_runs_and_waits_for_its_address() {
    let (w, port) = (world().await, port().await);
    w.tree.spawn(published(&[format!("tcp:127.0.0.1:{port}=vsock:5000")])).await.unwrap();
    w.tree.shutdown().await;
    w.fake.rewind();
    let (fake, store) = (w.fake.clone(), w.store.clone());
    drop(w);
    let taken = soon(async {
        loop {
            match TcpListener::bind(("127.0.0.1", port)).await {
                Ok(listener) => return listener,
                Err(_) => tokio::time::sleep(MS).await,
            }
        }
    });
    let taken = taken.await;
    let w = World { tree: tree(&fake, &store, config()).await, fake, store };
    w.shows("web", InstanceState::Healthy).await;
    assert!(!view(&w, |_| true).await.listening);
    drop(taken);
    view(&w, |v| v.listening).await;
    assert_eq!(client(port).await.1, "6.12.9");
    assert_eq!(w.fake.count("boot"), 1, "it was not touched");
    w.tree.shutdown().await;
}
