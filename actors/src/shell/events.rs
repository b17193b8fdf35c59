//! Takes the platform's events to the instances they are about. A panic notice waits for no timer.

use std::sync::Arc;

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_platform::{PlatformEvent, PlatformEventKind};
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::children::{ChildDef, Started};
use super::directory::Directory;
use super::instance::InstanceMsg;
use crate::core::supervisor::ChildSpec;

/// The receiver outlives the actor, so that a restarted one goes on with the next event.
pub(crate) type Source = Arc<Mutex<mpsc::Receiver<PlatformEvent>>>;

/// What it needs.
#[derive(Clone)]
pub(crate) struct EventsArgs {
    pub(crate) source: Option<Source>,
    pub(crate) directory: Directory,
}

pub(crate) struct EventsState(Option<AbortHandle>);

impl Drop for EventsState {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Sent by the reading task.
pub(crate) enum EventsMsg {
    /// No event will come any more.
    Ended,
}

/// The actor.
pub(crate) struct Events;

impl Actor for Events {
    type Msg = EventsMsg;
    type State = EventsState;
    type Arguments = EventsArgs;

    async fn pre_start(&self, myself: ActorRef<EventsMsg>, args: EventsArgs) -> Result<EventsState, Failure> {
        let Some(source) = args.source else {
            warn!(
                "the platform's events are read by somebody else: failures are seen by heartbeat and pulse only"
            );
            return Ok(EventsState(None));
        };
        let task = tokio::spawn(async move {
            let mut source = source.lock().await;
            while let Some(event) = source.recv().await {
                route(&args.directory, event);
            }
            // Nobody is left to tell when the actor is stopping.
            let _ = myself.send_message(EventsMsg::Ended);
        });
        Ok(EventsState(Some(task.abort_handle())))
    }

    async fn handle(
        &self,
        _: ActorRef<EventsMsg>,
        message: EventsMsg,
        _: &mut EventsState,
    ) -> Result<(), Failure> {
        match message {
            EventsMsg::Ended => {
                warn!("the platform sends no events any more: failures are seen by heartbeat and pulse only")
            }
        }
        Ok(())
    }
}

fn route(directory: &Directory, event: PlatformEvent) {
    if let PlatformEventKind::Lost(n) = event.kind {
        warn!(lost = n, "platform events were lost: looking at every instance");
        for instance in directory.all() {
            instance.link.send(InstanceMsg::Look);
        }
        return;
    }
    match directory.link(event.id) {
        Some(link) => drop(link.send(InstanceMsg::Platform(event))),
        None => debug!(instance = %event.id, kind = ?event.kind, "event of an instance that is not known"),
    }
}

/// The actor as a child.
pub(crate) fn child(args: EventsArgs) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let actor = actor::spawn_linked(Events, args, parent).await.map_err(|e| e.to_string())?;
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("events"), start }
}
