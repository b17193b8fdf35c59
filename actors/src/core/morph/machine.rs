//! The machine itself.

use super::{Action, Dirty, Event, Goal, Limits, Outcome, Phase, Round, Saved};

/// The machine of one instance's morphs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Morph {
    limits: Limits,
    phase: Phase,
    goal: Goal,
    /// Rounds of copying so far, and before it began to copy the last time.
    rounds: u32,
    before: u32,
    /// Bytes of the latest round.
    latest: u64,
    throttle: Throttle,
    /// Why it is being rolled back.
    why: String,
    closing: bool,
}

const BEING_DECIDED: &str = "the morph is being committed: it can only go forward";
const GOING_BACK: &str = "the morph is being rolled back: wait until that has ended";

/// How far the workload is held back, in percent. The last steps are made in time for a round with each.
const STEPS: [u8; 6] = [30, 60, 80, 90, 96, 99];

/// How far a workload is held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Throttle {
    #[default]
    Free,
    /// By this share of its pace, in percent.
    By(u8),
    /// It was, and goes on unhindered because an operator thinks.
    Lifted(u8),
}

impl Throttle {
    fn percent(self) -> u8 {
        match self {
            Throttle::By(percent) => percent,
            Throttle::Free | Throttle::Lifted(_) => 0,
        }
    }

    /// A step further, so that as many rounds are enough.
    fn more(self, rounds: u32) -> Throttle {
        let done = STEPS.iter().filter(|s| **s <= self.percent()).count();
        let left = usize::try_from(rounds).unwrap_or(usize::MAX);
        let next = done.max(STEPS.len().saturating_sub(left)).min(STEPS.len() - 1);
        Throttle::By(STEPS.get(next).copied().unwrap_or_default())
    }
}

