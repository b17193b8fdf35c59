use proptest::prelude::*;

use super::*;
use crate::core::policy::hang_bound;

const MS: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_secs(1000);

fn event(n: usize) -> Event {
    match n {
        0 => Event::Booted,
        1 => Event::Adopted,
        2 => Event::KernelReady,
        3 => Event::PulseMoved,
        4 => Event::PulseSilent(1000 * MS),
        5 => Event::CpuStuck(2, 1000 * MS),
        6 => Event::HeartbeatOk(MS),
        7 => Event::HeartbeatMissed(1000 * MS),
        8 => Event::PanicNotice("bad".into()),
        9 => Event::Parked("reboot".into()),
        10 => Event::KernelLeft,
        11 => Event::ChannelUp,
        12 => Event::ChannelDown("reset".into()),
        13 => Event::OwnPause(700 * MS),
        14 => Event::GraceExpired,
        15 => Event::ProbeTimer,
        16 => Event::Reset,
        17 => Event::PolicyChanged(Box::new(Policy::development())),
        18 => Event::Maintenance(true),
        _ => Event::Maintenance(false),
    }
}
const EVENTS: usize = 20;

fn machine(events: &[Event]) -> Health {
    let mut h = Health::new(Policy::default(), 1);
    for e in events {
        h.step(Duration::ZERO, e.clone());
    }
    h
}

fn in_state(letter: char) -> Health {
    let healthy = [event(0), event(3), event(6)];
    let with = |more: &[usize]| {
        machine(&[&healthy[..], &more.iter().map(|n| event(*n)).collect::<Vec<_>>()].concat())
    };
    match letter {
        'D' => machine(&[]),
        'S' => machine(&[event(0)]),
        'H' => with(&[]),
        'P' => with(&[4]),
        'A' => with(&[7]),
        'B' => with(&[4, 7]),
        'W' => with(&[7, 15, 15, 15]),
        _ => with(&[8]),
    }
}

fn letter(state: &State) -> char {
    match state {
        State::Down => 'D',
        State::Starting => 'S',
        State::Healthy => 'H',
        State::Suspect { missing: Missing::Pulse, .. } => 'P',
        State::Suspect { missing: Missing::Agent, .. } => 'A',
        State::Suspect { missing: Missing::Both, .. } => 'B',
        State::AgentSilent => 'W',
        State::Dead(_) => 'X',
    }
}

#[test]
fn every_cell_of_the_table() {
    for (state, row) in [
        // Booted Adopted Ready | Moved Silent Stuck | Ok Missed | Panic Parked Left | Up Down | Pause Grace Probe Reset | Policy Maintenance on off
        ('D', "SSD DDD DD DDD DD DDDD DDD"),
        ('S', "SSS SSS SS XXB SS SXSD SSS"),
        ('H', "SSH HPH HA XXP HH HHHD HHH"),
        ('P', "SSP HPP PB XXP PP PPPD PPP"),
        ('A', "SSA ABA HA XXB AA AAAD AAA"),
        ('B', "SSB ABB PB XXB BB BBBD BBB"),
        ('W', "SSW WBW HW XXB WW WWWD WWW"),
        ('X', "SSX XXX XX XXX XX XXXD XXX"),
    ] {
        let row: Vec<char> = row.chars().filter(|c| *c != ' ').collect();
        assert_eq!(row.len(), EVENTS);
        for (n, want) in row.into_iter().enumerate() {
            let mut h = in_state(state);
            assert_eq!(letter(h.state()), state);
            let actions = h.step(LATER, event(n));
            assert_eq!(letter(h.state()), want, "{state} x {:?}", event(n));
            let declared = actions.iter().filter(|a| matches!(a, Action::Declare { .. })).count();
            assert_eq!(declared == 1, want == 'X' && state != 'X', "{state} x {:?}", event(n));
            let probes = actions.contains(&Action::ProbeNow);
            let newly_suspect = "PAB".contains(want) && !"PAB".contains(state);
            assert!(probes || !newly_suspect, "a suspicion probes at once: {state} x {:?}", event(n));
        }
    }
}

fn declared(actions: &[Action]) -> Option<(Cause, String)> {
    actions.iter().find_map(|a| match a {
        Action::Declare { cause, evidence } => Some((cause.clone(), evidence.clone())),
        _ => None,
    })
}

