//! How an instance is watched and recovered.

mod keys;
mod patch;
mod standby;

use std::time::Duration;

use kmp::backoff::Backoff;
use serde::{Deserialize, Serialize};

use super::morph::Dirty;
pub use keys::{Key, PolicyError};
pub use patch::{Patch, Source};
pub use standby::{Image, NoStandby, Standby};

/// Shortest and longest interval between heartbeat requests.
const HEARTBEAT_INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Longest time between two looks at a pulse.
const MAX_SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Whether a dead instance's memory is captured before it is taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capture {
    /// No dump.
    #[default]
    None,
    /// Dump first; a failed dump holds the memory for the operator.
    Required,
    /// Dump first; a failed dump is reported and the memory is taken back.
    BestEffort,
}

/// What is done when an instance's kernel lives and its agent does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentSilent {
    /// The agent's guardian restarts it from inside the instance.
    #[default]
    Restart,
    /// The operator is told; nothing is done.
    Notify,
}

/// Policy of one instance. All times are real time as tokio's clock has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Time without an answer after which a heartbeat counts as missed. Production 1 s, development 60 s.
    pub heartbeat_timeout: Duration,
    /// How often the instance's kernel is asked to beat.
    pub pulse_period: Duration,
    /// Beats that must be missing until the pulse counts as silent.
    pub pulse_misses: u32,
    /// Unanswered probes until a suspicion is a conclusion.
    pub confirm_probes: u32,
    /// Wait after the first probe; it doubles with each.
    pub confirm_base: Duration,
    /// Longest time from the start of a kernel to its first heartbeat.
    pub boot_grace: Duration,
    /// Fence and restart by itself after a confirmed failure.
    pub auto_heal: bool,
    /// When the kernel lives and its agent does not.
    pub agent_silent: AgentSilent,
    /// Whether memory is captured first.
    pub capture: Capture,
    /// Tries to fence until the operator is asked.
    pub fence_tries: u32,
    /// Restarts within `restart_period` until the instance is given up.
    pub restart_intensity: u32,
    /// Window of `restart_intensity`.
    pub restart_period: Duration,
    /// Wait before the second restart in a row; the first is at once, later ones double up to
    /// `restart_max`.
    pub restart_base: Duration,
    /// Longest wait before a restart.
    pub restart_max: Duration,
    /// Longest time a new kernel may take to prove itself in a morph.
    pub morph_timeout: Duration,
    /// After a morph, how long connections of clients to the old kernel may go on.
    pub drain_timeout: Duration,
    /// The last changes of a workload's state are copied while it stands still. That should take no longer.
    pub morph_downtime: Duration,
    /// Rounds of copying before that.
    pub morph_rounds: u32,
    /// What to do when that is not enough.
    pub morph_dirty: Dirty,
    /// A second kernel that is started beside it and waits.
    pub standby: Standby,
}

impl Default for Policy {
    /// Production. A pulse counts as silent after one second, which holds on emulated machines too; on
    /// hardware of its own `pulse_misses` can be 20.
    fn default() -> Self {
        Policy {
            heartbeat_timeout: Duration::from_secs(1),
            pulse_period: Duration::from_millis(10),
            pulse_misses: 100,
            confirm_probes: 3,
            confirm_base: Duration::from_millis(50),
            boot_grace: Duration::from_secs(60),
            auto_heal: true,
            agent_silent: AgentSilent::Restart,
            capture: Capture::None,
            fence_tries: 3,
            restart_intensity: 5,
            restart_period: Duration::from_secs(300),
            restart_base: Duration::from_secs(1),
            restart_max: Duration::from_secs(60),
            morph_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(10),
            morph_downtime: Duration::from_millis(10),
            morph_rounds: 16,
            morph_dirty: Dirty::GiveUp,
            standby: Standby::Off,
        }
    }
}

impl Policy {
    /// For machines that serve: one second. The same as the default.
    pub fn production() -> Policy {
        Policy::default()
    }

    /// For machines that are worked on: a minute, so that a breakpoint or a debugger accuses nobody.
    pub fn development() -> Policy {
        Policy {
            heartbeat_timeout: Duration::from_secs(60),
            pulse_misses: 6000,
            boot_grace: Duration::from_secs(300),
            ..Policy::default()
        }
    }

