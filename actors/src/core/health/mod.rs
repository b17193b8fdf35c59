//! Is an instance alive? Two signals, never one.
//!
//! | pulse | agent | meaning | what happens |
//! | --- | --- | --- | --- |
//! | moves | answers | healthy | |
//! | moves | silent | user space is dead or starved | confirmed, then a notice; no fence |
//! | silent | answers | timer or transport trouble | suspect, probed on; never dead by that alone |
//! | silent | silent | the kernel is dead | confirmed by probes, then declared |
//!
//! When a pulse stops, probes are sent at once; a kernel that answers none of them is dead, however long its
//! heartbeat timeout is. If the agent did answer after the pulse stopped, the pulse is not to be trusted and the
//! heartbeat timeout has to pass as well.
//!
//! A panic notice or a parked kernel is declared at once. A supervisor that was late itself measures anew
//! and accuses nobody.

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use kmp::backoff::Jitter;
use serde::{Deserialize, Serialize};

use super::policy::Policy;

/// What is known of one signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// Not seen yet, or being measured anew.
    Unknown,
    /// There.
    Fine,
    /// Missing for longer than it may.
    Silent,
}

/// Which signals a suspicion is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Missing {
    /// The pulse.
    Pulse,
    /// The agent's answers.
    Agent,
    /// Both.
    Both,
}

/// State of an instance's health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// No kernel is watched.
    Down,
    /// Started or adopted: nothing is held against it until the grace is over.
    Starting,
    /// Both signals are fine.
    Healthy,
    /// A signal is missing and is being probed.
    Suspect {
        /// Which.
        missing: Missing,
        /// Probes in a row that got no answer.
        unanswered: u32,
    },
    /// The kernel lives, user space does not answer.
    AgentSilent,
    /// Declared dead.
    Dead(Cause),
}

/// What an instance was declared dead for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Its kernel panicked.
    Panic(String),
    /// Its kernel tried to reboot or halt.
    Parked(String),
    /// Neither its kernel nor its user space show life.
    Hang,
    /// It never served: text says what was seen of it.
    NeverServed(String),
    /// An operator said so.
    Operator,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Panic(reason) => write!(f, "kernel panic: {reason}"),
            Cause::Parked(how) => write!(f, "the kernel stopped itself: {how}"),
            Cause::Hang => f.write_str("the kernel hangs: no pulse and no heartbeat"),
            Cause::NeverServed(seen) => write!(f, "it did not come up: {seen}"),
            Cause::Operator => f.write_str("recovery was asked for by an operator"),
        }
    }
}

/// What is seen of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its kernel was started.
    Booted,
    /// It was found running by a supervisor that starts.
    Adopted,
    /// Its kernel's substrate is up.
    KernelReady,
    /// Its pulse moves (again).
    PulseMoved,
    /// Its pulse has not moved for this long.
    PulseSilent(Duration),
    /// One of its CPUs has not beaten for this long while others have.
    CpuStuck(u32, Duration),
    /// The agent answered; round trip.
    HeartbeatOk(Duration),
    /// The agent has not answered for this long.
    HeartbeatMissed(Duration),
    /// Panic notice with its reason.
    PanicNotice(String),
    /// A reboot or halt was caught; text says how.
    Parked(String),
    /// Its substrate module was unloaded: there will be no pulse.
    KernelLeft,
    /// The connection to its agent is open.
    ChannelUp,
    /// It is not; text says why.
    ChannelDown(String),
    /// The supervisor itself was late by this much.
    OwnPause(Duration),
    /// The grace timer rang.
    GraceExpired,
    /// The probe timer rang.
    ProbeTimer,
    /// The policy was changed: every wait counts anew from now.
    PolicyChanged(Box<Policy>),
    /// Maintenance was turned on (watch, accuse nobody of silence) or off.
    Maintenance(bool),
    /// The instance is not watched any more.
    Reset,
}

/// Timers of the machine. Arming one again replaces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Timer {
    /// Rings [`Event::GraceExpired`].
    Grace,
    /// Rings [`Event::ProbeTimer`].
    Probe,
}

