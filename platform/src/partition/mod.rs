//! Stock kernels on offlined CPUs, started by `kmorph.ko`.
//!
//! Policy lives here, mechanism in the module: this side reads the kernel image, plans the region,
//! writes boot parameters and tables into it, and asks the module to start and stop CPUs.

mod abi;
mod acpi;
mod alloc;
mod boot;
mod bootparams;
pub(crate) mod bzimage;
mod events;
mod grow;
mod handover;
mod initramfs;
mod klog;
mod layout;
mod links;
mod pool;
mod sys;
mod view;
mod window;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_vsock::{VsockAddr, VsockStream};

use self::abi::request;
use self::sys::{Device, Mapping};
use crate::{
    BootRequest, Booted, ConsoleLog, CpuInfo, CpuState, ExistingInstance, FenceReport, Grown, Growth,
    HandoverMoved, HandoverRegion, InstanceId, Inventory, MemoryRange, Platform, PlatformError,
    PlatformEvent, PlatformKind, PulseSample, ReclaimReport, Stream, WINDOW,
};

/// How long taking back memory waits for the sockets of a dead instance, and how often it looks.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);
/// The kernel's list of memory blocks.
pub(crate) const MEMORY_BLOCKS: &str = "/sys/devices/system/memory";

/// Where instances' memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolSource {
    /// Every `memmap=size$base` of at least 64 MiB on the primary's command line.
    CommandLine,
    /// These ranges, reserved at boot.
    Reserved(Vec<MemoryRange>),
    /// This many bytes of movable memory, taken offline when the daemon starts.
    Offline(u64),
}

/// Settings of the partition platform.
#[derive(Clone, Debug)]
pub struct PartitionConfig {
    /// The module's device.
    pub device: PathBuf,
    /// Memory.
    pub pool: PoolSource,
    /// The agent binary put into every instance.
    pub agent: PathBuf,
    /// Module trees, searched in order; each has a folder per release.
    pub modules: Vec<PathBuf>,
    /// Bytes of each instance's vsock area.
    pub vsock_area: u64,
    /// Bytes of pool for the channel between two instances; 0: they get none.
    pub peer_area: u64,
    /// Longest wait for a connection to an instance.
    pub connect_timeout: Duration,
}

impl Default for PartitionConfig {
    fn default() -> Self {
        PartitionConfig {
            device: "/dev/kmorph".into(),
            pool: PoolSource::CommandLine,
            agent: "/usr/lib/kmorph/kmorph-agent".into(),
            modules: vec!["/lib/modules".into()],
            vsock_area: 8 << 20,
            peer_area: 2 << 20,
            connect_timeout: Duration::from_secs(2),
        }
    }
}

/// What is known of an instance that owns resources.
struct Live {
    incarnation: u64,
    region: MemoryRange,
    control: Arc<Mapping>,
    /// Where the log lies, found once a life.
    log: Option<klog::VmcoreInfo>,
}

#[derive(Default)]
struct State {
    live: HashMap<InstanceId, Live>,
    /// Regions and CPUs of boots under way: claimed here before the module knows of them.
    claims: Vec<(InstanceId, MemoryRange, Vec<u32>)>,
    /// Pool memory of the channels between two instances, lower id first.
    peers: HashMap<(InstanceId, InstanceId), MemoryRange>,
    /// Log of the last life, kept when its memory went back to the pool.
    last_log: HashMap<InstanceId, ConsoleLog>,
    /// Memory blocks this daemon took offline.
    offlined: Vec<MemoryRange>,
}

