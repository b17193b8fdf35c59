//! What scenarios ask of a workload that uses handover memory.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::poll::PollFlags;
use nix::sys::mman::MapFlags;
use tokio::time::Instant;

use super::shared::{Memory, PAGE, Selected};
use super::tool::pattern;
use super::window;
use crate::{Context, Result};

const CHUNK: usize = 64 << 10;
const LIMIT: Duration = Duration::from_secs(20);
const MEMTYPES: &str = "/sys/kernel/debug/x86/pat_memtype_list";

/// A region this workload has mapped.
pub(super) struct Open {
    selected: Selected,
    pub(super) memory: Memory,
    writer: Mutex<Option<Child>>,
    /// How often the contender has written to every page as the writer.
    held: Mutex<u64>,
    news: Condvar,
}

static OPEN: Mutex<Option<HashMap<u64, Arc<Open>>>> = Mutex::new(None);

pub(super) fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn number(word: &str) -> Result<u64> {
    word.parse().context("a number")
}

pub(super) fn opened(key: u64) -> Result<Arc<Open>> {
    lock(&OPEN).as_ref().and_then(|all| all.get(&key).cloned()).ok_or_else(|| format!("{key} is not open"))
}

/// Do what one line asks for; it blocks.
pub fn answer(words: &[String]) -> String {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["open", key] => open(key),
        ["refused", key] => refused(key),
        ["fill", key, seed] => fill(key, seed),
        ["check", key, seed] => check(key, seed),
        ["read", key] => read(key),
        ["futex", key] => futex(key),
        ["write", key] => write(key),
        ["poke", key] => child(key, "once").and_then(|mut c| c.wait().context("wait")).map(ended),
        ["died", key] => died(key),
        ["await", key, writable] => await_writable(key, *writable == "writable"),
        ["contend", key] => contend(key),
        ["held", key, times] => held(key, times),
        ["memtype", base, size] => memtype(base, size),
        ["copies", how] => copies(how),
        ["window", words @ ..] => window::answer(words),
        other => Err(format!("unknown request {other:?}")),
    };
    done.unwrap_or_else(|e| format!("error: {e}"))
}

fn open(key: &str) -> Result<String> {
    let key = number(key)?;
    let (selected, state) = Selected::open(key).context("select")?;
    let memory = selected.map(0, state.size as usize, MapFlags::MAP_SHARED).context("map")?;
    let open =
        Open { selected, memory, writer: Mutex::default(), held: Mutex::default(), news: Condvar::new() };
    lock(&OPEN).get_or_insert_default().insert(key, Arc::new(open));
    Ok(format!("{} {} {}", state.size, state.writer, state.writable))
}

/// What the device must not allow, as error names.
fn refused(key: &str) -> Result<String> {
    let key = number(key)?;
    let name = |r: std::result::Result<(), nix::errno::Errno>| match r {
        Ok(()) => "ok".to_string(),
        Err(e) => format!("{e:?}"),
    };
    let (s, state) = Selected::open(key).context("select")?;
    let size = state.size as usize;
    let tries = [
        name(Selected::open(key ^ 1).map(drop)),
        name(s.select(key).map(drop)),
        name(s.map(0, 4096, MapFlags::MAP_SHARED).map(drop)),
        name(s.map(4096, PAGE, MapFlags::MAP_SHARED).map(drop)),
        name(s.map(0, size + PAGE, MapFlags::MAP_SHARED).map(drop)),
        name(s.map(0, PAGE, MapFlags::MAP_PRIVATE).map(drop)),
        name(s.map(size as i64 - PAGE as i64, PAGE, MapFlags::MAP_SHARED).map(drop)),
    ];
    Ok(tries.join(" "))
}

fn fill(key: &str, seed: &str) -> Result<String> {
    let (open, seed) = (opened(number(key)?)?, number(seed)?);
    let mut buf = vec![0; CHUNK];
    for at in (0..open.memory.len()).step_by(CHUNK) {
        pattern(&mut buf, at as u64 + seed);
        open.memory.write(at, &buf).context("write")?;
    }
    Ok("filled".into())
}

/// The number of wrong bytes. The first piece of every page is left to who writes words there.
fn check(key: &str, seed: &str) -> Result<String> {
    let (open, seed) = (opened(number(key)?)?, number(seed)?);
    let (mut buf, mut want) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut bad = 0;
    for at in (0..open.memory.len()).step_by(CHUNK).filter(|at| !at.is_multiple_of(PAGE)) {
        open.memory.read(at, &mut buf).context("read")?;
        pattern(&mut want, at as u64 + seed);
        bad += buf.iter().zip(&want).filter(|(a, b)| a != b).count();
    }
    Ok(bad.to_string())
}

/// Have the kernel read the first word, which fails where a direct read would end this process.
fn read(key: &str) -> Result<String> {
    opened(number(key)?)?.memory.probe().map(|()| "read".into()).context("read")
}

