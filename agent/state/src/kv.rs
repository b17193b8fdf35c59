//! A store of numbers: the service that examples, scenarios and benchmarks run. One request a line, `put KEY VALUE`,
//! `get KEY`, or `noise KEY SEED`, which fills all that a key has with what cannot be compressed; every answer carries the number of requests that were served so far, so that one that is lost or done
//! twice shows.

use std::io;
use std::sync::Arc;

use crate::handover::Region;
use crate::hook;
use crate::memory::Memory;
use crate::service::{App, Service};

/// Bytes from one value to the next: a page for each key, so that every change is one.
pub const STRIDE: usize = 4096;
/// Longest request.
const REQUEST: usize = 100;

/// The store.
pub struct Kv;

impl App for Kv {
    fn layout(&self) -> (&'static str, u32) {
        ("kmorph,kv", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        let Some(end) = input.iter().position(|b| *b == b'\n') else {
            return if input.len() < REQUEST { Ok(0) } else { Err("a request has no end".into()) };
        };
        let line = input.get(..end).map(String::from_utf8_lossy).unwrap_or_default();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |n: usize| {
            let word = words.get(n).and_then(|w| w.parse::<u64>().ok());
            word.ok_or_else(|| format!("what is {line:?}?"))
        };
        let served = u64::from_le_bytes(cell(memory, 0)?) + 1;
        let key = usize::try_from(number(1)?).map_err(|e| e.to_string())?;
        let at = key.saturating_add(1).saturating_mul(STRIDE);
        let answer = match words.first() {
            Some(&"put") => {
                let value = number(2)?.to_le_bytes();
                memory.change(at, 8).ok_or("no such key")?.copy_from_slice(&value);
                format!("ok {served}\n")
            }
            Some(&"noise") => {
                let seed = number(2)?;
                let page = memory.change(at, STRIDE).ok_or("no such key")?;
                let mut noise = (key as u64).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                for word in page.chunks_exact_mut(8) {
                    // Xorshift.
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    word.copy_from_slice(&noise.to_le_bytes());
                }
                format!("ok {served}\n")
            }
            Some(&"get") => format!("{} {served}\n", u64::from_le_bytes(cell(memory, at)?)),
            _ => return Err(format!("what is {line:?}?")),
        };
        memory.change(0, 8).ok_or("no memory")?.copy_from_slice(&served.to_le_bytes());
        answers.extend_from_slice(answer.as_bytes());
        Ok(end + 1)
    }
}

fn cell(memory: &Memory, at: usize) -> Result<[u8; 8], String> {
    let bytes = memory.bytes().get(at..).and_then(|b| b.first_chunk::<8>());
    bytes.copied().ok_or_else(|| "no such key".into())
}

/// A store of so many MiB, or in handover memory when that is 0, that is connected to the agent. Its connections are served by [`Service::serve`]; `log` is
/// told of what goes wrong with the agent.
pub fn start(mib: usize, log: fn(&hook::HookError)) -> io::Result<Arc<Service<Kv>>> {
    let memory = match mib {
        0 => Memory::handover(Region::open()?),
        mib => Memory::populated(mib << 20),
    };
    let service = Arc::new(Service::with("kv", Kv, memory));
    let hooked = service.clone();
    std::thread::spawn(move || hook::run(&*hooked, &hook::address(), &mut |error| log(error)));
    Ok(service)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_knows_what_it_was_told_and_counts() {
        let (mut kv, mut memory, mut answers) = (Kv, Memory::new(10 * STRIDE), Vec::new());
        let mut input = &b"put 3 77\nget 3\nget 4\nnoise 4 1\nget"[..];
        loop {
            match kv.take(&mut memory, input, &mut answers).unwrap() {
                0 => break,
                n => input = &input[n..],
            }
        }
        assert_eq!((input, &answers[..]), (&b"get"[..], &b"ok 1\n77 2\n0 3\nok 4\n"[..]));
        for wrong in ["get 9\n", "put 1\n", "get x\n", "pop 1\n", "noise 9 1\n", &"x".repeat(100)] {
            assert!(kv.take(&mut memory, wrong.as_bytes(), &mut answers).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_agent_that_is_lost_when_it_has_said_activate_leaves_no_client_waiting() {
        use crate::session::Greeting;
        use std::io::{Read, Write};
        use std::os::unix::net::UnixStream;
        use std::time::Duration;

        let service = Arc::new(Service::new("kv", Kv, STRIDE));
        let (mut client, theirs) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(Greeting { id: 1, resume: false }.to_string().as_bytes()).unwrap();
        let serving = service.clone();
        std::thread::spawn(move || serving.serve(&theirs, &theirs));
        let (mut agent, ours) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut heard = Vec::new();
            while !heard.ends_with(b"ready\n") {
                let mut byte = [0];
                agent.read_exact(&mut byte).unwrap();
                heard.extend(byte);
            }
            agent.shutdown(std::net::Shutdown::Read).unwrap();
            agent.write_all(b"activate\n").unwrap();
        });
        assert!(hook::serve(&*service, &ours, "test").is_err(), "the answer cannot be sent");
        let mut welcome = [0; 2];
        client.read_exact(&mut welcome).unwrap();
        assert_eq!(&welcome, b"ok");
    }
}
