//! Starting, fencing and reclaiming an instance.

use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::Instant;

use super::abi::{self, ctl, request};
use super::bootparams::{CmdlineParts, cmdline, zero_page};
use super::bzimage::{BzImage, ENTRY_64, parse};
use super::initramfs::{AGENT, Sources, combined, own_archive};
use super::layout::{ACPI, CMDLINE, Layout, minimum};
use super::{Inner, Live, acpi, alloc, links, view};
use crate::{
    BootRequest, Booted, CpuState, FenceReport, InstanceId, MemoryRange, PlatformError, ReclaimReport, file,
};

/// Bytes written through one mapping.
const WINDOW: u64 = 16 << 20;

/// A request with everything it names read and checked.
pub(super) struct Prepared {
    file: Vec<u8>,
    image: BzImage,
    initramfs: Vec<u8>,
}

/// Check a request without changing anything.
pub(super) fn prepare(inner: &Inner, r: &BootRequest) -> Result<Prepared, PlatformError> {
    let cpus = r.spec.cpus.len() + r.growth.cpus.len();
    if r.spec.cpus.is_empty() || cpus > abi::MAX_CPUS {
        return Err(PlatformError::Invalid(format!(
            "it is to have {cpus} CPUs, {} of them at its start; 1 to {} are possible",
            r.spec.cpus.len(),
            abi::MAX_CPUS
        )));
    }
    let file = file::read("kernel", &r.kernel)?;
    let (image, _) = parse(&r.kernel.display().to_string(), &file)?;
    let sources = Sources { agent: inner.config.agent.clone(), modules: inner.config.modules.clone() };
    let own = own_archive(&sources, &image.release)?;
    let initramfs = combined(r.initramfs.as_deref(), &own)?;
    let need = minimum(&image, initramfs.len() as u64, inner.config.vsock_area);
    if r.spec.memory_bytes < need {
        // `Layout::plan` has the words for it.
        let region = MemoryRange { base: super::layout::REGION_ALIGN, size: r.spec.memory_bytes };
        Layout::plan(region, &image, initramfs.len() as u64, inner.config.vsock_area)?;
    }
    cmdline(&parts(inner, r, 0, &r.cmdline), &image)?;
    check_cpus(inner, r)?;
    let used = used(inner)?;
    let pool: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    alloc::place(&pool, &used, r.spec.memory_bytes, r.spec.memory_base)?;
    Ok(Prepared { file, image, initramfs })
}

fn parts<'a>(inner: &Inner, r: &BootRequest, control: u64, user: &'a str) -> CmdlineParts<'a> {
    CmdlineParts {
        tsc_khz: inner.tsc_khz,
        control,
        instance: r.spec.id.0,
        incarnation: r.incarnation,
        cpus: r.spec.cpus.len(),
        later_cpus: r.growth.cpus.len(),
        later_memory: r.growth.memory_bytes > 0,
        agent: AGENT,
        user,
    }
}

fn check_cpus(inner: &Inner, r: &BootRequest) -> Result<(), PlatformError> {
    let cpus = view::cpus(inner)?;
    for apic in &r.spec.cpus {
        let Some(cpu) = cpus.iter().find(|c| c.apic_id == *apic) else {
            let known: Vec<String> = cpus.iter().map(|c| c.apic_id.to_string()).collect();
            return Err(PlatformError::Invalid(format!(
                "it wants CPU {apic} (physical id), which this machine does not have; it has {}",
                known.join(", ")
            )));
        };
        if cpu.boot {
            return Err(PlatformError::Invalid(format!(
                "it wants CPU {apic}, the machine's boot processor; it always stays with the primary kernel"
            )));
        }
        if cpu.state == CpuState::Lent {
            let owner = cpu.owner.map(|o| o.to_string()).unwrap_or_default();
            return Err(PlatformError::Busy(format!(
                "it wants CPU {apic}, which instance {owner} has; terminate that one or change the definition"
            )));
        }
    }
    if let Some((owner, _, c)) = inner
        .state()
        .claims
        .iter()
        .find(|(id, _, c)| *id != r.spec.id && c.iter().any(|a| r.spec.cpus.contains(a)))
    {
        return Err(PlatformError::Busy(format!(
            "it wants CPUs {c:?}, with which instance {owner} is being started"
        )));
    }
    Ok(())
}