pub(crate) struct Inner {
    config: PartitionConfig,
    device: Device,
    tsc_khz: u32,
    state: Mutex<State>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held left only whole entries: every update is one insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The partition platform.
pub struct Partition {
    inner: Arc<Inner>,
    events: Mutex<Option<mpsc::Receiver<PlatformEvent>>>,
}

impl Partition {
    /// Open the device, set up the pool, adopt what already runs, and start reading events. Needs a
    /// tokio runtime.
    pub async fn open(config: PartitionConfig) -> Result<Partition, PlatformError> {
        let inner = blocking(move || {
            let device = Device::open(&config.device)?;
            let mut info: abi::Info = request();
            device.info(&mut info).map_err(|e| match e {
                Errno::EPROTO | Errno::EINVAL => PlatformError::Unavailable(format!(
                    "{} speaks another ABI than version {} of this daemon; load the kmorph.ko of the same release",
                    config.device.display(),
                    abi::ABI_VERSION
                )),
                e => PlatformError::os("ask kmorph.ko about the machine", e),
            })?;
            if info.role != 1 {
                return Err(PlatformError::Unavailable(
                    "kmorph.ko runs here in the instance role; kmorphd belongs on the primary kernel".into(),
                ));
            }
            let inner = Inner { tsc_khz: info.tsc_khz, config, device, state: Mutex::default() };
            let offlined = pool::set_up(&inner)?;
            inner.state().offlined = offlined;
            view::adopt(&inner)?;
            Ok(Arc::new(inner))
        })
        .await?;
        let events = events::start(inner.clone())?;
        Ok(Partition { inner, events: Mutex::new(Some(events)) })
    }

    fn current(&self, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
        check(&self.inner.state(), id, incarnation)
    }
}

fn check(state: &State, id: InstanceId, asked: u64) -> Result<(), PlatformError> {
    match state.live.get(&id) {
        None => Err(PlatformError::Unknown(id)),
        Some(l) if l.incarnation != asked => {
            Err(PlatformError::StaleIncarnation { id, asked, current: l.incarnation })
        }
        Some(_) => Ok(()),
    }
}

/// Run something that blocks off the async threads.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, PlatformError> + Send + 'static,
) -> Result<T, PlatformError> {
    tokio::task::spawn_blocking(f).await.map_err(|e| PlatformError::os("run a platform task", e))?
}

