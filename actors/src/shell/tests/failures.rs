use super::*;
use crate::core::policy::{Key, hang_bound};

const RECOVERY: [&str; 6] = [
    "DETECTING_FAILURE",
    "PREPARING_RECOVERY",
    "RECLAIMING_RESOURCES",
    "RESTARTING",
    "RESTARTING",
    "RECOVERY_COMPLETE",
];

#[tokio::test(start_paused = true)]
async fn a_panic_is_fenced_at_once_and_the_instance_is_started_anew() {
    let w = world().await;
    w.up("web").await;
    // Between two looks at the pulse, so that the notice is what is heard first.
    w.pass(Duration::from_millis(3011)).await;
    let at = Instant::now();
    w.fake.panic(1, "sysrq triggered crash").await;
    let fenced = w.fake.called("fence 1 1").await;
    assert!(fenced - at < MS, "a panic notice waits for no timer: {:?}", fenced - at);
    let last = w.store.phase("RECOVERY_COMPLETE").await;
    assert_eq!((last.recovered, last.incident, last.instance.as_str()), (Some(true), 1, "web"));
    assert_eq!(w.store.phases(), RECOVERY);
    let first = w.store.steps.borrow()[0].clone();
    assert!(first.detail.contains("kernel panic: sysrq triggered crash"), "{}", first.detail);
    assert_eq!(first.offset_us, 40, "counted from the instance's own stamp");
    assert_eq!(w.fake.log()[1..], ["boot 1 1", "fence 1 1", "reclaim 1 1 false", "boot 1 2"]);
    let view = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((view.incarnation, view.recoveries, view.incident), (2, 1, None));
}

#[tokio::test(start_paused = true)]
async fn a_hang_is_declared_within_the_bound() {
    let w = world().await;
    w.up("web").await;
    for wait in [0, 7, 33, 61, 400] {
        w.pass(Duration::from_millis(2000 + wait)).await;
        let incarnation = w.tree.status("web").await.unwrap().incarnation;
        let at = Instant::now();
        w.fake.hang(1);
        let took = w.fake.called(&format!("fence 1 {incarnation}")).await - at;
        let bound = hang_bound(&config().settings.defaults);
        // The last beat may be one pulse period older than the hang.
        assert!(took <= bound && took >= Duration::from_millis(1200), "{took:?}, bound {bound:?}");
        w.shows("web", InstanceState::Healthy).await;
        w.pass(Duration::from_secs(400)).await;
    }
    let steps = w.tree.recovery_log(RecoveryLogArgs::default()).await.unwrap();
    assert_eq!(steps.len(), 5 * RECOVERY.len());
    assert!(
        steps[0].detail.contains("no pulse and no heartbeat")
            && steps[0].detail.contains("3 probes unanswered")
    );
    assert!(steps[0].offset_us > 300_000, "the first notice was the suspicion: {}", steps[0].offset_us);
}

