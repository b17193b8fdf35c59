//! Shapes shared by all platforms.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Identifies an instance: 1 to 511, on the process platform 1 to 65533; 0 is the primary kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub u16);

impl InstanceId {
    /// The primary kernel.
    pub const PRIMARY: InstanceId = InstanceId(0);

    /// The vsock context id of this instance: id + 2, so the primary is CID 2.
    pub fn cid(self) -> u32 {
        u32::from(self.0) + 2
    }
}

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The kinds of platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlatformKind {
    /// Stock kernels started on offlined CPUs by `kmorph.ko`.
    Partition,
    /// A kernel with the upstream multikernel patches.
    Multikernel,
    /// Kernel stand-ins as processes.
    Process,
}

impl std::fmt::Display for PlatformKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PlatformKind::Partition => "partition",
            PlatformKind::Multikernel => "multikernel",
            PlatformKind::Process => "process",
        })
    }
}

/// Who has a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuState {
    /// Runs the primary kernel.
    Online,
    /// Offline in the primary, free.
    Offline,
    /// Taken from the primary, free for an instance.
    Pool,
    /// Belongs to an instance.
    Lent,
}

/// One CPU of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuInfo {
    /// Physical id (x86: APIC id).
    pub apic_id: u32,
    /// Number in the primary kernel.
    pub number: u32,
    /// Who has it.
    pub state: CpuState,
    /// The owner when `state` is `Lent`.
    pub owner: Option<InstanceId>,
    /// The boot processor can never be lent.
    pub boot: bool,
}

/// A range of physical memory, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemoryRange {
    /// First byte.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl MemoryRange {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &MemoryRange) -> bool {
        self.base < other.end() && other.base < self.end()
    }
}

/// CPUs and memory of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// All CPUs.
    pub cpus: Vec<CpuInfo>,
    /// Memory the platform may give to instances.
    pub pool: Vec<MemoryRange>,
    /// Parts of the pool in use, with their owner.
    pub used: Vec<(MemoryRange, InstanceId)>,
    /// A running instance gets memory in multiples of this many bytes; 0: it cannot get any.
    pub memory_block: u64,
}

impl Inventory {
    /// Bytes of the largest piece of the pool nobody has, from one multiple of 2 MiB on.
    pub fn largest_free(&self) -> u64 {
        const ALIGN: u64 = 2 << 20;
        let mut used: Vec<MemoryRange> = self.used.iter().map(|(r, _)| *r).collect();
        used.sort_by_key(|r| r.base);
        let mut largest = 0;
        for range in &self.pool {
            let mut at = range.base;
            let end = MemoryRange { base: range.end(), size: 0 };
            for next in used.iter().filter(|u| u.overlaps(range)).chain([&end]) {
                let from = at.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
                largest = largest.max(next.base.saturating_sub(from));
                at = at.max(next.end());
            }
        }
        largest
    }

    /// Bytes of the pool nobody has.
    pub fn free_bytes(&self) -> u64 {
        let total: u64 = self.pool.iter().map(|r| r.size).sum();
        total.saturating_sub(self.used.iter().map(|(r, _)| r.size).sum())
    }
}

/// What an instance is made of, as its definition says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Name, unique.
    pub name: String,
    /// Number, unique.
    pub id: InstanceId,
    /// Physical CPU ids; the first one boots.
    pub cpus: Vec<u32>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Fixed place of the memory, when the definition gives one.
    pub memory_base: Option<u64>,
}

/// What an instance gets while it runs, beside what it is started with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// Physical CPU ids, in the order in which the kernel numbers them.
    pub cpus: Vec<u32>,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Growth {
    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.cpus.is_empty() && self.memory_bytes == 0
    }
}

/// What an instance got while it ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grown {
    /// CPUs its kernel uses now.
    pub cpus: Vec<u32>,
    /// Memory its kernel uses now, beside its region.
    pub memory: Vec<MemoryRange>,
    /// What it was to get and did not, and why; empty when it has everything.
    pub failed: Vec<String>,
    /// How long it took until the memory was in use.
    pub memory_took: Duration,
    /// How long it took until the CPUs were.
    pub cpus_took: Duration,
}

impl Grown {
    /// Bytes of memory beside the region.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().map(|r| r.size).sum()
    }
}

/// Everything that is needed to start a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRequest {
    /// The instance.
    pub spec: InstanceSpec,
    /// Grows by one with every start of this instance; never 0.
    pub incarnation: u64,
    /// A 64-bit bzImage.
    pub kernel: PathBuf,
    /// The user's initramfs; without one the agent is all of user space.
    pub initramfs: Option<PathBuf>,
    /// Appended to the command line the platform needs.
    pub cmdline: String,
    /// How often the kernel's pulse is asked to beat.
    pub pulse_period: Duration,
    /// What it is to get later, by [`Platform::grow`](crate::Platform::grow). Nothing of it is claimed yet, but the
    /// kernel has to know of it when it starts.
    pub growth: Growth,
}

/// A kernel that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// Its memory.
    pub region: MemoryRange,
    /// Its CPUs.
    pub cpus: Vec<u32>,
    /// The release read from the image.
    pub release: String,
    /// How long claiming, loading and starting took.
    pub took: Duration,
}

