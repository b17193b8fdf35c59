use super::*;
use crate::core::group::GroupSpec;
use crate::core::supervisor::Strategy;
use crate::shell::groups::GroupsMsg;

fn shop(strategy: Strategy, intensity: u32) -> TreeConfig {
    let mut config = config();
    config.settings.groups = vec![GroupSpec {
        name: "shop".into(),
        strategy,
        intensity,
        period: Duration::from_secs(600),
        members: vec!["db".into(), "web".into(), "i3".into()],
    }];
    config
}

async fn shop_world(strategy: Strategy, intensity: u32) -> World {
    let w = world_with(shop(strategy, intensity)).await;
    for name in ["db", "web", "i3"] {
        w.up(name).await;
    }
    w
}

impl World {
    async fn group_is(&self, state: &str) -> GroupView {
        let limit = Instant::now() + Duration::from_secs(600);
        loop {
            // Its actor may just be being restarted.
            let view = self.tree.group("shop").await;
            match view {
                Ok(view) if view.state == state => return view,
                _ => assert!(Instant::now() < limit, "the group is never {state}: {view:?}"),
            }
            tokio::time::sleep(MS).await;
        }
    }

    async fn incarnations(&self) -> [u64; 3] {
        let mut all = [0; 3];
        for (at, name) in ["db", "web", "i3"].into_iter().enumerate() {
            all[at] = self.tree.status(name).await.unwrap().incarnation;
        }
        all
    }

    async fn crash(&self, id: u16) {
        let before = self.fake.count("fence");
        self.fake.panic(id, "sysrq").await;
        let limit = Instant::now() + Duration::from_secs(60);
        while self.fake.count("fence") == before {
            assert!(Instant::now() < limit, "instance {id} is never fenced");
            tokio::time::sleep(MS).await;
        }
    }

    fn boots_and_fences(&self) -> String {
        let log = self.fake.log();
        let words =
            log.iter().map(String::as_str).filter(|l| l.starts_with("boot") || l.starts_with("fence"));
        words.map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
    }
}

