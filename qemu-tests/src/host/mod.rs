//! The host side: images, machines, results.

mod accel;
mod cache;
mod image;
mod machine;

use std::time::Duration;

use tokio::time::Instant;

use crate::Result;
use crate::scenarios::{self, Scenario};

pub use cache::Cache;
pub use machine::{EMULATOR_CRASH, MachineSpec, RESULT, STORY, STUCK};

/// Build images for all scenarios.
pub fn build() -> Result<()> {
    let cache = Cache::open()?;
    image::primary(&cache, "6.1")?;
    image::primary(&cache, "6.12").map(|_| ())
}

fn scenario(name: &str) -> Result<&'static Scenario> {
    scenarios::ALL
        .iter()
        .copied()
        .find(|s| s.name == name)
        .ok_or_else(|| format!("there is no scenario {name:?}; `kmorph-qemu list` shows them"))
}

/// The story, told as it happens.
pub fn demo() -> Result<()> {
    let outcome = one(scenario("story")?, Show::Story)?;
    println!("\nThe machine's whole console: {}", outcome.log.display());
    outcome.result
}

/// The benchmark.
pub fn bench() -> Result<()> {
    let mut result = Ok(());
    for name in ["bench-transport", "bench-recovery", "bench-blackout", "bench-transfer"] {
        result = result.and(one(scenario(name)?, Show::Story)?.result);
    }
    result
}

/// Run scenarios one after the other and print a table.
pub fn run(names: &[String], verbose: bool) -> Result<()> {
    let chosen: Vec<&Scenario> = if names.is_empty() {
        scenarios::ALL.iter().copied().filter(|s| s.in_run).collect()
    } else {
        names.iter().map(|n| scenario(n)).collect::<Result<_>>()?
    };
    let mut failed = Vec::new();
    let mut rows = Vec::new();
    for s in chosen {
        println!("== {}: {}", s.name, s.about);
        let outcome = one(s, if verbose { Show::All } else { Show::Story })?;
        let verdict = match &outcome.result {
            Ok(()) => "ok".to_string(),
            Err(e) => {
                println!("{}", outcome.tail);
                println!("FAILED {}: {e}\n  console: {}", s.name, outcome.log.display());
                failed.push(s.name);
                format!("FAILED: {e}")
            }
        };
        rows.push(format!(
            "{:<18} {:>6.1} s  retries {}  {verdict}",
            s.name,
            outcome.took.as_secs_f64(),
            outcome.retries
        ));
    }
    println!("\n{}", rows.join("\n"));
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!("{} of {} scenarios failed: {}", failed.len(), rows.len(), failed.join(", ")))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Show {
    /// The scenario's own lines.
    Story,
    /// Everything.
    All,
}

struct Outcome {
    result: Result<()>,
    log: std::path::PathBuf,
    tail: String,
    took: Duration,
    retries: u32,
}

/// Run one scenario. The known emulator crash (an int3 trap of the kernel's code patching while
/// vCPUs run in parallel) is retried once and counted; nothing else is.
fn one(s: &Scenario, show: Show) -> Result<Outcome> {
    let cache = Cache::open()?;
    let accel = accel::probe(&cache)?;
    let began = Instant::now();
    let mut retries = 0;
    loop {
        let spec = (s.machine)();
        let initramfs = image::primary(&cache, spec.primary)?;
        let run = machine::run(&cache, s, &spec, &initramfs, accel, show == Show::All)?;
        if run.result.is_err() && run.emulator_crash && retries == 0 {
            retries += 1;
            println!("   (the emulator's known int3 crash; retried once)");
            continue;
        }
        return Ok(Outcome {
            result: run.result,
            log: run.log,
            tail: run.tail,
            took: began.elapsed(),
            retries,
        });
    }
}
