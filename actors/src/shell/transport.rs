//! Owns the connections to the agents. A connection is made when somebody first wants to use it, so nothing
//! has to be told again after this actor was restarted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_platform::{InstanceId, Platform};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::children::{ChildDef, Started};
use super::connection::{self, Command, ConnectionArgs};
use super::directory::Directory;
use super::heartbeat::HeartbeatMsg;
use super::link::Link;
use crate::core::supervisor::ChildSpec;

/// Commands that may wait for a connection. When it is full the connection is stuck, and a heartbeat more
/// would tell nothing new.
const QUEUE: usize = 16;

/// Messages of the transport.
pub(crate) enum TransportMsg {
    /// Send a heartbeat request to this life of an instance.
    Beat {
        id: InstanceId,
        incarnation: u64,
        serial: u64,
        metrics: bool,
        guardian_ms: u32,
        to: Link<HeartbeatMsg>,
    },
    /// Ask the agent to stop its workload.
    Terminate {
        id: InstanceId,
        incarnation: u64,
        grace: Duration,
        reply: oneshot::Sender<Result<String, String>>,
    },
    /// Nobody needs the connection to this life (or an earlier one) any more.
    Close { id: InstanceId, incarnation: u64 },
}

/// What it needs.
#[derive(Clone)]
pub(crate) struct TransportArgs {
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) directory: Directory,
    pub(crate) link: Link<TransportMsg>,
    pub(crate) release: String,
    pub(crate) seed: u64,
}

struct Entry {
    incarnation: u64,
    commands: mpsc::Sender<Command>,
    task: AbortHandle,
}

pub(crate) struct TransportState {
    args: TransportArgs,
    connections: HashMap<InstanceId, Entry>,
}

impl Drop for TransportState {
    fn drop(&mut self) {
        for entry in self.connections.values() {
            entry.task.abort();
        }
    }
}

impl TransportState {
    /// The connection to this life; `None` for a life that is over.
    fn connection(&mut self, id: InstanceId, incarnation: u64) -> Option<&mpsc::Sender<Command>> {
        let stale = match self.connections.get(&id) {
            Some(e) if e.incarnation > incarnation => return None,
            Some(e) => e.incarnation < incarnation || e.commands.is_closed(),
            None => true,
        };
        if stale {
            self.close(id, incarnation);
            let owner = self.args.directory.link(id)?;
            let (commands, receiver) = mpsc::channel(QUEUE);
            let args = ConnectionArgs {
                platform: self.args.platform.clone(),
                id,
                incarnation,
                release: self.args.release.clone(),
                owner,
                seed: self.args.seed ^ u64::from(id.0),
            };
            let task = tokio::spawn(connection::run(args, receiver)).abort_handle();
            self.connections.insert(id, Entry { incarnation, commands, task });
        }
        self.connections.get(&id).map(|e| &e.commands)
    }

    fn close(&mut self, id: InstanceId, incarnation: u64) {
        if self.connections.get(&id).is_some_and(|e| e.incarnation <= incarnation) {
            // Its task ends when the last sender of commands is gone.
            self.connections.remove(&id);
        }
    }
}

/// The actor.
pub(crate) struct Transport;

impl Actor for Transport {
    type Msg = TransportMsg;
    type State = TransportState;
    type Arguments = TransportArgs;

    async fn pre_start(
        &self,
        _: ActorRef<TransportMsg>,
        args: TransportArgs,
    ) -> Result<TransportState, Failure> {
        Ok(TransportState { args, connections: HashMap::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<TransportMsg>,
        message: TransportMsg,
        state: &mut TransportState,
    ) -> Result<(), Failure> {
        state.args.link.taken();
        match message {
            TransportMsg::Beat { id, incarnation, serial, metrics, guardian_ms, to } => {
                if let Some(connection) = state.connection(id, incarnation) {
                    // A full queue means a stuck connection: this heartbeat will count as missed.
                    let _ = connection.try_send(Command::Beat { serial, metrics, guardian_ms, to });
                }
            }
            TransportMsg::Terminate { id, incarnation, grace, reply } => {
                // A dropped reply tells the one who asked.
                if let Some(connection) = state.connection(id, incarnation) {
                    let _ = connection.try_send(Command::Terminate { grace, reply });
                }
            }
            TransportMsg::Close { id, incarnation } => state.close(id, incarnation),
        }
        Ok(())
    }
}

/// The transport as a child.
pub(crate) fn child(args: TransportArgs) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let link = args.link.clone();
            let actor = actor::spawn_linked(Transport, args, parent).await.map_err(|e| e.to_string())?;
            link.set(actor.clone());
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("transport"), start }
}
