//! The state of workloads: who has which, and how it leaves this kernel or arrives in it.
//!
//! Workloads connect to a Unix socket ([`listen`]) and are talked to by a task each ([`hook`]). kmorphd asks for what it
//! needs on a bulk connection ([`serve`]); what is given then is in [`export`].

mod device;
mod direct;
mod export;
mod hook;
mod listen;
mod pays;
mod serve;
#[cfg(test)]
mod tests;
mod window;

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kmorph_state::wire::{Order, State};
use kmp::message::{Blob, SectionDigest};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;

pub use direct::Reach;
use direct::{Came, Freed, Listener, Out};
use hook::{Answer, Hook};
pub use listen::{Address, listen};
pub use serve::{Over, is_morph, serve};

/// What is known of this kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nobody has said whether it serves.
    #[default]
    Unknown,
    /// It is the instance.
    Serves,
    /// It stands still, and may go on.
    Frozen,
    /// Another kernel is the instance.
    Retired,
}

/// What a morph moves, in the order that was agreed on.
#[derive(Clone)]
struct Plan {
    morph: u64,
    sections: Vec<(Arc<Hook>, String)>,
}

impl Plan {
    /// The workloads in it, each once.
    fn hooks(&self) -> Vec<Arc<Hook>> {
        let mut hooks: Vec<Arc<Hook>> = vec![];
        for (hook, _) in &self.sections {
            if !hooks.iter().any(|h| Arc::ptr_eq(h, hook)) {
                hooks.push(hook.clone());
            }
        }
        hooks
    }
}

#[derive(Default)]
struct Inner {
    stage: Stage,
    hooks: Vec<Arc<Hook>>,
    plan: Option<Plan>,
    /// This kernel has said that it does not take over in this morph.
    ruled_out: Option<u64>,
    /// It has taken over in this morph, and all that came to it served.
    served: Option<u64>,
    /// A morph was undone, so a workload that stands still has not heard of that.
    goes_on: bool,
    /// Workloads were throttled, and not told since that this is over.
    throttled: bool,
    /// Memory another kernel puts pieces into, for workloads that do not read there.
    window: Option<Arc<File>>,
    /// Takes what comes directly from another kernel.
    taking: Option<AbortHandle>,
    /// What went wrong with a piece of the round under way.
    failed: Option<String>,
}

/// What came directly from another kernel.
#[derive(Clone, Debug, Default)]
struct Arrived {
    /// Rounds that ended.
    rounds: u32,
    /// What the sections have come to where they come from, since the latest round ended.
    digests: Vec<SectionDigest>,
    /// No more comes; why.
    over: Option<String>,
}

/// Name of the way digests are made: it is the workload's own.
const DIGEST: &str = "workload";

/// A number that nobody guesses: the standard library keys its hashers with the kernel's random bytes.
fn token() -> u64 {
    RandomState::new().build_hasher().finish().max(1)
}

/// Workloads and what is known of them.
#[derive(Default)]
pub struct Broker {
    inner: Mutex<Inner>,
    /// Where agents of other kernels are found. Without it nothing goes to them directly.
    reach: OnceLock<Reach>,
    out: tokio::sync::Mutex<Option<Out>>,
    arrived: watch::Sender<Arrived>,
    /// Counts the workloads that came.
    came: watch::Sender<u64>,
}

impl Broker {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic elsewhere left it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A workload has introduced itself. One of the same name that was there before is no more: names tell them apart.
    fn enter(&self, hook: Arc<Hook>) {
        let order = {
            let mut inner = self.lock();
            inner.hooks.retain(|h| !h.is_gone() && h.name != hook.name);
            inner.hooks.push(hook.clone());
            // An agent that was started anew learns from its workloads where they are.
            match (hook.state(), inner.stage) {
                (State::Active, Stage::Unknown) => inner.stage = Stage::Serves,
                (State::Frozen, Stage::Unknown | Stage::Serves) if !inner.goes_on => {
                    inner.stage = Stage::Frozen
                }
                (State::Retired, _) => inner.stage = Stage::Retired,
                _ => {}
            }
            match hook.state() {
                State::New if inner.stage == Stage::Serves => Some(Order::Activate),
                State::Frozen if inner.goes_on => Some(Order::Thaw),
                _ => None,
            }
        };
        if let Some(order) = order {
            hook.tell(order);
        }
        self.came.send_modify(|n| *n += 1);
    }

