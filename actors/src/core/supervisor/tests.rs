use proptest::prelude::{Just, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::{Strategy, *};

const S: Duration = Duration::from_secs(1);

/// Plays the shell: carries actions out at once and keeps a log such as "+a -b" (start, stop).
struct Game {
    s: Supervisor,
    now: Duration,
    log: Vec<String>,
    running: Vec<String>,
    down: Option<Down>,
    refused: Vec<Refusal>,
    /// Children whose start fails.
    broken: Vec<String>,
}

impl Game {
    fn new(flags: Flags, specs: Vec<ChildSpec>) -> Game {
        Game {
            s: Supervisor::new(flags, specs).unwrap(),
            now: Duration::ZERO,
            log: vec![],
            running: vec![],
            down: None,
            refused: vec![],
            broken: vec![],
        }
    }

    fn play(&mut self, event: Event) -> String {
        self.log.clear();
        let mut todo = VecDeque::from([event]);
        while let Some(event) = todo.pop_front() {
            if let Event::Exited(id, _) = &event {
                self.running.retain(|r| r != id);
            }
            let mut steps = 0;
            for action in self.s.step(self.now, event) {
                match action {
                    Action::Start(id) => {
                        steps += 1;
                        self.log.push(format!("+{id}"));
                        if self.broken.contains(&id) {
                            todo.push_back(Event::StartFailed(id));
                        } else {
                            assert!(!self.running.contains(&id), "{id} started twice");
                            self.running.push(id.clone());
                            todo.push_back(Event::Started(id));
                        }
                    }
                    Action::Stop(id, _) => {
                        steps += 1;
                        self.log.push(format!("-{id}"));
                        assert!(self.running.contains(&id), "{id} stopped while it does not run");
                        todo.push_back(Event::Exited(id, Exit::Normal));
                    }
                    Action::Forget(id) => self.log.push(format!("x{id}")),
                    Action::Down(why) => {
                        assert!(self.running.is_empty(), "down while {:?} run", self.running);
                        assert_eq!(self.down.replace(why), None);
                    }
                    Action::Refused(r) => self.refused.push(r),
                }
            }
            assert!(steps <= 1, "one step at a time");
        }
        self.log.join(" ")
    }

    fn exit(&mut self, id: &str, exit: Exit) -> String {
        self.play(Event::Exited(id.into(), exit))
    }
}

fn abc(strategy: Strategy) -> Game {
    let flags = Flags { strategy, ..Flags::default() };
    let mut g = Game::new(flags, ["a", "b", "c"].map(ChildSpec::new).into());
    assert_eq!(g.play(Event::Start), "+a +b +c");
    g
}

#[test]
fn strategies_restart_whom_they_should_in_order() {
    for (strategy, dead, want) in [
        (Strategy::OneForOne, "a", "+a"),
        (Strategy::OneForOne, "b", "+b"),
        (Strategy::OneForOne, "c", "+c"),
        (Strategy::OneForAll, "a", "-c -b +a +b +c"),
        (Strategy::OneForAll, "b", "-c -a +a +b +c"),
        (Strategy::OneForAll, "c", "-b -a +a +b +c"),
        (Strategy::RestForOne, "a", "-c -b +a +b +c"),
        (Strategy::RestForOne, "b", "-c +b +c"),
        (Strategy::RestForOne, "c", "+c"),
    ] {
        assert_eq!(abc(strategy).exit(dead, Exit::Abnormal), want, "{strategy:?} {dead}");
    }
}

#[test]
fn shutdown_is_in_reverse_start_order() {
    let mut g = abc(Strategy::OneForOne);
    assert_eq!(g.play(Event::Shutdown), "-c -b -a");
    assert_eq!(g.down, Some(Down::Shutdown));
    assert_eq!(g.exit("a", Exit::Abnormal), "", "nothing happens to what is down");
}

#[test]
fn restart_types_against_exits() {
    for (restart, exit, want) in [
        (Restart::Permanent, Exit::Normal, "+a"),
        (Restart::Permanent, Exit::Abnormal, "+a"),
        (Restart::Transient, Exit::Normal, ""),
        (Restart::Transient, Exit::Abnormal, "+a"),
        (Restart::Temporary, Exit::Normal, "xa"),
        (Restart::Temporary, Exit::Abnormal, "xa"),
    ] {
        let mut g = Game::new(Flags::default(), vec![ChildSpec { restart, ..ChildSpec::new("a") }]);
        g.play(Event::Start);
        assert_eq!(g.exit("a", exit), want, "{restart:?} {exit:?}");
        assert_eq!(g.down, None);
    }
}

#[test]
fn intensity_boundary() {
    let mut g = abc(Strategy::OneForOne);
    assert_eq!(g.exit("a", Exit::Abnormal), "+a");
    g.now = 5 * S;
    assert_eq!(g.exit("b", Exit::Abnormal), "-c -a", "second restart within five seconds");
    assert_eq!(g.down, Some(Down::Intensity));

    let mut g = abc(Strategy::OneForOne);
    g.exit("a", Exit::Abnormal);
    g.now = 5 * S + Duration::from_nanos(1);
    assert_eq!(g.exit("b", Exit::Abnormal), "+b");
    assert_eq!(g.down, None);
}

#[test]
fn a_child_that_never_started_ends_the_supervisor() {
    let mut g = Game::new(Flags::default(), ["a", "b", "c"].map(ChildSpec::new).into());
    g.broken.push("c".into());
    assert_eq!(g.play(Event::Start), "+a +b +c -b -a");
    assert_eq!(g.down, Some(Down::StartFailed));
}

#[test]
fn a_restart_that_fails_is_tried_again_until_the_intensity() {
    let mut g = abc(Strategy::RestForOne);
    g.broken.push("b".into());
    assert_eq!(g.exit("b", Exit::Abnormal), "-c +b -a");
    assert_eq!(g.down, Some(Down::Intensity));
}

#[test]
fn significant_children() {
    let child = |id: &str, restart| ChildSpec { significant: true, restart, ..ChildSpec::new(id) };
    let specs = || vec![child("a", Restart::Transient), child("b", Restart::Temporary), ChildSpec::new("c")];
    let flags = |auto_shutdown| Flags { auto_shutdown, ..Flags::default() };

    let mut g = Game::new(flags(AutoShutdown::AnySignificant), specs());
    g.play(Event::Start);
    assert_eq!(g.exit("a", Exit::Abnormal), "+a", "restarted, so not ended");
    assert_eq!(g.exit("a", Exit::Normal), "-c -b");
    assert_eq!(g.down, Some(Down::AutoShutdown));

    let mut g = Game::new(flags(AutoShutdown::AllSignificant), specs());
    g.play(Event::Start);
    assert_eq!(g.exit("b", Exit::Abnormal), "xb");
    assert_eq!(g.exit("a", Exit::Normal), "-c");
    assert_eq!(g.down, Some(Down::AutoShutdown));

    let refused = |f, s| Supervisor::new(f, vec![s]).unwrap_err();
    let a = Refusal::Significant("a".into());
    assert_eq!(refused(flags(AutoShutdown::Never), child("a", Restart::Transient)), a);
    assert_eq!(refused(flags(AutoShutdown::AnySignificant), child("a", Restart::Permanent)), a);
}

#[test]
fn stopping_a_significant_child_on_purpose_does_not_end_the_supervisor() {
    let flags = Flags { auto_shutdown: AutoShutdown::AnySignificant, ..Flags::default() };
    let a = ChildSpec { significant: true, restart: Restart::Transient, ..ChildSpec::new("a") };
    let mut g = Game::new(flags, vec![a]);
    g.play(Event::Start);
    assert_eq!(g.play(Event::Terminate("a".into())), "-a");
    assert_eq!(g.down, None);
}

#[test]
fn children_can_be_added_stopped_started_and_deleted() {
    let mut g = abc(Strategy::OneForAll);
    assert_eq!(g.play(Event::Add(ChildSpec::new("d"))), "+d");
    assert_eq!(g.play(Event::Terminate("b".into())), "-b");
    assert_eq!(g.exit("a", Exit::Abnormal), "-d -c +a +c +d", "what the operator stopped stays stopped");
    assert_eq!(g.play(Event::Restart("b".into())), "+b");
    assert_eq!(g.play(Event::Terminate("b".into())), "-b");
    assert_eq!(g.play(Event::Delete("b".into())), "xb");
    assert_eq!(g.s.children().map(|c| c.0).collect::<Vec<_>>(), ["a", "c", "d"]);
    for call in [
        Event::Add(ChildSpec::new("a")),
        Event::Restart("a".into()),
        Event::Delete("a".into()),
        Event::Terminate("b".into()),
    ] {
        assert_eq!(g.play(call), "");
    }
    let a = "a".to_string();
    assert_eq!(
        g.refused,
        [
            Refusal::Exists(a.clone()),
            Refusal::Running(a.clone()),
            Refusal::Running(a),
            Refusal::Unknown("b".into())
        ]
    );
}

#[test]
fn two_deaths_at_once_are_one_restart() {
    let mut s = Supervisor::new(
        Flags { strategy: Strategy::OneForAll, ..Flags::default() },
        ["a", "b", "c"].map(ChildSpec::new).into(),
    )
    .unwrap();
    let now = Duration::ZERO;
    s.step(now, Event::Start);
    for id in ["a", "b", "c"] {
        s.step(now, Event::Started(id.into()));
    }
    assert!(
        matches!(&s.step(now, Event::Exited("a".into(), Exit::Abnormal))[..], [Action::Stop(c, _)] if c == "c")
    );
    // b dies by itself while c is being stopped.
    assert_eq!(s.step(now, Event::Exited("b".into(), Exit::Abnormal)), []);
    assert_eq!(s.step(now, Event::Exited("c".into(), Exit::Normal)), [Action::Start("a".into())]);
    assert_eq!(s.step(now, Event::Started("a".into())), [Action::Start("b".into())]);
    assert_eq!(s.step(now, Event::Started("b".into())), [Action::Start("c".into())]);
    assert_eq!(s.restarts.len(), 1);
}

#[test]
fn calls_are_refused_while_stopping_and_a_start_under_way_is_stopped_too() {
    let mut s = Supervisor::new(Flags::default(), vec![ChildSpec::new("a")]).unwrap();
    let now = Duration::ZERO;
    assert_eq!(s.step(now, Event::Start), [Action::Start("a".into())]);
    assert_eq!(s.step(now, Event::Shutdown), []);
    assert_eq!(s.step(now, Event::Add(ChildSpec::new("b"))), [Action::Refused(Refusal::Stopping)]);
    assert!(matches!(&s.step(now, Event::Started("a".into()))[..], [Action::Stop(..)]));
    assert_eq!(s.step(now, Event::Exited("a".into(), Exit::Normal)), [Action::Down(Down::Shutdown)]);
}

fn strategies() -> impl Strategy_<Value = Strategy> {
    prop_oneof![Just(Strategy::OneForOne), Just(Strategy::OneForAll), Just(Strategy::RestForOne)]
}
use proptest::strategy::Strategy as Strategy_;

proptest! {
    /// With any exits in any order: whoever is permanent runs afterwards, or the supervisor is down with
    /// nothing running; never more restarts in a period than allowed.
    #[test]
    fn permanent_children_run_or_the_supervisor_is_down(
        strategy in strategies(),
        intensity in 0u32..4,
        exits in prop::collection::vec((0usize..4, any::<bool>(), 0u64..4), 0..30),
    ) {
        let names = ["a", "b", "c", "d"];
        let flags = Flags { strategy, intensity, ..Flags::default() };
        let mut g = Game::new(flags, names.map(ChildSpec::new).into());
        g.play(Event::Start);
        let mut times: Vec<Duration> = vec![];
        for (who, normal, wait) in exits {
            g.now += Duration::from_secs(wait);
            let before = g.down;
            g.exit(names[who], if normal { Exit::Normal } else { Exit::Abnormal });
            if before.is_none() {
                times.push(g.now);
                let recent = times.iter().filter(|t| g.now - **t <= flags.period).count();
                prop_assert_eq!(g.down.is_some(), recent > intensity as usize);
            }
            if g.down.is_none() {
                prop_assert_eq!(g.running.len(), 4);
            } else {
                prop_assert!(g.running.is_empty());
            }
        }
    }

    /// Any calls in any order: no child runs twice, no stop of what does not run (the game asserts both), and
    /// a shutdown always ends.
    #[test]
    fn any_calls(ops in prop::collection::vec((0u8..7, 0usize..4), 0..40), strategy in strategies()) {
        let names = ["a", "b", "c", "d"];
        let mut g = Game::new(Flags { strategy, intensity: 3, ..Flags::default() }, names[..2].iter().map(|n| ChildSpec::new(*n)).collect());
        for (op, who) in ops {
            let id = names[who].to_string();
            let restart = [Restart::Permanent, Restart::Transient, Restart::Temporary][who % 3];
            g.play(match op {
                0 => Event::Start,
                1 => Event::Exited(id, Exit::Abnormal),
                2 => Event::Exited(id, Exit::Normal),
                3 => Event::Add(ChildSpec { restart, ..ChildSpec::new(id) }),
                4 => Event::Terminate(id),
                5 => Event::Restart(id),
                _ => Event::Delete(id),
            });
        }
        g.play(Event::Shutdown);
        prop_assert!(g.down.is_some() && g.s.is_down());
    }
}
