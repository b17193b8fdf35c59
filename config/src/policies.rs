//! Policies in files: the defaults, what is said of single instances, and what operators export and import.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kmorph_actors::{Key, Patch, Policy, PolicyError};

use crate::node::{Node, Place};
use crate::reader::{ConfigError, Reader, Section};

/// Older names of some settings, with the section they are in.
const HEARTBEAT: &[(&str, Key)] = &[
    ("timeout", Key::HeartbeatTimeout),
    ("pulse-period", Key::PulsePeriod),
    ("pulse-misses", Key::PulseMisses),
];
const RECOVERY: &[(&str, Key)] = &[
    ("boot-timeout", Key::BootTimeout),
    ("restart-intensity", Key::RestartIntensity),
    ("restart-period", Key::RestartPeriod),
    ("restart-delay", Key::RestartDelay),
];
/// Keys of the section `recovery`.
pub(crate) const RECOVERY_KEYS: &[&str] =
    &["boot-timeout", "terminate-grace", "restart-intensity", "restart-period", "restart-delay"];
const HEARTBEAT_KEYS: &[&str] = &["timeout", "pulse-period", "pulse-misses"];

fn message(error: &PolicyError) -> String {
    match error {
        // The key is said already.
        PolicyError::BadValue { key, value } => {
            format!("{value:?} is not possible; allowed: {}", key.allowed())
        }
        other => other.to_string(),
    }
}

/// One value of a policy, checked by itself.
fn value(reader: &Reader, node: &Node, path: &str, key: Key) -> Option<String> {
    let check = |text: &str| {
        let mut scratch = Policy::default();
        scratch.set(key, text).map_err(|e| message(&e))?;
        Ok(scratch.get(key))
    };
    reader.parse(node, path, check)
}

/// What policies start from: the profile, and what is said on top of it.
pub(crate) fn defaults(reader: &Reader, root: &Section<'_>, base: Policy) -> Policy {
    let names = Key::ALL.map(Key::name);
    let mut given: BTreeMap<Key, (String, Place)> = BTreeMap::new();
    let mut patch = Patch::default();
    let mut last: Option<Place> = None;
    let mut take = |name: &str, key: Key, node: &Node| {
        if let Some((other, place)) = given.get(&key) {
            reader.problem(
                &node.place,
                name,
                format!("this is {other}, which is given at {place} already; keep one of the two"),
            );
            return;
        }
        given.insert(key, (name.to_owned(), node.place.clone()));
        if let Some(text) = value(reader, node, name, key) {
            reader.note(format!("policy.{key}"), &node.place);
            last = Some(node.place.clone());
            // Checked just now; an error would have been said.
            let _ = patch.set(key, &text);
        }
    };
    if let Some(node) = root.get("policy") {
        let s = reader.section(node, "policy", &names);
        for entry in s.entries {
            if let Ok(key) = entry.key.parse::<Key>() {
                take(&s.key(&entry.key), key, &entry.node);
            }
        }
    }
    for (section, keys, map) in [("heartbeat", Some(HEARTBEAT_KEYS), HEARTBEAT), ("recovery", None, RECOVERY)]
    {
        let Some(node) = root.get(section) else { continue };
        let s = match keys {
            Some(keys) => reader.section(node, section, keys),
            None => reader.names(node, section), // its unknown keys are looked at elsewhere
        };
        for (name, key) in map {
            if let Some(node) = s.get(name) {
                take(&s.key(name), *key, node);
            }
        }
    }
    match patch.apply(base) {
        Ok(policy) => policy,
        Err(e) => {
            reader.problem(last.as_ref().unwrap_or(root.place), "policy", message(&e));
            base
        }
    }
}

/// What is said of single instances.
pub(crate) fn of_instances(
    reader: &Reader,
    node: Option<&Node>,
    defaults: Policy,
) -> BTreeMap<String, Patch> {
    let all = patches(reader, node);
    for (name, (patch, place)) in &all {
        if let Err(e) = patch.apply(defaults) {
            reader.problem(place, format!("policies.{name}"), message(&e));
        }
    }
    all.into_iter().map(|(name, (patch, _))| (name, patch)).collect()
}

fn patches(reader: &Reader, node: Option<&Node>) -> BTreeMap<String, (Patch, Place)> {
    let names = Key::ALL.map(Key::name);
    let mut all = BTreeMap::new();
    let Some(node) = node else { return all };
    for instance in reader.names(node, "policies").entries {
        let s = reader.section(&instance.node, &format!("policies.{}", instance.key), &names);
        let mut patch = Patch::default();
        for entry in s.entries {
            let Ok(key) = entry.key.parse::<Key>() else { continue };
            if let Some(text) = value(reader, &entry.node, &s.key(&entry.key), key) {
                // Checked just now; an error would have been said.
                let _ = patch.set(key, &text);
            }
        }
        all.insert(instance.key.clone(), (patch, instance.place.clone()));
    }
    all
}

/// Read what [`export_policies`] wrote. `file` is for errors.
pub fn import_policies(text: &str, file: &str) -> Result<BTreeMap<String, Patch>, ConfigError> {
    let reader = Reader::default();
    let file: Arc<Path> = Path::new(file).into();
    let mut all = BTreeMap::new();
    match Node::parse(text, &file) {
        Err(problem) => return Err(ConfigError::one(kmorph_control::ErrorKind::BadInput, problem)),
        Ok(None) => {}
        Ok(Some(root)) => {
            let s = reader.section(&root, "", &["policies"]);
            all = patches(&reader, s.get("policies"));
        }
    }
    reader.finish()?;
    Ok(all.into_iter().map(|(name, (patch, _))| (name, patch)).collect())
}

/// Policies as a section of a configuration file.
pub fn export_policies(all: &BTreeMap<String, Patch>) -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(&BTreeMap::from([("policies", all)]))
}
