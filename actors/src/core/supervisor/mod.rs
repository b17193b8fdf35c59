//! What a supervisor decides, after Erlang/OTP's `supervisor` (stdlib, "Supervisor Behaviour").
//!
//! Children start in order, one at a time, and stop in reverse order, each within its limit. An exit is
//! answered by the strategy; more than `intensity` restarts in `period` stop everything and escalate.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

/// Whom a restart takes along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Only the child that exited.
    #[default]
    OneForOne,
    /// All children.
    OneForAll,
    /// The child and those started after it.
    RestForOne,
}

/// When a child is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// Always.
    #[default]
    Permanent,
    /// After an abnormal exit.
    Transient,
    /// Never; it is forgotten when it exits.
    Temporary,
}

/// How a child is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// At once.
    Kill,
    /// Asked, and killed after this long.
    Limit(Duration),
    /// Asked, and waited for.
    Infinity,
}

/// When the supervisor itself ends because significant children did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AutoShutdown {
    /// It does not.
    #[default]
    Never,
    /// With the first.
    AnySignificant,
    /// With the last.
    AllSignificant,
}

/// A child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// Name, unique among its siblings.
    pub id: String,
    /// When it is started again.
    pub restart: Restart,
    /// How it is stopped.
    pub shutdown: Shutdown,
    /// Whether its own end can end the supervisor.
    pub significant: bool,
}

impl ChildSpec {
    /// A permanent worker with OTP's default limit of 5 s.
    pub fn new(id: impl Into<String>) -> ChildSpec {
        ChildSpec {
            id: id.into(),
            restart: Restart::Permanent,
            shutdown: Shutdown::Limit(Duration::from_secs(5)),
            significant: false,
        }
    }
}

/// Settings of a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// Whom a restart takes along.
    pub strategy: Strategy,
    /// Restarts allowed within `period`.
    pub intensity: u32,
    /// Length of the window.
    pub period: Duration,
    /// Ends with significant children.
    pub auto_shutdown: AutoShutdown,
}

impl Default for Flags {
    /// OTP's: one restart in five seconds.
    fn default() -> Self {
        Flags {
            strategy: Strategy::OneForOne,
            intensity: 1,
            period: Duration::from_secs(5),
            auto_shutdown: AutoShutdown::Never,
        }
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with nothing wrong.
    Normal,
    /// It panicked, failed or was killed.
    Abnormal,
}

/// What happens to a supervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Start the children.
    Start,
    /// A child runs.
    Started(String),
    /// A child could not be started.
    StartFailed(String),
    /// A child ended.
    Exited(String, Exit),
    /// Add a child behind the others and start it.
    Add(ChildSpec),
    /// Stop a child and keep its spec.
    Terminate(String),
    /// Start a stopped child.
    Restart(String),
    /// Forget a stopped child.
    Delete(String),
    /// A stopped child was started by somebody else: it is supervised again.
    Adopted(String),
    /// A child was taken out of supervision by somebody else, whatever it was doing: nothing that is planned
    /// for it is done, and it stays stopped.
    Withdrawn(String),
    /// Stop everything.
    Shutdown,
}

/// How a child was found by a supervisor that takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FoundChild {
    /// It runs.
    Running,
    /// It is stopped and stays so.
    Stopped,
    /// It ran, failed, and nobody has answered that yet.
    Lost,
}

/// Why a supervisor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// It was asked to.
    Shutdown,
    /// A child could not be started in the first place.
    StartFailed,
    /// Too many restarts.
    Intensity,
    /// Significant children ended.
    AutoShutdown,
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start this child and report `Started` or `StartFailed`.
    Start(String),
    /// Stop this child and report `Exited`.
    Stop(String, Shutdown),
    /// The child is gone for good: drop what belongs to it.
    Forget(String),
    /// All children are stopped.
    Down(Down),
    /// A call was refused.
    Refused(Refusal),
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A child of that name is there.
    #[error("there is a child {0} already")]
    Exists(String),
    /// No such child.
    #[error("there is no child {0}")]
    Unknown(String),
    /// It runs.
    #[error("child {0} runs")]
    Running(String),
    /// A permanent child cannot be significant, nor any child of a supervisor that never shuts down by itself.
    #[error("child {0} cannot be significant here")]
    Significant(String),
    /// The supervisor is stopping.
    #[error("the supervisor is stopping")]
    Stopping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Stopped,
    Starting,
    Running,
    Stopping,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Child {
    spec: ChildSpec,
    status: Status,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Start(String),
    Stop(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// Children start for the first time.
    Opening,
    Up,
    Closing(Down),
    Down,
}

/// The state of a supervisor. One step is under way at most; the rest of the plan waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supervisor {
    flags: Flags,
    children: Vec<Child>,
    plan: VecDeque<Step>,
    current: Option<Step>,
    restarts: VecDeque<Duration>,
    phase: Phase,
}

