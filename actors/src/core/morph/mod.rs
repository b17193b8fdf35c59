//! Replacing the kernel of a running instance: what is decided and done at every step.
//!
//! `RUNNING -> MORPH_PREPARING -> MORPH_NEGOTIATING -> MORPH_TRANSFERRING -> MORPH_VALIDATING -> COMMITTING
//! -> MORPH_GROWING`, or `ROLLING_BACK`, `-> RUNNING`. The commit record in the journal is the decision: up to it every failure leads
//! back to the old kernel, after it everything goes forward to the new one. There is one way back from it: a new
//! kernel that is stopped before it has served anybody leaves the whole state with the old one, and a second record
//! says so.
//!
//! So that nobody waits for a disk while the workload stands still, the decision can be handed over: what is written down
//! before the freeze then says that the new kernel may take over by itself, which it does when it has everything. Whoever
//! gives such a morph up has to find out first whether it did, and sees to it that it never will. When it did, the commit
//! record is written after that, and there is no way back from there.

mod machine;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use machine::Morph;

/// Where a morph is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Phase {
    /// None is under way.
    #[default]
    Idle,
    /// The new kernel is started, both sides are told.
    Preparing,
    /// The new kernel runs beside the old one. An operator says how it goes on.
    Prepared,
    /// The two sides agree on what is handed over.
    Negotiating,
    /// State is copied while the old kernel serves.
    Transferring,
    /// The new kernel's health and the copied state are checked.
    Validating,
    /// All is well. An operator says when to commit.
    Validated,
    /// The old workload stands still; its last changes are copied and checked.
    Freezing,
    /// It is to be given up, and the new kernel may have taken over by itself.
    Withdrawing,
    /// The new kernel has taken over by itself: the commit record is being written, however long that takes.
    Taken,
    /// The commit record is being written. Whether it is cannot be known before that has ended.
    Recording,
    /// The commit record is written: the new kernel takes over.
    Committing,
    /// The new kernel serves, the old one is stopped: the new one gets what it had.
    Growing,
    /// The new kernel did not take over, and never will: a second record gives the instance back to the old one.
    Returning,
    /// The old kernel goes on, the new one is stopped and its resources are given back.
    RollingBack,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 15] = [
        Phase::Idle,
        Phase::Preparing,
        Phase::Prepared,
        Phase::Negotiating,
        Phase::Transferring,
        Phase::Validating,
        Phase::Validated,
        Phase::Freezing,
        Phase::Withdrawing,
        Phase::Taken,
        Phase::Recording,
        Phase::Committing,
        Phase::Growing,
        Phase::Returning,
        Phase::RollingBack,
    ];

    /// As operators see it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "RUNNING",
            Phase::Preparing | Phase::Prepared => "MORPH_PREPARING",
            Phase::Negotiating => "MORPH_NEGOTIATING",
            Phase::Transferring => "MORPH_TRANSFERRING",
            Phase::Validating | Phase::Validated | Phase::Freezing => "MORPH_VALIDATING",
            Phase::Taken | Phase::Recording | Phase::Committing => "COMMITTING",
            Phase::Growing => "MORPH_GROWING",
            Phase::Withdrawing | Phase::Returning | Phase::RollingBack => "ROLLING_BACK",
        }
    }

    /// Whether it waits for an operator.
    pub fn waits(self) -> bool {
        matches!(self, Phase::Prepared | Phase::Validated)
    }
}

/// How far to go without asking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// Until the new kernel runs beside the old one.
    #[default]
    Prepare,
    /// Until everything is known to be well.
    Validate,
    /// Until the new kernel has taken over.
    Commit,
}

