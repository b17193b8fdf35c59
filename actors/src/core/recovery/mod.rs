//! The life of an instance as its supervisor drives it: start, watch, fence, reclaim, restart.
//!
//! MONITORING → DETECTING_FAILURE → PREPARING_RECOVERY (fence) → CAPTURING_VMCORE (by policy) →
//! RECLAIMING_RESOURCES → RESTARTING → RECOVERY_COMPLETE → MONITORING. With a standby that is ready there is nothing to
//! start: after the fence the instance becomes that kernel (TAKING_OVER), and what the dead one had is taken back beside
//! that, by the record that stood for the standby before. A fence that is not complete stops in
//! PARTIAL_FENCE; an instance that fails too often, or whose resources cannot be had back, stops in DEGRADED.
//! A member of a group waits in HELD, with its resources taken back, until the group starts it.
//! Every step is journaled before it is taken: in the list of actions a `Journal` comes before the effect it
//! announces.

mod group;
mod machine;
mod resume;
mod standby;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::health::Cause;

pub use group::Standing;
pub use machine::Recovery;
pub use resume::{Duties, Found, Saved};

/// Where an instance is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Phase {
    /// It does not run and owns nothing.
    #[default]
    Stopped,
    /// Its kernel is being loaded and started.
    Booting,
    /// Its kernel was started and has not served yet.
    AwaitingService,
    /// It is watched.
    Monitoring,
    /// It was declared dead; an operator has to decide.
    DetectingFailure,
    /// It is being fenced.
    PreparingRecovery,
    /// Its memory is being captured.
    CapturingVmcore,
    /// Its CPUs and memory are being taken back.
    ReclaimingResources,
    /// Its standby becomes the instance.
    TakingOver,
    /// It waits for its next start.
    Restarting,
    /// Not all of its CPUs could be seen stopped.
    PartialFence,
    /// Its resources are back; its group says when it starts again.
    Held,
    /// Given up.
    #[serde(alias = "FAILED")]
    Degraded,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 13] = [
        Phase::Stopped,
        Phase::Booting,
        Phase::AwaitingService,
        Phase::Monitoring,
        Phase::DetectingFailure,
        Phase::PreparingRecovery,
        Phase::CapturingVmcore,
        Phase::ReclaimingResources,
        Phase::TakingOver,
        Phase::Restarting,
        Phase::PartialFence,
        Phase::Held,
        Phase::Degraded,
    ];

    /// Name in the recovery log.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Stopped => "STOPPED",
            Phase::Booting | Phase::AwaitingService | Phase::Restarting | Phase::Held => "RESTARTING",
            Phase::Monitoring => "MONITORING",
            Phase::DetectingFailure => "DETECTING_FAILURE",
            Phase::PreparingRecovery => "PREPARING_RECOVERY",
            Phase::CapturingVmcore => "CAPTURING_VMCORE",
            Phase::ReclaimingResources => "RECLAIMING_RESOURCES",
            Phase::TakingOver => "TAKING_OVER",
            Phase::PartialFence => "PARTIAL_FENCE",
            Phase::Degraded => "DEGRADED",
        }
    }
}

/// What becomes of the instance once its resources are back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// Start it again.
    #[default]
    Restart,
    /// Leave it stopped, as an operator wants it.
    Stop,
    /// Leave it stopped: its first start failed.
    Undo,
    /// Leave it stopped: it failed too often.
    GiveUp,
}

/// What happens to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An operator wants it started.
    Spawn,
    /// An operator wants it recovered now.
    OperatorRecover,
    /// An operator wants it stopped.
    OperatorTerminate,
    /// It was declared dead; cause and evidence.
    Declared(Cause, String),
    /// Its kernel was started.
    Booted(String),
    /// It could not be started; everything was given back.
    BootError(String),
    /// It serves: pulse and heartbeat are there.
    Serving,
    /// The fence is done.
    FenceDone {
        /// Whether every CPU was seen stopped.
        complete: bool,
        /// What it found.
        detail: String,
    },
    /// The fence could not be carried out.
    FenceError(String),
    /// The dump is whole.
    CaptureDone(String),
    /// There is no whole dump.
    CaptureFailed(String),
    /// CPUs and memory are back.
    Reclaimed(String),
    /// They could not be taken back.
    ReclaimError(String),
    /// Whether a kernel waits that can become the instance.
    Standby(bool),
    /// It is the instance now, and was told to serve.
    TookOver(String),
    /// It is not, and never will be.
    NotTakenOver(String),
    /// The wait before a restart is over.
    RestartTimer,
    /// The policy was changed: waits count anew from now.
    PolicyChanged,
    /// Maintenance was turned on or off.
    Maintenance(bool),
    /// It became a member of a group, or is none any more.
    Grouped(bool),
    /// Its group wants it stopped, to start it again later; why.
    GroupStop(String),
    /// Its group wants it started.
    GroupStart,
    /// Its group was given up; why.
    GroupGiveUp(String),
    /// The daemon ends; the instance goes on.
    Shutdown,
}

/// How something an operator may wait for ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel was started.
    Started,
    /// The instance serves.
    Serving,
    /// It is stopped and owns nothing.
    Stopped,
    /// Its first start failed; everything was given back.
    BootFailed(String),
    /// An operator must look at it.
    PartialFence(String),
    /// It was given up.
    Degraded(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Number a new incident; the offsets of its steps count from now.
    OpenIncident,
    /// Write down what comes next.
    Journal {
        /// State after the step.
        phase: &'static str,
        /// What is done or was seen.
        detail: String,
        /// Set on the last step of an incident: whether the instance serves again.
        recovered: Option<bool>,
    },
    /// Stop every CPU of the instance.
    Fence,
    /// Capture its memory.
    Capture,
    /// Take CPUs and memory back.
    Reclaim {
        /// Also give the CPUs back to the primary kernel.
        release_cpus: bool,
    },
    /// Start it, as a new incarnation.
    Boot,
    /// Have its standby become the instance.
    TakeOver,
    /// Watch it as a kernel that comes up, or as one that was found running.
    Watch {
        /// Found running.
        adopted: bool,
    },
    /// Stop watching it.
    Unwatch,
    /// Ring [`Event::RestartTimer`] after this long.
    ArmRestart(Duration),
    /// Do not ring.
    DisarmRestart,
    /// Tell the group that the instance waits for its word.
    Held,
    /// Answer whoever waits.
    Settled(Outcome),
    /// Tell the operator that he has to do something.
    Alert(String),
    /// The operator's wish makes no sense now; text says why.
    Refuse(&'static str),
}
