use std::collections::VecDeque;

use proptest::prelude::{prop, prop_assert, proptest};

use super::*;

const MS: Duration = Duration::from_millis(1);

fn spec(strategy: Strategy, intensity: u32) -> GroupSpec {
    GroupSpec {
        name: "shop".into(),
        strategy,
        intensity,
        period: Duration::from_secs(60),
        members: ["a", "b", "c"].map(String::from).to_vec(),
    }
}

/// A group with obedient members: they do what they are told, and say so.
struct Game {
    group: Group,
    now: Duration,
    /// Members by standing.
    members: BTreeMap<String, Standing>,
    log: Vec<String>,
    /// Members whose next start fails.
    broken: Vec<String>,
}

impl Game {
    fn new(strategy: Strategy, intensity: u32) -> Game {
        Game::with(strategy, intensity, [Standing::Up; 3])
    }

    fn with(strategy: Strategy, intensity: u32, standings: [Standing; 3]) -> Game {
        let mut game = Game {
            group: Group::new(spec(strategy, intensity)),
            now: MS,
            members: BTreeMap::new(),
            log: vec![],
            broken: vec![],
        };
        for (member, standing) in ["a", "b", "c"].into_iter().zip(standings) {
            assert_eq!(game.group.state(), State::Gathering);
            game.say(member, standing);
        }
        game
    }

    fn say(&mut self, member: &str, standing: Standing) {
        self.members.insert(member.into(), standing);
        let actions = self.group.step(self.now, member, standing);
        for action in actions {
            match action {
                Action::Stop { member, .. } => self.stop(&member),
                Action::Start(member) => self.start(&member),
                Action::GiveUp { member, .. } => self.give_up(&member),
                Action::Settled => self.log.push("settled".into()),
                Action::Alert(_) => self.log.push("alert".into()),
            }
        }
    }

    fn stop(&mut self, member: &str) {
        self.log.push(format!("-{member}"));
        match self.members[member] {
            Standing::Up | Standing::Starting => {
                self.say(member, Standing::Down);
                self.say(member, Standing::Held);
            }
            now => self.say(member, now),
        }
    }

    fn start(&mut self, member: &str) {
        self.log.push(format!("+{member}"));
        match self.members[member] {
            // Its fence is not done yet: it starts by itself when it is.
            Standing::Down => self.say(member, Standing::Down),
            Standing::Held => self.boot(member),
            now => self.say(member, now),
        }
    }

    fn boot(&mut self, member: &str) {
        self.say(member, Standing::Starting);
        if let Some(at) = self.broken.iter().position(|m| m == member) {
            self.broken.remove(at);
            self.say(member, Standing::Held);
        } else {
            self.say(member, Standing::Up);
        }
    }

    fn give_up(&mut self, member: &str) {
        self.log.push(format!("x{member}"));
        if matches!(self.members[member], Standing::Held | Standing::Down) {
            self.say(member, Standing::GivenUp);
        }
    }

    /// A member fails and is fenced and taken back.
    fn fail(&mut self, member: &str) -> String {
        self.log.clear();
        self.say(member, Standing::Down);
        match self.members[member] {
            Standing::Down if self.log.contains(&format!("+{member}")) => self.boot(member),
            Standing::Down => self.say(member, Standing::Held),
            _ => {}
        }
        std::mem::take(&mut self.log).join(" ")
    }
}

#[test]
fn strategies_take_along_whom_they_should() {
    assert_eq!(Game::new(Strategy::OneForOne, 5).fail("b"), "+b settled");
    assert_eq!(Game::new(Strategy::OneForAll, 5).fail("b"), "-c -a +a +b +c settled");
    assert_eq!(Game::new(Strategy::RestForOne, 5).fail("b"), "-c +b +c settled");
    assert_eq!(Game::new(Strategy::RestForOne, 5).fail("c"), "+c settled");
    let mut game = Game::new(Strategy::OneForAll, 5);
    game.fail("a");
    assert_eq!(
        (game.group.state(), game.group.culprit(), game.group.restarts(game.now)),
        (State::Up, None, 1)
    );
}

