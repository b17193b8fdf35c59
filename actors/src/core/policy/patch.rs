//! Policies in layers: defaults, what the configuration says of an instance, what an operator set.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Key, Policy, PolicyError};

/// Settings that differ from the layer below, by name. Values are as [`Policy::get`] writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Patch(BTreeMap<Key, String>);

/// Where the value of a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The defaults (a profile, and the `policy` section of the configuration).
    Default,
    /// The configuration's section on this instance.
    Config,
    /// An operator: `policy set`, `policy import`, an option of `spawn`.
    Operator,
}

impl Source {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::Config => "config",
            Source::Operator => "operator",
        }
    }
}

impl Patch {
    /// Set a value. It is checked by itself and kept in its canonical form.
    pub fn set(&mut self, key: Key, value: &str) -> Result<(), PolicyError> {
        let mut scratch = Policy::default();
        scratch.set(key, value)?;
        self.0.insert(key, scratch.get(key));
        Ok(())
    }

    /// Leave a setting to the layer below. True when it was set.
    pub fn unset(&mut self, key: Key) -> bool {
        self.0.remove(&key).is_some()
    }

    /// What is set, in the order of keys.
    pub fn entries(&self) -> impl Iterator<Item = (Key, &str)> {
        self.0.iter().map(|(k, v)| (*k, v.as_str()))
    }

    /// The value that is set.
    pub fn get(&self, key: Key) -> Option<&str> {
        self.0.get(&key).map(String::as_str)
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The policy below with these settings on top, checked as a whole.
    pub fn apply(&self, below: Policy) -> Result<Policy, PolicyError> {
        let mut policy = below;
        for (key, value) in self.entries() {
            policy.set(key, value)?;
        }
        policy.check()?;
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn seconds_times_switches_and_their_errors() {
        let mut p = Policy::default();
        p.set(Key::HeartbeatTimeout, "60").unwrap();
        assert_eq!(p.heartbeat_timeout, Duration::from_secs(60));
        p.set(Key::HeartbeatTimeout, "0.5").unwrap();
        assert_eq!(p.get(Key::HeartbeatTimeout), "500ms");
        p.set(Key::AutoHeal, "disabled").unwrap();
        assert!(!p.auto_heal);
        for (key, bad) in [
            (Key::HeartbeatTimeout, "1ms"),
            (Key::HeartbeatTimeout, "soon"),
            (Key::HeartbeatTimeout, "-1"),
            (Key::HeartbeatTimeout, "nan"),
            (Key::PulseMisses, "2"),
            (Key::AutoHeal, "maybe"),
            (Key::Vmcore, "all"),
            (Key::AgentSilent, ""),
        ] {
            let before = p;
            let text = p.set(key, bad).unwrap_err().to_string();
            assert!(text.contains(key.name()) && text.contains(key.allowed()), "{text}");
            assert_eq!(p, before);
        }
        let text = "heal".parse::<Key>().unwrap_err().to_string();
        assert!(text.contains("auto-heal") && text.contains("heal;"), "{text}");
    }

    #[test]
    fn layers_and_contradictions() {
        let mut patch = Patch::default();
        patch.set(Key::RestartDelay, "2m").unwrap();
        let error = patch.apply(Policy::default()).unwrap_err();
        assert!(error.to_string().contains("restart-max-delay"), "{error}");
        patch.set(Key::RestartMaxDelay, "10m").unwrap();
        assert_eq!(patch.apply(Policy::default()).unwrap().restart_base, Duration::from_secs(120));
        assert!(patch.unset(Key::RestartDelay) && !patch.unset(Key::RestartDelay));
    }

    proptest! {
        #[test]
        fn every_value_is_read_back_as_it_was_written(ms in 50u64..86_400_000, n in 3u32..100) {
            let mut p = Policy::development();
            p.heartbeat_timeout = Duration::from_millis(ms);
            p.pulse_misses = n;
            let mut q = Policy::default();
            for key in Key::ALL {
                q.set(key, &p.get(key)).unwrap();
            }
            prop_assert_eq!(p, q);
        }

        #[test]
        fn no_text_panics(key in 0usize..Key::ALL.len(), text in ".{0,12}") {
            let mut p = Policy::default();
            let _ = p.set(Key::ALL[key], &text);
        }
    }
}
