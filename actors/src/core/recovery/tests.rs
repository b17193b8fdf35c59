use proptest::prelude::*;

use super::*;
use crate::core::policy::{Capture, Policy};

const MS: Duration = Duration::from_millis(1);
const EVENTS: usize = 27;

fn event(n: usize) -> Event {
    let t = String::new;
    match n {
        0 => Event::Spawn,
        1 => Event::OperatorRecover,
        2 => Event::OperatorTerminate,
        3 => Event::Declared(Cause::Hang, "e".into()),
        4 => Event::Booted(t()),
        5 => Event::BootError(t()),
        6 => Event::Serving,
        7 => Event::FenceDone { complete: true, detail: t() },
        8 => Event::FenceDone { complete: false, detail: t() },
        9 => Event::FenceError(t()),
        10 => Event::CaptureDone(t()),
        11 => Event::CaptureFailed(t()),
        12 => Event::Reclaimed(t()),
        13 => Event::ReclaimError(t()),
        14 => Event::RestartTimer,
        15 => Event::PolicyChanged,
        16 => Event::Maintenance(true),
        17 => Event::Grouped(true),
        18 => Event::Grouped(false),
        19 => Event::GroupStop(t()),
        20 => Event::GroupStart,
        21 => Event::GroupGiveUp(t()),
        22 => Event::Standby(true),
        23 => Event::Standby(false),
        24 => Event::TookOver(t()),
        25 => Event::NotTakenOver(t()),
        _ => Event::Shutdown,
    }
}

fn letter(phase: Phase) -> char {
    match phase {
        Phase::Stopped => 's',
        Phase::Booting => 'b',
        Phase::AwaitingService => 'a',
        Phase::Monitoring => 'm',
        Phase::DetectingFailure => 'd',
        Phase::PreparingRecovery => 'p',
        Phase::CapturingVmcore => 'c',
        Phase::ReclaimingResources => 'r',
        Phase::TakingOver => 't',
        Phase::Restarting => 'w',
        Phase::PartialFence => '!',
        Phase::Held => 'h',
        Phase::Degraded => 'f',
    }
}

fn machine(policy: Policy, events: &[usize]) -> Recovery {
    let mut m = Recovery::new(policy, 1);
    for n in events {
        m.step(Duration::ZERO, event(*n));
    }
    m
}

const RUNNING: [usize; 3] = [0, 4, 6];

/// A machine in this phase, reached through a failure of a running instance.
fn at(phase: char) -> Recovery {
    let policy = Policy { fence_tries: 1, capture: Capture::Required, ..Policy::default() };
    let with = |policy: Policy, more: &[usize]| machine(policy, &[&RUNNING[..], more].concat());
    let plain = Policy { capture: Capture::None, ..policy };
    match phase {
        's' => machine(policy, &[]),
        // In a recovery, not an operator's start.
        'b' => with(plain, &[3, 7, 12]),
        'a' => with(plain, &[3, 7, 12, 4]),
        'm' => with(policy, &[]),
        'd' => with(Policy { auto_heal: false, ..policy }, &[3]),
        'p' => with(policy, &[3]),
        'c' => with(policy, &[3, 7]),
        'r' => with(plain, &[3, 7]),
        't' => with(plain, &[22, 3, 7]),
        'w' => with(plain, &[3, 7, 12, 5]),
        '!' => with(policy, &[3, 8]),
        'h' => with(plain, &[17, 3, 7, 12]),
        // Given up, with its memory held.
        'F' => with(policy, &[3, 7, 11]),
        // Given up, with nothing held.
        _ => with(Policy { restart_intensity: 0, ..plain }, &[3, 7, 12]),
    }
}

