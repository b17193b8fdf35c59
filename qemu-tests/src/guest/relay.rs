//! A client's bytes on their way through the primary kernel to an instance, as the traffic switch carries them and as the
//! kernel could.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use nix::fcntl::{SpliceFFlags, splice};
use nix::unistd::pipe;
use tokio::time::Instant;
use vsock::VsockStream;

use super::pingpong;
use crate::{Context, Result};

/// How a relay moves bytes from one socket to the other.
#[derive(Clone, Copy, Debug)]
pub enum Moves {
    /// Through a buffer of this process.
    Copied,
    /// Through a pipe, without coming here.
    Spliced,
}

/// Bytes at a time: as many as the switch moves, and as many as a pipe has room for.
pub const SIZES: [usize; 2] = [16 << 10, 64 << 10];

/// One stream of `bytes`, `size` at a time, from a TCP client to the measuring service of an instance, MB/s.
pub fn flow(cid: u32, bytes: usize, moves: Moves, size: usize) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr().context("listen")?;
    let client = std::thread::spawn(move || {
        pingpong::pin(1)?;
        let mut stream = TcpStream::connect(address).context("connect")?;
        pingpong::flow(&mut stream, bytes)
    });
    let (mut from, _) = listener.accept().context("accept")?;
    let mut to = pingpong::connect(cid, pingpong::PORT)?;
    let began = Instant::now();
    let (mut answers, mut back) = (to.try_clone().context("clone")?, from.try_clone().context("clone")?);
    let answered = std::thread::spawn(move || {
        let mut answer = [0];
        answers.read_exact(&mut answer)?;
        back.write_all(&answer)
    });
    match moves {
        Moves::Copied => copied(&mut from, &mut to, size)?,
        Moves::Spliced => spliced(&from, &to, size)?,
    }
    let joined = |_| "a thread of the relay failed".to_owned();
    answered.join().map_err(joined)?.context("the answer")?;
    client.join().map_err(joined)??;
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

fn copied(from: &mut TcpStream, to: &mut VsockStream, size: usize) -> Result<()> {
    let mut buffer = vec![0; size];
    loop {
        let n = from.read(&mut buffer).context("read")?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n]).context("write")?;
    }
}

fn spliced(from: &TcpStream, to: &VsockStream, size: usize) -> Result<()> {
    let (end, beginning) = pipe().context("pipe")?;
    loop {
        let mut there =
            splice(from, None, &beginning, None, size, SpliceFFlags::SPLICE_F_MOVE).context("splice in")?;
        if there == 0 {
            return Ok(());
        }
        while there > 0 {
            there -=
                splice(&end, None, to, None, there, SpliceFFlags::SPLICE_F_MOVE).context("splice out")?;
        }
    }
}
