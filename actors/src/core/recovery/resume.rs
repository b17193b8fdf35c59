//! Going on after the supervisor itself was restarted.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Action, Cause, Event, Goal, Phase, Recovery};
use crate::core::policy::Policy;

/// What has to be remembered of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Saved {
    /// Where it was.
    pub phase: Phase,
    /// What was to become of it.
    pub goal: Goal,
    /// The start under way was an operator's.
    pub first: bool,
    /// An incident was open.
    pub incident: bool,
    /// It owned CPUs and memory.
    pub held: bool,
}

impl Saved {
    /// The record when a younger kernel than it knows is found: whatever was going on ended with a start, which
    /// a journal that could not be written does not have. The younger kernel did nothing that it is to be
    /// stopped for.
    #[must_use]
    pub fn outdated(self) -> Saved {
        let phase = if self.incident { Phase::Booting } else { Phase::Monitoring };
        Saved { phase, goal: Goal::Restart, first: false, ..self }
    }
}

/// What else decides how an instance is driven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Duties {
    /// Failures are watched and not acted on.
    pub maintenance: bool,
    /// A group decides when it starts again.
    pub grouped: bool,
}

/// What the platform has of an instance, in the incarnation that was remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// It runs.
    Running,
    /// It owns CPUs and memory and does not run.
    Stopped,
}

impl Recovery {
    /// What has to be remembered.
    pub fn saved(&self) -> Saved {
        Saved {
            phase: self.phase,
            goal: self.goal,
            first: self.first,
            incident: self.incident,
            held: self.held,
        }
    }

    /// Go on from what was remembered and what is found. Nothing that runs is disturbed; what was being
    /// fenced is fenced again, because nobody saw how that ended.
    pub fn resume(
        policy: Policy,
        seed: u64,
        saved: Saved,
        found: Found,
        now: Duration,
        how: Duties,
    ) -> (Recovery, Vec<Action>) {
        let mut m = Recovery::new(policy, seed);
        let grouped = how.grouped;
        (m.maintenance, m.grouped) = (how.maintenance, grouped);
        let mut out = Vec::new();
        (m.phase, m.goal, m.first, m.incident) = (saved.phase, saved.goal, saved.first, saved.incident);
        m.held = found != Found::Nothing;
        match (saved.phase, found) {
            (Phase::Stopped | Phase::Degraded, Found::Nothing) => {}
            // Its group says when it starts.
            (Phase::Held, Found::Nothing) if grouped && !how.maintenance => out.push(Action::Held),
            // It ran when something was last written down, and nobody is known to have stopped it: the machine was
            // restarted, or the journal could not be written while it was recovered.
            (Phase::Monitoring, Found::Nothing) if m.acts() => {
                m.open("nothing of it is left since the supervisor was restarted".into(), &mut out);
                if grouped && !m.maintenance {
                    m.hold("nothing has to be taken back".into(), &mut out);
                } else {
                    m.boot("starting a new incarnation", &mut out);
                }
            }
            (_, Found::Nothing) => m.resume_gone(saved.phase, &mut out),

            (Phase::DetectingFailure | Phase::PartialFence, _) | (Phase::Degraded, Found::Stopped) => {}
            // The record says that its standby is not the instance yet: it never will be by that record.
            (
                Phase::PreparingRecovery
                | Phase::CapturingVmcore
                | Phase::ReclaimingResources
                | Phase::TakingOver,
                _,
            ) => {
                let why = match m.goal {
                    Goal::Stop => "it is to be stopped: stopping its CPUs",
                    _ => "the supervisor was restarted: stopping its CPUs again",
                };
                m.prepare(why, &mut out);
            }

            (Phase::Monitoring, Found::Running) => out.push(Action::Watch { adopted: true }),
            // A start that was under way has succeeded; or the record is older than the kernel.
            (Phase::Booting | Phase::AwaitingService, Found::Running) => {
                m.enter(
                    Phase::AwaitingService,
                    "the supervisor was restarted: waiting for it to serve",
                    &mut out,
                );
                if m.goal == Goal::Stop {
                    m.prepare("it is to be stopped: stopping its CPUs", &mut out);
                } else {
                    out.push(Action::Watch { adopted: false });
                }
            }
            (Phase::Stopped | Phase::Restarting | Phase::Held | Phase::Degraded, Found::Running) => {
                m.enter(Phase::Monitoring, "it was found running", &mut out);
                (m.goal, m.first) = (Goal::Restart, false);
                out.push(Action::Watch { adopted: true });
            }

            (Phase::Monitoring, Found::Stopped) => {
                let cause = Cause::Parked("it was stopped while no supervisor ran".into());
                out.extend(m.step(now, Event::Declared(cause, "its CPUs do not run".into())));
            }
            (
                Phase::Booting | Phase::AwaitingService | Phase::Restarting | Phase::Held | Phase::Stopped,
                Found::Stopped,
            ) => {
                m.goal = match saved.phase {
                    Phase::Stopped => Goal::Stop,
                    _ if saved.first => Goal::Undo,
                    _ => saved.goal,
                };
                m.why = "the supervisor was restarted while it was being started".into();
                m.prepare("the supervisor was restarted: stopping its CPUs", &mut out);
            }
        }
        (m, out)
    }

    /// Nothing is there: finish what was meant.
    fn resume_gone(&mut self, phase: Phase, out: &mut Vec<Action>) {
        // Nobody saw how much of what it had was given back.
        let gives_back = match phase {
            Phase::ReclaimingResources => self.goal != Goal::Restart,
            Phase::Booting => self.goal == Goal::Stop,
            _ => false,
        };
        if gives_back {
            return self.take_back("the supervisor was restarted", out);
        }
        let recovering = matches!(
            phase,
            Phase::Booting
                | Phase::AwaitingService
                | Phase::PreparingRecovery
                | Phase::CapturingVmcore
                | Phase::ReclaimingResources
                | Phase::TakingOver
                | Phase::Restarting
                | Phase::Held
        );
        if recovering && self.incident && self.goal == Goal::Restart && self.grouped && !self.maintenance {
            return self.hold("the supervisor was restarted".into(), out);
        }
        if recovering && self.incident && self.goal == Goal::Restart {
            return self.boot("the supervisor was restarted: starting a new incarnation", out);
        }
        if self.goal == Goal::GiveUp {
            return self.fail("it had failed too often, or its group had".into(), out);
        }
        self.phase = Phase::Stopped;
        let detail = "it does not run any more since the supervisor was restarted".to_owned();
        self.finish(Phase::Stopped.name(), detail, false, out);
    }
}