#[test]
fn every_cell_of_the_table() {
    for (from, row) in [
        // Spawn Recover Terminate | Declared | Booted BootError Serving | Fenced Partial Error | Dump NoDump |
        // Back NotBack | Timer | Policy Maintenance Grouped Ungrouped GroupStop GroupStart GroupGiveUp |
        // Standby NoStandby TookOver NotTakenOver | Shutdown
        ('s', "bss s sss sss ss ss s sssssss ssss s"),
        ('b', "bbb b awb bbb bb bb b bbbbbbb bbbb b"),
        ('a', "aap p aam aaa aa aa a aaaapaa aaaa a"),
        ('m', "mpp p mmm mmm mm mm m mmmmpmm mmmm m"),
        ('d', "dpp d ddd ddd dd dd d ddddpdd dddd d"),
        ('p', "ppp p ppp c!! pp pp p ppppppp pppp p"),
        ('c', "ccc c ccc ccc rf cc c ccccccc cccc c"),
        ('r', "rrr r rrr rrr rr bf r rrrrrrr rrrr r"),
        ('t', "ttt t ttt ttt tt tt t ttttttt ttar t"),
        ('w', "wbr w www www ww ww b wwwwhwr wwww w"),
        ('!', "!pp ! !!! !!! !! !! ! !!!!!!! !!!! !"),
        ('h', "hbr h hhh hhh hh hh h hbhbhbr hhhh h"),
        ('F', "fpp f fff fff ff ff f fffffff ffff f"),
        ('f', "bbr f fff fff ff ff f fffffff ffff f"),
    ] {
        let row: Vec<char> = row.chars().filter(|c| *c != ' ').collect();
        assert_eq!(row.len(), EVENTS);
        for (n, want) in row.into_iter().enumerate() {
            let mut m = at(from);
            assert_eq!(letter(m.phase()), from.to_ascii_lowercase(), "set-up of {from}");
            let actions = m.step(MS, event(n));
            assert_eq!(letter(m.phase()), want, "{from} x {:?}", event(n));
            if letter(m.phase()) != from.to_ascii_lowercase() {
                assert!(
                    actions.iter().any(|a| matches!(a, Action::Journal { .. })),
                    "{from} x {:?} is journaled",
                    event(n)
                );
            }
            if n < 3 && want == from.to_ascii_lowercase() && !"bpcrt".contains(from) {
                assert!(
                    actions.iter().any(|a| matches!(a, Action::Refuse(_))),
                    "{from} x {:?} is refused",
                    event(n)
                );
            }
        }
    }
}

fn trace(actions: &[Action]) -> String {
    let words = actions.iter().map(|a| match a {
        Action::OpenIncident => "incident".to_owned(),
        Action::Journal { phase, recovered: Some(r), .. } => format!("{phase}({r})"),
        Action::Journal { phase, .. } => (*phase).to_owned(),
        Action::Fence => "fence".into(),
        Action::Capture => "capture".into(),
        Action::Reclaim { release_cpus } => format!("reclaim({release_cpus})"),
        Action::Boot => "boot".into(),
        Action::TakeOver => "take-over".into(),
        Action::Watch { adopted } => format!("watch({adopted})"),
        Action::Unwatch => "unwatch".into(),
        Action::ArmRestart(d) => format!("arm({})", d.as_secs_f64().ceil()),
        Action::DisarmRestart => "disarm".into(),
        Action::Settled(o) => format!("={}", format!("{o:?}").split('(').next().unwrap()),
        Action::Alert(_) => "alert".into(),
        Action::Refuse(_) => "refuse".into(),
        Action::Held => "held".into(),
    });
    words.collect::<Vec<_>>().join(" ")
}

fn play(policy: Policy, events: &[usize]) -> String {
    let mut m = Recovery::new(policy, 1);
    events.iter().map(|n| trace(&m.step(MS, event(*n)))).collect::<Vec<_>>().join(" | ")
}

#[test]
fn a_whole_recovery() {
    assert_eq!(
        play(Policy::default(), &[0, 4, 6, 3, 7, 12, 4, 6]),
        "RESTARTING boot | RESTARTING watch(false) =Started | MONITORING =Serving | \
         incident DETECTING_FAILURE PREPARING_RECOVERY unwatch fence | RECLAIMING_RESOURCES reclaim(false) | \
         RESTARTING boot | RESTARTING watch(false) =Started | RECOVERY_COMPLETE(true) =Serving"
    );
}

