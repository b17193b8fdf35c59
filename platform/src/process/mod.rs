//! Kernel stand-ins as processes: the same supervisor and the same KMP without a kernel, a module or root.
//!
//! A stand-in is `kmorph-agent stand-in`. It beats in a control file, serves KMP on a Unix socket named
//! `<dir>/<cid>_<port>`, and misbehaves on demand. It outlives the daemon. `docs/process-platform.md` has the
//! layout of the folder and the order of steps.

mod adopt;
mod boot;
mod claim;
mod console;
mod events;
mod fence;
mod find;
mod folder;
mod grow;
mod image;
mod leader;
mod state;
mod sys;
mod view;
mod window;

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

use self::events::Outbox;
use self::folder::Folder;
use self::image::Releases;
use self::state::{MEMORY_BASE, State, Task};
use crate::{
    BootRequest, Booted, ConsoleLog, ExistingInstance, FenceReport, Grown, Growth, InstanceId, Inventory,
    MemoryRange, Platform, PlatformError, PlatformEvent, PlatformKind, PulseSample, ReclaimReport, Stream,
};

/// Starts at once: more only make each other slow.
const STARTS: usize = 8;

/// Settings of the process platform.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Run-time folder, made if missing. A tmpfs suits best; its path must be short.
    pub dir: PathBuf,
    /// The kmorph-agent program.
    pub agent: PathBuf,
    /// CPUs of the pretended machine; CPU 0 is never lent.
    pub cpus: u32,
    /// Bytes of memory of the pretended machine.
    pub memory: u64,
}

pub(crate) struct Inner {
    config: ProcessConfig,
    folder: Folder,
    releases: Releases,
    outbox: Arc<Outbox>,
    starts: Semaphore,
    state: Mutex<State>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held left only whole entries: every update is one insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(&self) -> MemoryRange {
        MemoryRange { base: MEMORY_BASE, size: self.config.memory.min(u64::MAX - MEMORY_BASE) }
    }
}

/// The process platform.
pub struct Process {
    inner: Arc<Inner>,
    events: Mutex<Option<mpsc::Receiver<PlatformEvent>>>,
    _tasks: [Task; 2],
    /// Held: one daemon in a folder.
    _lock: File,
}

impl Process {
    /// Make or check the folder, adopt what already runs, and start reading events. Needs a tokio runtime.
    pub async fn open(config: ProcessConfig) -> Result<Process, PlatformError> {
        let (outbox, events) = Outbox::new();
        let teller = outbox.clone();
        if config.cpus < 2 || config.memory == 0 {
            return Err(PlatformError::Invalid(format!(
                "a machine of {} CPUs and {} bytes has nothing to give: CPU 0 stays with the primary, so give at least 2 \
                 CPUs, and memory",
                config.cpus, config.memory
            )));
        }
        let (inner, lock) = blocking(move || {
            let folder = Folder::open(&config.dir)?;
            let lock = own(&folder)?;
            let inner = Arc::new(Inner {
                config,
                folder,
                releases: Releases::default(),
                outbox,
                starts: Semaphore::new(STARTS),
                state: Mutex::default(),
            });
            adopt::adopt(&inner)?;
            Ok((inner, lock))
        })
        .await?;
        let pump = tokio::spawn(events::pump(Arc::downgrade(&inner), events::bind(&inner)?));
        let teller = tokio::spawn(async move { teller.confess().await });
        let tasks = [Task(pump.abort_handle()), Task(teller.abort_handle())];
        Ok(Process { inner, events: Mutex::new(Some(events)), _tasks: tasks, _lock: lock })
    }
}

/// How often a folder in use is looked at again, and the wait between: a daemon that was killed while it started
/// something leaves a copy of itself that ends in a moment.
const LOOKS: u32 = 50;
const PAUSE_MS: u16 = 20;