fn used(inner: &Inner) -> Result<Vec<MemoryRange>, PlatformError> {
    let mut used: Vec<MemoryRange> = view::inventory(inner)?.used.into_iter().map(|(r, _)| r).collect();
    used.extend(inner.state().claims.iter().map(|(_, r, _)| *r));
    Ok(used)
}

/// Claim a region and the CPUs, so that two boots at once cannot plan the same ones.
fn claim(inner: &Inner, r: &BootRequest) -> Result<Claim, PlatformError> {
    let pool: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    let taken: Vec<MemoryRange> = view::inventory(inner)?.used.into_iter().map(|(r, _)| r).collect();
    let mut state = inner.state();
    if state.live.contains_key(&r.spec.id) || state.claims.iter().any(|(id, ..)| *id == r.spec.id) {
        return Err(PlatformError::Busy(format!("{} (instance {}) already runs", r.spec.name, r.spec.id)));
    }
    if let Some((owner, _, _)) =
        state.claims.iter().find(|(_, _, c)| c.iter().any(|a| r.spec.cpus.contains(a)))
    {
        return Err(PlatformError::Busy(format!(
            "a CPU of {} is being given to instance {owner}",
            r.spec.name
        )));
    }
    let mut used = taken;
    used.extend(state.claims.iter().map(|(_, r, _)| *r));
    let region = alloc::place(&pool, &used, r.spec.memory_bytes, r.spec.memory_base)?;
    state.claims.push((r.spec.id, region, r.spec.cpus.clone()));
    Ok(Claim { id: r.spec.id, region })
}

struct Claim {
    id: InstanceId,
    region: MemoryRange,
}

/// Boot: claim, take CPUs, create, load, link, start; undone in reverse when a step fails.
pub(super) fn boot(inner: &Inner, r: &BootRequest) -> Result<Booted, PlatformError> {
    let began = Instant::now();
    let prepared = prepare(inner, r)?;
    let claim = claim(inner, r)?;
    let result = boot_claimed(inner, r, &prepared, claim.region);
    inner.state().claims.retain(|(id, ..)| *id != claim.id);
    result.map(|_| Booted {
        region: claim.region,
        cpus: r.spec.cpus.clone(),
        release: prepared.image.release.clone(),
        took: began.elapsed(),
    })
}

fn boot_claimed(
    inner: &Inner,
    r: &BootRequest,
    p: &Prepared,
    region: MemoryRange,
) -> Result<(), PlatformError> {
    let layout = Layout::plan(region, &p.image, p.initramfs.len() as u64, inner.config.vsock_area)?;
    let taken = take_cpus(inner, r)?;
    let result = boot_with_cpus(inner, r, p, &layout);
    if result.is_err() {
        for apic in taken {
            give_cpu(inner, apic);
        }
    }
    result
}

