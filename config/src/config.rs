//! What can be configured.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kmorph_actors::{Key, Policy, Settings};
use kmorph_platform::MemoryRange;
use kmorph_platform::partition::PoolSource;

use crate::node::{Node, Value};
use crate::reader::Reader;
use crate::values::{choice, number, pages, path, range, show_range, show_size, show_time, size, time};
use crate::{Paths, groups, policies};

/// What instances run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlatformChoice {
    /// Kernels for root on a machine with the module, processes for others.
    #[default]
    Auto,
    /// Stock kernels, by `kmorph.ko`.
    Partition,
    /// Stand-ins as processes.
    Process,
}

const PLATFORMS: &[(&str, PlatformChoice)] = &[
    ("auto", PlatformChoice::Auto),
    ("partition", PlatformChoice::Partition),
    ("process", PlatformChoice::Process),
];

/// What the defaults of policies are made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Machines that serve.
    #[default]
    Production,
    /// Machines that are worked on.
    Development,
}

const PROFILES: &[(&str, Profile)] =
    &[("production", Profile::Production), ("development", Profile::Development)];

impl Profile {
    /// Its policy.
    pub fn policy(self) -> Policy {
        match self {
            Profile::Production => Policy::production(),
            Profile::Development => Policy::development(),
        }
    }
}

/// Where instances' memory comes from. Without either, from `memmap=` on the kernel command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Ranges reserved at boot.
    pub reserved: Vec<MemoryRange>,
    /// Bytes of memory to take offline at start.
    pub offline: Option<u64>,
}

/// The process platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSection {
    /// Folder of its sockets and records.
    pub dir: PathBuf,
    /// CPUs it pretends to have.
    pub cpus: u32,
    /// Bytes of memory it pretends to have.
    pub memory: u64,
}

/// How much history is kept; the oldest goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct History {
    /// Steps.
    pub keep_steps: u64,
    /// Days; without it only the number of steps counts.
    pub keep_days: Option<u32>,
}

impl Default for History {
    fn default() -> Self {
        History { keep_steps: 100_000, keep_days: None }
    }
}

/// The configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What instances run on.
    pub platform: PlatformChoice,
    /// The process platform.
    pub process: ProcessSection,
    /// Memory pool of the partition platform.
    pub pool: Pool,
    /// The agent binary.
    pub agent: PathBuf,
    /// Module trees, searched in order; each has a folder per kernel release.
    pub modules: Vec<PathBuf>,
    /// Bytes of each instance's vsock area.
    pub vsock_area: u64,
    /// Bytes of pool for the channel between two instances; 0: they get none.
    pub peer_area: u64,
    /// Where kerf keeps definitions.
    pub instances: PathBuf,
    /// Where the journal lies.
    pub state: PathBuf,
    /// Address of the Prometheus endpoint.
    pub metrics: Option<SocketAddr>,
    /// Retention.
    pub history: History,
    /// What the defaults of policies are made for.
    pub profile: Profile,
    /// Policies and groups.
    pub settings: Settings,
    /// How long user space may take to end on `terminate`.
    pub terminate_grace: Duration,
}

const KEYS: &[&str] = &[
    "platform",
    "process",
    "pool",
    "agent",
    "modules",
    "vsock-area",
    "peer-area",
    "instances",
    "state",
    "metrics",
    "history",
    "profile",
    "policy",
    "heartbeat",
    "recovery",
    "policies",
    "groups",
];

/// Keys a reload puts into force; all others need a restart of the daemon.
const RELOADED: &[&str] = &["profile", "policy.", "policies.", "groups.", "history."];

impl Config {
    /// Everything as it is when nothing is said.
    pub fn new(paths: &Paths) -> Config {
        Config {
            platform: PlatformChoice::default(),
            process: ProcessSection { dir: paths.run.join("process"), cpus: 64, memory: 64 << 30 },
            pool: Pool::default(),
            agent: "/usr/lib/kmorph/kmorph-agent".into(),
            modules: vec!["/lib/modules".into()],
            vsock_area: 8 << 20,
            peer_area: 2 << 20,
            instances: paths.instances.clone(),
            state: paths.state.clone(),
            metrics: paths.metrics,
            history: History::default(),
            profile: Profile::default(),
            settings: Settings::default(),
            terminate_grace: Duration::from_secs(5),
        }
    }

    /// The platform's form of `pool`.
    pub fn pool_source(&self) -> PoolSource {
        match (&self.pool.offline, self.pool.reserved.as_slice()) {
            (Some(size), _) => PoolSource::Offline(*size),
            (None, []) => PoolSource::CommandLine,
            (None, ranges) => PoolSource::Reserved(ranges.to_vec()),
        }
    }

