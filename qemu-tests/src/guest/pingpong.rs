//! The measuring service and its client, with plain blocking sockets: what is measured is the
//! transport, not a runtime. The same code runs over every transport.

use std::io::{Read, Write};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tokio::time::Instant;
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

use crate::{Context, Result};

/// Where it listens in an instance.
pub const PORT: u32 = 7001;
const MAX: usize = 1 << 20;

/// What the service does with the next messages: how many, how long, and what it answers.
#[derive(Clone, Copy)]
struct Order {
    len: u32,
    count: u32,
    /// 1: the whole message comes back; 0: one byte does; 2: one byte does after all of them.
    answer: u32,
}

impl Order {
    fn bytes(self) -> [u8; 12] {
        let mut b = [0; 12];
        for (part, v) in b.chunks_mut(4).zip([self.len, self.count, self.answer]) {
            part.copy_from_slice(&v.to_le_bytes());
        }
        b
    }

    fn read(s: &mut impl Read) -> std::io::Result<Order> {
        let mut b = [0; 12];
        s.read_exact(&mut b)?;
        let at = |n: usize| u32::from_le_bytes([b[n], b[n + 1], b[n + 2], b[n + 3]]);
        Ok(Order { len: at(0).min(MAX as u32), count: at(4), answer: at(8) })
    }
}

/// Keep this thread on one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).context("CPU set")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("pin to a CPU")
}

/// Serve one connection until it ends.
pub fn serve<S: Read + Write>(mut s: S) {
    let mut buf = vec![0u8; MAX];
    // Whatever ends the connection ends the service of it.
    while let Ok(o) = Order::read(&mut s) {
        let len = o.len as usize;
        for n in 1..=o.count {
            let back = match o.answer {
                1 => len,
                2 if n < o.count => 0,
                _ => 1,
            };
            if s.read_exact(&mut buf[..len]).and_then(|()| s.write_all(&buf[..back])).is_err() {
                return;
            }
        }
    }
}

/// Serve every connection of a port, each on a thread.
pub fn listen(port: u32, cpu: Option<usize>) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port).context("listen")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                if cpu.is_none_or(|c| pin(c).is_ok()) {
                    serve(stream);
                }
            });
        }
    });
    Ok(())
}

/// A blocking connection to another kernel's service, or to this one's.
pub fn connect(cid: u32, port: u32) -> Result<VsockStream> {
    VsockStream::connect_with_cid_port(cid, port).context("connect")
}

/// Time `count` messages of `len` bytes, microseconds each: until the message is back (`echo`), or
/// until its last byte is acknowledged.
pub fn times<S: Read + Write>(s: &mut S, len: usize, count: usize, echo: bool) -> Result<Vec<f64>> {
    let order = Order { len: len as u32, count: count as u32, answer: u32::from(echo) };
    s.write_all(&order.bytes()).context("order")?;
    let out = vec![7u8; len];
    let mut back = vec![0u8; if echo { len } else { 1 }];
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        s.write_all(&out).context("write")?;
        s.read_exact(&mut back).context("read")?;
        all.push(began.elapsed().as_secs_f64() * 1e6);
    }
    if echo && back != out {
        return Err("the echo differs".into());
    }
    Ok(all)
}

/// One stream of `bytes`, MB/s.
pub fn flow<S: Read + Write>(s: &mut S, bytes: usize) -> Result<f64> {
    const LEN: usize = 64 << 10;
    let order = Order { len: LEN as u32, count: (bytes / LEN) as u32, answer: 2 };
    s.write_all(&order.bytes()).context("order")?;
    let out = vec![7u8; LEN];
    let began = Instant::now();
    for _ in 0..bytes / LEN {
        s.write_all(&out).context("write")?;
    }
    s.read_exact(&mut [0u8]).context("read")?;
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}
