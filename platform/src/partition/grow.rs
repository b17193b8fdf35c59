//! More CPUs and memory for an instance that runs: those another kernel has left.

use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::{Instant, sleep};

use super::abi::{self, ctl, request};
use super::sys::Mapping;
use super::{Inner, alloc, blocking, boot, view};
use crate::{Grown, Growth, InstanceId, MemoryRange, PlatformError};

/// Between two looks at whether the instance's kernel uses what it was given.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const PAGE: u64 = 4096;

/// Give it what it does not have, memory first.
pub(super) async fn grow(
    inner: &Arc<Inner>,
    id: InstanceId,
    growth: &Growth,
    limit: Duration,
) -> Result<Grown, PlatformError> {
    let control = inner.state().live.get(&id).map(|l| l.control.clone()).ok_or(PlatformError::Unknown(id))?;
    let mut grown = Grown::default();

    let began = Instant::now();
    let (all, area, wanted) = (inner.clone(), control.clone(), growth.memory_bytes);
    let failed = blocking(move || memory(&all, id, &area, wanted)).await?;
    grown.failed.extend(failed);
    grown.failed.extend(used(&control, limit).await.err().map(|t| t.text));
    grown.memory_took = began.elapsed();

    let began = Instant::now();
    for apic in growth.cpus.iter().copied() {
        let all = inner.clone();
        let trouble = match blocking(move || cpu(&all, id, apic)).await {
            Ok(()) => match used(&control, limit).await {
                Ok(()) => continue,
                Err(trouble) => trouble,
            },
            Err(error) => {
                grown.failed.push(error.to_string());
                continue;
            }
        };
        grown.failed.push(trouble.text);
        // A kernel that is just starting a CPU must not have it stopped.
        if trouble.refused {
            let all = inner.clone();
            blocking(move || {
                withdraw(&all, id, apic);
                Ok(())
            })
            .await?;
        }
    }
    grown.cpus_took = began.elapsed();

    let all = inner.clone();
    let q = blocking(move || query(&all, id)).await?;
    let has = view::cpu_ids(&q);
    grown.cpus = growth.cpus.iter().copied().filter(|c| has.contains(c)).collect();
    grown.memory = view::extents(&q);
    Ok(grown)
}

fn query(inner: &Inner, id: InstanceId) -> Result<abi::Instance, PlatformError> {
    inner.device.query(id).map_err(|e| PlatformError::os(format!("KMORPH_QUERY {id}"), e))
}

/// Assign memory of the pool. Says what is missing.
fn memory(
    inner: &Inner,
    id: InstanceId,
    control: &Mapping,
    wanted: u64,
) -> Result<Option<String>, PlatformError> {
    let q = query(inner, id)?;
    let has: u64 = view::extents(&q).iter().map(|r| r.size).sum();
    let Some(wanted) = wanted.checked_sub(has).filter(|w| *w > 0) else { return Ok(None) };
    // The kernel itself says how large its memory blocks are.
    let block = control.load_u64(ctl::OFF_INSTANCE + offset_of!(ctl::Instance, memory_block));
    let Some(block) = block.filter(|b| b.is_power_of_two() && *b >= PAGE) else {
        return Err(PlatformError::Unavailable(format!(
            "instance {id} cannot get memory: kmorph.ko is not loaded in it"
        )));
    };
    let room = abi::MAX_EXTENTS.saturating_sub(q.extent_count as usize);
    let pieces = claim(inner, wanted, block, room)?;
    let got = assign(inner, id, &pieces);
    inner.state().claims.retain(|(_, claimed, _)| !pieces.contains(claimed));
    let got = got?;
    Ok((got < wanted).then(|| {
        format!(
            "{} of {} MiB could be given to it: memory comes in free blocks of {} MiB, at most {} pieces",
            got >> 20,
            wanted >> 20,
            block >> 20,
            abi::MAX_EXTENTS
        )
    }))
}

