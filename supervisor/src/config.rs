//! The configuration file: YAML, every key optional, unknown keys refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kmorph_control::{ErrorKind, OpError};
use kmorph_platform::MemoryRange;
use kmorph_platform::partition::PoolSource;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Where it is looked for when none is named.
pub const DEFAULT: &str = "/etc/kmorph/kmorphd.conf";

/// Bytes, written like `256M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().ok()?;
    let shift = match text[at..].trim() {
        "" => 0,
        "K" | "KiB" | "k" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        parse_size(&text).map(Size).ok_or_else(|| {
            D::Error::custom(format!("{text:?} is not a size; write 256M, 2G or a number of bytes"))
        })
    }
}

/// A time, written like `1s` or `10ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time(pub Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        humantime::parse_duration(&text)
            .map(Time)
            .map_err(|e| D::Error::custom(format!("{text:?} is not a time ({e}); write 10ms, 1s or 2m")))
    }
}

/// A range of memory, written as on a kernel command line: `512M$0x40000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range(pub MemoryRange);

impl<'de> Deserialize<'de> for Range {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let parse = || {
            let (size, base) = text.split_once('$')?;
            let base = match base.trim().strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok()?,
                None => parse_size(base)?,
            };
            let size = parse_size(size)?;
            (size > 0 && base.checked_add(size).is_some()).then_some(MemoryRange { base, size })
        };
        parse().map(Range).ok_or_else(|| {
            D::Error::custom(format!("{text:?} is not a memory range; write size$base, as 512M$0x40000000"))
        })
    }
}

/// Where instances' memory comes from. Without either, from `memmap=` on the kernel command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Pool {
    /// Ranges reserved at boot.
    pub reserved: Vec<Range>,
    /// Memory to take offline at start.
    pub offline: Option<Size>,
}

/// How instances are watched. `spawn` can override the timeouts for one instance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Heartbeat {
    /// No answer for this long: the instance is suspected.
    pub timeout: Time,
    /// Period of the pulse in shared memory.
    pub pulse_period: Time,
    /// A pulse is silent after this many periods without a beat.
    pub pulse_misses: u32,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Heartbeat {
            timeout: Time(Duration::from_secs(1)),
            pulse_period: Time(Duration::from_millis(10)),
            pulse_misses: 100,
        }
    }
}

/// What happens after a confirmed failure.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Recovery {
    /// From a kernel's start to its first heartbeat.
    pub boot_timeout: Time,
    /// How long user space may take to end on `terminate`.
    pub terminate_grace: Time,
    /// So many restarts within `restart_period`; with one more the instance is given up.
    pub restart_intensity: u32,
    /// See `restart_intensity`.
    pub restart_period: Time,
    /// Wait before the second restart in a row (the first is at once); it doubles with each.
    pub restart_delay: Time,
}

impl Default for Recovery {
    fn default() -> Self {
        Recovery {
            boot_timeout: Time(Duration::from_secs(60)),
            terminate_grace: Time(Duration::from_secs(5)),
            restart_intensity: 5,
            restart_period: Time(Duration::from_secs(300)),
            restart_delay: Time(Duration::from_secs(1)),
        }
    }
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Memory pool.
    pub pool: Pool,
    /// The agent binary.
    pub agent: PathBuf,
    /// Module trees, searched in order; each has a folder per kernel release.
    pub modules: Vec<PathBuf>,
    /// Bytes of each instance's vsock area.
    pub vsock_area: Size,
    /// Bytes of pool for the channel between two instances; 0: they get none.
    pub peer_area: Size,
    /// Where kerf keeps definitions.
    pub instances: PathBuf,
    /// Where the journal lies.
    pub state: PathBuf,
    /// Address of the Prometheus endpoint; `null` turns it off.
    pub metrics: Option<SocketAddr>,
    /// Watching.
    pub heartbeat: Heartbeat,
    /// Healing.
    pub recovery: Recovery,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            pool: Pool::default(),
            agent: "/usr/lib/kmorph/kmorph-agent".into(),
            modules: vec!["/lib/modules".into()],
            vsock_area: Size(8 << 20),
            peer_area: Size(2 << 20),
            instances: libkerf::INSTANCES.into(),
            state: "/var/lib/kmorph".into(),
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 9464))),
            heartbeat: Heartbeat::default(),
            recovery: Recovery::default(),
        }
    }
}

