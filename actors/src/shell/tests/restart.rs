//! The daemon ends, in order or not, and another one takes over.

use super::*;

async fn again(w: World) -> World {
    let World { tree: old, fake, store } = w;
    old.shutdown().await;
    fake.rewind();
    let tree = tree(&fake, &store, config()).await;
    World { tree, fake, store }
}

#[tokio::test(start_paused = true)]
async fn running_kernels_are_adopted_and_not_disturbed() {
    let w = world().await;
    w.up("web").await;
    w.up("db").await;
    w.tree.terminate("db", true).await.unwrap();
    let w = again(w).await;
    let view = w.shows("web", InstanceState::Healthy).await;
    assert_eq!(
        (view.incarnation, view.release.as_str(), view.kernel.as_str()),
        (1, "6.12.9", "/boot/vmlinuz")
    );
    assert!(view.uptime_s.is_some());
    assert_eq!(w.tree.status("db").await.unwrap().state, InstanceState::Stopped);
    assert_eq!((w.fake.count("boot"), w.fake.count("fence")), (2, 1));
    w.fake.hang(1);
    w.store.phase("RECOVERY_COMPLETE").await;
    assert_eq!(w.shows("web", InstanceState::Healthy).await.incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_died_meanwhile_is_recovered() {
    let w = world().await;
    w.up("web").await;
    w.tree.shutdown().await;
    w.fake.hang(1);
    let w = again(w).await;
    assert_eq!(w.store.phase("RECOVERY_COMPLETE").await.recovered, Some(true));
    assert_eq!(w.shows("web", InstanceState::Healthy).await.incarnation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_was_cut_off_is_finished() {
    for blocked in ["fence", "reclaim", "boot"] {
        let w = world().await;
        w.up("web").await;
        let never = Arc::new(tokio::sync::Notify::new());
        w.fake.script(blocked, &[Next::Block(never)]);
        w.fake.panic(1, "die").await;
        let call = ["fence 1 1", "reclaim 1 1 false", "boot 1 2"];
        w.fake.called(call.iter().find(|c| c.starts_with(blocked)).unwrap()).await;
        let w = again(w).await;
        let last = w.store.phase("RECOVERY_COMPLETE").await;
        assert_eq!((last.incident, last.recovered), (1, Some(true)), "{blocked}");
        let view = w.shows("web", InstanceState::Healthy).await;
        assert_eq!((view.recoveries, view.incident), (1, None), "{blocked}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_platform_that_does_not_answer_at_first_is_asked_again() {
    let w = world().await;
    w.up("web").await;
    w.tree.shutdown().await;
    w.fake.script("existing", &[Next::Fail("busy")]);
    let platform: Arc<dyn Platform> = w.fake.clone();
    let failed = Tree::start(config(), platform, w.store.clone(), Arc::new(Defs)).await;
    assert!(failed.is_err_and(|e| e.to_string().contains("busy")));
    // Later, only the instance's own question fails.
    let w = again(w).await;
    w.shows("web", InstanceState::Healthy).await;
    w.fake.script("existing", &[Next::Fail("busy"), Next::Fail("busy")]);
    w.tree.instance_for_test("web").link.send(crate::shell::instance::InstanceMsg::Panic);
    w.pass(Duration::from_secs(10)).await;
    assert_eq!(w.tree.status("web").await.unwrap().state, InstanceState::Healthy);
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_is_not_remembered_is_adopted_without_auto_heal() {
    let w = world().await;
    w.up("web").await;
    w.tree.shutdown().await;
    w.fake.rewind();
    let store = Arc::new(TestStore::default());
    let tree = tree(&w.fake, &store, config()).await;
    let w = World { tree, fake: w.fake, store };
    let view = w.shows("web", InstanceState::Healthy).await;
    assert_eq!((view.incarnation, view.monitor), (1, false));
    w.fake.hang(1);
    w.store.phase("DETECTING_FAILURE").await;
    w.pass(Duration::from_secs(60)).await;
    assert_eq!(w.fake.count("fence"), 0);
    assert_eq!(w.tree.terminate("web", false).await.unwrap().state, InstanceState::Stopped);
}

#[tokio::test(start_paused = true)]
async fn drain_stops_every_kernel_and_ends_the_tree() {
    let w = world().await;
    w.up("web").await;
    w.up("db").await;
    assert_eq!(w.tree.drain(false).await, []);
    assert_eq!((w.fake.running(1), w.fake.running(2)), (None, None));
    w.tree.closed().await;
    assert_eq!(w.tree.spawn(args("web")).await.unwrap_err().kind, ErrorKind::Internal);
}
