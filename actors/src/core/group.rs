//! Groups of kernel instances that are supervised together, with the words of OTP.
//!
//! The members of a group are children of an OTP supervisor ([`super::supervisor`]): whom a failure takes
//! along, in what order members stop and start, and when the group is given up is decided there. Fencing,
//! taking back and booting a member is its own machine's work ([`super::recovery`]).

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use super::recovery::Standing;
use super::supervisor::{
    self, AutoShutdown, ChildSpec, Down, Exit, Flags, FoundChild, Restart, Shutdown, Strategy, Supervisor,
};

/// A group as the configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpec {
    /// Name, unique among groups.
    pub name: String,
    /// Whom the restart of a member takes along.
    pub strategy: Strategy,
    /// Restarts of members allowed within `period`; with one more the group is given up.
    pub intensity: u32,
    /// Length of the window.
    pub period: Duration,
    /// Instances in start order. An instance belongs to one group at most.
    pub members: Vec<String>,
}

/// How a group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not every member has said where it stands.
    Gathering,
    /// No member runs and nothing is wrong.
    Stopped,
    /// Members run.
    Up,
    /// Members are being stopped and started.
    Restarting,
    /// A member, or the group, was given up.
    Degraded,
}

impl State {
    /// As operators see it.
    pub fn name(self) -> &'static str {
        match self {
            State::Gathering => "GATHERING",
            State::Stopped => "STOPPED",
            State::Up => "UP",
            State::Restarting => "RESTARTING",
            State::Degraded => "DEGRADED",
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop this member; it is started again later.
    Stop {
        /// Member.
        member: String,
        /// Why.
        why: String,
    },
    /// Start this member.
    Start(String),
    /// This member stays stopped.
    GiveUp {
        /// Member.
        member: String,
        /// Why.
        why: String,
    },
    /// Nothing is under way any more: the incident is over.
    Settled,
    /// Tell the operator.
    Alert(String),
}

/// The machine of one group.
#[derive(Clone, Debug)]
pub struct Group {
    spec: GroupSpec,
    /// Where each member said it stands.
    standing: BTreeMap<String, Standing>,
    /// Absent until every member has said where it stands.
    supervisor: Option<Supervisor>,
    /// The member whose failure is being answered.
    culprit: Option<String>,
    /// Why the group is degraded.
    given_up: Option<String>,
    /// Members that are to be given up as soon as they are stopped.
    condemned: Vec<String>,
    /// Members the group itself gave up, until they say so.
    dropped: Vec<String>,
    /// Members that counted as stopped for good and are on their way back.
    returning: Vec<String>,
}

impl Group {
    /// A group whose members have said nothing yet.
    pub fn new(spec: GroupSpec) -> Group {
        Group {
            spec,
            standing: BTreeMap::new(),
            supervisor: None,
            culprit: None,
            given_up: None,
            condemned: Vec::new(),
            dropped: Vec::new(),
            returning: Vec::new(),
        }
    }

    /// What it is made of.
    pub fn spec(&self) -> &GroupSpec {
        &self.spec
    }

    /// How it does.
    pub fn state(&self) -> State {
        let Some(supervisor) = &self.supervisor else { return State::Gathering };
        if !supervisor.is_idle() || self.moving() {
            State::Restarting
        } else if self.given_up.is_some() {
            State::Degraded
        } else if self.standing.values().any(|s| *s == Standing::Up) {
            State::Up
        } else {
            State::Stopped
        }
    }

    /// Why it is degraded.
    pub fn reason(&self) -> Option<&str> {
        self.given_up.as_deref()
    }

    /// The member whose failure is being answered.
    pub fn culprit(&self) -> Option<&str> {
        self.culprit.as_deref()
    }

    /// Restarts within the window.
    pub fn restarts(&self, now: Duration) -> usize {
        self.supervisor.as_ref().map_or(0, |s| s.restarts(now))
    }

    /// A member says where it stands. One decision; `now` is the time since any fixed moment.
    pub fn step(&mut self, now: Duration, member: &str, standing: Standing) -> Vec<Action> {
        let mut out = Vec::new();
        if !self.spec.members.iter().any(|m| m == member) {
            return out;
        }
        let busy = self.busy();
        let was = self.standing.insert(member.to_owned(), standing);
        match (was, standing) {
            (_, Standing::Up | Standing::Left | Standing::GivenUp) => self.returning.retain(|m| m != member),
            (Some(Standing::Left | Standing::GivenUp), _) => self.returning.push(member.to_owned()),
            _ => {}
        }
        if self.supervisor.is_none() {
            if self.standing.len() == self.spec.members.len() {
                self.take_over(&mut out);
            }
            return out;
        }
        match standing {
            _ if self.dropped.iter().any(|m| m == member) => self.dropping(now, member, standing, &mut out),
            Standing::Up => self.up(now, member, &mut out),
            // Stopped on purpose: it counts as stopped when its resources are back.
            Standing::Down if was == Some(Standing::Down) || self.under_way(member) == Some(false) => {}
            Standing::Down if self.condemned.iter().any(|m| m == member) => {}
            Standing::Down => {
                self.culprit.get_or_insert_with(|| member.to_owned());
                self.feed(now, supervisor::Event::Exited(member.to_owned(), Exit::Abnormal), &mut out);
            }
            Standing::Starting => {}
            Standing::Held => self.held(now, member, was, &mut out),
            Standing::Left => {
                self.condemned.retain(|m| m != member);
                self.feed(now, supervisor::Event::Withdrawn(member.to_owned()), &mut out);
            }
            Standing::GivenUp => self.member_given_up(now, member, was, &mut out),
        }
        if busy && !self.busy() {
            self.culprit = None;
            out.push(Action::Settled);
        }
        out
    }

