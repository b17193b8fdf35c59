//! A supervising actor.

use std::sync::Arc;

use super::actor::{self, Actor, ActorCell, ActorRef, Ended, Failure};
use futures::FutureExt;
use tokio::sync::oneshot;

use super::children::{ChildDef, Children, Started, Step};
use crate::core::supervisor::{ChildSpec, Down, Event, Flags};

/// Messages of a supervisor.
pub(crate) enum SupervisorMsg {
    /// Add a child and start it; the answer says whether it runs.
    Add(ChildDef, oneshot::Sender<Result<(), String>>),
    /// Stop this child and forget it; answered when that is done.
    Remove(String, oneshot::Sender<()>),
    /// Stop the children in reverse order, then stop.
    Shutdown,
}

/// Its settings.
#[derive(Clone)]
pub(crate) struct SupervisorArgs {
    pub(crate) name: String,
    pub(crate) flags: Flags,
    pub(crate) children: Vec<ChildDef>,
}

pub(crate) struct SupervisorState {
    children: Children,
    /// Children to be forgotten once they have stopped.
    removing: Vec<(String, oneshot::Sender<()>)>,
}

impl SupervisorState {
    async fn forget_stopped(&mut self) {
        for (id, done) in std::mem::take(&mut self.removing) {
            // Refused while it is stopping.
            let known = self.children.runs(&id).is_some();
            if known && self.children.step(Event::Delete(id.clone())).await.refused.is_some() {
                self.removing.push((id, done));
                continue;
            }
            // Who asked may have given up waiting.
            let _ = done.send(());
        }
    }
}

/// The actor.
pub(crate) struct SupervisorActor;

impl Actor for SupervisorActor {
    type Msg = SupervisorMsg;
    type State = SupervisorState;
    type Arguments = SupervisorArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<SupervisorMsg>,
        args: SupervisorArgs,
    ) -> Result<SupervisorState, Failure> {
        let mut children = Children::new(myself.cell(), &args.name, args.flags, args.children)?;
        children.step(Event::Start).await;
        if !children.all_run() {
            children.abandon().await;
            return Err(format!("a child of {} did not start", args.name).into());
        }
        Ok(SupervisorState { children, removing: Vec::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<SupervisorMsg>,
        message: SupervisorMsg,
        state: &mut SupervisorState,
    ) -> Result<(), Failure> {
        match message {
            SupervisorMsg::Add(def, reply) => {
                let id = def.spec.id.clone();
                let step = state.children.add(def).await;
                let answer = match &step.refused {
                    Some(refusal) => Err(refusal.to_string()),
                    None if step.started.contains(&id) => Ok(()),
                    None => Err(format!("{id} did not start")),
                };
                // The caller may have gone; the child stays.
                let _ = reply.send(answer);
                settle(&myself, &step)
            }
            SupervisorMsg::Remove(id, done) => {
                let step = state.children.step(Event::Terminate(id.clone())).await;
                state.removing.push((id, done));
                state.forget_stopped().await;
                settle(&myself, &step)
            }
            SupervisorMsg::Shutdown => {
                let step = state.children.step(Event::Shutdown).await;
                settle(&myself, &step)
            }
        }
    }

    async fn child_ended(
        &self,
        myself: ActorRef<SupervisorMsg>,
        ended: Ended,
        state: &mut SupervisorState,
    ) -> Result<(), Failure> {
        let step = state.children.ended(ended).await;
        state.forget_stopped().await;
        settle(&myself, &step)
    }
}

/// End as the children's decision says: in order, or as a failure that the parent answers.
fn settle(myself: &ActorRef<SupervisorMsg>, step: &Step) -> Result<(), Failure> {
    match step.down {
        None => Ok(()),
        Some(Down::Shutdown | Down::AutoShutdown) => {
            myself.stop();
            Ok(())
        }
        Some(Down::Intensity) => Err("too many restarts".into()),
        Some(Down::StartFailed) => Err("a child did not start".into()),
    }
}

/// A supervisor as a child of another. `args` is asked at every start, so that children added later are
/// there again after a restart; `started` learns the new actor.
pub(crate) fn supervisor_child(
    spec: ChildSpec,
    args: impl Fn() -> SupervisorArgs + Send + Sync + 'static,
    started: impl Fn(ActorRef<SupervisorMsg>) + Send + Sync + 'static,
) -> ChildDef {
    let (args, learned) = (Arc::new(args), Arc::new(started));
    let start = Arc::new(move |parent: ActorCell| {
        let (args, learned) = (args(), learned.clone());
        async move {
            let actor =
                actor::spawn_linked(SupervisorActor, args, parent).await.map_err(|e| e.to_string())?;
            learned(actor.clone());
            let cell = actor.cell();
            Ok(Started {
                cell,
                stop: Box::new(move || {
                    // An actor that is gone needs no stop.
                    let _ = actor.send_message(SupervisorMsg::Shutdown);
                }),
            })
        }
        .boxed()
    });
    ChildDef { spec, start }
}
