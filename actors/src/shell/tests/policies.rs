use std::collections::BTreeMap;

use super::*;
use crate::core::policy::{Key, Patch, hang_bound};

fn patch(pairs: &[(Key, &str)]) -> Patch {
    let mut patch = Patch::default();
    for (key, value) in pairs {
        patch.set(*key, value).unwrap();
    }
    patch
}

#[tokio::test(start_paused = true)]
async fn a_policy_can_be_changed_while_it_runs_and_is_remembered() {
    let w = world().await;
    w.up("web").await;
    let sent = w.tree.heartbeat("web").await.unwrap().sent;
    let diff = w.tree.policy_set("web", Key::HeartbeatTimeout, Some("60")).await.unwrap();
    assert_eq!((diff.len(), diff[0].from.as_str(), diff[0].to.as_str()), (1, "1s", "1m"));
    w.pass(Duration::from_secs(6)).await;
    let beats = w.tree.heartbeat("web").await.unwrap();
    assert_eq!((beats.interval_ms, beats.timeout_ms), (5000, 60_000));
    assert!(beats.sent > sent, "counts go on");
    assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Healthy);
    // The next daemon has it from the store, over whatever the configuration says.
    w.tree.shutdown().await;
    w.fake.rewind();
    let mut config = config();
    config
        .settings
        .policies
        .insert("web".into(), patch(&[(Key::HeartbeatTimeout, "3s"), (Key::FenceTries, "7")]));
    let tree = tree(&w.fake, &w.store, config).await;
    let policy = tree.policy_of("web").await.unwrap();
    assert_eq!((policy.heartbeat_timeout, policy.fence_tries), (Duration::from_secs(60), 7));
    let view = tree.policy_view(Some("web")).await.unwrap();
    let source = |key: Key| view.settings.iter().find(|s| s.key == key.name()).unwrap().source.clone();
    assert_eq!(
        [Key::HeartbeatTimeout, Key::FenceTries, Key::Vmcore].map(source),
        ["operator", "config", "default"]
    );
    let diff = tree.policy_set("web", Key::HeartbeatTimeout, None).await.unwrap();
    assert_eq!(diff[0].to, "3s", "back to the configuration");
}

