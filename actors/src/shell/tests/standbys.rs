//! Standbys: a second kernel waits, and is the instance after a failure or the new kernel of a morph.

use super::morphs::{again, on, to};
use super::*;
use crate::core::policy::Key;

async fn set(w: &World, value: &str) {
    w.tree.policy_set("web", Key::Standby, Some(value)).await.unwrap();
}

/// Wait until web's standby shows this state.
async fn standby(w: &World, state: &str) -> StandbyView {
    let limit = Instant::now() + PATIENCE;
    loop {
        let view = w.tree.status("web").await.unwrap().standby;
        match view {
            Some(view) if view.state == state => return view,
            view => assert!(Instant::now() < limit, "never {state}: {view:?}"),
        }
        w.pass(MS).await;
    }
}

/// Wait until nothing of a standby is there, nor wanted.
async fn none(w: &World) {
    let limit = Instant::now() + PATIENCE;
    while w.tree.status("web").await.unwrap().standby.is_some()
        || w.tree.list().await.iter().any(|i| i.name.contains('~'))
    {
        assert!(Instant::now() < limit, "something is left: {:?}", w.tree.list().await);
        w.pass(MS).await;
    }
    let records = w.store.load_instances().await.unwrap();
    assert!(records.iter().all(|r| !r.spec.name.contains('~')), "{records:?}");
}

/// web serves, with a standby that is ready.
async fn armed() -> World {
    let w = world().await;
    w.fake.workloads.switch_on();
    w.up("web").await;
    set(&w, "same").await;
    standby(&w, "ready").await;
    w
}

fn said(w: &World, text: &str) -> bool {
    let events = w.tree.events().since(&EventsArgs::default());
    events.iter().any(|e| e.instance.as_deref() == Some("web") && e.cause.contains(text))
}

/// Numbers of the kernels whose workload serves.
fn serving(w: &World) -> Vec<u16> {
    w.fake.workloads.serving()
}