fn own(folder: &Folder) -> Result<File, PlatformError> {
    let path = folder.path().join("lock");
    let lock = File::create(&path).map_err(|e| PlatformError::os(format!("make {}", path.display()), e))?;
    for _ in 0..LOOKS {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            // Before the platform works nothing else waits for this thread.
            Err(std::fs::TryLockError::WouldBlock) => drop(nix::poll::poll(&mut [], PAUSE_MS)),
            Err(std::fs::TryLockError::Error(e)) => {
                return Err(PlatformError::os(format!("lock {}", path.display()), e));
            }
        }
    }
    Err(PlatformError::Unavailable(format!(
        "run-time folder {}: another daemon uses it; stop that one or name another folder",
        folder.path().display()
    )))
}

/// Run something that blocks off the async threads.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, PlatformError> + Send + 'static,
) -> Result<T, PlatformError> {
    tokio::task::spawn_blocking(f).await.map_err(|e| PlatformError::os("run a platform task", e))?
}

#[async_trait]
impl Platform for Process {
    fn kind(&self) -> PlatformKind {
        PlatformKind::Process
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        Ok(self.inner.state().inventory(self.inner.config.cpus, self.inner.pool()))
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
        blocking(move || boot::check(&inner, &request)).await
    }

    async fn boot(&self, request: &BootRequest) -> Result<Booted, PlatformError> {
        let (inner, request) = (self.inner.clone(), request.clone());
        // In a task of its own: a caller that stops waiting must not leave half a start behind.
        let start = tokio::spawn(async move {
            let _turn = inner.starts.acquire().await.map_err(|e| PlatformError::os("wait for a start", e))?;
            let inner = inner.clone();
            blocking(move || boot::boot(&inner, &request)).await
        });
        start.await.map_err(|e| PlatformError::os("run a platform task", e))?
    }

    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
        view::pulse(&self.inner, id, incarnation)
    }

    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError> {
        fence::fence(&self.inner, id, incarnation).await
    }

    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        release_cpus: bool,
    ) -> Result<ReclaimReport, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || fence::reclaim(&inner, id, incarnation, release_cpus)).await
    }

    async fn grow(
        &self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        limit: Duration,
    ) -> Result<Grown, PlatformError> {
        let (inner, growth) = (self.inner.clone(), growth.clone());
        blocking(move || grow::grow(&inner, id, incarnation, &growth, limit)).await
    }

    async fn release_cpus(&self, cpus: &[u32]) -> Result<(), PlatformError> {
        self.inner.state().pooled.retain(|c| !cpus.contains(c));
        Ok(())
    }

    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        port: u32,
    ) -> Result<Box<dyn Stream>, PlatformError> {
        self.inner.state().current(id, incarnation)?;
        let path = self.inner.folder.port(id, port);
        match UnixStream::connect(&path).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(e) => Err(PlatformError::os(
                format!("connect to instance {id} port {port} at {}", path.display()),
                e,
            )),
        }
    }

    async fn console(&self, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || view::console(&inner, id, from_seq)).await
    }

    async fn window_open(
        &self,
        key: u64,
        size: u64,
        from: (InstanceId, u64),
        to: (InstanceId, u64),
    ) -> Result<(), PlatformError> {
        crate::window::check(key, size, from.0, to.0)?;
        for (id, incarnation) in [from, to] {
            self.inner.state().current(id, incarnation)?;
        }
        let inner = self.inner.clone();
        blocking(move || window::open(&inner.folder, key, size)).await
    }

    async fn window_close(&self, key: u64, _limit: Duration) -> Result<(), PlatformError> {
        crate::window::check_key(key)?;
        let inner = self.inner.clone();
        blocking(move || window::close(&inner.folder, key)).await
    }

    async fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        let inner = self.inner.clone();
        blocking(move || window::list(&inner.folder)).await
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        {
            let mut state = self.inner.state();
            let owners = state.live.keys().chain(state.booting.keys());
            if let Some(owner) = owners.min() {
                return Err(PlatformError::Busy(format!(
                    "instance {owner} still has CPUs and memory; terminate it first"
                )));
            }
            state.pooled.clear();
        }
        let inner = self.inner.clone();
        blocking(move || window::clear(&inner.folder)).await
    }
}
