//! Morphs for people.

use kmorph_control::MorphView;

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
    }
    if !m.waits_for.is_empty() {
        rows.push(("Waits for:", m.waits_for.clone()));
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
    format!(
        "{} could be morphed: the new kernel would run as {} on CPUs {} with {} beside kernel {}\n",
        m.name,
        side.name,
        cpus(&side.cpus),
        mib(side.memory_bytes),
        m.from
    )
}
