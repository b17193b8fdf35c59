//! Memory for instances: found, handed to the module, and given back.

use std::path::Path;

use nix::errno::Errno;

use super::abi::{self, request};
use super::layout::REGION_ALIGN;
use super::{Inner, MEMORY_BLOCKS, PoolSource, handover, view};
use crate::{CpuState, MemoryRange, PlatformError};

/// Smaller reservations are for other uses.
const SMALLEST: u64 = 64 << 20;

/// Make the pool what the configuration asks for. Ranges the module has already (from a daemon
/// before this one) stay. Returns the memory blocks taken offline.
pub(super) fn set_up(inner: &Inner) -> Result<Vec<MemoryRange>, PlatformError> {
    let have: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    let mut offlined = Vec::new();
    let wanted = match &inner.config.pool {
        PoolSource::Reserved(ranges) => ranges.clone(),
        PoolSource::CommandLine => {
            let line = std::fs::read_to_string("/proc/cmdline")
                .map_err(|e| PlatformError::os("read /proc/cmdline", e))?;
            let found = reservations(&line);
            if found.is_empty() && have.is_empty() {
                return Err(PlatformError::Unavailable(
                    "there is no memory for instances: boot the primary kernel with memmap=<size>$<base> (at least 64 MiB), \
                     or set pool.offline in the configuration"
                        .into(),
                ));
            }
            found
        }
        PoolSource::Offline(bytes) => {
            let owned: u64 = view::pool(inner)?.iter().filter(|p| p.source == 2).map(|p| p.size).sum();
            if owned < *bytes {
                offlined = take_offline(Path::new(MEMORY_BLOCKS), *bytes - owned)?;
            }
            offlined.clone()
        }
    };
    for range in wanted.iter().filter(|w| !have.iter().any(|h| h.base <= w.base && w.end() <= h.end())) {
        let mut p: abi::Pool = request();
        (p.base, p.size) = (range.base, range.size);
        if let Err(e) = inner.device.pool_add(&mut p) {
            put_online(Path::new(MEMORY_BLOCKS), &offlined);
            let why = match e {
                Errno::EBUSY => format!(
                    "the page at {:#x} is in use by the primary kernel; reserve the range with memmap={}M${:#x}",
                    p.bad_address,
                    range.size >> 20,
                    range.base
                ),
                e => e.to_string(),
            };
            return Err(PlatformError::Unavailable(format!(
                "memory {:#x}+{:#x} cannot be used for instances: {why}",
                range.base, range.size
            )));
        }
    }
    Ok(offlined)
}

/// `memmap=512M$0x40000000` words of a command line, large ones only.
fn reservations(line: &str) -> Vec<MemoryRange> {
    line.split_ascii_whitespace()
        .filter_map(|w| w.strip_prefix("memmap="))
        .flat_map(|w| w.split(','))
        .filter_map(|w| {
            let (size, base) = w.split_once('$')?;
            let (size, base) = (number(size)?, number(base)?);
            let start = base.checked_next_multiple_of(REGION_ALIGN)?;
            let size = size.checked_sub(start - base)? & !0xfff;
            (size >= SMALLEST).then_some(MemoryRange { base: start, size })
        })
        .collect()
}

/// A number as the kernel's memparse() reads it.
fn number(text: &str) -> Option<u64> {
    let shift = match text.as_bytes().last()? {
        b'k' | b'K' => 10,
        b'm' | b'M' => 20,
        b'g' | b'G' => 30,
        b't' | b'T' => 40,
        _ => 0,
    };
    let digits = if shift > 0 { &text[..text.len() - 1] } else { text };
    let n = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    n.checked_mul(1 << shift)
}

fn block_size(root: &Path) -> Result<u64, PlatformError> {
    let path = root.join("block_size_bytes");
    let text = std::fs::read_to_string(&path).map_err(|e| {
        PlatformError::Unavailable(format!("this kernel has no memory hot-unplug ({}: {e})", path.display()))
    })?;
    u64::from_str_radix(text.trim(), 16).map_err(|e| PlatformError::os(format!("read {}", path.display()), e))
}

/// Take `bytes` of movable memory offline, one contiguous run, from the top down.
fn take_offline(root: &Path, bytes: u64) -> Result<Vec<MemoryRange>, PlatformError> {
    let block = block_size(root)?;
    let need = bytes.div_ceil(block);
    let mut movable: Vec<u64> = Vec::new();
    for entry in std::fs::read_dir(root).map_err(|e| PlatformError::os("list memory blocks", e))? {
        let name = entry.map_err(|e| PlatformError::os("list memory blocks", e))?.file_name();
        let Some(n) = name.to_str().and_then(|n| n.strip_prefix("memory")).and_then(|n| n.parse().ok())
        else {
            continue;
        };
        let read =
            |file: &str| std::fs::read_to_string(root.join(format!("memory{n}/{file}"))).unwrap_or_default();
        if read("state").trim() == "online"
            && read("valid_zones").split_whitespace().next() == Some("Movable")
        {
            movable.push(n);
        }
    }
    movable.sort_unstable();
    let contiguous = |w: &&[u64]| w.windows(2).all(|p| p[0] + 1 == p[1]);
    let mut last = None;
    // A block can be refused (it has holes, or a page that cannot be moved): then the next run is tried.
    for run in movable.windows(need as usize).rev().filter(contiguous) {
        match offline_run(root, block, run) {
            // One range: regions may then span blocks.
            Ok(()) => return Ok(vec![MemoryRange { base: run[0] * block, size: need * block }]),
            Err(e) => last = Some(e),
        }
    }
    Err(match last {
        Some(why) => {
            PlatformError::Busy(format!("{} MiB of memory cannot be taken offline: {why}", bytes >> 20))
        }
        None => PlatformError::Unavailable(format!(
            "{} MiB of contiguous movable memory are needed for instances and {} blocks of {} MiB are movable; boot the \
             primary kernel with movablecore={}M or more",
            bytes >> 20,
            movable.len(),
            block >> 20,
            (need + 2) * (block >> 20)
        )),
    })
}

