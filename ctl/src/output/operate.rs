//! Printing policies, groups, events and the configuration.

use std::path::Path;

use kmorph_config::Setting;
use kmorph_control::{EventView, GroupView, PolicyChange, PolicyView, ReloadView};

use super::{ms, or_dash, pairs, table, time};

pub fn policy(p: &PolicyView) -> String {
    let rows = p
        .settings
        .iter()
        .map(|s| vec![s.key.clone(), s.value.clone(), s.source.clone(), s.allowed.clone(), s.help.clone()]);
    let whose = p.instance.as_ref().map_or("the defaults".into(), |i| format!("the policy of {i}"));
    format!(
        "{}a hang is declared within {} by {whose}\n",
        table(rows.collect(), &["SETTING", "VALUE", "FROM", "ALLOWED", "FOR"]),
        ms(Some(p.hang_bound_ms))
    )
}

fn change(c: &PolicyChange) -> String {
    format!("{} {}: {} -> {}\n", c.instance.as_deref().unwrap_or("defaults"), c.key, c.from, c.to)
}

pub fn changes(all: &[PolicyChange], dry_run: bool) -> String {
    if all.is_empty() {
        let what = if dry_run { "nothing would change" } else { "nothing changes" };
        return format!("{what}: these values are in force already\n");
    }
    let mut text: String = all.iter().map(change).collect();
    if dry_run {
        text += "nothing was changed; import without --dry-run to do it\n";
    }
    text
}

pub fn reload(r: &ReloadView) -> String {
    let mut text = match r.files.as_slice() {
        [] => "there is no configuration file: the defaults are in force\n".to_owned(),
        files => format!("read {}\n", files.join(", ")),
    };
    text.extend(r.policies.iter().map(change));
    text.extend(r.groups.iter().map(|g| format!("{g}\n")));
    if r.policies.is_empty() && r.groups.is_empty() {
        text += "no policy and no group changes\n";
    }
    if !r.restart_needed.is_empty() {
        text += &format!(
            "changed too, in force when the daemon is restarted: {} (kmorphctl daemon stop; instances run on)\n",
            r.restart_needed.join(", ")
        );
    }
    text
}

pub fn groups(all: &[GroupView]) -> String {
    if all.is_empty() {
        return "no groups: define them in the configuration's section groups\n".into();
    }
    let rows = all.iter().map(|g| {
        vec![
            g.name.clone(),
            g.state.clone(),
            g.strategy.clone(),
            format!("{} of {} in {}", g.restarts, g.restart_intensity, ms(Some(g.restart_period_ms))),
            g.members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", "),
        ]
    });
    let mut text = table(rows.collect(), &["NAME", "STATE", "STRATEGY", "RESTARTS", "MEMBERS"]);
    text.extend(
        all.iter()
            .filter(|g| !g.advice.is_empty())
            .map(|g| format!("{}: {}; {}\n", g.name, g.reason, g.advice)),
    );
    text
}

pub fn group(g: &GroupView) -> String {
    let mut rows =
        vec![("Name:", g.name.clone()), ("State:", g.state.clone()), ("Reason:", or_dash(&g.reason))];
    if !g.advice.is_empty() {
        rows.push(("What to do:", g.advice.clone()));
    }
    rows.extend([
        ("Strategy:", g.strategy.clone()),
        (
            "Restarts:",
            format!("{} of {} within {}", g.restarts, g.restart_intensity, ms(Some(g.restart_period_ms))),
        ),
        ("Incident:", g.incident.map_or("-".into(), |n| n.to_string())),
    ]);
    let members = g.members.iter().map(|m| {
        let state = m.state.map_or("NOT DEFINED".into(), |s| s.to_string());
        vec![m.name.clone(), state, or_dash(&m.reason)]
    });
    format!("{}\n{}", pairs(rows), table(members.collect(), &["MEMBER", "STATE", "REASON"]))
}