#[test]
fn cpus_of_a_start_that_never_comes_go_back() {
    let policy = Policy { restart_intensity: 1, ..Policy::default() };
    let run = play(policy, &[0, 4, 6, 3, 7, 12, 5, 12]);
    assert!(
        run.ends_with(
            "RECLAIMING_RESOURCES reclaim(false) | RESTARTING boot | RECLAIMING_RESOURCES reclaim(true) | \
             DEGRADED(false) alert =Degraded"
        ),
        "{run}"
    );
}

#[test]
fn a_standby_takes_over_after_the_fence() {
    let run = |more: &[usize]| play(Policy::default(), &[&[0, 4, 6, 22, 3], more].concat());
    assert!(run(&[7, 24, 6]).ends_with(
        "PREPARING_RECOVERY unwatch fence | TAKING_OVER take-over | RESTARTING watch(true) =Started | \
         RECOVERY_COMPLETE(true) =Serving"
    ));
    // Not ready any more, or not able to: as without one.
    assert!(run(&[23, 7]).ends_with("RECLAIMING_RESOURCES reclaim(false)"));
    assert!(run(&[7, 25, 12]).ends_with("RECLAIMING_RESOURCES reclaim(false) | RESTARTING boot"));
    // Ready while the dead kernel is being taken back, or while it waits for its next start.
    assert!(run(&[23, 7, 22, 12]).ends_with("TAKING_OVER take-over"));
    assert!(run(&[23, 7, 12, 5, 22, 14, 25]).ends_with("TAKING_OVER take-over | RESTARTING boot"));
    // Not for an operator's start, and not while a CPU may run.
    assert!(play(Policy::default(), &[22, 0]).ends_with("RESTARTING boot"));
    assert!(run(&[8, 8, 8]).ends_with("PARTIAL_FENCE alert =PartialFence"));
    // A dump comes first, and holds everything when it has to be there.
    let policy = Policy { capture: Capture::Required, ..Policy::default() };
    assert!(
        play(policy, &[0, 4, 6, 22, 3, 7, 10]).ends_with("CAPTURING_VMCORE capture | TAKING_OVER take-over")
    );
    assert!(play(policy, &[0, 4, 6, 22, 3, 7, 11]).ends_with("DEGRADED(false) alert =Degraded"));
    // Its group starts it, stops it again, gives it up.
    assert!(run(&[17, 7, 12, 20]).ends_with("RESTARTING held | TAKING_OVER take-over"));
    assert!(run(&[17, 20, 7]).ends_with("TAKING_OVER take-over"));
    assert!(run(&[17, 20, 7, 19, 24]).ends_with("RESTARTING PREPARING_RECOVERY unwatch fence"));
    assert!(run(&[17, 20, 7, 21, 24]).ends_with("RESTARTING PREPARING_RECOVERY unwatch fence"));
    assert!(run(&[17, 20, 7, 21, 25]).ends_with("RECLAIMING_RESOURCES reclaim(true)"));
    // Failures are counted whoever takes over.
    let mut m = machine(Policy { restart_intensity: 3, ..Policy::default() }, &RUNNING);
    for _ in 0..3 {
        for n in [22, 3, 7, 24, 6] {
            m.step(MS, event(n));
        }
        assert_eq!(m.phase(), Phase::Monitoring);
    }
    for n in [22, 3, 7] {
        m.step(MS, event(n));
    }
    assert_eq!((m.phase(), m.goal), (Phase::ReclaimingResources, Goal::GiveUp));
}