fn armed(actions: &[Action], timer: Timer) -> Option<Duration> {
    actions.iter().rev().find_map(|a| match a {
        Action::Arm(t, d) if *t == timer => Some(*d),
        _ => None,
    })
}

#[test]
fn a_hang_is_confirmed_by_three_probes_with_growing_waits() {
    let mut h = in_state('H');
    let mut actions = h.step(Duration::ZERO, event(4));
    let mut waits = vec![];
    for _ in 0..3 {
        waits.push(armed(&actions, Timer::Probe).unwrap());
        assert!(declared(&actions).is_none());
        actions = h.step(Duration::ZERO, Event::ProbeTimer);
    }
    for (n, w) in waits.iter().enumerate() {
        let full = 50 * MS * 2u32.pow(n as u32);
        assert!(*w <= full && *w >= full * 9 / 10, "{n}: {w:?}");
    }
    let (cause, evidence) = declared(&actions).unwrap();
    assert_eq!(cause, Cause::Hang);
    assert_eq!(evidence, "pulse silent for 1000 ms, agent silent, 3 probes unanswered");
}

#[test]
fn a_silent_pulse_alone_never_kills() {
    let mut h = in_state('P');
    for round in 0..200 {
        assert!(declared(&h.step(LATER, Event::ProbeTimer)).is_none());
        if round % 2 == 1 {
            h.step(LATER, event(6));
        }
    }
    assert_eq!(letter(h.state()), 'P');
    // The agent answered while the pulse was silent: its timeout has to pass now.
    for _ in 0..10 {
        assert!(declared(&h.step(LATER, Event::ProbeTimer)).is_none());
    }
    h.step(LATER, event(7));
    let mut dead = None;
    for _ in 0..3 {
        dead = dead.or(declared(&h.step(LATER, Event::ProbeTimer)));
    }
    assert_eq!(dead.unwrap().0, Cause::Hang);
}

#[test]
fn an_unloaded_substrate_leaves_the_decision_to_the_heartbeat_timeout() {
    let mut h = in_state('H');
    assert!(h.step(LATER, Event::KernelLeft).contains(&Action::Notify(Notice::NoSubstrate)));
    for _ in 0..20 {
        assert!(declared(&h.step(LATER, Event::ProbeTimer)).is_none());
    }
    h.step(LATER, event(7));
    assert!(declared(&h.step(LATER, Event::ProbeTimer)).is_some());
}

#[test]
fn a_silent_agent_is_a_notice_and_no_death() {
    let mut h = in_state('A');
    h.step(LATER, Event::ProbeTimer);
    h.step(LATER, Event::ProbeTimer);
    let last = h.step(LATER, Event::ProbeTimer);
    assert!(last.contains(&Action::Notify(Notice::AgentSilent)) && declared(&last).is_none());
    assert!(h.step(LATER, event(6)).contains(&Action::Notify(Notice::Healthy)));
}

#[test]
fn a_late_supervisor_measures_anew_before_it_concludes() {
    let mut h = in_state('B');
    h.step(LATER, Event::ProbeTimer);
    h.step(LATER, Event::ProbeTimer);
    let actions = h.step(LATER, Event::OwnPause(2000 * MS));
    assert!(actions.contains(&Action::Remeasure));
    // However many probes go unanswered: without new evidence of silence there is no conclusion.
    for _ in 0..20 {
        assert!(declared(&h.step(LATER, Event::ProbeTimer)).is_none());
    }
    assert_eq!(h.signals(), (Signal::Unknown, Signal::Unknown));
    h.step(LATER, Event::PulseMoved);
    h.step(LATER, event(6));
    assert_eq!(letter(h.state()), 'H');
}

#[test]
fn own_pause_extends_the_grace_of_a_kernel_that_comes_up() {
    let mut h = in_state('S');
    let grace = Policy::default().boot_grace;
    assert_eq!(armed(&h.step(grace, Event::OwnPause(3000 * MS)), Timer::Grace), Some(3000 * MS));
    assert_eq!(armed(&h.step(grace, Event::GraceExpired), Timer::Grace), Some(3000 * MS));
    assert!(declared(&h.step(grace + 3000 * MS, Event::GraceExpired)).is_some());
}