/// News for the operator. None of them touches the instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It serves.
    Healthy,
    /// A signal is missing.
    Suspect(Missing),
    /// Its user space is silent while its kernel lives.
    AgentSilent,
    /// One of its CPUs is stuck.
    CpuStuck(u32, Duration),
    /// Its substrate was unloaded.
    NoSubstrate,
    /// It would be declared dead, were it not in maintenance; why.
    Withheld(Cause),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a heartbeat and look at the pulse now.
    ProbeNow,
    /// Forget what was measured and measure anew from now.
    Remeasure,
    /// Ring after this long.
    Arm(Timer, Duration),
    /// Do not ring.
    Disarm(Timer),
    /// The instance is dead.
    Declare {
        /// Why.
        cause: Cause,
        /// What was seen, for the journal.
        evidence: String,
    },
    /// Tell the operator.
    Notify(Notice),
}

/// The machine of one instance.
#[derive(Clone, Debug)]
pub struct Health {
    policy: Policy,
    jitter: Jitter,
    state: State,
    pulse: Signal,
    agent: Signal,
    /// It has served in this life.
    served: bool,
    /// The agent answered while the pulse was silent, or the pulse is gone for good: its silence alone
    /// hurries nothing.
    pulse_doubted: bool,
    /// In maintenance: silence is watched and leads to no declaration.
    hold: bool,
    now: Duration,
    grace_until: Duration,
    pulse_silent_for: Duration,
    agent_silent_for: Duration,
    channel: Option<String>,
}

impl Health {
    /// A machine that watches nothing. The seed decides the jitter of probes.
    pub fn new(policy: Policy, seed: u64) -> Health {
        Health {
            policy,
            jitter: Jitter::new(seed),
            state: State::Down,
            pulse: Signal::Unknown,
            agent: Signal::Unknown,
            served: false,
            pulse_doubted: false,
            hold: false,
            now: Duration::ZERO,
            grace_until: Duration::ZERO,
            pulse_silent_for: Duration::ZERO,
            agent_silent_for: Duration::ZERO,
            channel: None,
        }
    }

    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Pulse and agent.
    pub fn signals(&self) -> (Signal, Signal) {
        (self.pulse, self.agent)
    }

