//! Every metric that is given is described, and those that matter are given.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

use super::*;

/// Keeps names, and what histograms and counters get.
#[derive(Clone, Default)]
struct Names {
    described: Arc<Mutex<BTreeSet<String>>>,
    given: Arc<Mutex<BTreeSet<String>>>,
}

impl Names {
    fn give(&self, key: &Key) {
        self.given.lock().unwrap().insert(key.name().to_owned());
    }
}

impl Recorder for Names {
    fn describe_counter(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.described.lock().unwrap().insert(key.as_str().to_owned());
    }
    fn describe_gauge(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.described.lock().unwrap().insert(key.as_str().to_owned());
    }
    fn describe_histogram(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.described.lock().unwrap().insert(key.as_str().to_owned());
    }
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.give(key);
        Counter::noop()
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.give(key);
        Gauge::noop()
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.give(key);
        Histogram::noop()
    }
}

#[tokio::test(start_paused = true)]
async fn metrics_are_described_and_given() {
    let names = Names::default();
    // The test runtime has one thread, so every actor records here.
    let _guard = metrics::set_default_local_recorder(&names);
    let w = world().await;
    w.up("web").await;
    w.tree.policy_set("web", crate::core::policy::Key::Standby, Some("same")).await.unwrap();
    let ready = |v: &InstanceView| v.standby.as_ref().is_some_and(|s| s.state == "ready");
    while !ready(&w.tree.status("web").await.unwrap()) {
        w.pass(MS).await;
    }
    w.fake.agent(1, Agent::Silent);
    w.shows("web", InstanceState::AgentSilent).await;
    w.tree.instance_for_test("web").heartbeat.send(crate::shell::heartbeat::HeartbeatMsg::Panic);
    w.fake.panic(1, "die").await;
    w.fake.agent(1, Agent::Answers);
    w.store.phase("RECOVERY_COMPLETE").await;
    w.tree.shutdown().await;
    w.tree.instance_for_test("web").link.send(crate::shell::instance::InstanceMsg::Look);
    let described = names.described.lock().unwrap().clone();
    let given = names.given.lock().unwrap().clone();
    assert_eq!(given, described, "what a failure and its recovery give is what is described");
    let documented = include_str!("../../telemetry.rs");
    for name in described {
        assert!(documented.contains(&format!("//! | `{name}` |")), "{name} is in the table");
    }
}
