use super::*;

#[tokio::test(start_paused = true)]
async fn spawn_waits_until_it_serves_and_views_tell_the_truth() {
    let w = world().await;
    let defined = w.tree.status("web").await.unwrap();
    assert_eq!((defined.state, defined.incarnation, defined.cid), (InstanceState::Defined, 0, 3));

    w.fake.agent(1, Agent::After(Duration::from_secs(2)));
    let began = Instant::now();
    let view = w.up("web").await;
    assert!(began.elapsed() >= Duration::from_secs(2), "its agent listens after two seconds");
    assert_eq!(
        (view.incarnation, view.release.as_str(), view.kernel.as_str(), view.memory_base),
        (1, "6.12.9", "/boot/vmlinuz", Some(1 << 30))
    );
    assert_eq!((view.monitor, view.heartbeat_timeout_ms, view.incident), (true, 1000, None));

    w.pass(Duration::from_secs(10)).await;
    let view = w.tree.status("web").await.unwrap();
    assert!(view.last_heartbeat_ms.unwrap() <= 320 && view.pulse_age_ms.unwrap() <= 70, "{view:?}");
    assert!((11.9..12.5).contains(&view.uptime_s.unwrap()), "{view:?}");
    let beats = w.tree.heartbeat("web").await.unwrap();
    assert_eq!((beats.interval_ms, beats.timeout_ms, beats.missed_in_row), (250, 1000, 0));
    assert!(beats.received >= 30 && beats.sent >= beats.received, "{beats:?}");
    let health = w.tree.health("web").await.unwrap();
    assert_eq!(health.io.unwrap().probe_us, 7);
    assert!(health.age_ms < 400);

    let names: Vec<(String, InstanceState)> =
        w.tree.list().await.into_iter().map(|v| (v.name, v.state)).collect();
    let want =
        [("db", InstanceState::Defined), ("i3", InstanceState::Defined), ("web", InstanceState::Healthy)];
    assert_eq!(names, want.map(|(n, s)| (n.to_string(), s)));
    assert_eq!(w.store.phases(), [""; 0], "no incident");
}

#[tokio::test(start_paused = true)]
async fn ping_is_a_heartbeat_of_its_own() {
    let w = world().await;
    w.up("web").await;
    let sent = w.tree.heartbeat("web").await.unwrap().sent;
    let ping = w.tree.ping("web").await.unwrap();
    assert_eq!((ping.name.as_str(), ping.incarnation), ("web", 1));
    assert!(w.tree.heartbeat("web").await.unwrap().sent > sent);
    w.fake.agent(1, Agent::Silent);
    assert_eq!(w.tree.ping("web").await.unwrap_err().kind, ErrorKind::Timeout);
    assert_eq!(w.tree.ping("db").await.unwrap_err().kind, ErrorKind::Conflict);
    w.tree.terminate("web", true).await.unwrap();
    assert_eq!(w.tree.ping("web").await.unwrap_err().kind, ErrorKind::Conflict);
}

