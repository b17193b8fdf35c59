use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::*;

/// Does what it is told and tells what it did.
struct Worker;

enum Order {
    Say(u32),
    Fail,
    Panic,
    Wait(Arc<Notify>),
    Sleep(Duration),
    Start(oneshot::Sender<ActorRef<Order>>),
    Say2(u32, ActorRef<Order>),
}

type Said = mpsc::UnboundedSender<String>;

impl Actor for Worker {
    type Msg = Order;
    type State = (Said, Vec<Guard>);
    type Arguments = (Said, &'static str);

    async fn pre_start(
        &self,
        _: ActorRef<Order>,
        (said, how): (Said, &'static str),
    ) -> Result<Self::State, Failure> {
        match how {
            "fail" => Err("it is to fail".into()),
            "panic" => panic!("it is to panic"),
            "wait" => std::future::pending().await,
            _ => Ok((said.clone(), vec![Guard(said)])),
        }
    }

    async fn handle(
        &self,
        me: ActorRef<Order>,
        order: Order,
        (said, _): &mut Self::State,
    ) -> Result<(), Failure> {
        match order {
            Order::Say(n) => said.send(n.to_string()).unwrap(),
            Order::Fail => return Err("told to fail".into()),
            Order::Panic => panic!("told to panic"),
            Order::Wait(until) => until.notified().await,
            Order::Sleep(time) => sleep(time).await,
            Order::Start(reply) => {
                let child = spawn_linked(Worker, (said.clone(), "ok"), me.cell()).await?;
                assert!(reply.send(child).is_ok());
            }
            Order::Say2(left, other) => {
                said.send(left.to_string()).unwrap();
                if left > 0 {
                    other.send_message(Order::Say2(left - 1, me)).unwrap();
                }
            }
        }
        Ok(())
    }

    async fn child_ended(
        &self,
        _: ActorRef<Order>,
        ended: Ended,
        (said, _): &mut Self::State,
    ) -> Result<(), Failure> {
        said.send(format!("{:?}", ended.exit)).unwrap();
        Ok(())
    }
}

struct Guard(Said);

impl Drop for Guard {
    fn drop(&mut self) {
        // The test may have ended.
        let _ = self.0.send("dropped".into());
    }
}

async fn worker() -> (ActorRef<Order>, mpsc::UnboundedReceiver<String>) {
    let (said, heard) = mpsc::unbounded_channel();
    (spawn(Worker, (said, "ok")).await.unwrap(), heard)
}

/// A worker and one it started.
async fn family() -> (ActorRef<Order>, ActorRef<Order>, mpsc::UnboundedReceiver<String>) {
    let (parent, heard) = worker().await;
    let (reply, child) = oneshot::channel();
    parent.send_message(Order::Start(reply)).unwrap();
    (parent, child.await.unwrap(), heard)
}

async fn hear<const N: usize>(heard: &mut mpsc::UnboundedReceiver<String>) -> [String; N] {
    let mut all = [const { String::new() }; N];
    for one in &mut all {
        *one = heard.recv().await.unwrap();
    }
    all
}

#[tokio::test(start_paused = true)]
async fn messages_come_in_order() {
    let (actor, mut heard) = worker().await;
    for n in 0..100 {
        actor.send_message(Order::Say(n)).unwrap();
    }
    for n in 0..100 {
        assert_eq!(heard.recv().await.unwrap(), n.to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_comes_before_messages_that_wait_and_after_the_one_under_way() {
    let (actor, mut heard) = worker().await;
    let until = Arc::new(Notify::new());
    actor.send_message(Order::Wait(until.clone())).unwrap();
    actor.send_message(Order::Say(1)).unwrap();
    tokio::task::yield_now().await;
    actor.stop();
    assert!(actor.cell().wait(Some(Duration::from_secs(1))).await.is_err());
    until.notify_one();
    actor.cell().wait(None).await.unwrap();
    assert_eq!(hear(&mut heard).await, ["dropped"]);
    assert!(actor.send_message(Order::Say(2)).is_err());
    assert!(heard.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn the_parent_is_told_each_end_once_with_its_reason() {
    for (order, expected) in [
        (Some(Order::Fail), r#"Failed("told to fail")"#),
        (Some(Order::Panic), r#"Failed("panicked: told to panic")"#),
        (None, "Normal"),
    ] {
        let (parent, child, mut heard) = family().await;
        match order {
            Some(order) => child.send_message(order).unwrap(),
            None => child.stop(),
        }
        assert_eq!(hear(&mut heard).await, ["dropped", expected]);
        assert!(child.cell().wait(None).await.is_ok());
        parent.stop();
        parent.cell().wait(None).await.unwrap();
        assert_eq!(hear(&mut heard).await, ["dropped"]);
        assert!(heard.recv().await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_killed_actor_ends_where_it_waits() {
    let (_parent, child, mut heard) = family().await;
    child.send_message(Order::Sleep(Duration::from_secs(3600))).unwrap();
    tokio::task::yield_now().await;
    let began = Instant::now();
    child.cell().kill();
    child.cell().kill();
    child.cell().wait(Some(Duration::from_secs(1))).await.unwrap();
    assert_eq!(hear(&mut heard).await, ["dropped", "Killed"]);
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn no_actor_outlives_its_parent() {
    for how in 0..3 {
        let (parent, child, _heard) = family().await;
        let (reply, grandchild) = oneshot::channel();
        child.send_message(Order::Start(reply)).unwrap();
        let grandchild = grandchild.await.unwrap();
        match how {
            0 => parent.cell().kill(),
            1 => parent.send_message(Order::Panic).unwrap(),
            _ => parent.stop(),
        }
        for actor in [parent, child, grandchild] {
            actor.cell().wait(Some(Duration::from_secs(1))).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_is_an_error_and_told_to_nobody() {
    let (parent, mut heard) = worker().await;
    let (said, _heard) = mpsc::unbounded_channel();
    for (how, expected) in [("fail", "it is to fail"), ("panic", "panicked: it is to panic")] {
        let error = spawn_linked(Worker, (said.clone(), how), parent.cell()).await.err().unwrap();
        assert_eq!(error.to_string(), expected);
    }
    let slow = spawn_linked(Worker, (said.clone(), "wait"), parent.cell());
    assert!(tokio::time::timeout(Duration::from_secs(1), slow).await.is_err());
    parent.stop();
    parent.cell().wait(None).await.unwrap();
    let late = spawn_linked(Worker, (said, "ok"), parent.cell()).await.err().unwrap();
    assert_eq!(late.to_string(), "whoever started it has ended");
    assert_eq!(hear(&mut heard).await, ["dropped"]);
    assert!(heard.recv().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn actors_that_never_run_out_of_messages_let_others_run() {
    let (a, mut heard) = worker().await;
    let (b, mut other) = worker().await;
    a.send_message(Order::Say2(100_000, b)).unwrap();
    // This task runs again although both always have something to do.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    assert!(heard.len() + other.len() < 100_000);
    while heard.recv().await.unwrap() != "0" {}
    assert!(other.recv().await.is_some());
}
