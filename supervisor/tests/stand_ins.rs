//! The whole daemon on the process platform: stand-ins crash, the daemon is killed, clients misbehave.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)] // a test

mod common;

use std::collections::BTreeMap;

use common::{Home, LIMIT};
use kmorph_control::{
    ErrorKind, EventKind, EventView, EventsArgs, GroupView, InstanceState, MorphArgs, MorphGoal, MorphView,
    Next, PolicyChange, RecoveryStep, ReloadView, Request,
};
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

const SHOP: &str = "groups:\n  - name: shop\n    strategy: rest-for-one\n    members: [one, two, three]\n    restart-intensity: 50\n    restart-period: 1h\n";

#[tokio::test]
async fn instances_crash_hang_and_are_healed() {
    let home = Home::new("");
    let daemon = home.start().await;
    for name in ["one", "two"] {
        let view = daemon.spawn(name).await;
        assert_eq!((view.state, view.incarnation), (InstanceState::Healthy, 1));
    }
    assert_eq!(daemon.status().await.platform, "process");
    home.fault(1, &["panic", "out", "of", "luck"]);
    let one = daemon.until("one", |v| v.incarnation == 2 && v.state == InstanceState::Healthy).await;
    assert_eq!(one.recoveries, 1);
    home.fault(2, &["hang"]);
    daemon.until("two", |v| v.incarnation == 2 && v.state == InstanceState::Healthy).await;
    let steps = daemon.steps().await;
    assert!(steps.iter().any(|s| s.instance == "one" && s.detail.contains("out of luck")), "{steps:?}");
    let events: Vec<EventView> =
        daemon.stream(&Request::Events { filter: EventsArgs::default(), follow: false }).await;
    assert!(events.iter().any(|e| e.kind == EventKind::State && e.incident == Some(1)), "{events:?}");
    daemon.stop(true).await;
    assert_eq!(home.stand_ins(), 0, "nothing is left behind");
}

