//! The machine itself.

use super::{Action, Dirty, Event, Goal, Limits, Outcome, Phase, Round, Saved};

/// The machine of one instance's morphs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Morph {
    limits: Limits,
    phase: Phase,
    goal: Goal,
    /// Rounds of copying so far.
    rounds: u32,
    /// Why it is being rolled back.
    why: String,
    closing: bool,
}

const BEING_DECIDED: &str = "the morph is being committed: it can only go forward";
const GOING_BACK: &str = "the morph is being rolled back: wait until that has ended";

impl Morph {
    /// No morph is under way.
    pub fn new(limits: Limits) -> Morph {
        Morph {
            limits,
            phase: Phase::Idle,
            goal: Goal::Prepare,
            rounds: 0,
            why: String::new(),
            closing: false,
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What has to be remembered.
    pub fn saved(&self) -> Saved {
        Saved { phase: self.phase, goal: self.goal, rounds: self.rounds, why: self.why.clone() }
    }

    /// Go on after the supervisor itself was restarted. The commit record and the phase COMMITTING are written
    /// together, so what was remembered says whether it was decided. A morph that waits for its operator goes on
    /// waiting; one that was under way is rolled back, because nobody saw how far it came.
    pub fn resume(limits: Limits, saved: Saved) -> (Morph, Vec<Action>) {
        let mut m = Morph::new(limits);
        let mut out = Vec::new();
        (m.phase, m.goal, m.rounds, m.why) = (saved.phase, saved.goal, saved.rounds, saved.why);
        match m.phase {
            Phase::Idle | Phase::Prepared | Phase::Validated => {}
            Phase::Committing => out.push(Action::Activate),
            Phase::RollingBack => out.push(Action::Undo),
            Phase::Preparing
            | Phase::Negotiating
            | Phase::Transferring
            | Phase::Validating
            | Phase::Freezing
            | Phase::Recording => m.undo("the supervisor was restarted".into(), &mut out),
        }
        (m, out)
    }

    /// One decision.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if self.closing {
            return out;
        }
        match event {
            Event::Shutdown => {
                self.closing = true;
                out.push(Action::Disarm);
            }
            Event::Limits(limits) => {
                self.limits = limits;
                if self.is_timed() {
                    out.push(Action::Arm(limits.phase));
                }
            }
            Event::Go(goal) => self.go(goal, &mut out),
            Event::Cancel(why) => self.cancel(why, &mut out),
            Event::Ready if self.phase == Phase::Preparing => self.ready(&mut out),
            Event::Agreed if self.phase == Phase::Negotiating => {
                self.transfer("what is handed over is agreed on", &mut out)
            }
            Event::Round(round) if self.phase == Phase::Transferring => self.round(round, &mut out),
            Event::Valid if self.phase == Phase::Validating => self.valid(&mut out),
            Event::Frozen if self.phase == Phase::Freezing => {
                self.enter(
                    Phase::Recording,
                    "the new kernel has the whole state: writing the commit record",
                    &mut out,
                );
                out.extend([Action::Disarm, Action::Record]);
            }
            Event::Recorded if self.phase == Phase::Recording => {
                self.enter(Phase::Committing, "it is decided: the new kernel takes over", &mut out);
                out.push(Action::Activate);
            }
            Event::NotRecorded(why) if self.phase == Phase::Recording => {
                self.undo(format!("the commit record could not be written: {why}"), &mut out);
            }
            Event::RecordUnknown if self.phase == Phase::Recording => out.push(Action::LookUpRecord),
            Event::Activated if self.phase == Phase::Committing => {
                self.finish("the new kernel serves".into(), Outcome::Committed, &mut out);
            }
            Event::Undone if self.phase == Phase::RollingBack => {
                let why = std::mem::take(&mut self.why);
                self.finish(format!("the old kernel goes on: {why}"), Outcome::RolledBack(why), &mut out);
            }
            Event::Failed(why) => self.failed(why, &mut out),
            Event::OldGone(why) => self.gone(format!("the old kernel is gone: {why}"), &mut out),
            Event::NewGone(why) => self.gone(format!("the new kernel is gone: {why}"), &mut out),
            Event::Timeout if self.is_timed() => {
                let text = format!("{} took longer than {:?}", self.phase.name(), self.limits.phase);
                self.undo(text, &mut out);
            }
            // Late answers of what is not under way any more.
            Event::Ready
            | Event::Agreed
            | Event::Round(_)
            | Event::Valid
            | Event::Frozen
            | Event::Recorded
            | Event::NotRecorded(_)
            | Event::RecordUnknown
            | Event::Activated
            | Event::Undone
            | Event::Timeout => {}
        }
        out
    }

    /// Phases that do not wait for an operator and can be left.
    fn is_timed(&self) -> bool {
        matches!(
            self.phase,
            Phase::Preparing | Phase::Negotiating | Phase::Transferring | Phase::Validating | Phase::Freezing
        )
    }

    fn enter(&mut self, phase: Phase, detail: impl Into<String>, out: &mut Vec<Action>) {
        self.phase = phase;
        out.push(Action::Journal { phase: phase.name(), detail: detail.into(), committed: None });
        if self.is_timed() {
            out.push(Action::Arm(self.limits.phase));
        }
    }