#[test]
fn a_dump_comes_between_fence_and_reclaim() {
    let policy = Policy { capture: Capture::Required, ..Policy::default() };
    assert_eq!(
        play(policy, &[0, 4, 6, 3, 7, 10])[..].rsplit(" | ").take(2).collect::<Vec<_>>(),
        ["RECLAIMING_RESOURCES reclaim(false)", "CAPTURING_VMCORE capture"]
    );
    assert!(
        play(policy, &[0, 4, 6, 3, 7, 11]).ends_with("DEGRADED(false) alert =Degraded"),
        "memory is held"
    );
    let policy = Policy { capture: Capture::BestEffort, ..policy };
    assert!(play(policy, &[0, 4, 6, 3, 7, 11]).ends_with("RECLAIMING_RESOURCES reclaim(false)"));
    assert!(
        play(policy, &[0, 4, 6, 2, 7]).ends_with("RECLAIMING_RESOURCES reclaim(true)"),
        "no dump of what is stopped"
    );
}

#[test]
fn a_partial_fence_is_tried_again_and_then_stops_everything() {
    let t = play(Policy::default(), &[0, 4, 6, 3, 8, 9, 8, 7, 12, 14, 3]);
    assert!(
        t.ends_with(
            "unwatch fence | PREPARING_RECOVERY fence | PREPARING_RECOVERY fence | PARTIAL_FENCE alert =PartialFence |  |  |  | "
        ),
        "{t}"
    );
    assert!(!t.contains("reclaim"));
}

#[test]
fn a_first_start_that_fails_gives_everything_back() {
    assert!(play(Policy::default(), &[0, 5]).ends_with("STOPPED =BootFailed"));
    assert!(play(Policy::default(), &[0, 4, 3, 7, 12]).ends_with(
        "PREPARING_RECOVERY unwatch fence | RECLAIMING_RESOURCES reclaim(true) | STOPPED =BootFailed"
    ));
}

#[test]
fn a_kernel_that_dies_while_its_start_is_still_being_reported() {
    let t = play(Policy::default(), &[0, 3, 4]);
    assert!(t.ends_with("|  | RESTARTING watch(false) =Started PREPARING_RECOVERY unwatch fence"), "{t}");
}

#[test]
fn terminate_in_each_phase_ends_in_stopped() {
    for from in "bamdpcrtwh!Ff".chars() {
        let mut m = at(from);
        m.step(MS, Event::OperatorTerminate);
        let mut released = false;
        for _ in 0..8 {
            let next = match m.phase() {
                Phase::Stopped => break,
                Phase::Booting => 4,
                Phase::PreparingRecovery => 7,
                Phase::CapturingVmcore => 11,
                Phase::ReclaimingResources => 12,
                Phase::TakingOver => 24,
                other => panic!("{from} waits in {other:?}"),
            };
            let actions = m.step(MS, event(next));
            released |= actions.contains(&Action::Reclaim { release_cpus: true });
        }
        assert_eq!(m.phase(), Phase::Stopped, "from {from}");
        // From 'w', 'h' and 'f' the reclaim came with the first step.
        assert!(released || "whf".contains(from), "{from} gives the CPUs back");
        assert!(!m.held());
    }
}

#[test]
fn a_restart_that_fails_while_it_is_terminated_gives_the_cpus_back_that_were_kept_for_it() {
    let mut m = machine(Policy::default(), &[0, 4, 6, 3, 7, 12]);
    assert_eq!(m.phase(), Phase::Booting);
    m.step(MS, Event::OperatorTerminate);
    let given = m.step(MS, event(5));
    assert!(given.contains(&Action::Reclaim { release_cpus: true }), "{given:?}");
    assert!(m.step(MS, event(12)).contains(&Action::Settled(Outcome::Stopped)));
    assert_eq!(m.phase(), Phase::Stopped);
    // Also under the next supervisor.
    let saved = Saved { phase: Phase::Booting, goal: Goal::Stop, incident: true, ..Saved::default() };
    let (m, actions) = Recovery::resume(Policy::default(), 1, saved, Found::Nothing, MS, Duties::default());
    assert!(actions.contains(&Action::Reclaim { release_cpus: true }), "{actions:?}");
    assert_eq!(m.phase(), Phase::ReclaimingResources);
}

