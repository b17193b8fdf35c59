//! What requests carry and what they return.

use serde::{Deserialize, Serialize};

use crate::publish::Publish;

/// How an instance does, as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Defined, not started.
    Defined,
    /// Started, not yet seen healthy.
    Starting,
    /// Kernel and user space live.
    Healthy,
    /// One of the two signals is missing and is being looked into.
    Suspect,
    /// The kernel lives, its user space does not answer.
    AgentSilent,
    /// Declared dead, being recovered.
    Recovering,
    /// It was stopped by the operator.
    Stopped,
    /// Not every CPU could be seen stopped: an operator must look.
    PartialFence,
    /// Given up: it failed too often or could not be brought back; an operator decides.
    Degraded,
}

impl std::fmt::Display for InstanceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            InstanceState::Defined => "DEFINED",
            InstanceState::Starting => "STARTING",
            InstanceState::Healthy => "RUNNING",
            InstanceState::Suspect => "UNRESPONSIVE",
            InstanceState::AgentSilent => "AGENT-SILENT",
            InstanceState::Recovering => "RECOVERING",
            InstanceState::Stopped => "STOPPED",
            InstanceState::PartialFence => "PARTIAL-FENCE",
            InstanceState::Degraded => "DEGRADED",
        })
    }
}

/// `kmorphctl spawn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpawnArgs {
    /// Instance name, as kerf defined it.
    pub name: String,
    /// Absolute path of a bzImage.
    pub kernel: String,
    /// Replaces the part of the kernel command line that is the user's.
    pub cmdline: Option<String>,
    /// Absolute path of an initramfs.
    pub initramfs: Option<String>,
    /// Auto-heal: restart after a confirmed failure. `None` keeps the instance's policy.
    pub monitor: Option<bool>,
    /// Seconds without a heartbeat until the instance is suspected.
    pub heartbeat_timeout_s: Option<f64>,
    /// Seconds a kernel may take from start to its first heartbeat.
    pub boot_timeout_s: Option<f64>,
    /// Return when the instance is healthy (else when it was started).
    pub wait: bool,
    /// Services of it that the primary kernel offers.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// Bytes of handover memory, 0 for none; whole 2 MiB.
    #[serde(default)]
    pub handover_bytes: u64,
}

/// A published service and its connections, since the instance was started or the daemon was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PublishView {
    /// `<listen>=vsock:<port>`.
    pub publish: String,
    /// Whether clients can connect.
    pub listening: bool,
    /// Connections that are joined to the instance now.
    pub open: u64,
    /// Connections that wait for it now.
    pub waiting: u64,
    /// Connections of clients so far.
    pub accepted: u64,
    /// Connections so far that no kernel took, or that were reset.
    pub failed: u64,
    /// Longest wait of a connection until a kernel took it, microseconds.
    pub longest_wait_us: u64,
    /// How often a connection went on with another kernel.
    #[serde(default)]
    pub moved: u64,
}

/// A kernel that waits beside an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyView {
    /// `none`, `starting`, `ready`, `not-ready`, `in-use` or `being-removed`.
    pub state: String,
    /// Its name among the instances.
    pub name: String,
    /// Its kernel release, empty while it has none.
    pub release: String,
    /// Why there is none; empty when nothing is in the way.
    pub reason: String,
}

/// An instance, in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceView {
    /// Name.
    pub name: String,
    /// Number.
    pub id: u16,
    /// vsock context id.
    pub cid: u32,
    /// State.
    pub state: InstanceState,
    /// One sentence on the state.
    pub reason: String,
    /// What an operator can do about it; empty when nothing has to be done.
    pub advice: String,
    /// Watched, not acted on.
    pub maintenance: bool,
    /// The group it belongs to.
    pub group: Option<String>,
    /// How often its guardian restarted its agent in this incarnation.
    pub agent_restarts: u32,
    /// Running kernel release, empty when none.
    pub release: String,
    /// Kernel image path.
    pub kernel: String,
    /// Starts so far.
    pub incarnation: u64,
    /// Recoveries so far.
    pub recoveries: u64,
    /// Physical CPU ids.
    pub cpus: Vec<u32>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Memory base, when it has memory.
    pub memory_base: Option<u64>,
    /// Auto-heal.
    pub monitor: bool,
    /// Heartbeat timeout in milliseconds.
    pub heartbeat_timeout_ms: u64,
    /// Milliseconds since the last heartbeat answer.
    pub last_heartbeat_ms: Option<u64>,
    /// Milliseconds since the pulse was last seen to move.
    pub pulse_age_ms: Option<u64>,
    /// Seconds since this incarnation was started.
    pub uptime_s: Option<f64>,
    /// Incident under way.
    pub incident: Option<u64>,
    /// State of the morph that is under way.
    #[serde(default)]
    pub morph: Option<String>,
    /// It is one side of a morph of this instance.
    #[serde(default)]
    pub side_of: Option<String>,
    /// It is the standby of this instance.
    #[serde(default)]
    pub standby_of: Option<String>,
    /// Its standby, when it is to have one.
    #[serde(default)]
    pub standby: Option<StandbyView>,
    /// Bytes of its handover memory.
    #[serde(default)]
    pub handover_bytes: u64,
    /// Its published services.
    #[serde(default)]
    pub publish: Vec<PublishView>,
}

