use proptest::prelude::*;

use super::*;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Feed events at times and collect what was done.
fn play(state: &mut State, events: &[(u64, Event)]) -> Vec<(u64, Action)> {
    let mut done = vec![];
    for (at, event) in events {
        let (next, action) = step(*state, *event, ms(*at));
        *state = next;
        done.extend(action.map(|a| (*at, a)));
    }
    done
}

#[test]
fn the_first_start_is_no_restart_and_waits_double_up_to_five_seconds() {
    let mut s = State::new(ms(0));
    assert_eq!(play(&mut s, &[(0, Event::Tick)]), [(0, Action::Start)]);
    assert_eq!(s.restarts(), 0);
    let mut now = 0;
    for (n, wait) in [100, 200, 400, 800, 1600, 3200, 5000, 5000].into_iter().enumerate() {
        assert_eq!(play(&mut s, &[(now, Event::Ended), (now + wait - 1, Event::Tick)]), []);
        assert_eq!(s.due(), Some(ms(now + wait)));
        now += wait;
        assert_eq!(play(&mut s, &[(now, Event::Tick)]), [(now, Action::Start)]);
        assert_eq!(s.restarts() as usize, n + 1);
    }
    // Having lived 30 s it is well again.
    play(&mut s, &[(now + 30_000, Event::Ended)]);
    assert_eq!(s.due(), Some(ms(now + 30_100)));
}

#[test]
fn by_default_a_silent_agent_is_left_alone() {
    let mut s = State::new(ms(0));
    play(&mut s, &[(0, Event::Tick)]);
    assert_eq!(s.due(), None);
    assert_eq!(play(&mut s, &[(10_000_000, Event::Tick)]), []);
}

#[test]
fn a_stuck_agent_is_killed_and_started_again_when_told_so() {
    let mut s = State::new(ms(0));
    play(&mut s, &[(0, Event::Tick), (50, Event::Told(1000)), (900, Event::Petted)]);
    assert_eq!(s.due(), Some(ms(1900)));
    assert_eq!(play(&mut s, &[(1899, Event::Tick), (1900, Event::Tick)]), [(1900, Action::Kill)]);
    // It is not killed twice while its end is awaited.
    assert_eq!(play(&mut s, &[(5000, Event::Tick), (5001, Event::Petted)]), []);
    let again = play(&mut s, &[(5001, Event::Ended), (5101, Event::Tick)]);
    assert_eq!((again, s.restarts()), (vec![(5101, Action::Start)], 1));
    // The new one has its grace until its first sign of life, and knows nothing of the old one's.
    assert_eq!(play(&mut s, &[(10_100, Event::Tick), (10_101, Event::Tick)]), [(10_101, Action::Kill)]);
}

#[test]
fn a_guardian_that_stood_still_itself_measures_anew() {
    let mut s = State::new(ms(0));
    play(&mut s, &[(0, Event::Tick), (50, Event::Told(1000))]);
    assert_eq!(play(&mut s, &[(1301, Event::Tick)]), []);
    assert_eq!(s.due(), Some(ms(2301)));
    assert_eq!(play(&mut s, &[(2551, Event::Tick)]), [(2551, Action::Kill)]);
    // One that has never been heard of, too.
    let mut s = State { told: 1000, ..State::new(ms(0)) };
    play(&mut s, &[(0, Event::Tick), (5251, Event::Tick)]);
    assert_eq!(s.due(), Some(ms(6251)));
}

#[test]
fn told_to_restart_nothing_it_does_not() {
    let mut s = State::new(ms(0));
    play(&mut s, &[(0, Event::Tick), (1, Event::Told(GUARDIAN_OFF))]);
    assert_eq!(s.due(), None);
    assert_eq!(play(&mut s, &[(2, Event::Ended), (1_000_000, Event::Tick)]), []);
    assert_eq!(s.due(), None);
}

#[test]
fn what_is_told_lasts_and_can_be_taken_back() {
    let mut s = State::new(ms(0));
    play(&mut s, &[(0, Event::Tick), (1, Event::Told(10))]);
    assert_eq!(s.due(), Some(ms(201)), "the shortest watchdog");
    play(&mut s, &[(2, Event::Told(0))]);
    assert_eq!(s.due(), None);
    play(&mut s, &[(3, Event::Told(500)), (4, Event::Ended), (104, Event::Tick)]);
    assert_eq!((s.told(), s.due()), (500, Some(ms(104 + 5000))));
}

#[test]
fn a_held_agent_waits_for_its_release() {
    let mut s = State::new(ms(0));
    assert_eq!(play(&mut s, &[(0, Event::Hold), (9, Event::Tick)]), []);
    assert_eq!(s.due(), None);
    s.release();
    assert_eq!(s.due(), Some(ms(0)));
    assert_eq!(play(&mut s, &[(10, Event::Tick)]), [(10, Action::Start)]);
    assert_eq!(s.restarts(), 0);
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Tick),
        Just(Event::Petted),
        prop_oneof![Just(0), Just(GUARDIAN_OFF), any::<u32>(), 1u32..3000].prop_map(Event::Told),
        Just(Event::Ended),
    ]
}

proptest! {
    /// There is at most one agent: a start follows an end, a kill follows a start.
    #[test]
    fn never_two_agents(events in proptest::collection::vec((event(), 0u64..8000), 0..200)) {
        let (mut s, mut now, mut runs, mut killed) = (State::new(ms(0)), 0, false, false);
        for (event, after) in events {
            // An agent that does not run says nothing and cannot end.
            if !runs && matches!(event, Event::Ended | Event::Petted | Event::Told(_)) {
                continue;
            }
            now += after;
            if event == Event::Ended {
                (runs, killed) = (false, false);
            }
            let (next, action) = step(s, event, ms(now));
            match action {
                Some(Action::Start) => {
                    prop_assert!(!runs);
                    runs = true;
                }
                Some(Action::Kill) => {
                    prop_assert!(runs && !killed && watchdog(next.told()).is_some());
                    killed = true;
                }
                None => {}
            }
            s = next;
        }
    }
}