    /// A member that was told that it is given up says where it stands. Told while its start was under way, it
    /// could not obey: it is told again when the start has failed, and stopped when the start succeeded.
    fn dropping(&mut self, now: Duration, member: &str, standing: Standing, out: &mut Vec<Action>) {
        let why = self.given_up.clone().unwrap_or_default();
        match standing {
            Standing::Starting | Standing::Down => return,
            Standing::Held => return self.give_up(member, why, out),
            Standing::Up => {
                self.condemned.push(member.to_owned());
                out.push(Action::Stop { member: member.to_owned(), why });
            }
            // It obeyed, or an operator was faster.
            Standing::GivenUp | Standing::Left => {
                self.feed(now, supervisor::Event::Withdrawn(member.to_owned()), out);
            }
        }
        self.dropped.retain(|m| m != member);
    }

    fn busy(&self) -> bool {
        self.supervisor.as_ref().is_some_and(|s| !s.is_idle()) || self.moving()
    }

    fn moving(&self) -> bool {
        self.standing.values().any(|s| matches!(s, Standing::Down | Standing::Starting))
    }

    /// Whether a member is being started (true) or stopped (false).
    fn under_way(&self, member: &str) -> Option<bool> {
        self.supervisor.as_ref()?.current().filter(|(id, _)| *id == member).map(|(_, start)| start)
    }

    fn children(&self) -> impl Iterator<Item = (ChildSpec, Standing)> {
        self.spec.members.iter().map(|m| {
            let spec =
                ChildSpec { restart: Restart::Transient, shutdown: Shutdown::Infinity, ..ChildSpec::new(m) };
            (spec, self.standing.get(m).copied().unwrap_or(Standing::Left))
        })
    }

    fn flags(&self) -> Flags {
        Flags {
            strategy: self.spec.strategy,
            intensity: self.spec.intensity,
            period: self.spec.period,
            auto_shutdown: AutoShutdown::Never,
        }
    }

    /// Everybody has said where he stands: go on from there.
    fn take_over(&mut self, out: &mut Vec<Action>) {
        let children = self
            .children()
            .map(|(spec, standing)| {
                let found = match standing {
                    Standing::Up => FoundChild::Running,
                    Standing::Down | Standing::Starting | Standing::Held => FoundChild::Lost,
                    Standing::Left | Standing::GivenUp => FoundChild::Stopped,
                };
                (spec, found)
            })
            .collect();
        let culprit = self.children().find(|(_, s)| matches!(s, Standing::Down | Standing::Held));
        self.culprit = culprit.map(|(spec, _)| spec.id);
        let given_up: Vec<String> =
            self.children().filter(|(_, s)| *s == Standing::GivenUp).map(|(spec, _)| spec.id).collect();
        self.given_up = (!given_up.is_empty()).then(|| format!("{} was given up", given_up.join(", ")));
        match Supervisor::take_over(self.flags(), children) {
            Ok((supervisor, actions)) => {
                self.supervisor = Some(supervisor);
                self.translate(actions, out);
            }
            // The configuration refuses members that are named twice.
            Err(refusal) => out.push(Action::Alert(format!("group {}: {refusal}", self.spec.name))),
        }
    }

    fn up(&mut self, now: Duration, member: &str, out: &mut Vec<Action>) {
        self.condemned.retain(|m| m != member);
        let down = self.supervisor.as_ref().is_some_and(Supervisor::is_down);
        if down {
            // An operator brought a member of a group that was given up back: the group lives again.
            self.supervisor = None;
            return self.take_over(out);
        }
        self.feed(now, supervisor::Event::Started(member.to_owned()), out);
        self.feed(now, supervisor::Event::Adopted(member.to_owned()), out);
        if !self.standing.values().any(|s| *s == Standing::GivenUp) {
            self.given_up = None;
        }
    }