#[test]
fn restarts_back_off_and_end_at_the_intensity() {
    let policy = Policy { restart_intensity: 3, ..Policy::default() };
    let mut m = machine(policy, &RUNNING);
    let mut traces = vec![];
    for _ in 0..4 {
        m.step(MS, event(3));
        let reclaim = trace(&m.step(MS, event(7)));
        traces.push(format!("{reclaim} / {}", trace(&m.step(MS, event(12)))));
        for n in [14, 4, 6] {
            m.step(MS, event(n));
        }
    }
    assert_eq!(
        traces,
        [
            "RECLAIMING_RESOURCES reclaim(false) / RESTARTING boot",
            "RECLAIMING_RESOURCES reclaim(false) / RESTARTING arm(1)",
            "RECLAIMING_RESOURCES reclaim(false) / RESTARTING arm(2)",
            "RECLAIMING_RESOURCES reclaim(true) / DEGRADED(false) alert =Degraded",
        ]
    );
    // Failures far apart are not counted together.
    let mut m = machine(policy, &RUNNING);
    for k in 1..10u32 {
        let now = policy.restart_period * k + MS * k;
        for n in [3, 7, 12, 4, 6] {
            m.step(now, event(n));
        }
        assert_eq!(m.phase(), Phase::Monitoring);
    }
}

#[test]
fn without_auto_heal_an_operator_decides() {
    let policy = Policy { auto_heal: false, ..Policy::default() };
    let t = play(policy, &[0, 4, 6, 3, 1]);
    assert!(
        t.ends_with("incident DETECTING_FAILURE unwatch alert | PREPARING_RECOVERY unwatch fence"),
        "{t}"
    );
}

#[test]
fn after_shutdown_nothing_is_begun() {
    let mut m = at('w');
    assert_eq!(m.step(MS, Event::Shutdown), [Action::DisarmRestart]);
    for n in 0..EVENTS {
        assert_eq!(m.step(MS, event(n)), []);
    }
}

#[test]
fn resume_table() {
    // What a machine in each phase does when its supervisor comes back and finds nothing, a running kernel,
    // or a stopped one.
    for (from, want) in [
        ('s', ["s", "m MONITORING watch(true)", "p PREPARING_RECOVERY unwatch fence"]),
        ('b', ["b RESTARTING boot", "a RESTARTING watch(false)", "p PREPARING_RECOVERY unwatch fence"]),
        ('a', ["b RESTARTING boot", "a RESTARTING watch(false)", "p PREPARING_RECOVERY unwatch fence"]),
        (
            'm',
            [
                "b incident DETECTING_FAILURE RESTARTING boot",
                "m watch(true)",
                "p incident DETECTING_FAILURE PREPARING_RECOVERY unwatch fence",
            ],
        ),
        ('d', ["s STOPPED(false)", "d", "d"]),
        (
            'p',
            ["b RESTARTING boot", "p PREPARING_RECOVERY unwatch fence", "p PREPARING_RECOVERY unwatch fence"],
        ),
        (
            'c',
            ["b RESTARTING boot", "p PREPARING_RECOVERY unwatch fence", "p PREPARING_RECOVERY unwatch fence"],
        ),
        (
            'r',
            ["b RESTARTING boot", "p PREPARING_RECOVERY unwatch fence", "p PREPARING_RECOVERY unwatch fence"],
        ),
        (
            't',
            ["b RESTARTING boot", "p PREPARING_RECOVERY unwatch fence", "p PREPARING_RECOVERY unwatch fence"],
        ),
        ('w', ["b RESTARTING boot", "m MONITORING watch(true)", "p PREPARING_RECOVERY unwatch fence"]),
        ('!', ["s STOPPED(false)", "!", "!"]),
        ('h', ["b RESTARTING boot", "m MONITORING watch(true)", "p PREPARING_RECOVERY unwatch fence"]),
        ('F', ["f", "m MONITORING watch(true)", "f"]),
        ('f', ["f", "m MONITORING watch(true)", "f"]),
    ] {
        for (found, want) in [Found::Nothing, Found::Running, Found::Stopped].into_iter().zip(want) {
            let saved = at(from).saved();
            let (m, actions) = Recovery::resume(Policy::default(), 1, saved, found, MS, Duties::default());
            let got = format!("{} {}", letter(m.phase()), trace(&actions));
            assert_eq!(got.trim_end(), want, "{from} {found:?}");
        }
    }
}