#[tokio::test(start_paused = true)]
async fn an_import_is_all_or_nothing_and_can_be_tried() {
    let w = world().await;
    w.up("web").await;
    let good = patch(&[(Key::AutoHeal, "disabled")]);
    let bad = patch(&[(Key::RestartDelay, "10m")]);
    let both = BTreeMap::from([("web".to_owned(), good.clone()), ("db".to_owned(), bad)]);
    let error = w.tree.policy_import(both, false).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadInput);
    assert!(error.message.contains("db") && error.message.contains("restart-max-delay"), "{error}");
    assert!(w.tree.policy_of("web").await.unwrap().auto_heal, "nothing was changed");
    let one = BTreeMap::from([("web".to_owned(), good.clone())]);
    assert_eq!(w.tree.policy_import(one.clone(), true).await.unwrap().len(), 1);
    assert!(w.tree.policy_of("web").await.unwrap().auto_heal, "only tried");
    w.tree.policy_import(one.clone(), false).await.unwrap();
    w.shows("web", InstanceState::Healthy).await;
    assert!(!w.tree.policy_of("web").await.unwrap().auto_heal);
    assert_eq!(w.tree.policy_export(), one);
    let nobody = BTreeMap::from([("nobody".to_owned(), good)]);
    assert_eq!(w.tree.policy_import(nobody, false).await.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_shorter_timeout_is_in_force_at_once() {
    let slow = Policy { pulse_misses: 100_000, ..config().settings.defaults };
    let w = world_with(with_defaults(slow)).await;
    w.up("web").await;
    w.fake.hang(1);
    w.pass(Duration::from_secs(5)).await;
    assert_ne!(w.tree.status("web").await.unwrap().state, InstanceState::Recovering);
    let changed = Instant::now();
    w.tree.policy_set("web", Key::PulseMisses, Some("100")).await.unwrap();
    w.store.phase("PREPARING_RECOVERY").await;
    let bound = hang_bound(&w.tree.policy_of("web").await.unwrap());
    assert!(changed.elapsed() <= bound + 10 * MS, "{:?}", changed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_reload_changes_policies_without_touching_an_instance() {
    let w = world().await;
    let before = w.up("web").await;
    let mut settings = config().settings;
    settings.defaults.heartbeat_timeout = Duration::from_secs(8);
    settings.policies.insert("web".into(), patch(&[(Key::ConfirmProbes, "5")]));
    let (diff, groups) = w.tree.reload(settings.clone()).await.unwrap();
    let keys: Vec<_> = diff.iter().map(|c| (c.instance.as_deref(), c.key.as_str())).collect();
    assert_eq!(
        keys,
        [(None, "heartbeat-timeout"), (Some("web"), "heartbeat-timeout"), (Some("web"), "confirm-probes")]
    );
    assert!(groups.is_empty());
    w.pass(Duration::from_secs(3)).await;
    let after = w.tree.status("web").await.unwrap();
    assert_eq!((after.incarnation, after.state), (before.incarnation, InstanceState::Healthy));
    assert_eq!(w.tree.heartbeat("web").await.unwrap().timeout_ms, 8000);
    // What contradicts an operator's setting is refused as a whole.
    w.tree.policy_set("web", Key::RestartMaxDelay, Some("2s")).await.unwrap();
    let mut worse = settings;
    worse.defaults.restart_base = Duration::from_secs(30);
    worse.defaults.heartbeat_timeout = Duration::from_secs(9);
    let error = w.tree.reload(worse).await.unwrap_err();
    assert!(error.message.contains("web"), "{error}");
    assert_eq!(w.tree.heartbeat("web").await.unwrap().timeout_ms, 8000);
}

#[tokio::test(start_paused = true)]
async fn in_maintenance_an_instance_is_watched_and_not_acted_on() {
    let w = world().await;
    w.up("web").await;
    assert!(w.tree.maintenance("web", true).await.unwrap().maintenance);
    w.fake.hang(1);
    w.shows("web", InstanceState::Suspect).await;
    w.pass(Duration::from_secs(60)).await;
    assert_eq!((w.tree.status("web").await.unwrap().incarnation, w.fake.running(1)), (1, Some(1)));
    // It is remembered by the next daemon.
    w.tree.shutdown().await;
    w.fake.rewind();
    let tree = tree(&w.fake, &w.store, config()).await;
    let w = World { tree, fake: w.fake.clone(), store: w.store.clone() };
    w.pass(Duration::from_secs(60)).await;
    let view = w.tree.status("web").await.unwrap();
    assert!(view.maintenance && view.incarnation == 1, "{view:?}");
    // Turned off: what is dead is recovered.
    w.tree.maintenance("web", false).await.unwrap();
    let view = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((view.incarnation, view.maintenance), (2, false));
    let events = w.tree.events().since(&EventsArgs::default());
    assert!(
        events.iter().any(|e| e.kind == EventKind::Notice && e.effect.contains("maintenance")),
        "{events:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_maintenance_waits_for_the_operator() {
    let w = world().await;
    w.up("web").await;
    w.tree.maintenance("web", true).await.unwrap();
    w.fake.panic(1, "sysrq").await;
    let view = w.shows("web", InstanceState::Suspect).await;
    assert!(view.advice.contains("kmorphctl recover web"), "{view:?}");
    w.pass(Duration::from_secs(30)).await;
    assert_eq!(w.tree.status("web").await.unwrap().incarnation, 1);
    w.tree.maintenance("web", false).await.unwrap();
    assert_eq!(w.shows("web", InstanceState::Healthy).await.incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn every_transition_is_an_event_with_its_incident() {
    let w = world().await;
    let mut follower = w.tree.events().subscribe();
    w.up("web").await;
    w.fake.panic(1, "sysrq").await;
    w.store.phase("RECOVERY_COMPLETE").await;
    w.shows("web", InstanceState::Healthy).await;
    w.pass(MS).await;
    let events = w.tree.events().since(&EventsArgs { instance: Some("web".into()), ..EventsArgs::default() });
    let states: Vec<_> = events
        .iter()
        .filter(|e| e.kind == EventKind::State)
        .map(|e| (e.to.clone().unwrap(), e.incident))
        .collect();
    let want = |s: &[(&str, Option<u64>)]| s.iter().map(|(s, i)| (s.to_string(), *i)).collect::<Vec<_>>();
    assert_eq!(
        states[states.len() - 3..],
        want(&[("RUNNING", None), ("RECOVERING", Some(1)), ("RUNNING", Some(1))])
    );
    for pair in events.windows(2) {
        assert!(pair[0].seq < pair[1].seq);
    }
    let phases: Vec<_> =
        events.iter().filter(|e| e.kind == EventKind::Recovery).map(|e| e.to.clone().unwrap()).collect();
    assert_eq!(phases, w.store.phases());
    let mut n = 0;
    while let Ok(event) = follower.try_recv() {
        n += 1;
        assert_eq!(event.seq, n, "a follower misses nothing");
    }
    assert!(n as usize >= events.len());
}
