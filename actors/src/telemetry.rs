//! Metrics of the tree, in one place.
//!
//! | name | kind | unit | labels |
//! | --- | --- | --- | --- |
//! | `kmorph_heartbeat_rtt_seconds` | histogram | seconds | instance |
//! | `kmorph_heartbeats_total` | counter | | instance, result: answered, missed |
//! | `kmorph_pulse_age_seconds` | gauge | seconds | instance |
//! | `kmorph_instance_state` | gauge | 1 for the state it is in | instance, state |
//! | `kmorph_recoveries_total` | counter | | instance, result: recovered, failed |
//! | `kmorph_recovery_steps_total` | counter | | phase |
//! | `kmorph_recovery_seconds` | histogram | seconds from first notice to service | instance |
//! | `kmorph_loop_lag_seconds` | histogram | seconds a timer of the daemon came late | |
//! | `kmorph_mailbox_depth` | gauge | messages | actor |
//! | `kmorph_messages_lost_total` | counter | messages to an actor that was not there | actor |
//! | `kmorph_actor_restarts_total` | counter | | actor |
//! | `kmorph_standby_ready` | gauge | 1 while its standby can be used | instance |
//! | `kmorph_standby_used_total` | counter | | instance, for: recovery, morph |

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use kmorph_control::views::InstanceState;
use metrics::{
    Counter, Gauge, Histogram, SharedString, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

/// Describe every metric to the recorder that is installed.
pub fn describe() {
    use metrics::Unit::{Count, Seconds};
    describe_histogram!("kmorph_heartbeat_rtt_seconds", Seconds, "Round trip of a heartbeat");
    describe_counter!("kmorph_heartbeats_total", Count, "Heartbeats by result");
    describe_gauge!("kmorph_pulse_age_seconds", Seconds, "Time since the kernel's pulse last moved");
    describe_gauge!("kmorph_instance_state", Count, "1 for the state an instance is in, 0 for the others");
    describe_counter!("kmorph_recoveries_total", Count, "Recoveries by result");
    describe_counter!("kmorph_recovery_steps_total", Count, "Steps of recoveries by phase");
    describe_histogram!("kmorph_recovery_seconds", Seconds, "From the first notice of a failure to service");
    describe_histogram!("kmorph_loop_lag_seconds", Seconds, "How late timers of the daemon came");
    describe_gauge!("kmorph_mailbox_depth", Count, "Messages waiting for an actor");
    describe_counter!("kmorph_messages_lost_total", Count, "Messages to an actor that was not there");
    describe_counter!("kmorph_actor_restarts_total", Count, "Actors started again by their supervisor");
    describe_gauge!("kmorph_standby_ready", Count, "1 while the standby of an instance can be used");
    describe_counter!("kmorph_standby_used_total", Count, "Standbys that were used, by what for");
}

/// Every state an instance can show.
const STATES: [InstanceState; 9] = [
    InstanceState::Defined,
    InstanceState::Starting,
    InstanceState::Healthy,
    InstanceState::Suspect,
    InstanceState::AgentSilent,
    InstanceState::Recovering,
    InstanceState::Stopped,
    InstanceState::PartialFence,
    InstanceState::Degraded,
];

pub(crate) fn instance_state(name: &str, state: InstanceState) {
    for s in STATES {
        gauge!("kmorph_instance_state", "instance" => name.to_owned(), "state" => s.to_string())
            .set(if s == state { 1.0 } else { 0.0 });
    }
}

/// What a heartbeat actor measures; found once, because it is used with every beat.
pub(crate) struct Beats {
    rtt: Histogram,
    answered: Counter,
    missed: Counter,
    pulse_age: Gauge,
}

impl Beats {
    /// Of an instance.
    pub(crate) fn of(name: &str) -> Beats {
        let name = SharedString::from(name.to_owned());
        let total =
            |result| counter!("kmorph_heartbeats_total", "instance" => name.clone(), "result" => result);
        Beats {
            rtt: histogram!("kmorph_heartbeat_rtt_seconds", "instance" => name.clone()),
            answered: total("answered"),
            missed: total("missed"),
            pulse_age: gauge!("kmorph_pulse_age_seconds", "instance" => name.clone()),
        }
    }

    pub(crate) fn answered(&self, rtt: Duration) {
        self.rtt.record(rtt.as_secs_f64());
        self.answered.increment(1);
    }

    pub(crate) fn missed(&self, n: u64) {
        self.missed.increment(n);
    }

    pub(crate) fn pulse_age(&self, age: Duration) {
        self.pulse_age.set(age.as_secs_f64());
    }
}

pub(crate) fn recovery_step(phase: &'static str) {
    counter!("kmorph_recovery_steps_total", "phase" => phase).increment(1);
}

pub(crate) fn recovery_end(name: &str, recovered: bool, took: Duration) {
    let result = if recovered { "recovered" } else { "failed" };
    counter!("kmorph_recoveries_total", "instance" => name.to_owned(), "result" => result).increment(1);
    if recovered {
        histogram!("kmorph_recovery_seconds", "instance" => name.to_owned()).record(took.as_secs_f64());
    }
}

pub(crate) fn standby_ready(name: &str, ready: bool) {
    gauge!("kmorph_standby_ready", "instance" => name.to_owned()).set(if ready { 1.0 } else { 0.0 });
}

pub(crate) fn standby_used(name: &str, what_for: &'static str) {
    counter!("kmorph_standby_used_total", "instance" => name.to_owned(), "for" => what_for).increment(1);
}

pub(crate) fn lost(actor: &'static str) {
    counter!("kmorph_messages_lost_total", "actor" => actor).increment(1);
}

pub(crate) fn actor_restart(actor: &str) {
    counter!("kmorph_actor_restarts_total", "actor" => actor.to_owned()).increment(1);
}

/// Messages on their way to an actor, shown as part of the sum of all actors of its kind.
pub(crate) struct Depth {
    waiting: AtomicI64,
    all: Gauge,
}

impl Depth {
    /// Of an actor of a kind.
    pub(crate) fn of(kind: &'static str) -> Depth {
        Depth { waiting: AtomicI64::new(0), all: gauge!("kmorph_mailbox_depth", "actor" => kind) }
    }

    pub(crate) fn sent(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.all.increment(1.0);
    }

    pub(crate) fn taken(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.all.decrement(1.0);
    }

    /// The actor was started anew with an empty mailbox.
    pub(crate) fn clear(&self) {
        self.all.decrement(self.waiting.swap(0, Ordering::Relaxed) as f64);
    }
}

/// Buckets of [`Lag`]: four for each power of two of microseconds, up to more than an hour.
const LAGS: usize = 4 * 33;

/// Quantiles are of the last one to two of these.
const WINDOW: Duration = Duration::from_secs(10);

/// How late the daemon's own timers come.
#[derive(Debug)]
pub struct Lag {
    max_us: AtomicU64,
    /// Counts of this window and the one before, by the parity of its number.
    counts: [[AtomicU64; LAGS]; 2],
    window: AtomicU64,
    histogram: Histogram,
}

impl Default for Lag {
    fn default() -> Self {
        Lag {
            max_us: AtomicU64::new(0),
            counts: [const { [const { AtomicU64::new(0) }; LAGS] }; 2],
            window: AtomicU64::new(0),
            histogram: histogram!("kmorph_loop_lag_seconds"),
        }
    }
}

impl Lag {
    /// A timer came this late; `now` is the time since the tree started.
    pub fn record(&self, lag: Duration, now: Duration) {
        self.histogram.record(lag.as_secs_f64());
        let us = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.max_us.fetch_max(us, Ordering::Relaxed);
        self.counts[self.turn(now)][bucket(us)].fetch_add(1, Ordering::Relaxed);
    }

    /// The latest since the start.
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.max_us.load(Ordering::Relaxed))
    }

    /// What `share` of the timers of the last ten to twenty seconds were not later than, a quarter too high
    /// at most.
    pub fn quantile(&self, share: f64, now: Duration) -> Duration {
        self.turn(now);
        let [a, b] = self.counts.each_ref().map(|w| w.each_ref().map(|c| c.load(Ordering::Relaxed)));
        let counts: Vec<u64> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        let wanted = counts.iter().sum::<u64>() as f64 * share;
        let mut below = 0;
        for (n, count) in counts.iter().enumerate() {
            below += count;
            if below > 0 && below as f64 >= wanted {
                return Duration::from_micros(bucket_end(n)).min(self.max());
            }
        }
        Duration::ZERO
    }

    /// Which counts are in use; those of a window that was not looked at are forgotten. A count of another thread
    /// that falls between is lost, which no quantile shows.
    fn turn(&self, now: Duration) -> usize {
        let window = (now.as_secs() / WINDOW.as_secs().max(1)).max(self.window.load(Ordering::Relaxed));
        let before = self.window.fetch_max(window, Ordering::Relaxed);
        for stale in (before + 1..=window).rev().take(2) {
            for count in &self.counts[(stale % 2) as usize] {
                count.store(0, Ordering::Relaxed);
            }
        }
        (window % 2) as usize
    }
}

