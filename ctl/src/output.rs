//! Printing results.

use std::io::Write;

use comfy_table::{Table, presets};
use kmorph_control::{
    ConsoleLine, DaemonView, ErrorKind, HealthView, HeartbeatView, InstanceView, OpError, PingView,
    RecoveryStep,
};
use serde::Serialize;

use crate::args::{Format, Metric};

/// Where results go, in the chosen format.
pub struct Output {
    format: Format,
}

impl Output {
    pub fn new(format: Format) -> Output {
        Output { format }
    }

    /// Print text. A reader that went away (a pager that was closed) ends the program quietly.
    fn text(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
            std::process::exit(0);
        }
    }

    fn json<T: Serialize>(&self, value: &T, pretty: bool) -> Result<(), OpError> {
        let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
        let text =
            text.map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot print as JSON: {e}")))?;
        self.text(&format!("{text}\n"));
        Ok(())
    }

    /// Print one result: as JSON, or what `table` makes of it.
    pub fn show<T: Serialize>(&self, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), OpError> {
        match self.format {
            Format::Json => self.json(value, true),
            Format::Table => {
                self.text(&table(value));
                Ok(())
            }
        }
    }

    /// Print one of a stream.
    pub fn item<T: Serialize>(&self, value: &T, line: impl FnOnce(&T) -> String) -> Result<(), OpError> {
        match self.format {
            Format::Json => self.json(value, false),
            Format::Table => {
                self.text(&line(value));
                Ok(())
            }
        }
    }

    /// Say something beside the result.
    pub fn note(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "kmorphctl: {text}"); // no other way to say it
    }

    /// Say why it failed.
    pub fn error(&self, e: &OpError) {
        if self.format == Format::Json && self.json(&serde_json::json!({ "error": e }), true).is_ok() {
            return;
        }
        self.note(&e.message);
    }
}

fn table(rows: Vec<Vec<String>>, header: &[&str]) -> String {
    let mut t = Table::new();
    t.load_style(presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        t.add_row(row);
    }
    trimmed(&t)
}

/// Two columns without a header.
fn pairs(rows: Vec<(&str, String)>) -> String {
    let mut t = Table::new();
    t.load_style(presets::NOTHING);
    for (name, value) in rows {
        t.add_row(vec![name.to_string(), value]);
    }
    trimmed(&t)
}

fn trimmed(t: &Table) -> String {
    let lines: Vec<String> = t.to_string().lines().map(|l| l.trim_end().to_string()).collect();
    lines.join("\n") + "\n"
}

/// "1.5 ms", "-" when there is none.
fn ms(value: Option<u64>) -> String {
    value.map_or_else(
        || "-".into(),
        |v| if v < 10_000 { format!("{v} ms") } else { format!("{:.1} s", v as f64 / 1e3) },
    )
}