/// Choose free memory, and hold it until the module knows of it.
fn claim(inner: &Inner, wanted: u64, block: u64, room: usize) -> Result<Vec<MemoryRange>, PlatformError> {
    let pool: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    let mut used: Vec<MemoryRange> = view::inventory(inner)?.used.into_iter().map(|(r, _)| r).collect();
    let mut state = inner.state();
    used.extend(state.claims.iter().map(|(_, r, _)| *r));
    let pieces = alloc::pieces(&pool, &used, wanted, block, room);
    state.claims.extend(pieces.iter().map(|r| (InstanceId::PRIMARY, *r, Vec::new())));
    Ok(pieces)
}

fn assign(inner: &Inner, id: InstanceId, pieces: &[MemoryRange]) -> Result<u64, PlatformError> {
    let mut got = 0;
    for piece in pieces {
        // Nothing of the kernel that had it before.
        boot::clear(inner, *piece)?;
        let mut m: abi::Memory = request();
        m.instance = u32::from(id.0);
        (m.base, m.size) = (piece.base, piece.size);
        inner.device.memory_assign(&mut m).map_err(|e| {
            PlatformError::os(format!("give {:#x}+{:#x} to instance {id}", piece.base, piece.size), e)
        })?;
        got += piece.size;
    }
    Ok(got)
}

/// Assign a CPU, unless it is the instance's already.
fn cpu(inner: &Inner, id: InstanceId, apic: u32) -> Result<(), PlatformError> {
    if view::cpu_ids(&query(inner, id)?).contains(&apic) {
        return Ok(());
    }
    let mut c: abi::Cpu = request();
    c.apicid = apic;
    match inner.device.cpu_take(&mut c) {
        Ok(()) | Err(Errno::EALREADY) => {}
        Err(Errno::EBUSY) => {
            return Err(PlatformError::Busy(format!("CPU {apic}: instance {} has it", c.instance)));
        }
        Err(e) => return Err(PlatformError::os(format!("take CPU {apic} from the primary kernel"), e)),
    }
    c.instance = u32::from(id.0);
    inner
        .device
        .cpu_assign(&mut c)
        .map_err(|e| PlatformError::os(format!("give CPU {apic} to instance {id}"), e))
}

/// Take back a CPU that the instance's kernel does not use.
fn withdraw(inner: &Inner, id: InstanceId, apic: u32) {
    let mut c: abi::Cpu = request();
    (c.apicid, c.instance) = (apic, u32::from(id.0));
    match inner.device.cpu_withdraw(&mut c) {
        // It was never given.
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(error) => {
            tracing::warn!(instance = %id, cpu = apic, %error, "a CPU it does not use stays with it")
        }
    }
}

/// Why an instance's kernel does not use something.
struct Trouble {
    text: String,
    /// It tried and could not; otherwise it may be at it still.
    refused: bool,
}

/// Wait until the instance's kernel has acted upon everything it was given.
async fn used(control: &Mapping, limit: Duration) -> Result<(), Trouble> {
    let generation = ctl::OFF_GRANTS + offset_of!(ctl::Grants, generation);
    let of = |field: usize| ctl::OFF_INSTANCE + field;
    let until = Instant::now() + limit;
    while control.load_u32(of(offset_of!(ctl::Instance, grants_seen))) != control.load_u32(generation) {
        if Instant::now() >= until {
            let text = format!("its kernel did not take up what it was given within {limit:?}");
            return Err(Trouble { text, refused: false });
        }
        sleep(LOOK_AGAIN).await;
    }
    let what = control.load_u64(of(offset_of!(ctl::Instance, grants_what))).unwrap_or(0);
    let error = control.load_u32(of(offset_of!(ctl::Instance, grants_error))).unwrap_or(0);
    let text = match Errno::from_raw(i32::try_from(error).unwrap_or(i32::MAX)) {
        _ if error == 0 => return Ok(()),
        Errno::ENODEV => format!("its kernel was not told of CPU {what} when it started"),
        Errno::EAGAIN => format!(
            "its kernel has the memory at {what:#x} and does not use it: memhp_default_state=online_movable is missing on \
             its command line"
        ),
        error => format!("its kernel could not take up {what:#x}: {error}"),
    };
    Err(Trouble { text, refused: true })
}