impl Supervisor {
    /// A supervisor that has not started. Refuses duplicate names and significant children that make no sense.
    pub fn new(flags: Flags, specs: Vec<ChildSpec>) -> Result<Supervisor, Refusal> {
        let mut s = Supervisor {
            flags,
            children: Vec::new(),
            plan: VecDeque::new(),
            current: None,
            restarts: VecDeque::new(),
            phase: Phase::Idle,
        };
        for spec in specs {
            s.admit(spec)?;
        }
        Ok(s)
    }

    /// A supervisor that takes over children as they are. Those that were lost are restarted with whom the
    /// strategy takes along; that is the end of a restart somebody else began, so it does not count as one.
    pub fn take_over(
        flags: Flags,
        children: Vec<(ChildSpec, FoundChild)>,
    ) -> Result<(Supervisor, Vec<Action>), Refusal> {
        let found: Vec<FoundChild> = children.iter().map(|c| c.1).collect();
        let mut s = Supervisor::new(flags, children.into_iter().map(|c| c.0).collect())?;
        s.phase = Phase::Up;
        for (child, found) in s.children.iter_mut().zip(&found) {
            if *found == FoundChild::Running {
                child.status = Status::Running;
            }
        }
        let lost: Vec<usize> = (0..found.len()).filter(|at| found[*at] == FoundChild::Lost).collect();
        match flags.strategy {
            Strategy::OneForOne => lost.iter().for_each(|at| s.plan_restart_of(*at..at + 1, &lost)),
            Strategy::OneForAll if !lost.is_empty() => s.plan_restart_of(0..found.len(), &lost),
            Strategy::OneForAll => {}
            Strategy::RestForOne => {
                if let Some(first) = lost.first() {
                    s.plan_restart_of(*first..found.len(), &lost);
                }
            }
        }
        let mut out = Vec::new();
        s.advance(&mut out);
        Ok((s, out))
    }

    /// Whether nothing is being done and nothing is planned.
    pub fn is_idle(&self) -> bool {
        self.current.is_none() && self.plan.is_empty()
    }

    /// The step under way: which child, and whether it is being started (else stopped).
    pub fn current(&self) -> Option<(&str, bool)> {
        match self.current.as_ref()? {
            Step::Start(id) => Some((id, true)),
            Step::Stop(id) => Some((id, false)),
        }
    }

    /// Restarts within the period that ends now.
    pub fn restarts(&self, now: Duration) -> usize {
        self.restarts.iter().filter(|t| now.saturating_sub(**t) <= self.flags.period).count()
    }

    /// Names of the children, in start order, and whether each runs.
    pub fn children(&self) -> impl Iterator<Item = (&str, bool)> {
        self.children.iter().map(|c| (c.spec.id.as_str(), c.status == Status::Running))
    }

    /// Whether everything is stopped for good.
    pub fn is_down(&self) -> bool {
        self.phase == Phase::Down
    }

    fn admit(&mut self, spec: ChildSpec) -> Result<(), Refusal> {
        if self.find(&spec.id).is_some() {
            return Err(Refusal::Exists(spec.id));
        }
        let pointless = self.flags.auto_shutdown == AutoShutdown::Never || spec.restart == Restart::Permanent;
        if spec.significant && pointless {
            return Err(Refusal::Significant(spec.id));
        }
        self.children.push(Child { spec, status: Status::Stopped });
        Ok(())
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.children.iter().position(|c| c.spec.id == id)
    }