/// How far a morph goes without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MorphGoal {
    /// Until the new kernel runs beside the old one.
    Prepare,
    /// Until the new kernel is known to be well.
    Validate,
    /// Until it has taken over.
    Commit,
}

/// `kmorphctl morph`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MorphArgs {
    /// Instance name.
    pub name: String,
    /// Absolute path of the new kernel's bzImage; `None` goes on with the morph that is under way.
    pub kernel: Option<String>,
    /// Replaces the user's part of the kernel command line; `None` keeps it.
    pub cmdline: Option<String>,
    /// Absolute path of an initramfs; `None` keeps the one the old kernel was started with.
    pub initramfs: Option<String>,
    /// Physical ids of the CPUs the new kernel gets; empty: any that no instance has.
    pub cpus: Vec<u32>,
    /// Memory in bytes that it starts with; the rest it gets of the old kernel. `None`: as much as the instance has, if
    /// there is room.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// How far to go.
    pub goal: MorphGoal,
    /// Only say whether it could begin, and what the new kernel would get.
    pub dry_run: bool,
}

/// What becomes of the morphs of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupMorph {
    /// Begin: up to the question whether to commit.
    Validate,
    /// Begin, and commit all when all are valid; or commit those that wait.
    Commit,
    /// Roll all back that are under way.
    Rollback,
}

/// `kmorphctl morph group`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MorphGroupArgs {
    /// Group.
    pub group: String,
    /// Absolute path of the new kernel's bzImage; `None` goes on with the morphs that are under way.
    pub kernel: Option<String>,
    /// How far to go.
    pub what: GroupMorph,
    /// Each member is committed before the next begins, with its clients moved to the others before. With a kernel only.
    #[serde(default)]
    pub one_by_one: bool,
}

/// The other kernel of a morph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MorphSide {
    /// Name it has meanwhile.
    pub name: String,
    /// Kernel release, empty until it was started.
    pub release: String,
    /// Physical CPU ids.
    pub cpus: Vec<u32>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// CPUs it gets of the old kernel, when that is stopped.
    #[serde(default)]
    pub later_cpus: Vec<u32>,
    /// Memory it gets then.
    #[serde(default)]
    pub later_memory_bytes: u64,
}

/// One step of a morph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MorphStep {
    /// State.
    pub state: String,
    /// Milliseconds since the morph began (since the daemon was started, if that was later).
    pub at_ms: u64,
    /// What was done or seen.
    pub detail: String,
}

/// What a morph has copied of the state of workloads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferView {
    /// Sections that are handed over.
    pub sections: u64,
    /// Rounds of copying so far.
    pub rounds: u64,
    /// Bytes copied so far.
    pub bytes: u64,
    /// Bytes copied in the latest round.
    pub last_bytes: u64,
    /// Rate of the latest round in which the workload served, MiB/s.
    pub mib_per_s: f64,
    /// Bytes of rounds in which the workload served that went through memory both kernels have.
    #[serde(default)]
    pub shared_bytes: u64,
    /// Bytes that were sent for the others: less where they could be compressed.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Rate of the round that copied everything, MiB/s.
    #[serde(default)]
    pub full_mib_per_s: f64,
    /// Bytes copied so far in the round under way; 0 between rounds.
    #[serde(default)]
    pub round_bytes: u64,
    /// Rate of the round under way so far, MiB/s.
    #[serde(default)]
    pub round_mib_per_s: f64,
    /// Most by which the workload was held back from changing its state, in percent of its pace.
    #[serde(default)]
    pub throttled_percent: u64,
}

/// How long a workload stood still, phase by phase, in microseconds unless it says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlackoutView {
    /// When it began, microseconds since the Unix epoch.
    pub began_unix_us: u64,
    /// From the order to stand still until the new kernel's workload served and clients were sent there.
    pub total_us: u64,
    /// Until the workload stood still.
    pub freeze_us: u64,
    /// Until its last changes were in the new kernel.
    pub copy_us: u64,
    /// Until they were found to be right.
    pub check_us: u64,
    /// Until the commit record was written.
    pub record_us: u64,
    /// Until the new kernel's workload served.
    pub activate_us: u64,
    /// Bytes that were copied meanwhile.
    pub bytes: u64,
}

