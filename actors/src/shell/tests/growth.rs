//! The new kernel of a morph lands on little, and gets what the old one had.

use std::sync::Arc;

use tokio::sync::Notify;

use super::morphs::{again, at_rest, to};
use super::*;

/// One CPU of two, half of the memory.
fn landing() -> MorphArgs {
    MorphArgs { cpus: vec![10], memory_bytes: Some(256 << 20), ..to(MorphGoal::Commit) }
}

fn has(web: &InstanceView) -> (&[u32], u64) {
    (&web.cpus, web.memory_bytes >> 20)
}

#[tokio::test(start_paused = true)]
async fn it_gets_what_the_old_one_had_and_the_rest_goes_back() {
    let w = world().await;
    w.up("web").await;
    let plan = w.tree.morph(MorphArgs { dry_run: true, ..landing() }).await.unwrap().side.unwrap();
    assert_eq!((plan.cpus, plan.memory_bytes >> 20), (vec![10], 256));
    assert_eq!((plan.later_cpus, plan.later_memory_bytes >> 20), (vec![2], 256));
    let view = w.tree.morph(landing()).await.unwrap();
    assert!(view.steps.iter().any(|s| s.state == "MORPH_GROWING"), "{view:?}");
    let web = at_rest(&w, 511).await;
    assert_eq!((has(&web), web.advice.as_str()), ((&[10, 2][..], 512), ""));
    // The CPU it gets was never the primary's in between; the other one is.
    let log = w.fake.log();
    let at = |call: &str| log.iter().position(|l| l == call).unwrap_or_else(|| panic!("{call}: {log:?}"));
    assert!(at("reclaim 1 1 false") < at("release [3]"), "{log:?}");
    assert!(at("release [3]") < at("grow 511 [2] 256"), "{log:?}");
    assert_eq!(w.fake.count("grow"), 1);
    // It is what the instance is made of from now on.
    w.fake.panic(511, "die").await;
    w.fake.called("boot 511 3").await;
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!(has(&web), (&[10, 2][..], 512));
    assert_eq!(w.fake.count("grow"), 1);
}

#[tokio::test(start_paused = true)]
async fn what_it_does_not_get_is_said_and_comes_with_the_next_start() {
    for (next, want) in [
        (Next::Partial(2), "CPUs [2] and 256 MiB are missing: CPU 2 does not come"),
        (Next::Fail("no such call"), "CPUs [2] and 256 MiB are missing"),
    ] {
        let w = world().await;
        w.up("web").await;
        w.fake.script("grow", &[next.clone(), next.clone(), next]);
        let view = w.tree.morph(landing()).await.unwrap();
        let last = view.steps.last().map(|s| s.detail.clone()).unwrap_or_default();
        assert_eq!(view.committed, Some(true));
        assert!(last.contains(want), "{last}");
        let web = at_rest(&w, 511).await;
        assert_eq!(has(&web), (&[10][..], 256));
        assert!(web.advice.contains("recover web"), "{}", web.advice);
        assert_eq!(w.fake.count("grow"), 3);
        w.fake.called("release [2]").await;
        w.tree.recover("web").await.unwrap();
        let web = w.shows("web", InstanceState::Healthy).await;
        assert_eq!((has(&web), web.advice.as_str()), ((&[10, 2][..], 512), ""));
    }
}

