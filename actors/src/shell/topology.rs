//! Which instances there are and where, told to all of them: a workload finds its neighbours by name, also after a
//! morph gave them another number. And kerf's definitions follow what a morph, or a standby
//! that took over, has changed.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures::FutureExt;
use kmorph_control::views::EventKind;
use kmorph_platform::InstanceSpec;
use kmp::message::{Neighbour, Topology};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use super::children::{ChildDef, Started};
use super::instance::{Env, Instance};
use super::link::Link;
use super::log::Draft;
use crate::core::recovery::Phase;
use crate::core::supervisor::ChildSpec;
use crate::store::Role;

/// Changes that follow each other this soon are told together.
const SETTLES: Duration = Duration::from_millis(20);
/// With more instances than this nobody is told: the message would be sent to each of them with every change.
const MOST: usize = 64;
/// Longest time for writing a definition.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// What every agent is told. Generation 0 is nothing.
#[derive(Clone, Default)]
pub(crate) struct Told(Arc<RwLock<Arc<Topology>>>);

impl Told {
    /// What there is now, when that is not what was told before.
    pub(crate) fn newer(&self, than: u64) -> Option<Arc<Topology>> {
        let now = self.0.read().unwrap_or_else(PoisonError::into_inner);
        (now.generation != than).then(|| now.clone())
    }

    /// From now on these are the instances. Whether they were others before.
    fn set(&self, instances: Vec<Neighbour>) -> bool {
        let mut now = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let changed = now.instances != instances;
        if changed {
            *now = Arc::new(Topology { generation: now.generation + 1, instances });
        }
        changed
    }
}

/// What everybody is told, and how it is changed.
#[derive(Clone)]
pub(crate) struct Broadcast {
    link: Link<TopologyMsg>,
    pub(crate) told: Told,
}

impl Broadcast {
    pub(crate) fn new() -> Broadcast {
        Broadcast { link: Link::new("topology"), told: Told::default() }
    }

    /// Something about an instance is not as it was.
    pub(crate) fn changed(&self) {
        // An actor that is being started looks by itself.
        self.link.send(TopologyMsg::Changed);
    }
}

/// Messages of the topology's actor.
pub(crate) enum TopologyMsg {
    Changed,
}

pub(crate) struct TopologyState {
    env: Arc<Env>,
    due: Option<Instant>,
}

impl TopologyState {
    /// Tell what has changed.
    fn tell(&self) {
        let mut all = self.env.directory.all();
        if all.len() > MOST {
            return;
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        let instances: Vec<Neighbour> = all.iter().filter_map(|i| neighbour(i)).collect();
        if self.env.topology.told.set(instances) {
            self.env.connections.nudge();
        }
    }
}

/// Have kerf's definition of an instance say what it is made of now. An operator is told when it does not.
pub(crate) async fn follow(env: &Env, spec: InstanceSpec, incarnation: u64) {
    let (definitions, name) = (env.definitions.clone(), spec.name.clone());
    let saved = tokio::task::spawn_blocking(move || definitions.save(&spec));
    let why = match timeout(WRITE_LIMIT, saved).await {
        Ok(Ok(Ok(()))) => return info!(instance = %name, "its definition says what it is made of now"),
        Ok(Ok(Err(error))) => error.message,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("not written within {WRITE_LIMIT:?}"),
    };
    warn!(instance = %name, %why, "its definition does not say what it is made of now");
    let text = format!("its definition is what it was before: {why}");
    let effect = format!("after kmorphctl terminate {name} it is started as it was defined before");
    let draft = Draft::new(EventKind::Notice, text).effect(effect);
    env.log.say(draft.of(&name, env.group_of(&name), incarnation));
}

fn neighbour(instance: &Instance) -> Option<Neighbour> {
    let r = instance.record();
    // The other side of a morph is nobody's neighbour.
    (r.role == Role::Own).then(|| Neighbour {
        name: r.spec.name.clone(),
        id: r.spec.id.0,
        cid: r.spec.id.cid(),
        incarnation: r.incarnation,
        serves: matches!(r.saved.phase, Phase::Monitoring | Phase::DetectingFailure),
        release: r.release.clone(),
        cpus: r.spec.cpus.clone(),
        memory_bytes: r.spec.memory_bytes,
    })
}

/// The actor.
pub(crate) struct TopologyActor;

impl Actor for TopologyActor {
    type Msg = TopologyMsg;
    type State = TopologyState;
    type Arguments = Arc<Env>;

    async fn pre_start(&self, me: ActorRef<TopologyMsg>, env: Arc<Env>) -> Result<TopologyState, Failure> {
        env.topology.link.set(me);
        let state = TopologyState { env, due: None };
        state.tell();
        Ok(state)
    }

    fn due(&self, state: &TopologyState) -> Option<Instant> {
        state.due
    }

    async fn tick(&self, _: ActorRef<TopologyMsg>, state: &mut TopologyState) -> Result<(), Failure> {
        state.due = None;
        state.tell();
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<TopologyMsg>,
        message: TopologyMsg,
        state: &mut TopologyState,
    ) -> Result<(), Failure> {
        state.env.topology.link.taken();
        match message {
            TopologyMsg::Changed => {
                state.due.get_or_insert_with(|| Instant::now() + SETTLES);
            }
        }
        Ok(())
    }
}

/// The actor as a child.
pub(crate) fn child(env: Arc<Env>) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let env = env.clone();
        async move {
            let actor = actor::spawn_linked(TopologyActor, env, parent).await.map_err(|e| e.to_string())?;
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("topology"), start }
}