/// A morph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MorphView {
    /// Instance name.
    pub name: String,
    /// Number of the morph; its steps are in the recovery log under it.
    pub number: u64,
    /// State: RUNNING when none is under way.
    pub state: String,
    /// What it waits for, empty when it does not.
    pub waits_for: String,
    /// Kernel release it began with.
    pub from: String,
    /// Kernel release that serves now.
    pub release: String,
    /// The other kernel, when there is one.
    pub side: Option<MorphSide>,
    /// Set at its end: whether the new kernel took over.
    pub committed: Option<bool>,
    /// What was done so far.
    pub steps: Vec<MorphStep>,
    /// What was copied, when there is state to hand over.
    #[serde(default)]
    pub transfer: Option<TransferView>,
    /// How long the workload stood still, when it did.
    #[serde(default)]
    pub blackout: Option<BlackoutView>,
}

/// `kmorphctl heartbeat`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatView {
    /// Name.
    pub name: String,
    /// Requests sent in this incarnation.
    pub sent: u64,
    /// Answers.
    pub received: u64,
    /// Requests that got none in time.
    pub missed: u64,
    /// Missed in a row, now.
    pub missed_in_row: u64,
    /// Round trips in microseconds: last, smallest, mean, largest.
    pub rtt_last_us: Option<u64>,
    /// Smallest.
    pub rtt_min_us: Option<u64>,
    /// Mean.
    pub rtt_mean_us: Option<u64>,
    /// Largest.
    pub rtt_max_us: Option<u64>,
    /// Milliseconds since the last answer.
    pub last_ms: Option<u64>,
    /// Interval between requests, milliseconds.
    pub interval_ms: u64,
    /// Timeout, milliseconds.
    pub timeout_ms: u64,
    /// Longest a hang can go undeclared by this instance's policy, milliseconds.
    pub hang_bound_ms: u64,
    /// Milliseconds since the pulse last moved.
    pub pulse_age_ms: Option<u64>,
    /// Beats of the slowest CPU of the instance.
    pub pulse_count: Option<u64>,
}

/// `kmorphctl ping`: one heartbeat by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PingView {
    /// Name.
    pub name: String,
    /// Round trip in microseconds.
    pub rtt_us: u64,
    /// Incarnation that answered.
    pub incarnation: u64,
}

/// CPU figures of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuHealth {
    /// CPUs online.
    pub online: u32,
    /// Share of CPU time not idle since the sample before, 0 to 100.
    pub busy_percent: f64,
    /// Load average, one minute.
    pub load1: f64,
    /// PSI `some` avg10 in percent, when the kernel has it.
    pub pressure: Option<f64>,
}

/// Memory figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryHealth {
    /// Total bytes.
    pub total: u64,
    /// Available bytes.
    pub available: u64,
    /// PSI `some` avg10 in percent.
    pub pressure: Option<f64>,
}

/// I/O figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IoHealth {
    /// How long the agent's probe write took, microseconds.
    pub probe_us: u64,
    /// PSI `some` avg10 in percent.
    pub pressure: Option<f64>,
}

/// `kmorphctl health`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthView {
    /// Name.
    pub name: String,
    /// Milliseconds since the figures were taken.
    pub age_ms: u64,
    /// CPU.
    pub cpu: Option<CpuHealth>,
    /// Memory.
    pub memory: Option<MemoryHealth>,
    /// I/O.
    pub io: Option<IoHealth>,
}

/// One step of a recovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryStep {
    /// Incident number, shared by all steps of one recovery.
    pub incident: u64,
    /// Instance name.
    pub instance: String,
    /// Incarnation that failed.
    pub incarnation: u64,
    /// Wall clock, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// Microseconds since the failure was first noticed.
    pub offset_us: u64,
    /// State of the recovery machine after the step.
    pub phase: String,
    /// What was done or seen.
    pub detail: String,
    /// `true` on the last step when the instance serves again.
    pub recovered: Option<bool>,
}

/// `kmorphctl recovery-log`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecoveryLogArgs {
    /// Only this instance.
    pub instance: Option<String>,
    /// Only steps at or after this time, milliseconds since the Unix epoch.
    pub since_unix_ms: Option<u64>,
}

/// `kmorphctl daemon status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DaemonView {
    /// Version of kmorphd.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Platform in use.
    pub platform: String,
    /// Instances that run.
    pub running: usize,
    /// Instances known.
    pub instances: usize,
    /// CPUs: total, online in the primary, lent.
    pub cpus_total: usize,
    /// Online in the primary.
    pub cpus_online: usize,
    /// Lent to instances.
    pub cpus_lent: usize,
    /// Pool memory in bytes.
    pub pool_bytes: u64,
    /// Free pool memory in bytes.
    pub pool_free_bytes: u64,
    /// Longest the daemon's own loop was late, milliseconds.
    pub max_lag_ms: f64,
    /// How late 99 of 100 of its timers of the last seconds came at most, milliseconds.
    #[serde(default)]
    pub lag_p99_ms: f64,
    /// Address metrics are served at.
    pub metrics: Option<String>,
    /// Why the journal cannot be written now, when it cannot.
    pub store_trouble: Option<String>,
    /// Files the configuration was read from.
    pub config_files: Vec<String>,
}

