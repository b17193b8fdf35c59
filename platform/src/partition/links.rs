//! Channels: between the primary and each instance, and between any two instances.

use super::abi::{self, request};
use super::{Inner, alloc, view};
use crate::{InstanceId, MemoryRange, PlatformError};

fn add(inner: &Inner, a: InstanceId, b: InstanceId, area: MemoryRange) -> Result<(), nix::errno::Errno> {
    let mut l: abi::LinkReq = request();
    (l.id_a, l.id_b) = (u32::from(a.0), u32::from(b.0));
    (l.base, l.size) = (area.base, area.size);
    inner.device.link_add(&mut l)
}

/// The channel to the primary, in the instance's own region. Without it there is no agent.
pub(super) fn with_primary(inner: &Inner, id: InstanceId, area: MemoryRange) -> Result<(), PlatformError> {
    add(inner, InstanceId::PRIMARY, id, area).map_err(|e| {
        PlatformError::os(format!("set up the vsock link to instance {id} (is kerf-vsock loaded?)"), e)
    })
}

/// Channels to every other instance, in the pool outside all regions. An instance runs without them
/// too, so a full pool is a warning.
pub(super) fn with_peers(inner: &Inner, id: InstanceId) {
    if inner.config.peer_area == 0 {
        return;
    }
    let others: Vec<InstanceId> = inner.state().live.keys().filter(|o| **o != id).copied().collect();
    for other in others {
        if let Err(error) = with_peer(inner, id.min(other), id.max(other)) {
            tracing::warn!(instance = %id, peer = %other, %error, "no vsock channel between these two instances");
        }
    }
}

fn with_peer(inner: &Inner, a: InstanceId, b: InstanceId) -> Result<(), PlatformError> {
    let pool: Vec<MemoryRange> =
        view::pool(inner)?.iter().map(|p| MemoryRange { base: p.base, size: p.size }).collect();
    let taken: Vec<MemoryRange> = view::inventory(inner)?.used.into_iter().map(|(r, _)| r).collect();
    let area = {
        let mut state = inner.state();
        if state.peers.contains_key(&(a, b)) {
            return Ok(()); // the other one's boot, at the same time, was first
        }
        let mut used = taken;
        used.extend(state.claims.iter().map(|(_, r, _)| *r));
        let area = alloc::place_high(&pool, &used, inner.config.peer_area)?;
        state.peers.insert((a, b), area);
        area
    };
    add(inner, a, b, area).map_err(|e| {
        inner.state().peers.remove(&(a, b));
        PlatformError::os(format!("set up the link {a}-{b} at {:#x}", area.base), e)
    })
}
