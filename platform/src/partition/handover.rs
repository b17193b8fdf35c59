//! Memory that workloads of several kernels map at the same time, and one of them may write.

use std::time::Duration;

use nix::errno::Errno;
use tokio::time::Instant;

use super::abi::{self, request};
use super::{Inner, alloc, view};
use crate::{HandoverMoved, HandoverRegion, InstanceId, MemoryRange, PlatformError};

/// How long an instance may take to unmap a region that is no longer shared with it.
pub(super) const UNSHARE_LIMIT: Duration = Duration::from_secs(1);

fn unknown(key: u64) -> PlatformError {
    PlatformError::Invalid(format!("there is no handover region {key:#x}"))
}

fn changing(key: u64) -> PlatformError {
    PlatformError::Busy(format!("handover region {key:#x} is being changed by another call"))
}

fn micros(limit: Duration) -> u32 {
    u32::try_from(limit.as_micros()).unwrap_or(u32::MAX).min(abi::HANDOVER_MAX_US)
}

fn instance(id: u32) -> Option<InstanceId> {
    u16::try_from(id).ok().filter(|id| *id != 0).map(InstanceId)
}

/// Choose a place that no boot under way has planned for, and hold it until the module knows of it.
fn claim(inner: &Inner, size: u64) -> Result<MemoryRange, PlatformError> {
    let pool: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    let mut used: Vec<MemoryRange> = view::inventory(inner)?.used.into_iter().map(|(r, _)| r).collect();
    let mut state = inner.state();
    used.extend(state.claims.iter().map(|(_, r, _)| *r));
    let range = alloc::place_high(&pool, &used, size)?;
    state.claims.push((InstanceId::PRIMARY, range, Vec::new()));
    Ok(range)
}

pub(super) fn create(inner: &Inner, key: u64, size: u64) -> Result<MemoryRange, PlatformError> {
    if key == 0 || size == 0 || !size.is_multiple_of(abi::HANDOVER_ALIGN) {
        return Err(PlatformError::Invalid(format!(
            "a handover region needs a key other than 0 and whole {} MiB, not key {key:#x} and {size} bytes",
            abi::HANDOVER_ALIGN >> 20
        )));
    }
    let range = claim(inner, size)?;
    let mut r: abi::Handover = request();
    (r.key, r.size, r.base) = (key, size, range.base);
    let created = inner.device.handover_create(&mut r);
    inner.state().claims.retain(|(_, claimed, _)| *claimed != range);
    created.map_err(|e| match e {
        Errno::EEXIST => PlatformError::Busy(format!("there is a handover region {key:#x} already")),
        Errno::ENOSPC => {
            PlatformError::Busy(format!("there are {} handover regions already", abi::MAX_HANDOVERS))
        }
        e => PlatformError::os(format!("create handover region {key:#x} of {} MiB", size >> 20), e),
    })?;
    Ok(range)
}

pub(super) fn destroy(inner: &Inner, key: u64) -> Result<(), PlatformError> {
    let mut r: abi::Handover = request();
    r.key = key;
    inner.device.handover_destroy(&mut r).map_err(|e| match e {
        Errno::ENOENT => unknown(key),
        Errno::EBUSY if r.share_count > 0 => PlatformError::Busy(format!(
            "handover region {key:#x} is shared with {} instances",
            r.share_count
        )),
        Errno::EBUSY => changing(key),
        e => PlatformError::os(format!("destroy handover region {key:#x}"), e),
    })
}

pub(super) fn list(inner: &Inner) -> Result<Vec<HandoverRegion>, PlatformError> {
    let mut all: Box<abi::HandoverList> = Box::new(request());
    inner.device.handover_list(&mut all).map_err(|e| PlatformError::os("KMORPH_HANDOVER_LIST", e))?;
    let region = |r: &abi::Handover| HandoverRegion {
        key: r.key,
        range: MemoryRange { base: r.base, size: r.size },
        writer: instance(r.writer),
        shared: r.share.iter().take(r.share_count as usize).filter_map(|id| instance(*id)).collect(),
    };
    Ok(all.region.iter().take(all.count as usize).map(region).collect())
}

fn share_request(key: u64, id: InstanceId, incarnation: u64) -> abi::HandoverShare {
    let mut s: abi::HandoverShare = request();
    (s.key, s.instance, s.incarnation) = (key, u32::from(id.0), incarnation);
    s
}

pub(super) fn share(inner: &Inner, key: u64, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
    let mut s = share_request(key, id, incarnation);
    match inner.device.handover_share(&mut s) {
        Ok(()) | Err(Errno::EALREADY) => Ok(()),
        Err(Errno::ENOENT) => Err(unknown(key)),
        Err(Errno::EBUSY) => Err(changing(key)),
        Err(Errno::ENXIO) => Err(PlatformError::Unknown(id)),
        Err(e) => Err(PlatformError::os(format!("share handover region {key:#x} with instance {id}"), e)),
    }
}

pub(super) fn unshare(
    inner: &Inner,
    key: u64,
    id: InstanceId,
    incarnation: u64,
    limit: Duration,
) -> Result<(), PlatformError> {
    let mut s = share_request(key, id, incarnation);
    s.timeout_us = micros(limit);
    let what = || format!("take handover region {key:#x} from instance {id}");
    inner.device.handover_unshare(&mut s).map_err(|e| match e {
        Errno::ENOENT => PlatformError::Invalid(format!("{}: it is not shared with it", what())),
        Errno::EBUSY => PlatformError::Busy(format!("{}: it is its writer, or just changes", what())),
        Errno::ETIMEDOUT => PlatformError::Timeout { what: what(), limit },
        e => PlatformError::os(what(), e),
    })
}

pub(super) fn assign(
    inner: &Inner,
    key: u64,
    id: Option<InstanceId>,
    limit: Duration,
) -> Result<HandoverMoved, PlatformError> {
    let mut a: abi::HandoverAssign = request();
    (a.key, a.instance, a.timeout_us) = (key, id.map_or(0, |id| u32::from(id.0)), micros(limit));
    let began = Instant::now();
    let done = inner.device.handover_assign(&mut a);
    let took = began.elapsed();
    let to = || id.map_or("nobody".into(), |id| format!("instance {id}"));
    done.map_err(|e| match e {
        Errno::ENOENT => unknown(key),
        Errno::EACCES => {
            PlatformError::Invalid(format!("handover region {key:#x} is not shared with {}", to()))
        }
        Errno::EBUSY => changing(key),
        Errno::ETIMEDOUT => PlatformError::Timeout {
            what: format!("revoking the writer of handover region {key:#x}, which is still its writer,"),
            limit,
        },
        e => PlatformError::os(format!("give handover region {key:#x} to {}", to()), e),
    })?;
    Ok(HandoverMoved { revoke: Duration::from_nanos(a.revoke_ns), took })
}