#[test]
fn past_the_intensity_the_whole_group_is_given_up() {
    for strategy in [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne] {
        let mut game = Game::new(strategy, 1);
        game.fail("b");
        let log = game.fail("b");
        assert!(log.starts_with("-c -a") && log.contains("alert"), "{strategy:?}: {log}");
        assert!(game.members.values().all(|s| *s == Standing::GivenUp), "{strategy:?}: {:?}", game.members);
        assert_eq!(game.group.state(), State::Degraded);
        assert!(game.group.reason().unwrap().contains("more than 1 times within 60 s"));
        // An operator brings one back, then the others: the group lives again.
        for member in ["a", "b", "c"] {
            game.say(member, Standing::Starting);
            game.say(member, Standing::Up);
        }
        assert_eq!(game.group.state(), State::Up, "{strategy:?}");
        assert!(game.fail("c").contains("+c"), "and is supervised again");
    }
    // Failures far apart are not counted together.
    let mut game = Game::new(Strategy::OneForOne, 1);
    for n in 1..6 {
        game.now = Duration::from_secs(61 * n);
        assert_eq!(game.fail("b"), "+b settled");
    }
}

#[test]
fn a_start_that_fails_is_tried_again_and_counts() {
    let mut game = Game::new(Strategy::RestForOne, 3);
    game.broken = vec!["b".into(), "b".into()];
    assert_eq!(game.fail("b"), "-c +b +b +b +c settled");
    let mut game = Game::new(Strategy::RestForOne, 2);
    game.broken = vec!["b".into(); 3];
    let log = game.fail("b");
    assert!(log.contains("-a") && log.ends_with("alert settled"), "{log}");
    assert_eq!(game.group.state(), State::Degraded);
}

#[test]
fn a_member_that_gives_up_takes_those_along_that_need_it() {
    for (strategy, want) in [
        (Strategy::OneForOne, "alert"),
        (Strategy::OneForAll, "-c xc -a xa alert"),
        (Strategy::RestForOne, "-c xc alert"),
    ] {
        let mut game = Game::new(strategy, 5);
        game.log.clear();
        game.say("b", Standing::GivenUp);
        game.log.retain(|l| l != "settled");
        assert_eq!(game.log.join(" "), want, "{strategy:?}");
        assert_eq!(game.group.state(), State::Degraded);
    }
}

#[test]
fn what_an_operator_stopped_is_left_alone() {
    let mut game = Game::new(Strategy::OneForAll, 5);
    game.say("c", Standing::Left);
    assert_eq!(game.fail("a"), "-b +a +b settled");
    // Stopped while the group was about to start it.
    let mut game = Game::new(Strategy::OneForAll, 5);
    game.group.step(MS, "a", Standing::Down);
    game.group.step(MS, "c", Standing::Left);
    assert!(!game.group.busy() || game.group.under_way("c").is_none());
    game.members.insert("a".into(), Standing::Held);
    game.log.clear();
    game.say("b", Standing::Down);
    game.say("b", Standing::Held);
    assert!(!game.log.contains(&"+c".into()) && game.log.contains(&"+b".into()), "{:?}", game.log);
    // Brought back by hand, it belongs again.
    game.say("c", Standing::Up);
    assert!(game.fail("a").contains("-c"));
}

#[test]
fn two_deaths_at_once_are_one_restart() {
    let mut group = Group::new(spec(Strategy::OneForAll, 1));
    for m in ["a", "b", "c"] {
        group.step(MS, m, Standing::Up);
    }
    let first = group.step(MS, "a", Standing::Down);
    assert!(matches!(&first[..], [Action::Stop { member, .. }] if member == "c"), "{first:?}");
    assert_eq!(group.step(MS, "b", Standing::Down), []);
    assert_eq!((group.restarts(MS), group.culprit()), (1, Some("a")));
}

