//! Looking: inventory, pulse, console, and what ran before this daemon.

use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::Instant;

use super::abi::{self, ctl, request};
use super::sys::Mapping;
use super::{Inner, Live, cpu_info, handover, klog};
use crate::{
    ConsoleLog, CpuInfo, CpuPulse, ExistingInstance, InstanceId, Inventory, KernelState, MemoryRange,
    PlatformError, PulseSample,
};

/// Window size when a whole region is read.
const WINDOW: u64 = 64 << 20;

/// Longest time for reading a kernel's log: taking back what it had waits for that.
const LOG_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn cpus(inner: &Inner) -> Result<Vec<CpuInfo>, PlatformError> {
    let mut info: abi::Info = request();
    inner.device.info(&mut info).map_err(|e| PlatformError::os("KMORPH_INFO", e))?;
    let mut list: Box<abi::CpuList> = Box::new(request());
    inner.device.cpu_list(&mut list).map_err(|e| PlatformError::os("KMORPH_CPU_LIST", e))?;
    Ok(list.cpu.iter().take(list.count as usize).map(|c| cpu_info(c, info.boot_apicid)).collect())
}

pub(super) fn pool(inner: &Inner) -> Result<Vec<abi::Pool>, PlatformError> {
    let mut list: Box<abi::PoolList> = Box::new(request());
    inner.device.pool_list(&mut list).map_err(|e| PlatformError::os("KMORPH_POOL_LIST", e))?;
    Ok(list.range.iter().take(list.count as usize).copied().collect())
}

fn instances(inner: &Inner) -> Result<Vec<abi::Instance>, PlatformError> {
    let mut list: abi::InstanceList = request();
    inner.device.instance_list(&mut list).map_err(|e| PlatformError::os("KMORPH_INSTANCE_LIST", e))?;
    list.id
        .iter()
        .take(list.count as usize)
        .filter_map(|id| u16::try_from(*id).ok())
        .filter_map(|id| match inner.device.query(InstanceId(id)) {
            // It was given back meanwhile.
            Err(Errno::ENOENT) => None,
            asked => Some(asked.map_err(|e| PlatformError::os(format!("KMORPH_QUERY {id}"), e))),
        })
        .collect()
}

pub(super) fn cpu_ids(i: &abi::Instance) -> Vec<u32> {
    i.apicid.iter().take((i.cpu_count as usize).min(abi::MAX_CPUS)).copied().collect()
}

/// Memory an instance got while it ran.
pub(super) fn extents(i: &abi::Instance) -> Vec<MemoryRange> {
    let known = i.extent.iter().take(i.extent_count as usize);
    known.map(|e| MemoryRange { base: e.base, size: e.size }).collect()
}

pub(super) fn inventory(inner: &Inner) -> Result<Inventory, PlatformError> {
    let mut used: Vec<(MemoryRange, InstanceId)> = vec![];
    for i in instances(inner)? {
        let Ok(id) = u16::try_from(i.id) else { continue };
        used.push((MemoryRange { base: i.base, size: i.size }, InstanceId(id)));
        used.extend(extents(&i).into_iter().map(|range| (range, InstanceId(id))));
    }
    used.extend(inner.state().peers.iter().map(|((a, _), area)| (*area, *a)));
    used.extend(handover::list(inner)?.iter().map(|r| (r.range, r.writer.unwrap_or(InstanceId::PRIMARY))));
    let mut info: abi::Info = request();
    inner.device.info(&mut info).map_err(|e| PlatformError::os("KMORPH_INFO", e))?;
    Ok(Inventory {
        // That of the primary; a kernel says its own when it runs.
        memory_block: info.memory_block_size,
        cpus: cpus(inner)?,
        pool: pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect(),
        used,
    })
}

pub(super) fn existing(inner: &Inner) -> Result<Vec<ExistingInstance>, PlatformError> {
    Ok(instances(inner)?
        .iter()
        .filter_map(|i| {
            Some(ExistingInstance {
                id: InstanceId(u16::try_from(i.id).ok()?),
                incarnation: i.incarnation,
                region: MemoryRange { base: i.base, size: i.size },
                cpus: cpu_ids(i),
                running: i.state == abi::instance_state::RUNNING,
            })
        })
        .collect())
}

/// Take up what runs since before this daemon.
pub(super) fn adopt(inner: &Inner) -> Result<(), PlatformError> {
    for i in instances(inner)? {
        let Ok(id) = u16::try_from(i.id) else { continue };
        let control = inner.device.map(i.control, ctl::SIZE)?;
        let magic = control.load_u64(ctl::OFF_PRIMARY + offset_of!(ctl::Primary, magic));
        let version = control.load_u32(ctl::OFF_PRIMARY + offset_of!(ctl::Primary, version));
        if (magic, version) != (Some(ctl::MAGIC), Some(ctl::VERSION)) {
            return Err(PlatformError::Unavailable(format!(
                "instance {id} has a control area of another layout at {:#x}; it was started by another release of kmorph",
                i.control
            )));
        }
        let id = InstanceId(id);
        let links = peer_links(&control);
        let live = Live {
            incarnation: i.incarnation,
            region: MemoryRange { base: i.base, size: i.size },
            control: Arc::new(control),
            log: None,
        };
        let mut state = inner.state();
        state.peers.extend(links.into_iter().map(|(peer, area)| ((id.min(peer), id.max(peer)), area)));
        state.live.insert(id, live);
    }
    Ok(())
}

