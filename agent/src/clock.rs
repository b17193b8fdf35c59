//! Time without a runtime.

use std::time::Duration;

use nix::poll::PollTimeout;
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since boot: what KMP headers carry.
pub fn boot_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(|t| (t.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec() as u64))
        .unwrap_or(0)
}

/// Time since boot without time asleep: a machine that slept does not make anybody late.
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|t| Duration::new(t.tv_sec() as u64, t.tv_nsec() as u32))
        .unwrap_or_default()
}

/// A wait for poll(2), rounded up: waking early would turn in vain.
pub fn poll_timeout(wait: Duration) -> Option<PollTimeout> {
    PollTimeout::try_from(i32::try_from(wait.as_nanos().div_ceil(1_000_000)).ok()?).ok()
}