#[test]
fn a_restarted_daemon_finishes_what_a_group_was_doing() {
    use Standing::{Held, Left, Up};
    // b had failed and was taken back; its dependents run on.
    let mut game = Game::with(Strategy::RestForOne, 1, [Up, Held, Up]);
    assert_eq!(game.log.join(" "), "-c +b +c settled");
    assert_eq!(game.group.restarts(game.now), 0, "it was counted by the daemon before");
    game.log.clear();
    let game = Game::with(Strategy::OneForAll, 1, [Held, Left, Held]);
    assert_eq!(game.log.join(" "), "+a +c settled");
    let game = Game::with(Strategy::OneForOne, 1, [Held, Up, Held]);
    assert_eq!(game.log.join(" "), "+a +c settled");
}

proptest! {
    /// Whatever fails, stops and comes back: the group never waits for something that will not happen, and
    /// no member that it has stopped is forgotten.
    #[test]
    fn no_member_is_forgotten(
        ops in prop::collection::vec((0usize..3, 0u8..5, 0u64..40), 0..60),
        strategy in 0usize..3,
        intensity in 0u32..4,
    ) {
        let strategy = [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne][strategy];
        let mut game = Game::new(strategy, intensity);
        for (member, op, wait) in ops {
            game.now += Duration::from_secs(wait);
            let member = ["a", "b", "c"][member];
            let standing = game.members[member];
            match op {
                0 | 1 if standing == Standing::Up => drop(game.fail(member)),
                2 if standing != Standing::Left => game.say(member, Standing::Left),
                3 if matches!(standing, Standing::Left | Standing::GivenUp) => game.say(member, Standing::Up),
                4 if standing == Standing::Up => {
                    game.broken = vec![member.into()];
                    game.fail(member);
                }
                _ => {}
            }
            prop_assert!(!game.group.busy(), "{:?} waits: {:?}", game.group, game.log);
            for (m, s) in &game.members {
                prop_assert!(
                    matches!(s, Standing::Up | Standing::Left | Standing::GivenUp),
                    "{m} is left {s:?}: {:?}", game.log
                );
            }
        }
    }
}

/// A member that does what it is told when it gets to it, and the group that hears of it when it gets to that.
#[derive(Debug)]
struct Race {
    group: Group,
    now: Duration,
    orders: [VecDeque<Action>; 3],
    /// What members said and the group has not heard.
    said: VecDeque<(usize, Standing)>,
    standing: [Standing; 3],
    /// Started as soon as it is back.
    go: [bool; 3],
    /// Stopped as soon as it is started.
    halt: [bool; 3],
}

const NAMES: [&str; 3] = ["a", "b", "c"];

impl Race {
    fn say(&mut self, at: usize, standing: Standing) {
        self.standing[at] = standing;
        self.said.push_back((at, standing));
    }

    fn hear(&mut self) {
        let Some((at, standing)) = self.said.pop_front() else { return };
        for action in self.group.step(self.now, NAMES[at], standing) {
            let (Action::Stop { member, .. } | Action::Start(member) | Action::GiveUp { member, .. }) =
                &action
            else {
                continue;
            };
            let to = NAMES.iter().position(|n| n == member).unwrap();
            self.orders[to].push_back(action);
        }
    }

    /// As the machine of a recovery answers its group.
    fn obey(&mut self, at: usize) {
        let Some(order) = self.orders[at].pop_front() else { return };
        let standing = match (order, self.standing[at]) {
            (Action::Stop { .. }, Standing::Up) => {
                self.go[at] = false;
                Standing::Down
            }
            (Action::Start(_), Standing::Held) => Standing::Starting,
            (Action::GiveUp { .. }, Standing::Held | Standing::Down) => Standing::GivenUp,
            (order, standing) => {
                match (order, standing) {
                    (Action::Stop { .. }, Standing::Starting) => self.halt[at] = true,
                    (Action::Stop { .. }, Standing::Down) => self.go[at] = false,
                    (Action::Start(_), Standing::Down) => self.go[at] = true,
                    _ => {}
                }
                standing
            }
        };
        // The group waits for an answer, also when there was nothing to do.
        self.say(at, standing);
    }

