//! The machine itself.

use std::collections::VecDeque;
use std::time::Duration;

use kmp::backoff::Jitter;

use super::{Action, Event, Goal, Outcome, Phase};
use crate::core::health::Cause;
use crate::core::policy::{Capture, Policy};

/// The machine of one instance.
#[derive(Clone, Debug)]
pub struct Recovery {
    pub(super) policy: Policy,
    pub(super) jitter: Jitter,
    pub(super) phase: Phase,
    pub(super) goal: Goal,
    /// The start under way is the operator's, not part of a recovery.
    pub(super) first: bool,
    /// An incident is open.
    pub(super) incident: bool,
    /// The instance owns CPUs and memory, or may.
    pub(super) held: bool,
    fence_tries: u32,
    /// Times of restarts within the policy's window.
    pub(super) restarts: VecDeque<Duration>,
    /// What was asked for last gives the CPUs back, too.
    releases: bool,
    /// What a start under way is to end in.
    pending: Option<(Cause, String)>,
    /// Why the first start failed, or why it was given up.
    pub(super) why: String,
    /// Failures are watched and not acted on.
    pub(super) maintenance: bool,
    /// A group decides when it starts again.
    pub(super) grouped: bool,
    /// The group has said so already.
    pub(super) go: bool,
    /// Its group stops it: that is no failure of its own.
    pub(super) blameless: bool,
    /// A kernel waits that can become the instance.
    pub(super) standby: bool,
    closing: bool,
}

