//! Reads another kernel's log out of its memory, alive or dead.
//!
//! The way is the one crash tools take: VMCOREINFO names the printk ring buffer and the layout of
//! its parts (Documentation/admin-guide/kdump/vmcoreinfo.rst; kernel/printk/printk_ringbuffer.h).
//! Everything read is checked: the kernel may be running, dying, or never have come this far.

use std::collections::HashMap;

use memchr::memmem;
use tokio::time::Instant;

use crate::{ConsoleLog, ConsoleRecord};

/// Physical memory of one instance.
pub trait PhysMemory {
    /// Where it lies.
    fn range(&self) -> crate::MemoryRange;
    /// Copy bytes out; `None` when any byte is outside.
    fn read(&self, phys: u64, buf: &mut [u8]) -> Option<()>;
}

/// Memory that nobody reads for longer than that: how much there is to look through is the dead kernel's to say.
pub struct InTime<'a> {
    /// The memory.
    pub memory: &'a dyn PhysMemory,
    /// From then on it has nothing.
    pub until: Instant,
}

impl InTime<'_> {
    /// Whether the time is over.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }
}

impl PhysMemory for InTime<'_> {
    fn range(&self) -> crate::MemoryRange {
        self.memory.range()
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Option<()> {
        if self.is_over() { None } else { self.memory.read(phys, buf) }
    }
}

const PAGE: u64 = 4096;
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000; // __START_KERNEL_map on x86-64
/// More descriptors than any sane log has.
const MAX_COUNT_BITS: u64 = 20;
const MAX_SIZE_BITS: u64 = 28;
/// Longest text taken of one record.
const MAX_TEXT: usize = 1024;
/// Descriptor states (two top bits of state_var).
const DESC_COMMITTED: u64 = 1;
const DESC_FINALIZED: u64 = 2;

/// The VMCOREINFO note of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmcoreInfo {
    fields: HashMap<String, String>,
}

impl VmcoreInfo {
    /// Parse the note's text.
    pub fn parse(bytes: &[u8]) -> Option<VmcoreInfo> {
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        let text = std::str::from_utf8(&bytes[..end]).ok()?;
        let fields: HashMap<String, String> =
            text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect();
        fields.get("OSRELEASE").is_some_and(|r| !r.contains('%')).then_some(VmcoreInfo { fields })
    }

    /// Find the note: it fills a page of its own from the start.
    pub fn find(memory: &dyn PhysMemory) -> Option<VmcoreInfo> {
        let range = memory.range();
        let mut page = vec![0u8; PAGE as usize];
        let mut start = [0u8; 10];
        let mut at = range.base.next_multiple_of(PAGE);
        while at + PAGE <= range.end() {
            memory.read(at, &mut start)?;
            if &start == b"OSRELEASE=" {
                memory.read(at, &mut page)?;
                // The template in the kernel image starts the same way but has no address of prb.
                if let Some(info) = VmcoreInfo::parse(&page)
                    && info.symbol("prb").is_some()
                {
                    return Some(info);
                }
            }
            at += PAGE;
        }
        None
    }

    fn hex(&self, key: String) -> Option<u64> {
        u64::from_str_radix(self.fields.get(&key)?, 16).ok()
    }

    fn decimal(&self, key: String) -> Option<u64> {
        self.fields.get(&key)?.parse().ok()
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        self.hex(format!("SYMBOL({name})"))
    }

    fn offset(&self, name: &str) -> Option<u64> {
        self.decimal(format!("OFFSET({name})")).filter(|o| *o < 4096)
    }

    fn size(&self, name: &str) -> Option<u64> {
        self.decimal(format!("SIZE({name})")).filter(|s| (1..4096).contains(s))
    }

    /// Physical address of something in the kernel image.
    fn phys(&self, virt: u64) -> Option<u64> {
        let base = self.fields.get("NUMBER(phys_base)")?.parse::<i64>().ok()?;
        Some(virt.checked_sub(KERNEL_MAP)?.wrapping_add(base as u64))
    }
}

struct Reader<'a> {
    memory: &'a dyn PhysMemory,
    info: &'a VmcoreInfo,
}

