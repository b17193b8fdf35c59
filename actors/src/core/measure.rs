//! From looks at a pulse and answers to heartbeats to events of the [health machine](super::health).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kmorph_platform::{KernelState, PulseSample};

use super::health::Event;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Moving,
    Silent,
}

#[derive(Clone, Copy, Debug)]
struct Cpu {
    count: u64,
    moved: Duration,
}

/// Follows the pulse of one life of an instance. The pulse moves while any CPU beats; a single CPU that stops
/// is reported by itself. Times are durations since any fixed moment.
#[derive(Clone, Debug)]
pub struct PulseTracker {
    silence: Duration,
    cpus: BTreeMap<u32, Cpu>,
    stuck: BTreeSet<u32>,
    nonce: u64,
    since: Duration,
    moved: Option<Duration>,
    seen: Seen,
    state: KernelState,
}

impl PulseTracker {
    /// A pulse counts as silent after `silence` without a beat.
    pub fn new(silence: Duration, now: Duration) -> PulseTracker {
        PulseTracker {
            silence,
            cpus: BTreeMap::new(),
            stuck: BTreeSet::new(),
            nonce: 0,
            since: now,
            moved: None,
            seen: Seen::Nothing,
            state: KernelState::Absent,
        }
    }

    /// Count silence from now on: whoever looks was late.
    pub fn remeasure(&mut self, now: Duration) {
        self.since = now;
        self.seen = Seen::Nothing;
        self.stuck.clear();
        for cpu in self.cpus.values_mut() {
            cpu.moved = now;
        }
    }

    /// Another time without a beat counts as silence, from now on.
    pub fn set_silence(&mut self, silence: Duration, now: Duration) {
        self.silence = silence;
        self.remeasure(now);
    }

    /// When it was last seen to move.
    pub fn moved(&self) -> Option<Duration> {
        self.moved
    }

    /// Beats of the slowest CPU.
    pub fn slowest(&self) -> Option<u64> {
        self.cpus.values().map(|c| c.count).min()
    }

    /// One look.
    pub fn look(&mut self, now: Duration, sample: &PulseSample) -> Vec<Event> {
        let mut out = Vec::new();
        if sample.nonce != self.nonce {
            // Another boot of the kernel counts its beats anew.
            self.nonce = sample.nonce;
            self.cpus.clear();
        }
        if sample.state != self.state {
            self.state = sample.state.clone();
            match &sample.state {
                KernelState::Absent => {}
                KernelState::Ready => out.push(Event::KernelReady),
                KernelState::Panicked(reason) => out.push(Event::PanicNotice(reason.clone())),
                KernelState::Parked(how) => out.push(Event::Parked(how.clone())),
                KernelState::Left => out.push(Event::KernelLeft),
            }
        }
        let mut moved = false;
        self.cpus.retain(|n, _| sample.cpus.iter().any(|c| c.number == *n));
        for c in &sample.cpus {
            let cpu = self.cpus.entry(c.number).or_insert(Cpu { count: 0, moved: now });
            if c.count != cpu.count {
                *cpu = Cpu { count: c.count, moved: now };
                self.stuck.remove(&c.number);
                moved = true;
            }
        }
        if moved {
            self.moved = Some(now);
            self.since = now;
            if self.seen != Seen::Moving {
                self.seen = Seen::Moving;
                // After a silence of all, each has its time to beat again.
                for cpu in self.cpus.values_mut() {
                    cpu.moved = now;
                }
                out.push(Event::PulseMoved);
            }
            for (n, cpu) in &self.cpus {
                let age = now.saturating_sub(cpu.moved);
                if age >= self.silence && self.stuck.insert(*n) {
                    out.push(Event::CpuStuck(*n, age));
                }
            }
        } else {
            out.extend(self.silent(now));
        }
        out
    }

    /// A look that was not possible.
    pub fn blind(&mut self, now: Duration) -> Vec<Event> {
        self.silent(now).into_iter().collect()
    }

    fn silent(&mut self, now: Duration) -> Option<Event> {
        let age = now.saturating_sub(self.since);
        (self.seen != Seen::Silent && age >= self.silence).then(|| {
            self.seen = Seen::Silent;
            Event::PulseSilent(age)
        })
    }
}

/// Counts of heartbeats in one life of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BeatStats {
    /// Requests.
    pub sent: u64,
    /// Answers.
    pub received: u64,
    /// Requests without an answer in time.
    pub missed: u64,
    /// Those in a row, up to now.
    pub missed_in_row: u64,
    /// Round trips.
    pub last: Option<Duration>,
    /// Shortest.
    pub min: Option<Duration>,
    /// Longest.
    pub max: Option<Duration>,
    /// Sum, for the mean.
    pub sum: Duration,
}

impl BeatStats {
    /// Mean round trip.
    pub fn mean(&self) -> Option<Duration> {
        let n = u32::try_from(self.received).unwrap_or(u32::MAX);
        (n > 0).then(|| self.sum / n)
    }
}