/// Take all blocks of a run offline, or none.
fn offline_run(root: &Path, block: u64, run: &[u64]) -> Result<(), String> {
    for (done, n) in run.iter().enumerate() {
        if let Err(e) = std::fs::write(root.join(format!("memory{n}/state")), "offline") {
            put_online(root, &[MemoryRange { base: run[0] * block, size: done as u64 * block }]);
            return Err(format!("block {n} ({:#x}): {e}", n * block));
        }
    }
    Ok(())
}

fn put_online(root: &Path, ranges: &[MemoryRange]) {
    let Ok(block) = block_size(root) else { return };
    for range in ranges {
        for n in range.base / block..range.end().div_ceil(block) {
            if let Err(error) = std::fs::write(root.join(format!("memory{n}/state")), "online_movable") {
                tracing::error!(block = n, %error, "memory block could not be brought back online");
            }
        }
    }
}

/// Everything back to the primary: CPUs online, pool dissolved, memory blocks online.
pub(super) fn release(inner: &Inner) -> Result<(), PlatformError> {
    let mut first = Ok(());
    // What cannot be given back keeps nothing else.
    let mut done = |result: Result<(), PlatformError>| {
        if let Err(error) = &result {
            tracing::error!(%error, "the primary does not get everything back");
        }
        let well = result.is_ok();
        first = std::mem::replace(&mut first, Ok(())).and(result);
        well
    };
    for cpu in view::cpus(inner)?.iter().filter(|c| c.state == CpuState::Pool) {
        let mut c: abi::Cpu = request();
        c.apicid = cpu.apic_id;
        let given = inner.device.cpu_give(&mut c);
        done(
            given.map_err(|e| PlatformError::os(format!("give CPU {} back to the primary", cpu.apic_id), e)),
        );
    }
    for region in handover::list(inner)? {
        done(handover::destroy(inner, region.key));
    }
    for range in view::pool(inner)? {
        let mut p: abi::Pool = request();
        (p.base, p.size) = (range.base, range.size);
        let removed = inner.device.pool_remove(&mut p).map_err(|e| {
            PlatformError::os(format!("take memory {:#x}+{:#x} out of the pool", range.base, range.size), e)
        });
        if done(removed) && range.source == 2 {
            put_online(Path::new(MEMORY_BLOCKS), &[MemoryRange { base: range.base, size: range.size }]);
        }
    }
    inner.state().offlined.clear();
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_large_reservations_only() {
        let line = "console=ttyS0 memmap=512M$0x40000000 memmap=448K$64K quiet memmap=1G!4G memmap=128M$0x100100000,64M$1G";
        assert_eq!(
            reservations(line),
            [
                MemoryRange { base: 0x4000_0000, size: 512 << 20 },
                MemoryRange { base: 0x1_0020_0000, size: 127 << 20 },
                MemoryRange { base: 1 << 30, size: 64 << 20 }
            ]
        );
        assert_eq!(reservations("memmap=$ memmap=x$y memmap=99999999999999999999G$1"), []);
    }

    fn blocks(dir: &Path, states: &[(u64, &str, &str)]) {
        std::fs::write(dir.join("block_size_bytes"), "8000000\n").unwrap();
        for (n, state, zones) in states {
            let d = dir.join(format!("memory{n}"));
            std::fs::create_dir(&d).unwrap();
            std::fs::write(d.join("state"), state).unwrap();
            std::fs::write(d.join("valid_zones"), zones).unwrap();
        }
    }

    #[test]
    fn takes_the_topmost_contiguous_movable_run() {
        let d = tempfile::tempdir().unwrap();
        blocks(
            d.path(),
            &[
                (7, "online", "Movable"),
                (8, "online", "Movable"),
                (9, "online", "Normal"),
                (10, "online", "Movable"),
                (11, "online", "Movable"),
                (12, "offline", "Movable"),
            ],
        );
        let got = take_offline(d.path(), 200 << 20).unwrap();
        assert_eq!(got, [MemoryRange { base: 10 * 0x800_0000, size: 2 * 0x800_0000 }]);
        let state = |n: u64| std::fs::read_to_string(d.path().join(format!("memory{n}/state"))).unwrap();
        assert_eq!((state(10), state(11), state(8)), ("offline".into(), "offline".into(), "online".into()));
        put_online(d.path(), &got);
        assert_eq!(state(11), "online_movable");
        // A block whose state cannot be written counts as refused; the run below it is taken.
        std::fs::write(d.path().join("memory11/state"), "online").unwrap();
        std::fs::write(d.path().join("memory10/state"), "online").unwrap();
        std::fs::remove_file(d.path().join("memory11/state")).unwrap();
        std::fs::create_dir(d.path().join("memory11/state")).unwrap();
        assert!(take_offline(d.path(), 128 << 20).unwrap()[0].base < 11 * 0x800_0000);
        let text = take_offline(d.path(), 600 << 20).unwrap_err().to_string();
        assert!(text.contains("movablecore="), "{text}");
    }
}
