//! Processes: starting them, what they used, ending them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::{Context, Result};

/// Two descriptors for each of 10,000 instances, and room.
const DESCRIPTORS: u64 = 65_536;
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// Have enough descriptors, as root also beyond the hard limit.
pub fn raise_descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, hard.max(DESCRIPTORS))
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .context("raise the limit of descriptors")
}

/// What a process used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// CPU time of all its threads, ended ones included.
    pub cpu: Duration,
    /// Bytes of memory that are its own.
    pub memory: u64,
}

/// A process that tells how it does in lines.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    _input: Option<ChildStdin>,
}

impl Running {
    /// Start a program. Its standard input stays open as long as this is kept.
    pub fn start(program: &Path, args: &[&str], env: &[(&str, &str)], log: &Path) -> Result<Running> {
        let what = program.display().to_string();
        let log = std::fs::File::create(log).context("log")?;
        let mut child = Command::new(program)
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context(&what)?;
        let input = child.stdin.take();
        let out = child.stdout.take().ok_or_else(|| format!("{what}: no output"))?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Running { child, lines, _input: input })
    }

    /// Wait for a line that begins with a word; what follows it.
    pub fn line(&self, word: &str, limit: Duration) -> Result<String> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line =
                self.lines.recv_timeout(left).map_err(|_| format!("no line {word:?} within {limit:?}"))?;
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
        }
    }

    /// The latest line that begins with a word and has come already, after at least one has.
    pub fn latest(&self, word: &str, limit: Duration) -> Result<String> {
        let mut last = self.line(word, limit)?;
        while let Ok(line) = self.lines.try_recv() {
            if let Some(rest) = line.strip_prefix(word) {
                last = rest.trim().to_owned();
            }
        }
        Ok(last)
    }

    /// What it used.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.child.id())
    }

    /// End it and wait for its end.
    pub fn end(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let until = Instant::now() + ENDS_WITHIN;
        while self.child.try_wait().context("wait")?.is_none() {
            if Instant::now() > until {
                self.child.kill().context("kill")?;
                return Err(format!("process {} did not end within {ENDS_WITHIN:?}", self.child.id()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Send it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), signal).context("signal")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After an error nothing is left behind; one that has ended already is fine, too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn usage(pid: u32) -> Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("stat")?;
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |s| s.1).split_ascii_whitespace().collect();
    // utime and stime are fields 14 and 15; the first after the name is 3.
    let ticks: u64 = [11, 12].iter().filter_map(|n| fields.get(*n)?.parse::<u64>().ok()).sum();
    let hz = sysconf(SysconfVar::CLK_TCK).context("clock ticks")?.unwrap_or(100) as u64;
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("smaps_rollup")?;
    let kib: u64 = rollup
        .lines()
        .filter(|l| l.starts_with("Private_"))
        .filter_map(|l| l.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Ok(Usage { cpu: Duration::from_millis(ticks * 1000 / hz), memory: kib << 10 })
}
