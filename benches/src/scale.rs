//! Ten thousand instances that beat once a second: kmorphd and Erlang/OTP in turn, against the same farm.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::{Running, Usage};
use crate::{Context, Result, control, row};

/// Until everything runs that is to be measured.
const COMES_UP: Duration = Duration::from_secs(120);
/// Between that and the measurement.
const SETTLE: Duration = Duration::from_secs(5);
/// SPECIFICATION.md: so much less CPU time than Erlang/OTP as it comes, and than one that was tuned for this job.
const CHEAPER: [f64; 2] = [1.5, 1.0];
/// SPECIFICATION.md: private memory of kmorphd for each instance.
const MEMORY_EACH: f64 = 32.0 * 1024.0;
/// SPECIFICATION.md.
const LAG: Duration = Duration::from_millis(20);

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Share of one CPU, 1 is all of it.
    cpu: f64,
    /// Bytes of private memory.
    memory: u64,
    /// Heartbeats answered a second.
    beats: f64,
    /// How late timers came, 99th percentile.
    lag: Duration,
}

struct Bench {
    dir: PathBuf,
    farms: Vec<Running>,
    count: u16,
    seconds: u64,
}

/// Measure both in turn and print the table. False when a promise was not kept.
pub fn run(count: u16, seconds: u64, rounds: u32) -> Result<bool> {
    let home = tempfile::Builder::new().prefix("kmb").tempdir_in("/dev/shm").context("folder in /dev/shm")?;
    let dir = home.path().to_path_buf();
    std::fs::create_dir(dir.join("farm")).context("folder")?;
    let me = std::env::current_exe().context("this program")?;
    let farm_dir = dir.join("farm").display().to_string();
    let half = count / 2;
    let mut farms = Vec::new();
    // Two, because a process may not have enough descriptors for all.
    for (first, count) in [(1, half), (half + 1, count - half)] {
        let args = ["farm", &farm_dir, &first.to_string(), &count.to_string()];
        let farm = Running::start(&me, &args, &[], &dir.join(format!("farm{first}.log")))?;
        farm.line("ready", COMES_UP)?;
        farms.push(farm);
    }
    let bench = Bench { dir, farms, count, seconds };
    let (mut ours, mut theirs) = (Vec::new(), [Vec::new(), Vec::new()]);
    let mut control = None;
    for round in 0..rounds {
        let (daemon, socket) = bench.daemon(&me, round)?;
        control::all_healthy(&socket, count, COMES_UP)?;
        ours.push(bench.measure(&daemon, || control::lag(&socket))?);
        if round + 1 == rounds {
            control = Some(control::measure(&socket, count)?);
        }
        daemon.end()?;
        for (plain, measured) in [(true, 0), (false, 1)] {
            let erlang = bench.erlang(plain)?;
            theirs[measured].push(bench.measure(&erlang, || {
                let line = erlang.latest("beats", COMES_UP)?;
                let us = line.split_whitespace().nth(2).and_then(|w| w.parse().ok());
                us.map(Duration::from_micros).ok_or_else(|| format!("beats {line:?}: no lag"))
            })?);
            erlang.end()?;
        }
    }
    let mut kept = bench.table(&ours, &theirs);
    if let Some(control) = control {
        kept &= control.table(count);
    }
    for farm in bench.farms {
        farm.end()?;
    }
    Ok(kept)
}

impl Bench {
    /// kmorphd over the farm, with a policy of one heartbeat and one look at the pulse a second.
    fn daemon(&self, me: &Path, round: u32) -> Result<(Running, PathBuf)> {
        let dir = self.dir.join(format!("d{round}"));
        std::fs::create_dir_all(dir.join("instances")).context("folder")?;
        let (config, socket) = (dir.join("conf"), dir.join("sock"));
        let text = format!(
            "platform: process\nprocess:\n  dir: {0}/run\nagent: /bin/true\ninstances: {0}/instances\nstate: {0}/state\n\
             metrics: null\npolicy:\n  heartbeat-timeout: 4s\n  pulse-period: 1s\n  pulse-misses: 16\n",
            dir.display()
        );
        std::fs::write(&config, text).context("configuration")?;
        let farm = self.dir.join("farm");
        let args = ["daemon", &text_of(&farm), &self.count.to_string(), &text_of(&config), &text_of(&socket)];
        // One thread, as the Erlang program that was tuned has one: a second mostly wakes the first.
        let env = [("KMORPH_LOG", "warn"), ("TOKIO_WORKER_THREADS", "1")];
        let daemon = Running::start(me, &args, &env, &dir.join("log"))?;
        Ok((daemon, socket))
    }