impl Recovery {
    /// The machine of an instance that does not run. The seed decides the jitter of restarts.
    pub fn new(policy: Policy, seed: u64) -> Recovery {
        Recovery {
            policy,
            jitter: Jitter::new(seed),
            phase: Phase::Stopped,
            goal: Goal::Restart,
            first: false,
            incident: false,
            held: false,
            fence_tries: 0,
            restarts: VecDeque::new(),
            releases: false,
            pending: None,
            why: String::new(),
            maintenance: false,
            grouped: false,
            go: false,
            blameless: false,
            standby: false,
            closing: false,
        }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it owns CPUs and memory, or may.
    pub fn held(&self) -> bool {
        self.held
    }

    /// Use another policy from the next decision on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// One decision. `now` is the time since any fixed moment.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if self.closing {
            return out;
        }
        match event {
            Event::Shutdown => {
                self.closing = true;
                out.push(Action::DisarmRestart);
            }
            Event::Spawn => self.spawn(&mut out),
            Event::OperatorRecover => self.operator_recover(&mut out),
            Event::OperatorTerminate => self.operator_terminate(&mut out),
            Event::Declared(cause, evidence) => self.declared(cause, evidence, &mut out),
            Event::Booted(detail) => self.booted(detail, &mut out),
            Event::BootError(text) => self.boot_error(now, text, &mut out),
            Event::Serving => self.serving(&mut out),
            Event::FenceDone { complete: true, detail } => self.fenced(now, detail, &mut out),
            Event::FenceDone { complete: false, detail } | Event::FenceError(detail) => {
                self.fence_failed(detail, &mut out);
            }
            Event::CaptureDone(detail) => {
                if self.phase == Phase::CapturingVmcore {
                    self.reclaim(now, &detail, &mut out);
                }
            }
            Event::CaptureFailed(text) => self.capture_failed(now, text, &mut out),
            Event::Reclaimed(detail) => self.reclaimed(detail, &mut out),
            Event::ReclaimError(text) => {
                if self.phase == Phase::ReclaimingResources {
                    self.fail(format!("its resources could not be taken back: {text}"), &mut out);
                }
            }
            Event::Standby(ready) => self.standby = ready,
            Event::TookOver(detail) => self.took_over(detail, &mut out),
            Event::NotTakenOver(why) => self.not_taken_over(why, &mut out),
            Event::RestartTimer => {
                if self.phase == Phase::Restarting {
                    self.start("the wait is over", &mut out);
                }
            }
            Event::PolicyChanged => {
                if self.phase == Phase::Restarting {
                    let wait = self.next_wait();
                    out.extend([Action::DisarmRestart, Action::ArmRestart(wait)]);
                }
                self.act_again(&mut out);
            }
            Event::Maintenance(on) => {
                self.maintenance = on;
                if on && self.phase == Phase::Held {
                    self.boot(
                        "its group does not count on it any more: starting a new incarnation",
                        &mut out,
                    );
                }
                self.act_again(&mut out);
            }
            Event::Grouped(grouped) => self.set_grouped(grouped, &mut out),
            Event::GroupStop(why) => self.group_stop(why, &mut out),
            Event::GroupStart => self.group_start(&mut out),
            Event::GroupGiveUp(why) => self.group_give_up(why, &mut out),
        }
        out
    }

    pub(super) fn journal(&self, detail: impl Into<String>) -> Action {
        Action::Journal { phase: self.phase.name(), detail: detail.into(), recovered: None }
    }

    pub(super) fn enter(&mut self, phase: Phase, detail: impl Into<String>, out: &mut Vec<Action>) {
        self.phase = phase;
        out.push(self.journal(detail));
    }

    /// The last step of an incident.
    pub(super) fn finish(
        &mut self,
        phase: &'static str,
        detail: String,
        recovered: bool,
        out: &mut Vec<Action>,
    ) {
        let recovered = std::mem::replace(&mut self.incident, false).then_some(recovered);
        out.push(Action::Journal { phase, detail, recovered });
    }

    fn spawn(&mut self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopped | Phase::Degraded if !self.held => {
                self.first = true;
                self.restarts.clear();
                self.boot("starting it", out);
            }
            Phase::Degraded | Phase::PartialFence => out.push(Action::Refuse(
                "it was given up and still owns CPUs and memory: recover or terminate it first",
            )),
            Phase::DetectingFailure => out.push(Action::Refuse("it failed: recover or terminate it")),
            Phase::Stopped
            | Phase::Booting
            | Phase::AwaitingService
            | Phase::Monitoring
            | Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver
            | Phase::Restarting
            | Phase::Held => out.push(Action::Refuse("it runs already")),
        }
    }

    fn operator_recover(&mut self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Monitoring => {
                self.open(Cause::Operator.to_string(), out);
                self.prepare("stopping its CPUs", out);
            }
            Phase::DetectingFailure => {
                self.goal = Goal::Restart;
                self.prepare("recovery was asked for: stopping its CPUs", out);
            }
            Phase::PartialFence | Phase::Degraded if self.held => {
                self.goal = Goal::Restart;
                self.restarts.clear();
                self.prepare("recovery was asked for: stopping its CPUs again", out);
            }
            Phase::PartialFence | Phase::Degraded => {
                self.restarts.clear();
                self.open(Cause::Operator.to_string(), out);
                self.boot("starting a new incarnation", out);
            }
            Phase::Restarting | Phase::Held => {
                out.push(Action::DisarmRestart);
                self.start("recovery was asked for", out);
            }
            Phase::Stopped => out.push(Action::Refuse("it does not run: spawn it")),
            Phase::Booting | Phase::AwaitingService => {
                out.push(Action::Refuse("it is being started: wait, or terminate it"));
            }
            Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver => out.push(Action::Refuse("it is being recovered or stopped already")),
        }
    }

    fn operator_terminate(&mut self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopped => out.push(Action::Refuse("it does not run")),
            // The start cannot be broken off: what it leaves is taken back when it ends.
            Phase::Booting
            | Phase::TakingOver
            | Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources => {
                self.goal = Goal::Stop;
            }
            Phase::AwaitingService | Phase::Monitoring | Phase::DetectingFailure => {
                self.goal = Goal::Stop;
                self.prepare("it is to be stopped: stopping its CPUs", out);
            }
            Phase::PartialFence | Phase::Degraded if self.held => {
                self.goal = Goal::Stop;
                self.prepare("it is to be stopped: stopping its CPUs again", out);
            }
            Phase::PartialFence | Phase::Degraded | Phase::Restarting | Phase::Held => {
                self.goal = Goal::Stop;
                out.push(Action::DisarmRestart);
                self.enter(Phase::ReclaimingResources, "giving its CPUs back to the primary kernel", out);
                self.ask_back(true, out);
            }
        }
    }

    fn declared(&mut self, cause: Cause, evidence: String, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Booting => {
                self.pending.get_or_insert((cause, evidence));
            }
            Phase::AwaitingService if self.first => {
                self.goal = Goal::Undo;
                self.why = format!("{cause} ({evidence})");
                let detail = format!("{}; stopping its CPUs", self.why);
                self.prepare(&detail, out);
            }
            Phase::AwaitingService => {
                self.goal = Goal::Restart;
                let detail = format!("the new incarnation failed: {cause} ({evidence}); stopping its CPUs");
                self.prepare(&detail, out);
            }
            Phase::Monitoring => {
                self.open(format!("{cause} ({evidence})"), out);
                if self.acts() {
                    self.prepare("stopping its CPUs", out);
                } else {
                    let off = if self.maintenance { "it is in maintenance" } else { "auto-heal is off" };
                    out.push(Action::Unwatch);
                    out.push(Action::Alert(format!("{cause}; {off}: recover or terminate it")));
                }
            }
            // Judged already, or not running.
            Phase::Stopped
            | Phase::DetectingFailure
            | Phase::PreparingRecovery
            | Phase::CapturingVmcore
            | Phase::ReclaimingResources
            | Phase::TakingOver
            | Phase::Restarting
            | Phase::Held
            | Phase::PartialFence
            | Phase::Degraded => {}
        }
    }

    /// Whether a failure is acted on.
    pub(super) fn acts(&self) -> bool {
        self.policy.auto_heal && !self.maintenance
    }

    /// A failure that was only watched is acted on now.
    fn act_again(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::DetectingFailure && self.acts() {
            self.prepare("it is acted on again: stopping its CPUs", out);
        }
    }

    pub(super) fn open(&mut self, detail: String, out: &mut Vec<Action>) {
        self.goal = Goal::Restart;
        self.first = false;
        self.incident = true;
        out.push(Action::OpenIncident);
        self.enter(Phase::DetectingFailure, detail, out);
    }

    pub(super) fn prepare(&mut self, detail: &str, out: &mut Vec<Action>) {
        self.fence_tries = 1;
        self.enter(Phase::PreparingRecovery, detail, out);
        out.extend([Action::Unwatch, Action::Fence]);
    }

    pub(super) fn boot(&mut self, detail: &str, out: &mut Vec<Action>) {
        self.goal = Goal::Restart;
        self.pending = None;
        self.held = true;
        (self.go, self.blameless) = (false, false);
        self.enter(Phase::Booting, detail, out);
        out.push(Action::Boot);
    }

    fn booted(&mut self, detail: String, out: &mut Vec<Action>) {
        if self.phase != Phase::Booting {
            return;
        }
        self.enter(Phase::AwaitingService, detail, out);
        if self.goal == Goal::Stop {
            return self.prepare("it is to be stopped: stopping its CPUs", out);
        }
        if self.blameless {
            return self.prepare("its group stops it: stopping its CPUs", out);
        }
        out.push(Action::Watch { adopted: false });
        out.push(Action::Settled(Outcome::Started));
        if let Some((cause, evidence)) = self.pending.take() {
            self.declared(cause, evidence, out);
        }
    }

    fn boot_error(&mut self, now: Duration, text: String, out: &mut Vec<Action>) {
        if self.phase != Phase::Booting {
            return;
        }
        self.held = false;
        if self.goal == Goal::Stop && !self.first {
            // Those of the life before are in the pool.
            self.take_back(&format!("it could not be started: {text}"), out);
        } else if self.goal == Goal::Stop || self.first {
            let outcome =
                if self.goal == Goal::Stop { Outcome::Stopped } else { Outcome::BootFailed(text.clone()) };
            self.phase = Phase::Stopped;
            self.finish(Phase::Stopped.name(), format!("it could not be started: {text}"), false, out);
            out.push(Action::Settled(outcome));
        } else if self.too_often(now) {
            // Its CPUs are in the pool, for a start that does not come.
            (self.goal, self.why) = (Goal::GiveUp, format!("it could not be started: {text}"));
            self.take_back(&format!("it failed {} times", self.restarts.len()), out);
        } else if self.grouped && !self.maintenance {
            self.hold(format!("it could not be started: {text}"), out);
        } else {
            self.wait(format!("it could not be started: {text}"), out);
        }
    }

    fn serving(&mut self, out: &mut Vec<Action>) {
        if self.phase != Phase::AwaitingService {
            return;
        }
        self.phase = Phase::Monitoring;
        if self.incident {
            self.finish("RECOVERY_COMPLETE", "the new incarnation serves".into(), true, out);
        } else {
            out.push(self.journal("it serves"));
        }
        self.first = false;
        out.push(Action::Settled(Outcome::Serving));
    }

    fn fenced(&mut self, now: Duration, detail: String, out: &mut Vec<Action>) {
        if self.phase != Phase::PreparingRecovery {
            return;
        }
        if self.incident && self.policy.capture != Capture::None {
            self.enter(Phase::CapturingVmcore, format!("{detail}; capturing its memory"), out);
            out.push(Action::Capture);
        } else {
            self.reclaim(now, &detail, out);
        }
    }

    fn fence_failed(&mut self, detail: String, out: &mut Vec<Action>) {
        if self.phase != Phase::PreparingRecovery {
            return;
        }
        if self.fence_tries < self.policy.fence_tries {
            self.fence_tries += 1;
            out.push(self.journal(format!("{detail}; try {} to stop its CPUs", self.fence_tries)));
            out.push(Action::Fence);
            return;
        }
        self.phase = Phase::PartialFence;
        let text = format!("{detail}; its memory and CPUs are held, because an owner may still run");
        out.push(self.journal(text.clone()));
        out.push(Action::Alert(text.clone()));
        out.push(Action::Settled(Outcome::PartialFence(text)));
    }

    fn capture_failed(&mut self, now: Duration, text: String, out: &mut Vec<Action>) {
        if self.phase != Phase::CapturingVmcore {
            return;
        }
        if self.policy.capture == Capture::Required && self.goal == Goal::Restart {
            self.fail(format!("its memory could not be captured and is held: {text}"), out);
        } else {
            self.reclaim(now, &format!("its memory could not be captured: {text}"), out);
        }
    }

    /// Take resources back. Whether the instance starts again is decided here, because CPUs that are not
    /// needed again go back to the primary kernel.
    fn reclaim(&mut self, now: Duration, detail: &str, out: &mut Vec<Action>) {
        if self.goal == Goal::Restart && !self.blameless && self.too_often(now) {
            let (n, period) = (self.restarts_within(now), self.policy.restart_period.as_secs());
            (self.goal, self.why) = (Goal::GiveUp, format!("it failed {n} times within {period} s"));
        }
        if self.can_take_over() && !self.waits_for_group() {
            return self.take_over(detail, out);
        }
        self.take_back(detail, out);
    }

    pub(super) fn take_back(&mut self, detail: &str, out: &mut Vec<Action>) {
        self.enter(Phase::ReclaimingResources, format!("{detail}; taking CPUs and memory back"), out);
        self.ask_back(self.goal != Goal::Restart, out);
    }

    /// Have its memory back, and its CPUs in the pool or with the primary kernel.
    pub(super) fn ask_back(&mut self, release_cpus: bool, out: &mut Vec<Action>) {
        self.releases = release_cpus;
        out.push(Action::Reclaim { release_cpus });
    }

    fn reclaimed(&mut self, detail: String, out: &mut Vec<Action>) {
        if self.phase != Phase::ReclaimingResources {
            return;
        }
        self.held = false;
        if self.goal != Goal::Restart && !self.releases {
            // It was to start again when that was asked for.
            return self.take_back(&detail, out);
        }
        match self.goal {
            Goal::Restart if self.waits_for_group() => self.hold(detail, out),
            Goal::Restart if self.can_take_over() => self.take_over(&detail, out),
            Goal::Restart if self.restarts.len() <= 1 || self.blameless => {
                self.boot(&format!("{detail}; starting a new incarnation"), out);
            }
            Goal::Restart => self.wait(detail, out),
            Goal::Stop => {
                self.phase = Phase::Stopped;
                self.finish(Phase::Stopped.name(), detail, false, out);
                out.push(Action::Settled(Outcome::Stopped));
            }
            Goal::Undo => {
                self.phase = Phase::Stopped;
                let why = std::mem::take(&mut self.why);
                self.finish(Phase::Stopped.name(), detail, false, out);
                out.push(Action::Settled(Outcome::BootFailed(why)));
            }
            Goal::GiveUp => {
                let why = std::mem::take(&mut self.why);
                self.fail(format!("{detail}; {why}"), out);
            }
        }
    }

    pub(super) fn wait(&mut self, detail: String, out: &mut Vec<Action>) {
        let wait = self.next_wait();
        self.enter(Phase::Restarting, format!("{detail}; starting again in {} ms", wait.as_millis()), out);
        out.push(Action::ArmRestart(wait));
    }

    pub(super) fn next_wait(&mut self) -> Duration {
        let n = self.restarts.len().saturating_sub(2) as u32;
        self.policy.restart_backoff().wait(n, &mut self.jitter)
    }

    pub(super) fn fail(&mut self, text: String, out: &mut Vec<Action>) {
        self.phase = Phase::Degraded;
        self.finish(Phase::Degraded.name(), text.clone(), false, out);
        out.push(Action::Alert(text.clone()));
        out.push(Action::Settled(Outcome::Degraded(text)));
    }

    /// Count a restart; true when there were too many.
    pub(super) fn too_often(&mut self, now: Duration) -> bool {
        self.restarts.push_back(now);
        self.restarts_within(now) > self.policy.restart_intensity as usize
    }

    fn restarts_within(&mut self, now: Duration) -> usize {
        while self.restarts.front().is_some_and(|t| now.saturating_sub(*t) > self.policy.restart_period) {
            self.restarts.pop_front();
        }
        self.restarts.len()
    }
}