impl Morph {
    /// No morph is under way.
    pub fn new(limits: Limits) -> Morph {
        Morph {
            limits,
            phase: Phase::Idle,
            goal: Goal::Prepare,
            rounds: 0,
            before: 0,
            latest: 0,
            throttle: Throttle::Free,
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
    /// waiting, with nothing copied: what both sides agreed on ended with the connections. One that was under way is
    /// rolled back, because nobody saw how far it came.
    pub fn resume(limits: Limits, saved: Saved) -> (Morph, Vec<Action>) {
        let mut m = Morph::new(limits);
        let mut out = Vec::new();
        (m.phase, m.goal, m.rounds, m.why) = (saved.phase, saved.goal, saved.rounds, saved.why);
        match m.phase {
            Phase::Idle | Phase::Prepared => {}
            Phase::Validated => {
                m.rounds = 0;
                m.enter(
                    Phase::Prepared,
                    "the supervisor was restarted: what was copied is copied anew",
                    &mut out,
                );
            }
            // Whoever was giving it back did not write that down.
            Phase::Committing | Phase::Returning => {
                m.phase = Phase::Committing;
                out.push(Action::Activate);
            }
            Phase::Growing => out.push(Action::Grow),
            Phase::RollingBack => out.push(Action::Undo),
            Phase::Taken => out.push(Action::WriteDown),
            Phase::Freezing | Phase::Withdrawing => {
                m.withdraw("the supervisor was restarted".into(), &mut out)
            }
            Phase::Preparing
            | Phase::Negotiating
            | Phase::Transferring
            | Phase::Validating
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
            Event::Taken if self.phase == Phase::Freezing => self.taken(&mut out),
            Event::TakenAlready if self.phase == Phase::Withdrawing => self.taken(&mut out),
            Event::Withdrawn if matches!(self.phase, Phase::Withdrawing | Phase::Taken) => {
                let why = std::mem::take(&mut self.why);
                self.undo(why, &mut out);
            }
            Event::Recorded if matches!(self.phase, Phase::Recording | Phase::Taken) => {
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
            Event::Grows if self.phase == Phase::Committing => {
                self.enter(
                    Phase::Growing,
                    "the new kernel serves: it gets the CPUs and the memory of the old one",
                    &mut out,
                );
                out.push(Action::Grow);
            }
            Event::Grown(missing) if self.phase == Phase::Growing => self.grown(missing, &mut out),
            Event::NotActivated(why) if self.phase == Phase::Committing => {
                self.enter(
                    Phase::Returning,
                    format!("the new kernel was stopped before it served anybody: {why}"),
                    &mut out,
                );
                self.why = format!("the new kernel did not take over: {why}");
                out.push(Action::GiveBack);
            }
            Event::Returned if self.phase == Phase::Returning => {
                let why = std::mem::take(&mut self.why);
                self.undo(why, &mut out);
            }
            Event::Undone if self.phase == Phase::RollingBack => {
                let why = std::mem::take(&mut self.why);
                self.finish(format!("the old kernel goes on: {why}"), Outcome::RolledBack(why), &mut out);
            }
            Event::Failed(why) => self.failed(why, &mut out),
            Event::OldGone(why) => self.gone(false, format!("the old kernel is gone: {why}"), &mut out),
            Event::NewGone(why) => self.gone(true, format!("the new kernel is gone: {why}"), &mut out),
            Event::Timeout if self.is_timed() => {
                let text = format!("{} took longer than {:?}", self.phase.name(), self.limits.phase);
                self.give_up(text, &mut out);
            }
            // Late answers of what is not under way any more.
            Event::Ready
            | Event::Agreed
            | Event::Round(_)
            | Event::Valid
            | Event::Frozen
            | Event::Taken
            | Event::TakenAlready
            | Event::Withdrawn
            | Event::Recorded
            | Event::NotRecorded(_)
            | Event::RecordUnknown
            | Event::Activated
            | Event::Grows
            | Event::Grown(_)
            | Event::NotActivated(_)
            | Event::Returned
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
                (self.goal, self.rounds, self.throttle) = (goal, 0, Throttle::Free);
                self.enter(Phase::Preparing, "starting the new kernel", out);
                out.push(Action::Start);
            }
            Phase::Taken | Phase::Recording | Phase::Committing | Phase::Growing | Phase::Returning => {
                out.push(Action::Refuse(BEING_DECIDED));
            }
            Phase::Withdrawing | Phase::RollingBack => out.push(Action::Refuse(GOING_BACK)),
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
            Phase::Taken | Phase::Recording | Phase::Committing | Phase::Growing | Phase::Returning => {
                out.push(Action::Refuse(BEING_DECIDED));
            }
            Phase::Withdrawing | Phase::RollingBack => {}
            _ => self.give_up(why, out),
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
        (self.before, self.latest) = (self.rounds, u64::MAX);
        // What was needed is needed again.
        if let Throttle::Lifted(percent) = self.throttle {
            self.throttle = Throttle::By(percent);
        }
        self.enter(Phase::Transferring, detail, out);
        self.copy(out);
    }

    fn copy(&self, out: &mut Vec<Action>) {
        out.push(Action::Transfer { round: self.rounds, throttle: self.throttle.percent() });
    }

    /// Whether to copy again what changed meanwhile, or to go on.
    fn round(&mut self, round: Round, out: &mut Vec<Action>) {
        self.rounds = self.rounds.saturating_add(1);
        let left = self.limits.rounds.saturating_sub(self.rounds.saturating_sub(self.before));
        // What changed during this round takes as long to copy as this round at most, if the next is no slower.
        let small = round.bytes == 0 || round.took <= self.limits.downtime;
        if !small && left > 0 {
            self.hold_back(round, left);
            // Each round has the whole time.
            out.push(Action::Arm(self.limits.phase));
            return self.copy(out);
        }
        let copied = format!("round {} copied {} bytes in {:?}", self.rounds, round.bytes, round.took);
        if !small && self.limits.dirty != Dirty::Accept {
            let held = match (self.throttle.percent(), round.throttled) {
                (0, _) => "",
                (_, 0) => ", and it cannot be throttled",
                _ => ", although it was throttled",
            };
            let why = format!(
                "{copied}: the workload changes its state faster than it can be copied within {:?}{held}",
                self.limits.downtime
            );
            return self.undo(why, out);
        }
        self.enter(Phase::Validating, format!("{copied}: checking it and the new kernel"), out);
        let lift = self.goal != Goal::Commit && self.throttle.percent() > 0;
        if lift {
            self.throttle = Throttle::Lifted(self.throttle.percent());
        }
        out.push(Action::Validate { lift });
    }

    /// Have the workload change its state more slowly when rounds do not become smaller fast enough. The first one
    /// copies everything: it says nothing of that.
    fn hold_back(&mut self, round: Round, left: u32) {
        let full = self.rounds <= 1;
        let shrinks = round.bytes <= self.latest / 2;
        self.latest = round.bytes;
        let time = left > STEPS.len() as u32;
        if self.limits.dirty == Dirty::Throttle && !full && !(shrinks && time) {
            self.throttle = self.throttle.more(left);
        }
    }

    fn valid(&mut self, out: &mut Vec<Action>) {
        if self.goal == Goal::Commit && matches!(self.throttle, Throttle::Lifted(_)) {
            self.transfer("to be committed: copying what changed since", out);
        } else if self.goal == Goal::Commit {
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
            // These have no other end than their own.
            Phase::Withdrawing => out.push(Action::Withdraw),
            Phase::Taken => out.push(Action::WriteDown),
            // The instance is the new kernel: whatever is wrong with it is its own recovery's work.
            Phase::Committing | Phase::Returning => {
                out.push(Action::Alert(format!(
                    "the new kernel was committed and does not take over: {why}"
                )));
                self.finish(
                    format!("committed; the new kernel did not take over: {why}"),
                    Outcome::Committed,
                    out,
                );
            }
            Phase::Growing => self.grown(Some(why), out),
            Phase::RollingBack => {
                out.push(Action::Alert(format!("the new kernel could not be removed: {why}")));
                let text = std::mem::take(&mut self.why);
                let detail = format!("the old kernel goes on: {text}; the new one is left: {why}");
                self.finish(detail, Outcome::RolledBack(text), out);
            }
            _ => self.give_up(why, out),
        }
    }

    fn gone(&mut self, new: bool, why: String, out: &mut Vec<Action>) {
        match self.phase {
            // What is done or decided does not need that kernel any more, or finds out by itself.
            Phase::Idle
            | Phase::Withdrawing
            | Phase::Taken
            | Phase::Recording
            | Phase::Committing
            | Phase::Returning
            | Phase::RollingBack => {}
            Phase::Growing if new => {
                self.finish(format!("{why}; the next one starts with everything"), Outcome::Committed, out);
            }
            Phase::Growing => {}
            _ => self.give_up(why, out),
        }
    }

    /// The new kernel serves in any case.
    fn grown(&mut self, missing: Option<String>, out: &mut Vec<Action>) {
        let detail = match missing {
            None => "the new kernel has everything the old one had".into(),
            Some(missing) => {
                out.push(Action::Alert(format!(
                    "the new kernel serves with less than the old one had: {missing}"
                )));
                format!("the new kernel serves; {missing}")
            }
        };
        self.finish(detail, Outcome::Committed, out);
    }

    fn give_up(&mut self, why: String, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Freezing => self.withdraw(why, out),
            _ => self.undo(why, out),
        }
    }

    /// The new kernel may have taken over: that is found out first.
    fn withdraw(&mut self, why: String, out: &mut Vec<Action>) {
        self.enter(Phase::Withdrawing, format!("{why}: seeing that the new kernel does not take over"), out);
        self.why = why;
        out.extend([Action::Disarm, Action::Withdraw]);
    }

    fn taken(&mut self, out: &mut Vec<Action>) {
        self.enter(
            Phase::Taken,
            "the new kernel has the whole state and has taken over: writing the commit record",
            out,
        );
        self.why = "the new kernel was lost before that was written down".into();
        out.extend([Action::Disarm, Action::WriteDown]);
    }

    fn undo(&mut self, why: String, out: &mut Vec<Action>) {
        self.enter(Phase::RollingBack, why.clone(), out);
        self.why = why;
        out.extend([Action::Disarm, Action::Undo]);
    }

    fn finish(&mut self, detail: String, outcome: Outcome, out: &mut Vec<Action>) {
        (self.phase, self.goal, self.rounds) = (Phase::Idle, Goal::Prepare, 0);
        (self.before, self.latest, self.throttle) = (0, 0, Throttle::Free);
        let committed = Some(outcome == Outcome::Committed);
        out.push(Action::Journal { phase: Phase::Idle.name(), detail, committed });
        out.extend([Action::Disarm, Action::Settled(outcome)]);
    }
}