impl Reader<'_> {
    fn u32(&self, phys: u64) -> Option<u32> {
        let mut b = [0; 4];
        self.memory.read(phys, &mut b)?;
        Some(u32::from_le_bytes(b))
    }

    fn u64(&self, phys: u64) -> Option<u64> {
        let mut b = [0; 8];
        self.memory.read(phys, &mut b)?;
        Some(u64::from_le_bytes(b))
    }

    fn pointer(&self, phys: u64) -> Option<u64> {
        self.info.phys(self.u64(phys)?)
    }
}

/// The parts of one kernel's ring buffer.
struct Ring {
    descs: u64,
    infos: u64,
    count_mask: u64,
    head_id: u64,
    tail_id: u64,
    data: u64,
    size_mask: u64,
    desc_size: u64,
    info_size: u64,
    state_var: u64,
    blk_begin: u64,
    blk_next: u64,
}

const ID_MASK: u64 = u64::MAX >> 2;

fn open(r: &Reader<'_>) -> Option<Ring> {
    let i = r.info;
    let prb = r.pointer(i.phys(i.symbol("prb")?)?)?;
    let desc_ring = prb + i.offset("printk_ringbuffer.desc_ring")?;
    let data_ring = prb + i.offset("printk_ringbuffer.text_data_ring")?;
    let count_bits = u64::from(r.u32(desc_ring + i.offset("prb_desc_ring.count_bits")?)?);
    let size_bits = u64::from(r.u32(data_ring + i.offset("prb_data_ring.size_bits")?)?);
    if !(1..=MAX_COUNT_BITS).contains(&count_bits) || !(1..=MAX_SIZE_BITS).contains(&size_bits) {
        return None;
    }
    let counter = i.offset("atomic_long_t.counter")?;
    let lpos = i.offset("prb_desc.text_blk_lpos")?;
    Some(Ring {
        descs: r.pointer(desc_ring + i.offset("prb_desc_ring.descs")?)?,
        infos: r.pointer(desc_ring + i.offset("prb_desc_ring.infos")?)?,
        count_mask: (1 << count_bits) - 1,
        head_id: r.u64(desc_ring + i.offset("prb_desc_ring.head_id")? + counter)?,
        tail_id: r.u64(desc_ring + i.offset("prb_desc_ring.tail_id")? + counter)?,
        data: r.pointer(data_ring + i.offset("prb_data_ring.data")?)?,
        size_mask: (1 << size_bits) - 1,
        desc_size: i.size("prb_desc")?,
        info_size: i.size("printk_info")?,
        state_var: i.offset("prb_desc.state_var")? + counter,
        blk_begin: lpos + i.offset("prb_data_blk_lpos.begin")?,
        blk_next: lpos + i.offset("prb_data_blk_lpos.next")?,
    })
}

fn record(r: &Reader<'_>, ring: &Ring, id: u64) -> Option<ConsoleRecord> {
    let index = id & ring.count_mask;
    let desc = ring.descs + index * ring.desc_size;
    let state = r.u64(desc + ring.state_var)?;
    if state & ID_MASK != id || !matches!(state >> 62, DESC_COMMITTED | DESC_FINALIZED) {
        return None;
    }
    let info = ring.infos + index * ring.info_size;
    let i = r.info;
    let seq = r.u64(info + i.offset("printk_info.seq")?)?;
    let ts_ns = r.u64(info + i.offset("printk_info.ts_nsec")?)?;
    let len_at = i.offset("printk_info.text_len")?;
    let text_len = usize::from(r.u32(info + len_at)? as u16);
    // text_len (u16) is followed by facility (u8) and a byte of flags:5, level:3.
    let level = (r.u32(info + len_at)? >> 29) as u8;
    let (begin, next) = (r.u64(desc + ring.blk_begin)?, r.u64(desc + ring.blk_next)?);
    let text = block(r, ring, begin, next, text_len.min(MAX_TEXT)).unwrap_or_default();
    // The descriptor may have been reused while it was read.
    (r.u64(desc + ring.state_var)? & ID_MASK == id).then_some(())?;
    let text = String::from_utf8_lossy(&text).trim_end_matches('\n').to_string();
    Some(ConsoleRecord { seq, ts_ns, level, text })
}