/// Paces heartbeats and judges their answers.
#[derive(Clone, Debug)]
pub struct BeatTracker {
    interval: Duration,
    timeout: Duration,
    next: Duration,
    serial: u64,
    /// Requests without an answer: serial and when they were sent.
    open: VecDeque<(u64, Duration)>,
    since: Duration,
    answered: Option<Duration>,
    silent: bool,
    stats: BeatStats,
}

impl BeatTracker {
    /// Ask every `interval`; an agent that has not answered for `timeout` is silent.
    pub fn new(interval: Duration, timeout: Duration, now: Duration) -> BeatTracker {
        BeatTracker {
            interval,
            timeout,
            next: now,
            serial: 0,
            open: VecDeque::new(),
            since: now,
            answered: None,
            silent: false,
            stats: BeatStats::default(),
        }
    }

    /// Other times, from now on.
    pub fn set_times(&mut self, interval: Duration, timeout: Duration, now: Duration) {
        (self.interval, self.timeout) = (interval, timeout);
        self.next = self.next.min(now + interval);
        self.remeasure(now);
    }

    /// Count silence from now on.
    pub fn remeasure(&mut self, now: Duration) {
        self.since = now;
        self.silent = false;
        for (_, sent) in &mut self.open {
            *sent = now;
        }
    }

    /// Whether the next regular request is due.
    pub fn due(&self, now: Duration) -> bool {
        now >= self.next
    }

    /// A request goes out; its serial.
    pub fn send(&mut self, now: Duration) -> u64 {
        self.serial += 1;
        self.open.push_back((self.serial, now));
        self.stats.sent += 1;
        self.next = now + self.interval;
        self.serial
    }

    /// An answer came. False for one that is not waited for (any more).
    pub fn answer(&mut self, serial: u64, rtt: Duration, now: Duration) -> bool {
        // A late answer still proves life.
        self.since = now;
        self.silent = false;
        let first = self.answered.is_none();
        self.answered = Some(now);
        let Some(at) = self.open.iter().position(|(s, _)| *s == serial) else { return false };
        self.open.remove(at);
        let s = &mut self.stats;
        if first {
            // What was asked while the kernel started could not be answered and was not missed.
            self.open.clear();
            *s = BeatStats { sent: 1, ..BeatStats::default() };
        }
        s.received += 1;
        s.missed_in_row = 0;
        s.last = Some(rtt);
        s.min = Some(s.min.map_or(rtt, |m| m.min(rtt)));
        s.max = Some(s.max.map_or(rtt, |m| m.max(rtt)));
        s.sum = s.sum.saturating_add(rtt);
        true
    }

    /// Requests that had their time: how many were missed just now, and whether the agent fell silent.
    pub fn tick(&mut self, now: Duration) -> (u64, Option<Event>) {
        let before = self.open.len();
        while self.open.front().is_some_and(|(_, sent)| now.saturating_sub(*sent) >= self.timeout) {
            self.open.pop_front();
        }
        // Before its first answer an agent is not there yet: nothing is missed.
        let missed = if self.answered.is_some() { (before - self.open.len()) as u64 } else { 0 };
        self.stats.missed += missed;
        self.stats.missed_in_row += missed;
        let age = now.saturating_sub(self.since);
        let silent = !self.silent && age >= self.timeout;
        self.silent |= silent;
        (missed, silent.then_some(Event::HeartbeatMissed(age)))
    }

    /// When the last answer came.
    pub fn answered(&self) -> Option<Duration> {
        self.answered
    }

    /// Counts.
    pub fn stats(&self) -> BeatStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use kmorph_platform::CpuPulse;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sample(counts: &[u64]) -> PulseSample {
        let cpus = counts.iter().zip(0..).map(|(count, number)| CpuPulse { number, count: *count }).collect();
        PulseSample { state: KernelState::Ready, nonce: 9, cpus }
    }

    #[test]
    fn a_pulse_is_reported_when_it_changes_and_only_then() {
        let mut p = PulseTracker::new(100 * MS, Duration::ZERO);
        let absent = PulseSample { state: KernelState::Absent, nonce: 0, cpus: vec![] };
        assert_eq!(p.look(50 * MS, &absent), []);
        assert_eq!(p.look(100 * MS, &sample(&[1, 1])), [Event::KernelReady, Event::PulseMoved]);
        assert_eq!(p.look(110 * MS, &sample(&[2, 2])), []);
        assert_eq!(p.look(200 * MS, &sample(&[2, 2])), []);
        assert_eq!(p.look(210 * MS, &sample(&[2, 2])), [Event::PulseSilent(100 * MS)]);
        assert_eq!(p.look(220 * MS, &sample(&[2, 2])), []);
        assert_eq!(p.look(230 * MS, &sample(&[2, 3])), [Event::PulseMoved]);
        assert_eq!((p.moved(), p.slowest()), (Some(230 * MS), Some(2)));
    }