fn boot_with_cpus(
    inner: &Inner,
    r: &BootRequest,
    p: &Prepared,
    layout: &Layout,
) -> Result<(), PlatformError> {
    let id = r.spec.id;
    let mut c: abi::Instance = request();
    c.id = u32::from(id.0);
    c.incarnation = r.incarnation;
    c.base = layout.region.base;
    c.size = layout.region.size;
    c.control = layout.control();
    c.pulse_us = u32::try_from(r.pulse_period.as_micros()).unwrap_or(0);
    c.cpu_count = r.spec.cpus.len() as u32;
    for (slot, apic) in c.apicid.iter_mut().zip(&r.spec.cpus) {
        *slot = *apic;
    }
    // Cleared before the module formats the control area in it.
    clear(inner, layout.region)?;
    inner
        .device
        .create(&mut c)
        .map_err(|e| PlatformError::os(format!("claim resources for instance {id}"), e))?;
    let started = load(inner, r, p, layout, MemoryRange { base: c.low_base, size: c.low_size })
        .and_then(|()| links::with_primary(inner, id, layout.vsock))
        .and_then(|()| {
            let control = Arc::new(inner.device.map(layout.control(), ctl::SIZE)?);
            let live = Live { incarnation: r.incarnation, region: layout.region, control, log: None };
            inner.state().live.insert(id, live);
            links::with_peers(inner, id);
            start(inner, id, layout)
        });
    if let Err(error) = started {
        // A CPU that answered the start may run: stop it and see it stopped before anything is freed.
        let stopped = fence(inner, id).is_ok_and(|f| f.complete);
        if stopped {
            destroy(inner, id)?;
            inner.state().live.remove(&id);
            return Err(error);
        }
        return Err(PlatformError::os(
            format!(
                "{error}; and afterwards its CPUs could not be seen stopped, so they and its memory stay claimed"
            ),
            "partial fence",
        ));
    }
    Ok(())
}

fn take_cpus(inner: &Inner, r: &BootRequest) -> Result<Vec<u32>, PlatformError> {
    let mut taken = Vec::new();
    for apic in &r.spec.cpus {
        let mut c: abi::Cpu = request();
        c.apicid = *apic;
        match inner.device.cpu_take(&mut c) {
            Ok(()) => taken.push(*apic),
            Err(Errno::EALREADY) => {} // in the pool already
            Err(e) => {
                for t in taken {
                    give_cpu(inner, t);
                }
                return Err(PlatformError::Busy(format!(
                    "CPU {apic} could not be taken from the primary kernel: {e}; see dmesg of the primary"
                )));
            }
        }
    }
    Ok(taken)
}

pub(super) fn give_cpu(inner: &Inner, apic: u32) {
    let mut c: abi::Cpu = request();
    c.apicid = apic;
    match inner.device.cpu_give(&mut c) {
        Ok(()) | Err(Errno::EALREADY) => {}
        Err(error) => tracing::error!(cpu = apic, %error, "CPU could not be given back to the primary"),
    }
}

/// Old contents would show in the new kernel's crash dumps, and another instance's secrets in its memory.
pub(super) fn clear(inner: &Inner, region: MemoryRange) -> Result<(), PlatformError> {
    let mut at = region.base;
    while at < region.end() {
        let len = WINDOW.min(region.end() - at);
        let m = inner.device.map(at, len)?;
        if !m.zero(0, m.len()) {
            return Err(PlatformError::os("clear the region", "outside its mapping"));
        }
        at += len;
    }
    Ok(())
}

fn write(inner: &Inner, mut at: u64, mut bytes: &[u8]) -> Result<(), PlatformError> {
    const PAGE: u64 = 4096;
    while !bytes.is_empty() {
        let base = at & !(PAGE - 1);
        let skip = (at - base) as usize;
        let n = bytes.len().min(WINDOW as usize - skip);
        let m = inner.device.map(base, ((skip + n) as u64).next_multiple_of(PAGE))?;
        if !m.write(skip, &bytes[..n]) {
            return Err(PlatformError::os("write into the region", "outside its mapping"));
        }
        bytes = &bytes[n..];
        at += n as u64;
    }
    Ok(())
}

fn load(
    inner: &Inner,
    r: &BootRequest,
    p: &Prepared,
    layout: &Layout,
    low: MemoryRange,
) -> Result<(), PlatformError> {
    let line = cmdline(&parts(inner, r, layout.control(), &r.cmdline), &p.image)?;
    write(inner, layout.kernel, &p.file[p.image.payload_offset..])?;
    write(inner, layout.initramfs, &p.initramfs)?;
    write(inner, layout.boot_params(), &zero_page(layout, low, &p.file, &p.image)?)?;
    write(inner, layout.region.base + CMDLINE, format!("{line}\0").as_bytes())?;
    let at = layout.region.base + ACPI;
    let cpus: Vec<u32> = r.spec.cpus.iter().chain(&r.growth.cpus).copied().collect();
    write(inner, at, &acpi::build(at, &cpus)?)
}