#[tokio::test(start_paused = true)]
async fn terminate_asks_the_agent_then_fences_then_gives_everything_back() {
    let w = world().await;
    w.up("web").await;
    let view = w.tree.terminate("web", false).await.unwrap();
    assert_eq!((view.state, view.uptime_s, view.last_heartbeat_ms), (InstanceState::Stopped, None, None));
    assert_eq!(w.fake.log(), ["existing", "boot 1 1", "fence 1 1", "reclaim 1 1 true"]);
    assert_eq!(w.tree.terminate("web", false).await.unwrap_err().kind, ErrorKind::Conflict);
    // It can be started again, as another incarnation.
    assert_eq!(w.up("web").await.incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_silent_agent_delays_terminate_by_its_grace_and_force_does_not_ask() {
    let w = world().await;
    w.up("web").await;
    w.fake.agent(1, Agent::Silent);
    let began = Instant::now();
    let meanwhile = async {
        w.pass(Duration::from_secs(8)).await;
        // It may just be ending its workload.
        assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Healthy);
    };
    let (ended, ()) = tokio::join!(w.tree.terminate("web", false), meanwhile);
    ended.unwrap();
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(10) && took < Duration::from_secs(11), "{took:?}");

    w.fake.agent(1, Agent::Answers);
    w.up("web").await;
    w.fake.agent(1, Agent::Silent);
    let began = Instant::now();
    w.tree.terminate("web", true).await.unwrap();
    assert!(began.elapsed() < 100 * MS);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_dies_while_its_agent_is_asked_is_simply_stopped() {
    let w = world().await;
    w.up("web").await;
    w.fake.agent(1, Agent::Silent);
    let (ended, ()) = tokio::join!(w.tree.terminate("web", false), async {
        w.pass(500 * MS).await;
        w.fake.panic(1, "on the way down").await;
    });
    assert_eq!(ended.unwrap().state, InstanceState::Stopped);
    assert_eq!(w.fake.count("boot"), 1);
    assert!(w.store.phases().is_empty(), "stopping is not an incident");
}

#[tokio::test(start_paused = true)]
async fn wishes_that_make_no_sense_are_refused() {
    let w = world().await;
    let kind = |r: Result<InstanceView, OpError>| r.unwrap_err().kind;
    assert_eq!(kind(w.tree.spawn(args("ghost")).await), ErrorKind::NotFound);
    assert_eq!(kind(w.tree.status("ghost").await), ErrorKind::NotFound);
    assert_eq!(kind(w.tree.terminate("ghost", false).await), ErrorKind::NotFound);
    assert_eq!(kind(w.tree.terminate("web", false).await), ErrorKind::Conflict);
    assert_eq!(kind(w.tree.recover("web").await), ErrorKind::Conflict);
    let bad = SpawnArgs { kernel: "/bad".into(), ..args("web") };
    assert_eq!(kind(w.tree.spawn(bad).await), ErrorKind::BadInput);
    let bad = SpawnArgs { heartbeat_timeout_s: Some(-1.0), ..args("web") };
    assert_eq!(kind(w.tree.spawn(bad).await), ErrorKind::Usage);
    assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Defined);
    w.up("web").await;
    let again = w.tree.spawn(args("web")).await.unwrap_err();
    assert_eq!((again.kind, again.message.as_str()), (ErrorKind::Conflict, "instance web: it runs already"));
    assert_eq!(w.fake.count("boot"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_fails_says_why_and_leaves_nothing() {
    let w = world().await;
    w.fake.script("boot", &[Next::Fail("setup header of version 0x20b")]);
    let error = w.tree.spawn(args("web")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::BootFailed);
    assert!(error.message.contains("setup header of version 0x20b"), "{error}");
    assert!(
        error.message.contains("line 29") && !error.message.contains("line 9\n"),
        "the last 20 lines: {error}"
    );
    let view = w.tree.status("web").await.unwrap();
    assert_eq!(view.state, InstanceState::Stopped);
    assert!(view.reason.contains("setup header"), "{}", view.reason);
    assert_eq!(w.up("web").await.incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_never_answers_is_fenced_and_taken_back() {
    let w = world().await;
    w.fake.agent(1, Agent::Never);
    let began = Instant::now();
    let spawn = SpawnArgs { boot_timeout_s: Some(3.0), ..args("web") };
    let error = w.tree.spawn(spawn).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::BootFailed);
    assert!(error.message.contains("its kernel runs, its agent never answered within 3000 ms"), "{error}");
    assert!(error.message.contains("instance 1 line 29"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(4));
    assert_eq!(w.fake.log()[1..], ["boot 1 1", "fence 1 1", "reclaim 1 1 true"]);
    assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_without_a_pulse_is_reported_and_not_killed() {
    let w = world().await;
    w.fake.born_without_pulse(1);
    let error = w.tree.spawn(SpawnArgs { boot_timeout_s: Some(3.0), ..args("web") }).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert!(error.message.contains("its kernel has no pulse"), "{error}");
    w.pass(Duration::from_secs(60)).await;
    let view = w.tree.status("web").await.unwrap();
    assert_eq!((view.state, w.fake.running(1)), (InstanceState::Suspect, Some(1)));
    w.fake.thaw(1);
    w.shows("web", InstanceState::Healthy).await;
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_panics_at_boot_ends_the_wait_at_once() {
    let w = world().await;
    w.fake.agent(1, Agent::Never);
    w.fake.born(1, kmorph_platform::KernelState::Panicked("VFS: no root".into()));
    let began = Instant::now();
    let error = w.tree.spawn(args("web")).await.unwrap_err();
    assert!(error.message.contains("kernel panic: VFS: no root"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(w.fake.running(1), None);
}

#[tokio::test(start_paused = true)]
async fn without_wait_spawn_returns_when_the_kernel_was_started() {
    let w = world().await;
    w.fake.agent(1, Agent::After(Duration::from_secs(5)));
    let view = w.tree.spawn(SpawnArgs { wait: false, ..args("web") }).await.unwrap();
    assert_eq!(view.state, InstanceState::Starting);
    w.shows("web", InstanceState::Healthy).await;
}

#[tokio::test(start_paused = true)]
async fn terminate_while_it_is_being_started() {
    let w = world().await;
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("boot", &[Next::Block(gate.clone())]);
    let (spawned, ended, ()) = tokio::join!(
        w.tree.spawn(args("web")),
        async {
            w.fake.called("boot 1 1").await;
            w.tree.terminate("web", false).await
        },
        async {
            w.fake.called("boot 1 1").await;
            w.pass(50 * MS).await;
            gate.notify_one();
        }
    );
    assert_eq!(spawned.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(ended.unwrap().state, InstanceState::Stopped);
    assert_eq!(w.fake.log()[1..], ["boot 1 1", "fence 1 1", "reclaim 1 1 true"]);
}

#[tokio::test(start_paused = true)]
async fn terminate_while_it_is_being_recovered() {
    for blocked in ["fence", "reclaim", "boot"] {
        let w = world().await;
        w.up("web").await;
        let gate = Arc::new(tokio::sync::Notify::new());
        w.fake.script(blocked, &[Next::Block(gate.clone())]);
        w.fake.panic(1, "die").await;
        let call = match blocked {
            "fence" => "fence 1 1",
            "reclaim" => "reclaim 1 1 false",
            _ => "boot 1 2",
        };
        w.fake.called(call).await;
        let (ended, ()) = tokio::join!(w.tree.terminate("web", false), async {
            w.pass(20 * MS).await;
            gate.notify_one();
        });
        assert_eq!(ended.unwrap().state, InstanceState::Stopped, "{blocked}");
        assert_eq!(w.fake.running(1), None, "{blocked}");
        let last = w.store.steps.borrow().last().cloned().unwrap();
        assert_eq!((last.phase.as_str(), last.recovered), ("STOPPED", Some(false)), "{blocked}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_recovers_what_is_being_terminated_is_told_and_the_terminate_is_carried_out() {
    let w = world().await;
    w.up("web").await;
    w.fake.agent(1, Agent::Silent);
    let recovers = async {
        w.pass(10 * MS).await;
        w.tree.recover("web").await
    };
    let (ended, refused) = tokio::join!(w.tree.terminate("web", false), recovers);
    assert_eq!(ended.unwrap().state, InstanceState::Stopped);
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Conflict);
    assert!(refused.message.contains("is being terminated"), "{refused}");
}