    /// Every setting as text, by key.
    pub fn values(&self) -> Vec<(String, String)> {
        let name = |all: &[(&'static str, PlatformChoice)]| {
            all.iter().find(|(_, v)| *v == self.platform).map_or("", |(n, _)| n).to_owned()
        };
        let list = |all: Vec<String>| format!("[{}]", all.join(", "));
        let or_null = |v: Option<String>| v.unwrap_or_else(|| "null".into());
        let mut out = vec![
            ("platform".to_owned(), name(PLATFORMS)),
            ("process.dir".into(), self.process.dir.display().to_string()),
            ("process.cpus".into(), self.process.cpus.to_string()),
            ("process.memory".into(), show_size(self.process.memory)),
            ("pool.reserved".into(), list(self.pool.reserved.iter().map(show_range).collect())),
            ("pool.offline".into(), or_null(self.pool.offline.map(show_size))),
            ("agent".into(), self.agent.display().to_string()),
            ("modules".into(), list(self.modules.iter().map(|p| p.display().to_string()).collect())),
            ("vsock-area".into(), show_size(self.vsock_area)),
            ("peer-area".into(), show_size(self.peer_area)),
            ("instances".into(), self.instances.display().to_string()),
            ("state".into(), self.state.display().to_string()),
            ("metrics".into(), or_null(self.metrics.map(|a| a.to_string()))),
            ("history.keep-steps".into(), self.history.keep_steps.to_string()),
            ("history.keep-days".into(), or_null(self.history.keep_days.map(|n| n.to_string()))),
            ("recovery.terminate-grace".into(), show_time(self.terminate_grace)),
            ("profile".into(), format!("{:?}", self.profile).to_lowercase()),
        ];
        out.extend(Key::ALL.map(|k| (format!("policy.{k}"), self.settings.defaults.get(k))));
        for (instance, patch) in &self.settings.policies {
            out.extend(patch.entries().map(|(k, v)| (format!("policies.{instance}.{k}"), v.to_owned())));
        }
        out.extend(self.settings.groups.iter().map(|g| (format!("groups.{}", g.name), groups::show(g))));
        out
    }

    /// Keys that differ from another configuration and take effect with a restart only.
    pub fn restart_needed(&self, new: &Config) -> Vec<String> {
        let old = self.values();
        new.values()
            .into_iter()
            .filter(|(key, _)| !RELOADED.iter().any(|r| key.starts_with(r)))
            .filter(|(key, value)| old.iter().any(|(k, v)| k == key && v != value))
            .map(|(key, _)| key)
            .collect()
    }

    /// From the merged files.
    pub(crate) fn read(reader: &Reader, root: &Node, paths: &Paths) -> Config {
        let mut c = Config::new(paths);
        let s = reader.section(root, "", KEYS);
        s.set("platform", &mut c.platform, choice(PLATFORMS));
        s.set("agent", &mut c.agent, path);
        s.set_list("modules", &mut c.modules, path);
        s.set("vsock-area", &mut c.vsock_area, pages(1 << 20, 1 << 30, false));
        s.set("peer-area", &mut c.peer_area, pages(1 << 20, 1 << 30, true));
        s.set("instances", &mut c.instances, path);
        s.set("state", &mut c.state, path);
        match s.get("metrics") {
            Some(node) if node.value == Value::Null => {
                reader.note("metrics", &node.place);
                c.metrics = None;
            }
            Some(node) => {
                if let Some(address) = reader.parse(node, "metrics", loopback) {
                    c.metrics = address;
                }
            }
            None => {}
        }
        if let Some(node) = s.get("process") {
            let p = reader.section(node, "process", &["dir", "cpus", "memory"]);
            p.set("dir", &mut c.process.dir, path);
            p.set("cpus", &mut c.process.cpus, number(1, 4096));
            p.set("memory", &mut c.process.memory, pages(1 << 20, 1 << 50, false));
        }
        if let Some(node) = s.get("pool") {
            let p = reader.section(node, "pool", &["reserved", "offline"]);
            p.set_list("reserved", &mut c.pool.reserved, range);
            p.set("offline", &mut c.pool.offline, |t| size(t).map(Some));
            if !c.pool.reserved.is_empty() && c.pool.offline.is_some() {
                reader.problem(p.place, "pool", "give reserved or offline, not both");
            }
        }
        if let Some(node) = s.get("history") {
            let h = reader.section(node, "history", &["keep-steps", "keep-days"]);
            h.set("keep-steps", &mut c.history.keep_steps, number(1000, 100_000_000));
            h.set("keep-days", &mut c.history.keep_days, |t| number(1, 36_500)(t).map(Some));
        }
        s.set("profile", &mut c.profile, choice(PROFILES));
        if let Some(node) = s.get("recovery") {
            let r = reader.section(node, "recovery", policies::RECOVERY_KEYS);
            r.set("terminate-grace", &mut c.terminate_grace, time(Duration::ZERO, Duration::from_secs(3600)));
        }
        c.settings.defaults = policies::defaults(reader, &s, c.profile.policy());
        c.settings.policies = policies::of_instances(reader, s.get("policies"), c.settings.defaults);
        c.settings.groups = groups::read(reader, s.get("groups"));
        c
    }
}

fn loopback(text: &str) -> Result<Option<SocketAddr>, String> {
    match text.parse::<SocketAddr>() {
        Ok(a) if a.ip().is_loopback() => Ok(Some(a)),
        Ok(a) => Err(format!(
            "{a} is not a loopback address; figures are served to this machine only: write 127.0.0.1:9464, or null"
        )),
        Err(_) => Err(format!("{text:?} is not an address; write 127.0.0.1:9464, or null for none")),
    }
}
