//! What a group asks of a member.

use super::{Action, Goal, Phase, Recovery};

impl Recovery {
    pub(super) fn set_grouped(&mut self, grouped: bool, out: &mut Vec<Action>) {
        self.grouped = grouped;
        if !grouped && self.phase == Phase::Held {
            self.start("it belongs to no group any more", out);
        }
    }

    /// Its resources are back: the group says when it starts.
    pub(super) fn hold(&mut self, detail: String, out: &mut Vec<Action>) {
        self.enter(Phase::Held, format!("{detail}; its group says when it starts"), out);
        out.push(Action::Held);
    }

    pub(super) fn group_stop(&mut self, why: String, out: &mut Vec<Action>) {
        if self.maintenance {
            return;
        }
        match self.phase {
            Phase::Monitoring | Phase::DetectingFailure => {
                if self.phase == Phase::Monitoring {
                    self.open(why.clone(), out);
                }
                (self.goal, self.blameless, self.go) = (Goal::Restart, true, false);
                self.prepare(&format!("{why}: stopping its CPUs"), out);
            }
            Phase::AwaitingService if !self.first => {
                (self.goal, self.blameless, self.go) = (Goal::Restart, true, false);
                self.prepare(&format!("{why}: stopping its CPUs"), out);
            }
            // An operator's start under way ends by itself; the group hears how.
            Phase::AwaitingService => {}
            Phase::Booting if !self.first => (self.blameless, self.go) = (true, false),
            Phase::TakingOver => (self.blameless, self.go) = (true, false),
            Phase::Booting => {}
            Phase::PreparingRecovery | Phase::CapturingVmcore | Phase::ReclaimingResources => self.go = false,
            Phase::Restarting => {
                out.push(Action::DisarmRestart);
                self.hold(why, out);
            }
            Phase::Held => out.push(Action::Held),
            Phase::Stopped | Phase::PartialFence | Phase::Degraded => {}
        }
    }

    pub(super) fn group_start(&mut self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Held if self.restarts.len() <= 1 || self.blameless || self.can_take_over() => {
                self.start("its group starts it", out);
            }
            Phase::Held => self.wait("its group starts it".into(), out),
            Phase::PreparingRecovery | Phase::CapturingVmcore | Phase::ReclaimingResources => {
                self.go = self.goal == Goal::Restart;
            }
            Phase::Stopped
            | Phase::Booting
            | Phase::TakingOver
            | Phase::AwaitingService
            | Phase::Monitoring
            | Phase::DetectingFailure
            | Phase::Restarting
            | Phase::PartialFence
            | Phase::Degraded => {}
        }
    }

    pub(super) fn group_give_up(&mut self, why: String, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Held | Phase::Restarting => {
                out.push(Action::DisarmRestart);
                (self.goal, self.why) = (Goal::GiveUp, why);
                self.enter(
                    Phase::ReclaimingResources,
                    "its group was given up: giving its CPUs back to the primary kernel",
                    out,
                );
                self.ask_back(true, out);
            }
            // Taken back already, or on the way: given up when that is done.
            Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver
                if self.goal == Goal::Restart =>
            {
                (self.goal, self.why) = (Goal::GiveUp, why);
            }
            Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver
            | Phase::Stopped
            | Phase::Booting
            | Phase::AwaitingService
            | Phase::Monitoring
            | Phase::DetectingFailure
            | Phase::PartialFence
            | Phase::Degraded => {}
        }
    }

    /// Where the instance stands, for its group.
    pub fn standing(&self) -> Standing {
        match self.phase {
            _ if self.maintenance => Standing::Left,
            Phase::Stopped => Standing::Left,
            Phase::Booting | Phase::AwaitingService if self.first => Standing::Left,
            Phase::Booting | Phase::AwaitingService | Phase::Restarting => Standing::Starting,
            Phase::Monitoring => Standing::Up,
            Phase::PartialFence | Phase::Degraded => Standing::GivenUp,
            Phase::Held => Standing::Held,
            Phase::DetectingFailure => Standing::Left,
            Phase::TakingOver if self.goal == Goal::Restart => Standing::Starting,
            Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver => match self.goal {
                Goal::Restart => Standing::Down,
                Goal::GiveUp => Standing::GivenUp,
                Goal::Stop | Goal::Undo => Standing::Left,
            },
        }
    }
}

/// Where a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It serves.
    Up,
    /// It failed, or is stopped by its group, and is being fenced and taken back.
    Down,
    /// It is being started again.
    Starting,
    /// It is ready to be started.
    Held,
    /// An operator has it: stopped, or being started by hand, or watched without being acted on.
    Left,
    /// It was given up.
    GivenUp,
}