impl Config {
    /// Read a file. The default file may be absent, a named one may not.
    pub fn load(path: Option<&Path>) -> Result<Config, OpError> {
        let file = path.unwrap_or(Path::new(DEFAULT));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(e) if path.is_none() && e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Config::default());
            }
            Err(e) => {
                return Err(OpError::new(
                    ErrorKind::NotFound,
                    format!("cannot read {}: {e}", file.display()),
                ));
            }
        };
        Config::parse(&text)
            .map_err(|e| OpError::new(ErrorKind::BadInput, format!("{}: {e}", file.display())))
    }

    fn parse(text: &str) -> Result<Config, String> {
        if text.trim().is_empty() {
            return Ok(Config::default());
        }
        let config: Config = serde_saphyr::from_str(text)
            .map_err(|e| e.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join(" "))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !self.pool.reserved.is_empty() && self.pool.offline.is_some() {
            return Err("pool: give reserved or offline, not both".into());
        }
        let h = &self.heartbeat;
        if h.timeout.0 < Duration::from_millis(50) || h.timeout.0 > Duration::from_secs(86_400) {
            return Err(format!("heartbeat: timeout: {:?} is out of range: 50ms to 24h", h.timeout.0));
        }
        if h.pulse_period.0 < Duration::from_millis(1) || h.pulse_period.0 > Duration::from_secs(1) {
            return Err(format!(
                "heartbeat: pulse-period: {:?} is out of range: 1ms to 1s",
                h.pulse_period.0
            ));
        }
        if !(3..=100_000).contains(&h.pulse_misses) {
            return Err(format!("heartbeat: pulse-misses: {} is out of range: 3 to 100000", h.pulse_misses));
        }
        if self.recovery.boot_timeout.0 < Duration::from_secs(1) {
            return Err(format!("recovery: boot-timeout: {:?} is below 1s", self.recovery.boot_timeout.0));
        }
        if !(1 << 20..=1 << 30).contains(&self.vsock_area.0) || !self.vsock_area.0.is_multiple_of(4096) {
            return Err("vsock-area: give 1M to 1G, in whole pages".into());
        }
        let peer = self.peer_area.0;
        if peer != 0 && (!(1 << 20..=1 << 30).contains(&peer) || !peer.is_multiple_of(4096)) {
            return Err("peer-area: give 0, or 1M to 1G in whole pages".into());
        }
        if let Some(a) = self.metrics
            && !a.ip().is_loopback()
        {
            return Err(format!(
                "metrics: {a} is not a loopback address; figures are served to this machine only"
            ));
        }
        Ok(())
    }

    /// The platform's form of `pool`.
    pub fn pool_source(&self) -> PoolSource {
        match (&self.pool.offline, self.pool.reserved.as_slice()) {
            (Some(size), _) => PoolSource::Offline(size.0),
            (None, []) => PoolSource::CommandLine,
            (None, ranges) => PoolSource::Reserved(ranges.iter().map(|r| r.0).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_a_default_and_can_be_set() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::parse("{}").unwrap(), Config::default());
        let text = "pool:\n  reserved: ['512M$0x40000000', '1G$4G']\nagent: /a\nmodules: [/m, /n]\nvsock-area: 16M\n\
                    heartbeat:\n  timeout: 60s\n  pulse-period: 20ms\n  pulse-misses: 50\nrecovery:\n  boot-timeout: 30s\nmetrics: null\n";
        let c = Config::parse(text).unwrap();
        assert_eq!(
            c.pool_source(),
            PoolSource::Reserved(vec![
                MemoryRange { base: 0x4000_0000, size: 512 << 20 },
                MemoryRange { base: 4 << 30, size: 1 << 30 }
            ])
        );
        assert_eq!(c.heartbeat.timeout.0, Duration::from_secs(60));
        assert_eq!((c.vsock_area.0, c.metrics), (16 << 20, None));
        assert_eq!(
            Config::parse("pool:\n  offline: 256M\n").unwrap().pool_source(),
            PoolSource::Offline(256 << 20)
        );
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (text, words) in [
            ("heartbeat:\n  timeuot: 5s\n", vec!["timeuot", "timeout", "2"]),
            ("pool:\n  reserved: yes please\n", vec!["2"]),
            ("pool:\n  offline: lots\n", vec!["256M"]),
            ("pool:\n  offline: 1M\n  reserved: ['64M$1G']\n", vec!["not both"]),
            ("heartbeat:\n  timeout: 1ms\n", vec!["heartbeat", "timeout", "50ms"]),
            ("metrics: 0.0.0.0:1\n", vec!["loopback"]),
            ("pool: [", vec!["1"]),
        ] {
            let e = Config::parse(text).unwrap_err();
            for w in words {
                assert!(e.contains(w), "{text:?}: {w:?} is not in {e}");
            }
        }
    }
}
