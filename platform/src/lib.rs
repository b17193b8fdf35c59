//! What kernel instances run on.
//!
//! The supervisor drives every platform through one trait, [`Platform`]: it boots a kernel on CPUs
//! and memory of its own, watches its pulse, fences it, takes its resources back, and opens
//! connections to it. [`partition`] is the real thing: stock kernels started by `kmorph.ko`. [`process`] runs
//! stand-ins as processes.

pub mod partition;
pub mod process;
mod types;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

pub use types::*;

/// A byte stream to an instance.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

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

    /// Give everything the platform took from the machine back (all instances must be gone).
    async fn release_all(&self) -> Result<(), PlatformError>;
}
