//! Carries out the decisions of [`core::supervisor`](crate::core::supervisor) on [actors](super::actor).
//!
//! Actors that are still there when their parent ends are killed in no order; here they are stopped one after
//! the other, each with its limit, before their supervisor does.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, timeout};
use tracing::{debug, error, info, warn};

use super::actor::{self, ActorCell, ActorId, Ended};
use crate::core::supervisor::{Action, ChildSpec, Down, Event, Exit, Flags, Refusal, Shutdown, Supervisor};
use crate::telemetry;

/// Longest time an actor's `pre_start` may take.
const START_LIMIT: Duration = Duration::from_secs(10);

/// A child that was started: its cell, and how it is asked to stop.
pub(crate) struct Started {
    pub(crate) cell: ActorCell,
    pub(crate) stop: Box<dyn Fn() + Send + Sync>,
}

impl Started {
    /// A worker: it stops after the message under way.
    pub(crate) fn worker(cell: ActorCell) -> Started {
        let c = cell.clone();
        Started { cell, stop: Box::new(move || c.stop()) }
    }
}

/// Starts a child, linked to the supervisor whose cell it gets.
pub(crate) type Starter = Arc<dyn Fn(ActorCell) -> BoxFuture<'static, Result<Started, String>> + Send + Sync>;

/// A child and how it is started.
#[derive(Clone)]
pub(crate) struct ChildDef {
    pub(crate) spec: ChildSpec,
    pub(crate) start: Starter,
}

/// What one event led to.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Children that were started.
    pub(crate) started: Vec<String>,
    /// The supervisor is to end.
    pub(crate) down: Option<Down>,
    /// A call was refused.
    pub(crate) refused: Option<Refusal>,
}

/// Children of one supervising actor.
pub(crate) struct Children {
    me: ActorCell,
    name: String,
    core: Supervisor,
    starters: HashMap<String, Starter>,
    live: HashMap<ActorId, (String, Started)>,
    base: Instant,
}

impl Children {
    /// Children that are not started yet.
    pub(crate) fn new(
        me: ActorCell,
        name: &str,
        flags: Flags,
        defs: Vec<ChildDef>,
    ) -> Result<Children, Refusal> {
        let specs = defs.iter().map(|d| d.spec.clone()).collect();
        Ok(Children {
            me,
            name: name.to_owned(),
            core: Supervisor::new(flags, specs)?,
            starters: defs.into_iter().map(|d| (d.spec.id, d.start)).collect(),
            live: HashMap::new(),
            base: Instant::now(),
        })
    }

    /// Add a child and start it.
    pub(crate) async fn add(&mut self, def: ChildDef) -> Step {
        self.starters.entry(def.spec.id.clone()).or_insert(def.start);
        self.step(Event::Add(def.spec)).await
    }

    /// One of the actors ended.
    pub(crate) async fn ended(&mut self, ended: Ended) -> Step {
        let Some((id, _)) = self.live.remove(&ended.id) else { return Step::default() };
        let exit = match ended.exit {
            actor::Exit::Normal => Exit::Normal,
            actor::Exit::Killed => {
                debug!(supervisor = %self.name, child = %id, "child was killed");
                Exit::Abnormal
            }
            actor::Exit::Failed(error) => {
                error!(supervisor = %self.name, child = %id, %error, "child failed");
                Exit::Abnormal
            }
        };
        self.step(Event::Exited(id, exit)).await
    }

    /// Decide and carry out.
    pub(crate) async fn step(&mut self, event: Event) -> Step {
        let mut result = Step::default();
        let first = event == Event::Start;
        let mut todo = VecDeque::from([event]);
        while let Some(event) = todo.pop_front() {
            for action in self.core.step(self.base.elapsed(), event) {
                match action {
                    Action::Start(id) => todo.push_back(self.start(id, first, &mut result).await),
                    Action::Stop(id, how) => self.stop(&id, how),
                    Action::Forget(id) => {
                        self.starters.remove(&id);
                    }
                    Action::Down(why) => {
                        info!(supervisor = %self.name, ?why, "supervisor is down");
                        result.down = Some(why);
                    }
                    Action::Refused(refusal) => result.refused = Some(refusal),
                }
            }
        }
        result
    }

    async fn start(&mut self, id: String, first: bool, result: &mut Step) -> Event {
        let Some(starter) = self.starters.get(&id) else { return Event::StartFailed(id) };
        match timeout(START_LIMIT, starter(self.me.clone())).await {
            Ok(Ok(started)) => {
                debug!(supervisor = %self.name, child = %id, "child started");
                if !first {
                    telemetry::actor_restart(&id);
                }
                self.live.insert(started.cell.id(), (id.clone(), started));
                result.started.push(id.clone());
                Event::Started(id)
            }
            Ok(Err(error)) => {
                error!(supervisor = %self.name, child = %id, %error, "child did not start");
                Event::StartFailed(id)
            }
            Err(_) => {
                error!(supervisor = %self.name, child = %id, limit = ?START_LIMIT, "child took too long to start");
                Event::StartFailed(id)
            }
        }
    }

    /// Ask the child to stop and see to it that it does. Its end comes back as a supervision event.
    fn stop(&self, id: &str, how: Shutdown) {
        let Some((_, started)) = self.live.values().find(|(live, _)| live == id) else { return };
        let cell = started.cell.clone();
        let (name, id) = (self.name.clone(), id.to_owned());
        match how {
            Shutdown::Kill => cell.kill(),
            Shutdown::Infinity => (started.stop)(),
            Shutdown::Limit(limit) => {
                (started.stop)();
                tokio::spawn(async move {
                    if cell.wait(Some(limit)).await.is_err() {
                        warn!(supervisor = %name, child = %id, ?limit, "child did not stop in time: killed");
                        cell.kill();
                    }
                });
            }
        }
    }

    /// The supervisor's own start failed: stop what was started, in reverse order, and wait for it.
    pub(crate) async fn abandon(&mut self) {
        let order: Vec<String> = self.core.children().map(|(id, _)| id.to_owned()).collect();
        for id in order.iter().rev() {
            let at = self.live.iter().find(|(_, (live, _))| live == id).map(|(at, _)| *at);
            if let Some((_, started)) = at.and_then(|at| self.live.remove(&at)) {
                (started.stop)();
                if started.cell.wait(Some(START_LIMIT)).await.is_err() {
                    warn!(supervisor = %self.name, child = %id, "child did not stop in time: killed");
                    started.cell.kill();
                }
            }
        }
    }

    /// Whether this child runs; `None` when there is none of this name.
    pub(crate) fn runs(&self, id: &str) -> Option<bool> {
        self.core.children().find(|(child, _)| *child == id).map(|(_, runs)| runs)
    }

    /// Whether every child runs.
    pub(crate) fn all_run(&self) -> bool {
        self.core.children().all(|(_, runs)| runs)
    }
}