    /// What a member does by itself comes to its end.
    fn end(&mut self, at: usize, well: bool) {
        match self.standing[at] {
            Standing::Down if !well => self.say(at, Standing::GivenUp),
            Standing::Down if std::mem::take(&mut self.go[at]) => self.say(at, Standing::Starting),
            Standing::Down => self.say(at, Standing::Held),
            Standing::Starting if !well => {
                self.halt[at] = false;
                self.say(at, Standing::Held);
            }
            Standing::Starting if std::mem::take(&mut self.halt[at]) => self.say(at, Standing::Down),
            Standing::Starting => self.say(at, Standing::Up),
            _ => {}
        }
    }
}

proptest! {
    /// The same when orders and answers cross each other: members fail, come back and are given up while
    /// orders are on their way to them.
    #[test]
    fn no_member_is_forgotten_when_orders_cross(
        ops in prop::collection::vec((0usize..3, 0u8..8, 0u64..10), 0..120),
        strategy in 0usize..3,
        intensity in 0u32..6,
    ) {
        let strategy = [Strategy::OneForOne, Strategy::OneForAll, Strategy::RestForOne][strategy];
        let mut race = Race {
            group: Group::new(spec(strategy, intensity)),
            now: MS,
            orders: Default::default(),
            said: VecDeque::new(),
            standing: [Standing::Up; 3],
            go: [false; 3],
            halt: [false; 3],
        };
        (0..3).for_each(|at| race.say(at, Standing::Up));
        for (at, op, wait) in ops {
            race.now += Duration::from_secs(wait);
            match op {
                0 if race.standing[at] == Standing::Up => {
                    race.go[at] = false;
                    race.say(at, Standing::Down);
                }
                1 if matches!(race.standing[at], Standing::GivenUp | Standing::Left) => race.say(at, Standing::Up),
                2 => race.say(at, Standing::Left),
                3 => race.end(at, false),
                4 => race.end(at, true),
                5 | 6 => race.obey(at),
                _ => race.hear(),
            }
        }
        // No more faults: everything that is on its way arrives.
        for _ in 0..200 {
            race.hear();
            (0..3).for_each(|at| race.obey(at));
            (0..3).for_each(|at| race.end(at, true));
        }
        prop_assert!(race.said.is_empty() && race.orders.iter().all(VecDeque::is_empty), "no rest: {race:?}");
        for standing in race.standing {
            prop_assert!(matches!(standing, Standing::Up | Standing::Left | Standing::GivenUp), "{race:?}");
        }
        prop_assert!(!race.group.busy(), "{race:?}");
    }
}

#[test]
fn a_member_that_counted_as_stopped_and_fails_on_its_way_back_is_started() {
    for standing in [Standing::Left, Standing::GivenUp] {
        // Its failure is acted on now, or an operator has it started again.
        let mut game = Game::new(Strategy::OneForOne, 5);
        game.say("b", standing);
        assert_eq!(game.fail("b"), "+b settled", "{standing:?}");
        assert_eq!(game.group.state(), State::Up);
        // The start itself fails at first.
        game.say("b", standing);
        game.log.clear();
        game.say("b", Standing::Starting);
        game.say("b", Standing::Held);
        assert_eq!(
            (game.log.join(" ").as_str(), game.members["b"]),
            ("+b settled", Standing::Up),
            "{standing:?}"
        );
    }
    // As with any failure.
    let mut game = Game::new(Strategy::OneForAll, 5);
    game.say("b", Standing::Left);
    assert_eq!(game.fail("b"), "-c -a +a +b +c settled");
}

#[test]
fn an_operator_brings_a_member_of_a_group_that_was_given_up_back_from_where_it_still_holds_something() {
    let mut game = Game::new(Strategy::OneForOne, 0);
    game.fail("b");
    for member in ["a", "c"] {
        game.say(member, Standing::GivenUp);
    }
    assert_eq!((game.group.state(), game.members["b"]), (State::Degraded, Standing::GivenUp));
    game.log.clear();
    game.say("b", Standing::Down);
    game.say("b", Standing::Held);
    assert_eq!(game.members["b"], Standing::Up, "{:?}", game.log);
    assert!(game.log.contains(&"+b".to_owned()), "{:?}", game.log);
}