/// An instance found by a supervisor that starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExistingInstance {
    /// Number.
    pub id: InstanceId,
    /// Incarnation given at its boot.
    pub incarnation: u64,
    /// Memory.
    pub region: MemoryRange,
    /// CPUs.
    pub cpus: Vec<u32>,
    /// Whether it was started and not stopped since.
    pub running: bool,
}

/// What the instance's kernel says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelState {
    /// The substrate is not loaded in it yet.
    Absent,
    /// Loaded and pulsing.
    Ready,
    /// It panicked; the text is the reason.
    Panicked(String),
    /// It tried to reboot or halt and was parked; the text says how.
    Parked(String),
    /// Its substrate module was unloaded: there is no pulse any more.
    Left,
}

/// Pulse of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPulse {
    /// CPU number inside the instance.
    pub number: u32,
    /// Beats since boot.
    pub count: u64,
}

/// One look at an instance's pulse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulseSample {
    /// State word.
    pub state: KernelState,
    /// Random number of this boot; 0 while `Absent`.
    pub nonce: u64,
    /// One entry for each CPU that is online in the instance.
    pub cpus: Vec<CpuPulse>,
}

/// What a fence reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceReport {
    /// Every CPU, and whether it was seen stopped.
    pub cpus: Vec<(u32, bool)>,
    /// True when all of them were.
    pub complete: bool,
    /// How long it took.
    pub took: Duration,
}

/// Memory that workloads of several instances map at the same time; one of them at the most may write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverRegion {
    /// Chosen by who created it; workloads ask for the region by it.
    pub key: u64,
    /// Where it is.
    pub range: MemoryRange,
    /// The instance that may write.
    pub writer: Option<InstanceId>,
    /// The instances that may map it.
    pub shared: Vec<InstanceId>,
}

/// A handover region has got another writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverMoved {
    /// How long the writer before took to confirm that it no longer is one; zero when there was none.
    pub revoke: Duration,
    /// How long the whole change took.
    pub took: Duration,
}

/// What was taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimReport {
    /// Memory back in the pool.
    pub region: MemoryRange,
    /// CPUs back in the pool or in the primary.
    pub cpus: Vec<u32>,
    /// How long it took.
    pub took: Duration,
}

/// A change an instance's kernel or its transport reported by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformEvent {
    /// Which instance.
    pub id: InstanceId,
    /// Which of its lives.
    pub incarnation: u64,
    /// From the instance's own stamp to the moment the daemon's platform read it.
    pub age: Duration,
    /// What happened.
    pub kind: PlatformEventKind,
}

/// Kinds of [`PlatformEvent`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlatformEventKind {
    /// The kernel's substrate is up.
    Ready,
    /// Panic notice.
    Panic(String),
    /// A reboot or halt was caught.
    Parked(String),
    /// The channel to it works.
    LinkUp,
    /// The other side of the channel left.
    LinkDown,
    /// Its substrate was unloaded.
    Left,
    /// Events were lost: look at everything again.
    Lost(u32),
}

/// One record of a kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleRecord {
    /// Sequence number in that kernel's log.
    pub seq: u64,
    /// Nanoseconds since that kernel's boot.
    pub ts_ns: u64,
    /// syslog level, 0 to 7.
    pub level: u8,
    /// Text without its newline.
    pub text: String,
}

/// A piece of kernel log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLog {
    /// Records, oldest first.
    pub records: Vec<ConsoleRecord>,
    /// Where to go on: pass as `from_seq`.
    pub next_seq: u64,
    /// Said when the log could only be read in part, and why.
    pub note: Option<String>,
}

/// Why a platform could not do something. Each text names what, where and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// The platform cannot work on this machine as it is.
    #[error("{0}")]
    Unavailable(String),
    /// A request names something that does not exist or is not valid.
    #[error("{0}")]
    Invalid(String),
    /// CPUs or memory are not there or belong to somebody.
    #[error("{0}")]
    Busy(String),
    /// The kernel image, initramfs or a module is not usable.
    #[error("{0}")]
    BadImage(String),
    /// No such instance here.
    #[error("instance {0} does not run on this platform")]
    Unknown(InstanceId),
    /// The caller speaks of a life of the instance that is over.
    #[error("instance {id} is in incarnation {current}, not {asked}")]
    StaleIncarnation {
        /// Instance.
        id: InstanceId,
        /// What the caller asked for.
        asked: u64,
        /// What runs.
        current: u64,
    },
    /// The instance is not fenced, so its resources may be in use.
    #[error("instance {0} is not fenced: its CPUs may still run; nothing was taken back")]
    NotFenced(InstanceId),
    /// The operating system refused.
    #[error("{what}: {error}")]
    Os {
        /// What was tried.
        what: String,
        /// What it said.
        error: String,
    },
    /// Something took longer than its limit.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What was tried.
        what: String,
        /// The limit.
        limit: Duration,
    },
}

impl PlatformError {
    /// This kind of platform cannot do what was asked, ever.
    pub fn unsupported(what: &str, kind: PlatformKind) -> Self {
        PlatformError::Unavailable(format!("{what} is not supported on the {kind} platform"))
    }

    /// An operating-system error with what was tried.
    pub fn os(what: impl Into<String>, error: impl std::fmt::Display) -> Self {
        PlatformError::Os { what: what.into(), error: error.to_string() }
    }
}