    fn erlang(&self, plain: bool) -> Result<Running> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("erlang/run.sh");
        let args = [text_of(&self.dir.join("farm")), self.count.to_string()];
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let build = text_of(&self.dir.join("erlang"));
        let env =
            [("KMORPH_BENCH_BUILD", build.as_str()), ("KMORPH_BENCH_PLAIN", if plain { "1" } else { "" })];
        let erlang = Running::start(&script, &args, &env, &self.dir.join("erlang.log"))?;
        erlang.line("ready", COMES_UP)?;
        Ok(erlang)
    }

    fn measure(&self, what: &Running, lag: impl Fn() -> Result<Duration>) -> Result<Measured> {
        std::thread::sleep(SETTLE);
        let (began, answered, before) = (Instant::now(), self.answered()?, what.usage()?);
        std::thread::sleep(Duration::from_secs(self.seconds));
        let (took, after, now): (f64, Usage, u64) =
            (began.elapsed().as_secs_f64(), what.usage()?, self.answered()?);
        let beats = (now - answered) as f64 / took;
        // A second's line may fall on this or on that side of an end.
        if (beats - f64::from(self.count)).abs() > 0.15 * f64::from(self.count) {
            return Err(format!("{beats:.0} heartbeats a second instead of {}", self.count));
        }
        let cpu = (after.cpu - before.cpu).as_secs_f64() / took;
        Ok(Measured { cpu, memory: after.memory, beats, lag: lag()? })
    }

    fn answered(&self) -> Result<u64> {
        let mut sum = 0;
        for farm in &self.farms {
            let line = farm.latest("answered", COMES_UP)?;
            sum += line.parse::<u64>().context(&line)?;
        }
        Ok(sum)
    }

    fn table(&self, ours: &[Measured], theirs: &[Vec<Measured>; 2]) -> bool {
        println!("{} instances, one heartbeat a second each, {} s", self.count, self.seconds);
        let names = ["kmorphd", "Erlang/OTP as it comes", "Erlang/OTP tuned"];
        for (name, all) in names.into_iter().zip([ours, &theirs[0], &theirs[1]]) {
            for m in all {
                let each = m.memory as f64 / f64::from(self.count) / 1024.0;
                row(
                    name,
                    &format!("{:.1} % of a CPU, {each:.1} KiB each", m.cpu * 100.0),
                    &format!(
                        "{:.0} beats/s, timers late by {:.2} ms (p99)",
                        m.beats,
                        m.lag.as_secs_f64() * 1e3
                    ),
                );
            }
        }
        let best = |all: &[Measured], of: fn(&Measured) -> f64| all.iter().map(of).fold(f64::MAX, f64::min);
        let mut kept = true;
        for ((name, theirs), promise) in names[1..].iter().zip(theirs).zip(CHEAPER) {
            let cpu = best(theirs, |m| m.cpu) / best(ours, |m| m.cpu);
            kept &= cpu >= promise;
            row(&format!("CPU time, {name} to kmorphd"), &format!("{cpu:.2}x"), &format!(">= {promise}x"));
            let memory = best(theirs, |m| m.memory as f64) / best(ours, |m| m.memory as f64);
            row(&format!("memory, {name} to kmorphd"), &format!("{memory:.2}x"), "");
        }
        let each = best(ours, |m| m.memory as f64) / f64::from(self.count);
        let promise = format!("<= {:.0} KiB", MEMORY_EACH / 1024.0);
        row("memory of kmorphd for an instance", &format!("{:.1} KiB", each / 1024.0), &promise);
        let lag = best(ours, |m| m.lag.as_secs_f64());
        row("its timers are late by (p99)", &format!("{:.2} ms", lag * 1e3), &format!("<= {LAG:?}"));
        kept && each <= MEMORY_EACH && lag <= LAG.as_secs_f64()
    }
}

fn text_of(path: &Path) -> String {
    path.display().to_string()
}
