//! What scenarios ask of a workload that reads and writes handover memory without a mapping.

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::uio::{pread, preadv, pwrite, pwritev};

use super::handover::{lock, number, opened};
use super::shared::{Memory, Selected};
use super::tool::pattern;
use crate::{Context, Result};

const MIB: usize = 1 << 20;
/// Whole windows are copied in such pieces, which begin and end anywhere in a page.
const PIECE: usize = MIB + 4093;
/// Where a piece is cut in two for vectored calls.
const CUT: usize = 70_001;

struct Window {
    selected: Selected,
    size: usize,
}

static WINDOWS: Mutex<Option<HashMap<u64, Arc<Window>>>> = Mutex::new(None);
static BUSY: Mutex<Vec<JoinHandle<String>>> = Mutex::new(Vec::new());

fn window(key: &str) -> Result<Arc<Window>> {
    let key = number(key)?;
    let all = lock(&WINDOWS);
    all.as_ref().and_then(|all| all.get(&key).cloned()).ok_or_else(|| format!("window {key} is not open"))
}

/// Do what one line asks for; it blocks.
pub fn answer(words: &[&str]) -> Result<String> {
    match words {
        ["open", key] => open(key),
        ["keys"] => Ok(format!("{:?}", Selected::keys().context("keys")?)),
        ["put", key, seed] => put(key, seed),
        ["check", key, seed] => check(key, seed),
        ["read", key] => window(key).map(|w| told(pread(w.selected.file(), &mut [0; 8], 0))),
        ["write", key] => window(key).map(|w| told(pwrite(w.selected.file(), &[7; 8], 0))),
        ["ends", key] => ends(key),
        ["from", key, region] => {
            let (w, region) = (window(key)?, opened(number(region)?)?);
            Ok(told(w.selected.write_from(0, &region.memory, w.size)))
        }
        ["into", key, region] => {
            let (w, region) = (window(key)?, opened(number(region)?)?);
            Ok(told(w.selected.read_into(0, &region.memory, w.size)))
        }
        ["same", key, region] => same(key, region),
        ["busy", key] => busy(key, None),
        ["busy", key, region] => busy(key, Some(number(region)?)),
        ["ended"] => ended(),
        other => Err(format!("unknown request {other:?}")),
    }
}

fn open(key: &str) -> Result<String> {
    let key = number(key)?;
    let (selected, state) = Selected::open(key).context("select")?;
    let window = Window { selected, size: state.size as usize };
    lock(&WINDOWS).get_or_insert_default().insert(key, Arc::new(window));
    Ok(format!("{} {} {}", state.size, state.writer, state.writable))
}

fn told(done: std::result::Result<usize, Errno>) -> String {
    match done {
        Ok(n) => n.to_string(),
        Err(e) => format!("{e:?}"),
    }
}

fn put(key: &str, seed: &str) -> Result<String> {
    let (w, seed): (_, u64) = (window(key)?, number(seed)?);
    let mut buf = vec![0; PIECE];
    let mut at = 0;
    while at < w.size {
        let buf = &mut buf[..PIECE.min(w.size - at)];
        pattern(buf, at as u64 + seed);
        let (a, b) = buf.split_at(CUT.min(buf.len()));
        at +=
            pwritev(w.selected.file(), &[IoSlice::new(a), IoSlice::new(b)], at as i64).context("pwritev")?;
    }
    Ok(at.to_string())
}

/// The number of wrong bytes.
fn check(key: &str, seed: &str) -> Result<String> {
    let (w, seed): (_, u64) = (window(key)?, number(seed)?);
    let (mut buf, mut want) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut at, mut bad) = (0, 0);
    while at < w.size {
        let (a, b) = buf.split_at_mut(CUT);
        let mut parts = [IoSliceMut::new(a), IoSliceMut::new(b)];
        let n = preadv(w.selected.file(), &mut parts, at as i64).context("preadv")?;
        if n == 0 {
            return Err(format!("it ends at {at}"));
        }
        pattern(&mut want[..n], at as u64 + seed);
        bad += buf[..n].iter().zip(&want).filter(|(a, b)| a != b).count();
        at += n;
    }
    Ok(bad.to_string())
}

/// Positions at and behind the end, the file position, and a file without a region, as counts and error names.
fn ends(key: &str) -> Result<String> {
    let key: u64 = number(key)?;
    let (s, state) = Selected::open(key).context("select")?;
    let size = state.size as i64;
    let none = Selected::none().context("open")?;
    let (file, unselected) = (s.file(), none.file());
    let mut buf = [1; 10];
    let seek = |mut file: &std::fs::File, to| {
        file.seek(to).map(|at| at as usize).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
    };
    let answers = [
        told(pread(file, &mut buf, size)),
        told(pread(file, &mut buf, i64::MAX - 10)),
        told(pwrite(file, &buf, size)),
        told(pwrite(file, &buf, i64::MAX - 10)),
        told(pwrite(file, &buf, size - 3)),
        told(pread(file, &mut buf, size - 3)),
        told(pread(file, &mut buf, -1)),
        told(seek(file, SeekFrom::End(0)).map(|at| at - size as usize)),
        told(seek(file, SeekFrom::End(1))),
        told(seek(file, SeekFrom::Start(100))),
        told((&*file).write(&[9; 10]).map_err(|_| Errno::EIO)),
        told((&*file).read(&mut buf).map_err(|_| Errno::EIO)),
        told(seek(file, SeekFrom::Current(0))),
        told(pread(unselected, &mut buf, 0)),
        told(pwrite(unselected, &buf, 0)),
        told(seek(unselected, SeekFrom::Start(0))),
    ];
    Ok(answers.join(" "))
}

/// The number of bytes in which the window differs from the beginning of a mapped region.
fn same(key: &str, region: &str) -> Result<String> {
    let (w, region) = (window(key)?, opened(number(region)?)?);
    let (mut a, mut b) = (vec![0; MIB], vec![0; MIB]);
    let mut bad = 0;
    for at in (0..w.size).step_by(MIB) {
        let n = pread(w.selected.file(), &mut a, at as i64).context("pread")?;
        region.memory.read(at, &mut b).context("read")?;
        bad += a.iter().zip(&b).filter(|(a, b)| a != b).count() + (MIB - n);
    }
    Ok(bad.to_string())
}

/// Write all the time, until that fails, from a buffer or from a mapped region; answer when it has begun.
fn busy(key: &str, region: Option<u64>) -> Result<String> {
    let w = window(key)?;
    let region = region.map(opened).transpose()?;
    let buf = vec![3; MIB];
    let once = move || match &region {
        Some(region) => write_all(&w, &region.memory),
        None => {
            (0..w.size).step_by(MIB).try_for_each(|at| pwrite(w.selected.file(), &buf, at as i64).map(drop))
        }
    };
    once().context("the first time")?;
    let thread = move || {
        for n in 1u64.. {
            if let Err(e) = once() {
                println!("workload: {e} after {n} whole windows");
                return format!("{e:?}");
            }
        }
        String::new()
    };
    lock(&BUSY).push(std::thread::spawn(thread));
    Ok("busy".into())
}

fn write_all(w: &Window, from: &Memory) -> std::result::Result<(), Errno> {
    w.selected.write_from(0, from, w.size).map(drop)
}

/// How each of the busy ones ended.
fn ended() -> Result<String> {
    let all = std::mem::take(&mut *lock(&BUSY));
    let how = all.into_iter().map(|t| t.join().map_err(|_| "a busy writer failed".to_string()));
    Ok(how.collect::<Result<Vec<String>>>()?.join(" "))
}