#[tokio::test(start_paused = true)]
async fn strategies_over_instances() {
    for (strategy, want, order) in [
        (Strategy::OneForOne, [1, 2, 1], "fence 1, boot 1"),
        (Strategy::OneForAll, [2, 2, 2], "fence 1, fence 3, fence 2, boot 2, boot 1, boot 3"),
        (Strategy::RestForOne, [1, 2, 2], "fence 1, fence 3, boot 1, boot 3"),
    ] {
        let w = shop_world(strategy, 3).await;
        assert_eq!(w.tree.group("shop").await.unwrap().state, "UP");
        w.crash(1).await;
        let view = w.group_is("UP").await;
        assert_eq!((w.incarnations().await, view.restarts), (want, 1), "{strategy:?}");
        assert!(w.boots_and_fences().ends_with(order), "{strategy:?}: {}", w.boots_and_fences());
        // All of it is one incident.
        let steps = w.store.steps.borrow().clone();
        assert!(steps.iter().all(|s| s.incident == 1), "{strategy:?}: {steps:?}");
        let ended = steps.iter().filter(|s| s.recovered == Some(true)).count();
        assert_eq!(ended as u64, want.iter().map(|n| n - 1).sum::<u64>());
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_that_fails_too_often_is_degraded_and_can_be_brought_back() {
    let w = shop_world(Strategy::OneForAll, 1).await;
    w.crash(2).await;
    w.group_is("UP").await;
    w.crash(1).await;
    let view = w.group_is("DEGRADED").await;
    assert!(view.reason.contains("more than 1 times"), "{view:?}");
    assert!(view.advice.contains("kmorphctl recover db; kmorphctl recover web"), "{view:?}");
    for (id, name) in [(2, "db"), (1, "web"), (3, "i3")] {
        let view = w.shows(name, InstanceState::Degraded).await;
        assert!(!view.reason.is_empty() && view.advice.contains("kmorphctl recover"), "{view:?}");
        assert_eq!(w.fake.running(id), None, "{name} is stopped");
    }
    for name in ["db", "web", "i3"] {
        w.tree.recover(name).await.unwrap();
    }
    w.group_is("UP").await;
    w.crash(1).await;
    w.group_is("UP").await;
}

#[tokio::test(start_paused = true)]
async fn near_simultaneous_deaths_are_one_restart_and_one_incident() {
    let w = shop_world(Strategy::OneForAll, 1).await;
    for id in [1, 2, 3] {
        w.fake.panic(id, "sysrq").await;
    }
    let limit = Instant::now() + Duration::from_secs(600);
    while w.incarnations().await != [2, 2, 2] {
        assert!(Instant::now() < limit, "{:?}", w.incarnations().await);
        tokio::time::sleep(MS).await;
    }
    let view = w.group_is("UP").await;
    assert_eq!((view.restarts, w.incarnations().await), (1, [2, 2, 2]));
    assert!(w.store.steps.borrow().iter().all(|s| s.incident == 1));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_was_restarted_finishes_what_the_group_was_doing() {
    let w = shop_world(Strategy::RestForOne, 3).await;
    // The daemon ends while db's memory is being taken back and its dependents are still to be stopped.
    let gate = Arc::new(tokio::sync::Notify::new());
    w.fake.script("reclaim", &[fake::Next::Block(gate.clone())]);
    w.fake.panic(2, "sysrq").await;
    w.store.phase("RECLAIMING_RESOURCES").await;
    w.tree.shutdown().await;
    gate.notify_one();
    w.fake.rewind();
    let tree = tree(&w.fake, &w.store, shop(Strategy::RestForOne, 3)).await;
    let w = World { tree, fake: w.fake.clone(), store: w.store.clone() };
    w.group_is("UP").await;
    let [db, web, i3] = w.incarnations().await;
    assert!(db == 2 && web >= 2 && i3 >= 2, "{db} {web} {i3}");
}

#[tokio::test(start_paused = true)]
async fn the_groups_actor_may_fail_at_any_moment() {
    let w = shop_world(Strategy::OneForAll, 3).await;
    w.fake.panic(2, "sysrq").await;
    w.store.phase("PREPARING_RECOVERY").await;
    w.tree.env_for_test().groups.send(GroupsMsg::Panic);
    w.group_is("UP").await;
    assert!(w.incarnations().await.iter().all(|n| *n >= 2));
    w.crash(1).await;
    w.group_is("UP").await;
}

#[tokio::test(start_paused = true)]
async fn a_member_in_maintenance_can_be_recovered_by_hand() {
    let w = shop_world(Strategy::OneForAll, 3).await;
    w.tree.maintenance("web", true).await.unwrap();
    assert_eq!(w.tree.recover("web").await.unwrap().incarnation, 2);
    assert_eq!(w.incarnations().await, [1, 2, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_member_in_maintenance_is_left_out_and_groups_can_be_reloaded() {
    let w = shop_world(Strategy::OneForAll, 3).await;
    w.tree.maintenance("i3", true).await.unwrap();
    w.crash(1).await;
    w.group_is("UP").await;
    assert_eq!(w.incarnations().await, [2, 2, 1]);
    w.tree.maintenance("i3", false).await.unwrap();
    let (_, groups) = w.tree.reload(config().settings).await.unwrap();
    assert_eq!(groups, ["group shop is gone: its members are on their own"]);
    assert_eq!(w.tree.group("shop").await.unwrap_err().kind, ErrorKind::NotFound);
    w.fake.panic(1, "sysrq").await;
    w.shows("web", InstanceState::Recovering).await;
    w.shows("web", InstanceState::Healthy).await;
    assert_eq!(w.incarnations().await, [2, 3, 1]);
    let (_, groups) = w.tree.reload(shop(Strategy::OneForAll, 3).settings).await.unwrap();
    assert_eq!(groups, ["group shop is new: db, web, i3"]);
    w.group_is("UP").await;
    w.crash(3).await;
    w.group_is("UP").await;
    assert_eq!(w.incarnations().await, [3, 4, 2]);
}

fn morph_all(kernel: Option<&str>, what: GroupMorph) -> MorphGroupArgs {
    MorphGroupArgs { group: "shop".into(), kernel: kernel.map(str::to_owned), what, one_by_one: false }
}

/// The machine of the tests has twelve CPUs: two members and their new kernels fit.
async fn two_of_the_shop() -> World {
    let w = world_with(shop(Strategy::OneForOne, 10)).await;
    w.up("db").await;
    w.up("web").await;
    w
}

async fn releases(w: &World) -> [String; 2] {
    let mut all = <[String; 2]>::default();
    for (at, name) in ["db", "web"].into_iter().enumerate() {
        all[at] = w.tree.status(name).await.unwrap().release;
    }
    all
}

#[tokio::test(start_paused = true)]
async fn members_get_a_new_kernel_together_or_not_at_all() {
    let w = two_of_the_shop().await;
    // The second cannot be started: the first is rolled back.
    w.fake.script("boot", &[Next::Fail("no room")]);
    let error = w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Commit)).await.unwrap_err();
    assert!(
        error.message.contains("group shop: ") && error.message.contains("nothing was changed"),
        "{error}"
    );
    w.fake.agent(510, Agent::Never);
    let error = w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Commit)).await.unwrap_err();
    assert!(error.message.contains("rolled back too: db"), "{error}");
    assert_eq!(releases(&w).await, ["6.12.9", "6.12.9"]);
    w.fake.agent(510, Agent::Answers);
    let valid = w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Validate)).await.unwrap();
    assert_eq!(valid.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["db", "web"]);
    assert_eq!(releases(&w).await, ["6.12.9", "6.12.9"]);
    let error = w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Commit)).await.unwrap_err();
    assert!(error.message.contains("db has a morph under way"), "{error}");
    let done = w.tree.morph_group(&morph_all(None, GroupMorph::Commit)).await.unwrap();
    assert!(done.iter().all(|v| v.committed == Some(true)), "{done:?}");
    assert_eq!(releases(&w).await, ["6.18.1", "6.18.1"]);
    let error = w.tree.morph_group(&morph_all(None, GroupMorph::Rollback)).await.unwrap_err();
    assert!(error.message.contains("no morph is prepared: kmorphctl morph group shop"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_member_that_dies_before_the_commit_takes_the_others_back() {
    let w = two_of_the_shop().await;
    w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Validate)).await.unwrap();
    let side = w.tree.status("web~morph").await.unwrap().id;
    w.fake.panic(side, "die").await;
    while w.tree.status("web").await.unwrap().morph.is_some() {
        w.pass(MS).await;
    }
    // One is left that waits: it goes with the others, or not at all.
    let error = w.tree.morph_group(&morph_all(None, GroupMorph::Commit)).await.unwrap_err();
    assert!(
        error.message.contains("web has no morph") && error.message.contains("shop --rollback"),
        "{error}"
    );
    let back = w.tree.morph_group(&morph_all(None, GroupMorph::Rollback)).await.unwrap();
    assert_eq!(
        back.iter().map(|v| (v.name.as_str(), v.committed)).collect::<Vec<_>>(),
        [("db", Some(false))]
    );
    assert_eq!(releases(&w).await, ["6.12.9", "6.12.9"]);
    // A new kernel that dies between validation and commit: nobody is committed before all are valid again.
    w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Validate)).await.unwrap();
    let side = w.tree.status("web~morph").await.unwrap().id;
    w.fake.agent(side, Agent::Silent);
    let error = w.tree.morph_group(&morph_all(None, GroupMorph::Commit)).await.unwrap_err();
    assert!(error.message.contains("group shop"), "{error}");
    assert_eq!(releases(&w).await, ["6.12.9", "6.12.9"]);
    // Whichever it is: those behind it do not stay prepared.
    w.fake.agent(side, Agent::Answers);
    w.tree.morph_group(&morph_all(Some("/new"), GroupMorph::Validate)).await.unwrap();
    let side = w.tree.status("db~morph").await.unwrap().id;
    w.fake.agent(side, Agent::Silent);
    let error = w.tree.morph_group(&morph_all(None, GroupMorph::Commit)).await.unwrap_err();
    assert!(error.message.contains("rolled back too: web"), "{error}");
    for name in ["db", "web"] {
        assert!(w.tree.status(name).await.unwrap().morph.is_none(), "{name}");
    }
    assert_eq!(releases(&w).await, ["6.12.9", "6.12.9"]);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_fails_in_maintenance_is_healed_when_that_is_over() {
    let w = shop_world(Strategy::OneForOne, 3).await;
    w.tree.maintenance("web", true).await.unwrap();
    w.fake.panic(1, "sysrq").await;
    let limit = Instant::now() + PATIENCE;
    while w.tree.status("web").await.unwrap().state == InstanceState::Healthy {
        assert!(Instant::now() < limit, "it is not seen");
        w.pass(MS).await;
    }
    w.tree.maintenance("web", false).await.unwrap();
    w.shows("web", InstanceState::Healthy).await;
    w.group_is("UP").await;
    assert_eq!(w.incarnations().await, [1, 2, 1]);
}