#[test]
fn a_kernel_younger_than_the_record_is_not_stopped_for_what_the_one_before_did() {
    let incident = "a RESTARTING watch(false)";
    for (from, want) in [
        ('s', "m watch(true)"),
        ('b', incident),
        ('a', incident),
        ('m', "m watch(true)"),
        ('d', incident),
        ('p', incident),
        ('c', incident),
        ('r', incident),
        ('t', incident),
        ('w', incident),
        ('h', incident),
        ('!', incident),
        ('F', "m watch(true)"),
        ('f', "m watch(true)"),
    ] {
        let saved = at(from).saved().outdated();
        let (m, actions) =
            Recovery::resume(Policy::default(), 1, saved, Found::Running, MS, Duties::default());
        assert_eq!(format!("{} {}", letter(m.phase()), trace(&actions)), want, "{from}");
    }
}

#[test]
fn an_operators_start_that_was_cut_off_is_undone() {
    for (events, found, want) in [
        (&[0][..], Found::Nothing, "s STOPPED"),
        (&[0], Found::Stopped, "p PREPARING_RECOVERY unwatch fence"),
        (&[0, 4], Found::Running, "a RESTARTING watch(false)"),
        (&[0, 2], Found::Running, "p RESTARTING PREPARING_RECOVERY unwatch fence"),
        (&[0, 4, 6, 2], Found::Nothing, "s STOPPED"),
        // How much was given back nobody knows.
        (&[0, 4, 6, 2, 7], Found::Nothing, "r RECLAIMING_RESOURCES reclaim(true)"),
    ] {
        let saved = machine(Policy::default(), events).saved();
        let (m, actions) = Recovery::resume(Policy::default(), 1, saved, found, MS, Duties::default());
        assert_eq!(format!("{} {}", letter(m.phase()), trace(&actions)), want, "{events:?} {found:?}");
    }
}

#[test]
fn a_member_waits_for_its_group() {
    // Grouped, dies, is taken back, and starts when the group says so.
    assert!(play(Policy::default(), &[0, 4, 6, 17, 3, 7, 12, 20, 4, 6]).ends_with(
        "RECLAIMING_RESOURCES reclaim(false) | RESTARTING held | RESTARTING boot | \
             RESTARTING watch(false) =Started | RECOVERY_COMPLETE(true) =Serving"
    ));
    // The group may say so before it is ready.
    assert!(
        play(Policy::default(), &[0, 4, 6, 17, 3, 20, 7, 12])
            .ends_with("|  | RECLAIMING_RESOURCES reclaim(false) | RESTARTING boot")
    );
    // Stopped by the group: no failure of its own, however often.
    let mut m = machine(Policy { restart_intensity: 0, ..Policy::default() }, &[0, 4, 6, 17]);
    for _ in 0..5 {
        for n in [19, 7, 12] {
            m.step(MS, event(n));
        }
        assert_eq!((m.phase(), m.standing()), (Phase::Held, Standing::Held));
        for n in [20, 4, 6] {
            m.step(MS, event(n));
        }
        assert_eq!((m.phase(), m.standing()), (Phase::Monitoring, Standing::Up));
    }
    // Given up with its group: its CPUs go back.
    assert!(play(Policy::default(), &[0, 4, 6, 17, 19, 7, 12, 21, 12]).ends_with(
        "RESTARTING held | disarm RECLAIMING_RESOURCES reclaim(true) | DEGRADED(false) alert =Degraded"
    ));
    // A start that fails is the group's to answer.
    assert!(play(Policy::default(), &[0, 4, 6, 17, 3, 7, 12, 20, 5]).ends_with("RESTARTING held"));
}

