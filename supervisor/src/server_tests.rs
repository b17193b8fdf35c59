use std::sync::atomic::{AtomicUsize, Ordering};

use kmorph_control::{Next, RecoveryLogArgs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// Answers `List` with a number and `RecoveryLog` with a stream without an end.
#[derive(Default)]
struct Double {
    endless: AtomicUsize,
}

#[async_trait]
impl Handler for Double {
    async fn handle(&self, request: &Request, client: &mut Client) -> Result<Vec<u8>, OpError> {
        match request {
            Request::List => encode(&7u32),
            Request::RecoveryLog { .. } => {
                self.endless.fetch_add(1, Ordering::SeqCst);
                let result = loop {
                    if let Err(e) = client.item(&"x".repeat(100_000)).await {
                        break Err(e);
                    }
                };
                self.endless.fetch_sub(1, Ordering::SeqCst);
                result
            }
            _ => Err(OpError::new(ErrorKind::Internal, "the double does not do this")),
        }
    }
}

struct Running {
    dir: tempfile::TempDir,
    double: Arc<Double>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start() -> Running {
        crate::limits::raise_descriptors();
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(&dir.path().join("s")).unwrap();
        let double = Arc::new(Double::default());
        let handler = double.clone();
        let task = tokio::spawn(async move { server.run(handler).await });
        Running { dir, double, task }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn client(&self) -> kmorph_control::Client {
        timeout(LIMIT, kmorph_control::Client::connect(&self.socket())).await.unwrap().unwrap()
    }

    /// Another client is served.
    async fn serves(&self) {
        let mut client = self.client().await;
        let answer: u32 = timeout(LIMIT, client.call(&Request::List)).await.unwrap().unwrap();
        assert_eq!(answer, 7);
    }

    async fn raw(&self, bytes: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the server says until it hangs up.
async fn last_words(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    // A reset after the words is a hang-up too.
    let _ = timeout(LIMIT, stream.read_to_end(&mut bytes)).await.unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

#[tokio::test]
async fn nonsense_and_long_frames_end_their_own_connection_only() {
    let running = Running::start();
    let long = (SHORT_FRAME as u32 + 1).to_be_bytes();
    for bytes in [b"GET / HTTP/1.0\r\n\r\n".to_vec(), framed(b"hello"), long.to_vec(), vec![0xff; 4]] {
        let words = last_words(&mut running.raw(&bytes).await).await;
        assert!(words.contains("bad frame") || words.contains("does not decode"), "{bytes:?}: {words:?}");
        running.serves().await;
    }
    // After the hello an administrator's frames may be long, up to a limit.
    let mut stream = running.raw(&framed(&encode(&Hello::new()).unwrap())).await;
    stream.write_all(&(LONG_FRAME as u32 + 1).to_be_bytes()).await.unwrap();
    assert!(last_words(&mut stream).await.contains("at most 2048 KiB"));
    let text = "x".repeat(1 << 20);
    let import = Request::PolicyImport { text, file: "f".into(), dry_run: false };
    let e = running.client().await.call::<()>(&import).await.unwrap_err();
    assert_eq!(e.message, "the double does not do this");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_says_hello_or_stops_midway_is_let_go() {
    let running = Running::start();
    for bytes in [&b""[..], &[0, 0][..], &[0, 0, 1, 0, 5][..]] {
        let mut stream = running.raw(bytes).await;
        let began = tokio::time::Instant::now();
        assert!(last_words(&mut stream).await.contains("nothing came within 5s"), "{bytes:?}");
        assert!(began.elapsed() >= HELLO_LIMIT, "{bytes:?}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn clients_that_do_not_read_hold_little_and_delay_nobody() {
    let running = Running::start();
    let mut deaf = Vec::new();
    for _ in 0..100 {
        let mut client = running.client().await;
        let filter = RecoveryLogArgs::default();
        client.start(&Request::RecoveryLog { filter, follow: true }).await.unwrap();
        deaf.push(client);
    }
    // Each stream is under way; none of them runs ahead of its reader by more than the socket's buffer.
    for client in deaf.iter_mut().take(5) {
        let first: Next<String, ()> = timeout(LIMIT, client.next()).await.unwrap().unwrap();
        assert!(matches!(first, Next::Item(text) if text.len() == 100_000));
    }
    running.serves().await;
    drop(deaf);
    timeout(LIMIT, async {
        while running.double.endless.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn the_places_are_counted_and_given_back() {
    let running = Running::start();
    let mut silent = Vec::new();
    for _ in 0..MAX_CLIENTS {
        silent.push(UnixStream::connect(running.socket()).await.unwrap());
    }
    for _ in 0..500 {
        let e =
            timeout(LIMIT, kmorph_control::Client::connect(&running.socket())).await.unwrap().unwrap_err();
        assert_eq!((e.kind, e.message.as_str()), (ErrorKind::Busy, "1024 clients are connected; try again"));
    }
    drop(silent);
    // They are gone as soon as their tasks have seen it.
    timeout(LIMIT, async {
        while kmorph_control::Client::connect(&running.socket()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    running.serves().await;
}

#[test]
fn readers_leave_room_for_administrators_and_strangers_take_none() {
    let room = Arc::new(Semaphore::new(MAX_CLIENTS));
    let readers = Arc::new(Semaphore::new(MAX_READERS));
    let peer = |right| Peer { uid: 1000, pid: 1, right };
    let mut held = Vec::new();
    for _ in 0..MAX_READERS {
        held.push(admit(&peer(Right::Read), &room, &readers).unwrap());
    }
    assert_eq!(admit(&peer(Right::Read), &room, &readers).unwrap_err().kind, ErrorKind::Busy);
    assert_eq!(admit(&peer(Right::None), &room, &readers).unwrap_err().kind, ErrorKind::Denied);
    for _ in MAX_READERS..MAX_CLIENTS {
        held.push(admit(&peer(Right::Admin), &room, &readers).unwrap());
    }
    assert_eq!(admit(&peer(Right::Admin), &room, &readers).unwrap_err().kind, ErrorKind::Busy);
}

#[test]
fn a_folder_that_others_may_change_gets_no_socket() {
    let d = tempfile::tempdir().unwrap();
    std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let e = Server::bind(&d.path().join("s")).err().unwrap();
    assert_eq!(e.kind, ErrorKind::Denied);
    assert!(e.message.contains("chmod 07"), "{e}");
}