    fn held(&mut self, now: Duration, member: &str, was: Option<Standing>, out: &mut Vec<Action>) {
        let condemned = self.condemned.iter().position(|m| m == member);
        if let Some(at) = condemned {
            self.condemned.remove(at);
        }
        let returns = self.returning.iter().position(|m| m == member).map(|at| self.returning.remove(at));
        let down = self.supervisor.as_ref().is_some_and(Supervisor::is_down);
        if condemned.is_none() && down && returns.is_some() {
            // As when it is up again: an operator brings it back.
            self.supervisor = None;
            return self.take_over(out);
        }
        if condemned.is_some() || down {
            let why = self.given_up.clone().unwrap_or_default();
            self.give_up(member, why, out);
            return;
        }
        match self.under_way(member) {
            Some(false) => self.feed(now, supervisor::Event::Exited(member.to_owned(), Exit::Normal), out),
            Some(true) if was == Some(Standing::Starting) => {
                self.feed(now, supervisor::Event::StartFailed(member.to_owned()), out);
            }
            // It counted as stopped, so nobody took notice of its failure.
            None if returns.is_some() && !self.supervisor.as_ref().is_some_and(|s| s.planned(member)) => {
                self.culprit.get_or_insert_with(|| member.to_owned());
                self.feed(now, supervisor::Event::Adopted(member.to_owned()), out);
                self.feed(now, supervisor::Event::Exited(member.to_owned(), Exit::Abnormal), out);
            }
            // Ready for a start that is on its way, or that others have to be stopped for first.
            Some(true) | None => {}
        }
    }

    /// A member gave up by itself. Those that depend on it by the strategy cannot run without it.
    fn member_given_up(&mut self, now: Duration, member: &str, was: Option<Standing>, out: &mut Vec<Action>) {
        // Asked to stop or start all the same: there is nothing to wait for.
        self.feed(now, supervisor::Event::Withdrawn(member.to_owned()), out);
        if was == Some(Standing::GivenUp) || self.supervisor.as_ref().is_some_and(Supervisor::is_down) {
            return;
        }
        let why = format!("{member} was given up");
        self.given_up = Some(why.clone());
        let at = self.spec.members.iter().position(|m| m == member).unwrap_or_default();
        let dependents: Vec<String> = match self.spec.strategy {
            Strategy::OneForOne => vec![],
            Strategy::OneForAll => self.spec.members.iter().filter(|m| *m != member).cloned().collect(),
            Strategy::RestForOne => self.spec.members[at + 1..].to_vec(),
        };
        for dependent in dependents.into_iter().rev() {
            match self.standing.get(&dependent) {
                Some(Standing::Up | Standing::Down | Standing::Starting) => {
                    self.condemned.push(dependent.clone());
                    self.feed(now, supervisor::Event::Withdrawn(dependent.clone()), out);
                    out.push(Action::Stop { member: dependent, why: why.clone() });
                }
                Some(Standing::Held) => {
                    self.feed(now, supervisor::Event::Withdrawn(dependent.clone()), out);
                    self.give_up(&dependent, why.clone(), out);
                }
                Some(Standing::Left | Standing::GivenUp) | None => {}
            }
        }
        out.push(Action::Alert(format!("group {}: {why}", self.spec.name)));
    }

    fn give_up(&mut self, member: &str, why: String, out: &mut Vec<Action>) {
        if !self.dropped.iter().any(|m| m == member) {
            self.dropped.push(member.to_owned());
        }
        out.push(Action::GiveUp { member: member.to_owned(), why });
    }

    fn feed(&mut self, now: Duration, event: supervisor::Event, out: &mut Vec<Action>) {
        let Some(supervisor) = &mut self.supervisor else { return };
        let actions = supervisor.step(now, event);
        self.translate(actions, out);
    }

    fn translate(&mut self, actions: Vec<supervisor::Action>, out: &mut Vec<Action>) {
        for action in actions {
            match action {
                supervisor::Action::Start(member) => out.push(Action::Start(member)),
                supervisor::Action::Stop(member, _) => {
                    let why = match &self.culprit {
                        Some(culprit) => format!("{culprit} of its group {} failed", self.spec.name),
                        None => format!("its group {} stops it", self.spec.name),
                    };
                    out.push(Action::Stop { member, why });
                }
                supervisor::Action::Down(Down::Intensity) => self.down(out),
                // A group is never shut down, its members are no significant children and are never added.
                supervisor::Action::Down(_)
                | supervisor::Action::Forget(_)
                | supervisor::Action::Refused(_) => {}
            }
        }
    }

    /// Too many restarts: every member is stopped and stays so.
    fn down(&mut self, out: &mut Vec<Action>) {
        let why = format!(
            "members of group {} failed more than {} times within {} s",
            self.spec.name,
            self.spec.intensity,
            self.spec.period.as_secs()
        );
        self.given_up = Some(why.clone());
        for member in self.spec.members.clone() {
            let standing = self.standing.get(&member);
            if matches!(standing, Some(Standing::Held | Standing::Down | Standing::Starting)) {
                self.give_up(&member, why.clone(), out);
            }
        }
        out.push(Action::Alert(why));
    }
}
