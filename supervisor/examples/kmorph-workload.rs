//! Workloads that `tests/workloads.rs` runs in stand-ins. They count for their clients.
//!
//! * `churn MIB` changes its memory faster than that can be copied, from a thread of its own;
//! * `journal PATH` has files open.

#![allow(clippy::print_stdout)] // a program that a test runs

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use kmorph_state::files::Content;
use kmorph_state::memory::{Memory, PAGE};
use kmorph_state::service::{App, Service};
use kmorph_state::session::{Greeting, HEAD, Head};
use kmorph_state::{hook, journal};

/// Names the environment variable with what stands for the vsock ports of a stand-in.
const PORTS: &str = "KMORPH_PORTS";
const PORT: u32 = 7004;
/// Pages that are changed in one go.
const AT_ONCE: usize = 64;

/// `w` changes pages, one after the other, round and round; a newline counts, and is answered with the count.
struct Churn;

impl Churn {
    fn number(memory: &Memory, at: usize) -> Result<u64, String> {
        let bytes = memory.bytes().get(at..).and_then(|b| b.first_chunk::<8>()).ok_or("no memory")?;
        Ok(u64::from_le_bytes(*bytes))
    }

    fn set(memory: &mut Memory, at: usize, value: u64) -> Result<(), String> {
        memory.change(at, 8).ok_or("no memory")?.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }
}

impl App for Churn {
    fn layout(&self) -> (&'static str, u32) {
        ("test,churn", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        let Some(what) = input.first() else { return Ok(0) };
        let mut count = Churn::number(memory, 0)?;
        if *what == b'w' {
            let (from, pages) = (Churn::number(memory, 8)?, memory.size() / PAGE - 1);
            for n in 0..AT_ONCE as u64 {
                let page = 1 + (from + n) as usize % pages;
                memory.change(page * PAGE, PAGE).ok_or("no memory")?.fill((from + n) as u8);
            }
            Churn::set(memory, 8, from + AT_ONCE as u64)?;
            answers.push(b'w');
        } else {
            count += 1;
            Churn::set(memory, 0, count)?;
            answers.extend_from_slice(format!("{count}\n").as_bytes());
        }
        Ok(1)
    }
}

/// Change, wait for the answer, change, for ever.
fn churn(service: &Arc<Service<Churn>>) -> io::Result<()> {
    let (mut stream, theirs) = UnixStream::pair()?;
    let service = service.clone();
    std::thread::spawn(move || service.serve(&theirs, &theirs));
    stream.write_all(Greeting { id: 1, resume: false }.to_string().as_bytes())?;
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte)?;
    }
    let mut confirmed = 0;
    loop {
        stream.write_all(&[&Head { length: 1, end: false, confirmed }.encode()[..], b"w"].concat())?;
        let mut answer = [0; HEAD + 1];
        stream.read_exact(&mut answer)?;
        confirmed += 1;
    }
}

/// Serve clients for ever.
fn serve<A: App>(service: &Arc<Service<A>>) -> io::Result<()> {
    let path = format!("{}{PORT}", std::env::var(PORTS).map_err(io::Error::other)?);
    // One of an earlier start.
    let _ = std::fs::remove_file(&path);
    for stream in UnixListener::bind(&path)?.incoming() {
        let (stream, service) = (stream?, service.clone());
        std::thread::spawn(move || {
            if let Err(error) = service.serve(&stream, &stream) {
                println!("workload: a session ended: {error}");
            }
        });
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["churn", mib] => {
            let mib: usize = mib.parse().map_err(io::Error::other)?;
            let service = Arc::new(Service::new("churn", Churn, mib << 20));
            let (hooked, churning) = (service.clone(), service.clone());
            std::thread::spawn(move || {
                hook::run(&*hooked, &hook::address(), &mut |error| println!("churn: {error}"))
            });
            std::thread::spawn(move || {
                if let Err(error) = churn(&churning) {
                    println!("churn: it does not change any more: {error}");
                }
            });
            serve(&service)
        }
        ["journal", path] => {
            // Stand-ins share the file system of their host, which is not one in memory.
            let log = |error: &hook::HookError| println!("journal: {error}");
            serve(&journal::start(Path::new(path), Content::Along, log))
        }
        _ => Err(io::Error::other("churn MIB, or journal PATH")),
    }
}