#[tokio::test(start_paused = true)]
async fn it_waits_and_serves_nobody_and_goes_with_the_policy_or_the_instance() {
    let w = armed().await;
    let view = w.tree.status("web~standby").await.unwrap();
    assert_eq!((view.id, view.state, view.incarnation), (511, InstanceState::Healthy, 2));
    assert_eq!((view.standby_of.as_deref(), view.cpus.len()), (Some("web"), 2));
    assert_eq!(serving(&w), [1]);
    let exported: Vec<String> = w.tree.policy_export().into_keys().collect();
    assert_eq!(exported, ["web"]);
    assert!(said(&w, "its standby is ready"));
    let error = w.tree.morph(MorphArgs { name: "web~standby".into(), ..to(MorphGoal::Commit) }).await;
    assert!(error.unwrap_err().message.contains("it is the standby of web"));
    set(&w, "off").await;
    none(&w).await;
    w.fake.called("reclaim 511 2 true").await;
    set(&w, "same").await;
    standby(&w, "ready").await;
    w.tree.terminate("web", false).await.unwrap();
    assert!(w.fake.running(511).is_none(), "its resources are back when an operator is answered");
    none(&w).await;
    // Started again, it has one again.
    w.up("web").await;
    standby(&w, "ready").await;
    assert_eq!(w.tree.drain(false).await, []);
    assert_eq!((w.fake.running(1), w.fake.running(511)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn after_a_failure_it_is_the_instance_and_another_one_is_armed() {
    let w = armed().await;
    w.up("db").await;
    for round in 1u64..4 {
        let before = w.tree.status("web").await.unwrap();
        let booted = w.fake.count("boot");
        w.fake.panic(before.id, "die").await;
        w.fake.called(&format!("fence {} {}", before.id, before.incarnation)).await;
        let limit = Instant::now() + PATIENCE;
        let web = loop {
            let web = w.shows("web", InstanceState::Healthy).await;
            if web.recoveries == round && web.incident.is_none() {
                break web;
            }
            assert!(Instant::now() < limit, "{web:?}");
            w.pass(MS).await;
        };
        assert_ne!(web.id, before.id);
        assert_eq!(w.fake.running(web.id), Some(web.incarnation));
        assert_eq!(serving(&w), [2, web.id], "db and web");
        w.fake.called(&format!("reclaim {} {} true", before.id, before.incarnation)).await;
        standby(&w, "ready").await;
        assert_eq!(w.fake.count("boot"), booted + 1, "the next standby, and nothing else");
    }
    let log = w.fake.log();
    let at = |call: &str| log.iter().position(|l| l == call).unwrap();
    assert!(at("fence 1 1") < at("reclaim 1 1 true"));
    let steps: Vec<RecoveryStep> = w
        .tree
        .recovery_log(RecoveryLogArgs::default())
        .await
        .unwrap()
        .into_iter()
        .filter(|s| s.incident == 1)
        .collect();
    let phases: Vec<&str> = steps.iter().map(|s| s.phase.as_str()).collect();
    assert_eq!(
        phases,
        [
            "DETECTING_FAILURE",
            "PREPARING_RECOVERY",
            "TAKING_OVER",
            "TAKING_OVER",
            "RESTARTING",
            "RECOVERY_COMPLETE"
        ]
    );
    let took = Duration::from_micros(steps[5].offset_us - steps[1].offset_us);
    assert!(took < 200 * MS, "declared dead to serving again took {took:?}");
    assert_eq!(w.tree.heartbeat("db").await.unwrap().missed, 0, "the neighbour noticed");
}

#[tokio::test(start_paused = true)]
async fn failures_in_a_row_are_counted_whoever_takes_over() {
    let w = armed().await;
    w.tree.policy_set("web", Key::RestartIntensity, Some("2")).await.unwrap();
    for round in 1..=2 {
        w.fake.panic(w.tree.status("web").await.unwrap().id, "die").await;
        while w.tree.status("web").await.unwrap().recoveries < round {
            w.pass(MS).await;
        }
        standby(&w, "ready").await;
    }
    w.fake.panic(w.tree.status("web").await.unwrap().id, "die").await;
    w.shows("web", InstanceState::Degraded).await;
    assert!(serving(&w).is_empty());
    // Brought back by hand, it has what is there.
    let booted = w.fake.count("boot");
    w.tree.terminate("web", false).await.unwrap();
    none(&w).await;
    assert_eq!(w.fake.count("boot"), booted);
}

#[tokio::test(start_paused = true)]
async fn one_that_dies_or_does_not_come_up_is_replaced_after_a_while() {
    let w = armed().await;
    w.fake.panic(511, "die").await;
    w.fake.called("reclaim 511 2 true").await;
    w.fake.agent(511, Agent::Never);
    w.fake.called("fence 511 2").await;
    standby(&w, "none").await;
    assert!(said(&w, "its standby failed: kernel panic: die"));
    assert_eq!(w.tree.status("web").await.unwrap().recoveries, 0);
    standby(&w, "starting").await;
    let limit = Instant::now() + PATIENCE;
    while !said(&w, "its agent never answered") {
        assert!(Instant::now() < limit, "nobody says that it did not come up");
        w.pass(10 * MS).await;
    }
    w.fake.agent(511, Agent::Answers);
    standby(&w, "ready").await;
    // A kernel that cannot be started is said to be that, and tried again.
    set(&w, "/bad").await;
    let view = standby(&w, "none").await;
    assert!(view.reason.contains("not a bzImage"), "{view:?}");
    set(&w, "/new").await;
    assert_eq!(standby(&w, "ready").await.release, "6.18.1");
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_well_is_not_relied_on() {
    // It is silent, and nobody has noticed yet.
    let w = armed().await;
    w.fake.agent(511, Agent::Never);
    w.fake.panic(1, "die").await;
    w.fake.called("boot 1 3").await;
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((web.id, web.recoveries), (1, 1));
    let log = w.tree.recovery_log(RecoveryLogArgs::default()).await.unwrap();
    assert!(log.iter().any(|s| s.detail.contains("its standby does not take over")), "{log:?}");
    // The journal does not take the exchange.
    let w = armed().await;
    w.store.refuse_decisions();
    w.fake.panic(1, "die").await;
    w.fake.called("boot 1 3").await;
    w.shows("web", InstanceState::Healthy).await;
    standby(&w, "ready").await;
    assert_eq!(serving(&w), [1]);
    // A CPU of the dead kernel may still run: nobody takes anything over.
    let w = armed().await;
    w.fake.script("fence", &[Next::Partial(2), Next::Partial(2), Next::Partial(2)]);
    w.fake.panic(1, "die").await;
    w.shows("web", InstanceState::PartialFence).await;
    assert_eq!(standby(&w, "ready").await.state, "ready");
    let web = w.tree.recover("web").await.unwrap();
    assert_eq!(web.id, 511);
}

#[tokio::test(start_paused = true)]
async fn a_morph_to_its_kernel_needs_no_start() {
    let w = armed().await;
    set(&w, "/new").await;
    w.pass(100 * MS).await;
    assert_eq!(standby(&w, "ready").await.release, "6.18.1");
    let booted = w.fake.count("boot");
    let plan = w.tree.morph(MorphArgs { dry_run: true, ..to(MorphGoal::Commit) }).await.unwrap();
    assert_eq!(plan.side.unwrap().name, "web~standby");
    let view = w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    assert_eq!(w.fake.count("boot"), booted);
    assert!(view.steps.iter().any(|s| s.detail.contains("no kernel had to be started")), "{view:?}");
    assert_eq!(standby(&w, "in-use").await.state, "in-use");
    assert_eq!(w.tree.morph(on(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((web.release.as_str(), serving(&w)), ("6.18.1", vec![web.id]));
    w.fake.called("reclaim 1 1 true").await;
    assert_eq!(standby(&w, "ready").await.release, "6.18.1");
    assert_eq!(w.fake.count("boot"), booted + 1);
    // Rolled back, it is removed: it may have taken state. Another one is armed.
    w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
    w.tree.morph_rollback("web").await.unwrap();
    assert_eq!(w.shows("web", InstanceState::Healthy).await.id, web.id);
    standby(&w, "ready").await;
    assert_eq!(w.fake.count("boot"), booted + 2);
    // Another kernel than the standby's is started as ever.
    let back = MorphArgs { kernel: Some("/boot/vmlinuz".into()), ..to(MorphGoal::Commit) };
    assert_eq!(w.tree.morph(back).await.unwrap().committed, Some(true));
    assert_eq!(w.fake.count("boot"), booted + 3);
    assert_eq!(w.shows("web", InstanceState::Healthy).await.release, "6.12.9");
    assert_eq!(standby(&w, "ready").await.release, "6.18.1");
    // With the kernel it runs as its standby, that one is replaced when the instance runs another.
    set(&w, "same").await;
    let limit = Instant::now() + PATIENCE;
    while standby(&w, "ready").await.release != "6.12.9" {
        assert!(Instant::now() < limit);
        w.pass(10 * MS).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_is_shown_and_what_it_has_is_given_to_who_needs_it_more() {
    let w = world().await;
    for name in ["web", "db"] {
        w.up(name).await;
    }
    // 2 GiB: two instances and their standbys leave nothing.
    w.tree.policy_set("db", Key::Standby, Some("same")).await.unwrap();
    set(&w, "same").await;
    standby(&w, "ready").await;
    while w.tree.status("db").await.unwrap().standby.is_none_or(|s| s.state != "ready") {
        w.pass(MS).await;
    }
    // An operator's instance comes first.
    let i3 = w.tree.spawn(args("i3")).await.unwrap();
    assert_eq!(i3.state, InstanceState::Healthy);
    let views = w.tree.list().await;
    assert_eq!(views.iter().filter(|v| v.standby_of.is_some()).count(), 1, "{views:?}");
    let loser = views.iter().find(|v| v.standby.as_ref().is_some_and(|s| s.state == "none")).unwrap();
    let standby_of_loser = loser.standby.clone().unwrap();
    assert!(standby_of_loser.reason.contains("it gave way to instance i3"), "{standby_of_loser:?}");
    // It is looked for again, and shown to be missing.
    let limit = Instant::now() + PATIENCE;
    loop {
        let s = w.tree.status(&loser.name).await.unwrap().standby.unwrap();
        if s.reason.contains("needs 512 MiB of the pool") {
            break;
        }
        assert!(Instant::now() < limit, "{s:?}");
        w.pass(10 * MS).await;
    }
    // Resources are back: so is it.
    w.tree.terminate("i3", false).await.unwrap();
    while w.tree.status(&loser.name).await.unwrap().standby.is_none_or(|s| s.state != "ready") {
        assert!(Instant::now() < limit);
        w.pass(10 * MS).await;
    }
    // A morph to another kernel comes before it, too.
    let cpus = w.tree.status("web~standby").await.unwrap().cpus;
    let there = MorphArgs { cpus, ..to(MorphGoal::Commit) };
    let plan = w.tree.morph(MorphArgs { dry_run: true, ..there.clone() }).await.unwrap_err();
    assert!(plan.message.contains("web~standby would give way"), "{plan}");
    assert_eq!(w.tree.morph(there).await.unwrap().committed, Some(true));
    standby(&w, "ready").await;
}

#[tokio::test(start_paused = true)]
async fn the_next_daemon_finds_it_again() {
    let w = again(armed().await).await;
    w.shows("web", InstanceState::Healthy).await;
    standby(&w, "ready").await;
    assert_eq!(w.fake.count("boot"), 2);
    w.fake.panic(1, "die").await;
    let w = {
        while w.tree.status("web").await.unwrap().recoveries == 0 {
            w.pass(MS).await;
        }
        again(w).await
    };
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((web.id, w.fake.running(511)), (511, Some(2)));
    standby(&w, "ready").await;
    assert_eq!(serving(&w), [511]);
    // While it is in use by a morph that waits.
    w.tree.morph(MorphArgs { kernel: Some("/boot/vmlinuz".into()), ..to(MorphGoal::Prepare) }).await.unwrap();
    let w = again(w).await;
    w.shows("web", InstanceState::Healthy).await;
    standby(&w, "in-use").await;
    assert_eq!(w.tree.morph(on(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    standby(&w, "ready").await;
}

#[tokio::test(start_paused = true)]
async fn handover_memory_is_fresh_after_a_failure_so_nobody_takes_over() {
    let w = world().await;
    let with_memory = SpawnArgs { handover_bytes: 4 << 20, ..args("web") };
    w.tree.spawn(with_memory).await.unwrap();
    set(&w, "same").await;
    standby(&w, "ready").await;
    let regions = w.fake.handovers();
    assert_eq!((regions.len(), regions[0].1), (1, Some(1)));
    w.fake.panic(1, "die").await;
    w.fake.called("boot 1 3").await;
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!(web.id, 1);
    assert!(said(&w, "begins with fresh handover memory"));
    assert_eq!(w.fake.count("handover create"), 2);
    standby(&w, "ready").await;
    // A morph takes the memory along.
    let view =
        w.tree.morph(MorphArgs { kernel: Some("/boot/vmlinuz".into()), ..to(MorphGoal::Commit) }).await;
    let view = view.unwrap();
    assert!(view.steps.iter().any(|s| s.detail.contains("no kernel had to be started")), "{view:?}");
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!(w.fake.handovers()[0].1, Some(web.id));
    w.tree.terminate("web", false).await.unwrap();
    none(&w).await;
    let limit = Instant::now() + PATIENCE;
    while !w.fake.handovers().is_empty() {
        assert!(Instant::now() < limit, "{:?}", w.fake.handovers());
        w.pass(MS).await;
    }
}