/// Links to other instances that an instance found running has.
fn peer_links(control: &Mapping) -> Vec<(InstanceId, MemoryRange)> {
    (0..ctl::LINKS)
        .filter_map(|n| {
            let at = ctl::OFF_LINK + n * size_of::<ctl::Link>();
            let state = control.load_u32(at + offset_of!(ctl::Link, state))?;
            let peer = u16::try_from(control.load_u32(at + offset_of!(ctl::Link, peer_id))?).ok()?;
            let base = control.load_u64(at + offset_of!(ctl::Link, base))?;
            let size = control.load_u64(at + offset_of!(ctl::Link, size))?;
            (state == ctl::LINK_LIVE && peer != 0).then_some((InstanceId(peer), MemoryRange { base, size }))
        })
        .collect()
}

/// Read the control area. Every word is taken once; whatever makes no sense counts as absent.
pub(super) fn pulse(control: &Mapping) -> PulseSample {
    let at = |field: usize| ctl::OFF_INSTANCE + field;
    let text = || {
        let mut t = [0u8; ctl::TEXT];
        if control.read(at(offset_of!(ctl::Instance, text)), &mut t) { abi::text(&t) } else { String::new() }
    };
    let state = match control.load_u32(at(offset_of!(ctl::Instance, state))) {
        Some(ctl::READY) => KernelState::Ready,
        Some(ctl::PANIC) => KernelState::Panicked(text()),
        Some(ctl::PARKED) => KernelState::Parked(text()),
        Some(ctl::LEFT) => KernelState::Left,
        _ => KernelState::Absent,
    };
    let cpus = (0..ctl::CPUS)
        .filter_map(|n| {
            let line = ctl::OFF_PULSE + n * size_of::<ctl::Pulse>();
            let online = control.load_u32(line + offset_of!(ctl::Pulse, online))?;
            let count = control.load_u64(line + offset_of!(ctl::Pulse, count))?;
            (online == 1).then_some(CpuPulse { number: n as u32, count })
        })
        .collect();
    let nonce = control.load_u64(at(offset_of!(ctl::Instance, boot_nonce))).unwrap_or(0);
    PulseSample { state, nonce, cpus }
}

/// An instance's memory, mapped window by window.
struct Region<'a> {
    inner: &'a Inner,
    range: MemoryRange,
    window: std::cell::RefCell<Option<Mapping>>,
}

impl klog::PhysMemory for Region<'_> {
    fn range(&self) -> MemoryRange {
        self.range
    }

    fn read(&self, phys: u64, buf: &mut [u8]) -> Option<()> {
        let end = phys.checked_add(buf.len() as u64)?;
        if phys < self.range.base || end > self.range.end() {
            return None;
        }
        let mut window = self.window.borrow_mut();
        let covered = |w: &Mapping| w.base() <= phys && end <= w.base() + w.len() as u64;
        if !window.as_ref().is_some_and(covered) {
            // Windows overlap by half, so any short read fits one of them.
            let start = self.range.base + (phys - self.range.base) / (WINDOW / 2) * (WINDOW / 2);
            let len = WINDOW.min(self.range.end() - start);
            *window = None;
            *window = self
                .inner
                .device
                .map(start, len)
                .inspect_err(|e| tracing::warn!(error = %e, "map a window"))
                .ok();
        }
        let w = window.as_ref().filter(|w| covered(w))?;
        w.read(usize::try_from(phys - w.base()).ok()?, buf).then_some(())
    }
}

/// The kernel log, from memory while the instance has any, else the copy kept of its last life.
pub(super) fn console(inner: &Inner, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError> {
    let (incarnation, range, known) = {
        let state = inner.state();
        let Some(live) = state.live.get(&id) else {
            let mut log = state.last_log.get(&id).cloned().ok_or(PlatformError::Unknown(id))?;
            log.records.retain(|r| r.seq >= from_seq);
            log.note = Some("kept from the last life; its memory went back to the pool".into());
            return Ok(log);
        };
        (live.incarnation, live.region, live.log.clone())
    };
    let whole = Region { inner, range, window: Default::default() };
    let region = klog::InTime { memory: &whole, until: Instant::now() + LOG_LIMIT };
    let late = || format!("reading its log was broken off after {LOG_LIMIT:?}");
    let info = match known {
        Some(info) => info,
        None => match klog::VmcoreInfo::find(&region) {
            Some(info) => {
                if let Some(l) = inner.state().live.get_mut(&id).filter(|l| l.incarnation == incarnation) {
                    l.log = Some(info.clone());
                }
                info
            }
            None => {
                let mut records = klog::raw(&region);
                records.retain(|r| r.seq >= from_seq);
                return Ok(ConsoleLog {
                    next_seq: records.last().map_or(from_seq, |r| r.seq + 1),
                    records,
                    note: Some(match region.is_over() {
                        true => late(),
                        false => "the kernel has not come as far as describing its log; what is shown is text found in its memory".into(),
                    }),
                });
            }
        },
    };
    let mut log = klog::read(&region, &info, from_seq);
    if region.is_over() {
        log.note = Some(late());
    }
    Ok(log)
}
