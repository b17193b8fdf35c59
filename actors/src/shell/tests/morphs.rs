//! Morphs: a new kernel takes an instance over, or the old one goes on.

use super::*;

pub(super) fn to(goal: MorphGoal) -> MorphArgs {
    MorphArgs {
        name: "web".into(),
        kernel: Some("/new".into()),
        cmdline: None,
        initramfs: None,
        cpus: vec![],
        memory_bytes: None,
        goal,
        dry_run: false,
    }
}

pub(super) fn on(goal: MorphGoal) -> MorphArgs {
    MorphArgs { kernel: None, ..to(goal) }
}

/// web serves, and nothing is left of a morph.
pub(super) async fn at_rest(w: &World, id: u16) -> InstanceView {
    let limit = Instant::now() + PATIENCE;
    while w.tree.list().await.iter().any(|i| i.side_of.is_some() || i.morph.is_some()) {
        assert!(Instant::now() < limit, "a side is left: {:?}", w.tree.list().await);
        w.pass(MS).await;
    }
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!(web.id, id);
    while !w.fake.windows().await.unwrap().is_empty() {
        assert!(Instant::now() < limit, "memory of a morph is left");
        w.pass(MS).await;
    }
    let records = w.store.load_instances().await.unwrap();
    assert!(records.iter().all(|r| r.morph.is_none() && !r.spec.name.contains('~')), "{records:?}");
    web
}

/// Another daemon, after this one was killed.
pub(super) async fn again(w: World) -> World {
    w.tree.kill_for_test();
    w.pass(100 * MS).await;
    w.fake.rewind();
    let tree = tree(&w.fake, &w.store, config()).await;
    World { tree, ..w }
}

#[tokio::test(start_paused = true)]
async fn the_new_kernel_takes_over_and_is_healed_as_the_old_one_was() {
    let w = world().await;
    w.up("db").await;
    w.up("web").await;
    let sent = w.tree.heartbeat("db").await.unwrap().sent;
    let view = w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
    assert_eq!((view.committed, view.from.as_str(), view.release.as_str()), (Some(true), "6.12.9", "6.18.1"));
    let states: Vec<&str> = view.steps.iter().map(|s| s.state.as_str()).collect();
    for state in
        ["MORPH_PREPARING", "MORPH_NEGOTIATING", "MORPH_TRANSFERRING", "MORPH_VALIDATING", "COMMITTING"]
    {
        assert!(states.contains(&state), "{state}: {states:?}");
    }
    w.fake.called("fence 1 1").await;
    w.fake.called("reclaim 1 1 true").await;
    let web = at_rest(&w, 511).await;
    assert_eq!((web.incarnation, web.recoveries, web.release.as_str()), (2, 0, "6.18.1"));
    // The same kernel, policy and place as before the failure.
    w.fake.panic(511, "die").await;
    w.fake.called("boot 511 3").await;
    assert_eq!(w.shows("web", InstanceState::Healthy).await.release, "6.18.1");
    let db = w.tree.heartbeat("db").await.unwrap();
    assert!(db.sent >= sent && db.missed == 0, "the neighbour noticed: {db:?}");
    // Stopped and started again, it is what its definition says.
    w.tree.terminate("web", false).await.unwrap();
    assert_eq!(w.up("web").await.id, 1);
}