#[test]
fn what_was_seen_decides_when_the_grace_is_over() {
    for (seen, want) in [
        (&[][..], "neither its kernel nor its agent was seen within 60000 ms"),
        (&[3], "its kernel runs, its agent never answered within 60000 ms"),
    ] {
        let mut h = in_state('S');
        seen.iter().for_each(|n| drop(h.step(MS, event(*n))));
        let (cause, _) = declared(&h.step(LATER, Event::GraceExpired)).unwrap();
        assert_eq!(cause, Cause::NeverServed(want.into()));
    }
    let mut h = in_state('S');
    h.step(MS, event(6));
    assert!(declared(&h.step(LATER, Event::GraceExpired)).is_none());
    assert_eq!(letter(h.state()), 'P', "an agent that answers is not killed");
}

#[test]
fn a_pulse_that_stops_while_the_kernel_comes_up_is_looked_into_at_once() {
    let mut h = in_state('S');
    h.step(MS, event(3));
    h.step(MS, event(4));
    assert_eq!(letter(h.state()), 'B');
    let back = h.step(1000 * MS, event(3));
    assert_eq!(letter(h.state()), 'S');
    assert_eq!(armed(&back, Timer::Grace), Some(59_000 * MS));
    h.step(MS, event(4));
    h.step(MS, Event::ProbeTimer);
    h.step(MS, Event::ProbeTimer);
    let (cause, _) = declared(&h.step(MS, Event::ProbeTimer)).unwrap();
    assert!(matches!(cause, Cause::NeverServed(_)));
}

#[test]
fn an_adopted_instance_is_judged_when_its_short_grace_is_over() {
    for (seen, want) in [(&[][..], 'B'), (&[3], 'A'), (&[6], 'P'), (&[3, 6], 'H')] {
        let mut h = machine(&[Event::Adopted]);
        seen.iter().for_each(|n| drop(h.step(MS, event(*n))));
        let actions = h.step(LATER, Event::GraceExpired);
        assert!(declared(&actions).is_none());
        assert_eq!(letter(h.state()), want, "{seen:?}");
    }
}

/// Plays time: a kernel that hangs at `hang` while looks and heartbeats have any phase.
fn time_to_declare(policy: Policy, seed: u64, look_phase: f64, beats_answered_until: Duration) -> Duration {
    let mut h = Health::new(policy, seed);
    let hang = beats_answered_until;
    h.step(Duration::ZERO, Event::Booted);
    h.step(Duration::ZERO, Event::PulseMoved);
    h.step(Duration::ZERO, Event::HeartbeatOk(MS));
    // The last beat was right at the hang; looks come every sample interval.
    let look = policy.sample_interval();
    let mut t = hang + look.mul_f64(look_phase);
    while t - hang < policy.pulse_silence() {
        t += look;
    }
    let mut actions = h.step(t, Event::PulseSilent(t - hang));
    loop {
        if declared(&actions).is_some() {
            return t - hang;
        }
        t += armed(&actions, Timer::Probe).unwrap();
        actions = h.step(t, Event::ProbeTimer);
    }
}

proptest! {
    #[test]
    fn a_hang_is_declared_within_the_bound(
        seed: u64, phase in 0.0f64..1.0, period in 1u64..50, misses in 1u32..200, probes in 0u32..6, base in 1u64..200,
    ) {
        let policy = Policy {
            pulse_period: Duration::from_millis(period),
            pulse_misses: misses,
            confirm_probes: probes,
            confirm_base: Duration::from_millis(base),
            ..Policy::default()
        };
        let took = time_to_declare(policy, seed, phase, Duration::from_secs(5));
        prop_assert!(took <= hang_bound(&policy), "{took:?} > {:?}", hang_bound(&policy));
        prop_assert!(took >= policy.pulse_silence());
    }

    /// Whatever happens: death needs a notice of the kernel, or a silent pulse, or a grace that is over;
    /// and while both signals keep coming nobody dies.
    #[test]
    fn nobody_dies_without_evidence(events in prop::collection::vec(1usize..EVENTS, 0..60)) {
        let mut h = machine(&[Event::Booted]);
        let mut pulse_missing = false;
        for n in events {
            let was = h.state().clone();
            let e = event(n);
            pulse_missing = match e {
                Event::PulseSilent(_) | Event::KernelLeft => true,
                Event::PulseMoved | Event::Reset | Event::Adopted => false,
                _ => pulse_missing,
            };
            let grace = matches!(e, Event::GraceExpired) && was == State::Starting;
            let notice = matches!(e, Event::PanicNotice(_) | Event::Parked(_));
            // An adopted instance of which nothing is seen at all is suspected when its grace is over.
            pulse_missing |= grace;
            if declared(&h.step(LATER, e)).is_some() {
                prop_assert!(notice || grace || pulse_missing);
            }
        }
    }

    /// A suspicion or a start always has a timer that ends it.
    #[test]
    fn nothing_waits_for_ever(events in prop::collection::vec(0usize..EVENTS, 0..60)) {
        let mut h = machine(&[]);
        let (mut grace, mut probe) = (false, false);
        for n in events {
            let e = event(n);
            // A timer only rings when it is armed.
            if (e == Event::GraceExpired && !grace) || (e == Event::ProbeTimer && !probe) {
                continue;
            }
            match e {
                Event::GraceExpired => grace = false,
                Event::ProbeTimer => probe = false,
                _ => {}
            }
            for a in h.step(LATER, e) {
                match a {
                    Action::Arm(Timer::Grace, _) => grace = true,
                    Action::Arm(Timer::Probe, _) => probe = true,
                    Action::Disarm(Timer::Grace) => grace = false,
                    Action::Disarm(Timer::Probe) => probe = false,
                    _ => {}
                }
            }
            match h.state() {
                State::Starting => prop_assert!(grace),
                State::Suspect { .. } => prop_assert!(probe),
                _ => {}
            }
        }
    }
}