    /// kmorphd says that this kernel is the one that serves; it says so again and again.
    pub fn serves(&self) {
        let (hooks, first) = {
            let mut inner = self.lock();
            let first = match inner.stage {
                Stage::Unknown => true,
                Stage::Serves => false,
                _ => return,
            };
            inner.stage = Stage::Serves;
            (inner.hooks.clone(), first)
        };
        for hook in hooks {
            if (first && hook.state() == State::New) || hook.begins_again() {
                hook.tell(Order::Activate);
            }
        }
    }

    fn hooks(&self) -> Vec<Arc<Hook>> {
        let mut inner = self.lock();
        inner.hooks.retain(|h| !h.is_gone());
        inner.hooks.clone()
    }

    fn set(&self, stage: Stage) {
        self.lock().stage = stage;
    }

    /// Agents of other kernels are found there.
    pub fn reaches(&self, reach: Reach) {
        // It is told once.
        let _ = self.reach.set(reach);
    }

    /// The daemon is gone: there is no morph any more that something comes for, and workloads that were throttled go on
    /// unhindered.
    pub fn let_go(&self) {
        if let Some(taking) = self.lock().taking.take() {
            taking.abort();
        }
        if let Ok(mut out) = self.out.try_lock() {
            *out = None;
        }
        self.unthrottle();
    }

    fn unthrottle(&self) {
        if !std::mem::take(&mut self.lock().throttled) {
            return;
        }
        for hook in self.hooks().into_iter().filter(|h| h.throttles) {
            hook.tell(Order::Throttle { percent: 0 });
        }
    }

    /// Take what the kernel that has the state sends. What it has to say to be let in; 0: it is not let in.
    fn take_directly(self: &Arc<Self>, morph: u64) -> u64 {
        let Some(reach) = self.reach.get() else { return 0 };
        if let Some(before) = self.lock().taking.take() {
            before.abort();
        }
        let listener = match reach.listen() {
            Ok(listener) => listener,
            Err(e) => {
                let text = format!("state of another kernel comes through the daemon: {reach:?}: {e}");
                crate::kmsg::log(crate::kmsg::ERROR, &text);
                return 0;
            }
        };
        let token = token();
        self.arrived.send_replace(Arrived::default());
        let broker = self.clone();
        let taking = tokio::spawn(async move {
            let why = match broker.take(listener, morph, token).await {
                Ok(()) => "the other kernel closed it".to_owned(),
                Err(e) => e.to_string(),
            };
            broker.arrived.send_modify(|a| a.over = Some(why));
        });
        self.lock().taking = Some(taking.abort_handle());
        token
    }

    async fn take(&self, mut listener: Listener, morph: u64, token: u64) -> std::io::Result<()> {
        let refused = |why: &str| {
            let text = format!("a connection with state of another kernel was refused: {why}");
            crate::kmsg::log(crate::kmsg::ERROR, &text);
        };
        let mut come = listener.accept(morph, token, refused).await?;
        drop(listener);
        let freed = come.freed();
        let (told, mut telling) = mpsc::unbounded_channel::<(Freed, Option<Answer>)>();
        // No longer than pieces come.
        let frees = tokio::spawn(async move {
            while let Some((what, answer)) = telling.recv().await {
                if let Some(answer) = answer {
                    // What is wrong with it is said at the end of the round.
                    let _ = answer.get().await;
                }
                let _ = freed.send(what);
            }
        });
        let _frees = AbortOnDropHandle::new(frees);
        while let Some(came) = come.next().await? {
            match came {
                Came::Piece { section, offset, data } => self.piece(morph, section, offset, data).await,
                Came::Placed { section, offset, bytes, place } => {
                    let answer = self.placed(morph, section, offset, bytes, place).await;
                    let _ = told.send((Freed { section, place }, answer));
                }
                Came::Digest { section, digest } => {
                    let digest = SectionDigest { section, algorithm: DIGEST.into(), digest: Blob(digest) };
                    self.arrived.send_modify(|a| a.digests.push(digest));
                }
                Came::End { round } => {
                    // The digests of this round follow.
                    self.arrived.send_modify(|a| {
                        a.rounds = a.rounds.max(round.saturating_add(1));
                        a.digests.clear();
                    });
                }
            }
        }
        Ok(())
    }

    fn plan(&self, morph: u64) -> Result<Plan, String> {
        let plan = self.lock().plan.clone().filter(|p| p.morph == morph);
        plan.ok_or_else(|| format!("morph {morph} was not negotiated with this agent"))
    }
}
