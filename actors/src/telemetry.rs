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

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use kmorph_control::views::InstanceState;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

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

pub(crate) fn heartbeat(name: &str, rtt: Duration) {
    histogram!("kmorph_heartbeat_rtt_seconds", "instance" => name.to_owned()).record(rtt.as_secs_f64());
    counter!("kmorph_heartbeats_total", "instance" => name.to_owned(), "result" => "answered").increment(1);
}

pub(crate) fn heartbeats_missed(name: &str, n: u64) {
    counter!("kmorph_heartbeats_total", "instance" => name.to_owned(), "result" => "missed").increment(n);
}

pub(crate) fn pulse_age(name: &str, age: Duration) {
    gauge!("kmorph_pulse_age_seconds", "instance" => name.to_owned()).set(age.as_secs_f64());
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

pub(crate) fn lost(actor: &'static str) {
    counter!("kmorph_messages_lost_total", "actor" => actor).increment(1);
}

pub(crate) fn actor_restart(actor: &str) {
    counter!("kmorph_actor_restarts_total", "actor" => actor.to_owned()).increment(1);
}

/// Messages on their way to the actors of one kind.
#[derive(Debug, Default)]
pub(crate) struct Depth(AtomicI64);

impl Depth {
    pub(crate) fn sent(&self, actor: &'static str) {
        let n = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        gauge!("kmorph_mailbox_depth", "actor" => actor).set(n as f64);
    }

    pub(crate) fn taken(&self, actor: &'static str) {
        let n = self.0.fetch_sub(1, Ordering::Relaxed) - 1;
        gauge!("kmorph_mailbox_depth", "actor" => actor).set(n as f64);
    }

    /// The actor was started anew with an empty mailbox.
    pub(crate) fn clear(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// How late the daemon's own timers come.
#[derive(Debug, Default)]
pub struct Lag {
    max_us: AtomicU64,
}

impl Lag {
    /// A timer came this late.
    pub fn record(&self, lag: Duration) {
        histogram!("kmorph_loop_lag_seconds").record(lag.as_secs_f64());
        let us = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    /// The latest since the start.
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.max_us.load(Ordering::Relaxed))
    }
}