/// How a futex there answers that processes could share.
fn futex(key: &str) -> Result<String> {
    let tried = opened(number(key)?)?.memory.shared_futex();
    Ok(tried.map_or_else(|e| format!("{e:?}"), |()| "waited".into()))
}

fn child(key: &str, how: &str) -> Result<Child> {
    Command::new("/kmorph-qemu").args(["poke", key, how]).stdout(Stdio::piped()).spawn().context("spawn")
}

fn ended(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit {}", status.code().unwrap_or(-1)),
    }
}

/// Start a process that writes all the time; answer when it has.
fn write(key: &str) -> Result<String> {
    let open = opened(number(key)?)?;
    let mut child = child(key, "for-ever")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line).context("first write")?;
    *lock(&open.writer) = Some(child);
    Ok(line.trim().into())
}

fn died(key: &str) -> Result<String> {
    let open = opened(number(key)?)?;
    let mut child = lock(&open.writer).take().ok_or("nobody writes")?;
    child.wait().context("wait").map(ended)
}

/// (a process of its own) store to the region: once, or until something ends it.
pub fn poke(key: u64, how: &str) -> Result<()> {
    let (selected, state) = Selected::open(key).context("select")?;
    let memory = selected.map(0, state.size as usize, MapFlags::MAP_SHARED).context("map")?;
    for n in 0u64.. {
        for page in (0..memory.len()).step_by(PAGE) {
            memory.store(page, n).context("store")?;
            if how == "once" {
                return Ok(());
            }
        }
        if n == 0 {
            println!("writing");
        }
    }
    Ok(())
}

fn await_writable(key: &str, want: bool) -> Result<String> {
    let open = opened(number(key)?)?;
    let until = Instant::now() + LIMIT;
    loop {
        let state = open.selected.state().context("state")?;
        if (state.writable == 1) == want {
            return Ok(format!("{} {}", state.writer, state.writable));
        }
        if Instant::now() > until {
            return Err(format!("the writer is {} still", state.writer));
        }
        open.selected.sleep(1000).context("poll")?;
    }
}

/// Write to every page each time this kernel becomes the writer, until the region is withdrawn.
fn contend(key: &str) -> Result<String> {
    let open = opened(number(key)?)?;
    std::thread::spawn(move || {
        while let Ok(state) = open.selected.state() {
            let touch = |page| open.memory.write(page, &state.changes.to_le_bytes());
            let all = || (0..open.memory.len()).step_by(PAGE).try_for_each(touch);
            if state.writable == 1 && all().is_ok() {
                *lock(&open.held) += 1;
                open.news.notify_all();
            }
            if !open.selected.sleep(1000).is_ok_and(|e| !e.contains(PollFlags::POLLHUP)) {
                return;
            }
        }
    });
    Ok("contending".into())
}

fn held(key: &str, times: &str) -> Result<String> {
    let (open, times) = (opened(number(key)?)?, number(times)?);
    let held = lock(&open.held);
    let (held, late) = open
        .news
        .wait_timeout_while(held, LIMIT, |held| *held < times)
        .map_err(|_| "the contender failed".to_string())?;
    if late.timed_out() { Err(format!("held {} times only", *held)) } else { Ok(held.to_string()) }
}

/// MiB a second, copying all of the instance's region there (`in`) or from there (`out`) once, all memory being there.
fn copies(how: &str) -> Result<String> {
    let key = Selected::keys().context("keys")?.first().copied().ok_or("no region")?;
    let (selected, state) = Selected::open(key).context("select")?;
    let memory = selected.map(0, state.size as usize, MapFlags::MAP_SHARED).context("map")?;
    let mut own: Vec<u8> = (0..memory.len()).map(|n| n as u8).collect();
    let mut copy = || match how {
        "in" => memory.copy(0, std::hint::black_box(&own)),
        _ => memory.read(0, std::hint::black_box(&mut own)),
    };
    copy().context("copy")?;
    let began = Instant::now();
    copy().context("copy")?;
    Ok(format!("{}", (memory.len() >> 20) as f64 / began.elapsed().as_secs_f64()))
}

/// What the kernel has noted as the memory type of the range.
fn memtype(base: &str, size: &str) -> Result<String> {
    let (base, size) = (number(base)?, number(size)?);
    // EBUSY: it is there already.
    let _ = mount(Some("debugfs"), "/sys/kernel/debug", Some("debugfs"), MsFlags::empty(), None::<&str>);
    let text = std::fs::read_to_string(MEMTYPES).context(MEMTYPES)?;
    let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    for line in text.lines() {
        let Some((range, kind)) = line.split_once("[mem ").and_then(|(_, r)| r.split_once(']')) else {
            continue;
        };
        let Some((first, last)) = range.split_once('-') else { continue };
        if let (Some(first), Some(last)) = (hex(first), hex(last))
            && first <= base
            && base + size - 1 <= last
        {
            return Ok(kind.trim().into());
        }
    }
    Err(format!("no entry for {base:#x}+{size:#x} in: {}", text.replace('\n', "; ")))
}
