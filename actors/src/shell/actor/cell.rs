//! An actor as others hold it: its mailbox, its links, its end.

use std::collections::VecDeque;
use std::fmt;
use std::mem::take;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::{Ended, Exit};

/// Tells actors of this process apart; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ActorId(u64);

/// An actor did not end in time.
#[derive(Debug)]
pub(crate) struct StillRuns;

/// A message to an actor that has ended; it is dropped.
#[derive(Debug)]
pub(crate) struct Gone;

pub(super) struct Mailbox<M> {
    pub(super) messages: VecDeque<M>,
    pub(super) ended: VecDeque<Ended>,
    pub(super) stop: bool,
    /// The actor has ended: nothing is taken any more.
    closed: bool,
    waker: Option<Waker>,
}

impl<M> Mailbox<M> {
    pub(super) fn wait(&mut self, cx: &Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }
}

#[derive(Default)]
struct Life {
    task: Option<AbortHandle>,
    killed: bool,
    over: bool,
    children: Vec<ActorCell>,
}

/// One actor.
pub(super) struct Shared<M> {
    id: ActorId,
    mailbox: Mutex<Mailbox<M>>,
    life: Mutex<Life>,
    over: Notify,
}

/// No code of an actor runs under one of these locks, so what a panic may have poisoned is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M> Shared<M> {
    pub(super) fn mailbox(&self) -> MutexGuard<'_, Mailbox<M>> {
        lock(&self.mailbox)
    }

    /// Change the mailbox and have the actor look at it. False when it has ended.
    fn post(&self, change: impl FnOnce(&mut Mailbox<M>)) -> bool {
        let mut mailbox = self.mailbox();
        if mailbox.closed {
            return false;
        }
        change(&mut mailbox);
        let waker = mailbox.waker.take();
        drop(mailbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

/// What can be done with an actor whatever its messages are.
trait Cell: Send + Sync {
    fn id(&self) -> ActorId;
    fn life(&self) -> MutexGuard<'_, Life>;
    fn over(&self) -> &Notify;
    fn stop(&self);
    fn child_ended(&self, ended: Ended);
    /// Take no messages any more; those that wait are dropped.
    fn close(&self);
}

impl<M: Send + 'static> Cell for Shared<M> {
    fn id(&self) -> ActorId {
        self.id
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }

    fn over(&self) -> &Notify {
        &self.over
    }

    fn stop(&self) {
        self.post(|m| m.stop = true);
    }

    fn child_ended(&self, ended: Ended) {
        self.post(|m| m.ended.push_back(ended));
    }

    fn close(&self) {
        let mut mailbox = self.mailbox();
        mailbox.closed = true;
        // Dropping a message may run anything, so not under the lock.
        let left = (take(&mut mailbox.messages), take(&mut mailbox.ended), mailbox.waker.take());
        drop(mailbox);
        drop(left);
    }
}

/// An actor that can be sent messages.
pub(crate) struct ActorRef<M>(pub(super) Arc<Shared<M>>);

impl<M> Clone for ActorRef<M> {
    fn clone(&self) -> Self {
        ActorRef(self.0.clone())
    }
}

impl<M: Send + 'static> ActorRef<M> {
    pub(super) fn new() -> ActorRef<M> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        ActorRef(Arc::new(Shared {
            id: ActorId(NEXT.fetch_add(1, Ordering::Relaxed)),
            mailbox: Mutex::new(Mailbox {
                messages: VecDeque::new(),
                ended: VecDeque::new(),
                stop: false,
                closed: false,
                waker: None,
            }),
            life: Mutex::default(),
            over: Notify::new(),
        }))
    }

    /// Put a message into its mailbox.
    pub(crate) fn send_message(&self, message: M) -> Result<(), Gone> {
        if self.0.post(|m| m.messages.push_back(message)) { Ok(()) } else { Err(Gone) }
    }

    /// Have it stop after the message under way; messages that wait are dropped.
    pub(crate) fn stop(&self) {
        self.0.stop();
    }

    /// The actor without the kind of its messages.
    pub(crate) fn cell(&self) -> ActorCell {
        ActorCell(self.0.clone())
    }

    /// Its task was started. It may have ended, or have been killed, already.
    pub(super) fn runs(&self, task: AbortHandle) {
        let mut life = self.0.life();
        if life.killed {
            task.abort();
        } else if !life.over {
            life.task = Some(task);
        }
    }
}

/// An actor, whatever its messages are.
#[derive(Clone)]
pub(crate) struct ActorCell(Arc<dyn Cell>);

impl fmt::Debug for ActorCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ActorCell").field(&self.id()).finish()
    }
}

impl ActorCell {
    pub(crate) fn id(&self) -> ActorId {
        self.0.id()
    }

    /// Have it stop after the message under way.
    pub(crate) fn stop(&self) {
        self.0.stop();
    }

    /// End it where it waits next, and all actors it started. Returns at once.
    pub(crate) fn kill(&self) {
        let mut life = self.0.life();
        life.killed = true;
        if let Some(task) = life.task.take() {
            task.abort();
        }
    }

    /// Wait until it has ended.
    pub(crate) async fn wait(&self, limit: Option<Duration>) -> Result<(), StillRuns> {
        let ended = async {
            loop {
                let over = self.0.over().notified();
                if self.0.life().over {
                    return;
                }
                over.await;
            }
        };
        match limit {
            None => ended.await,
            Some(limit) => return tokio::time::timeout(limit, ended).await.map_err(|_| StillRuns),
        }
        Ok(())
    }

    /// Link a child. False when this actor has ended.
    pub(super) fn adopt(&self, child: ActorCell) -> bool {
        let mut life = self.0.life();
        let lives = !life.over;
        if lives {
            life.children.push(child);
        }
        lives
    }
}

/// Dropped when an actor ends, however it ends: then its own actors end, and its parent is told.
pub(super) struct End {
    cell: ActorCell,
    parent: Option<ActorCell>,
    pub(super) exit: Exit,
}

impl End {
    pub(super) fn new(cell: ActorCell) -> End {
        End { cell, parent: None, exit: Exit::Killed }
    }

    /// Whom to tell.
    pub(super) fn tell(&mut self, parent: ActorCell) {
        self.parent = Some(parent);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let cell = &self.cell.0;
        cell.close();
        let mut life = cell.life();
        life.over = true;
        life.task = None;
        let children = take(&mut life.children);
        drop(life);
        for child in children {
            child.kill();
        }
        cell.over().notify_waiters();
        if let Some(parent) = self.parent.take() {
            parent.0.life().children.retain(|c| c.id() != cell.id());
            let exit = std::mem::replace(&mut self.exit, Exit::Killed);
            parent.0.child_ended(Ended { id: cell.id(), exit });
        }
    }
}