#[tokio::test(start_paused = true)]
async fn an_operator_goes_step_by_step() {
    let w = world().await;
    w.up("web").await;
    let view = w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    assert_eq!((view.state.as_str(), view.committed), ("MORPH_PREPARING", None));
    let side = view.side.unwrap();
    assert_eq!((side.name.as_str(), side.release.as_str(), side.cpus.len()), ("web~morph", "6.18.1", 2));
    assert_eq!(w.tree.status("web").await.unwrap().morph.as_deref(), Some("MORPH_PREPARING"));
    assert_eq!(w.tree.status("web~morph").await.unwrap().side_of.as_deref(), Some("web"));
    let refused = w.tree.morph(to(MorphGoal::Prepare)).await.unwrap_err();
    assert!(refused.message.contains("web~morph"), "{refused}");
    assert_eq!(w.tree.morph(on(MorphGoal::Validate)).await.unwrap().state, "MORPH_VALIDATING");
    assert_eq!(w.fake.count("fence"), 0);
    assert_eq!(w.tree.morph(on(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    at_rest(&w, 511).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_begin_is_refused_with_the_reason() {
    let w = world().await;
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("does not run"), "{error}");
    w.up("web").await;
    for (args, want) in [
        (MorphArgs { kernel: Some("/bad".into()), ..to(MorphGoal::Commit) }, "not a bzImage"),
        (MorphArgs { cpus: vec![2], ..to(MorphGoal::Commit) }, "CPU 2 is not free"),
        (on(MorphGoal::Commit), "no morph is prepared"),
    ] {
        let error = w.tree.morph(args).await.unwrap_err();
        assert!(error.message.contains(want), "{error}");
    }
    let error = w.tree.morph_rollback("web").await.unwrap_err();
    assert!(error.message.contains("no morph is under way"), "{error}");
    w.tree.maintenance("web", true).await.unwrap();
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("maintenance off web"), "{error}");
    let plan = w.tree.maintenance("web", false).await;
    assert!(plan.is_ok());
    let plan = w.tree.morph(MorphArgs { dry_run: true, ..to(MorphGoal::Commit) }).await.unwrap();
    assert_eq!(plan.side.unwrap().cpus.len(), 2);
    assert_eq!(w.tree.morph_status("web").await.unwrap().state, "RUNNING");
    assert_eq!(w.fake.count("boot"), 1);
    at_rest(&w, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_new_kernel_that_does_not_come_up_or_dies_changes_nothing() {
    let w = world().await;
    w.up("web").await;
    w.fake.script("boot", &[Next::Fail("no room")]);
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::MorphFailed, "{error}");
    assert!(error.message.contains("no room") && error.message.contains("the old kernel goes on"), "{error}");
    at_rest(&w, 1).await;
    w.fake.agent(511, Agent::Never);
    let error = w.tree.morph(to(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("its agent never answered"), "{error}");
    at_rest(&w, 1).await;
    w.fake.agent(511, Agent::Answers);
    w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
    w.fake.panic(511, "die").await;
    let web = at_rest(&w, 1).await;
    assert_eq!((web.incarnation, w.fake.running(1)), (1, Some(1)));
    assert_eq!(w.fake.count("fence 1 "), 0);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_is_being_probed_when_it_is_validated_is_waited_for_as_long_as_for_an_answer() {
    let w = world().await;
    w.up("web").await;
    w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    let limit = Policy::default().heartbeat_timeout;
    w.fake.freeze(1);
    w.shows("web", InstanceState::Suspect).await;
    let comes_back = async {
        w.pass(limit - 100 * MS).await;
        w.fake.thaw(1);
    };
    let (valid, ()) = tokio::join!(w.tree.morph(on(MorphGoal::Validate)), comes_back);
    valid.unwrap();
    w.fake.freeze(1);
    w.shows("web", InstanceState::Suspect).await;
    let began = Instant::now();
    let error = w.tree.morph(on(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("being probed"), "{error}");
    assert!(began.elapsed() >= limit, "it was not waited for");
}

#[tokio::test(start_paused = true)]
async fn an_old_kernel_that_dies_is_recovered_and_the_morph_is_undone() {
    let w = world().await;
    w.up("web").await;
    w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    w.fake.panic(1, "die").await;
    w.fake.called("boot 1 2").await;
    assert_eq!(at_rest(&w, 1).await.recoveries, 1);
    assert_eq!(w.fake.running(511), None);
}

#[tokio::test(start_paused = true)]
async fn an_operator_rolls_back_from_everywhere_before_the_commit() {
    for goal in [MorphGoal::Prepare, MorphGoal::Validate] {
        let w = world().await;
        w.up("web").await;
        w.tree.morph(to(goal)).await.unwrap();
        let view = w.tree.morph_rollback("web").await.unwrap();
        assert_eq!(view.committed, Some(false));
        let web = at_rest(&w, 1).await;
        assert_eq!((web.incarnation, w.fake.running(511)), (1, None));
    }
    // Also while the new kernel is being started.
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    let (begun, undone) = tokio::join!(w.tree.morph(to(MorphGoal::Commit)), async {
        w.fake.called("boot 511 2").await;
        let undone = w.tree.morph_rollback("web");
        let open = async {
            w.pass(10 * MS).await;
            gate.notify_one();
        };
        tokio::join!(undone, open).0
    });
    assert_eq!(undone.unwrap().committed, Some(false));
    assert!(begun.unwrap_err().message.contains("an operator rolled it back"));
    at_rest(&w, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_commit_record_that_cannot_be_written_undoes_the_morph() {
    let w = world().await;
    w.up("web").await;
    w.tree.morph(to(MorphGoal::Validate)).await.unwrap();
    w.store.broken.store(true, std::sync::atomic::Ordering::SeqCst);
    let error = w.tree.morph(on(MorphGoal::Commit)).await.unwrap_err();
    assert!(error.message.contains("the commit record could not be written: disk full"), "{error}");
    w.store.broken.store(false, std::sync::atomic::Ordering::SeqCst);
    let web = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((web.id, web.incarnation, w.fake.running(1)), (1, 1, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_dies_goes_on_waiting_or_back_or_forward() {
    // It waits for its operator: the next daemon does too.
    let w = world().await;
    w.up("web").await;
    w.tree.morph(to(MorphGoal::Prepare)).await.unwrap();
    let w = again(w).await;
    w.shows("web", InstanceState::Healthy).await;
    w.shows("web~morph", InstanceState::Healthy).await;
    assert_eq!(w.tree.morph_status("web").await.unwrap().state, "MORPH_PREPARING");
    assert_eq!(w.tree.morph(on(MorphGoal::Commit)).await.unwrap().committed, Some(true));
    at_rest(&w, 511).await;
    // It was being started: the next daemon undoes it.
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    tokio::select! {
        never = w.tree.morph(to(MorphGoal::Commit)) => panic!("{never:?}"),
        _ = w.fake.called("boot 511 2") => {}
    }
    let w = again(w).await;
    assert_eq!(at_rest(&w, 1).await.incarnation, 1);
    // It was decided: the next daemon ends it.
    let w = world().await;
    w.up("web").await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("fence", &[Next::Block(gate.clone())]);
    tokio::select! {
        never = w.tree.morph(to(MorphGoal::Commit)) => drop(never),
        _ = w.fake.called("fence 1 1") => {}
    }
    let w = again(w).await;
    assert_eq!(at_rest(&w, 511).await.release, "6.18.1");
    assert_eq!(w.fake.running(1), None);
}

#[tokio::test(start_paused = true)]
async fn twenty_in_a_row_leave_nothing_behind() {
    let w = world().await;
    w.up("web").await;
    for n in 0u64..20 {
        w.tree.morph(to(MorphGoal::Commit)).await.unwrap();
        let id = w.tree.status("web").await.unwrap().id;
        let web = at_rest(&w, id).await;
        assert_eq!(web.incarnation, n + 2);
        assert_eq!(w.fake.running(id), Some(n + 2));
    }
    assert_eq!(w.tree.list().await.len(), 3, "web, and two that are defined");
    assert_eq!(w.fake.count("fence"), 20);
}
