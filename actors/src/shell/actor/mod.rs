//! Actors: a task with a mailbox, linked to the actor that started it.
//!
//! What Erlang's processes promise and [`children`](super::children) needs: messages one at a time and in order; an
//! end that is always told to the parent, once, with its reason, whether the actor stopped, failed, panicked or was
//! killed; and no actor that outlives its parent. There are several actors for each of thousands of instances,
//! so one costs a few hundred bytes: a task, and a mailbox that is empty most of the time.

mod cell;

use std::any::Any;
use std::future::{Future, poll_fn, ready};
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::task::Poll;

use futures::FutureExt;
use tokio::time::{Instant, Sleep, sleep_until};

pub(crate) use self::cell::{ActorCell, ActorId, ActorRef};
use self::cell::{End, Shared};

/// Why an actor failed.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How an actor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It was asked to stop.
    Normal,
    /// It was killed: itself, or with its parent.
    Killed,
    /// A handler failed or panicked.
    Failed(String),
}

/// Tells a parent that one of its actors ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) id: ActorId,
    pub(crate) exit: Exit,
}

/// Behaviour of an actor.
pub(crate) trait Actor: Sized + Send + Sync + 'static {
    /// What it is sent.
    type Msg: Send + 'static;
    /// What it keeps between messages; dropped when it ends.
    type State: Send + 'static;
    /// What it is started with.
    type Arguments: Send + 'static;

    /// Make the state. Runs in the starter's task; messages sent meanwhile wait.
    fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> impl Future<Output = Result<Self::State, Failure>> + Send;

    /// One message. An error ends the actor as a failure.
    fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// When [`Actor::tick`] is wanted; asked after everything that was handled. Costs less than a message from a
    /// task that sleeps.
    fn due(&self, _: &Self::State) -> Option<Instant> {
        None
    }

    /// It is due. Handled after messages that wait. Whoever is called has to change what
    /// [`Actor::due`] says.
    fn tick(
        &self,
        _: ActorRef<Self::Msg>,
        _: &mut Self::State,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }

    /// One of its own actors ended. Handled before messages that wait.
    fn child_ended(
        &self,
        _: ActorRef<Self::Msg>,
        _: Ended,
        _: &mut Self::State,
    ) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }
}

/// Start an actor that has no parent.
pub(crate) async fn spawn<A: Actor>(actor: A, args: A::Arguments) -> Result<ActorRef<A::Msg>, Failure> {
    start(actor, args, None).await
}

/// Start an actor whose end is told to its parent, and which ends with its parent.
pub(crate) async fn spawn_linked<A: Actor>(
    actor: A,
    args: A::Arguments,
    parent: ActorCell,
) -> Result<ActorRef<A::Msg>, Failure> {
    start(actor, args, Some(parent)).await
}

async fn start<A: Actor>(
    actor: A,
    args: A::Arguments,
    parent: Option<ActorCell>,
) -> Result<ActorRef<A::Msg>, Failure> {
    let me = ActorRef::new();
    // Whatever ends the start, also nobody waiting for it any more, ends what it started.
    let mut end = End::new(me.cell());
    let state = match AssertUnwindSafe(actor.pre_start(me.clone(), args)).catch_unwind().await {
        Ok(state) => state?,
        Err(panic) => return Err(panic_text(&*panic).into()),
    };
    if let Some(parent) = parent {
        if !parent.adopt(me.cell()) {
            return Err("whoever started it has ended".into());
        }
        end.tell(parent);
    }
    let myself = me.clone();
    let task = tokio::spawn(async move {
        let mut end = end;
        let ran = AssertUnwindSafe(run(actor, myself, state)).catch_unwind().await;
        end.exit = match ran {
            Ok(Ok(())) => Exit::Normal,
            Ok(Err(error)) => Exit::Failed(error.to_string()),
            Err(panic) => Exit::Failed(panic_text(&*panic)),
        };
    });
    me.runs(task.abort_handle());
    Ok(me)
}

enum Next<M> {
    Stop,
    Ended(Ended),
    Message(M),
    Tick,
}

async fn run<A: Actor>(actor: A, me: ActorRef<A::Msg>, mut state: A::State) -> Result<(), Failure> {
    let mut timer = pin!(sleep_until(Instant::now()));
    loop {
        // An actor whose mailbox never runs empty lets others run, too.
        tokio::task::consume_budget().await;
        let due = actor.due(&state);
        if let Some(due) = due
            && timer.deadline() != due
        {
            timer.as_mut().reset(due);
        }
        match next(&me.0, due.map(|_| timer.as_mut())).await {
            Next::Tick => actor.tick(me.clone(), &mut state).await?,
            Next::Stop => return Ok(()),
            Next::Ended(ended) => actor.child_ended(me.clone(), ended, &mut state).await?,
            Next::Message(message) => actor.handle(me.clone(), message, &mut state).await?,
        }
    }
}

/// A wish to stop comes first, then the ends of its own actors, then messages, then the timer.
async fn next<M: Send + 'static>(shared: &Shared<M>, mut timer: Option<Pin<&mut Sleep>>) -> Next<M> {
    poll_fn(|cx| {
        let mut mailbox = shared.mailbox();
        if mailbox.stop {
            return Poll::Ready(Next::Stop);
        }
        if let Some(ended) = mailbox.ended.pop_front() {
            return Poll::Ready(Next::Ended(ended));
        }
        if let Some(message) = mailbox.messages.pop_front() {
            return Poll::Ready(Next::Message(message));
        }
        mailbox.wait(cx);
        drop(mailbox);
        match &mut timer {
            Some(timer) => timer.as_mut().poll(cx).map(|()| Next::Tick),
            None => Poll::Pending,
        }
    })
    .await
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no text"))
}

#[cfg(test)]
mod tests;
