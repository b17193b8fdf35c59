//! A way to an actor that survives its restarts. No name is registered anywhere: whoever may talk to an
//! actor holds its link.

use std::sync::{Arc, PoisonError, RwLock};

use super::actor::ActorRef;

use crate::telemetry::{self, Depth};

struct Inner<M> {
    kind: &'static str,
    depth: Depth,
    actor: RwLock<Option<ActorRef<M>>>,
}

/// A link to the actor that has this place in the tree now.
pub(crate) struct Link<M>(Arc<Inner<M>>);

impl<M> Clone for Link<M> {
    fn clone(&self) -> Self {
        Link(self.0.clone())
    }
}

impl<M: Send + 'static> Link<M> {
    /// A link to nobody yet; `kind` labels metrics.
    pub(crate) fn new(kind: &'static str) -> Link<M> {
        Link(Arc::new(Inner { kind, depth: Depth::of(kind), actor: RwLock::new(None) }))
    }

    /// From now on this actor has the place.
    pub(crate) fn set(&self, actor: ActorRef<M>) {
        self.0.depth.clear();
        *self.0.actor.write().unwrap_or_else(PoisonError::into_inner) = Some(actor);
    }

    /// Send. False when there is no such actor now; what it would have done is lost, as in a crash.
    pub(crate) fn send(&self, message: M) -> bool {
        let actor = self.0.actor.read().unwrap_or_else(PoisonError::into_inner);
        let sent = actor.as_ref().is_some_and(|a| a.send_message(message).is_ok());
        drop(actor);
        if sent {
            self.0.depth.sent();
        } else {
            telemetry::lost(self.0.kind);
        }
        sent
    }

    /// The actor took a message out of its mailbox.
    pub(crate) fn taken(&self) {
        self.0.depth.taken();
    }
}
