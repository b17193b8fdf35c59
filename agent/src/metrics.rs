//! What the agent measures: CPU, memory, pressure, and how long a small write takes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kmp::message::{CpuMetrics, IoMetrics, MemoryMetrics, Metrics};
use tokio::time::Instant;

/// CPU time of all CPUs, in ticks: all and idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuTimes {
    all: u64,
    idle: u64,
    cpus: u32,
}

fn parse_stat(text: &str) -> CpuTimes {
    let mut times = CpuTimes::default();
    for line in text.lines().filter(|l| l.starts_with("cpu")) {
        let mut words = line.split_ascii_whitespace();
        if words.next() == Some("cpu") {
            // user nice system idle iowait irq softirq steal; guest times are part of user.
            let v: Vec<u64> = words.take(8).filter_map(|w| w.parse().ok()).collect();
            times.all = v.iter().sum();
            times.idle = v.get(3).copied().unwrap_or(0) + v.get(4).copied().unwrap_or(0);
        } else {
            times.cpus += 1;
        }
    }
    times
}

fn busy_percent(before: CpuTimes, now: CpuTimes) -> f64 {
    let all = now.all.saturating_sub(before.all);
    let idle = now.idle.saturating_sub(before.idle).min(all);
    if all == 0 { 0.0 } else { (all - idle) as f64 * 100.0 / all as f64 }
}

fn parse_meminfo(text: &str) -> (u64, u64) {
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|v| v.split_ascii_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
            .saturating_mul(1024)
    };
    (field("MemTotal"), field("MemAvailable"))
}

/// `some avg10=` of a pressure file (Documentation/accounting/psi.rst).
fn parse_pressure(text: &str) -> Option<f64> {
    text.lines()
        .find(|l| l.starts_with("some"))?
        .split_ascii_whitespace()
        .find_map(|w| w.strip_prefix("avg10=")?.parse().ok())
}

/// Takes the measurements.
pub struct Sampler {
    proc: PathBuf,
    probe: Option<File>,
    before: CpuTimes,
}

impl Sampler {
    /// `probe` is a file that small writes are timed on; it stays open, so it may be deleted later.
    pub fn new(proc: &Path, probe: &Path) -> Sampler {
        let probe = File::options().create(true).truncate(true).write(true).open(probe).ok();
        let mut s = Sampler { proc: proc.to_path_buf(), probe, before: CpuTimes::default() };
        s.before = parse_stat(&s.read("stat"));
        s
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.proc.join(file)).unwrap_or_default()
    }

    fn pressure(&self, what: &str) -> Option<f64> {
        parse_pressure(&self.read(&format!("pressure/{what}")))
    }

    fn probe(&self) -> Option<Duration> {
        let file = self.probe.as_ref()?;
        let began = Instant::now();
        file.write_all_at(&[0x5a; 512], 0).ok()?;
        file.sync_data().ok()?;
        Some(began.elapsed())
    }

    /// Measure. CPU load is the share since the call before.
    pub fn sample(&mut self) -> Metrics {
        let now = parse_stat(&self.read("stat"));
        let busy = busy_percent(self.before, now);
        self.before = now;
        let load1 =
            self.read("loadavg").split_ascii_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0.0);
        let (total, available) = parse_meminfo(&self.read("meminfo"));
        Metrics {
            cpu: Some(CpuMetrics {
                online: now.cpus,
                busy_percent: busy,
                load1,
                pressure: self.pressure("cpu"),
            }),
            memory: Some(MemoryMetrics { total, available, pressure: self.pressure("memory") }),
            io: self
                .probe()
                .map(|t| IoMetrics { probe_us: t.as_micros() as u64, pressure: self.pressure("io") }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "cpu  10 0 20 60 10 0 0 0 5 0\ncpu0 5 0 10 30 5 0 0 0 0 0\ncpu1 5 0 10 30 5 0 0 0 0 0\nintr 5\n";

    #[test]
    fn cpu_share_is_what_was_not_idle() {
        let a = parse_stat(STAT);
        assert_eq!(a, CpuTimes { all: 100, idle: 70, cpus: 2 });
        let b = CpuTimes { all: 200, idle: 95, cpus: 2 };
        assert_eq!(busy_percent(a, b), 75.0);
        assert_eq!(busy_percent(b, b), 0.0);
        assert_eq!(busy_percent(b, a), 0.0);
    }

    #[test]
    fn memory_and_pressure() {
        let text = "MemTotal:         226972 kB\nMemFree: 1 kB\nMemAvailable:     200000 kB\n";
        assert_eq!(parse_meminfo(text), (226_972 * 1024, 200_000 * 1024));
        assert_eq!(parse_meminfo("nonsense"), (0, 0));
        let psi =
            "some avg10=1.25 avg60=0.00 avg300=0.00 total=7\nfull avg10=9.00 avg60=0 avg300=0 total=0\n";
        assert_eq!(parse_pressure(psi), Some(1.25));
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn samples_this_machine() {
        let d = tempfile::tempdir().unwrap();
        let mut s = Sampler::new(Path::new("/proc"), &d.path().join("probe"));
        let m = s.sample();
        assert!(m.cpu.unwrap().online >= 1);
        let memory = m.memory.unwrap();
        assert!(memory.total > 0 && memory.available <= memory.total);
        assert!(m.io.is_some());
    }
}
