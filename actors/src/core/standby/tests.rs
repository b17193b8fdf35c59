use proptest::prelude::*;

use super::*;

const EVENTS: usize = 20;

fn want(name: &str) -> Want {
    Want {
        kernel: name.into(),
        initramfs: None,
        cmdline: String::new(),
        cpus: 1,
        memory_bytes: 1 << 20,
        handover: None,
    }
}

fn event(n: usize) -> Event {
    let t = || "t".to_owned();
    let wanted = |name: Option<&str>, rest| Event::Want { want: name.map(want), rest };
    match n {
        0 => wanted(Some("a"), true),
        1 => wanted(Some("a"), false),
        2 => wanted(Some("b"), true),
        3 => wanted(None, true),
        4 => Event::Found(want("a")),
        5 => Event::FoundInUse,
        6 => Event::Started,
        7 => Event::NoRoom(t()),
        8 => Event::Failed(t()),
        9 => Event::Ready(true),
        10 => Event::Ready(false),
        11 => Event::Gone(t()),
        12 => Event::Removed,
        13 => Event::NotRemoved(t()),
        14 => Event::Claim,
        15 => Event::Back,
        16 => Event::GiveWay(t()),
        17 => Event::Timer,
        18 => wanted(Some("b"), false),
        _ => Event::Shutdown,
    }
}

fn letter(phase: Phase) -> char {
    match phase {
        Phase::None => 'n',
        Phase::Waiting => 'w',
        Phase::Arming => 's',
        Phase::Armed => 'a',
        Phase::Using => 'u',
        Phase::Removing => 'r',
    }
}

fn machine(events: &[usize]) -> Standby {
    let mut m = Standby::default();
    for n in events {
        m.step(event(*n));
    }
    m
}

fn at(phase: char) -> Standby {
    machine(match phase {
        'n' => &[1],
        'w' => &[0, 8],
        's' => &[0],
        // Not healthy yet.
        'A' => &[0, 6],
        'a' => &[0, 6, 9],
        'u' => &[0, 6, 9, 14],
        _ => &[0, 6, 9, 11],
    })
}

#[test]
fn every_cell_of_the_table() {
    for (from, row) in [
        // Want a, a not at rest, b, none | Found InUse | Started NoRoom Failed | Ready NotReady Gone |
        // Removed NotRemoved | Claim Back | GiveWay Timer | b not at rest | Shutdown
        ('n', "snsn au nnn nnn nn nn wn n n"),
        ('w', "wwsn ww www www ww ww ws n w"),
        ('s', "ssss ss aww sss ss ss ss s s"),
        ('A', "aarr aa aaa aar aa aa ra a a"),
        ('a', "aarr aa aaa aar aa ua ra a a"),
        ('u', "uuuu uu uuu uuu su ua uu u u"),
        ('r', "rrrr rr rrr rrr wr rr rr r r"),
    ] {
        let row: Vec<char> = row.chars().filter(|c| *c != ' ').collect();
        assert_eq!(row.len(), EVENTS, "{from}");
        for (n, expected) in row.into_iter().enumerate() {
            let mut m = at(from);
            assert_eq!(letter(m.phase()), from.to_ascii_lowercase(), "set-up of {from}");
            m.step(event(n));
            assert_eq!(letter(m.phase()), expected, "{from} x {:?}", event(n));
        }
    }
}

#[test]
fn one_is_started_when_the_instance_is_at_rest_and_taken_when_it_is_ready() {
    let mut m = Standby::default();
    assert_eq!(m.step(event(1)), []);
    assert_eq!(m.step(event(0)), [Action::Start(want("a"))]);
    assert_eq!(m.step(Event::Claim), [], "it is not there yet");
    assert_eq!(m.step(Event::Started), [Action::Ask]);
    assert_eq!(m.step(Event::Claim), [], "nobody knows that it is well");
    m.step(Event::Ready(true));
    assert!(m.ready());
    assert_eq!(m.step(Event::Claim), [Action::Disarm, Action::Claimed]);
    assert_eq!(m.step(Event::Claim), [], "it is taken once");
    // What it was is stopped; another one is armed when the instance is at rest again.
    m.step(event(1));
    assert_eq!(m.step(Event::Removed), [Action::Disarm]);
    assert_eq!(m.step(event(0)), [Action::Start(want("a"))]);
}

