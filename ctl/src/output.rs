//! Printing results.

pub mod morph;
pub mod operate;

use std::io::Write;

use comfy_table::{Table, presets};
use kmorph_control::{
    ConsoleLine, DaemonView, ErrorKind, HealthView, HeartbeatView, InstanceView, OpError, PingView,
    PublishView, RecoveryStep, StandbyView,
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

    /// Print a result. A reader that went away (a pager that was closed) ends the program quietly.
    fn text(&self, text: &str) -> Result<(), OpError> {
        match write(text) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
            written => written.map_err(|e| {
                OpError::new(ErrorKind::Internal, format!("done, and the result cannot be written: {e}"))
            }),
        }
    }

    fn json<T: Serialize>(&self, value: &T, pretty: bool) -> Result<(), OpError> {
        self.text(&as_json(value, pretty)?)
    }

    /// Print one result: as JSON, or what `table` makes of it.
    pub fn show<T: Serialize>(&self, value: &T, table: impl FnOnce(&T) -> String) -> Result<(), OpError> {
        match self.format {
            Format::Json => self.json(value, true),
            Format::Table => self.text(&table(value)),
        }
    }

    /// Print one of a stream.
    pub fn item<T: Serialize>(&self, value: &T, line: impl FnOnce(&T) -> String) -> Result<(), OpError> {
        match self.format {
            Format::Json => self.json(value, false),
            Format::Table => self.text(&line(value)),
        }
    }

    /// Say something beside the result.
    pub fn note(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "kmorphctl: {text}"); // no other way to say it
    }

    /// Say why it failed.
    pub fn error(&self, e: &OpError) {
        // Whoever reads results may be gone: the exit code is that of the error all the same.
        let printed =
            || as_json(&serde_json::json!({ "error": e }), true).is_ok_and(|text| write(&text).is_ok());
        if self.format != Format::Json || !printed() {
            self.note(&e.message);
        }
    }
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn as_json<T: Serialize>(value: &T, pretty: bool) -> Result<String, OpError> {
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    let text = text.map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot print as JSON: {e}")))?;
    Ok(format!("{text}\n"))
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

fn time(unix_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(unix_ms);
    humantime::format_rfc3339_millis(at).to_string()
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

pub fn instances(all: &[InstanceView], verbose: bool) -> String {
    if all.is_empty() {
        return "no instances: define one with kerf, then kmorphctl spawn <name> --kernel=<vmlinuz>\n".into();
    }
    let grouped = all.iter().any(|i| i.group.is_some());
    let mut header = vec!["NAME", "ID", "CID", "STATE", "KERNEL", "HEARTBEAT", "RECOVERIES"];
    if grouped {
        header.push("GROUP");
    }
    if verbose {
        header.extend(["CPUS", "MEMORY", "TIMEOUT", "PULSE", "INCARNATION", "AGENT-RESTARTS", "IMAGE"]);
    }
    let rows = all.iter().map(|i| {
        let mut row = vec![
            i.name.clone(),
            i.id.to_string(),
            i.cid.to_string(),
            state(i),
            or_dash(&i.release),
            i.last_heartbeat_ms.map_or_else(|| "-".into(), |v| format!("{} ago", ms(Some(v)))),
            i.recoveries.to_string(),
        ];
        if grouped {
            row.push(i.group.clone().unwrap_or_else(|| "-".into()));
        }
        if verbose {
            row.extend([
                cpus(&i.cpus),
                mib(i.memory_bytes),
                ms(Some(i.heartbeat_timeout_ms)),
                ms(i.pulse_age_ms),
                i.incarnation.to_string(),
                i.agent_restarts.to_string(),
                or_dash(&i.kernel),
            ]);
        }
        row
    });
    let mut text = table(rows.collect(), &header);
    // What an operator has to do something about is said below the table, in full.
    for i in all.iter().filter(|i| !i.advice.is_empty()) {
        text += &format!("{} is {}: {}; {}\n", i.name, i.state, i.reason, i.advice);
    }
    for (i, s) in all.iter().filter_map(|i| Some((i, i.standby.as_ref()?))) {
        if s.state != "ready" && !s.reason.is_empty() {
            text += &format!("{} has no standby: {}\n", i.name, s.reason);
        }
    }
    text
}

/// "RUNNING (maintenance)", "RUNNING (standby)"
fn state(i: &InstanceView) -> String {
    match (i.maintenance, &i.standby_of) {
        (true, _) => format!("{} (maintenance)", i.state),
        (false, Some(_)) => format!("{} (standby)", i.state),
        (false, None) => i.state.to_string(),
    }
}

pub fn instance(i: &InstanceView) -> String {
    let status = match i.last_heartbeat_ms {
        Some(v) => format!("{} (last heartbeat: {} ago)", state(i), ms(Some(v))),
        None => state(i),
    };
    let memory = match i.memory_base {
        Some(base) => format!("{} at {base:#x}", mib(i.memory_bytes)),
        None => mib(i.memory_bytes),
    };
    let mut rows = vec![
        ("Name:", i.name.clone()),
        ("Status:", status),
        ("Reason:", or_dash(&i.reason)),
        ("What to do:", i.advice.clone()),
        ("Running kernel:", or_dash(&i.release)),
        ("Image:", or_dash(&i.kernel)),
        ("Instance, CID:", format!("{}, {}", i.id, i.cid)),
        ("CPUs:", cpus(&i.cpus)),
        ("Memory:", memory),
        ("Incarnation:", i.incarnation.to_string()),
        ("Recoveries:", i.recoveries.to_string()),
        ("Agent restarted:", format!("{} times by its guardian", i.agent_restarts)),
        ("Group:", i.group.clone().unwrap_or_else(|| "-".into())),
        ("Auto-heal:", auto_heal(i).into()),
        ("Heartbeat timeout:", ms(Some(i.heartbeat_timeout_ms))),
        ("Pulse seen:", i.pulse_age_ms.map_or_else(|| "-".into(), |v| format!("{} ago", ms(Some(v))))),
        ("Up:", i.uptime_s.map_or_else(|| "-".into(), |s| format!("{s:.1} s"))),
    ];
    if i.handover_bytes > 0 {
        rows.push(("Handover memory:", mib(i.handover_bytes)));
    }
    for p in &i.publish {
        rows.push(("Published:", published(p)));
    }
    if let Some(state) = &i.morph {
        rows.push(("Morph:", format!("{state}; kmorphctl morph status {}", i.name)));
    }
    if let Some(of) = &i.side_of {
        rows.push(("Side of:", format!("a morph of {of}")));
    }
    if let Some(of) = &i.standby_of {
        rows.push(("Standby of:", format!("{of}; it waits and serves nobody")));
    }
    if let Some(s) = &i.standby {
        rows.push(("Standby:", standby(s)));
    }
    if let Some(n) = i.incident {
        rows.push(("Incident:", n.to_string()));
    }
    rows.retain(|(name, value)| *name != "What to do:" || !value.is_empty());
    pairs(rows)
}

/// "ready: kernel 6.12.9 as web~standby", "none: it needs 128 MiB ..."
fn standby(s: &StandbyView) -> String {
    let mut text = s.state.clone();
    if !s.release.is_empty() {
        text += &format!(": kernel {} as {}", s.release, s.name);
    }
    if !s.reason.is_empty() {
        text += &format!("{} {}", if s.release.is_empty() { ":" } else { ";" }, s.reason);
    }
    text
}

fn published(p: &PublishView) -> String {
    if !p.listening {
        return format!("{}, not listening", p.publish);
    }
    format!(
        "{}, {} open, {} waiting, {} in all, {} failed,{} longest wait {}",
        p.publish,
        p.open,
        p.waiting,
        p.accepted,
        p.failed,
        if p.moved > 0 { format!(" {} moved,", p.moved) } else { String::new() },
        ms(Some(p.longest_wait_us.div_ceil(1000)))
    )
}

fn auto_heal(i: &InstanceView) -> &'static str {
    match (i.maintenance, i.monitor) {
        (true, _) => "not now: the instance is in maintenance",
        (false, true) => "enabled",
        (false, false) => "disabled",
    }
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
        ("Own loop late by:", format!("{:.1} ms (p99), {:.1} ms at most", d.lag_p99_ms, d.max_lag_ms)),
        ("Metrics:", d.metrics.clone().unwrap_or_else(|| "off".into())),
        (
            "Journal:",
            d.store_trouble.as_ref().map_or("written".into(), |why| {
                format!("CANNOT BE WRITTEN: {why}; supervision goes on without history, make room or make it writable")
            }),
        ),
        (
            "Configuration:",
            if d.config_files.is_empty() { "the defaults".into() } else { d.config_files.join(", ") },
        ),
    ])
}

