//! Groups in files.

use std::collections::BTreeMap;
use std::time::Duration;

use kmorph_actors::{GroupSpec, Strategy};

use crate::node::{Node, Place};
use crate::reader::Reader;
use crate::values::{choice, number, show_time, time};

const STRATEGIES: &[(&str, Strategy)] = &[
    ("one-for-one", Strategy::OneForOne),
    ("one-for-all", Strategy::OneForAll),
    ("rest-for-one", Strategy::RestForOne),
];

/// As `config check` shows it.
pub(crate) fn show(g: &GroupSpec) -> String {
    let strategy = STRATEGIES.iter().find(|(_, s)| *s == g.strategy).map_or("", |(name, _)| name);
    format!("{strategy} of [{}], {} restarts in {}", g.members.join(", "), g.intensity, show_time(g.period))
}

/// All groups; no instance is in two.
pub(crate) fn read(reader: &Reader, node: Option<&Node>) -> Vec<GroupSpec> {
    let Some(node) = node else { return Vec::new() };
    let mut groups: Vec<GroupSpec> = Vec::new();
    let mut named: BTreeMap<String, Place> = BTreeMap::new();
    let mut taken: BTreeMap<String, (String, Place)> = BTreeMap::new();
    for (n, one) in reader.list(node, "groups").iter().enumerate() {
        let keys = &["name", "strategy", "members", "restart-intensity", "restart-period"];
        let s = reader.section(one, &format!("groups[{n}]"), keys);
        let mut g = GroupSpec {
            name: String::new(),
            strategy: Strategy::default(),
            intensity: 5,
            period: Duration::from_secs(300),
            members: Vec::new(),
        };
        s.set("name", &mut g.name, name);
        s.set("strategy", &mut g.strategy, choice(STRATEGIES));
        s.set("restart-intensity", &mut g.intensity, number(0, 1000));
        s.set("restart-period", &mut g.period, time(Duration::from_secs(1), Duration::from_secs(86_400)));
        match s.get("name") {
            None => reader.problem(s.place, s.key("name"), "a group needs a name"),
            Some(at) => {
                if let Some(first) = named.get(&g.name) {
                    let text = format!("there is a group {} at {first} already", g.name);
                    reader.problem(&at.place, s.key("name"), text);
                } else {
                    named.insert(g.name.clone(), at.place.clone());
                }
            }
        }
        let members = s.get("members").map_or(&[][..], |m| reader.list(m, &s.key("members")));
        for member in members {
            let Some(instance) = reader.parse(member, &s.key("members"), name) else { continue };
            if let Some((group, place)) = taken.get(&instance) {
                let text = format!("{instance} is in group {group} already, at {place}; one group is all");
                reader.problem(&member.place, s.key("members"), text);
                continue;
            }
            taken.insert(instance.clone(), (g.name.clone(), member.place.clone()));
            g.members.push(instance);
        }
        if members.is_empty() {
            reader.problem(
                s.place,
                s.key("members"),
                "a group needs members: a list of instances in start order",
            );
        }
        reader.note(format!("groups.{}", g.name), s.place);
        groups.push(g);
    }
    groups
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/') {
        return Err(format!("{text:?} is not a name"));
    }
    Ok(text.to_owned())
}