#[test]
fn failures_wait_longer_and_longer_until_one_lasts() {
    let mut m = machine(&[0]);
    let mut waits = vec![];
    for _ in 0..8 {
        let failed = m.step(event(8));
        waits.extend(
            failed.iter().filter_map(|a| if let Action::Arm(d) = a { Some(d.as_secs()) } else { None }),
        );
        m.step(Event::Timer);
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    // One that dies as soon as it is ready goes on with the same row, one that lasts does not.
    for n in [6, 9, 11] {
        m.step(event(n));
    }
    assert!(m.step(Event::Removed).contains(&Action::Arm(LONGEST_WAIT)));
    for n in [17, 6, 9, 17, 11] {
        m.step(event(n));
    }
    assert!(m.step(Event::Removed).contains(&Action::Arm(FIRST_WAIT)));
}

#[test]
fn what_is_missing_is_said_once_and_what_gives_way_leaves_time() {
    let mut m = machine(&[0]);
    assert_eq!(m.step(event(7)).len(), 2);
    m.step(Event::Timer);
    assert_eq!(m.step(event(7)), [Action::Arm(LOOK_AGAIN)]);
    assert_eq!(m.why(), "t");
    let mut m = at('a');
    m.step(event(16));
    assert_eq!(m.step(Event::Removed), [Action::Arm(GIVE_WAY)]);
    // While it is being started it can only do so afterwards.
    let mut m = machine(&[0, 16]);
    assert!(m.step(Event::Started).contains(&Action::Remove));
    assert_eq!(m.step(Event::Removed), [Action::Arm(GIVE_WAY)]);
}

#[test]
fn one_that_is_not_what_is_wanted_stays_until_the_instance_is_at_rest() {
    let mut m = at('a');
    assert_eq!(m.step(event(18)), []);
    assert!(m.ready());
    assert!(m.step(event(2)).contains(&Action::Remove));
    assert_eq!(m.step(Event::Removed), [Action::Disarm, Action::Start(want("b"))]);
    // None is wanted: it goes at once.
    let mut m = at('a');
    assert!(m.step(Event::Want { want: None, rest: false }).contains(&Action::Remove));
    assert_eq!(m.step(Event::Removed), [Action::Disarm]);
    assert!(m.is_over());
}

proptest! {
    /// Whatever happens: nothing is started while one is there, nothing is removed that somebody has, and nobody gets
    /// one that is not ready.
    #[test]
    fn there_is_one_at_most(events in prop::collection::vec(0..EVENTS - 1, 0..200)) {
        let mut m = Standby::default();
        // What is true of the machine below.
        let (mut there, mut claimed) = (false, false);
        for n in events {
            // Effects answer only what was asked.
            let fits = match n {
                4 | 5 => m.phase() == Phase::None && !there,
                6..=8 => m.phase() == Phase::Arming,
                12 => matches!(m.phase(), Phase::Removing | Phase::Using),
                13 => m.phase() == Phase::Removing,
                15 => claimed,
                _ => true,
            };
            if !fits {
                continue;
            }
            let ready = m.ready();
            match n {
                4 => there = true,
                5 => (there, claimed) = (true, true),
                7 | 8 | 12 => (there, claimed) = (false, false),
                15 => claimed = false,
                _ => {}
            }
            for action in m.step(event(n)) {
                match action {
                    Action::Start(_) => {
                        prop_assert!(!there, "started beside another one");
                        there = true;
                    }
                    Action::Remove => prop_assert!(there && !claimed, "removed from whoever has it"),
                    Action::Claimed => {
                        prop_assert!(ready && !claimed);
                        claimed = true;
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(m.phase() == Phase::Using, claimed);
        }
    }
}