#[async_trait]
impl Platform for Partition {
    fn kind(&self) -> PlatformKind {
        PlatformKind::Partition
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || view::inventory(&inner)).await
    }

    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || view::existing(&inner)).await
    }

    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn check(&self, request: &BootRequest) -> Result<(), PlatformError> {
        let (inner, request) = (self.inner.clone(), request.clone());
        blocking(move || boot::prepare(&inner, &request).map(|_| ())).await
    }

    async fn boot(&self, request: &BootRequest) -> Result<Booted, PlatformError> {
        let (inner, request) = (self.inner.clone(), request.clone());
        blocking(move || boot::boot(&inner, &request)).await
    }

    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
        let control = {
            let state = self.inner.state();
            check(&state, id, incarnation)?;
            state.live.get(&id).map(|l| l.control.clone()).ok_or(PlatformError::Unknown(id))?
        };
        Ok(view::pulse(&control))
    }

    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError> {
        self.current(id, incarnation)?;
        let inner = self.inner.clone();
        blocking(move || boot::fence(&inner, id)).await
    }

    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        release_cpus: bool,
    ) -> Result<ReclaimReport, PlatformError> {
        self.current(id, incarnation)?;
        // A socket of the dead instance may be in the middle of a copy for a moment.
        let until = Instant::now() + SETTLE_LIMIT;
        loop {
            let inner = self.inner.clone();
            match blocking(move || boot::reclaim(&inner, id, release_cpus)).await {
                Err(PlatformError::Busy(_)) if Instant::now() < until => sleep(SETTLE_PAUSE).await,
                done => return done,
            }
        }
    }

    async fn grow(
        &self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        limit: Duration,
    ) -> Result<Grown, PlatformError> {
        self.current(id, incarnation)?;
        grow::grow(&self.inner, id, growth, limit).await
    }

    async fn release_cpus(&self, cpus: &[u32]) -> Result<(), PlatformError> {
        let (inner, cpus) = (self.inner.clone(), cpus.to_vec());
        blocking(move || {
            let pooled = view::cpus(&inner)?.into_iter().filter(|c| c.state == CpuState::Pool);
            for cpu in pooled.filter(|c| cpus.contains(&c.apic_id)) {
                boot::give_cpu(&inner, cpu.apic_id);
            }
            Ok(())
        })
        .await
    }

    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        port: u32,
    ) -> Result<Box<dyn Stream>, PlatformError> {
        self.current(id, incarnation)?;
        let limit = self.inner.config.connect_timeout;
        let what = || format!("connect to instance {id} (CID {}) port {port}", id.cid());
        match tokio::time::timeout(limit, VsockStream::connect(VsockAddr::new(id.cid(), port))).await {
            Err(_) => Err(PlatformError::Timeout { what: what(), limit }),
            Ok(Err(e)) => Err(PlatformError::os(what(), e)),
            Ok(Ok(stream)) => Ok(Box::new(stream)),
        }
    }

    async fn console(&self, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || view::console(&inner, id, from_seq)).await
    }

    async fn handover_create(&self, key: u64, size: u64) -> Result<MemoryRange, PlatformError> {
        if key & WINDOW != 0 {
            return Err(PlatformError::Invalid(format!(
                "{key:#x} is a key of a window: give handover memory one without the highest bit"
            )));
        }
        let inner = self.inner.clone();
        blocking(move || handover::create(&inner, key, size)).await
    }

    async fn handover_share(&self, key: u64, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
        self.current(id, incarnation)?;
        let inner = self.inner.clone();
        blocking(move || handover::share(&inner, key, id, incarnation)).await
    }

    async fn handover_unshare(
        &self,
        key: u64,
        id: InstanceId,
        incarnation: u64,
    ) -> Result<(), PlatformError> {
        self.current(id, incarnation)?;
        let inner = self.inner.clone();
        blocking(move || handover::unshare(&inner, key, id, incarnation, handover::UNSHARE_LIMIT)).await
    }

    async fn handover_assign(
        &self,
        key: u64,
        id: Option<InstanceId>,
        limit: Duration,
    ) -> Result<HandoverMoved, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || handover::assign(&inner, key, id, limit)).await
    }

    async fn handover_destroy(&self, key: u64) -> Result<(), PlatformError> {
        let inner = self.inner.clone();
        blocking(move || handover::destroy(&inner, key)).await
    }

    async fn handover_list(&self) -> Result<Vec<HandoverRegion>, PlatformError> {
        let inner = self.inner.clone();
        let mut all = blocking(move || handover::list(&inner)).await?;
        all.retain(|region| region.key & WINDOW == 0);
        Ok(all)
    }

    async fn window_open(
        &self,
        key: u64,
        size: u64,
        from: (InstanceId, u64),
        to: (InstanceId, u64),
    ) -> Result<(), PlatformError> {
        let inner = self.inner.clone();
        blocking(move || window::open(&inner, key, size, from, to)).await
    }

    async fn window_close(&self, key: u64, limit: Duration) -> Result<(), PlatformError> {
        let inner = self.inner.clone();
        blocking(move || window::close(&inner, key, limit)).await
    }

    async fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || window::list(&inner)).await
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        let inner = self.inner.clone();
        blocking(move || pool::release(&inner)).await
    }
}

fn cpu_info(cpu: &abi::Cpu, boot_apicid: u32) -> CpuInfo {
    CpuInfo {
        apic_id: cpu.apicid,
        number: cpu.cpu,
        state: match cpu.state {
            abi::cpu_state::ONLINE => CpuState::Online,
            abi::cpu_state::TAKEN => CpuState::Pool,
            abi::cpu_state::LENT => CpuState::Lent,
            _ => CpuState::Offline,
        },
        owner: (cpu.state == abi::cpu_state::LENT)
            .then(|| u16::try_from(cpu.instance).ok().map(InstanceId))
            .flatten(),
        boot: cpu.apicid == boot_apicid,
    }
}