/// One line of a recovery: incident, time since it was noticed, phase, what happened.
pub fn step(s: &RecoveryStep) -> String {
    let end = match s.recovered {
        Some(true) => "  [recovered]",
        Some(false) => "  [not recovered]",
        None => "",
    };
    format!(
        "#{:<3} {} {:<12} {:>+10.1} ms  {:<21} {}{end}\n",
        s.incident,
        time(s.at_unix_ms),
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
    use kmorph_control::InstanceState;

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
    fn maintenance_group_advice_and_agent_restarts_are_shown() {
        let plain = InstanceView {
            name: "web".into(),
            id: 1,
            cid: 3,
            state: InstanceState::Healthy,
            reason: "it serves".into(),
            advice: String::new(),
            maintenance: false,
            group: None,
            agent_restarts: 0,
            release: "6.1.0".into(),
            kernel: "/boot/k".into(),
            incarnation: 1,
            recoveries: 0,
            cpus: vec![2],
            memory_bytes: 128 << 20,
            memory_base: None,
            monitor: true,
            heartbeat_timeout_ms: 1000,
            last_heartbeat_ms: None,
            pulse_age_ms: None,
            uptime_s: None,
            incident: None,
            morph: None,
            side_of: None,
            standby_of: None,
            standby: None,
            publish: vec![],
            handover_bytes: 0,
        };
        let text = instances(std::slice::from_ref(&plain), false);
        assert!(text.contains("RUNNING") && !text.contains("maintenance"), "{text}");
        assert!(!text.contains("GROUP") && text.lines().count() == 2, "{text}");
        assert!(!instance(&plain).contains("What to do:"));
        let special = InstanceView {
            maintenance: true,
            group: Some("shop".into()),
            advice: "kmorphctl recover web".into(),
            agent_restarts: 7,
            ..plain.clone()
        };
        let list = instances(std::slice::from_ref(&special), true);
        for word in ["RUNNING (maintenance)", "shop", "AGENT-RESTARTS", " 7 ", "kmorphctl recover web\n"] {
            assert!(list.contains(word), "{word:?} in\n{list}");
        }
        let status = instance(&special);
        for word in ["RUNNING (maintenance)", "shop", "kmorphctl recover web", "7 times", "in maintenance"] {
            assert!(status.contains(word), "{word:?} in\n{status}");
        }
        let reason = "it needs 128 MiB of the pool".to_owned();
        let none =
            StandbyView { state: "none".into(), name: "web~standby".into(), reason, ..Default::default() };
        let owner = InstanceView { standby: Some(none), ..plain.clone() };
        let text = instances(std::slice::from_ref(&owner), false);
        assert!(text.contains("web has no standby: it needs 128 MiB of the pool\n"), "{text}");
        assert!(instance(&owner).contains("none: it needs 128 MiB of the pool"));
        let waits = InstanceView { standby_of: Some("web".into()), ..plain };
        assert!(instances(std::slice::from_ref(&waits), false).contains("RUNNING (standby)"));
    }

    #[test]
    fn the_daemon_says_its_files_and_its_trouble() {
        let mut d = DaemonView {
            version: "1".into(),
            pid: 1,
            uptime_s: 0.0,
            platform: "process".into(),
            running: 0,
            instances: 0,
            cpus_total: 4,
            cpus_online: 4,
            cpus_lent: 0,
            pool_bytes: 0,
            pool_free_bytes: 0,
            max_lag_ms: 0.0,
            lag_p99_ms: 0.0,
            metrics: None,
            store_trouble: None,
            config_files: Vec::new(),
        };
        let text = daemon(&d);
        assert!(text.contains("the defaults") && !text.contains("CANNOT BE WRITTEN"), "{text}");
        d.store_trouble = Some("the disk is full".into());
        d.config_files = vec!["/etc/a.conf".into(), "/etc/a.conf.d/b.conf".into()];
        let text = daemon(&d);
        assert!(text.contains("CANNOT BE WRITTEN: the disk is full"), "{text}");
        assert!(text.contains("/etc/a.conf, /etc/a.conf.d/b.conf"), "{text}");
    }

    #[test]
    fn an_empty_list_says_what_to_do() {
        assert!(instances(&[], false).contains("kmorphctl spawn"));
    }
}
