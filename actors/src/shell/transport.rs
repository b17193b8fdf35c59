//! Owns the connections to the agents. A connection is made when somebody first wants to use it, so nothing
//! has to be told again after this actor was restarted.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_platform::{InstanceId, Platform};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::children::{ChildDef, Started};
use super::connection::{self, Command, ConnectionArgs};
use super::directory::Directory;
use super::link::Link;
use super::topology::Told;
use crate::core::supervisor::ChildSpec;

/// Commands that may wait for a connection. When it is full the connection is stuck, and a heartbeat more
/// would tell nothing new.
const QUEUE: usize = 16;

/// Messages of the transport.
pub(crate) enum TransportMsg {
    /// Send a heartbeat request to this life of an instance.
    Beat { id: InstanceId, incarnation: u64, command: Command },
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
    pub(crate) connections: Connections,
    pub(crate) release: String,
    pub(crate) seed: u64,
    pub(crate) topology: Told,
}

struct Entry {
    incarnation: u64,
    commands: mpsc::Sender<Command>,
    task: AbortHandle,
}

/// The connections there are. The transport makes and closes them; heartbeats use one that is there without going
/// through the transport's mailbox, where ten thousand instances would meet.
#[derive(Clone, Default)]
pub(crate) struct Connections(Arc<RwLock<HashMap<InstanceId, Entry>>>);

impl Connections {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<InstanceId, Entry>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<InstanceId, Entry>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Give a command to the connection to this life. Given back when there is none: the transport makes one.
    pub(crate) fn command(&self, id: InstanceId, incarnation: u64, command: Command) -> Result<(), Command> {
        let all = self.read();
        let Some(entry) = all.get(&id).filter(|e| e.incarnation == incarnation) else { return Err(command) };
        match entry.commands.try_send(command) {
            // A full queue means a stuck connection: this heartbeat will count as missed.
            Ok(()) | Err(TrySendError::Full(_)) => Ok(()),
            Err(TrySendError::Closed(command)) => Err(command),
        }
    }
}

impl Connections {
    /// Have every connection see what it has to tell its agent.
    pub(crate) fn nudge(&self) {
        let all = self.read();
        let mut ids: Vec<&InstanceId> = all.keys().collect();
        // In order, so that a simulated run replays exactly.
        ids.sort();
        for entry in ids.into_iter().filter_map(|id| all.get(id)) {
            // One whose queue is full sees it by itself.
            let _ = entry.commands.try_send(Command::Look);
        }
    }
}

pub(crate) struct TransportState {
    args: TransportArgs,
}

impl Drop for TransportState {
    fn drop(&mut self) {
        for (_, entry) in self.args.connections.write().drain() {
            entry.task.abort();
        }
    }
}

impl TransportState {
    /// The connection to this life, made if there is none; `None` for a life that is over.
    fn connection(&mut self, id: InstanceId, incarnation: u64) -> Option<mpsc::Sender<Command>> {
        let there = {
            let all = self.args.connections.read();
            all.get(&id).map(|e| (e.incarnation, e.commands.clone()))
        };
        match there {
            Some((now, commands)) if now == incarnation && !commands.is_closed() => return Some(commands),
            // Numbers of sides and standbys are used again, by instances that count their lives anew.
            Some((now, _))
                if now > incarnation && self.args.directory.incarnation(id) != Some(incarnation) =>
            {
                return None;
            }
            _ => {}
        }
        let owner = self.args.directory.link(id)?;
        let (commands, receiver) = mpsc::channel(QUEUE);
        let args = ConnectionArgs {
            platform: self.args.platform.clone(),
            id,
            incarnation,
            release: self.args.release.clone(),
            owner,
            seed: self.args.seed ^ u64::from(id.0),
            topology: self.args.topology.clone(),
        };
        let task = tokio::spawn(connection::run(args, receiver)).abort_handle();
        self.args.connections.write().insert(id, Entry { incarnation, commands: commands.clone(), task });
        Some(commands)
    }

    fn close(&mut self, id: InstanceId, incarnation: u64) {
        let mut all = self.args.connections.write();
        if all.get(&id).is_some_and(|e| e.incarnation <= incarnation) {
            // Its task ends when the last sender of commands is gone.
            all.remove(&id);
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
        Ok(TransportState { args })
    }

    async fn handle(
        &self,
        _: ActorRef<TransportMsg>,
        message: TransportMsg,
        state: &mut TransportState,
    ) -> Result<(), Failure> {
        state.args.link.taken();
        match message {
            TransportMsg::Beat { id, incarnation, command } => {
                if let Some(connection) = state.connection(id, incarnation) {
                    // A full queue means a stuck connection: this heartbeat will count as missed.
                    let _ = connection.try_send(command);
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
