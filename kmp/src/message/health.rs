//! 0x01xx: is user space alive, and how does it do.

use serde::{Deserialize, Serialize};

use super::wire::{is_zero, short, short_option};

/// CPU figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuMetrics {
    /// CPUs online.
    pub online: u32,
    /// Share of CPU time not idle since the sample before, 0 to 100.
    #[serde(rename = "busy", with = "short")]
    pub busy_percent: f64,
    /// Load average over one minute.
    #[serde(with = "short")]
    pub load1: f64,
    /// PSI `some` avg10 in percent, when the kernel has it.
    #[serde(rename = "psi", with = "short_option", skip_serializing_if = "Option::is_none")]
    pub pressure: Option<f64>,
}

/// Memory figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryMetrics {
    /// Bytes.
    pub total: u64,
    /// Bytes that could be had without swapping.
    #[serde(rename = "avail")]
    pub available: u64,
    /// PSI `some` avg10 in percent.
    #[serde(rename = "psi", with = "short_option", skip_serializing_if = "Option::is_none")]
    pub pressure: Option<f64>,
}

/// I/O figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoMetrics {
    /// How long the agent's probe write took, microseconds.
    pub probe_us: u64,
    /// PSI `some` avg10 in percent.
    #[serde(rename = "psi", with = "short_option", skip_serializing_if = "Option::is_none")]
    pub pressure: Option<f64>,
}

/// What an agent measures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuMetrics>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMetrics>,
    /// I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoMetrics>,
}

/// Asks for a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeartbeatReq {
    /// Whether the answer should carry metrics.
    pub metrics: bool,
    /// What the agent's guardian is to do: 0 restarts the agent when it ends, [`GUARDIAN_OFF`] never
    /// restarts it, anything else also restarts it when it was stuck for so many milliseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub guardian_ms: u32,
    /// This kernel is the one that serves: its workloads may begin.
    #[serde(skip_serializing_if = "is_zero")]
    pub serves: bool,
}

/// [`HeartbeatReq::guardian_ms`] of a guardian that restarts nothing: the operator is told only.
pub const GUARDIAN_OFF: u32 = u32::MAX;

/// A heartbeat. With every field present its frame stays under 256 bytes, which the vsock transport
/// carries on one interrupt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeartbeatRsp {
    /// Life of the instance.
    #[serde(rename = "inc")]
    pub incarnation: u64,
    /// Nanoseconds since its kernel booted.
    #[serde(rename = "up_ns", skip_serializing_if = "Option::is_none")]
    pub uptime_ns: Option<u64>,
    /// Process id of the agent.
    #[serde(rename = "pid", skip_serializing_if = "Option::is_none")]
    pub agent_pid: Option<u32>,
    /// Metrics, empty when not asked for.
    pub metrics: Metrics,
    /// How often the guardian has restarted the agent since the kernel booted.
    #[serde(rename = "rst", skip_serializing_if = "is_zero")]
    pub agent_restarts: u32,
}

/// How an agent judges its own instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthLevel {
    /// Nothing to report.
    #[default]
    Ok,
    /// Works, with trouble.
    Degraded,
    /// Will not work much longer.
    Critical,
    /// A level of a later version.
    #[serde(other)]
    Unknown,
}

/// A report the agent sends by itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthStatus {
    /// How bad.
    pub level: HealthLevel,
    /// Why, for the operator.
    pub reason: String,
    /// Figures at that time.
    pub metrics: Metrics,
}