#[test]
fn a_member_goes_on_waiting_after_the_supervisor_was_restarted() {
    let saved = at('h').saved();
    let grouped = Duties { grouped: true, maintenance: false };
    let (m, actions) = Recovery::resume(Policy::default(), 1, saved, Found::Nothing, MS, grouped);
    assert_eq!((m.phase(), trace(&actions)), (Phase::Held, "held".to_owned()));
    let saved = at('r').saved();
    let (m, actions) = Recovery::resume(Policy::default(), 1, saved, Found::Nothing, MS, grouped);
    assert_eq!((m.phase(), trace(&actions)), (Phase::Held, "RESTARTING held".to_owned()));
}

#[test]
fn maintenance_watches_and_does_not_act() {
    let t = play(Policy::default(), &[0, 4, 6, 16, 3]);
    assert!(t.ends_with("incident DETECTING_FAILURE unwatch alert"), "{t}");
    let mut m = machine(Policy::default(), &[0, 4, 6, 16, 3]);
    assert_eq!(m.standing(), Standing::Left, "its group does not count on it");
    assert_eq!(trace(&m.step(MS, event(19))), "", "nor may it stop it");
    assert_eq!(trace(&m.step(MS, Event::Maintenance(false))), "PREPARING_RECOVERY unwatch fence");
}

proptest! {
    /// Whatever happens in whatever order: nothing is taken back that was not completely fenced since its
    /// last start, nothing is started twice, and each effect is journaled before.
    #[test]
    fn fence_before_anything_else(
        events in prop::collection::vec((0..EVENTS - 1, 0u64..2000), 0..100),
        capture in 0..3usize,
        auto_heal: bool,
        restart in prop::option::of((0usize..80, 0usize..3)),
    ) {
        let policy = Policy {
            capture: [Capture::None, Capture::Required, Capture::BestEffort][capture],
            auto_heal,
            ..Policy::default()
        };
        let mut m = Recovery::new(policy, 7);
        let mut now = Duration::ZERO;
        // What is true of the machine below: a kernel may run; all its CPUs were seen stopped.
        let (mut may_run, mut fenced) = (false, true);
        for (k, (n, wait)) in events.into_iter().enumerate() {
            now += Duration::from_millis(wait);
            // Effects answer only what was asked.
            let fits = match n {
                4 | 5 => m.phase() == Phase::Booting,
                7..=9 => m.phase() == Phase::PreparingRecovery,
                10 | 11 => m.phase() == Phase::CapturingVmcore,
                12 | 13 => m.phase() == Phase::ReclaimingResources,
                24 | 25 => m.phase() == Phase::TakingOver,
                14 => m.phase() == Phase::Restarting,
                _ => true,
            };
            if !fits {
                continue;
            }
            match n {
                // A start that failed gave everything back.
                5 => {
                    fenced = true;
                    may_run = false;
                }
                7 => { fenced = true; may_run = false; }
                // Another kernel, which runs; the one before is somebody else's.
                24 => { fenced = false; may_run = true; }
                _ => {}
            }
            let mut actions = m.step(now, event(n));
            if let Some((at, found)) = restart && at == k {
                let found = if may_run { Found::Running } else { [Found::Nothing, Found::Stopped, Found::Stopped][found] };
                let (again, more) = Recovery::resume(policy, 7, m.saved(), found, now, Duties::default());
                m = again;
                actions = more;
            }
            let mut journaled = false;
            for a in &actions {
                match a {
                    Action::Journal { .. } => journaled = true,
                    Action::Boot => {
                        prop_assert!(journaled);
                        prop_assert!(!may_run, "started while the old kernel may run");
                        (may_run, fenced) = (true, false);
                    }
                    Action::TakeOver => {
                        prop_assert!(journaled);
                        prop_assert!(fenced && !may_run, "taken over from a kernel that may run");
                    }
                    Action::Reclaim { .. } => {
                        prop_assert!(journaled);
                        prop_assert!(fenced && !may_run, "taken back from a kernel that may run");
                    }
                    Action::Fence | Action::Capture => prop_assert!(journaled),
                    _ => {}
                }
            }
            if m.phase() == Phase::Stopped {
                prop_assert!(!may_run && !m.held());
            }
        }
    }
}
