//! The standby of an instance: a kernel that is started beside it, serves nobody, and waits until a recovery or a morph
//! needs one. What is decided and done about it; whoever takes it says when it is over.

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

/// Wait before CPUs and memory that were missing are looked for again.
pub const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// After it gave way to somebody who needed what it had, it leaves him that long to take it.
pub const GIVE_WAY: Duration = Duration::from_secs(30);
/// Wait after the first failure; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// One that was ready for this long has not failed in a row with the next.
const STEADY: Duration = Duration::from_secs(120);

/// What it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Want {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs of the user.
    pub initramfs: Option<PathBuf>,
    /// The user's part of the kernel command line.
    pub cmdline: String,
    /// CPUs.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The region of handover memory it may read.
    pub handover: Option<u64>,
}

/// Where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There is none. It is started as soon as it is wanted and the instance is at rest.
    #[default]
    None,
    /// There is none, and for a while it is not tried.
    Waiting,
    /// It is being started.
    Arming,
    /// It runs and waits.
    Armed,
    /// A recovery or a morph has it.
    Using,
    /// It is being stopped, and what it had is given back.
    Removing,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 6] =
        [Phase::None, Phase::Waiting, Phase::Arming, Phase::Armed, Phase::Using, Phase::Removing];
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// What it is to be, and whether the instance is at rest: it serves, and no morph is under way.
    Want {
        /// `None`: there is to be none.
        want: Option<Want>,
        /// Nothing is started while it is not.
        rest: bool,
    },
    /// One is there since before this machine was: this one.
    Found(Want),
    /// One that is somebody's is there since before this machine was.
    FoundInUse,
    /// Its kernel was started and served.
    Started,
    /// There are not the CPUs or the memory for it; why.
    NoRoom(String),
    /// It did not come up, and has nothing any more; why.
    Failed(String),
    /// It is healthy, or not.
    Ready(bool),
    /// It died, or was stopped; why.
    Gone(String),
    /// Nothing of it is left.
    Removed,
    /// It could not be stopped; why.
    NotRemoved(String),
    /// Somebody takes it.
    Claim,
    /// Who took it does not need it, and left it as it was.
    Back,
    /// Somebody needs what it has more; who.
    GiveWay(String),
    /// The wait is over.
    Timer,
    /// The daemon ends.
    Shutdown,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Start it.
    Start(Want),
    /// Stop it and give back what it has.
    Remove,
    /// Ask it where it stands.
    Ask,
    /// Ring [`Event::Timer`] after this long. Arming again replaces.
    Arm(Duration),
    /// Do not ring.
    Disarm,
    /// Tell operators.
    Say(String),
    /// Answer to [`Event::Claim`]: it is theirs.
    Claimed,
}

/// The machine of one instance's standby.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Standby {
    phase: Phase,
    want: Option<Want>,
    /// What is there, or on its way.
    have: Option<Want>,
    rest: bool,
    ready: bool,
    /// Failures in a row.
    failures: u32,
    /// It is to give way as soon as it can.
    gives_way: bool,
    /// Why there is none.
    why: String,
    closing: bool,
}

impl Standby {
    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it can be taken.
    pub fn ready(&self) -> bool {
        self.phase == Phase::Armed && self.ready
    }

    /// What it is.
    pub fn have(&self) -> Option<&Want> {
        self.have.as_ref()
    }