/// One console record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConsoleLine {
    /// Sequence number.
    pub seq: u64,
    /// Seconds since that kernel booted.
    pub at_s: f64,
    /// syslog level.
    pub level: u8,
    /// Text.
    pub text: String,
}

/// A piece of an instance's kernel log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConsoleChunk {
    /// Lines, oldest first.
    pub lines: Vec<ConsoleLine>,
    /// Said when the log is partial or of an earlier life.
    pub note: Option<String>,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// An instance went from one state to another.
    State,
    /// A step of a recovery.
    Recovery,
    /// Something was noticed that changes no state.
    Notice,
    /// A policy was changed.
    Policy,
    /// Maintenance was turned on or off.
    Maintenance,
    /// A group acted.
    Group,
    /// A step of a morph.
    Morph,
    /// The daemon itself: started, reloaded, journal trouble.
    Daemon,
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EventKind::State => "state",
            EventKind::Recovery => "recovery",
            EventKind::Notice => "notice",
            EventKind::Policy => "policy",
            EventKind::Maintenance => "maintenance",
            EventKind::Group => "group",
            EventKind::Morph => "morph",
            EventKind::Daemon => "daemon",
        })
    }
}

/// One event. Numbers grow by one; a gap means that events were dropped for a reader that was too slow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// Number, from 1 at the start of the daemon.
    pub seq: u64,
    /// Wall clock, milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
    /// What it is about.
    pub kind: EventKind,
    /// The instance.
    pub instance: Option<String>,
    /// The group.
    pub group: Option<String>,
    /// The incident it belongs to.
    pub incident: Option<u64>,
    /// Which life of the instance.
    pub incarnation: Option<u64>,
    /// State before.
    pub from: Option<String>,
    /// State after.
    pub to: Option<String>,
    /// Why.
    pub cause: String,
    /// What is done about it.
    pub effect: String,
}

/// `kmorphctl events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsArgs {
    /// Only events of this instance (or of its group).
    pub instance: Option<String>,
    /// Only incident number.
    pub incident: Option<u64>,
    /// Only events at or after this time, milliseconds since the Unix epoch.
    pub since_unix_ms: Option<u64>,
}

/// One setting of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySetting {
    /// Name, as in `policy set`.
    pub key: String,
    /// Value.
    pub value: String,
    /// Where it comes from: default, config, operator.
    pub source: String,
    /// What it takes.
    pub allowed: String,
    /// What it is for.
    pub help: String,
}

/// `kmorphctl policy show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyView {
    /// The instance; `None` for the defaults.
    pub instance: Option<String>,
    /// Every setting.
    pub settings: Vec<PolicySetting>,
    /// Longest a hang can go undeclared by it, milliseconds.
    pub hang_bound_ms: u64,
}

/// One change of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyChange {
    /// The instance; `None` for the defaults.
    pub instance: Option<String>,
    /// Setting.
    pub key: String,
    /// Value before.
    pub from: String,
    /// Value after.
    pub to: String,
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadView {
    /// Files that were read.
    pub files: Vec<String>,
    /// Policies that changed.
    pub policies: Vec<PolicyChange>,
    /// Groups that changed, one sentence each.
    pub groups: Vec<String>,
    /// Keys that changed and need a restart of the daemon to take effect.
    pub restart_needed: Vec<String>,
}

/// A member of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// Instance.
    pub name: String,
    /// Its state; `None` when it is not defined.
    pub state: Option<InstanceState>,
    /// One sentence on it.
    pub reason: String,
}

/// `kmorphctl group show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupView {
    /// Name.
    pub name: String,
    /// one-for-one, one-for-all or rest-for-one.
    pub strategy: String,
    /// UP, RESTARTING, DEGRADED or STOPPED.
    pub state: String,
    /// One sentence on the state.
    pub reason: String,
    /// What an operator can do about it; empty when nothing has to be done.
    pub advice: String,
    /// Restarts allowed within the period.
    pub restart_intensity: u32,
    /// Length of the window, milliseconds.
    pub restart_period_ms: u64,
    /// Restarts within the window now.
    pub restarts: u32,
    /// The incident under way.
    pub incident: Option<u64>,
    /// Members in start order.
    pub members: Vec<GroupMember>,
}
