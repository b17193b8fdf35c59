//! The instance becomes a kernel that was waiting for that, instead of being started again.

use super::{Action, Goal, Outcome, Phase, Recovery};

impl Recovery {
    /// Whether a recovery that would start a kernel has one already. An operator's start is never one.
    pub(super) fn can_take_over(&self) -> bool {
        self.standby && self.incident && !self.first && self.goal == Goal::Restart
    }

    pub(super) fn waits_for_group(&self) -> bool {
        self.goal == Goal::Restart && self.grouped && !self.go && !self.maintenance
    }

    /// Start it again, or become its standby.
    pub(super) fn start(&mut self, why: &str, out: &mut Vec<Action>) {
        self.goal = Goal::Restart;
        if self.can_take_over() {
            self.take_over(why, out);
        } else {
            self.boot(&format!("{why}: starting a new incarnation"), out);
        }
    }

    pub(super) fn take_over(&mut self, detail: &str, out: &mut Vec<Action>) {
        self.blameless = false;
        self.enter(Phase::TakingOver, format!("{detail}; its standby takes over"), out);
        out.push(Action::TakeOver);
    }

    pub(super) fn took_over(&mut self, detail: String, out: &mut Vec<Action>) {
        if self.phase != Phase::TakingOver {
            return;
        }
        (self.held, self.standby, self.go) = (true, false, false);
        self.enter(Phase::AwaitingService, detail, out);
        match self.goal {
            Goal::Restart if self.blameless => self.prepare("its group stops it: stopping its CPUs", out),
            Goal::Restart => {
                out.extend([Action::Watch { adopted: true }, Action::Settled(Outcome::Started)]);
            }
            Goal::Stop | Goal::Undo | Goal::GiveUp => {
                self.prepare("it is to be stopped: stopping its CPUs", out);
            }
        }
    }

    /// Whoever was there before goes the way it would have gone without a standby.
    pub(super) fn not_taken_over(&mut self, why: String, out: &mut Vec<Action>) {
        if self.phase != Phase::TakingOver {
            return;
        }
        self.standby = false;
        let detail = format!("its standby does not take over: {why}");
        if self.held || self.goal != Goal::Restart {
            self.take_back(&detail, out);
        } else if self.waits_for_group() {
            self.hold(detail, out);
        } else {
            self.boot(&format!("{detail}; starting a new incarnation"), out);
        }
    }
}