    /// Why there is none; empty when there is one, or nothing is in the way.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Whether nothing of it is there and none is wanted.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::None && self.want.is_none()
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
            Event::Want { want, rest } => self.wanted(want, rest, &mut out),
            Event::Found(have) if self.phase == Phase::None => {
                (self.phase, self.have, self.ready) = (Phase::Armed, Some(have), false);
                out.push(Action::Ask);
                self.compare(&mut out);
            }
            Event::FoundInUse if self.phase == Phase::None => self.phase = Phase::Using,
            Event::Started if self.phase == Phase::Arming => {
                (self.phase, self.ready) = (Phase::Armed, false);
                self.why.clear();
                out.push(Action::Ask);
                if self.gives_way {
                    self.remove(&mut out);
                } else {
                    self.compare(&mut out);
                }
            }
            Event::NoRoom(why) if self.phase == Phase::Arming => {
                if self.why != why {
                    out.push(Action::Say(format!(
                        "no standby: {why}; looked for again every {LOOK_AGAIN:?}"
                    )));
                    self.why = why;
                }
                self.pause(LOOK_AGAIN, &mut out);
            }
            Event::Failed(why) if self.phase == Phase::Arming => {
                self.failed(&why, &mut out);
                self.pause(self.backoff(), &mut out);
            }
            Event::Ready(ready) if self.phase == Phase::Armed => {
                if std::mem::replace(&mut self.ready, ready) != ready && ready {
                    out.extend([Action::Say("its standby is ready".into()), Action::Arm(STEADY)]);
                }
            }
            Event::Gone(why) if self.phase == Phase::Armed => {
                self.failed(&why, &mut out);
                self.remove(&mut out);
            }
            Event::Removed if matches!(self.phase, Phase::Removing | Phase::Using) => {
                self.have = None;
                if std::mem::take(&mut self.gives_way) {
                    self.pause(GIVE_WAY, &mut out);
                } else if self.failures > 0 && self.phase == Phase::Removing {
                    self.pause(self.backoff(), &mut out);
                } else {
                    self.phase = Phase::None;
                    out.push(Action::Disarm);
                    self.begin(&mut out);
                }
            }
            Event::NotRemoved(why) if self.phase == Phase::Removing => {
                out.push(Action::Say(format!("its standby could not be stopped: {why}")));
                out.push(Action::Arm(LONGEST_WAIT));
            }
            Event::Claim if self.ready() => {
                (self.phase, self.ready, self.failures) = (Phase::Using, false, 0);
                out.extend([Action::Disarm, Action::Claimed]);
            }
            Event::Back if self.phase == Phase::Using => {
                (self.phase, self.ready) = (Phase::Armed, false);
                out.push(Action::Ask);
                self.compare(&mut out);
            }
            Event::GiveWay(whom) => self.give_way(&whom, &mut out),
            Event::Timer => match self.phase {
                Phase::Waiting => {
                    self.phase = Phase::None;
                    self.begin(&mut out);
                }
                Phase::Armed => self.failures = 0,
                Phase::Removing => out.push(Action::Remove),
                Phase::None | Phase::Arming | Phase::Using => {}
            },
            // Late answers about what is not there any more, or is somebody else's.
            Event::Found(_)
            | Event::FoundInUse
            | Event::Started
            | Event::NoRoom(_)
            | Event::Failed(_)
            | Event::Ready(_)
            | Event::Gone(_)
            | Event::Removed
            | Event::NotRemoved(_)
            | Event::Claim
            | Event::Back => {}
        }
        out
    }

    fn wanted(&mut self, want: Option<Want>, rest: bool, out: &mut Vec<Action>) {
        let changed = self.want != want;
        (self.want, self.rest) = (want, rest);
        match self.phase {
            Phase::None => self.begin(out),
            // What stood in the way of another one says nothing about this one.
            Phase::Waiting if changed => {
                (self.phase, self.failures) = (Phase::None, 0);
                self.why.clear();
                out.push(Action::Disarm);
                self.begin(out);
            }
            Phase::Armed => self.compare(out),
            Phase::Waiting | Phase::Arming | Phase::Using | Phase::Removing => {}
        }
    }

    fn begin(&mut self, out: &mut Vec<Action>) {
        let Some(want) = self.want.clone().filter(|_| self.rest) else { return };
        (self.phase, self.have) = (Phase::Arming, Some(want.clone()));
        out.push(Action::Start(want));
    }

    /// One that is not what it should be is replaced; while the instance is not at rest it stays, because it is better
    /// than none.
    fn compare(&mut self, out: &mut Vec<Action>) {
        if self.want.is_none() || (self.want != self.have && self.rest) {
            let text = match self.want {
                None => "its standby is not wanted any more",
                Some(_) => "its standby is replaced: another one is wanted",
            };
            out.push(Action::Say(text.into()));
            self.failures = 0;
            self.remove(out);
        }
    }

    fn give_way(&mut self, whom: &str, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Armed | Phase::Arming | Phase::Removing if !self.gives_way => {
                self.why = format!("it gave way to {whom}");
                out.push(Action::Say(format!("its standby gives way to {whom}")));
                self.gives_way = true;
                if self.phase == Phase::Armed {
                    self.remove(out);
                }
            }
            // What it would take is left for the other one.
            Phase::Waiting => out.push(Action::Arm(GIVE_WAY)),
            Phase::None if self.want.is_some() => self.pause(GIVE_WAY, out),
            Phase::None | Phase::Armed | Phase::Arming | Phase::Removing | Phase::Using => {}
        }
    }

    fn remove(&mut self, out: &mut Vec<Action>) {
        (self.phase, self.ready) = (Phase::Removing, false);
        out.extend([Action::Disarm, Action::Remove]);
    }

    fn failed(&mut self, why: &str, out: &mut Vec<Action>) {
        self.failures = self.failures.saturating_add(1);
        self.why = why.to_owned();
        out.push(Action::Say(format!("its standby failed: {why}; another one in {:?}", self.backoff())));
    }

    fn backoff(&self) -> Duration {
        let doubled = 1u32.checked_shl(self.failures.saturating_sub(1)).unwrap_or(u32::MAX);
        FIRST_WAIT.saturating_mul(doubled).min(LONGEST_WAIT)
    }

    fn pause(&mut self, wait: Duration, out: &mut Vec<Action>) {
        (self.phase, self.have) = (Phase::Waiting, None);
        // Of a start that was under way nothing is left that could give way.
        self.gives_way = false;
        out.push(Action::Arm(wait));
    }
}