    #[test]
    fn requests_before_the_first_answer_are_not_missed_beats() {
        let mut b = BeatTracker::new(250 * MS, 1000 * MS, Duration::ZERO);
        for n in 0..8u32 {
            b.send(n * 250 * MS);
            b.tick(n * 250 * MS);
        }
        assert_eq!((b.stats().sent, b.stats().missed), (8, 0));
        let serial = b.send(2000 * MS);
        assert!(b.answer(serial, MS, 2001 * MS));
        b.tick(5000 * MS);
        assert_eq!((b.stats().sent, b.stats().received, b.stats().missed), (1, 1, 0));
        let lost = b.send(5000 * MS);
        b.tick(6000 * MS);
        assert_eq!((b.stats().sent, b.stats().missed), (2, 1));
        assert!(!b.answer(lost, MS, 6001 * MS), "late");
    }

    #[test]
    fn one_stuck_cpu_is_not_a_silent_pulse() {
        let mut p = PulseTracker::new(100 * MS, Duration::ZERO);
        p.look(MS, &sample(&[1, 1]));
        let mut events = vec![];
        for t in 2..30u32 {
            events.extend(p.look(10 * MS * t, &sample(&[1, u64::from(t)])));
        }
        assert_eq!(events, [Event::CpuStuck(0, 109 * MS)]);
        // Offline in the instance: no CPU any more.
        assert_eq!(
            p.look(400 * MS, &PulseSample { cpus: sample(&[1, 99]).cpus[1..].to_vec(), ..sample(&[]) }),
            []
        );
        assert_eq!(p.slowest(), Some(99));
    }

    #[test]
    fn states_become_events_once() {
        let mut p = PulseTracker::new(100 * MS, Duration::ZERO);
        let panicked = PulseSample { state: KernelState::Panicked("oops".into()), ..sample(&[5]) };
        assert_eq!(p.look(MS, &panicked), [Event::PanicNotice("oops".into()), Event::PulseMoved]);
        assert_eq!(p.look(2 * MS, &panicked), []);
        let parked = PulseSample { state: KernelState::Parked("halt".into()), ..sample(&[5]) };
        let left = PulseSample { state: KernelState::Left, ..sample(&[5]) };
        assert_eq!(p.look(3 * MS, &parked), [Event::Parked("halt".into())]);
        assert_eq!(p.look(4 * MS, &left), [Event::KernelLeft]);
    }

    #[test]
    fn after_a_pause_silence_counts_anew() {
        let mut p = PulseTracker::new(100 * MS, Duration::ZERO);
        p.look(MS, &sample(&[1]));
        p.remeasure(500 * MS);
        assert_eq!(p.look(500 * MS, &sample(&[1])), []);
        assert_eq!(p.blind(599 * MS), []);
        assert_eq!(p.blind(600 * MS), [Event::PulseSilent(100 * MS)]);
        p.remeasure(700 * MS);
        assert_eq!(p.look(701 * MS, &sample(&[2])), [Event::PulseMoved]);
    }

    #[test]
    fn heartbeats_are_paced_and_missed() {
        let mut b = BeatTracker::new(25 * MS, 100 * MS, Duration::ZERO);
        assert!(b.due(Duration::ZERO));
        let first = b.send(Duration::ZERO);
        assert!(!b.due(24 * MS) && b.due(25 * MS));
        assert!(b.answer(first, 2 * MS, 2 * MS));
        assert!(!b.answer(first, 2 * MS, 2 * MS), "an answer counts once");
        let second = b.send(25 * MS);
        b.send(50 * MS);
        assert_eq!(b.tick(101 * MS), (0, None));
        assert_eq!(b.tick(102 * MS), (0, Some(Event::HeartbeatMissed(100 * MS))));
        assert_eq!(b.tick(150 * MS), (2, None));
        assert!(!b.answer(second, 130 * MS, 155 * MS), "late");
        assert_eq!(
            b.stats(),
            BeatStats {
                sent: 3,
                received: 1,
                missed: 2,
                missed_in_row: 2,
                last: Some(2 * MS),
                min: Some(2 * MS),
                max: Some(2 * MS),
                sum: 2 * MS,
            }
        );
        assert_eq!(b.tick(254 * MS), (0, None));
        assert!(matches!(b.tick(255 * MS).1, Some(Event::HeartbeatMissed(_))), "silent again");
    }

    #[test]
    fn after_a_pause_requests_have_their_time_anew() {
        let mut b = BeatTracker::new(25 * MS, 100 * MS, Duration::ZERO);
        let first = b.send(Duration::ZERO);
        assert!(b.answer(first, MS, MS));
        b.send(25 * MS);
        b.remeasure(500 * MS);
        assert_eq!(b.tick(599 * MS), (0, None));
        assert_eq!(b.tick(600 * MS), (1, Some(Event::HeartbeatMissed(100 * MS))));
    }
}