    /// One decision. `now` is the time since any fixed moment.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.now = now;
        match &event {
            Event::PolicyChanged(policy) => {
                self.policy = **policy;
                self.wait_anew(&mut out);
            }
            Event::Maintenance(on) => {
                self.hold = *on;
                if !on {
                    self.wait_anew(&mut out);
                }
            }
            Event::Reset => self.reset(&mut out),
            Event::Booted => self.begin(now, false, self.policy.boot_grace, &mut out),
            Event::Adopted => self.begin(now, true, self.policy.adopt_grace(), &mut out),
            _ if matches!(self.state, State::Down | State::Dead(_)) => {}
            Event::PanicNotice(reason) => self.declare(Cause::Panic(reason.clone()), &mut out),
            Event::Parked(how) => self.declare(Cause::Parked(how.clone()), &mut out),
            Event::OwnPause(lag) => self.own_pause(now, *lag, &mut out),
            Event::GraceExpired => self.grace_expired(now, &mut out),
            Event::ProbeTimer => self.probe_timer(&mut out),
            Event::CpuStuck(cpu, since) => out.push(Action::Notify(Notice::CpuStuck(*cpu, *since))),
            Event::KernelReady => {}
            Event::ChannelUp => self.channel = None,
            Event::ChannelDown(why) => {
                self.channel = Some(why.clone());
                if self.state == State::Healthy {
                    out.push(Action::ProbeNow);
                }
            }
            Event::PulseMoved => {
                (self.pulse, self.pulse_silent_for) = (Signal::Fine, Duration::ZERO);
                self.pulse_doubted = false;
                self.reconsider(&mut out);
            }
            Event::PulseSilent(since) => {
                // Before its first beat a kernel has no pulse to lose.
                if !(self.state == State::Starting && self.pulse == Signal::Unknown) {
                    (self.pulse, self.pulse_silent_for) = (Signal::Silent, *since);
                    self.reconsider(&mut out);
                }
            }
            Event::KernelLeft => {
                (self.pulse, self.pulse_doubted) = (Signal::Silent, true);
                out.push(Action::Notify(Notice::NoSubstrate));
                self.reconsider(&mut out);
            }
            Event::HeartbeatOk(_) => {
                (self.agent, self.agent_silent_for) = (Signal::Fine, Duration::ZERO);
                self.pulse_doubted |= self.pulse == Signal::Silent;
                if let State::Suspect { unanswered, .. } = &mut self.state {
                    *unanswered = 0;
                }
                self.reconsider(&mut out);
            }
            Event::HeartbeatMissed(since) => {
                if self.state != State::Starting {
                    (self.agent, self.agent_silent_for) = (Signal::Silent, *since);
                    self.reconsider(&mut out);
                }
            }
        }
        out
    }

    fn reset(&mut self, out: &mut Vec<Action>) {
        out.extend([Action::Disarm(Timer::Grace), Action::Disarm(Timer::Probe)]);
        *self = Health { jitter: self.jitter.clone(), hold: self.hold, ..Health::new(self.policy, 0) };
    }

    /// Every wait that is under way begins again.
    fn wait_anew(&mut self, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Starting => {
                let grace = if self.served { self.policy.adopt_grace() } else { self.policy.boot_grace };
                self.grace_until = self.now.saturating_add(grace);
                out.push(Action::Arm(Timer::Grace, grace));
            }
            State::Suspect { unanswered, .. } => {
                *unanswered = 0;
                self.probe(0, out);
            }
            State::Down | State::Healthy | State::AgentSilent | State::Dead(_) => {}
        }
    }

    fn begin(&mut self, now: Duration, served: bool, grace: Duration, out: &mut Vec<Action>) {
        *self = Health { jitter: self.jitter.clone(), hold: self.hold, ..Health::new(self.policy, 0) };
        (self.state, self.served, self.grace_until) = (State::Starting, served, now.saturating_add(grace));
        out.extend([Action::Disarm(Timer::Probe), Action::Arm(Timer::Grace, grace)]);
    }

    fn declare(&mut self, cause: Cause, out: &mut Vec<Action>) {
        out.extend([Action::Disarm(Timer::Grace), Action::Disarm(Timer::Probe)]);
        out.push(Action::Declare { cause: cause.clone(), evidence: self.evidence() });
        self.state = State::Dead(cause);
    }

    fn evidence(&self) -> String {
        let signal = |s: Signal, since: Duration| match s {
            Signal::Unknown => "not seen".to_owned(),
            Signal::Fine => "fine".to_owned(),
            Signal::Silent if since.is_zero() => "silent".to_owned(),
            Signal::Silent => format!("silent for {} ms", since.as_millis()),
        };
        let mut text = format!(
            "pulse {}, agent {}",
            signal(self.pulse, self.pulse_silent_for),
            signal(self.agent, self.agent_silent_for)
        );
        if let State::Suspect { unanswered, .. } = self.state {
            text.push_str(&format!(", {unanswered} probes unanswered"));
        }
        if let Some(why) = &self.channel {
            text.push_str(&format!(", no connection ({why})"));
        }
        text
    }

    /// The state that the two signals ask for.
    fn reconsider(&mut self, out: &mut Vec<Action>) {
        use Signal::{Fine, Silent, Unknown};
        match (&self.state, self.pulse, self.agent) {
            (State::Down | State::Dead(_), ..) => {}

            (State::Healthy, Fine, Fine) => {}
            (State::Starting | State::Suspect { .. } | State::AgentSilent, Fine, Fine) => {
                out.extend([Action::Disarm(Timer::Grace), Action::Disarm(Timer::Probe)]);
                self.served = true;
                self.state = State::Healthy;
                out.push(Action::Notify(Notice::Healthy));
            }

            // A kernel that is coming up, or was adopted, may lack either for a while; a pulse that was
            // there and stopped is looked into at once.
            (State::Starting, Silent, Unknown | Silent) => self.suspect(Missing::Both, out),
            (State::Starting, Silent, Fine) => self.suspect(Missing::Pulse, out),
            (State::Starting, ..) => {}

            // A suspect that never served and has a pulse again is still coming up.
            (State::Suspect { .. }, Fine, Unknown | Silent) if !self.served => {
                let left = self.grace_until.saturating_sub(self.now);
                out.extend([Action::Disarm(Timer::Probe), Action::Arm(Timer::Grace, left)]);
                self.state = State::Starting;
            }

            (State::AgentSilent, Fine | Unknown, _) => {}
            (State::Healthy | State::AgentSilent | State::Suspect { .. }, Silent, Silent | Unknown) => {
                self.suspect(Missing::Both, out);
            }
            (State::Healthy | State::AgentSilent | State::Suspect { .. }, Silent, Fine) => {
                self.suspect(Missing::Pulse, out);
            }
            (State::Healthy | State::Suspect { .. }, Fine | Unknown, Silent) => {
                self.suspect(Missing::Agent, out)
            }
            // Being measured anew.
            (State::Healthy | State::Suspect { .. }, Fine | Unknown, Unknown) | (_, Unknown, Fine) => {}
        }
    }

    /// Become suspicious, or change what the suspicion is about. New evidence is confirmed from the start.
    fn suspect(&mut self, about: Missing, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Suspect { missing, .. } if *missing == about => {}
            // The pulse is silent already and so are the probes: that the heartbeat timed out as well adds
            // nothing that would have to be confirmed anew.
            State::Suspect { missing: missing @ Missing::Pulse, .. } if about == Missing::Both => {
                *missing = about
            }
            State::Suspect { missing: missing @ Missing::Both, .. } if about == Missing::Pulse => {
                *missing = about
            }
            _ => {
                self.state = State::Suspect { missing: about, unanswered: 0 };
                out.push(Action::Notify(Notice::Suspect(about)));
                self.probe(0, out);
            }
        }
    }

    fn probe(&mut self, n: u32, out: &mut Vec<Action>) {
        let wait = self.policy.confirm_backoff().wait(n, &mut self.jitter);
        out.extend([Action::ProbeNow, Action::Arm(Timer::Probe, wait)]);
    }

    fn probe_timer(&mut self, out: &mut Vec<Action>) {
        let State::Suspect { unanswered, .. } = &mut self.state else { return };
        *unanswered += 1;
        let n = *unanswered;
        if n < self.policy.confirm_probes.max(1) {
            return self.probe(n, out);
        }
        if self.hold && self.pulse == Signal::Silent {
            if n == self.policy.confirm_probes.max(1) {
                out.push(Action::Notify(Notice::Withheld(Cause::Hang)));
            }
            return self.probe(n, out);
        }
        match (self.pulse, self.agent) {
            // The agent answered after the pulse had gone: wait until its own timeout says it is silent.
            (Signal::Silent, Signal::Unknown | Signal::Fine) if self.pulse_doubted => self.probe(n, out),
            // Every probe went unanswered: the agent is silent too.
            (Signal::Silent, _) => {
                self.agent = Signal::Silent;
                let cause = if self.served {
                    Cause::Hang
                } else {
                    Cause::NeverServed("its kernel stopped while it came up".into())
                };
                self.declare(cause, out);
            }
            (Signal::Fine, Signal::Silent) => {
                out.push(Action::Disarm(Timer::Probe));
                self.state = State::AgentSilent;
                out.push(Action::Notify(Notice::AgentSilent));
            }
            // Being measured anew: no conclusion yet.
            (Signal::Fine | Signal::Unknown, _) => self.probe(n, out),
        }
    }

    fn own_pause(&mut self, now: Duration, lag: Duration, out: &mut Vec<Action>) {
        out.push(Action::Remeasure);
        match &mut self.state {
            State::Starting => {
                self.grace_until = self.grace_until.saturating_add(lag);
                out.push(Action::Arm(Timer::Grace, self.grace_until.saturating_sub(now)));
            }
            State::Suspect { unanswered, .. } => {
                *unanswered = 0;
                (self.pulse, self.agent) = (Signal::Unknown, Signal::Unknown);
                self.probe(0, out);
            }
            State::Healthy | State::AgentSilent | State::Down | State::Dead(_) => {}
        }
    }

    fn grace_expired(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.state != State::Starting {
            return;
        }
        if now < self.grace_until {
            // The timer was armed before the grace was extended.
            out.push(Action::Arm(Timer::Grace, self.grace_until - now));
            return;
        }
        match (self.pulse, self.agent) {
            // The agent answers: something is wrong with the pulse, but the instance serves.
            (_, Signal::Fine) => {
                (self.pulse, self.pulse_doubted) = (Signal::Silent, true);
                self.suspect(Missing::Pulse, out);
            }
            // It served before this supervisor started: its user space is silent now, its kernel lives.
            (Signal::Fine, _) if self.served => {
                self.agent = Signal::Silent;
                self.suspect(Missing::Agent, out);
            }
            (_, _) if self.served => {
                (self.pulse, self.agent) = (Signal::Silent, Signal::Silent);
                self.suspect(Missing::Both, out);
            }
            (pulse, _) => {
                let grace = self.policy.boot_grace.as_millis();
                let seen = match pulse {
                    Signal::Fine => "its kernel runs, its agent never answered",
                    Signal::Unknown | Signal::Silent => "neither its kernel nor its agent was seen",
                };
                let cause = Cause::NeverServed(format!("{seen} within {grace} ms"));
                if self.hold {
                    out.push(Action::Notify(Notice::Withheld(cause)));
                    self.wait_anew(out);
                } else {
                    self.declare(cause, out);
                }
            }
        }
    }
}