fn us(value: Option<u64>) -> String {
    value.map_or_else(
        || "-".into(),
        |v| if v < 10_000 { format!("{v} us") } else { format!("{:.1} ms", v as f64 / 1e3) },
    )
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn cpus(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

pub fn instances(all: &[InstanceView], verbose: bool) -> String {
    if all.is_empty() {
        return "no instances: define one with kerf, then kmorphctl spawn <name> --kernel=<vmlinuz>\n".into();
    }
    let mut header = vec!["NAME", "ID", "CID", "STATE", "KERNEL", "HEARTBEAT", "RECOVERIES"];
    if verbose {
        header.extend(["CPUS", "MEMORY", "TIMEOUT", "PULSE", "INCARNATION", "IMAGE"]);
    }
    let rows = all.iter().map(|i| {
        let mut row = vec![
            i.name.clone(),
            i.id.to_string(),
            i.cid.to_string(),
            i.state.to_string(),
            or_dash(&i.release),
            i.last_heartbeat_ms.map_or_else(|| "-".into(), |v| format!("{} ago", ms(Some(v)))),
            i.recoveries.to_string(),
        ];
        if verbose {
            row.extend([
                cpus(&i.cpus),
                mib(i.memory_bytes),
                ms(Some(i.heartbeat_timeout_ms)),
                ms(i.pulse_age_ms),
                i.incarnation.to_string(),
                or_dash(&i.kernel),
            ]);
        }
        row
    });
    table(rows.collect(), &header)
}

pub fn instance(i: &InstanceView) -> String {
    let state = match i.last_heartbeat_ms {
        Some(v) => format!("{} (last heartbeat: {} ago)", i.state, ms(Some(v))),
        None => i.state.to_string(),
    };
    let memory = match i.memory_base {
        Some(base) => format!("{} at {base:#x}", mib(i.memory_bytes)),
        None => mib(i.memory_bytes),
    };
    let mut rows = vec![
        ("Name:", i.name.clone()),
        ("Status:", state),
        ("Reason:", or_dash(&i.reason)),
        ("Running kernel:", or_dash(&i.release)),
        ("Image:", or_dash(&i.kernel)),
        ("Instance, CID:", format!("{}, {}", i.id, i.cid)),
        ("CPUs:", cpus(&i.cpus)),
        ("Memory:", memory),
        ("Incarnation:", i.incarnation.to_string()),
        ("Recoveries:", i.recoveries.to_string()),
        ("Auto-heal:", if i.monitor { "enabled" } else { "disabled" }.into()),
        ("Heartbeat timeout:", ms(Some(i.heartbeat_timeout_ms))),
        ("Pulse seen:", i.pulse_age_ms.map_or_else(|| "-".into(), |v| format!("{} ago", ms(Some(v))))),
        ("Up:", i.uptime_s.map_or_else(|| "-".into(), |s| format!("{s:.1} s"))),
    ];
    if let Some(n) = i.incident {
        rows.push(("Incident:", n.to_string()));
    }
    pairs(rows)
}

pub fn heartbeat(h: &HeartbeatView) -> String {
    pairs(vec![
        ("Name:", h.name.clone()),
        ("Sent, answered, missed:", format!("{}, {}, {}", h.sent, h.received, h.missed)),
        ("Missed in a row:", h.missed_in_row.to_string()),
        ("Last answer:", h.last_ms.map_or_else(|| "-".into(), |v| format!("{} ago", ms(Some(v))))),
        (
            "Round trip last, min, mean, max:",
            format!(
                "{}, {}, {}, {}",
                us(h.rtt_last_us),
                us(h.rtt_min_us),
                us(h.rtt_mean_us),
                us(h.rtt_max_us)
            ),
        ),
        ("Interval, timeout:", format!("{}, {}", ms(Some(h.interval_ms)), ms(Some(h.timeout_ms)))),
        ("A hang is declared within:", ms(Some(h.hang_bound_ms))),
        (
            "Pulse:",
            match (h.pulse_count, h.pulse_age_ms) {
                (Some(n), age) => format!("{n} beats, last seen moving {} ago", ms(age)),
                (None, _) => "-".into(),
            },
        ),
    ])
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "not offered by this kernel".into(), |v| format!("{v:.2} %"))
}

pub fn health(h: &HealthView, which: &[Metric]) -> String {
    let mut rows = vec![("Name:", h.name.clone()), ("Measured:", format!("{} ago", ms(Some(h.age_ms))))];
    if let Some(c) = h.cpu.as_ref().filter(|_| which.contains(&Metric::Cpu)) {
        rows.push((
            "CPU:",
            format!("{} online, {:.1} % busy, load {:.2}", c.online, c.busy_percent, c.load1),
        ));
        rows.push(("CPU pressure:", percent(c.pressure)));
    }
    if let Some(m) = h.memory.as_ref().filter(|_| which.contains(&Metric::Memory)) {
        rows.push(("Memory:", format!("{} of {} available", mib(m.available), mib(m.total))));
        rows.push(("Memory pressure:", percent(m.pressure)));
    }
    if let Some(i) = h.io.as_ref().filter(|_| which.contains(&Metric::Io)) {
        rows.push(("Small write:", us(Some(i.probe_us))));
        rows.push(("I/O pressure:", percent(i.pressure)));
    }
    pairs(rows)
}

pub fn ping(p: &PingView) -> String {
    format!("{} answered in {} (incarnation {})\n", p.name, us(Some(p.rtt_us)), p.incarnation)
}

pub fn daemon(d: &DaemonView) -> String {
    pairs(vec![
        ("kmorphd:", format!("{}, process {}, up {:.0} s", d.version, d.pid, d.uptime_s)),
        ("Platform:", d.platform.clone()),
        ("Instances:", format!("{} running of {}", d.running, d.instances)),
        ("CPUs:", format!("{}: {} with the primary, {} lent", d.cpus_total, d.cpus_online, d.cpus_lent)),
        ("Memory pool:", format!("{}, {} free", mib(d.pool_bytes), mib(d.pool_free_bytes))),
        ("Own loop late by at most:", format!("{:.1} ms", d.max_lag_ms)),
        ("Metrics:", d.metrics.clone().unwrap_or_else(|| "off".into())),
    ])
}

/// One line of a recovery: incident, time since it was noticed, phase, what happened.
pub fn step(s: &RecoveryStep) -> String {
    let end = match s.recovered {
        Some(true) => "  [recovered]",
        Some(false) => "  [not recovered]",
        None => "",
    };
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(s.at_unix_ms);
    format!(
        "#{:<3} {} {:<12} {:>+10.1} ms  {:<21} {}{end}\n",
        s.incident,
        humantime::format_rfc3339_millis(at),
        s.instance,
        s.offset_us as f64 / 1e3,
        s.phase,
        s.detail
    )
}

pub fn line(l: &ConsoleLine) -> String {
    format!("[{:>12.6}] {}\n", l.at_s, l.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(ms(Some(9_999)), "9999 ms");
        assert_eq!(ms(Some(62_000)), "62.0 s");
        assert_eq!(us(Some(12_345)), "12.3 ms");
        assert_eq!(us(None), "-");
    }

    #[test]
    fn no_line_ends_in_blanks_and_pairs_align() {
        let text = pairs(vec![("a:", "x".into()), ("long name:", "y".into())]);
        let columns: Vec<usize> = text.lines().map(|l| l.len() - 1).collect();
        assert_eq!(columns[0], columns[1]);
        assert!(text.lines().all(|l| l == l.trim_end()));
    }

    #[test]
    fn an_empty_list_says_what_to_do() {
        assert!(instances(&[], false).contains("kmorphctl spawn"));
    }
}
