//! Policies as text: every setting has a name, a documented range and one way to be read and written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{AgentSilent, Capture, Policy};
use crate::core::morph::Dirty;

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// No such setting.
    #[error("there is no setting {name}; there are {}", Key::names())]
    UnknownKey {
        /// What was asked for.
        name: String,
    },
    /// A value that cannot be read or is out of range.
    #[error("{key}: {value:?} is not possible; allowed: {}", key.allowed())]
    BadValue {
        /// The setting.
        key: Key,
        /// What was given.
        value: String,
    },
    /// Two settings that contradict each other.
    #[error("{0}")]
    Contradiction(String),
}

/// The settings of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// [`Policy::heartbeat_timeout`].
    HeartbeatTimeout,
    /// [`Policy::pulse_period`].
    PulsePeriod,
    /// [`Policy::pulse_misses`].
    PulseMisses,
    /// [`Policy::confirm_probes`].
    ConfirmProbes,
    /// [`Policy::confirm_base`].
    ConfirmDelay,
    /// [`Policy::boot_grace`].
    BootTimeout,
    /// [`Policy::auto_heal`].
    AutoHeal,
    /// [`Policy::agent_silent`].
    AgentSilent,
    /// [`Policy::capture`].
    Vmcore,
    /// [`Policy::fence_tries`].
    FenceTries,
    /// [`Policy::restart_intensity`].
    RestartIntensity,
    /// [`Policy::restart_period`].
    RestartPeriod,
    /// [`Policy::restart_base`].
    RestartDelay,
    /// [`Policy::restart_max`].
    RestartMaxDelay,
    /// [`Policy::morph_timeout`].
    MorphTimeout,
    /// [`Policy::drain_timeout`].
    DrainTimeout,
    /// [`Policy::morph_downtime`].
    MorphDowntime,
    /// [`Policy::morph_rounds`].
    MorphRounds,
    /// [`Policy::morph_dirty`].
    MorphDirty,
    /// [`Policy::standby`].
    Standby,
}

const DAY: u64 = 86_400_000;

impl Key {
    /// Every setting, in the order they are shown.
    pub const ALL: [Key; 20] = [
        Key::HeartbeatTimeout,
        Key::PulsePeriod,
        Key::PulseMisses,
        Key::ConfirmProbes,
        Key::ConfirmDelay,
        Key::BootTimeout,
        Key::AutoHeal,
        Key::AgentSilent,
        Key::Vmcore,
        Key::FenceTries,
        Key::RestartIntensity,
        Key::RestartPeriod,
        Key::RestartDelay,
        Key::RestartMaxDelay,
        Key::MorphTimeout,
        Key::DrainTimeout,
        Key::MorphDowntime,
        Key::MorphRounds,
        Key::MorphDirty,
        Key::Standby,
    ];

