//! A platform on which a farm's instances are found running. Connections and frames are real; the pulse is
//! read from memory, as on real kernels, and always moves.

use std::path::PathBuf;

use async_trait::async_trait;
use kmorph_platform::{
    BootRequest, Booted, ConsoleLog, CpuPulse, ExistingInstance, FenceReport, InstanceId, InstanceSpec,
    Inventory, KernelState, MemoryRange, Platform, PlatformError, PlatformEvent, PlatformKind, PulseSample,
    ReclaimReport, Stream,
};
use kmp::stand_in::names;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Life of every instance of a farm.
pub const INCARNATION: u64 = 1;
/// Kernel release of every instance of a farm.
pub const RELEASE: &str = "6.6.0-farm";
const MEMORY: u64 = 1 << 20;

/// What instance `id` is.
pub fn spec(id: u16) -> InstanceSpec {
    InstanceSpec {
        name: format!("i{id:05}"),
        id: InstanceId(id),
        cpus: vec![u32::from(id)],
        memory_bytes: MEMORY,
        memory_base: None,
    }
}

/// Memory of instance `id`.
pub fn region(id: u16) -> MemoryRange {
    MemoryRange { base: u64::from(id) * MEMORY, size: MEMORY }
}

/// The platform.
pub struct Farm {
    dir: PathBuf,
    count: u16,
    began: Instant,
}

impl Farm {
    /// Over the sockets in a folder.
    pub fn new(dir: PathBuf, count: u16) -> Farm {
        Farm { dir, count, began: Instant::now() }
    }
}

fn never<T>() -> Result<T, PlatformError> {
    Err(PlatformError::Invalid("a farm's instances are neither started nor stopped".into()))
}

#[async_trait]
impl Platform for Farm {
    fn kind(&self) -> PlatformKind {
        PlatformKind::Process
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        let used = (1..=self.count).map(|id| (region(id), InstanceId(id))).collect();
        Ok(Inventory { cpus: Vec::new(), pool: Vec::new(), used, memory_block: 0 })
    }

    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError> {
        let one = |id| ExistingInstance {
            id: InstanceId(id),
            incarnation: INCARNATION,
            region: region(id),
            cpus: vec![u32::from(id)],
            running: true,
        };
        Ok((1..=self.count).map(one).collect())
    }

    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>> {
        None
    }

    async fn check(&self, _: &BootRequest) -> Result<(), PlatformError> {
        never()
    }

    async fn boot(&self, _: &BootRequest) -> Result<Booted, PlatformError> {
        never()
    }

    fn pulse(&self, id: InstanceId, _: u64) -> Result<PulseSample, PlatformError> {
        let count = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(PulseSample {
            state: KernelState::Ready,
            nonce: u64::from(id.0),
            cpus: vec![CpuPulse { number: 0, count }],
        })
    }

    async fn fence(&self, _: InstanceId, _: u64) -> Result<FenceReport, PlatformError> {
        never()
    }

    async fn reclaim(&self, _: InstanceId, _: u64, _: bool) -> Result<ReclaimReport, PlatformError> {
        never()
    }

    async fn release_cpus(&self, _: &[u32]) -> Result<(), PlatformError> {
        Ok(())
    }

    async fn connect(&self, id: InstanceId, _: u64, port: u32) -> Result<Box<dyn Stream>, PlatformError> {
        let path = self.dir.join(names::port(id.0, port));
        match UnixStream::connect(&path).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(e) => Err(PlatformError::Unavailable(format!("{}: {e}", path.display()))),
        }
    }

    async fn console(&self, id: InstanceId, _: u64) -> Result<ConsoleLog, PlatformError> {
        Err(PlatformError::Unknown(id))
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        Ok(())
    }
}