/// Between taking back and giving on: the next daemon finds nothing of the old kernel, and sees to the rest all the same.
#[tokio::test(start_paused = true)]
async fn cpus_that_a_killed_daemon_had_not_given_back_yet_are_given_back_by_the_next() {
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(Notify::new());
    w.fake.script("release", &[Next::Block(gate)]);
    tokio::select! {
        _ = w.tree.morph(landing()) => panic!("it waits"),
        _ = w.fake.called("release [3]") => {}
    }
    let w = again(w).await;
    let web = at_rest(&w, 511).await;
    assert_eq!((has(&web), web.advice.as_str()), ((&[10, 2][..], 512), ""));
    assert_eq!(w.fake.count("release [3]"), 2, "{:?}", w.fake.log());

    // The same for an instance that is terminated.
    let gate = Arc::new(Notify::new());
    w.fake.script("reclaim", &[Next::Block(gate)]);
    tokio::select! {
        _ = w.tree.terminate("web", true) => panic!("it waits"),
        _ = w.fake.called("reclaim 511 2 true") => {}
    }
    // It was done, and nobody saw it.
    w.fake.gone(511);
    let w = again(w).await;
    w.shows("web", InstanceState::Stopped).await;
    w.fake.called("release [10, 2]").await;
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_killed_meanwhile_goes_on_with_it() {
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(Notify::new());
    w.fake.script("grow", &[Next::Block(gate)]);
    let morph = w.tree.morph(landing());
    tokio::select! {
        _ = morph => panic!("it waits"),
        _ = w.fake.called("grow 511 [2] 256") => {}
    }
    let w = again(w).await;
    let web = at_rest(&w, 511).await;
    assert_eq!((has(&web), web.advice.as_str()), ((&[10, 2][..], 512), ""));
    assert_eq!(w.fake.count("grow"), 2);
}

#[tokio::test(start_paused = true)]
async fn a_new_kernel_that_dies_meanwhile_is_started_with_everything() {
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(Notify::new());
    w.fake.script("grow", &[Next::Block(gate.clone())]);
    let args = landing();
    let dies = async {
        w.fake.called("grow 511 [2] 256").await;
        w.fake.panic(511, "die").await;
    };
    let (view, ()) = tokio::join!(w.tree.morph(args), dies);
    assert_eq!(view.unwrap().committed, Some(true));
    w.fake.called("boot 511 3").await;
    let web = at_rest(&w, 511).await;
    assert_eq!(has(&web), (&[10, 2][..], 512));
}

#[tokio::test(start_paused = true)]
async fn what_a_kernel_that_died_did_not_get_is_not_said_of_the_next_one() {
    let w = world().await;
    w.up("web").await;
    let gates: [Arc<Notify>; 4] = Default::default();
    let [old_fence, old_back, fence, grow] = &gates;
    w.fake.script("fence", &[old_fence, fence].map(|gate| Next::Block(gate.clone())));
    w.fake.script("reclaim", &[Next::Block(old_back.clone())]);
    w.fake.script("grow", &[Next::Block(grow.clone())]);
    let dies = async {
        // It dies while the old one is being stopped: that is its recovery's work.
        old_fence.notify_one();
        w.fake.called("reclaim 1 1 false").await;
        while !w.tree.status("web").await.is_ok_and(|v| v.id == 511 && v.last_heartbeat_ms.is_some()) {
            w.pass(MS).await;
        }
        // Until the morph has seen that it serves.
        w.pass(MS * 100).await;
        w.fake.panic(511, "die").await;
        w.fake.called("fence 511 2").await;
        old_back.notify_one();
        // Which has just begun when it is to grow, and is over when it turns out that it cannot.
        w.fake.called("grow 511 [2] 256").await;
        fence.notify_one();
        w.fake.called("boot 511 3").await;
        grow.notify_one();
    };
    let (view, ()) = tokio::join!(w.tree.morph(landing()), dies);
    assert_eq!(view.unwrap().committed, Some(true));
    let web = at_rest(&w, 511).await;
    // Longer than it is tried.
    w.pass(MS * 2000).await;
    let later = w.tree.status("web").await.unwrap();
    for web in [web, later] {
        assert_eq!((has(&web), web.advice.as_str()), ((&[10, 2][..], 512), ""));
    }
    assert!(!w.fake.log().iter().any(|l| l == "release [2]"), "the next one has it");
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_ends_it_meanwhile_gets_everything_back() {
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(Notify::new());
    w.fake.script("grow", &[Next::Block(gate.clone())]);
    let ends = async {
        w.fake.called("grow 511 [2] 256").await;
        w.tree.terminate("web", true).await
    };
    let (view, ended) = tokio::join!(w.tree.morph(landing()), ends);
    assert_eq!(view.unwrap().committed, Some(true));
    assert_eq!(ended.unwrap().state, InstanceState::Stopped);
    w.fake.called("reclaim 511 2 true").await;
    w.fake.called("release [2]").await;
    assert_eq!(w.up("web").await.id, 1);
}
