//! Long-running work of kmorphd, such as its control server, as a child of the tree.

use std::sync::Arc;
use std::time::Duration;

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::children::{ChildDef, Started};
use crate::core::supervisor::{ChildSpec, Restart, Shutdown};

/// Tells a service that it is to stop.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Returns when the service is to stop.
    pub async fn asked(&mut self) {
        // An actor that is gone wants its service to stop too.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

type Work = Arc<dyn Fn(Stop) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// A service: it is started with the tree, started again when it fails or panics, and asked to stop in its
/// turn.
#[derive(Clone)]
pub struct Service {
    name: String,
    restart: Restart,
    limit: Duration,
    work: Work,
}

impl Service {
    /// A service that runs `work` until it is asked to stop. Returning `Err` is a failure.
    pub fn new<F, W>(name: impl Into<String>, limit: Duration, work: W) -> Service
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
        W: Fn(Stop) -> F + Send + Sync + 'static,
    {
        let work = Arc::new(move |stop| work(stop).boxed());
        Service { name: name.into(), restart: Restart::Permanent, limit, work }
    }

    /// Start it again only after a failure.
    pub fn transient(mut self) -> Service {
        self.restart = Restart::Transient;
        self
    }

    pub(crate) fn child(self) -> ChildDef {
        let spec = ChildSpec {
            restart: self.restart,
            shutdown: Shutdown::Limit(self.limit),
            ..ChildSpec::new(self.name.clone())
        };
        let work = self.work;
        let start = Arc::new(move |parent: ActorCell| {
            let work = work.clone();
            async move {
                let actor =
                    actor::spawn_linked(ServiceActor, work, parent).await.map_err(|e| e.to_string())?;
                let cell = actor.cell();
                let stop = move || {
                    // An actor that is gone needs no stop.
                    let _ = actor.send_message(ServiceMsg::Stop);
                };
                Ok(Started { cell, stop: Box::new(stop) })
            }
            .boxed()
        });
        ChildDef { spec, start }
    }
}

enum ServiceMsg {
    Stop,
    Ended(Result<(), String>),
}

struct ServiceState {
    stop: watch::Sender<bool>,
    task: AbortHandle,
}

impl Drop for ServiceState {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct ServiceActor;

impl Actor for ServiceActor {
    type Msg = ServiceMsg;
    type State = ServiceState;
    type Arguments = Work;

    async fn pre_start(&self, myself: ActorRef<ServiceMsg>, work: Work) -> Result<ServiceState, Failure> {
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(work(Stop(stopped)));
        let handle = task.abort_handle();
        tokio::spawn(async move {
            let ended = match task.await {
                Ok(result) => result,
                Err(error) => Err(error.to_string()),
            };
            // Nobody is left to tell when the actor was killed.
            let _ = myself.send_message(ServiceMsg::Ended(ended));
        });
        Ok(ServiceState { stop, task: handle })
    }

    async fn handle(
        &self,
        myself: ActorRef<ServiceMsg>,
        message: ServiceMsg,
        state: &mut ServiceState,
    ) -> Result<(), Failure> {
        match message {
            ServiceMsg::Stop => {
                state.stop.send_replace(true);
            }
            ServiceMsg::Ended(Ok(())) => myself.stop(),
            ServiceMsg::Ended(Err(error)) => return Err(error.into()),
        }
        Ok(())
    }
}
