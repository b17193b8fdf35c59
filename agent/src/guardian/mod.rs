//! The guardian: a small process that starts the serving agent, and starts it again when it ends or is stuck.
//!
//! It runs no runtime and no thread, so it can fork at any time and has little that can fail. What it does is
//! decided by [`step`], without I/O.

mod keep;
mod link;

use std::time::Duration;

use kmp::message::GUARDIAN_OFF;

pub use keep::{Keeper, run};
pub use link::Link;

/// First wait before a restart, doubled by each one.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait.
const LAST_WAIT: Duration = Duration::from_secs(5);
/// An agent that lived so long was well: the next wait is the first one again.
const WELL: Duration = Duration::from_secs(30);
/// An agent that has just been started has at least so long until it must pet.
const GRACE: Duration = Duration::from_secs(5);
/// A guardian that is itself late by more than this has stood still, and everybody with it: it accuses nobody.
const LATE: Duration = Duration::from_millis(250);
/// Shortest watchdog: below it a busy machine would kill a healthy agent.
const SHORTEST: u32 = 200;

/// What the agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// To be started then.
    Waiting { until: Duration },
    /// Runs; `petted` is its last sign of life.
    Running { since: Duration, petted: Option<Duration> },
    /// Was killed; its end is awaited.
    Killed { since: Duration },
    /// Ended, and is not to be started.
    Left,
}

/// The guardian's state. Times are on any clock that only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    phase: Phase,
    wait: Duration,
    /// What kmorphd said last, see `HeartbeatReq::guardian_ms`.
    told: u32,
    held: bool,
    started: bool,
    restarts: u32,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time passed.
    Tick,
    /// The agent is there, and its runtime turns.
    Petted,
    /// kmorphd says what to do.
    Told(u32),
    /// The agent follows an order (a stand-in's).
    Obeyed,
    /// The agent ended, or could not be started.
    Ended,
    /// Start nothing until told otherwise (a stand-in's fault).
    Hold,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the agent.
    Start,
    /// SIGKILL it.
    Kill,
}

impl State {
    /// The agent is to be started at once.
    pub fn new(now: Duration) -> State {
        let phase = Phase::Waiting { until: now };
        State { phase, wait: FIRST_WAIT, told: 0, held: false, started: false, restarts: 0 }
    }

    /// How often the agent was started again.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// What kmorphd said last.
    pub fn told(&self) -> u32 {
        self.told
    }

    /// End a hold without a step: the next tick starts what waits.
    pub fn release(&mut self) {
        self.held = false;
    }

    /// When [`Event::Tick`] is next of use.
    pub fn due(&self) -> Option<Duration> {
        match self.phase {
            Phase::Waiting { until } => (!self.held).then_some(until),
            Phase::Running { since, petted } => {
                let limit = watchdog(self.told)?;
                Some(petted.map_or(since + limit.max(GRACE), |p| p + limit))
            }
            Phase::Killed { .. } | Phase::Left => None,
        }
    }
}

/// How long an agent may be silent; `None` when nobody looks.
pub fn watchdog(told: u32) -> Option<Duration> {
    (told != 0 && told != GUARDIAN_OFF).then(|| Duration::from_millis(u64::from(told.max(SHORTEST))))
}

/// The whole decision.
pub fn step(state: State, event: Event, now: Duration) -> (State, Option<Action>) {
    let mut s = state;
    let mut action = None;
    match event {
        Event::Petted => {
            if let Phase::Running { petted, .. } = &mut s.phase {
                *petted = Some(now);
            }
        }
        Event::Told(told) => {
            // It can only be told by an agent that turns.
            if let Phase::Running { petted, .. } = &mut s.phase {
                *petted = Some(now);
            }
            s.told = told;
        }
        Event::Ended => match s.phase {
            Phase::Running { since, .. } | Phase::Killed { since } => {
                if now.saturating_sub(since) >= WELL {
                    s.wait = FIRST_WAIT;
                }
                if s.told == GUARDIAN_OFF {
                    s.phase = Phase::Left;
                } else {
                    s.phase = Phase::Waiting { until: now + s.wait };
                    s.wait = (s.wait * 2).min(LAST_WAIT);
                }
            }
            Phase::Waiting { .. } | Phase::Left => {}
        },
        Event::Hold => s.held = true,
        Event::Obeyed | Event::Tick => {}
    }
    match s.phase {
        Phase::Waiting { until } if until <= now && !s.held => {
            if s.started {
                s.restarts = s.restarts.saturating_add(1);
            }
            s.started = true;
            s.phase = Phase::Running { since: now, petted: None };
            action = Some(Action::Start);
        }
        Phase::Running { since, .. } => match s.due() {
            Some(due) if due + LATE < now => s.phase = Phase::Running { since, petted: Some(now) },
            Some(due) if due <= now => {
                s.phase = Phase::Killed { since };
                action = Some(Action::Kill);
            }
            _ => {}
        },
        _ => {}
    }
    (s, action)
}

#[cfg(test)]
mod tests;