    /// One decision. `now` is the time since any fixed moment.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if self.phase == Phase::Down {
            return out;
        }
        let result = match event {
            Event::Start => self.open(),
            Event::Started(id) => self.started(&id),
            Event::StartFailed(id) => self.start_failed(now, &id),
            Event::Exited(id, exit) => self.exited(now, &id, exit, &mut out),
            Event::Shutdown => self.close(Down::Shutdown),
            Event::Withdrawn(id) => self.withdrawn(&id),
            Event::Adopted(id) => self.known(&id).map(|at| {
                if self.children[at].status == Status::Stopped && !self.planned(&id) {
                    self.children[at].status = Status::Running;
                }
            }),
            call if matches!(self.phase, Phase::Closing(_)) => {
                debug_assert!(matches!(
                    call,
                    Event::Add(_) | Event::Terminate(_) | Event::Restart(_) | Event::Delete(_)
                ));
                Err(Refusal::Stopping)
            }
            Event::Add(spec) => {
                let id = spec.id.clone();
                self.admit(spec).map(|()| self.plan_start(id))
            }
            Event::Terminate(id) => self.known(&id).map(|_| self.plan.push_back(Step::Stop(id))),
            Event::Restart(id) => self.stopped(&id).map(|_| self.plan.push_back(Step::Start(id))),
            Event::Delete(id) => self.stopped(&id).map(|at| {
                self.children.remove(at);
                out.push(Action::Forget(id));
            }),
        };
        if let Err(refusal) = result {
            out.push(Action::Refused(refusal));
        }
        self.advance(&mut out);
        out
    }

    fn plan_start(&mut self, id: String) {
        // Before the start, `Start` plans everybody.
        if self.phase != Phase::Idle {
            self.plan.push_back(Step::Start(id));
        }
    }

    fn known(&self, id: &str) -> Result<usize, Refusal> {
        self.find(id).ok_or_else(|| Refusal::Unknown(id.to_owned()))
    }

    fn stopped(&self, id: &str) -> Result<usize, Refusal> {
        let at = self.known(id)?;
        let planned = self.plan.iter().any(|s| matches!(s, Step::Start(p) if p == id));
        if self.children[at].status == Status::Stopped && !planned {
            Ok(at)
        } else {
            Err(Refusal::Running(id.to_owned()))
        }
    }

    fn open(&mut self) -> Result<(), Refusal> {
        if self.phase == Phase::Idle {
            self.phase = Phase::Opening;
            self.plan = self.children.iter().map(|c| Step::Start(c.spec.id.clone())).collect();
        }
        Ok(())
    }

    fn close(&mut self, why: Down) -> Result<(), Refusal> {
        if !matches!(self.phase, Phase::Closing(_)) {
            self.phase = Phase::Closing(why);
            self.plan = self.children.iter().rev().map(|c| Step::Stop(c.spec.id.clone())).collect();
        }
        Ok(())
    }

    fn started(&mut self, id: &str) -> Result<(), Refusal> {
        if self.current == Some(Step::Start(id.to_owned())) {
            self.current = None;
            self.set(id, Status::Running);
        }
        Ok(())
    }

    fn start_failed(&mut self, now: Duration, id: &str) -> Result<(), Refusal> {
        if self.current != Some(Step::Start(id.to_owned())) {
            return Ok(());
        }
        self.current = None;
        self.set(id, Status::Stopped);
        match self.phase {
            Phase::Opening => self.close(Down::StartFailed),
            Phase::Up => {
                if self.too_often(now) {
                    return self.close(Down::Intensity);
                }
                // Tried again before anything that was to follow it.
                self.plan.push_front(Step::Start(id.to_owned()));
                Ok(())
            }
            Phase::Idle | Phase::Closing(_) | Phase::Down => Ok(()),
        }
    }

    fn exited(&mut self, now: Duration, id: &str, exit: Exit, out: &mut Vec<Action>) -> Result<(), Refusal> {
        if self.current == Some(Step::Start(id.to_owned())) {
            return self.start_failed(now, id);
        }
        let Some(at) = self.find(id) else { return Ok(()) };
        let was = std::mem::replace(&mut self.children[at].status, Status::Stopped);
        let spec = self.children[at].spec.clone();
        if self.current == Some(Step::Stop(id.to_owned())) {
            self.current = None;
        }
        if was == Status::Stopped || matches!(self.phase, Phase::Closing(_)) {
            return Ok(());
        }
        let will_start = self.plan.iter().any(|s| matches!(s, Step::Start(p) if p == id));
        if spec.restart == Restart::Temporary && !will_start {
            self.children.remove(at);
            out.push(Action::Forget(id.to_owned()));
        }
        // Stopped on purpose, or part of a restart that is under way: not an event of its own.
        let planned = self.plan.iter().any(|s| matches!(s, Step::Start(p) | Step::Stop(p) if p == id));
        if was == Status::Stopping || planned {
            return Ok(());
        }
        let restarts = match spec.restart {
            Restart::Permanent => true,
            Restart::Transient => exit == Exit::Abnormal,
            Restart::Temporary => false,
        };
        if restarts {
            if self.too_often(now) {
                return self.close(Down::Intensity);
            }
            self.plan_restart(at);
        } else if spec.significant && self.significant_end() {
            return self.close(Down::AutoShutdown);
        }
        Ok(())
    }

    /// Whether the end of one significant child, already marked, ends the supervisor.
    fn significant_end(&self) -> bool {
        match self.flags.auto_shutdown {
            AutoShutdown::Never => false,
            AutoShutdown::AnySignificant => true,
            AutoShutdown::AllSignificant => {
                !self.children.iter().any(|c| c.spec.significant && c.status != Status::Stopped)
            }
        }
    }

    /// Whether this child is to be stopped or started.
    pub fn planned(&self, id: &str) -> bool {
        self.plan.iter().any(|s| matches!(s, Step::Start(p) | Step::Stop(p) if p == id))
    }

    fn withdrawn(&mut self, id: &str) -> Result<(), Refusal> {
        self.known(id)?;
        self.plan.retain(|s| !matches!(s, Step::Start(p) | Step::Stop(p) if p == id));
        if matches!(&self.current, Some(Step::Start(p) | Step::Stop(p)) if p == id) {
            self.current = None;
        }
        self.set(id, Status::Stopped);
        Ok(())
    }

    fn plan_restart(&mut self, at: usize) {
        let group = match self.flags.strategy {
            Strategy::OneForOne => at..at + 1,
            Strategy::OneForAll => 0..self.children.len(),
            Strategy::RestForOne => at..self.children.len(),
        };
        self.plan_restart_of(group, &[at]);
    }

    /// Stop those of a range that run, in reverse order, and start those that ran or failed, in order.
    fn plan_restart_of(&mut self, group: std::ops::Range<usize>, failed: &[usize]) {
        let failed: Vec<String> = failed.iter().map(|at| self.children[*at].spec.id.clone()).collect();
        let group = &self.children[group];
        for c in group.iter().rev().filter(|c| matches!(c.status, Status::Running | Status::Starting)) {
            self.plan.push_back(Step::Stop(c.spec.id.clone()));
        }
        // A child stopped by the operator stays stopped; a temporary one is not started again.
        for c in group {
            let live = c.status != Status::Stopped && c.spec.restart != Restart::Temporary;
            if live || failed.contains(&c.spec.id) {
                self.plan.push_back(Step::Start(c.spec.id.clone()));
            }
        }
    }

    /// Count a restart; true when there were too many.
    fn too_often(&mut self, now: Duration) -> bool {
        self.restarts.push_back(now);
        while self.restarts.front().is_some_and(|t| now.saturating_sub(*t) > self.flags.period) {
            self.restarts.pop_front();
        }
        self.restarts.len() > self.flags.intensity as usize
    }

    fn set(&mut self, id: &str, status: Status) {
        if let Some(at) = self.find(id) {
            self.children[at].status = status;
        }
    }

    /// Take the next step of the plan, when none is under way.
    fn advance(&mut self, out: &mut Vec<Action>) {
        while self.current.is_none() {
            let Some(step) = self.plan.pop_front() else { break };
            let id = match &step {
                Step::Start(id) | Step::Stop(id) => id,
            };
            let Some(at) = self.find(id) else { continue };
            let child = &mut self.children[at];
            match (&step, child.status) {
                (Step::Start(id), Status::Stopped) => {
                    child.status = Status::Starting;
                    out.push(Action::Start(id.clone()));
                }
                (Step::Stop(id), Status::Running) => {
                    child.status = Status::Stopping;
                    out.push(Action::Stop(id.clone(), child.spec.shutdown));
                }
                // Already so.
                _ => continue,
            }
            self.current = Some(step);
        }
        if self.current.is_none() && self.plan.is_empty() {
            match self.phase {
                Phase::Opening => self.phase = Phase::Up,
                Phase::Closing(why) => {
                    self.phase = Phase::Down;
                    out.push(Action::Down(why));
                }
                Phase::Idle | Phase::Up | Phase::Down => {}
            }
        }
    }
}
