//! A daemon that was killed while a thousand stand-ins ran: how long until the next one serves them all.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmorph_platform::process::{Process, ProcessConfig};
use kmorph_platform::{BootRequest, Platform};
use nix::sys::signal::Signal;

use crate::platform::{INCARNATION, spec};
use crate::process::Running;
use crate::{Context, Result, control, row};

const LIMIT: Duration = Duration::from_secs(120);
const ROUNDS: usize = 3;
/// SPECIFICATION.md.
const PROMISE: Duration = Duration::from_secs(10);

/// Measure and print. False when the promise was not kept.
pub fn run(count: u16) -> Result<bool> {
    let home = tempfile::Builder::new().prefix("kmb").tempdir_in("/dev/shm").context("folder in /dev/shm")?;
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start tokio")?;
    let config = settings(home.path(), count)?;
    let measured = match rt.block_on(start(&config, home.path(), count)) {
        Ok(()) => restarts(home.path(), &config, count),
        Err(e) => Err(e),
    };
    // Whatever came of it, nothing runs on.
    rt.block_on(stop(&config))?;
    let (mut times, kept_running) = measured?;
    times.sort();
    row(
        &format!("kill -9 of kmorphd with {count} stand-ins to all served"),
        &format!(
            "p50 {:.2} s, max {:.2} s",
            times[ROUNDS / 2].as_secs_f64(),
            times[ROUNDS - 1].as_secs_f64()
        ),
        &format!("<= {} s, no stand-in touched", PROMISE.as_secs()),
    );
    Ok(kept_running && times[ROUNDS - 1] <= PROMISE)
}

fn settings(home: &Path, count: u16) -> Result<ProcessConfig> {
    let me = std::env::current_exe().context("this program")?;
    let agent: PathBuf = me.with_file_name("kmorph-agent");
    if !agent.is_file() {
        return Err(format!("{} is missing: build kmorph-agent with the same profile", agent.display()));
    }
    std::fs::write(home.join("kernel-6.6.0"), "stands for a kernel").context("kernel")?;
    std::fs::create_dir(home.join("instances")).context("folder")?;
    Ok(ProcessConfig {
        dir: home.join("run"),
        agent,
        cpus: u32::from(count) + 1,
        // A region is aligned to 2 MiB.
        memory: (u64::from(count) + 1) << 21,
    })
}

async fn start(config: &ProcessConfig, home: &Path, count: u16) -> Result<()> {
    let platform = Arc::new(Process::open(config.clone()).await.context("process platform")?);
    let boot = |id| {
        let (platform, kernel) = (platform.clone(), home.join("kernel-6.6.0"));
        async move {
            let request = BootRequest {
                spec: spec(id),
                incarnation: INCARNATION,
                kernel,
                initramfs: None,
                cmdline: String::new(),
                pulse_period: Duration::from_millis(500),
                growth: Default::default(),
            };
            platform.boot(&request).await.map(|_| ())
        }
    };
    futures::future::try_join_all((1..=count).map(boot)).await.context("start stand-ins")?;
    Ok(())
}

async fn stop(config: &ProcessConfig) -> Result<()> {
    let platform = Arc::new(Process::open(config.clone()).await.context("process platform")?);
    let end = |id| {
        let platform = platform.clone();
        async move {
            platform.fence(id, INCARNATION).await?;
            platform.reclaim(id, INCARNATION, true).await
        }
    };
    let all = platform.existing().await.context("what runs")?;
    futures::future::try_join_all(all.into_iter().map(|e| end(e.id))).await.context("stop stand-ins")?;
    Ok(())
}

/// The times, and whether every stand-in was still in its first life at the end.
fn restarts(home: &Path, config: &ProcessConfig, count: u16) -> Result<(Vec<Duration>, bool)> {
    let (file, socket) = (home.join("conf"), home.join("sock"));
    let text = format!(
        "platform: process\nprocess:\n  dir: {run}\n  cpus: {cpus}\n  memory: {memory}\nagent: {agent}\ninstances: {home}/instances\nstate: {home}/state\n\
         metrics: null\npolicy:\n  heartbeat-timeout: 20s\n  pulse-period: 500ms\n  pulse-misses: 40\n",
        run = config.dir.display(),
        cpus = config.cpus,
        memory = config.memory,
        agent = config.agent.display(),
        home = home.display(),
    );
    std::fs::write(&file, text).context("configuration")?;
    let me = std::env::current_exe().context("this program")?;
    let (file, socket_text) = (file.display().to_string(), socket.display().to_string());
    let count_text = count.to_string();
    let args = ["daemon", "stand-ins", &count_text, &file, &socket_text];
    let daemon = || Running::start(&me, &args, &[("KMORPH_LOG", "warn")], &home.join("log"));
    let mut running = daemon()?;
    control::all_healthy(&socket, count, LIMIT)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        running.signal(Signal::SIGKILL)?;
        drop(running);
        let began = Instant::now();
        running = daemon()?;
        control::all_healthy(&socket, count, LIMIT)?;
        times.push(began.elapsed());
    }
    let lives = control::lives(&socket)?;
    running.end()?;
    Ok((times, lives.iter().all(|l| *l == INCARNATION)))
}
