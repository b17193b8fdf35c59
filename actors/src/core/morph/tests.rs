use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};

use super::*;

mod cells;

const BIG: Round = Round { bytes: 1 << 20, took: Duration::from_millis(50), throttled: 0 };
const SMALL: Round = Round { bytes: 4096, took: Duration::from_millis(1), throttled: 0 };

fn event(n: usize) -> Event {
    let t = || "why".to_owned();
    match n {
        0 => Event::Go(Goal::Prepare),
        1 => Event::Go(Goal::Validate),
        2 => Event::Go(Goal::Commit),
        3 => Event::Cancel(t()),
        4 => Event::Ready,
        5 => Event::Agreed,
        6 => Event::Round(BIG),
        7 => Event::Round(SMALL),
        8 => Event::Valid,
        9 => Event::Frozen,
        10 => Event::Recorded,
        11 => Event::NotRecorded(t()),
        12 => Event::RecordUnknown,
        13 => Event::Activated,
        14 => Event::Undone,
        15 => Event::Failed(t()),
        16 => Event::OldGone(t()),
        17 => Event::NewGone(t()),
        18 => Event::Timeout,
        19 => Event::Limits(Limits::default()),
        20 => Event::Shutdown,
        21 => Event::NotActivated(t()),
        22 => Event::Returned,
        23 => Event::Grows,
        24 => Event::Grown(None),
        25 => Event::Grown(Some(t())),
        26 => Event::Taken,
        27 => Event::TakenAlready,
        _ => Event::Withdrawn,
    }
}
const EVENTS: usize = 29;

/// How each phase is reached, going as far as `goal`.
fn at(phase: Phase, goal: Goal) -> Morph {
    let mut m = Morph::new(Limits::default());
    let begin = match phase {
        Phase::Prepared => Goal::Prepare,
        Phase::Validated => Goal::Validate,
        _ => goal,
    };
    let path: &[usize] = match phase {
        Phase::Idle => &[],
        Phase::Preparing => &[100],
        Phase::Prepared | Phase::Negotiating => &[100, 4],
        Phase::Transferring => &[100, 4, 5],
        Phase::Validating => &[100, 4, 5, 7],
        Phase::Validated | Phase::Freezing => &[100, 4, 5, 7, 8],
        Phase::Withdrawing => &[100, 4, 5, 7, 8, 18],
        Phase::Taken => &[100, 4, 5, 7, 8, 26],
        Phase::Recording => &[100, 4, 5, 7, 8, 9],
        Phase::Committing => &[100, 4, 5, 7, 8, 9, 10],
        Phase::Growing => &[100, 4, 5, 7, 8, 9, 10, 23],
        Phase::Returning => &[100, 4, 5, 7, 8, 9, 10, 21],
        Phase::RollingBack => &[100, 3],
    };
    for &n in path {
        m.step(if n == 100 { Event::Go(begin) } else { event(n) });
    }
    assert_eq!(m.phase(), phase);
    m
}