/// Words of others on one line.
fn flat(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// One line: number, time, kind, whom, states, why and what is done.
pub fn event(e: &EventView) -> String {
    let whom = match (&e.instance, &e.group) {
        (Some(i), _) => i.clone(),
        (None, Some(g)) => format!("group {g}"),
        (None, None) => "kmorphd".into(),
    };
    let states = match (&e.from, &e.to) {
        (Some(from), Some(to)) => format!("{from} -> {to}: "),
        (None, Some(to)) => format!("{to}: "),
        _ => String::new(),
    };
    let effect = if e.effect.is_empty() { String::new() } else { format!("; {}", e.effect) };
    let incident = e.incident.map_or(String::new(), |n| format!("  [incident {n}]"));
    format!(
        "{:>5} {} {:<11} {:<12} {}{incident}\n",
        e.seq,
        time(e.at_unix_ms),
        e.kind.to_string(),
        whom,
        flat(&format!("{states}{}{effect}", e.cause))
    )
}

pub fn config(files: &[String], settings: &[Setting], default: &Path) -> String {
    let read = match files {
        [] => format!("there is no {}: the defaults are in force\n", default.display()),
        files => format!("read {}\n", files.join(", ")),
    };
    if settings.is_empty() {
        return format!("{read}every value is the default\n");
    }
    let rows = settings.iter().map(|s| vec![s.key.clone(), s.value.clone(), s.source.clone()]);
    format!("{read}{}", table(rows.collect(), &["KEY", "VALUE", "FROM"]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmorph_control::{EventKind, GroupMember, InstanceState, PolicySetting};

    #[test]
    fn an_event_is_one_line_with_whom_why_and_what() {
        let e = EventView {
            seq: 7,
            at_unix_ms: 1_769_860_800_000,
            kind: EventKind::State,
            instance: Some("db".into()),
            group: Some("shop".into()),
            incident: Some(3),
            incarnation: Some(1),
            from: Some("RUNNING".into()),
            to: Some("RECOVERING".into()),
            cause: "its kernel\npanicked".into(),
            effect: "it is fenced".into(),
        };
        assert_eq!(
            event(&e),
            "    7 2026-01-31T12:00:00.000Z state       db           RUNNING -> RECOVERING: its kernel panicked; \
             it is fenced  [incident 3]\n"
        );
        let daemon = EventView {
            instance: None,
            group: None,
            incident: None,
            from: None,
            to: None,
            effect: String::new(),
            kind: EventKind::Daemon,
            ..e
        };
        assert!(event(&daemon).ends_with("daemon      kmorphd      its kernel panicked\n"));
    }

    #[test]
    fn groups_show_their_members_in_order() {
        let member = |name: &str, state| GroupMember { name: name.into(), state, reason: String::new() };
        let g = GroupView {
            name: "shop".into(),
            strategy: "rest-for-one".into(),
            state: "DEGRADED".into(),
            reason: "db is given up".into(),
            advice: "kmorphctl recover db".into(),
            restart_intensity: 5,
            restart_period_ms: 300_000,
            restarts: 1,
            incident: Some(4),
            members: vec![member("db", Some(InstanceState::Degraded)), member("web", None)],
        };
        let list = groups(std::slice::from_ref(&g));
        for word in
            ["rest-for-one", "1 of 5 in 300.0 s", "db, web", "shop: db is given up; kmorphctl recover db\n"]
        {
            assert!(list.contains(word), "{word} in\n{list}");
        }
        let text = group(&g);
        let at = |word: &str| text.rfind(word).unwrap();
        assert!(at("DEGRADED") < at("NOT DEFINED") && text.contains("What to do:"), "{text}");
        assert!(groups(&[]).contains("configuration"));
    }

    #[test]
    fn a_policy_says_where_each_value_comes_from() {
        let setting = PolicySetting {
            key: "vmcore".into(),
            value: "none".into(),
            source: "operator".into(),
            allowed: "anything".into(),
            help: "help".into(),
        };
        let text = policy(&PolicyView {
            instance: Some("web".into()),
            settings: vec![setting],
            hang_bound_ms: 1410,
        });
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["vmcore", "none", "operator", "anything", "help"]);
        assert!(text.ends_with("a hang is declared within 1410 ms by the policy of web\n"), "{text}");
    }

    #[test]
    fn changes_and_reloads_say_what_is_left_to_do() {
        let c =
            PolicyChange { instance: None, key: "vmcore".into(), from: "none".into(), to: "required".into() };
        assert_eq!(
            changes(std::slice::from_ref(&c), true),
            "defaults vmcore: none -> required\nnothing was changed; import without --dry-run to do it\n"
        );
        assert!(changes(&[], false).contains("nothing changes"));
        assert!(changes(&[], true).contains("nothing would change"));
        let c = PolicyChange {
            instance: Some("web".into()),
            key: "heartbeat-timeout".into(),
            from: "1s".into(),
            to: "500ms".into(),
        };
        assert_eq!(changes(&[c], false), "web heartbeat-timeout: 1s -> 500ms\n");
        let r = ReloadView {
            files: vec!["/a".into()],
            restart_needed: vec!["agent".into()],
            ..Default::default()
        };
        let text = reload(&r);
        assert!(text.contains("read /a\n") && text.contains("restarted: agent"), "{text}");
    }
}
