//! What kernel instances run on.
//!
//! The supervisor drives every platform through one trait, [`Platform`]: it boots a kernel on CPUs
//! and memory of its own, watches its pulse, fences it, takes its resources back, and opens
//! connections to it. [`partition`] is the real thing: stock kernels started by `kmorph.ko`. [`process`] runs
//! stand-ins as processes.

mod file;
pub mod partition;
pub mod process;
mod types;
mod window;

use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

pub use types::*;

/// A byte stream to an instance.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Keys of windows have this bit, keys of instances' handover memory do not: they share one space, and workloads are
/// not told of keys with it.
pub const WINDOW: u64 = 1 << 63;

/// Runs kernel instances. Every method is safe to call again after a failure.
///
/// Methods that take an incarnation refuse with [`PlatformError::StaleIncarnation`] when the
/// instance has moved on, so a late caller never touches a successor.
#[async_trait]
pub trait Platform: Send + Sync + 'static {
    /// Which platform this is.
    fn kind(&self) -> PlatformKind;

    /// CPUs and memory of the machine and who has them.
    async fn inventory(&self) -> Result<Inventory, PlatformError>;

    /// Instances that run (or ran) here already, for a supervisor that was restarted.
    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError>;

    /// Events of all instances. Only the first call gets the receiver.
    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>>;

    /// Check a boot request and everything it names without changing anything.
    async fn check(&self, request: &BootRequest) -> Result<(), PlatformError>;

    /// Claim resources, load the kernel and start it. On failure everything is given back.
    async fn boot(&self, request: &BootRequest) -> Result<Booted, PlatformError>;

    /// One look at the liveness evidence of an instance. Cheap: called every few milliseconds.
    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError>;

    /// Stop every CPU of the instance and see it stopped. A report with `complete == false` means
    /// that an old owner may still run: nothing of the instance may be reused.
    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError>;

    /// Take CPUs and memory of a fenced instance back into the pool. `release_cpus` also returns
    /// the CPUs to the primary kernel (online). Refused unless the fence was complete.
    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        release_cpus: bool,
    ) -> Result<ReclaimReport, PlatformError>;

    /// Give a running instance more CPUs and memory, and wait until its kernel uses them, `limit` for each of both at
    /// most. It has to have been started with this growth announced. What it has already it is not given again, so
    /// this can be repeated. Nothing is taken from anybody: CPUs have to be the pool's or the primary's.
    async fn grow(
        &self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        limit: Duration,
    ) -> Result<Grown, PlatformError> {
        let _ = (id, incarnation, growth, limit);
        Err(PlatformError::unsupported("growing", self.kind()))
    }

    /// Give CPUs of the pool that no instance has back to the primary kernel. Others are left alone.
    async fn release_cpus(&self, cpus: &[u32]) -> Result<(), PlatformError>;

    /// Connect to a port of the instance.
    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        port: u32,
    ) -> Result<Box<dyn Stream>, PlatformError>;

    /// The instance's kernel log, oldest first, records with `seq >= from_seq` only. Works on a
    /// live kernel, and on a dead one until its memory is reclaimed.
    async fn console(&self, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError>;

    /// Reserve `size` bytes (a multiple of 2 MiB) that belong to no kernel, cleared, under a key that
    /// is not in use, not 0 and without the bit [`WINDOW`]. The region outlives the instances that map it, and this process.
    async fn handover_create(&self, key: u64, size: u64) -> Result<MemoryRange, PlatformError> {
        let _ = (key, size);
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// Let workloads of a running instance map a region, and read it. It loses that when it is fenced.
    async fn handover_share(&self, key: u64, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
        let _ = (key, id, incarnation);
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// Take a region from an instance that is not its writer. On success nothing of it maps the region.
    async fn handover_unshare(
        &self,
        key: u64,
        id: InstanceId,
        incarnation: u64,
    ) -> Result<(), PlatformError> {
        let _ = (key, id, incarnation);
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// Make an instance the region's only writer, or nobody. The writer before it is revoked first:
    /// writes of its workloads raise SIGBUS from then on. On [`PlatformError::Timeout`] it did not
    /// confirm that within `limit` and still is the writer; a fenced instance need not confirm.
    async fn handover_assign(
        &self,
        key: u64,
        id: Option<InstanceId>,
        limit: Duration,
    ) -> Result<HandoverMoved, PlatformError> {
        let _ = (key, id, limit);
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// Give a region's memory back to the pool. Refused while it is shared with an instance.
    async fn handover_destroy(&self, key: u64) -> Result<(), PlatformError> {
        let _ = key;
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// All regions there are that are no windows.
    async fn handover_list(&self) -> Result<Vec<HandoverRegion>, PlatformError> {
        Err(PlatformError::unsupported("handover memory", self.kind()))
    }

    /// Make a window: memory, a multiple of 2 MiB that is cleared, that workloads of the instance `from` write and those
    /// of `to` read, each named with its incarnation. The key has the bit [`WINDOW`] and is not in use. On failure nothing
    /// is left, unless an instance that was given it already does not answer: then the error says so.
    async fn window_open(
        &self,
        key: u64,
        size: u64,
        from: (InstanceId, u64),
        to: (InstanceId, u64),
    ) -> Result<(), PlatformError> {
        let _ = (key, size, from, to);
        Err(PlatformError::unsupported("windows", self.kind()))
    }

    /// Give a window back. What reads or writes it meanwhile gets errors. On [`PlatformError::Timeout`] an instance did not
    /// confirm within `limit` that nothing of it uses the window: it is there still, and can be closed when that instance is
    /// fenced. Closing one that is not there is no error.
    async fn window_close(&self, key: u64, limit: Duration) -> Result<(), PlatformError> {
        let _ = (key, limit);
        Ok(())
    }

    /// Keys of all windows there are, also of those that a daemon before this one left.
    async fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        Ok(vec![])
    }

    /// Give everything the platform took from the machine back (all instances must be gone).
    async fn release_all(&self) -> Result<(), PlatformError>;
}
