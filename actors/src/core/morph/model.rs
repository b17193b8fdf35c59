//! The machine between two kernels that may die, a journal whose answer may be lost, messages that may be lost, and
//! a daemon that may be killed at any moment and started again: every order of events there is.

use stateright::{Checker, Model, Property};

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Old {
    Serving,
    Frozen,
    /// Told, or made by a fence, never to serve again.
    Retired,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum New {
    None,
    /// It runs and serves nobody.
    Up,
    Active,
    Dead,
}

/// Work under way: given out, or done and not reported yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Work {
    what: Action,
    done: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// Absent while no daemon runs.
    daemon: Option<Morph>,
    /// What the journal has.
    journal: Saved,
    /// The commit record is in it.
    decided: bool,
    /// What the daemon has decided and not written yet.
    unwritten: Option<Saved>,
    /// What it does once that is written.
    next: Option<Action>,
    work: Option<Work>,
    old: Old,
    new: New,
    /// The new kernel was active once.
    served: bool,
    /// The instance was given back.
    returned: bool,
    /// The decision is handed over to the new kernel in this morph.
    hands_over: bool,
    /// The new kernel takes over by itself when it has everything, which it may have from now on.
    armed: bool,
    /// The old kernel's workload is held back.
    held: bool,
    /// The new kernel has CPUs and memory of the old one.
    grown: bool,
    /// Faults that may still happen, and wishes that may still come.
    faults: u8,
    wishes: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Move {
    Wish(Event),
    Timeout,
    /// The journal is written, work begins.
    Write,
    /// Work is done.
    Do,
    /// The new kernel is active, the old one is not retired yet.
    Activate,
    /// The new kernel takes over by itself.
    TakeOver,
    /// The new kernel is gone before it is written down that it took over.
    Abandon,
    /// The new kernel is gone, the old one is not thawed yet.
    Remove,
    /// It is reported.
    Report,
    /// It fails, or its answer is lost and it times out.
    Fail,
    /// The journal did not say whether it wrote the record.
    LoseRecord,
    OldDies,
    NewDies,
    DaemonDies,
    DaemonStarts,
    /// Recovery, which is not this machine's work, starts what died.
    Recover,
}

struct Rules;

/// A workload that is too fast is found out in the second round, and held back in the third.
const LIMITS: Limits = Limits {
    phase: Duration::from_secs(60),
    downtime: Duration::from_millis(5),
    rounds: 3,
    dirty: Dirty::Throttle,
};

impl World {
    fn serving(&self) -> usize {
        usize::from(self.old == Old::Serving) + usize::from(self.new == New::Active)
    }

    /// The answer of work. One that comes after other work was decided on means nothing.
    fn answered(&mut self, event: Event) {
        self.work = None;
        if self.next.is_none() {
            self.feed(event);
        }
    }

    fn feed(&mut self, event: Event) {
        let Some(m) = &mut self.daemon else { return };
        let actions = m.step(event);
        self.obey(actions);
    }

    fn obey(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Journal { .. } => self.unwritten = self.daemon.as_ref().map(Morph::saved),
                Action::Start
                | Action::Negotiate
                | Action::Transfer { .. }
                | Action::Validate { .. }
                | Action::Freeze
                | Action::Withdraw
                | Action::WriteDown
                | Action::Record
                | Action::LookUpRecord
                | Action::Activate
                | Action::GiveBack
                | Action::Grow
                | Action::Undo => self.next = Some(action),
                Action::Arm(_)
                | Action::Disarm
                | Action::Settled(_)
                | Action::Alert(_)
                | Action::Refuse(_) => {}
            }
        }
    }

    /// The daemon sees who is gone, also what happened while there was none.
    fn look(&mut self) {
        if matches!(self.old, Old::Dead) {
            self.feed(Event::OldGone(String::new()));
        }
        if self.new == New::Dead {
            self.feed(Event::NewGone(String::new()));
        }
    }

    /// What work does to the world.
    fn perform(&mut self, what: &Action) {
        match what {
            Action::Start if self.new == New::None => self.new = New::Up,
            Action::Transfer { throttle, .. } => self.held = *throttle > 0 && self.old == Old::Serving,
            Action::Validate { lift: true } => self.held = false,
            // One that stands still is not held back: when it goes on, it goes on unhindered.
            Action::Freeze if self.old == Old::Serving => {
                (self.old, self.held) = (Old::Frozen, false);
                self.armed = self.hands_over && self.new == New::Up;
            }
            Action::Withdraw => {
                self.armed = false;
                // One that did not take over is stopped.
                if self.new == New::Up {
                    self.new = New::Dead;
                }
            }
            Action::Record | Action::WriteDown => {
                self.decided = true;
                // Written together with the record.
                self.journal.phase = Phase::Committing;
            }
            Action::Activate => {
                if self.new == New::Up {
                    (self.new, self.served) = (New::Active, true);
                }
                // The old one is let go when the new one serves.
                if self.new == New::Active || self.old != Old::Frozen {
                    self.retire();
                }
            }
            Action::Grow => self.grown |= self.new == New::Active,
            Action::GiveBack => {
                (self.decided, self.returned) = (false, true);
                // Written together with the second record.
                self.journal.phase = Phase::RollingBack;
            }
            Action::Undo => {
                (self.new, self.armed) = (New::None, false);
                self.held = false;
                if self.old == Old::Frozen {
                    self.old = Old::Serving;
                }
            }
            _ => {}
        }
    }

    fn retire(&mut self) {
        self.held = false;
        if self.old != Old::Dead {
            self.old = Old::Retired;
        }
    }

    fn answer(&self, what: &Action) -> Event {
        match what {
            Action::Start => Event::Ready,
            Action::Negotiate => Event::Agreed,
            // It changes too fast unless it is held back.
            Action::Transfer { throttle, .. } => {
                let took = if *throttle == 0 { Duration::from_secs(1) } else { Duration::ZERO };
                Event::Round(Round { bytes: 1, took, throttled: *throttle })
            }
            Action::Validate { .. } => Event::Valid,
            Action::Freeze if !self.hands_over => Event::Frozen,
            Action::Freeze if self.new == New::Active => Event::Taken,
            Action::Freeze => Event::Failed(String::new()),
            Action::Withdraw if self.new == New::Active => Event::TakenAlready,
            Action::Withdraw => Event::Withdrawn,
            Action::Record | Action::WriteDown => Event::Recorded,
            Action::LookUpRecord if self.decided => Event::Recorded,
            Action::LookUpRecord => Event::NotRecorded(String::new()),
            Action::Activate if self.new == New::Active => Event::Grows,
            Action::Grow if self.grown => Event::Grown(None),
            Action::Grow => Event::Grown(Some(String::new())),
            // Stopped, and never active: the old one has everything.
            Action::Activate if self.old == Old::Frozen && !self.served => Event::NotActivated(String::new()),
            Action::Activate => Event::Failed(String::new()),
            Action::GiveBack => Event::Returned,
            _ => Event::Undone,
        }
    }
}

