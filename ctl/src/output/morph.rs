//! Morphs for people.

use kmorph_control::{MorphSide, MorphView};

use super::{cpus, mib, or_dash, pairs, table};

/// A morph, with what was done so far.
pub fn morph(m: &MorphView) -> String {
    let mut rows = vec![("Name:", m.name.clone()), ("State:", m.state.clone())];
    match m.committed {
        Some(true) => {
            rows.push(("Result:", format!("committed: kernel {} took over from {}", m.release, m.from)))
        }
        Some(false) => rows.push(("Result:", format!("rolled back: kernel {} goes on", m.release))),
        None => rows.push(("Running kernel:", or_dash(&m.release))),
    }
    if let (None, Some(side)) = (m.committed, &m.side) {
        rows.push(("New kernel:", or_dash(&side.release)));
        rows.push((
            "It runs as:",
            format!("{}, CPUs {}, {}", side.name, cpus(&side.cpus), mib(side.memory_bytes)),
        ));
        if let Some(later) = later(side) {
            rows.push(("It gets later:", later));
        }
    }
    if !m.waits_for.is_empty() {
        rows.push(("Waits for:", m.waits_for.clone()));
    }
    if let Some(t) = &m.transfer {
        let sizes = format!(
            "{} sections, {:.1} MiB in {} rounds",
            t.sections,
            t.bytes as f64 / 1_048_576.0,
            t.rounds
        );
        let rate = if t.mib_per_s > 0.0 {
            format!(", {:.0} MiB/s in the latest", t.mib_per_s)
        } else {
            String::new()
        };
        let held = match t.throttled_percent {
            0 => String::new(),
            percent => format!(", workload throttled by up to {percent} %"),
        };
        let shared = match t.shared_bytes {
            0 => String::new(),
            _ => ", through shared memory".to_owned(),
        };
        let now = match t.round_bytes {
            0 => String::new(),
            bytes => {
                format!("; {:.1} MiB of the next, {:.0} MiB/s", bytes as f64 / 1_048_576.0, t.round_mib_per_s)
            }
        };
        rows.push(("Handed over:", sizes + &shared + &rate + &held + &now));
    }
    if let Some(b) = &m.blackout {
        let ms = |us: u64| us as f64 / 1e3;
        rows.push((
            "Blackout:",
            format!(
                "{:.2} ms: freeze {:.2}, copy {:.2} ({:.1} KiB), check {:.2}, record {:.2}, activate {:.2}",
                ms(b.total_us),
                ms(b.freeze_us),
                ms(b.copy_us),
                b.bytes as f64 / 1024.0,
                ms(b.check_us),
                ms(b.record_us),
                ms(b.activate_us)
            ),
        ));
    }
    if m.number != 0 {
        rows.push(("Number:", m.number.to_string()));
    }
    let steps: Vec<Vec<String>> = m
        .steps
        .iter()
        .map(|s| vec![format!("{:.3} s", s.at_ms as f64 / 1e3), s.state.clone(), s.detail.clone()])
        .collect();
    if steps.is_empty() {
        return pairs(rows);
    }
    format!("{}\n{}", pairs(rows), table(steps, &["AT", "STATE", "WHAT"]))
}

/// What a morph would begin with.
pub fn plan(m: &MorphView) -> String {
    let side = m.side.clone().unwrap_or_default();
    let later = later(&side).map(|l| format!("; of the old kernel it would get {l}")).unwrap_or_default();
    format!(
        "{} could be morphed: the new kernel would run as {} on CPUs {} with {} beside kernel {}{later}\n",
        m.name,
        side.name,
        cpus(&side.cpus),
        mib(side.memory_bytes),
        m.from
    )
}

/// What the new kernel gets when the old one is stopped.
fn later(side: &MorphSide) -> Option<String> {
    let memory = (side.later_memory_bytes > 0).then(|| mib(side.later_memory_bytes));
    let cpus = (!side.later_cpus.is_empty()).then(|| format!("CPUs {}", cpus(&side.later_cpus)));
    match (cpus, memory) {
        (Some(cpus), Some(memory)) => Some(format!("{cpus} and {memory}")),
        (some, other) => some.or(other),
    }
}