/// The bucket of a number: by its highest bit and the two below it.
fn bucket(us: u64) -> usize {
    if us < 4 {
        return us as usize;
    }
    let high = us.ilog2();
    let quarter = (us >> (high - 2)) & 3;
    (4 * (high as usize - 1) + quarter as usize).min(LAGS - 1)
}

/// The largest number of a bucket.
fn bucket_end(n: usize) -> u64 {
    if n < 4 {
        return n as u64;
    }
    let (high, quarter) = (n as u64 / 4 + 1, n as u64 % 4);
    (1 << high) + ((quarter + 1) << (high - 2)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_the_bucket_that_says_so() {
        for us in (0..5000).chain([1 << 20, (1 << 30) + 7, u32::MAX.into()]) {
            let n = bucket(us);
            assert!(us <= bucket_end(n), "{us} in {n}");
            assert!(n == 0 || us > bucket_end(n - 1), "{us} in {n}");
            assert!(bucket_end(n) as f64 <= 1.25 * us as f64 + 1.0, "{us} in {n}");
        }
        assert_eq!(bucket(u64::MAX), LAGS - 1);
    }

    #[test]
    fn quantiles_of_what_was_recorded_lately() {
        let lag = Lag::default();
        let at = Duration::from_secs;
        assert_eq!(lag.quantile(0.99, at(0)), Duration::ZERO);
        for us in 1..=1000 {
            lag.record(Duration::from_micros(us), at(us / 100));
        }
        let p50 = lag.quantile(0.5, at(12)).as_micros();
        assert!((500..=625).contains(&p50), "{p50}");
        assert_eq!(lag.quantile(1.0, at(12)), Duration::from_micros(1000));
        // Only the last window and this one count.
        lag.record(Duration::from_micros(3), at(25));
        assert_eq!(lag.quantile(0.5, at(29)), Duration::from_micros(3));
        assert_eq!(lag.quantile(0.5, at(39)), Duration::from_micros(3));
        assert_eq!(lag.quantile(0.5, at(40)), Duration::ZERO);
        assert_eq!(lag.max(), Duration::from_micros(1000));
    }
}
