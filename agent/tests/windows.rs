//! State that goes from one stand-in to another through memory that both have.
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

use std::sync::Arc;

use common::{Bench, LIMIT};
use kmorph_platform::{InstanceId, Platform};
use kmorph_state::hook::{self, Workload};
use kmorph_state::memory::Memory;
use kmorph_state::service::{App, Service};
use kmorph_state::wire::State;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use workload::Kernel;

/// A workload with memory of which every page has something in it.
struct Pages;

impl App for Pages {
    fn layout(&self) -> (&'static str, u32) {
        ("test,pages", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        if let Some(page) = input.first() {
            memory.change(usize::from(*page) * 40_960, 1).ok_or("no such page")?[0] += 1;
            answers.push(b'.');
        }
        Ok(input.len().min(1))
    }
}

const MEMORY: usize = 12 << 20;

fn pages(fill: bool) -> Arc<Service<Pages>> {
    let mut memory = Memory::new(MEMORY);
    for page in 0..if fill { MEMORY / 4096 } else { 0 } {
        memory.change(page * 4096, 8).unwrap().copy_from_slice(&(page as u64 + 1).to_le_bytes());
    }
    Arc::new(Service::with("pages", Pages, memory))
}

/// Have it do what the agent of this kernel says, in a thread that ends with the connection.
fn hooked(b: &Bench, id: u16, service: &Arc<Service<Pages>>) {
    let path = b.dir.join(id.to_string()).join(kmp::stand_in::names::WORKLOADS);
    let service = service.clone();
    let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    std::thread::spawn(move || hook::serve(&*service, &stream, "test"));
}

const WINDOW: u64 = kmorph_platform::WINDOW | 7;
/// A sixth of what there is.
const WINDOW_SIZE: u64 = 2 << 20;

/// Two kernels, of which the first serves these pages, and a window between them.
async fn with_window() -> (Bench, Kernel, Kernel, Arc<Service<Pages>>) {
    let b = Bench::new(4).await;
    let (mut old, new) = (Kernel::boot(&b, 1).await, Kernel::boot(&b, 2).await);
    let service = pages(true);
    hooked(&b, 1, &service);
    old.serves(&b).await;
    assert_eq!(old.offers().await.len(), 2);
    b.process.window_open(WINDOW, WINDOW_SIZE, (InstanceId(1), 1), (InstanceId(2), 1)).await.unwrap();
    (b, old, new, service)
}

#[tokio::test(flavor = "multi_thread")]
async fn state_goes_through_memory_that_both_kernels_have() {
    let (b, mut old, mut new, _service) = with_window().await;
    let copy = pages(false);
    hooked(&b, 2, &copy);
    let offered = old.offers().await;
    let (token, window) = new.reads(offered.clone(), WINDOW).await;
    assert_eq!(window, WINDOW);
    let (came, end) = old.puts(0, 2, token, false, WINDOW).await;
    assert!(came == 0 && end.direct && end.reply.unwrap().ok);
    // The window was used several times over, and nothing but the table of sessions went another way.
    assert!(end.shared >= MEMORY as u64 && end.bytes == end.shared && end.sent == 0, "{}", end.shared);
    let reply = new.taken(0).await;
    assert!(reply.ok, "{reply:?}");
    let (_, end) = old.puts(1, 2, token, true, WINDOW).await;
    assert!(end.direct && end.reply.unwrap().ok && end.bytes < 4096, "{}", end.bytes);
    let digests = old.digests().await;
    assert_eq!(new.taken_last(1).await, digests);

    // It is rolled back and begins again, in another window: nobody uses the one before.
    assert!(old.roll_back(true).await.ok && new.roll_back(false).await.ok);
    b.process.window_close(WINDOW, LIMIT).await.unwrap();
    let another = WINDOW + 1;
    b.process.window_open(another, WINDOW_SIZE, (InstanceId(1), 1), (InstanceId(2), 1)).await.unwrap();
    let offered = old.offers().await;
    let (token, window) = new.reads(offered, another).await;
    assert_eq!(window, another);
    let (_, end) = old.puts(0, 2, token, false, another).await;
    assert!(end.shared == end.bytes && end.shared >= MEMORY as u64);
    assert!(new.taken(0).await.ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_is_not_there_is_done_without() {
    let (b, mut old, mut new, _service) = with_window().await;
    hooked(&b, 2, &pages(false));
    let offered = old.offers().await;
    let (token, window) = new.reads(offered.clone(), WINDOW + 1).await;
    assert_eq!(window, 0, "the new kernel has no such window");
    // The old one has none.
    let (came, end) = old.puts(0, 2, token, false, WINDOW + 1).await;
    assert!(came == 0 && end.direct && end.reply.unwrap().ok);
    assert!(end.shared == 0 && end.bytes >= MEMORY as u64);
    assert!(new.taken(0).await.ok);
    old.logs(&b, "state does not go through shared memory").await;
    new.logs(&b, "state does not come through shared memory").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_knows_nothing_of_windows_gets_pieces_that_were_read_for_it() {
    let (b, mut old, mut new, _service) = with_window().await;
    let mut stream = BufReader::new(new.workload(&b).await);
    let hello = "hello version=1 name=pages\nsection name=memory compatible=test,pages version=1 size=99999999\n\
         section name=sessions compatible=kmorph,sessions version=1 size=99999999\nready\n";
    stream.write_all(hello.as_bytes()).await.unwrap();
    let answers = async {
        let mut total = 0;
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            let word = line.split(' ').next().unwrap();
            match word {
                "import" => {
                    let bytes: usize = line.trim().rsplit('=').next().unwrap().parse().unwrap();
                    let mut piece = vec![0; bytes];
                    stream.read_exact(&mut piece).await.unwrap();
                    total += bytes as u64;
                }
                "imported" => {
                    stream.write_all(b"ok\n").await.unwrap();
                    if line.contains("sessions") {
                        return total;
                    }
                }
                other => panic!("{other}"),
            }
        }
    };
    let asks = async {
        let offered = old.offers().await;
        let (token, window) = new.reads(offered, WINDOW).await;
        assert_eq!(window, WINDOW);
        let (_, end) = old.puts(0, 2, token, false, WINDOW).await;
        assert!(end.reply.unwrap().ok && end.shared == end.bytes);
        assert!(new.taken(0).await.ok);
        end.bytes
    };
    let (took, sent) = timeout(LIMIT, async { tokio::join!(answers, asks) }).await.unwrap();
    assert_eq!(took, sent);
}

/// A workload that takes state and never says that it has.
async fn takes_nothing(new: &Kernel, b: &Bench) -> BufReader<UnixStream> {
    let mut stream = BufReader::new(new.workload(b).await);
    let hello = "hello version=1 name=pages knows=window\nsection name=memory compatible=test,pages version=1 size=9\n\
         section name=sessions compatible=kmorph,sessions version=1 size=9\nready\n";
    stream.write_all(hello.as_bytes()).await.unwrap();
    stream
}

/// The old workload waits for room that nobody makes, because the other kernel or the daemon is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_waits_for_room_goes_on_when_nobody_takes_anything() {
    for daemon_ends in [false, true] {
        let (b, mut old, mut new, service) = with_window().await;
        let mut takes = takes_nothing(&new, &b).await;
        let offered = old.offers().await;
        let answers = async {
            let mut line = String::new();
            takes.read_line(&mut line).await.unwrap();
            assert_eq!(line, "window from=0 size=0\n");
            takes.write_all(b"ok\n").await.unwrap();
            line.clear();
            takes.read_line(&mut line).await.unwrap();
            assert!(line.starts_with("take section=memory offset=0 "), "{line}");
        };
        let asks = async {
            let (token, window) = new.reads(offered, WINDOW).await;
            assert_eq!(window, WINDOW);
            old.begins(0, 2, token, WINDOW).await;
        };
        timeout(LIMIT, async { tokio::join!(answers, asks) }).await.unwrap();
        if daemon_ends {
            old.hang_up();
        } else {
            b.fence(2).await;
            let (_, end) = old.ended().await;
            let reply = end.reply.unwrap();
            assert!(
                !reply.ok && reply.detail.contains("connection to the other kernel is lost"),
                "{reply:?}"
            );
        }
        // Whoever comes next finds one that does what it is told, at once.
        old.call_again(&b).await;
        let began = Instant::now();
        assert!(old.roll_back(true).await.ok);
        assert!(began.elapsed() < LIMIT / 5, "{:?}", began.elapsed());
        assert_eq!(service.state(), State::Active);
        let (_, reply, _) = {
            old.offers().await;
            old.export(0, false).await
        };
        assert!(reply.ok, "{reply:?}");
    }
}