    fn go(&mut self, goal: Goal, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle => {
                (self.goal, self.rounds) = (goal, 0);
                self.enter(Phase::Preparing, "starting the new kernel", out);
                out.push(Action::Start);
            }
            Phase::Recording | Phase::Committing => out.push(Action::Refuse(BEING_DECIDED)),
            Phase::RollingBack => out.push(Action::Refuse(GOING_BACK)),
            _ if goal == Goal::Prepare => {
                out.push(Action::Refuse("a morph is under way: commit it or roll it back"))
            }
            Phase::Prepared => {
                self.goal = goal;
                self.negotiate(out);
            }
            Phase::Validated => {
                self.goal = goal;
                // The workload went on since: catch up, and look again.
                self.transfer("copying what changed since", out);
            }
            Phase::Preparing | Phase::Negotiating | Phase::Transferring | Phase::Validating => {
                self.goal = self.goal.max(goal);
            }
            // It goes there already.
            Phase::Freezing => {}
        }
    }

    fn cancel(&mut self, why: String, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle => out.push(Action::Refuse("no morph is under way")),
            Phase::Recording | Phase::Committing => out.push(Action::Refuse(BEING_DECIDED)),
            Phase::RollingBack => {}
            _ => self.undo(why, out),
        }
    }

    fn ready(&mut self, out: &mut Vec<Action>) {
        if self.goal == Goal::Prepare {
            self.enter(Phase::Prepared, "the new kernel serves beside the old one", out);
            out.extend([Action::Disarm, Action::Settled(Outcome::Reached(Goal::Prepare))]);
        } else {
            self.negotiate(out);
        }
    }

    fn negotiate(&mut self, out: &mut Vec<Action>) {
        self.enter(Phase::Negotiating, "asking both kernels what can be handed over", out);
        out.push(Action::Negotiate);
    }

    fn transfer(&mut self, detail: &str, out: &mut Vec<Action>) {
        self.enter(Phase::Transferring, detail, out);
        out.push(Action::Transfer { round: self.rounds });
    }

    /// Whether to copy again what changed meanwhile, or to go on.
    fn round(&mut self, round: Round, out: &mut Vec<Action>) {
        self.rounds = self.rounds.saturating_add(1);
        // What changed during this round takes as long to copy as this round at most, if the next is no slower.
        let small = round.bytes == 0 || round.took <= self.limits.downtime;
        if !small && self.rounds < self.limits.rounds {
            // Each round has the whole time.
            out.extend([Action::Arm(self.limits.phase), Action::Transfer { round: self.rounds }]);
            return;
        }
        let left = format!("round {} copied {} bytes in {:?}", self.rounds, round.bytes, round.took);
        if !small && self.limits.dirty == Dirty::GiveUp {
            let why = format!(
                "{left}: the workload changes its state faster than it can be copied within {:?}",
                self.limits.downtime
            );
            return self.undo(why, out);
        }
        self.enter(Phase::Validating, format!("{left}: checking it and the new kernel"), out);
        out.push(Action::Validate);
    }

    fn valid(&mut self, out: &mut Vec<Action>) {
        if self.goal == Goal::Commit {
            self.enter(Phase::Freezing, "validated: freezing the workload for its last changes", out);
            out.push(Action::Freeze);
        } else {
            self.enter(Phase::Validated, "validated: it can be committed", out);
            out.extend([Action::Disarm, Action::Settled(Outcome::Reached(Goal::Validate))]);
        }
    }

    fn failed(&mut self, why: String, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle | Phase::Prepared | Phase::Validated => {}
            // Only the store says how this ends.
            Phase::Recording => {}
            // The instance is the new kernel: whatever is wrong with it is its own recovery's work.
            Phase::Committing => {
                out.push(Action::Alert(format!(
                    "the new kernel was committed and does not take over: {why}"
                )));
                self.finish(
                    format!("committed; the new kernel did not take over: {why}"),
                    Outcome::Committed,
                    out,
                );
            }
            Phase::RollingBack => {
                out.push(Action::Alert(format!("the new kernel could not be removed: {why}")));
                let text = std::mem::take(&mut self.why);
                let detail = format!("the old kernel goes on: {text}; the new one is left: {why}");
                self.finish(detail, Outcome::RolledBack(text), out);
            }
            _ => self.undo(why, out),
        }
    }

    fn gone(&mut self, why: String, out: &mut Vec<Action>) {
        match self.phase {
            // What is done or decided does not need that kernel any more, or finds out by itself.
            Phase::Idle | Phase::Recording | Phase::Committing | Phase::RollingBack => {}
            _ => self.undo(why, out),
        }
    }

    fn undo(&mut self, why: String, out: &mut Vec<Action>) {
        self.enter(Phase::RollingBack, why.clone(), out);
        self.why = why;
        out.extend([Action::Disarm, Action::Undo]);
    }

    fn finish(&mut self, detail: String, outcome: Outcome, out: &mut Vec<Action>) {
        (self.phase, self.goal, self.rounds) = (Phase::Idle, Goal::Prepare, 0);
        let committed = Some(outcome == Outcome::Committed);
        out.push(Action::Journal { phase: Phase::Idle.name(), detail, committed });
        out.extend([Action::Disarm, Action::Settled(outcome)]);
    }
}
