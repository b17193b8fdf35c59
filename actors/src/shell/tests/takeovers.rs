//! Morphs whose new kernel takes over by itself and of which nobody hears: one serves in the end, with everything.

use std::sync::atomic::Ordering;

use super::morphs::{again, at_rest, to};
use super::states::{Way, counting_in, served};
use super::*;
use crate::core::policy::Key;

/// A kernel that takes over by itself, of which the daemon does not hear; until `seen` nothing more happens.
async fn took_over_unheard() -> (World, Arc<tokio::sync::Notify>) {
    let w = counting_in(Way::Directly).await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.workloads.script("511 TAKE", Next::Unanswered(gate.clone()));
    (w, gate)
}

/// Morph until the new kernel serves, of which nobody hears.
async fn until_it_serves(w: &World) {
    tokio::select! {
        ended = w.tree.morph(to(MorphGoal::Commit)) => panic!("{ended:?}"),
        () = served(w, 511) => {}
    }
}

/// The same, with the daemon killed then.
async fn killed_unheard() -> World {
    let (w, _gate) = took_over_unheard().await;
    until_it_serves(&w).await;
    w.tree.kill_for_test();
    w
}

async fn asked_before_it_was_given_up(w: &World) {
    at_rest(w, 511).await;
    served(w, 511).await;
    assert_eq!(w.fake.workloads.count(511), 6);
    assert!(w.fake.workloads.log().iter().any(|l| l == "511 ROLLBACK"), "it was not asked");
    assert_eq!(w.fake.count("fence 511"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_and_whose_answer_is_lost_is_the_instance() {
    let (w, gate) = took_over_unheard().await;
    gate.notify_one();
    let view = w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
    assert_eq!(view.committed, Some(true));
    let told = view.steps.iter().any(|s| s.detail.contains("the new kernel had taken over"));
    assert!(told, "{:?}", view.steps);
    asked_before_it_was_given_up(&w).await;
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_while_the_daemon_died_is_the_instance() {
    let (w, _gate) = took_over_unheard().await;
    until_it_serves(&w).await;
    let w = again(w).await;
    asked_before_it_was_given_up(&w).await;
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_and_whose_workload_cannot_begin_is_stopped() {
    let w = counting_in(Way::Directly).await;
    w.fake.workloads.script("ACTIVATE", Next::Fail("no room"));
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("the old kernel goes on") && error.message.contains("no room"), "{error}");
    at_rest(&w, 1).await;
    served(&w, 1).await;
    assert_eq!((w.fake.workloads.count(1), w.fake.running(511)), (6, None));
}

#[tokio::test(start_paused = true)]
async fn an_old_kernel_that_dies_when_another_took_over_is_missed_by_nobody() {
    let (w, _gate) = took_over_unheard().await;
    let dies = async {
        served(&w, 511).await;
        w.fake.panic(1, "die").await;
    };
    let (ended, ()) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), dies);
    assert_eq!(ended.unwrap().committed, Some(true));
    asked_before_it_was_given_up(&w).await;
}

#[tokio::test(start_paused = true)]
async fn an_old_kernel_that_dies_before_the_next_daemon_knows_who_took_over_never_serves_again() {
    let w = killed_unheard().await;
    w.fake.panic_unseen(1);
    // The question who took over is answered late: what is healed meanwhile is not told to serve.
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.workloads.script("511 ROLLBACK", Next::Block(gate.clone()));
    let w = again(w).await;
    let limit = Instant::now() + PATIENCE;
    while !w.fake.workloads.log().iter().any(|l| l == "511 ROLLBACK") {
        assert!(Instant::now() < limit, "nobody asks");
        w.pass(MS).await;
    }
    assert_eq!(w.fake.workloads.serving(), [511]);
    gate.notify_one();
    at_rest(&w, 511).await;
    served(&w, 511).await;
    assert_eq!(w.fake.workloads.count(511), 6);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_and_is_lost_before_anybody_knows_leaves_everything_with_the_old_one() {
    let w = killed_unheard().await;
    let incarnation = w.fake.running(511).unwrap();
    w.fake.panic_unseen(511);
    w.fake.workloads.end((InstanceId(511), incarnation));
    let w = again(w).await;
    at_rest(&w, 1).await;
    served(&w, 1).await;
    assert_eq!((w.fake.workloads.count(1), w.fake.running(511)), (6, None));
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_gives_up_too_late_is_told_and_the_new_kernel_serves() {
    let (w, _gate) = took_over_unheard().await;
    let cancels = async {
        served(&w, 511).await;
        w.tree.morph_rollback("web").await
    };
    let (ended, cancelled) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), cancels);
    assert_eq!(ended.unwrap().committed, Some(true));
    assert_eq!(cancelled.unwrap().committed, Some(true), "it was committed");
    asked_before_it_was_given_up(&w).await;
}

#[tokio::test(start_paused = true)]
async fn that_a_kernel_took_over_is_written_down_when_the_store_can_again() {
    let (w, gate) = took_over_unheard().await;
    let mends = async {
        served(&w, 511).await;
        w.store.broken.store(true, Ordering::SeqCst);
        gate.notify_one();
        w.pass(Duration::from_secs(3)).await;
        assert_eq!(w.fake.workloads.serving(), [511]);
        w.store.broken.store(false, Ordering::SeqCst);
    };
    let (ended, ()) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), mends);
    assert_eq!(ended.unwrap().committed, Some(true));
    at_rest(&w, 511).await;
    served(&w, 511).await;
    assert_eq!(w.fake.workloads.count(511), 6);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_and_whose_workload_is_silent_is_stopped() {
    let (w, _gate) = took_over_unheard().await;
    w.fake.workloads.script("ACTIVATE", Next::Fail("no room"));
    // Its CPUs may be late when they are stopped.
    w.fake.script("fence", &[Next::Partial(2), Next::Fail("late")]);
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("the old kernel goes on"), "{error}");
    at_rest(&w, 1).await;
    served(&w, 1).await;
    assert!(w.fake.workloads.log().iter().any(|l| l == "511 ROLLBACK"), "it was not asked");
    assert_eq!((w.fake.workloads.count(1), w.fake.running(511)), (6, None));
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_said_it_never_takes_over_is_not_the_instance_when_it_cannot_be_stopped() {
    let w = counting_in(Way::Directly).await;
    w.fake.workloads.script("511 TAKE", Next::Partial(0));
    w.fake.never_stops();
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("differs from what was sent"), "{error}");
    at_rest(&w, 1).await;
    served(&w, 1).await;
    assert_eq!(w.fake.workloads.count(1), 6);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_is_gone_when_the_next_daemon_asks_has_not_taken_over() {
    let w = killed_unheard().await;
    let incarnation = w.fake.running(511).unwrap();
    w.fake.workloads.end((InstanceId(511), incarnation));
    w.fake.gone(511);
    let w = again(w).await;
    at_rest(&w, 1).await;
    served(&w, 1).await;
    assert_eq!(w.fake.workloads.count(1), 6);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_serves_on_while_nobody_heals_the_old_one() {
    let (w, _gate) = took_over_unheard().await;
    w.tree.policy_set("web", Key::AutoHeal, Some("disabled")).await.unwrap();
    until_it_serves(&w).await;
    w.tree.kill_for_test();
    w.fake.panic_unseen(1);
    // An actor that looks what runs does not answer meanwhile: that says nothing of its kernel.
    w.fake.script("existing", &vec![Next::Late(30 * MS); 5000]);
    let w = again(w).await;
    w.pass(Duration::from_secs(300)).await;
    assert_eq!((w.fake.workloads.serving(), w.fake.count("fence 511")), (vec![511], 0));
    // It is watched, and not asked to stand aside again and again.
    let looks = w.fake.count("existing");
    for _ in 0..100 {
        w.pass(Duration::from_secs(1)).await;
        assert_eq!(w.tree.status("web~morph").await.unwrap().state, InstanceState::Healthy);
    }
    assert_eq!(w.fake.count("existing"), looks);
    // An operator who has the old one started anew ends it.
    w.tree.recover("web").await.unwrap();
    at_rest(&w, 511).await;
    served(&w, 511).await;
    assert_eq!(w.fake.workloads.count(511), 6);
}

#[tokio::test(start_paused = true)]
async fn what_operators_set_while_it_is_written_down_is_set_in_the_new_kernel_only() {
    let (w, gate) = took_over_unheard().await;
    let written = Arc::new(tokio::sync::Notify::new());
    let sets = async {
        served(&w, 511).await;
        *w.store.decides.lock().unwrap() = Some(written.clone());
        gate.notify_one();
        w.pass(Duration::from_secs(2)).await;
        // While it is written down, while the workload is told, while it is looked what runs.
        w.fake.script("existing", &vec![Next::Late(50 * MS); 10]);
        let keys = [
            (0, Key::FenceTries, "7"),
            (1, Key::RestartIntensity, "8"),
            (11, Key::MorphRounds, "9"),
            (40, Key::PulseMisses, "11"),
            (200, Key::ConfirmProbes, "2"),
        ];
        let set = futures::future::try_join_all(keys.map(async |(after, key, value)| {
            w.pass(after * MS).await;
            w.tree.policy_set("web", key, Some(value)).await
        }));
        let ends = async {
            w.pass(10 * MS).await;
            // Nothing of the old kernel may be written behind the commit record.
            let records = w.store.load_instances().await.unwrap();
            let old = records.iter().find(|r| r.spec.name == "web").unwrap();
            assert_eq!((old.spec.id, old.policy.fence_tries), (InstanceId(1), Policy::default().fence_tries));
            written.notify_one();
        };
        tokio::join!(set, ends).0.map(drop)
    };
    let (ended, set) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), sets);
    assert_eq!(ended.unwrap().committed, Some(true));
    set.unwrap();
    at_rest(&w, 511).await;
    let policy = w.tree.policy_of("web").await.unwrap();
    assert_eq!((policy.fence_tries, policy.restart_intensity, policy.morph_rounds), (7, 8, 9));
    assert_eq!((policy.pulse_misses, policy.confirm_probes), (11, 2));
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_took_over_and_whose_agent_is_away_when_the_next_daemon_asks_is_the_instance() {
    let w = killed_unheard().await;
    w.fake.workloads.script("511 ROLLBACK", Next::Fail("its guardian starts it anew"));
    let w = again(w).await;
    asked_before_it_was_given_up(&w).await;
}

#[tokio::test(start_paused = true)]
async fn what_operators_set_before_it_is_written_down_stays_set() {
    let (w, gate) = took_over_unheard().await;
    let sets = async {
        served(&w, 511).await;
        w.store.broken.store(true, Ordering::SeqCst);
        gate.notify_one();
        w.pass(Duration::from_secs(2)).await;
        let set = w.tree.policy_set("web", Key::FenceTries, Some("7"));
        let mends = async {
            w.pass(MS).await;
            w.store.broken.store(false, Ordering::SeqCst);
        };
        tokio::join!(set, mends).0.map(drop)
    };
    let (ended, set) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), sets);
    assert_eq!(ended.unwrap().committed, Some(true));
    set.unwrap();
    at_rest(&w, 511).await;
    assert_eq!(w.tree.policy_of("web").await.unwrap().fence_tries, 7);
    let w = again(w).await;
    at_rest(&w, 511).await;
    assert_eq!(w.tree.policy_of("web").await.unwrap().fence_tries, 7);
}
