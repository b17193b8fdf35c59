use proptest::prelude::{prop, prop_assert, prop_assert_eq, proptest};

use super::*;

const BIG: Round = Round { bytes: 1 << 20, took: Duration::from_millis(50) };
const SMALL: Round = Round { bytes: 4096, took: Duration::from_millis(1) };

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
        _ => Event::Shutdown,
    }
}
const EVENTS: usize = 21;

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
        Phase::Recording => &[100, 4, 5, 7, 8, 9],
        Phase::Committing => &[100, 4, 5, 7, 8, 9, 10],
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
        Action::Transfer { round } => format!("transfer({round})"),
        Action::Validate => "validate".into(),
        Action::Freeze => "freeze".into(),
        Action::Record => "record".into(),
        Action::LookUpRecord => "look-up".into(),
        Action::Activate => "activate".into(),
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

const BACK: &str = "RollingBack ROLLING_BACK disarm undo";

/// What every phase does with every event, on the way to a commit; "." is nothing at all.
#[test]
fn every_event_in_every_phase() {
    let rows: [(Phase, [&str; EVENTS]); 11] = [
        // Go: prepare, validate, commit | Cancel | Ready Agreed Round(big) Round(small) Valid Frozen
        // Recorded NotRecorded RecordUnknown Activated Undone | Failed OldGone NewGone | Timeout Limits Shutdown
        (
            Phase::Idle,
            [
                "Preparing MORPH_PREPARING arm start",
                "Preparing MORPH_PREPARING arm start",
                "Preparing MORPH_PREPARING arm start",
                "refuse",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                "disarm",
            ],
        ),
        (
            Phase::Preparing,
            [
                "refuse",
                ".",
                ".",
                BACK,
                "Negotiating MORPH_NEGOTIATING arm negotiate",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                BACK,
                BACK,
                "arm",
                "disarm",
            ],
        ),
        (
            Phase::Prepared,
            [
                "refuse",
                "Negotiating MORPH_NEGOTIATING arm negotiate",
                "Negotiating MORPH_NEGOTIATING arm negotiate",
                BACK,
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                ".",
                ".",
                "disarm",
            ],
        ),
        (
            Phase::Negotiating,
            [
                "refuse",
                ".",
                ".",
                BACK,
                ".",
                "Transferring MORPH_TRANSFERRING arm transfer(0)",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                BACK,
                BACK,
                "arm",
                "disarm",
            ],
        ),
        (
            Phase::Transferring,
            [
                "refuse",
                ".",
                ".",
                BACK,
                ".",
                ".",
                "arm transfer(1)",
                "Validating MORPH_VALIDATING arm validate",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                BACK,
                BACK,
                "arm",
                "disarm",
            ],
        ),
        (
            Phase::Validating,
            [
                "refuse",
                ".",
                ".",
                BACK,
                ".",
                ".",
                ".",
                ".",
                "Freezing MORPH_VALIDATING arm freeze",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                BACK,
                BACK,
                "arm",
                "disarm",
            ],
        ),
        (
            Phase::Validated,
            [
                "refuse",
                "Transferring MORPH_TRANSFERRING arm transfer(1)",
                "Transferring MORPH_TRANSFERRING arm transfer(1)",
                BACK,
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                ".",
                ".",
                "disarm",
            ],
        ),
        (
            Phase::Freezing,
            [
                "refuse",
                ".",
                ".",
                BACK,
                ".",
                ".",
                ".",
                ".",
                ".",
                "Recording COMMITTING disarm record",
                ".",
                ".",
                ".",
                ".",
                ".",
                BACK,
                BACK,
                BACK,
                BACK,
                "arm",
                "disarm",
            ],
        ),
        (
            Phase::Recording,
            [
                "refuse",
                "refuse",
                "refuse",
                "refuse",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                "Committing COMMITTING activate",
                BACK,
                "look-up",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                "disarm",
            ],
        ),
        (
            Phase::Committing,
            [
                "refuse",
                "refuse",
                "refuse",
                "refuse",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                "Idle RUNNING(true) disarm committed",
                ".",
                "Idle alert RUNNING(true) disarm committed",
                ".",
                ".",
                ".",
                ".",
                "disarm",
            ],
        ),
        (
            Phase::RollingBack,
            [
                "refuse",
                "refuse",
                "refuse",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                ".",
                "Idle RUNNING(false) disarm rolled-back",
                "Idle alert RUNNING(false) disarm rolled-back",
                ".",
                ".",
                ".",
                ".",
                "disarm",
            ],
        ),
    ];
    assert_eq!(rows.map(|r| r.0), Phase::ALL);
    for (phase, row) in rows {
        for (n, want) in row.into_iter().enumerate() {
            let mut m = at(phase, Goal::Commit);
            let actions = trace(&m.step(event(n)));
            let moved = if m.phase() == phase { String::new() } else { format!("{:?} ", m.phase()) };
            let got = format!("{moved}{actions}");
            let got = if got.is_empty() { "." } else { got.as_str() };
            assert_eq!(got, want, "{phase:?}, {:?}", event(n));
        }
    }
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
    let nothing = Round { bytes: 0, took: Duration::from_secs(1) };
    assert_eq!(
        trace(&at(Phase::Transferring, Goal::Commit).step(Event::Round(nothing))),
        "MORPH_VALIDATING arm validate"
    );
}

#[test]
fn a_daemon_that_is_started_again_goes_on_waiting_goes_forward_or_goes_back() {
    for phase in Phase::ALL {
        let (m, actions) = Morph::resume(Limits::default(), at(phase, Goal::Commit).saved());
        let want = match phase {
            Phase::Idle | Phase::Prepared | Phase::Validated => (phase, ""),
            Phase::Committing => (phase, "activate"),
            Phase::RollingBack => (phase, "undo"),
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
    fn the_record_decides(ops in prop::collection::vec(0usize..EVENTS - 1, 0..80)) {
        let mut m = Morph::new(Limits::default());
        let (mut began, mut settled, mut recorded) = (0, 0, false);
        for n in ops {
            let before = m.phase();
            if before == Phase::Recording && n == 10 {
                recorded = true;
            }
            for action in m.step(event(n)) {
                match action {
                    Action::Start => { began += 1; recorded = false; }
                    Action::Undo => {
                        prop_assert!(!recorded);
                        prop_assert!(before != Phase::Committing);
                        prop_assert!(before != Phase::Recording || n == 11, "given up while it may be decided");
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