    /// What the agent's guardian is told: silence in milliseconds after which it restarts the agent;
    /// `u32::MAX` never. Twice the heartbeat timeout, so that a slow answer costs no restart.
    pub fn guardian_ms(&self) -> u32 {
        match self.agent_silent {
            AgentSilent::Notify => u32::MAX,
            AgentSilent::Restart => {
                let ms = self.heartbeat_timeout.saturating_mul(2).as_millis().clamp(500, 3_600_000);
                u32::try_from(ms).unwrap_or(3_600_000)
            }
        }
    }

    /// Time between heartbeat requests: a quarter of the timeout, between 50 ms and 5 s.
    pub fn heartbeat_interval(&self) -> Duration {
        (self.heartbeat_timeout / 4).clamp(HEARTBEAT_INTERVAL.0, HEARTBEAT_INTERVAL.1)
    }

    /// Time without a beat after which the pulse is silent.
    pub fn pulse_silence(&self) -> Duration {
        self.pulse_period.saturating_mul(self.pulse_misses.max(1)).max(Duration::from_millis(1))
    }

    /// Time between two looks at the pulse: a sixteenth of the silence, but not more often than it beats.
    pub fn sample_interval(&self) -> Duration {
        let least = self.pulse_period.clamp(Duration::from_millis(1), MAX_SAMPLE_INTERVAL);
        (self.pulse_silence() / 16).clamp(least, MAX_SAMPLE_INTERVAL)
    }

    /// How late the supervisor may be before it distrusts what it sees: a quarter of the shortest silence
    /// it acts on.
    pub fn lag_limit(&self) -> Duration {
        self.pulse_silence().min(self.heartbeat_timeout) / 4
    }

    /// Waits between probes.
    pub fn confirm_backoff(&self) -> Backoff {
        Backoff {
            base: self.confirm_base,
            factor: 2.0,
            max: self.confirm_base.saturating_mul(8),
            jitter: 0.1,
        }
    }

    /// Waits before restarts in a row, from the second on.
    pub fn restart_backoff(&self) -> Backoff {
        Backoff { base: self.restart_base, factor: 2.0, max: self.restart_max, jitter: 0.1 }
    }

    /// How long an instance that was found running may take to show life again.
    pub fn adopt_grace(&self) -> Duration {
        self.heartbeat_timeout + hang_bound(self)
    }
}

/// Longest time from the moment a kernel hangs to the moment it is declared dead, while the supervisor
/// itself runs on time: silence of the pulse, one look at it, and the probes that confirm it.
pub fn hang_bound(policy: &Policy) -> Duration {
    policy.pulse_silence()
        + policy.sample_interval()
        + policy.confirm_backoff().total(policy.confirm_probes.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn defaults() {
        let p = Policy::default();
        assert_eq!(p.heartbeat_interval(), Duration::from_millis(250));
        assert_eq!(p.pulse_silence(), Duration::from_secs(1));
        assert_eq!(p.sample_interval(), Duration::from_micros(62_500));
        // 1 s of silence + 62.5 ms + probes of 50, 100 and 200 ms.
        assert_eq!(hang_bound(&p), Duration::from_micros(1_412_500));
        let hardware = Policy { pulse_misses: 20, confirm_base: Duration::from_millis(20), ..p };
        assert_eq!(hang_bound(&hardware), Duration::from_micros(352_500));
    }

    #[test]
    fn heartbeat_interval_is_bounded() {
        let with = |ms| Policy { heartbeat_timeout: Duration::from_millis(ms), ..Policy::default() };
        assert_eq!(with(10).heartbeat_interval(), Duration::from_millis(50));
        assert_eq!(with(60_000).heartbeat_interval(), Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn a_silence_is_seen_by_several_looks(period_ms in 0u64..2000, misses in 0u32..500) {
            let p = Policy { pulse_period: Duration::from_millis(period_ms), pulse_misses: misses, ..Policy::default() };
            prop_assert!(p.sample_interval() > Duration::ZERO);
            prop_assert!(p.sample_interval() <= p.pulse_silence().max(Duration::from_millis(1)));
        }
    }
}