#[tokio::test(start_paused = true)]
async fn a_silent_agent_is_no_reason_to_fence() {
    let w = world().await;
    w.up("web").await;
    w.fake.agent(1, Agent::Silent);
    let view = w.shows("web", InstanceState::AgentSilent).await;
    assert!(view.reason.contains("user space is dead or starved"), "{}", view.reason);
    w.pass(Duration::from_secs(120)).await;
    assert_eq!(w.fake.count("fence"), 0);
    assert!(w.tree.heartbeat("web").await.unwrap().missed_in_row > 100);
    w.fake.agent(1, Agent::Answers);
    w.shows("web", InstanceState::Healthy).await;
    // Its kernel dying after its agent is still seen.
    w.fake.agent(1, Agent::Silent);
    w.shows("web", InstanceState::AgentSilent).await;
    w.fake.freeze(1);
    w.store.phase("PREPARING_RECOVERY").await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_pulse_is_no_reason_to_fence_while_the_agent_answers() {
    let w = world().await;
    w.up("web").await;
    w.fake.freeze(1);
    w.shows("web", InstanceState::Suspect).await;
    w.pass(Duration::from_secs(120)).await;
    assert_eq!(
        (w.fake.count("fence"), w.tree.status("web").await.unwrap().state),
        (0, InstanceState::Suspect)
    );
    w.fake.thaw(1);
    w.shows("web", InstanceState::Healthy).await;
}

#[tokio::test(start_paused = true)]
async fn a_supervisor_that_was_paused_accuses_nobody() {
    let w = world().await;
    w.up("web").await;
    w.up("db").await;
    for _ in 0..5 {
        // The whole machine stood still: no kernel beat, no agent answered, no timer rang. The others come
        // back a little later than the supervisor.
        for id in [1, 2] {
            w.fake.hang(id);
        }
        tokio::time::advance(Duration::from_secs(30)).await;
        w.pass(600 * MS).await;
        for id in [1, 2] {
            w.fake.thaw(id);
            w.fake.agent(id, Agent::Answers);
        }
        w.pass(Duration::from_secs(5)).await;
        for name in ["web", "db"] {
            assert_eq!(w.tree.status(name).await.unwrap().state, InstanceState::Healthy);
        }
    }
    assert_eq!(w.fake.count("fence"), 0);
    let lag = w.tree.max_lag();
    assert!(lag >= Duration::from_secs(29), "{lag:?}");
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_hangs_while_the_supervisor_is_paused_is_found_afterwards() {
    let w = world().await;
    w.up("web").await;
    w.fake.hang(1);
    tokio::time::advance(Duration::from_secs(30)).await;
    let at = Instant::now();
    let took = w.fake.called("fence 1 1").await - at;
    assert!(took >= Duration::from_secs(1), "measured anew first: {took:?}");
    assert!(took <= hang_bound(&config().settings.defaults) + 100 * MS, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_partial_fence_holds_everything_until_an_operator_looks() {
    let w = world().await;
    w.up("web").await;
    w.fake.script("fence", &[Next::Partial(3), Next::Fail("no answer"), Next::Partial(3)]);
    w.fake.panic(1, "die").await;
    let step = w.store.phase("PARTIAL_FENCE").await;
    assert!(step.detail.contains("CPUs [3] were not"), "{}", step.detail);
    let view = w.shows("web", InstanceState::PartialFence).await;
    assert_eq!((view.incident, view.incarnation), (Some(1), 1));
    w.pass(Duration::from_secs(3600)).await;
    assert_eq!((w.fake.count("fence"), w.fake.count("reclaim"), w.fake.count("boot")), (3, 0, 1));
    assert_eq!(w.tree.spawn(args("web")).await.unwrap_err().kind, ErrorKind::Conflict);
    // The operator tries again, in vain and then with success.
    w.fake.script("fence", &[Next::Partial(3), Next::Partial(3), Next::Partial(3)]);
    assert_eq!(w.tree.recover("web").await.unwrap_err().kind, ErrorKind::PartialFence);
    assert_eq!(w.fake.count("reclaim"), 0);
    let view = w.tree.recover("web").await.unwrap();
    assert_eq!((view.state, view.incarnation), (InstanceState::Healthy, 2));
    assert_eq!(w.store.steps.borrow().last().unwrap().recovered, Some(true));
}

#[tokio::test(start_paused = true)]
async fn others_never_miss_a_beat_while_one_recovers() {
    let w = world().await;
    for name in ["web", "db", "i3"] {
        w.up(name).await;
    }
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("fence", &[Next::Block(gate.clone())]);
    w.fake.panic(1, "die").await;
    w.fake.called("fence 1 1").await;
    w.pass(Duration::from_secs(20)).await;
    gate.notify_one();
    w.store.phase("RECOVERY_COMPLETE").await;
    for name in ["db", "i3"] {
        let beats = w.tree.heartbeat(name).await.unwrap();
        assert_eq!(beats.missed, 0, "{beats:?}");
        assert!(beats.received >= 60, "{beats:?}");
        assert!(beats.pulse_age_ms.unwrap() < 100);
        assert_eq!(w.tree.status(name).await.unwrap().incarnation, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_keeps_failing_is_given_up_and_can_be_started_by_hand() {
    let defaults = Policy { restart_intensity: 3, ..config().settings.defaults };
    let w = world_with(with_defaults(defaults)).await;
    w.up("web").await;
    let mut waits = vec![];
    for n in 1..=4u64 {
        w.shows("web", InstanceState::Healthy).await;
        w.fake.panic(1, "die").await;
        let fenced = w.fake.called(&format!("fence 1 {n}")).await;
        if n < 4 {
            waits.push((w.fake.called(&format!("boot 1 {}", n + 1)).await - fenced).as_millis());
        }
    }
    assert!(
        waits[0] < 10 && (900..=1010).contains(&waits[1]) && (1800..=2010).contains(&waits[2]),
        "{waits:?}"
    );
    let view = w.shows("web", InstanceState::Degraded).await;
    assert!(view.reason.contains("it failed 4 times within 300 s"), "{}", view.reason);
    assert_eq!(w.fake.log().last().unwrap(), "reclaim 1 4 true", "its CPUs go back to the primary");
    let view = w.up("web").await;
    assert_eq!((view.incarnation, view.recoveries), (5, 3));
}

#[tokio::test(start_paused = true)]
async fn without_monitoring_an_operator_decides() {
    let w = world().await;
    w.tree.spawn(SpawnArgs { monitor: Some(false), ..args("web") }).await.unwrap();
    w.fake.panic(1, "die").await;
    w.store.phase("DETECTING_FAILURE").await;
    w.pass(Duration::from_secs(600)).await;
    let view = w.tree.status("web").await.unwrap();
    assert_eq!((view.state, view.incident), (InstanceState::Suspect, Some(1)));
    assert!(view.reason.contains("kernel panic: die"), "{}", view.reason);
    assert_eq!(w.fake.count("fence"), 0);
    let view = w.tree.recover("web").await.unwrap();
    assert_eq!((view.state, view.incarnation, view.recoveries), (InstanceState::Healthy, 2, 1));
}

#[tokio::test(start_paused = true)]
async fn recover_by_hand_replaces_a_healthy_kernel() {
    let w = world().await;
    w.up("web").await;
    let view = w.tree.recover("web").await.unwrap();
    assert_eq!((view.incarnation, view.recoveries), (2, 1));
    assert!(w.store.steps.borrow()[0].detail.contains("asked for by an operator"));
}

#[tokio::test(start_paused = true)]
async fn resources_that_cannot_be_taken_back_are_held() {
    let w = world().await;
    w.up("web").await;
    w.fake.script("reclaim", &[Next::Fail("ioctl: EIO")]);
    w.fake.panic(1, "die").await;
    let view = w.shows("web", InstanceState::Degraded).await;
    assert!(view.reason.contains("ioctl: EIO"), "{}", view.reason);
    assert_eq!(w.tree.spawn(args("web")).await.unwrap_err().kind, ErrorKind::Conflict);
    assert_eq!(w.tree.recover("web").await.unwrap().incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_fence_that_panics_or_blocks_is_an_error_and_not_silence() {
    let w = world().await;
    w.up("web").await;
    let never = Arc::new(tokio::sync::Notify::new());
    w.fake.script("fence", &[Next::Panic, Next::Block(never)]);
    w.fake.panic(1, "die").await;
    let last = w.store.phase("RECOVERY_COMPLETE").await;
    assert!(last.offset_us >= 30_000_000, "the second try had its limit of 30 s: {}", last.offset_us);
    let details: Vec<String> = w.store.steps.borrow().iter().map(|s| s.detail.clone()).collect();
    assert!(details.iter().any(|d| d.contains("panic") && d.contains("try 2")), "{details:?}");
    assert!(details.iter().any(|d| d.contains("longer than 30s") && d.contains("try 3")), "{details:?}");
}

#[tokio::test(start_paused = true)]
async fn lost_events_make_it_look_at_every_pulse() {
    let w = world().await;
    w.up("web").await;
    // Agent and pulse go on, only the state word says that it was parked; the event was lost.
    w.tree.policy_set("web", Key::PulseMisses, Some("100000")).await.unwrap();
    w.pass(Duration::from_secs(2)).await;
    w.fake.hang(1);
    w.fake.panic_unseen(1);
    let at = Instant::now();
    w.fake.event(0, 0, kmorph_platform::PlatformEventKind::Lost(3)).await;
    assert!(w.fake.called("fence 1 1").await - at < MS);
}

#[tokio::test(start_paused = true)]
async fn events_of_an_earlier_life_mean_nothing() {
    let w = world().await;
    w.up("web").await;
    w.tree.recover("web").await.unwrap();
    w.fake.event(1, 1, kmorph_platform::PlatformEventKind::Panic("old".into())).await;
    w.fake.event(9, 1, kmorph_platform::PlatformEventKind::Panic("nobody".into())).await;
    w.pass(Duration::from_secs(5)).await;
    assert_eq!((w.fake.count("fence"), w.tree.status("web").await.unwrap().incarnation), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_does_not_stop_a_recovery() {
    let w = world().await;
    w.up("web").await;
    w.store.broken.store(true, std::sync::atomic::Ordering::SeqCst);
    w.fake.panic(1, "die").await;
    w.fake.called("boot 1 2").await;
    w.shows("web", InstanceState::Healthy).await;
}