/// The text of a data block; `None` for a record without text.
fn block(r: &Reader<'_>, ring: &Ring, begin: u64, next: u64, len: usize) -> Option<Vec<u8>> {
    const NO_DATA: u64 = 1; // lpos with the lowest bit set: there is no block
    if begin & NO_DATA == NO_DATA && next & NO_DATA == NO_DATA {
        return None;
    }
    let last = next.checked_sub(1)?;
    let (wrap, end) = (!ring.size_mask, (last & ring.size_mask) + 1);
    let start = if begin & wrap == last & wrap && begin < next {
        begin & ring.size_mask
    } else if (begin & wrap).wrapping_add(ring.size_mask + 1) == last & wrap {
        0 // a block that does not fit before the end of the ring lies at its start
    } else {
        return None;
    };
    let start = start + 8; // the block begins with its descriptor's id
    let room = usize::try_from(end.checked_sub(start)?).ok()?;
    let mut text = vec![0; len.min(room)];
    r.memory.read(ring.data + start, &mut text)?;
    Some(text)
}

/// Read the log from `from_seq` on.
pub fn read(memory: &dyn PhysMemory, info: &VmcoreInfo, from_seq: u64) -> ConsoleLog {
    let r = Reader { memory, info };
    let Some(ring) = open(&r) else {
        return ConsoleLog {
            next_seq: from_seq,
            note: Some("this kernel's log buffer could not be found by its VMCOREINFO".into()),
            ..Default::default()
        };
    };
    let mut log = ConsoleLog { next_seq: from_seq, ..Default::default() };
    let span = ring.head_id.wrapping_sub(ring.tail_id) & ID_MASK;
    if span > ring.count_mask {
        log.note = Some("the log buffer's head and tail do not fit together; nothing was read".into());
        return log;
    }
    for n in 0..=span {
        let id = ring.tail_id.wrapping_add(n) & ID_MASK;
        if let Some(rec) = record(&r, &ring, id)
            && rec.seq >= log.next_seq
        {
            log.next_seq = rec.seq + 1;
            log.records.push(rec);
        }
    }
    log
}

/// Bytes of log text looked at when only text is left to go by.
const RAW_SPAN: u64 = 256 << 10;
/// Shorter runs of printable characters are chance.
const RAW_LINE: usize = 6;

/// The log of a kernel that died before it described its ring buffer: the text itself, found by the
/// first two lines every kernel logs. Without times, levels and order beyond what lies in memory.
pub fn raw(memory: &dyn PhysMemory) -> Vec<ConsoleRecord> {
    let Some(start) = find_raw(memory) else { return Vec::new() };
    let len = RAW_SPAN.min(memory.range().end().saturating_sub(start));
    let mut bytes = vec![0u8; usize::try_from(len).unwrap_or(0)];
    if memory.read(start, &mut bytes).is_none() {
        return Vec::new();
    }
    let printable = |b: &u8| matches!(b, b' '..=b'~' | b'\t');
    bytes
        .split(|b| !printable(b))
        .filter(|run| run.len() >= RAW_LINE)
        .zip(0..)
        .map(|(run, seq)| ConsoleRecord {
            seq,
            ts_ns: 0,
            level: 6,
            text: String::from_utf8_lossy(run).into_owned(),
        })
        .collect()
}

/// Where "Linux version ..." is followed by "Command line: ...": the log buffer, not the banner in the
/// kernel's read-only data.
fn find_raw(memory: &dyn PhysMemory) -> Option<u64> {
    const FIRST: &[u8] = b"Linux version ";
    const SECOND: &[u8] = b"Command line: ";
    const NEAR: usize = 1024;
    const CHUNK: usize = 1 << 20;
    let range = memory.range();
    let mut at = range.base;
    let mut chunk = vec![0u8; CHUNK];
    while at < range.end() {
        let len = CHUNK.min(usize::try_from(range.end() - at).ok()?);
        memory.read(at, &mut chunk[..len])?;
        let seen = &chunk[..len];
        for n in memmem::find_iter(seen, FIRST) {
            if memmem::find(&seen[n..seen.len().min(n + NEAR)], SECOND).is_some() {
                return Some(at + n as u64);
            }
        }
        // Chunks overlap, so what lies across a border is found too.
        at += len.saturating_sub(NEAR).max(1) as u64;
        if len < CHUNK {
            break;
        }
    }
    None
}

#[cfg(test)]
#[path = "klog_tests.rs"]
mod tests;