    /// Name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Key::HeartbeatTimeout => "heartbeat-timeout",
            Key::PulsePeriod => "pulse-period",
            Key::PulseMisses => "pulse-misses",
            Key::ConfirmProbes => "confirm-probes",
            Key::ConfirmDelay => "confirm-delay",
            Key::BootTimeout => "boot-timeout",
            Key::AutoHeal => "auto-heal",
            Key::AgentSilent => "agent-silent",
            Key::Vmcore => "vmcore",
            Key::FenceTries => "fence-tries",
            Key::RestartIntensity => "restart-intensity",
            Key::RestartPeriod => "restart-period",
            Key::RestartDelay => "restart-delay",
            Key::RestartMaxDelay => "restart-max-delay",
            Key::MorphTimeout => "morph-timeout",
            Key::DrainTimeout => "drain-timeout",
            Key::MorphDowntime => "morph-downtime",
            Key::MorphRounds => "morph-rounds",
            Key::MorphDirty => "morph-dirty",
            Key::Standby => "standby",
        }
    }

    /// What it is for, in one line.
    pub fn help(self) -> &'static str {
        match self {
            Key::HeartbeatTimeout => "no answer of the agent for this long is a missed heartbeat",
            Key::PulsePeriod => {
                "how often the kernel's pulse beats, from its next start on; its silence is reckoned with it at once"
            }
            Key::PulseMisses => "beats that are missing until the pulse counts as silent",
            Key::ConfirmProbes => "unanswered probes until a suspicion is a conclusion",
            Key::ConfirmDelay => "wait after the first probe; it doubles with each",
            Key::BootTimeout => "longest time from the start of a kernel to its first heartbeat",
            Key::AutoHeal => "fence and restart by itself after a confirmed failure",
            Key::AgentSilent => "kernel lives, agent does not: have it restarted from inside, or only tell",
            Key::Vmcore => {
                "capture a dead instance's memory before it is taken back; this release cannot, and required holds it"
            }
            Key::FenceTries => "tries to stop the CPUs until the operator is asked",
            Key::RestartIntensity => "restarts within restart-period until the instance is given up",
            Key::RestartPeriod => "window of restart-intensity",
            Key::RestartDelay => "wait before the second restart in a row; later ones double",
            Key::RestartMaxDelay => "longest wait before a restart",
            Key::MorphTimeout => "longest time a new kernel may take to prove itself in a morph",
            Key::DrainTimeout => "after a morph, how long connections to the old kernel may go on",
            Key::MorphDowntime => {
                "longest time the last copy of a workload's state should take, while it stands still"
            }
            Key::MorphRounds => "rounds of copying before that",
            Key::MorphDirty => {
                "state changes faster than it can be copied: give the morph up, slow the workload down, or accept more downtime"
            }
            Key::Standby => "a second kernel that waits beside it, for a failure or a morph",
        }
    }

    /// Values it takes.
    pub fn allowed(self) -> &'static str {
        match self {
            Key::HeartbeatTimeout => "a time from 50ms to 24h",
            Key::PulsePeriod => "a time from 1ms to 1s",
            Key::PulseMisses => "a number from 3 to 100000",
            Key::ConfirmProbes => "a number from 1 to 20",
            Key::ConfirmDelay => "a time from 1ms to 60s",
            Key::BootTimeout => "a time from 1s to 24h",
            Key::AutoHeal => "enabled, disabled",
            Key::AgentSilent => "restart, notify",
            Key::Vmcore => "none, best-effort, required",
            Key::FenceTries => "a number from 1 to 100",
            Key::RestartIntensity => "a number from 0 to 1000",
            Key::RestartPeriod => "a time from 1s to 24h",
            Key::RestartDelay => "a time from 0s to 1h",
            Key::RestartMaxDelay => "a time from 0s to 24h",
            Key::MorphTimeout => "a time from 1s to 24h",
            Key::DrainTimeout => "a time from 0s to 24h",
            Key::MorphDowntime => "a time from 1ms to 1h",
            Key::MorphRounds => "a number from 1 to 1000",
            Key::MorphDirty => "give-up, throttle, accept",
            Key::Standby => "off, same (the image it runs), or the absolute path of a kernel image",
        }
    }

    fn names() -> String {
        Key::ALL.map(Key::name).join(", ")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Key {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Key, PolicyError> {
        Key::ALL
            .into_iter()
            .find(|k| k.name() == text)
            .ok_or_else(|| PolicyError::UnknownKey { name: text.to_owned() })
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Key, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// A time as people write it; a plain number is seconds.
fn time(text: &str, min_ms: u64, max_ms: u64) -> Option<Duration> {
    let time = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => humantime::parse_duration(text).ok()?,
    };
    (Duration::from_millis(min_ms)..=Duration::from_millis(max_ms)).contains(&time).then_some(time)
}

fn number(text: &str, min: u32, max: u32) -> Option<u32> {
    text.parse().ok().filter(|n| (min..=max).contains(n))
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "enabled" | "true" | "on" | "yes" => Some(true),
        "disabled" | "false" | "off" | "no" => Some(false),
        _ => None,
    }
}

impl Policy {
    /// A setting as text. [`Policy::set`] reads it back to the same value.
    pub fn get(&self, key: Key) -> String {
        let time = |d: Duration| humantime::format_duration(d).to_string();
        match key {
            Key::HeartbeatTimeout => time(self.heartbeat_timeout),
            Key::PulsePeriod => time(self.pulse_period),
            Key::PulseMisses => self.pulse_misses.to_string(),
            Key::ConfirmProbes => self.confirm_probes.to_string(),
            Key::ConfirmDelay => time(self.confirm_base),
            Key::BootTimeout => time(self.boot_grace),
            Key::AutoHeal => if self.auto_heal { "enabled" } else { "disabled" }.into(),
            Key::AgentSilent => match self.agent_silent {
                AgentSilent::Restart => "restart",
                AgentSilent::Notify => "notify",
            }
            .into(),
            Key::Vmcore => match self.capture {
                Capture::None => "none",
                Capture::BestEffort => "best-effort",
                Capture::Required => "required",
            }
            .into(),
            Key::FenceTries => self.fence_tries.to_string(),
            Key::RestartIntensity => self.restart_intensity.to_string(),
            Key::RestartPeriod => time(self.restart_period),
            Key::RestartDelay => time(self.restart_base),
            Key::RestartMaxDelay => time(self.restart_max),
            Key::MorphTimeout => time(self.morph_timeout),
            Key::DrainTimeout => time(self.drain_timeout),
            Key::MorphDowntime => time(self.morph_downtime),
            Key::MorphRounds => self.morph_rounds.to_string(),
            Key::MorphDirty => match self.morph_dirty {
                Dirty::GiveUp => "give-up",
                Dirty::Accept => "accept",
                Dirty::Throttle => "throttle",
            }
            .into(),
            Key::Standby => self.standby.to_string(),
        }
    }

    /// Change one setting. Nothing is changed by an error.
    pub fn set(&mut self, key: Key, text: &str) -> Result<(), PolicyError> {
        let text = text.trim();
        let bad = || PolicyError::BadValue { key, value: text.to_owned() };
        let ranged = |min, max| time(text, min, max).ok_or_else(bad);
        let counted = |min, max| number(text, min, max).ok_or_else(bad);
        match key {
            Key::HeartbeatTimeout => self.heartbeat_timeout = ranged(50, DAY)?,
            Key::PulsePeriod => self.pulse_period = ranged(1, 1000)?,
            Key::PulseMisses => self.pulse_misses = counted(3, 100_000)?,
            Key::ConfirmProbes => self.confirm_probes = counted(1, 20)?,
            Key::ConfirmDelay => self.confirm_base = ranged(1, 60_000)?,
            Key::BootTimeout => self.boot_grace = ranged(1000, DAY)?,
            Key::AutoHeal => self.auto_heal = switch(text).ok_or_else(bad)?,
            Key::AgentSilent => {
                self.agent_silent = match text {
                    "restart" => AgentSilent::Restart,
                    "notify" => AgentSilent::Notify,
                    _ => return Err(bad()),
                }
            }
            Key::Vmcore => {
                self.capture = match text {
                    "none" => Capture::None,
                    "best-effort" => Capture::BestEffort,
                    "required" => Capture::Required,
                    _ => return Err(bad()),
                }
            }
            Key::FenceTries => self.fence_tries = counted(1, 100)?,
            Key::RestartIntensity => self.restart_intensity = counted(0, 1000)?,
            Key::RestartPeriod => self.restart_period = ranged(1000, DAY)?,
            Key::RestartDelay => self.restart_base = ranged(0, 3_600_000)?,
            Key::RestartMaxDelay => self.restart_max = ranged(0, DAY)?,
            Key::MorphTimeout => self.morph_timeout = ranged(1000, DAY)?,
            Key::DrainTimeout => self.drain_timeout = ranged(0, DAY)?,
            Key::MorphDowntime => self.morph_downtime = ranged(1, 3_600_000)?,
            Key::MorphRounds => self.morph_rounds = counted(1, 1000)?,
            Key::MorphDirty => {
                self.morph_dirty = match text {
                    "give-up" => Dirty::GiveUp,
                    "accept" => Dirty::Accept,
                    "throttle" => Dirty::Throttle,
                    _ => return Err(bad()),
                }
            }
            Key::Standby => self.standby = text.parse().map_err(|_| bad())?,
        }
        Ok(())
    }

    /// Whether the settings fit each other.
    pub fn check(&self) -> Result<(), PolicyError> {
        if self.restart_max < self.restart_base {
            return Err(PolicyError::Contradiction(format!(
                "restart-max-delay: {} is less than restart-delay, {}",
                self.get(Key::RestartMaxDelay),
                self.get(Key::RestartDelay)
            )));
        }
        if self.pulse_silence() > Duration::from_millis(DAY) {
            return Err(PolicyError::Contradiction(format!(
                "pulse-misses: {} beats of {} are longer than a day",
                self.pulse_misses,
                self.get(Key::PulsePeriod)
            )));
        }
        Ok(())
    }
}
