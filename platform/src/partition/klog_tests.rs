//! A synthetic kernel log, whole and damaged.

use super::*;
use crate::MemoryRange;
use proptest::prelude::*;

const BASE: u64 = 0x4000_0000;
const SIZE: usize = 0x4_0000;
/// phys_base of the synthetic kernel: virtual KERNEL_MAP is BASE.
const PHYS_BASE: i64 = BASE as i64;

struct Image(Vec<u8>);

impl PhysMemory for Image {
    fn range(&self) -> MemoryRange {
        MemoryRange { base: BASE, size: self.0.len() as u64 }
    }
    fn read(&self, phys: u64, buf: &mut [u8]) -> Option<()> {
        let at = usize::try_from(phys.checked_sub(BASE)?).ok()?;
        buf.copy_from_slice(self.0.get(at..at.checked_add(buf.len())?)?);
        Some(())
    }
}

impl Image {
    fn put64(&mut self, at: usize, v: u64) {
        self.0[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
    fn put32(&mut self, at: usize, v: u32) {
        self.0[at..at + 4].copy_from_slice(&v.to_le_bytes());
    }
}

const PRB: usize = 0x3000;
const DESCS: usize = 0x4000;
const INFOS: usize = 0x8000;
const DATA: usize = 0x1_0000;
const COUNT_BITS: u32 = 3;
const SIZE_BITS: u32 = 8;

fn virt(at: usize) -> u64 {
    KERNEL_MAP + at as u64
}

/// Writes records the way printk does: descriptors and data wrap around.
fn image(texts: &[&str]) -> Image {
    let mut m = Image(vec![0; SIZE]);
    let note = format!(
        "OSRELEASE=6.1.0-test\nNUMBER(phys_base)={PHYS_BASE}\nSYMBOL(prb)={:x}\n\
         OFFSET(printk_ringbuffer.desc_ring)=0\nOFFSET(printk_ringbuffer.text_data_ring)=48\n\
         OFFSET(prb_desc_ring.count_bits)=0\nOFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\n\
         OFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\n\
         OFFSET(prb_desc.state_var)=0\nOFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\n\
         OFFSET(prb_data_blk_lpos.next)=8\nSIZE(printk_info)=88\nOFFSET(printk_info.seq)=0\n\
         OFFSET(printk_info.ts_nsec)=8\nOFFSET(printk_info.text_len)=16\nOFFSET(prb_data_ring.size_bits)=0\n\
         OFFSET(prb_data_ring.data)=8\nOFFSET(atomic_long_t.counter)=0\n",
        virt(0x2000)
    );
    m.0[0x5_000..0x5_000 + 12].copy_from_slice(b"OSRELEASE=%s"); // the template, to be passed over
    m.0[0x2_0000..0x2_0000 + note.len()].copy_from_slice(note.as_bytes());
    m.put64(0x2000, virt(PRB));
    m.put32(PRB, COUNT_BITS);
    m.put64(PRB + 8, virt(DESCS));
    m.put64(PRB + 16, virt(INFOS));
    m.put32(PRB + 48, SIZE_BITS);
    m.put64(PRB + 56, virt(DATA));
    let count = 1usize << COUNT_BITS;
    let size = 1u64 << SIZE_BITS;
    let first_id = 0xffff_fff8u64; // what printk starts from does not matter
    let mut lpos = 0u64;
    for (n, t) in texts.iter().enumerate() {
        let id = first_id + n as u64;
        let index = id as usize % count;
        let need = (8 + t.len() as u64).next_multiple_of(8);
        let mut begin = lpos;
        let next = if begin % size + need > size {
            let wrapped = begin - begin % size + size;
            wrapped + need
        } else {
            begin + need
        };
        let at = if next / size != begin / size && next % size != 0 { 0 } else { (begin % size) as usize };
        m.put64(DATA + at, id);
        m.0[DATA + at + 8..DATA + at + 8 + t.len()].copy_from_slice(t.as_bytes());
        lpos = next;
        let desc = DESCS + index * 24;
        m.put64(desc, (DESC_FINALIZED << 62) | id);
        if t.is_empty() {
            begin = 3;
            m.put64(desc + 16, 3);
        } else {
            m.put64(desc + 16, next);
        }
        m.put64(desc + 8, begin);
        let info = INFOS + index * 88;
        m.put64(info, n as u64);
        m.put64(info + 8, n as u64 * 1_000_000);
        m.put32(info + 16, t.len() as u32 | (4 << 29));
    }
    let head = first_id + texts.len() as u64 - 1;
    m.put64(PRB + 24, head);
    m.put64(PRB + 32, head.saturating_sub(count as u64 - 1).max(first_id));
    m
}

fn texts(log: &ConsoleLog) -> Vec<&str> {
    log.records.iter().map(|r| r.text.as_str()).collect()
}

#[test]
fn reads_records_in_order_with_level_and_time() {
    let m = image(&["Linux version 6.1", "Kernel panic - not syncing", "end"]);
    let info = VmcoreInfo::find(&m).unwrap();
    let log = read(&m, &info, 0);
    assert_eq!(texts(&log), ["Linux version 6.1", "Kernel panic - not syncing", "end"]);
    assert_eq!((log.records[1].level, log.records[1].ts_ns, log.next_seq), (4, 1_000_000, 3));
    assert_eq!(log.note, None);
    assert_eq!(texts(&read(&m, &info, 2)), ["end"]);
    assert_eq!(read(&m, &info, 3).records.len(), 0);
}

#[test]
fn wrapped_rings_give_the_newest_records() {
    let all: Vec<String> = (0..20).map(|n| format!("line {n:02} {}", "x".repeat(n % 7))).collect();
    let refs: Vec<&str> = all.iter().map(String::as_str).collect();
    let m = image(&refs);
    let log = read(&m, &VmcoreInfo::find(&m).unwrap(), 0);
    assert_eq!(texts(&log), refs[12..].to_vec());
    assert_eq!(log.next_seq, 20);
}

#[test]
fn a_kernel_without_the_note_has_no_log() {
    let mut m = image(&["a"]);
    m.0[0x2_0000] = b'X';
    assert_eq!(VmcoreInfo::find(&m), None);
}

#[test]
fn text_is_found_without_the_note_and_the_banner_is_passed_over() {
    let mut m = Image(vec![0; SIZE]);
    let banner = b"Linux version 6.1.0 (x) #1 SMP";
    m.0[0x1_0000..0x1_0000 + banner.len()].copy_from_slice(banner);
    let log: &[&[u8]] = &[
        b"Linux version 6.1.0 (x) #1 SMP",
        b"\x01\0\0\0\0\0\0\0Command line: quiet",
        b"\0\x02\0Oops: int3",
        b"\0abc\0",
    ];
    let mut at = 0x2_fff0; // across a page border
    for part in log {
        m.0[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    let texts: Vec<String> = raw(&m).into_iter().map(|r| r.text).collect();
    assert_eq!(texts, ["Linux version 6.1.0 (x) #1 SMP", "Command line: quiet", "Oops: int3"]);
    assert!(raw(&Image(vec![0; SIZE])).is_empty());
}

#[test]
fn a_wild_descriptor_ring_is_said_not_followed() {
    let mut m = image(&["a"]);
    m.put32(PRB, 40);
    let info = VmcoreInfo::find(&m).unwrap();
    assert!(read(&m, &info, 0).note.is_some());
    let mut m = image(&["a"]);
    m.put64(PRB + 24, 1);
    assert!(read(&m, &VmcoreInfo::find(&m).unwrap(), 0).note.is_some());
}

proptest! {
    #[test]
    fn damaged_memory_never_panics(hits in proptest::collection::vec((0..SIZE, any::<u8>()), 1..200)) {
        let mut m = image(&["one", "two", "three"]);
        for (at, v) in hits {
            // Aim at the structures; the rest is zeros anyway.
            let at = [0x2000, PRB, DESCS, INFOS, DATA, 0x2_0000][at % 6] + (at / 6) % 400;
            m.0[at] = v;
        }
        if let Some(info) = VmcoreInfo::find(&m) {
            let log = read(&m, &info, 0);
            prop_assert!(log.records.len() <= 1 << MAX_COUNT_BITS);
        }
    }
}

#[test]
fn a_log_is_read_for_so_long_and_no_longer() {
    let memory = image(&["one", "two"]);
    let whole = InTime { memory: &memory, until: Instant::now() + std::time::Duration::from_secs(60) };
    let info = VmcoreInfo::find(&whole).expect("it is there");
    assert_eq!((read(&whole, &info, 0).records.len(), whole.is_over()), (2, false));
    let over = InTime { memory: &memory, until: Instant::now() };
    assert!(over.is_over() && VmcoreInfo::find(&over).is_none() && raw(&over).is_empty());
    assert!(read(&over, &info, 0).records.is_empty());
}