impl Model for Rules {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        [false, true]
            .map(|hands_over| World {
                daemon: Some(Morph::new(LIMITS)),
                journal: Saved::default(),
                decided: false,
                unwritten: None,
                next: None,
                work: None,
                old: Old::Serving,
                new: New::None,
                served: false,
                returned: false,
                hands_over,
                armed: false,
                held: false,
                grown: false,
                faults: 3,
                wishes: 4,
            })
            .into()
    }

    fn actions(&self, w: &World, moves: &mut Vec<Move>) {
        if let Some(m) = &w.daemon {
            // One morph: a second one begins from the same state with the roles exchanged.
            if w.wishes > 0 && !(w.decided && m.phase() == Phase::Idle) {
                let goals = [Goal::Prepare, Goal::Validate, Goal::Commit];
                moves.extend(goals.map(|g| Move::Wish(Event::Go(g))));
                moves.push(Move::Wish(Event::Cancel(String::new())));
            }
            if w.unwritten.is_some() || w.next.is_some() {
                moves.push(Move::Write);
            }
            if w.faults > 0 && !m.phase().waits() && m.phase() != Phase::Idle {
                moves.push(Move::Timeout);
            }
            if let Some(work) = &w.work {
                // Who waits for the new kernel to take over waits until it did, or cannot any more.
                let waits = work.what == Action::Freeze && w.armed && w.new == New::Up;
                match work.done {
                    true if waits => {}
                    true => moves.push(Move::Report),
                    false => moves.push(Move::Do),
                }
                if !work.done && work.what == Action::WriteDown && w.new == New::Dead {
                    moves.push(Move::Abandon);
                }
                // The new one is active, the old one does not know yet.
                if !work.done && work.what == Action::Activate && w.new == New::Up {
                    moves.push(Move::Activate);
                }
                if !work.done && work.what == Action::Undo && w.new != New::None {
                    moves.push(Move::Remove);
                }
                let certain = matches!(
                    work.what,
                    Action::LookUpRecord
                        | Action::Undo
                        | Action::Activate
                        | Action::GiveBack
                        | Action::Withdraw
                        | Action::WriteDown
                );
                if w.faults > 0 && !certain {
                    moves.push(if work.what == Action::Record { Move::LoseRecord } else { Move::Fail });
                }
            }
            if w.faults > 0 {
                moves.push(Move::DaemonDies);
            }
        } else {
            moves.push(Move::DaemonStarts);
        }
        if w.faults > 0 && matches!(w.old, Old::Serving | Old::Frozen) {
            moves.push(Move::OldDies);
        }
        if w.faults > 0 && matches!(w.new, New::Up | New::Active) {
            moves.push(Move::NewDies);
        }
        if w.armed && w.new == New::Up {
            moves.push(Move::TakeOver);
        }
        let idle = w.daemon.as_ref().is_some_and(|m| m.phase() == Phase::Idle) && w.work.is_none();
        if idle && w.serving() == 0 {
            moves.push(Move::Recover);
        }
    }

    fn next_state(&self, before: &World, step: Move) -> Option<World> {
        let mut w = before.clone();
        let fault = matches!(
            step,
            Move::Timeout | Move::Fail | Move::LoseRecord | Move::OldDies | Move::NewDies | Move::DaemonDies
        );
        w.faults -= u8::from(fault);
        match step {
            Move::Wish(event) => {
                w.wishes -= 1;
                w.feed(event);
            }
            Move::Timeout => w.feed(Event::Timeout),
            Move::Write => {
                if let Some(saved) = w.unwritten.take() {
                    // A record that is there is never written over by an older thought.
                    w.journal = saved;
                }
                if let Some(what) = w.next.take() {
                    // What was under way may still have been done before this: on one connection, in order.
                    w.work = Some(Work { what, done: false });
                }
            }
            Move::Do => {
                let what = w.work.as_ref()?.what.clone();
                w.perform(&what);
                w.work = Some(Work { what, done: true });
            }
            Move::Activate => (w.new, w.served) = (New::Active, true),
            Move::TakeOver => (w.new, w.served) = (New::Active, true),
            Move::Abandon => w.answered(Event::Withdrawn),
            Move::Remove => w.new = New::None,
            Move::Report => {
                let what = w.work.take()?.what;
                let answer = w.answer(&what);
                w.answered(answer);
            }
            Move::Fail => w.answered(Event::Failed(String::new())),
            Move::LoseRecord => w.answered(Event::RecordUnknown),
            Move::OldDies => {
                (w.old, w.held) = (Old::Dead, false);
                w.look();
            }
            Move::NewDies => {
                w.new = New::Dead;
                w.look();
            }
            Move::DaemonDies => {
                (w.daemon, w.unwritten, w.next, w.work) = (None, None, None, None);
                // Its agent sees that the connection ends.
                w.held = false;
            }
            Move::DaemonStarts => {
                let (m, actions) = Morph::resume(LIMITS, w.journal.clone());
                w.daemon = Some(m);
                w.obey(actions);
                w.look();
            }
            Move::Recover if w.decided => w.new = New::Active,
            Move::Recover => w.old = Old::Serving,
        }
        Some(w)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two that serve", |_, w: &World| w.serving() <= 1),
            Property::always("the record is final", |_, w: &World| {
                !w.decided || !matches!(w.old, Old::Serving)
            }),
            Property::always("nobody takes over before it, unless whoever goes on asks", |_, w: &World| {
                let asks = matches!(w.journal.phase, Phase::Freezing | Phase::Withdrawing | Phase::Taken);
                w.decided || w.new != New::Active || (w.armed || w.served) && asks
            }),
            Property::sometimes("a kernel that takes over by itself", |_, w: &World| {
                w.new == New::Active && !w.decided && w.faults == 3
            }),
            Property::sometimes("one that had when the daemon was started anew", |_, w: &World| {
                w.decided && w.faults == 2 && w.armed && w.old == Old::Retired && w.new == New::Active
            }),
            Property::always("it always goes on", |_, w: &World| {
                let Some(m) = &w.daemon else { return true };
                let resting = m.phase() == Phase::Idle || m.phase().waits();
                resting || w.work.is_some() || w.next.is_some()
            }),
            Property::always("at rest the old one serves, or it was decided", |_, w: &World| {
                let Some(m) = &w.daemon else { return true };
                let rest = m.phase() == Phase::Idle && w.work.is_none() && w.next.is_none();
                !rest || w.serving() == 1 || w.old == Old::Dead || matches!(w.new, New::Dead)
            }),
            Property::always("nobody is held back while nothing is done", |_, w: &World| {
                let Some(m) = &w.daemon else { return true };
                let resting = m.phase() == Phase::Idle || m.phase().waits();
                !resting || w.work.is_some() || w.next.is_some() || !w.held
            }),
            Property::sometimes("a workload is held back", |_, w: &World| w.held),
            Property::always("nothing has two owners", |_, w: &World| {
                !w.grown || matches!(w.old, Old::Retired | Old::Dead)
            }),
            Property::sometimes("the new one has what the old one had", |_, w: &World| w.grown),
            Property::sometimes("an instance is given back", |_, w: &World| {
                w.old == Old::Serving && w.new == New::None && w.returned
            }),
            Property::sometimes("a commit", |_, w: &World| w.new == New::Active),
            Property::sometimes("a commit after the daemon died", |_, w: &World| {
                w.new == New::Active && w.faults < 3
            }),
            Property::sometimes("a rollback of a frozen workload", |_, w: &World| {
                w.old == Old::Frozen && w.daemon.as_ref().is_some_and(|m| m.phase() == Phase::RollingBack)
            }),
        ]
    }
}

#[test]
fn every_order_of_events() {
    let checker = Rules.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.unique_state_count() > 1000, "{}", checker.unique_state_count());
}