/// What happens to a morph.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// An operator wants it to go this far. Begins one when none is under way.
    Go(Goal),
    /// It is to be given up: an operator wants that, or something makes it impossible; why.
    Cancel(String),
    /// The new kernel serves and both sides were told.
    Ready,
    /// Both sides agree on what is handed over.
    Agreed,
    /// A round of copying has ended.
    Round(Round),
    /// The new kernel is healthy, and what it has of the state is right.
    Valid,
    /// The old workload stands still, and the new kernel has its state, which is right.
    Frozen,
    /// The same, and the new kernel has taken over by itself.
    Taken,
    /// It was to be given up, and the new kernel had taken over.
    TakenAlready,
    /// The new kernel has not taken over, and never will.
    Withdrawn,
    /// The commit record is written.
    Recorded,
    /// It certainly is not; why.
    NotRecorded(String),
    /// It cannot be known whether it is.
    RecordUnknown,
    /// The new kernel has taken over, and has all it is to have.
    Activated,
    /// The new kernel has taken over, and is to get CPUs or memory of the old one.
    Grows,
    /// It has got them; otherwise what is missing and why.
    Grown(Option<String>),
    /// The new kernel is stopped and has never served anybody, although it was decided that it should; why.
    NotActivated(String),
    /// The instance is the old kernel again: that is written down.
    Returned,
    /// The old kernel goes on, of the new one nothing is left.
    Undone,
    /// What was under way failed; why.
    Failed(String),
    /// The old kernel died, was stopped, or is being recovered; why.
    OldGone(String),
    /// The new kernel died; why.
    NewGone(String),
    /// The time for this phase is over.
    Timeout,
    /// Limits were changed: the time for this phase counts anew from now.
    Limits(Limits),
    /// The daemon ends; both kernels go on as they are.
    Shutdown,
}

/// A round of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Round {
    /// Bytes that were copied.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// Share of its pace, in percent, by which the workload was held back from changing its state.
    pub throttled: u8,
}

/// What to do with a workload that changes its state faster than it can be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dirty {
    /// Roll back.
    #[default]
    GiveUp,
    /// Commit with a longer interruption.
    Accept,
    /// Have the workload change its state more slowly, until it can be copied. One that cannot is given up.
    Throttle,
}

/// Limits of a morph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Longest time in a phase that does not wait for an operator.
    pub phase: Duration,
    /// The last copy, with the workload standing still, should take no longer.
    pub downtime: Duration,
    /// Rounds of copying before that.
    pub rounds: u32,
    /// What to do when that is not enough.
    pub dirty: Dirty,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            phase: Duration::from_secs(60),
            downtime: Duration::from_millis(5),
            rounds: 16,
            dirty: Dirty::GiveUp,
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Write down what comes next.
    Journal {
        /// State after the step.
        phase: &'static str,
        /// What is done or was seen.
        detail: String,
        /// Set on the last step: whether the new kernel took over.
        committed: Option<bool>,
    },
    /// Start the new kernel, wait until it serves, tell both sides.
    Start,
    /// Have the two sides agree on what is handed over.
    Negotiate,
    /// Copy: everything in round 0, what changed since in later ones.
    Transfer {
        /// Number of the round.
        round: u32,
        /// Share of its pace, in percent, by which the workload is held back from now on.
        throttle: u8,
    },
    /// Check the new kernel and what it has.
    Validate {
        /// Before that let the workload go on unhindered: nobody knows how long the operator thinks.
        lift: bool,
    },
    /// Hold the traffic, freeze the workload, copy the last changes, check them. When the decision was handed over the new
    /// kernel takes over then.
    Freeze,
    /// Find out whether the new kernel has taken over by itself, and see to it that it never does when it has not.
    Withdraw,
    /// The new kernel serves: write the commit record, however long that takes.
    WriteDown,
    /// Write the commit record: from it on the instance is the new kernel.
    Record,
    /// See whether the commit record is there.
    LookUpRecord,
    /// Have the new kernel take over, release the traffic to it, stop the old one.
    Activate,
    /// Give the new kernel the CPUs and the memory that the old one had.
    Grow,
    /// Write a second record: the instance is the old kernel, whose workload still stands still.
    GiveBack,
    /// Stop what is under way, thaw the old workload, release the traffic to it, stop the new kernel and give back
    /// what it had.
    Undo,
    /// Ring [`Event::Timeout`] after this long. Arming again replaces.
    Arm(Duration),
    /// Do not ring.
    Disarm,
    /// Answer whoever waits.
    Settled(Outcome),
    /// Tell the operator that he has to do something.
    Alert(String),
    /// The operator's wish makes no sense now; text says why.
    Refuse(&'static str),
}

/// How something an operator may wait for ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It went this far, and waits.
    Reached(Goal),
    /// The new kernel serves.
    Committed,
    /// The old kernel goes on; why.
    RolledBack(String),
}

/// What has to be remembered of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Saved {
    /// Where it was.
    pub phase: Phase,
    /// How far it was to go.
    pub goal: Goal,
    /// Rounds of copying so far.
    pub rounds: u32,
    /// Why it is being rolled back.
    pub why: String,
}
