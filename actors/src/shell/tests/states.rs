//! Morphs of instances whose workload takes its state along: one serves at every moment, and nothing it did is lost.

use std::sync::atomic::Ordering;

use super::morphs::{again, at_rest, on, to};
use super::*;

async fn counting() -> World {
    counting_in(Way::ThroughTheDaemon).await
}

/// How the state of a workload gets to the new kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    ThroughTheDaemon,
    /// From kernel to kernel, and the new one takes over by itself.
    Directly,
}

const WAYS: [Way; 2] = [Way::ThroughTheDaemon, Way::Directly];

pub(super) async fn counting_in(way: Way) -> World {
    let w = world().await;
    w.fake.workloads.switch_on();
    if way == Way::Directly {
        w.fake.workloads.go_directly();
    }
    w.up("web").await;
    served(&w, 1).await;
    for n in 1..=5 {
        assert_eq!(w.fake.workloads.count(1), n);
    }
    w
}

/// Wait until this kernel's workload, and no other, serves.
pub(super) async fn served(w: &World, id: u16) {
    let limit = Instant::now() + PATIENCE;
    loop {
        let serving = w.fake.workloads.serving();
        assert!(serving.len() <= 1, "two serve: {serving:?}");
        if serving == [id] {
            return;
        }
        assert!(Instant::now() < limit, "{id} does not serve, {serving:?} do");
        w.pass(MS).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_count_goes_on_in_the_new_kernel() {
    for way in WAYS {
        let w = counting_in(way).await;
        let view = w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
        assert_eq!(view.committed, Some(true));
        let transfer = view.transfer.unwrap();
        assert_eq!((transfer.sections, transfer.rounds), (2, 3), "{transfer:?}");
        assert!(transfer.bytes >= 4096, "{transfer:?}");
        let b = view.blackout.unwrap();
        assert!(b.total_us >= b.freeze_us + b.copy_us + b.check_us + b.record_us + b.activate_us, "{b:?}");
        served(&w, 511).await;
        assert_eq!(w.fake.workloads.count(511), 6);
        at_rest(&w, 511).await;
        // And back, step by step, while it counts.
        w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
        assert_eq!(w.fake.workloads.count(511), 7);
        w.tree.morph(on(MorphGoal::Validate)).await.unwrap();
        assert_eq!(w.fake.workloads.count(511), 8);
        w.tree.morph(on(MorphGoal::Commit)).await.unwrap();
        let web = w.tree.status("web").await.unwrap();
        assert_eq!(w.fake.workloads.count(web.id), 9);
        at_rest(&w, web.id).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_morph_that_waits_for_its_operator_under_the_next_daemon_copies_everything_anew() {
    for way in WAYS {
        let w = counting_in(way).await;
        w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
        assert_eq!(w.fake.workloads.count(1), 6);
        let w = again(w).await;
        let limit = Instant::now() + PATIENCE;
        while w.tree.morph_status("web").await.is_ok_and(|m| m.state != "MORPH_PREPARING") {
            assert!(Instant::now() < limit, "{:?}", w.tree.morph_status("web").await);
            w.pass(MS).await;
        }
        for name in ["web", "web~morph"] {
            w.shows(name, InstanceState::Healthy).await;
        }
        assert_eq!(w.fake.workloads.count(1), 7);
        let view = w.tree.morph(on(MorphGoal::Commit)).await.unwrap();
        assert_eq!((view.committed, view.transfer.unwrap().sections), (Some(true), 2));
        served(&w, 511).await;
        assert_eq!(w.fake.workloads.count(511), 8, "{way:?}");
        at_rest(&w, 511).await;
    }
}

#[tokio::test(start_paused = true)]
async fn memory_that_both_kernels_have_is_given_back_with_the_morph_and_done_without_when_there_is_none() {
    let w = counting().await;
    let there = async || w.fake.windows().await.unwrap().len();
    w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    assert_eq!(there().await, 0, "nothing is copied yet");
    w.tree.morph(on(MorphGoal::Validate)).await.unwrap();
    assert_eq!((there().await, w.fake.count("window 1 511")), (1, 1));
    // It is tried until it works; nobody waits for that.
    w.fake.script("close", &[Next::Fail("no answer"), Next::Fail("no answer")]);
    w.tree.morph(on(MorphGoal::Commit)).await.unwrap();
    let web = at_rest(&w, 511).await;
    assert_eq!(w.fake.count("close"), 3);
    w.fake.script("window", &[Next::Fail("no room")]);
    assert_eq!(w.tree.morph(to(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    served(&w, w.tree.status("web").await.unwrap().id).await;
    assert!(web.id == 511 && there().await == 0);
    // Whoever is killed leaves it to the next.
    w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
    assert_eq!(there().await, 1);
    let w = again(w).await;
    let limit = Instant::now() + PATIENCE;
    while !w.fake.windows().await.unwrap().is_empty() {
        assert!(Instant::now() < limit, "memory of a morph is left");
        w.pass(MS).await;
    }
}

#[tokio::test(start_paused = true)]
async fn memory_that_both_kernels_have_is_given_back_when_nobody_knows_whether_the_new_one_serves() {
    let w = counting().await;
    w.fake.workloads.script("511 COMMIT", Next::Fail("lost"));
    w.fake.never_stops();
    let ended = w.tree.morph(to(MorphGoal::Commit)).await;
    assert_eq!(ended.map(|v| v.committed), Ok(Some(true)), "it can only go forward");
    assert_eq!((w.fake.count("close"), w.fake.windows().await.unwrap().len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_round_is_seen_while_it_is_copied() {
    let w = counting().await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.workloads.script("511 PIECE", Next::Block(gate.clone()));
    let looks = async {
        let limit = Instant::now() + PATIENCE;
        let round = loop {
            let view = w.tree.morph_status("web").await;
            let transfer = view.ok().and_then(|v| v.transfer);
            if let Some(t) = transfer.filter(|t| t.round_bytes > 0) {
                break t;
            }
            assert!(Instant::now() < limit, "nothing is copied");
            w.pass(MS).await;
        };
        gate.notify_one();
        round
    };
    let (view, round) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), looks);
    assert!(round.round_bytes >= 4096 && round.rounds == 0, "{round:?}");
    let done = view.unwrap().transfer.unwrap();
    assert!(done.round_bytes == 0 && done.bytes >= round.round_bytes, "{done:?}");
}

#[tokio::test(start_paused = true)]
async fn what_did_not_arrive_whole_is_named_and_the_old_kernel_goes_on() {
    for way in WAYS {
        let w = counting_in(way).await;
        let last = if way == Way::Directly { "511 TAKE" } else { "511 END" };
        w.fake.workloads.script(last, Next::Partial(0));
        if way == Way::ThroughTheDaemon {
            w.fake.workloads.script(last, Next::Panic);
            w.fake.workloads.script(last, Next::Panic);
        }
        let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
        let told = error.to_string();
        assert!(told.contains("section count/sessions differs from what was sent"), "{told}");
        served(&w, 1).await;
        assert_eq!(w.fake.workloads.count(1), 6);
        at_rest(&w, 1).await;
    }
}

/// Messages each side gets in a morph that is committed.
const OLD: [&str; 4] = ["1 PREPARE", "1 NEGOTIATE", "1 TRANSFER_STATE", "1 FREEZE"];
const NEW: [&str; 6] = ["511 PREPARE", "511 NEGOTIATE", "511 PIECE", "511 END", "511 VALIDATE", "511 COMMIT"];

/// The same, when that one takes over by itself.
const TAKES: [&str; 4] = ["511 PREPARE", "511 NEGOTIATE", "511 END", "511 TAKE"];

/// Messages up to the decision.
fn messages(way: Way) -> Vec<&'static str> {
    let new = if way == Way::Directly { &TAKES[..] } else { &NEW[..] };
    OLD.iter().chain(new).copied().collect()
}

#[tokio::test(start_paused = true)]
async fn every_message_is_sent() {
    for way in WAYS {
        let w = counting_in(way).await;
        w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
        let log = w.fake.workloads.log();
        for message in messages(way).into_iter().chain(["1 COMMIT", "511 COMMIT"]) {
            assert!(log.iter().any(|l| l == message), "{way:?}, {message}: {log:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_lost_at_any_message_leaves_one_that_serves_and_the_whole_count() {
    for way in WAYS {
        for message in messages(way) {
            let w = counting_in(way).await;
            w.fake.workloads.script(message, Next::Fail("lost"));
            let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
            assert!(error.message.contains("the old kernel goes on"), "{way:?}, {message}: {error}");
            at_rest(&w, 1).await;
            served(&w, 1).await;
            assert_eq!(w.fake.workloads.count(1), 6, "{way:?}, {message}");
            // Nothing of it stands in the way of the next one.
            assert_eq!(
                w.tree.morph(to(MorphGoal::Commit)).await.unwrap().committed,
                Some(true),
                "{way:?}, {message}"
            );
            let id = w.tree.status("web").await.unwrap().id;
            served(&w, id).await;
            assert_eq!(w.fake.workloads.count(id), 7, "{way:?}, {message}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_kernel_that_dies_at_any_message_leaves_everything_with_the_old_one() {
    for way in WAYS {
        for message in messages(way).into_iter().filter(|m| m.starts_with("511")) {
            let w = counting_in(way).await;
            w.fake.workloads.script(message, Next::Die);
            let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
            assert!(error.message.contains("the old kernel goes on"), "{way:?}, {message}: {error}");
            let web = at_rest(&w, 1).await;
            assert_eq!((web.incarnation, web.recoveries), (1, 0), "{way:?}, {message}");
            served(&w, 1).await;
            assert_eq!(w.fake.workloads.count(1), 6, "{way:?}, {message}");
            assert_eq!(w.fake.running(511), None, "{way:?}, {message}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_kernel_that_dies_at_any_message_is_recovered() {
    for way in WAYS {
        for message in &OLD {
            let w = counting_in(way).await;
            w.fake.workloads.script(message, Next::Die);
            assert!(w.tree.morph(to(MorphGoal::Commit)).await.is_err(), "{way:?}, {message}");
            let web = at_rest(&w, 1).await;
            assert_eq!((web.incarnation, web.recoveries), (2, 1), "{way:?}, {message}");
            // A crash takes the state along, with or without a morph.
            served(&w, 1).await;
            assert_eq!(w.fake.workloads.count(1), 1, "{way:?}, {message}");
        }
        // After the decision it is not needed any more.
        let w = counting_in(way).await;
        w.fake.workloads.script("1 COMMIT", Next::Die);
        assert_eq!(w.tree.morph(to(MorphGoal::Commit)).await.unwrap().committed, Some(true));
        served(&w, 511).await;
        assert_eq!(w.fake.workloads.count(511), 6);
        at_rest(&w, 511).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_killed_at_any_message_is_followed_by_one_that_ends_what_it_began() {
    for way in WAYS {
        for message in messages(way).into_iter().chain(["1 COMMIT"]) {
            let w = counting_in(way).await;
            let gate = Arc::new(tokio::sync::Notify::new());
            w.fake.workloads.script(message, Next::Block(gate));
            let reached = async {
                while !w.fake.workloads.log().iter().any(|l| l == message) {
                    w.pass(MS).await;
                }
            };
            tokio::select! {
                ended = w.tree.morph(to(MorphGoal::Commit)) => panic!("{way:?}, {message}: {ended:?}"),
                () = reached => {}
            }
            let decided = message.ends_with("COMMIT");
            let w = again(w).await;
            let id = if decided { 511 } else { 1 };
            at_rest(&w, id).await;
            served(&w, id).await;
            assert_eq!(w.fake.workloads.count(id), 6, "{way:?}, {message}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_written_has_the_old_workload_go_on() {
    for way in WAYS {
        let w = counting_in(way).await;
        w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
        w.store.broken.store(true, Ordering::SeqCst);
        let error = w.tree.morph(on(MorphGoal::Commit)).await.unwrap_err();
        assert!(error.message.contains("the commit record could not be written: disk full"), "{error}");
        // Nor was it left to a kernel of which nobody would know that it may have taken over.
        assert!(!w.fake.workloads.log().iter().any(|l| l == "511 TAKE"), "{way:?}");
        w.store.broken.store(false, Ordering::SeqCst);
        served(&w, 1).await;
        assert_eq!(w.fake.workloads.count(1), 6);
    }
}

async fn with_memory() -> World {
    let w = world().await;
    w.fake.workloads.switch_on();
    w.tree.spawn(SpawnArgs { handover_bytes: 4 << 20, ..args("web") }).await.unwrap();
    served(&w, 1).await;
    assert_eq!(w.tree.status("web").await.unwrap().handover_bytes, 4 << 20);
    w
}

fn writers(w: &World) -> Vec<Option<u16>> {
    w.fake.handovers().into_iter().map(|(_, writer)| writer).collect()
}

#[tokio::test(start_paused = true)]
async fn handover_memory_goes_to_the_new_kernel_with_the_commit_and_back_when_that_is_undone() {
    let w = with_memory().await;
    assert_eq!((w.fake.count("handover create 4194304"), writers(&w)), (1, vec![Some(1)]));
    w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
    assert_eq!(writers(&w), [Some(1)], "not before the commit");
    w.tree.morph(on(MorphGoal::Commit)).await.unwrap();
    at_rest(&w, 511).await;
    assert_eq!(writers(&w), [Some(511)]);
    // The new kernel dies when it is to take over: it is the old one's again, which goes on.
    w.fake.workloads.script("510 COMMIT", Next::Die);
    assert!(w.tree.morph(to(MorphGoal::Commit)).await.is_err());
    at_rest(&w, 511).await;
    served(&w, 511).await;
    assert_eq!((writers(&w), w.fake.count("handover create")), (vec![Some(511)], 1));
    // An old kernel that does not let go of it is stopped, which it would be anyway.
    w.fake.script("assign", &[Next::Fail("no answer")]);
    assert_eq!(w.tree.morph(to(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    let id = at_rest(&w, 510).await.id;
    assert_eq!(writers(&w), [Some(id)]);
    // A crash may have left it half changed: the next kernel gets another one.
    w.fake.panic(id, "die").await;
    while w.fake.count("handover create") < 2 {
        w.pass(MS).await;
    }
    served(&w, id).await;
    assert_eq!(writers(&w), [Some(id)]);
    w.tree.terminate("web", false).await.unwrap();
    assert_eq!(writers(&w), []);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_cannot_have_its_memory_leaves_nothing() {
    let w = world().await;
    w.fake.script("assign", &[Next::Fail("no answer")]);
    let spawn = SpawnArgs { handover_bytes: 4 << 20, ..args("web") };
    let error = w.tree.spawn(spawn.clone()).await.unwrap_err();
    assert!(error.message.contains("handover memory: revoking the writer"), "{error}");
    assert_eq!((writers(&w), w.fake.running(1)), (vec![], None));
    w.tree.spawn(spawn).await.unwrap();
    assert_eq!(writers(&w), [Some(1)]);
}

/// Anything that may go wrong in a morph, one after the other: whatever the seed, one serves in the end, and it has
/// everything unless the kernel that had it died.
#[tokio::test(start_paused = true)]
async fn three_hundred_random_morphs() {
    for way in WAYS {
        let seeds = std::env::var("KMORPH_MORPH_SEED").ok().and_then(|s| s.parse().ok());
        for seed in seeds.map_or(0..300, |s: u64| s..s + 1) {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut pick = |n: usize| {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) as usize % n
            };
            let mut w = counting_in(way).await;
            let (mut id, mut count) = (1, 5);
            for round in 0..3 {
                let side = if id == 511 { 510 } else { 511 };
                let what = format!("{way:?}, seed {seed}, round {round}");
                let on = |message: &str, id: u16| format!("{id} {}", message.split(' ').next_back().unwrap());
                let all: Vec<String> = messages(way)
                    .iter()
                    .map(|m| on(m, if m.starts_with("511") { side } else { id }))
                    .collect();
                let at = all[pick(all.len())].clone();
                // The kernel that has the count is left alone: a crash takes it along.
                let fault = match pick(4) {
                    0 => None,
                    1 => Some(Next::Fail("lost")),
                    2 if !OLD.iter().any(|m| on(m, id) == at) => Some(Next::Die),
                    2 => None,
                    _ => Some(Next::Block(Arc::new(tokio::sync::Notify::new()))),
                };
                let killed = matches!(fault, Some(Next::Block(_)));
                let seen = w.fake.workloads.log().len();
                if let Some(fault) = fault {
                    w.fake.workloads.script(&at, fault);
                }
                let reached = async {
                    while !killed || !w.fake.workloads.log()[seen..].contains(&at) {
                        w.pass(MS).await;
                    }
                };
                tokio::select! {
                    ended = w.tree.morph(to(MorphGoal::Commit)) => drop(ended),
                    () = reached => {}
                }
                if killed {
                    w = again(w).await;
                }
                let limit = Instant::now() + PATIENCE;
                while w.tree.list().await.iter().any(|i| i.side_of.is_some() || i.morph.is_some()) {
                    assert!(Instant::now() < limit, "{what}, {at}: {:?}", w.tree.list().await);
                    assert!(w.fake.workloads.serving().len() <= 1, "{what}, {at}: two serve");
                    w.pass(MS).await;
                }
                id = w.shows("web", InstanceState::Healthy).await.id;
                served(&w, id).await;
                count += 1;
                assert_eq!(w.fake.workloads.count(id), count, "{what}, {at}");
                w.fake.workloads.forget_scripts();
            }
            w.tree.kill_for_test();
        }
    }
}