#[tokio::test]
async fn a_new_kernel_takes_an_instance_over() {
    let home = Home::new("");
    std::fs::copy(home.path("kernel-6.6"), home.path("kernel-6.12")).unwrap();
    let mut daemon = home.start().await;
    daemon.spawn("one").await;
    daemon.spawn("two").await;
    let (one, two) = (home.pid(1).unwrap(), home.pid(2));
    let to = |kernel: Option<&str>, goal| {
        Request::Morph(MorphArgs {
            name: "one".into(),
            kernel: kernel.map(|k| home.path(k).display().to_string()),
            cmdline: None,
            initramfs: None,
            cpus: vec![],
            memory_bytes: None,
            goal,
            dry_run: false,
        })
    };
    // Killed while the operator thinks about it: the next daemon waits for him too.
    let view: MorphView = daemon.call(&to(Some("kernel-6.12"), MorphGoal::Validate)).await.unwrap();
    assert_eq!((view.committed, view.side.unwrap().name.as_str()), (None, "one~morph"));
    daemon.kill().await;
    daemon = home.start().await;
    daemon.until("one~morph", |v| v.state == InstanceState::Healthy).await;
    daemon.until("one", |v| v.state == InstanceState::Healthy).await;
    let view: MorphView = daemon.call(&to(None, MorphGoal::Commit)).await.unwrap();
    assert_eq!(view.committed, Some(true), "{view:?}");
    let now = daemon.until("one", |v| v.state == InstanceState::Healthy && v.morph.is_none()).await;
    assert_eq!((now.incarnation, now.id), (2, 511));
    // Its definition says so, what was written by hand is kept, and its neighbour knows where it is.
    let defined = std::fs::read_to_string(home.path("instances/one.dts")).unwrap();
    assert!(defined.contains("id = <0x1ff>;"), "{defined}");
    assert!(std::fs::read_to_string(home.path("instances/one.dts.orig")).unwrap().contains("id = <1>"));
    let told = UnixStream::connect(home.path("run/2/topology")).await.unwrap();
    let mut lines = tokio::io::BufReader::new(told).lines();
    let neighbour = loop {
        let line = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().unwrap();
        let told: kmp::message::Topology = serde_json::from_str(&line).unwrap();
        let one = told.instances.into_iter().find(|i| i.name == "one");
        if let Some(one) = one.filter(|i| i.cid == 513 && i.serves) {
            break one;
        }
    };
    assert!(neighbour.release.contains("6.12") && neighbour.incarnation == 2, "{neighbour:?}");
    assert!(now.release.contains("6.12"), "{now:?}");
    // The old kernel is stopped and gives back what it had; the neighbour noticed nothing.
    let limit = tokio::time::Instant::now() + LIMIT;
    while home.pid(1) == Some(one) || daemon.status().await.running != 2 {
        assert!(tokio::time::Instant::now() < limit, "the old kernel is left: {}", home.log());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!((daemon.view("two").await.incarnation, home.pid(2)), (1, two));
    // The steps are in the history under the number of the morph.
    let steps = daemon.steps().await;
    let committed = steps.iter().find(|s| s.recovered == Some(true) && s.incident == view.number);
    assert!(committed.is_some(), "{steps:?}");
    // A kernel that is not there changes nothing.
    let error = daemon.call::<MorphView>(&to(Some("missing"), MorphGoal::Commit)).await.unwrap_err();
    assert!(matches!(error.kind, ErrorKind::BadInput | ErrorKind::NotFound), "{error}");
    home.fault(511, &["panic"]);
    daemon.until("one", |v| v.incarnation == 3 && v.state == InstanceState::Healthy).await;
    daemon.stop(true).await;
    assert_eq!(home.stand_ins(), 0);
}

#[tokio::test]
async fn a_killed_daemon_disturbs_nobody_and_its_work_is_ended_by_the_next() {
    let home = Home::new("");
    let mut daemon = home.start().await;
    daemon.spawn("one").await;
    daemon.spawn("two").await;
    let two = home.pid(2);
    let mut killed = 0;
    // Once at every step a recovery journals, once while nothing happens.
    for nth in 0..6 {
        let before = daemon.view("one").await.incarnation;
        if nth > 0 {
            let seen = daemon.steps().await.len();
            let mut client = daemon.client().await;
            let request = Request::RecoveryLog { filter: Default::default(), follow: true };
            client.start(&request).await.unwrap();
            home.fault(1, &["panic"]);
            for _ in 0..seen + nth {
                let next = timeout(LIMIT, client.next::<RecoveryStep, ()>()).await.unwrap();
                assert!(matches!(next, Ok(Next::Item(_))), "{next:?}");
            }
        }
        daemon.kill().await;
        killed += 1;
        daemon = home.start().await;
        let wanted = if nth == 0 { before } else { before + 1 };
        let one = daemon.until("one", |v| v.state == InstanceState::Healthy && v.incarnation >= wanted).await;
        // A kill while the new incarnation came up may cost one more.
        assert!(one.incarnation <= wanted + 1, "kill {nth}: {before} -> {one:?}");
        let view = daemon.until("two", |v| v.state == InstanceState::Healthy).await;
        assert_eq!((view.incarnation, home.pid(2)), (1, two), "the neighbour after {killed} kills");
    }
    let open: BTreeMap<u64, bool> =
        daemon.steps().await.iter().map(|s| (s.incident, s.recovered.is_some())).collect();
    assert!(open.values().all(|ended| *ended), "every incident ended: {open:?} {:#?}", daemon.steps().await);
    daemon.stop(true).await;
    assert_eq!(home.stand_ins(), 0);
}

#[tokio::test]
async fn groups_policies_maintenance_and_reload() {
    let home = Home::new(SHOP);
    let daemon = home.start().await;
    for name in ["one", "two", "three"] {
        daemon.spawn(name).await;
    }
    home.fault(2, &["crash"]);
    for (name, incarnation) in [("three", 2), ("two", 2), ("one", 1)] {
        daemon.until(name, |v| v.incarnation == incarnation && v.state == InstanceState::Healthy).await;
    }
    let group: GroupView = daemon.call(&Request::GroupShow { name: "shop".into() }).await.unwrap();
    assert_eq!((group.state.as_str(), group.restarts), ("UP", 1), "{group:?}");

    home.configure("policies:\n  one:\n    heartbeat-timeout: 7s\nagent: /elsewhere\n");
    daemon.signal(Signal::SIGHUP);
    daemon.until("one", |v| v.heartbeat_timeout_ms == 7000 && v.group.is_none()).await;
    let again: ReloadView = daemon.call(&Request::DaemonReload).await.unwrap();
    assert_eq!(again.restart_needed, ["agent"]);
    assert!(again.policies.is_empty(), "{again:?}");
    home.configure("policy:\n  auto-heal: maybe\n");
    let error = daemon.call::<ReloadView>(&Request::DaemonReload).await.unwrap_err();
    assert!(error.message.contains("policy.auto-heal"), "{error}");
    assert_eq!(daemon.view("one").await.incarnation, 1);

    let set = |key: &str, value: Option<&str>| Request::PolicySet {
        instance: "one".into(),
        key: key.into(),
        value: value.map(str::to_owned),
    };
    let diff: Vec<PolicyChange> = daemon.call(&set("heartbeat-timeout", Some("9"))).await.unwrap();
    assert_eq!((diff[0].from.as_str(), diff[0].to.as_str()), ("7s", "9s"));
    assert!(daemon.call::<Vec<PolicyChange>>(&set("heartbeat", Some("9"))).await.is_err());
    let text: String = daemon.call(&Request::PolicyExport).await.unwrap();
    let import = Request::PolicyImport { text: text.replace("9s", "8s"), file: "f".into(), dry_run: false };
    let diff: Vec<PolicyChange> = daemon.call(&import).await.unwrap();
    assert_eq!(diff[0].to, "8s");

    let maintenance = |on| Request::Maintenance { name: "one".into(), on };
    let _: kmorph_control::InstanceView = daemon.call(&maintenance(true)).await.unwrap();
    home.fault(1, &["panic"]);
    daemon.until("one", |v| v.state == InstanceState::Suspect && !v.advice.is_empty()).await;
    let _: kmorph_control::InstanceView = daemon.call(&maintenance(false)).await.unwrap();
    daemon.until("one", |v| v.incarnation == 2 && v.state == InstanceState::Healthy).await;
    daemon.stop(true).await;
}

#[tokio::test]
async fn sigterm_ends_in_order_in_every_phase_and_leaves_kernels_running() {
    let home = Home::new("");
    let mut daemon = home.start().await;
    daemon.spawn("one").await;
    daemon.spawn("two").await;
    for nth in 1..5 {
        let seen = daemon.steps().await.len();
        let mut client = daemon.client().await;
        let request = Request::RecoveryLog { filter: Default::default(), follow: true };
        client.start(&request).await.unwrap();
        home.fault(1, &["panic"]);
        for _ in 0..seen + nth {
            let next = timeout(LIMIT, client.next::<RecoveryStep, ()>()).await.unwrap();
            assert!(matches!(next, Ok(Next::Item(_))), "{next:?}");
        }
        let status = daemon.terminate().await;
        assert!(status.success(), "{status}");
        assert!(home.stand_ins() >= 1, "the neighbour runs on");
        daemon = home.start().await;
        daemon.until("one", |v| v.state == InstanceState::Healthy).await;
        assert_eq!(daemon.view("two").await.incarnation, 1);
    }
    daemon.stop(true).await;
}

#[tokio::test]
async fn a_thousand_clients_and_bad_ones_delay_nobody() {
    let home = Home::new("");
    let daemon = home.start().await;
    daemon.spawn("one").await;
    // Silent ones, ones that talk nonsense, ones that announce more than they send, ones that do not read.
    let mut bad = Vec::new();
    for n in 0..600u32 {
        let mut stream = UnixStream::connect(home.socket()).await.unwrap();
        let bytes: &[u8] = match n % 3 {
            0 => b"",
            1 => b"GET / HTTP/1.0\r\n\r\n",
            _ => &[0, 0x3f, 0xff, 0xff, 1],
        };
        // The daemon may have hung up on nonsense already.
        let _ = stream.write_all(bytes).await;
        bad.push(stream);
    }
    let mut good = Vec::new();
    for _ in 0..400 {
        good.push(daemon.client().await);
    }
    let request = Request::Status { name: "one".into() };
    let calls = good.iter_mut().map(|client| client.call::<kmorph_control::InstanceView>(&request));
    for view in timeout(LIMIT, futures::future::join_all(calls)).await.unwrap() {
        assert_eq!(view.unwrap().state, InstanceState::Healthy);
    }
    let beats: kmorph_control::HeartbeatView =
        daemon.call(&Request::Heartbeat { name: "one".into() }).await.unwrap();
    assert_eq!(beats.missed, 0, "{beats:?}");
    // A client that asks for a stream and never reads it costs its own connection only.
    for _ in 0..50 {
        let mut client = daemon.client().await;
        client.start(&Request::Events { filter: EventsArgs::default(), follow: true }).await.unwrap();
        std::mem::forget(client);
    }
    home.fault(1, &["panic"]);
    daemon.until("one", |v| v.incarnation == 2 && v.state == InstanceState::Healthy).await;
    drop((bad, good));
    daemon.stop(true).await;
}

#[tokio::test]
async fn what_is_wrong_at_the_start_is_said_with_the_way_out() {
    let home = Home::new("");
    std::fs::create_dir_all(home.path("state")).unwrap();
    home.mode("state", 0o777);
    let text = home.fails().await;
    assert!(text.contains("chmod go-w"), "{text}");
    home.mode("state", 0o700);
    home.configure("plattform: process\n");
    let text = home.fails().await;
    assert!(text.contains("there is no such key") && text.contains("kmorphd.conf:"), "{text}");
    home.configure("");
    let first = home.start().await;
    let text = home.fails().await;
    assert!(text.contains("another daemon uses it"), "{text}");
    // One of its own folders is not enough.
    for (folder, why) in [("run", "another kmorphd has its journal in"), ("state", "a daemon listens at")] {
        let config = std::fs::read_to_string(home.path("kmorphd.conf")).unwrap();
        let other = config.replace(&format!("/{folder}\n"), &format!("/other-{folder}\n"));
        std::fs::write(home.path("kmorphd.conf"), other).unwrap();
        let text = home.fails().await;
        assert!(text.contains(why), "{text}");
    }
    first.stop(true).await;
}