#[test]
fn in_maintenance_silence_is_watched_and_declared_only_afterwards() {
    let mut h = in_state('H');
    h.step(Duration::ZERO, Event::Maintenance(true));
    h.step(Duration::ZERO, event(4));
    let mut withheld = 0;
    for _ in 0..50 {
        let actions = h.step(LATER, Event::ProbeTimer);
        assert!(declared(&actions).is_none());
        assert!(armed(&actions, Timer::Probe).is_some(), "it goes on looking");
        withheld +=
            actions.iter().filter(|a| matches!(a, Action::Notify(Notice::Withheld(Cause::Hang)))).count();
    }
    assert_eq!((withheld, letter(h.state())), (1, 'P'));
    // It comes back by itself: nothing happened.
    let mut back = h.clone();
    back.step(LATER, Event::PulseMoved);
    assert_eq!(letter(back.state()), 'H');
    // Or maintenance ends: it is confirmed from the start, then declared.
    let actions = h.step(LATER, Event::Maintenance(false));
    assert!(actions.contains(&Action::ProbeNow));
    for n in 0..3 {
        let actions = h.step(LATER, Event::ProbeTimer);
        assert_eq!(declared(&actions).is_some(), n == 2);
    }
}

#[test]
fn a_start_that_fails_in_maintenance_is_waited_for() {
    let mut h = machine(&[Event::Maintenance(true), Event::Booted]);
    let actions = h.step(LATER, Event::GraceExpired);
    assert!(actions.iter().any(|a| matches!(a, Action::Notify(Notice::Withheld(Cause::NeverServed(_))))));
    assert_eq!((letter(h.state()), armed(&actions, Timer::Grace)), ('S', Some(Policy::default().boot_grace)));
    // A panic is a fact, not a silence.
    assert!(declared(&h.step(LATER, event(8))).is_some());
}

#[test]
fn a_changed_policy_counts_from_now() {
    let policy = Policy { boot_grace: 5 * LATER, confirm_base: 7 * MS, ..Policy::default() };
    let mut h = in_state('S');
    let actions = h.step(LATER, Event::PolicyChanged(Box::new(policy)));
    assert_eq!(armed(&actions, Timer::Grace), Some(5 * LATER));
    assert!(h.step(5 * LATER, Event::GraceExpired).iter().all(|a| !matches!(a, Action::Declare { .. })));
    assert!(declared(&h.step(6 * LATER, Event::GraceExpired)).is_some());
    let mut h = in_state('B');
    let wait = armed(&h.step(LATER, Event::PolicyChanged(Box::new(policy))), Timer::Probe).unwrap();
    assert!(wait <= 8 * MS && wait >= 6 * MS, "{wait:?}");
}

#[test]
fn a_kernel_whose_agent_never_came_and_whose_pulse_paused_is_still_judged_when_its_grace_is_over() {
    let mut h = machine(&[event(0), event(3), event(4), event(7), event(3)]);
    assert_eq!(letter(h.state()), 'S');
    h.step(Policy::default().boot_grace, Event::GraceExpired);
    assert!(matches!(h.state(), State::Dead(Cause::NeverServed(_))), "{:?}", h.state());
}