fn start(inner: &Inner, id: InstanceId, layout: &Layout) -> Result<(), PlatformError> {
    let mut s: abi::Start = request();
    s.id = u32::from(id.0);
    s.entry = layout.kernel + ENTRY_64;
    s.boot_params = layout.boot_params();
    inner.device.start(&mut s).map_err(|e| {
        let stage = ["it never ran the trampoline", "it stopped in 16-bit mode", "it stopped in 32-bit mode"];
        let where_ = stage.get(s.stage as usize).copied().unwrap_or("it reached long mode");
        PlatformError::os(format!("start instance {id}: {where_}"), e)
    })
}

fn destroy(inner: &Inner, id: InstanceId) -> Result<(), PlatformError> {
    let mut d: abi::Ref = request();
    d.id = u32::from(id.0);
    inner.device.destroy(&mut d).map_err(|e| match e {
        Errno::EBUSY => {
            PlatformError::Busy(format!("a socket of instance {id} is still being copied from or to"))
        }
        e => PlatformError::os(format!("give up the resources of instance {id}"), e),
    })?;
    // The module ends the links of an instance with it.
    inner.state().peers.retain(|(a, b), _| *a != id && *b != id);
    Ok(())
}

/// Stop every CPU and report which were seen stopped.
pub(super) fn fence(inner: &Inner, id: InstanceId) -> Result<FenceReport, PlatformError> {
    let began = Instant::now();
    let before = inner.device.query(id).map_err(|e| PlatformError::os(format!("KMORPH_QUERY {id}"), e))?;
    let count = (before.cpu_count as usize).min(abi::MAX_CPUS);
    let ids = &before.apicid[..count];
    let report = |mask: u64, complete: bool, took: Duration| FenceReport {
        cpus: ids.iter().enumerate().map(|(n, a)| (*a, complete || mask & (1 << n) != 0)).collect(),
        complete,
        took,
    };
    if matches!(before.state, abi::instance_state::STOPPED | abi::instance_state::CREATED) {
        return Ok(report(u64::MAX, true, began.elapsed()));
    }
    let mut s: abi::Stop = request();
    s.id = u32::from(id.0);
    match inner.device.stop(&mut s) {
        Ok(()) => Ok(report(u64::MAX, true, began.elapsed())),
        Err(Errno::ETIMEDOUT) => Ok(report(s.stopped_cpus, false, began.elapsed())),
        Err(e) => Err(PlatformError::os(format!("stop instance {id}"), e)),
    }
}

/// Take back what a fenced instance had.
pub(super) fn reclaim(
    inner: &Inner,
    id: InstanceId,
    release_cpus: bool,
) -> Result<ReclaimReport, PlatformError> {
    let began = Instant::now();
    let q = inner.device.query(id).map_err(|e| PlatformError::os(format!("KMORPH_QUERY {id}"), e))?;
    if !matches!(q.state, abi::instance_state::STOPPED | abi::instance_state::CREATED) {
        return Err(PlatformError::NotFenced(id));
    }
    // Its memory can be reused from here on, so keep what an operator may still want to read.
    match view::console(inner, id, 0) {
        Ok(log) => drop(inner.state().last_log.insert(id, log)),
        Err(error) => tracing::warn!(instance = %id, %error, "the log of the last life could not be kept"),
    }
    destroy(inner, id)?;
    inner.state().live.remove(&id);
    let cpus = view::cpu_ids(&q);
    if release_cpus {
        for apic in &cpus {
            give_cpu(inner, *apic);
        }
    }
    Ok(ReclaimReport { region: MemoryRange { base: q.base, size: q.size }, cpus, took: began.elapsed() })
}