fn trace(actions: &[Action]) -> String {
    let words = actions.iter().map(|a| match a {
        Action::Journal { phase, committed: None, .. } => (*phase).to_owned(),
        Action::Journal { phase, committed: Some(c), .. } => format!("{phase}({c})"),
        Action::Start => "start".into(),
        Action::Negotiate => "negotiate".into(),
        Action::Transfer { round, throttle: 0 } => format!("transfer({round})"),
        Action::Transfer { round, throttle } => format!("transfer({round}, {throttle} %)"),
        Action::Validate { lift: false } => "validate".into(),
        Action::Validate { lift: true } => "lift and validate".into(),
        Action::Freeze => "freeze".into(),
        Action::Withdraw => "withdraw".into(),
        Action::WriteDown => "write-down".into(),
        Action::Record => "record".into(),
        Action::LookUpRecord => "look-up".into(),
        Action::Activate => "activate".into(),
        Action::GiveBack => "give-back".into(),
        Action::Grow => "grow".into(),
        Action::Undo => "undo".into(),
        Action::Arm(_) => "arm".into(),
        Action::Disarm => "disarm".into(),
        Action::Settled(Outcome::Reached(goal)) => format!("reached({goal:?})"),
        Action::Settled(Outcome::Committed) => "committed".into(),
        Action::Settled(Outcome::RolledBack(_)) => "rolled-back".into(),
        Action::Alert(_) => "alert".into(),
        Action::Refuse(_) => "refuse".into(),
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn an_operator_goes_step_by_step() {
    let mut m = Morph::new(Limits::default());
    m.step(Event::Go(Goal::Prepare));
    assert_eq!(trace(&m.step(Event::Ready)), "MORPH_PREPARING disarm reached(Prepare)");
    assert_eq!(m.phase(), Phase::Prepared);
    m.step(Event::Go(Goal::Validate));
    m.step(Event::Agreed);
    m.step(Event::Round(SMALL));
    assert_eq!(trace(&m.step(Event::Valid)), "MORPH_VALIDATING disarm reached(Validate)");
    assert_eq!(m.phase(), Phase::Validated);
    // The state went on since: it is copied and looked at again before anything is frozen.
    assert_eq!(trace(&m.step(Event::Go(Goal::Commit))), "MORPH_TRANSFERRING arm transfer(1)");
    m.step(Event::Round(SMALL));
    assert_eq!(trace(&m.step(Event::Valid)), "MORPH_VALIDATING arm freeze");
}

#[test]
fn a_wish_to_go_further_is_remembered() {
    let mut m = at(Phase::Preparing, Goal::Prepare);
    assert_eq!(m.step(Event::Go(Goal::Commit)), []);
    assert_eq!(m.step(Event::Go(Goal::Validate)), []);
    assert_eq!(trace(&m.step(Event::Ready)), "MORPH_NEGOTIATING arm negotiate");
    assert_eq!(m.saved().goal, Goal::Commit);
}

#[test]
fn rounds_end_when_little_is_left_or_by_what_the_operator_wants() {
    let limits = Limits { rounds: 3, ..Limits::default() };
    for (dirty, want) in
        [(Dirty::GiveUp, "ROLLING_BACK disarm undo"), (Dirty::Accept, "MORPH_VALIDATING arm validate")]
    {
        let mut m = at(Phase::Transferring, Goal::Commit);
        m.step(Event::Limits(Limits { dirty, ..limits }));
        assert_eq!(trace(&m.step(Event::Round(BIG))), "arm transfer(1)");
        assert_eq!(trace(&m.step(Event::Round(BIG))), "arm transfer(2)");
        assert_eq!(trace(&m.step(Event::Round(BIG))), want);
    }
    let nothing = Round { bytes: 0, took: Duration::from_secs(1), throttled: 0 };
    assert_eq!(
        trace(&at(Phase::Transferring, Goal::Commit).step(Event::Round(nothing))),
        "MORPH_VALIDATING arm validate"
    );
}

fn throttling(rounds: u32, goal: Goal) -> Morph {
    let mut m = at(Phase::Transferring, goal);
    m.step(Event::Limits(Limits { dirty: Dirty::Throttle, rounds, ..Limits::default() }));
    m
}

#[test]
fn a_workload_that_is_too_fast_is_held_back_in_steps_and_the_last_one_has_a_round_too() {
    let cases: [(u32, &[&str]); 3] = [
        (16, &["1)", "2, 30 %)", "3, 60 %)", "4, 80 %)", "5, 90 %)", "6, 96 %)", "7, 99 %)", "8, 99 %)"]),
        (4, &["1)", "2, 96 %)", "3, 99 %)"]),
        (1, &[]),
    ];
    for (rounds, want) in cases {
        let mut m = throttling(rounds, Goal::Commit);
        for (n, want) in want.iter().enumerate() {
            let got = trace(&m.step(Event::Round(BIG)));
            assert_eq!(got, format!("arm transfer({want}"), "round {n} of {rounds}");
        }
    }
    // One that does not help, and one that cannot be held back.
    for (throttled, want) in [(99, "although it was throttled"), (0, "it cannot be throttled")] {
        let mut m = throttling(3, Goal::Commit);
        for _ in 0..2 {
            m.step(Event::Round(BIG));
        }
        let end = m.step(Event::Round(Round { throttled, ..BIG }));
        assert_eq!(trace(&end), "ROLLING_BACK disarm undo");
        let Action::Journal { detail, .. } = &end[0] else { panic!("{end:?}") };
        assert!(detail.ends_with(want), "{detail}");
    }
}

#[test]
fn a_workload_whose_rounds_become_small_by_themselves_is_not_held_back() {
    let mut m = throttling(16, Goal::Commit);
    let mut round = Round { bytes: 1 << 30, ..BIG };
    for n in 1..9 {
        assert_eq!(trace(&m.step(Event::Round(round))), format!("arm transfer({n})"));
        round.bytes /= 2;
    }
    assert_eq!(trace(&m.step(Event::Round(SMALL))), "MORPH_VALIDATING arm validate");
}

#[test]
fn nobody_is_held_back_while_an_operator_thinks() {
    let mut m = throttling(16, Goal::Validate);
    for _ in 0..3 {
        m.step(Event::Round(BIG));
    }
    assert_eq!(trace(&m.step(Event::Round(SMALL))), "MORPH_VALIDATING arm lift and validate");
    assert_eq!(trace(&m.step(Event::Valid)), "MORPH_VALIDATING disarm reached(Validate)");
    // What was needed is needed again.
    assert_eq!(trace(&m.step(Event::Go(Goal::Commit))), "MORPH_TRANSFERRING arm transfer(4, 60 %)");
    assert_eq!(trace(&m.step(Event::Round(SMALL))), "MORPH_VALIDATING arm validate");
    assert_eq!(trace(&m.step(Event::Valid)), "MORPH_VALIDATING arm freeze");
    // He makes up his mind when it was let go already.
    let mut m = throttling(16, Goal::Validate);
    for round in [BIG, BIG, SMALL] {
        m.step(Event::Round(round));
    }
    m.step(Event::Go(Goal::Commit));
    assert_eq!(trace(&m.step(Event::Valid)), "MORPH_TRANSFERRING arm transfer(3, 30 %)");
}

#[test]
fn a_daemon_that_is_started_again_goes_on_waiting_goes_forward_or_goes_back() {
    for phase in Phase::ALL {
        let (m, actions) = Morph::resume(Limits::default(), at(phase, Goal::Commit).saved());
        let want = match phase {
            Phase::Idle | Phase::Prepared => (phase, ""),
            Phase::Validated => (Phase::Prepared, "MORPH_PREPARING"),
            Phase::Committing | Phase::Returning => (Phase::Committing, "activate"),
            Phase::Growing => (phase, "grow"),
            Phase::RollingBack => (phase, "undo"),
            Phase::Taken => (phase, "write-down"),
            Phase::Freezing | Phase::Withdrawing => (Phase::Withdrawing, "ROLLING_BACK disarm withdraw"),
            _ => (Phase::RollingBack, "ROLLING_BACK disarm undo"),
        };
        assert_eq!((m.phase(), trace(&actions).as_str()), want, "{phase:?}");
    }
}

#[test]
fn after_its_end_it_decides_nothing() {
    for phase in Phase::ALL {
        let mut m = at(phase, Goal::Commit);
        m.step(Event::Shutdown);
        for n in 0..EVENTS {
            assert_eq!(m.step(event(n)), [], "{phase:?} {n}");
        }
    }
}

proptest! {
    /// Nothing is thawed or thrown away after the record may be written; nothing takes over before it is;
    /// every morph that began is settled once.
    #[test]
    fn the_record_decides(ops in prop::collection::vec(0usize..EVENTS, 0..80)) {
        let mut m = Morph::new(Limits::default());
        let (mut began, mut settled, mut recorded) = (0, 0, false);
        for n in ops {
            let before = m.phase();
            if matches!(before, Phase::Recording | Phase::Taken) && n == 10 {
                recorded = true;
            }
            for action in m.step(event(n)) {
                match action {
                    Action::Start => { began += 1; recorded = false; }
                    Action::Undo => {
                        prop_assert!(!recorded);
                        prop_assert!(before != Phase::Committing);
                        prop_assert!(before != Phase::Recording || n == 11, "given up while it may be decided");
                        let may_be_taken = matches!(before, Phase::Freezing | Phase::Withdrawing | Phase::Taken);
                        prop_assert!(!may_be_taken || n == 28, "given up while it may be taken over");
                    }
                    Action::Activate => prop_assert!(recorded),
                    Action::Settled(Outcome::Committed) => { prop_assert!(recorded); settled += 1; }
                    Action::Settled(Outcome::RolledBack(_)) => { prop_assert!(!recorded); settled += 1; }
                    _ => {}
                }
            }
            prop_assert_eq!(began - settled, i32::from(m.phase() != Phase::Idle));
        }
    }
}
