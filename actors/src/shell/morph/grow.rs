//! The new kernel serves and the old one is stopped: the new one gets the CPUs and the memory that one had.

use std::time::Duration;

use kmorph_platform::{Grown, Growth};
use tokio::time::sleep;
use tracing::warn;

use super::MorphArgs;
use super::work::{Worked, persist};
use crate::core::morph::Event;

/// Tries, when something is missing: a CPU may still be on its way back.
const TRIES: u32 = 3;
/// Wait before the next one.
const AGAIN: Duration = Duration::from_millis(200);

/// Give it what its record says it has to get.
pub(super) async fn grow(args: &MorphArgs) -> Worked {
    let (id, incarnation, growth) = {
        let r = args.instance.record();
        (r.spec.id, r.incarnation, r.growth.clone())
    };
    let platform = &args.env.platform;
    // One that died meanwhile is started anew, with everything: what this kernel got or not means nothing any more.
    let lives = || args.instance.record().incarnation == incarnation;
    let mut tried = platform.grow(id, incarnation, &growth, args.env.config.effect_limit).await;
    for _ in 1..TRIES {
        if tried.as_ref().is_ok_and(|g| g.failed.is_empty()) {
            break;
        }
        sleep(AGAIN).await;
        if !lives() {
            break;
        }
        tried = platform.grow(id, incarnation, &growth, args.env.config.effect_limit).await;
    }
    let (missing, why, detail) = match tried {
        Ok(grown) => (missing(&growth, &grown), grown.failed.join("; "), said(&grown)),
        Err(error) => (growth, error.to_string(), String::new()),
    };
    let unused = missing.cpus.clone();
    let lacks = lacks(&missing);
    {
        let mut r = args.instance.record();
        if r.incarnation != incarnation {
            return Ok((Event::Grown(None), "it died meanwhile, and starts with everything".into()));
        }
        r.growth = missing;
    }
    persist(&args.instance).await;
    if !unused.is_empty()
        && let Err(error) = platform.release_cpus(&unused).await
    {
        warn!(instance = %args.instance.name, cpus = ?unused, %error, "CPUs that nobody uses stay in the pool");
    }
    Ok((Event::Grown(lacks.map(|lacks| format!("{lacks} missing: {why}"))), detail))
}

/// What it did not get.
fn missing(growth: &Growth, grown: &Grown) -> Growth {
    Growth {
        cpus: growth.cpus.iter().copied().filter(|c| !grown.cpus.contains(c)).collect(),
        memory_bytes: growth.memory_bytes.saturating_sub(grown.memory_bytes()),
    }
}

/// In words; nothing when nothing is missing.
pub(crate) fn lacks(missing: &Growth) -> Option<String> {
    let memory = (missing.memory_bytes > 0).then(|| format!("{} MiB", missing.memory_bytes >> 20));
    let cpus = (!missing.cpus.is_empty()).then(|| format!("CPUs {:?}", missing.cpus));
    match (cpus, memory) {
        (Some(cpus), Some(memory)) => Some(format!("{cpus} and {memory} are")),
        (Some(cpus), None) => Some(format!("{cpus} are")),
        (None, Some(memory)) => Some(format!("{memory} are")),
        (None, None) => None,
    }
}

fn said(grown: &Grown) -> String {
    let mut parts = vec![];
    if !grown.memory.is_empty() {
        parts.push(format!("{} MiB more after {:.1?}", grown.memory_bytes() >> 20, grown.memory_took));
    }
    if !grown.cpus.is_empty() {
        parts.push(format!("CPUs {:?} more after {:.1?}", grown.cpus, grown.cpus_took));
    }
    parts.join(", ")
}