/// The shop, whose members have state.
async fn shop_with_state(strategy: Strategy) -> World {
    let w = world_with(shop(strategy, 3)).await;
    w.fake.workloads.switch_on();
    for name in ["db", "web", "i3"] {
        w.up(name).await;
    }
    w
}

impl World {
    /// Have web stand aside in its next morph until the gate is opened; wait until it does.
    fn stands_aside(&self) -> (Arc<tokio::sync::Notify>, impl Future<Output = ()>) {
        let gate = Arc::new(tokio::sync::Notify::new());
        self.fake.workloads.script("1 FREEZE", Next::Block(gate.clone()));
        let aside = async {
            let limit = Instant::now() + PATIENCE;
            while !self.fake.workloads.log().iter().any(|l| l == "1 FREEZE") {
                assert!(Instant::now() < limit, "nothing is frozen");
                self.pass(MS).await;
            }
        };
        (gate, aside)
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_that_stands_aside_in_a_morph_is_stopped_with_its_group_when_it_is_back() {
    let w = shop_with_state(Strategy::OneForAll).await;
    let (gate, aside) = w.stands_aside();
    let fails = async {
        aside.await;
        w.fake.panic(2, "sysrq").await;
        w.fake.called("reclaim 2 1 false").await;
        gate.notify_one();
    };
    let (_, ()) = tokio::join!(w.tree.morph(super::morphs::to(MorphGoal::Commit)), fails);
    w.group_is("UP").await;
    for name in ["db", "web", "i3"] {
        w.shows(name, InstanceState::Healthy).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_that_stands_aside_while_what_it_depends_on_is_given_up_is_not_started_again() {
    let w = shop_with_state(Strategy::RestForOne).await;
    let (gate, aside) = w.stands_aside();
    let fails = async {
        aside.await;
        w.fake.script("fence", &[Next::Partial(3), Next::Partial(3), Next::Partial(3)]);
        w.fake.panic(2, "sysrq").await;
        w.shows("db", InstanceState::PartialFence).await;
        w.pass(MS).await;
        gate.notify_one();
    };
    let (_, ()) = tokio::join!(w.tree.morph(super::morphs::to(MorphGoal::Commit)), fails);
    w.shows("web", InstanceState::Degraded).await;
    w.pass(Duration::from_secs(60)).await;
    let after = w.tree.status("web").await.unwrap();
    assert_eq!((after.state, w.fake.running(after.id)), (InstanceState::Degraded, None), "{after:?}");
}
