//! A panic in a handler restarts that actor and nothing else.

use super::*;
use crate::core::policy::Patch;
use crate::shell::effects::EffectsMsg;
use crate::shell::heartbeat::HeartbeatMsg;
use crate::shell::instance::InstanceMsg;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::oneshot;

#[tokio::test(start_paused = true)]
async fn a_heartbeat_actor_that_panics_goes_on_watching() {
    let w = world().await;
    w.up("web").await;
    w.up("db").await;
    let db = w.tree.heartbeat("db").await.unwrap().sent;
    assert!(w.tree.instance_for_test("web").heartbeat.send(HeartbeatMsg::Panic));
    w.pass(Duration::from_secs(5)).await;
    let web = w.tree.heartbeat("web").await.unwrap();
    assert!(web.received >= 15 && web.missed == 0, "{web:?}");
    assert!(w.tree.heartbeat("db").await.unwrap().sent > db, "the neighbour's actor kept its counts");
    assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Healthy);
    w.fake.hang(1);
    w.fake.called("fence 1 1").await;
}

/// Hold the recovery actor up in a save, so that what is sent meanwhile waits in its mailbox.
async fn hold_up(w: &World) -> (Arc<tokio::sync::Notify>, oneshot::Receiver<()>) {
    let gate = Arc::new(tokio::sync::Notify::new());
    *w.store.gate.lock().unwrap() = Some(gate.clone());
    let (reply, written) = oneshot::channel();
    let (policy, overrides) = (w.tree.policy_of("web").await.unwrap(), Patch::default());
    let message = InstanceMsg::SetPolicy { policy, overrides, reply: Some(reply) };
    assert!(w.tree.instance_for_test("web").link.send(message));
    w.pass(10 * MS).await;
    assert!(w.store.gate.lock().unwrap().is_none(), "the save is under way");
    (gate, written)
}

#[tokio::test(start_paused = true)]
async fn an_answer_waits_until_it_is_written_down() {
    let w = world().await;
    w.up("web").await;
    let (gate, mut written) = hold_up(&w).await;
    w.pass(Duration::from_secs(4)).await;
    assert!(written.try_recv().is_err(), "answered before it is on disk");
    gate.notify_one();
    written.await.unwrap();
    // A disk that cannot be written does not keep anybody waiting for ever.
    let (_gate, written) = hold_up(&w).await;
    let since = tokio::time::Instant::now();
    written.await.unwrap();
    let limit = TreeConfig::default().store_limit;
    assert!(since.elapsed() <= limit + MS, "{:?}", since.elapsed());
    // Nor does the end of the daemon.
    let (_gate, written) = hold_up(&w).await;
    w.tree.shutdown().await;
    written.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_recovery_actor_that_panics_loses_no_work() {
    let w = world().await;
    w.up("web").await;
    let (gate, _written) = hold_up(&w).await;
    // The orders of the recovery wait behind the panic and are lost with the mailbox.
    assert!(w.tree.instance_for_test("web").recovery.send(EffectsMsg::Panic));
    w.fake.panic(1, "die").await;
    w.pass(10 * MS).await;
    assert_eq!(w.fake.count("fence"), 0);
    gate.notify_one();
    w.store.phase("RECOVERY_COMPLETE").await;
    assert_eq!((w.fake.count("fence"), w.fake.count("boot")), (1, 2));
    w.shows("web", InstanceState::Healthy).await;
}

#[tokio::test(start_paused = true)]
async fn a_recovery_actor_that_panics_does_no_work_twice() {
    let w = world().await;
    w.up("web").await;
    let (gate, _written) = hold_up(&w).await;
    w.fake.panic(1, "die").await;
    w.pass(10 * MS).await;
    // The panic comes right behind the orders: their acknowledgement is still under way.
    assert!(w.tree.instance_for_test("web").recovery.send(EffectsMsg::Panic));
    gate.notify_one();
    w.store.phase("RECOVERY_COMPLETE").await;
    w.pass(Duration::from_secs(1)).await;
    assert_eq!((w.fake.count("fence"), w.fake.count("reclaim"), w.fake.count("boot")), (1, 1, 2));
    assert_eq!(w.store.phases().len(), 6, "{:?}", w.store.phases());
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_panics_is_made_anew() {
    let w = world().await;
    w.fake.script("connect", &[Next::Panic, Next::Panic]);
    w.up("web").await;
}

#[tokio::test(start_paused = true)]
async fn an_instance_actor_that_panics_adopts_its_kernel() {
    let w = world().await;
    w.up("web").await;
    assert!(w.tree.instance_for_test("web").link.send(InstanceMsg::Panic));
    w.pass(Duration::from_secs(5)).await;
    let view = w.tree.status("web").await.unwrap();
    assert_eq!((view.state, view.incarnation), (InstanceState::Healthy, 1));
    assert_eq!((w.fake.count("fence"), w.fake.count("boot")), (0, 1));
    w.fake.panic(1, "die").await;
    assert_eq!(w.store.phase("RECOVERY_COMPLETE").await.recovered, Some(true));
}

#[tokio::test(start_paused = true)]
async fn an_instance_actor_that_panics_in_a_recovery_finishes_it() {
    for blocked in ["fence", "reclaim", "boot"] {
        let w = world().await;
        w.up("web").await;
        let gate = Arc::new(tokio::sync::Notify::new());
        w.fake.script(blocked, &[Next::Block(gate.clone())]);
        w.fake.panic(1, "die").await;
        let call = ["fence 1 1", "reclaim 1 1 false", "boot 1 2"];
        w.fake.called(call.iter().find(|c| c.starts_with(blocked)).unwrap()).await;
        assert!(w.tree.instance_for_test("web").link.send(InstanceMsg::Panic));
        w.pass(100 * MS).await;
        gate.notify_one();
        let last = w.store.phase("RECOVERY_COMPLETE").await;
        assert_eq!(last.incident, 1, "{blocked}: the same incident");
        let view = w.shows("web", InstanceState::Healthy).await;
        assert_eq!(view.incarnation, 2, "{blocked}");
        assert_eq!(w.fake.count("boot"), 2, "{blocked}: {:?}", w.fake.log());
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_is_restarted_when_it_fails_and_stopped_in_its_turn() {
    let w = world().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let stopped = Arc::new(AtomicUsize::new(0));
    let (r, s) = (runs.clone(), stopped.clone());
    let service = Service::new("control", Duration::from_secs(1), move |mut stop| {
        let (n, s) = (r.fetch_add(1, Ordering::SeqCst), s.clone());
        async move {
            match n {
                0 => return Err("bind: address in use".into()),
                1 => panic!("a bug"),
                _ => {}
            }
            stop.asked().await;
            s.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    });
    w.tree.add_service(service).await.unwrap();
    w.pass(Duration::from_secs(1)).await;
    assert_eq!(runs.load(Ordering::SeqCst), 3);
    w.up("web").await;
    w.tree.shutdown().await;
    assert_eq!((runs.load(Ordering::SeqCst), stopped.load(Ordering::SeqCst)), (3, 1));
    w.tree.closed().await;
    assert_eq!(w.fake.running(1), Some(1), "the kernel goes on");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_keeps_failing_ends_the_tree_and_no_kernel() {
    let w = world().await;
    w.up("web").await;
    let service = Service::new("control", Duration::from_secs(1), |_| async { Err("no".to_string()) });
    w.tree.add_service(service).await.unwrap();
    w.tree.closed().await;
    assert_eq!((w.fake.running(1), w.fake.count("fence")), (Some(1), 0));
}
