//! Policies in layers, groups and maintenance, as operators change them.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{EventKind, GroupView, InstanceView, PolicyChange, PolicySetting, PolicyView};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::groups::GroupsMsg;
use super::instance::InstanceMsg;
use super::log::{Draft, EventLog};
use super::tree::{ANSWER_LIMIT, Tree, gone};
use crate::config::Settings;
use crate::core::policy::{Key, Patch, Policy, PolicyError, Source, hang_bound};
use crate::store::Role;

impl Settings {
    /// The policy the configuration gives an instance, with what operators set on top.
    pub fn policy(&self, name: &str, overrides: &Patch) -> Result<Policy, PolicyError> {
        let below = match self.policies.get(name) {
            Some(patch) => patch.apply(self.defaults)?,
            None => self.defaults,
        };
        overrides.apply(below)
    }

    fn source(&self, name: Option<&str>, overrides: &Patch, key: Key) -> Source {
        if overrides.get(key).is_some() {
            Source::Operator
        } else if name.and_then(|n| self.policies.get(n)).is_some_and(|p| p.get(key).is_some()) {
            Source::Config
        } else {
            Source::Default
        }
    }
}

fn changes(instance: Option<&str>, from: &Policy, to: &Policy) -> Vec<PolicyChange> {
    Key::ALL
        .into_iter()
        .filter(|key| from.get(*key) != to.get(*key))
        .map(|key| PolicyChange {
            instance: instance.map(str::to_owned),
            key: key.name().into(),
            from: from.get(key),
            to: to.get(key),
        })
        .collect()
}

fn refused(name: &str, error: &PolicyError) -> OpError {
    OpError::new(ErrorKind::BadInput, format!("policy of {name}: {error}"))
}

impl Tree {
    /// Every setting of an instance, or of the defaults, and where it comes from.
    pub async fn policy_view(&self, name: Option<&str>) -> Result<PolicyView, OpError> {
        let overrides = match name {
            Some(name) => self.overrides_of(name).await?,
            None => Patch::default(),
        };
        let settings = self.env.settings();
        let policy = settings
            .policy(name.unwrap_or_default(), &overrides)
            .map_err(|e| refused(name.unwrap_or("the defaults"), &e))?;
        Ok(PolicyView {
            instance: name.map(str::to_owned),
            settings: Key::ALL
                .into_iter()
                .map(|key| PolicySetting {
                    key: key.name().into(),
                    value: policy.get(key),
                    source: settings.source(name, &overrides, key).name().into(),
                    allowed: key.allowed().into(),
                    help: key.help().into(),
                })
                .collect(),
            hang_bound_ms: u64::try_from(hang_bound(&policy).as_millis()).unwrap_or(u64::MAX),
        })
    }

    async fn overrides_of(&self, name: &str) -> Result<Patch, OpError> {
        match self.directory.get(name) {
            Some(instance) => Ok(instance.record().overrides.clone()),
            None => self.definition(name).await.map(|_| Patch::default()),
        }
    }

    /// Set one setting of an instance, or leave it to the configuration again, at once and durably.
    pub async fn policy_set(
        &self,
        name: &str,
        key: Key,
        value: Option<&str>,
    ) -> Result<Vec<PolicyChange>, OpError> {
        let mut overrides = self.overrides_of(name).await?;
        match value {
            Some(value) => overrides.set(key, value).map_err(|e| refused(name, &e))?,
            None => drop(overrides.unset(key)),
        }
        self.policy_import(BTreeMap::from([(name.to_owned(), overrides)]), false).await
    }

    /// What operators set, by instance.
    pub fn policy_export(&self) -> BTreeMap<String, Patch> {
        let all = self.directory.all();
        all.iter()
            // What standbys and sides of morphs differ in goes with them.
            .filter(|i| i.record().role == Role::Own)
            .map(|i| (i.name.clone(), i.record().overrides.clone()))
            .filter(|(_, patch)| !patch.is_empty())
            .collect()
    }

    /// Replace what operators set of the instances named. All or nothing.
    pub async fn policy_import(
        &self,
        policies: BTreeMap<String, Patch>,
        dry_run: bool,
    ) -> Result<Vec<PolicyChange>, OpError> {
        let mut diff = Vec::new();
        let mut plan = Vec::new();
        let settings = self.env.settings().clone();
        for (name, patch) in policies {
            let before = self.overrides_of(&name).await?;
            let from = settings.policy(&name, &before).map_err(|e| refused(&name, &e))?;
            let to = settings.policy(&name, &patch).map_err(|e| refused(&name, &e))?;
            diff.extend(changes(Some(&name), &from, &to));
            plan.push((name, patch, to));
        }
        if !dry_run {
            let mut instances = Vec::new();
            for (name, overrides, policy) in plan {
                let instance = match self.directory.get(&name) {
                    Some(instance) => instance,
                    None => self.admit(self.definition(&name).await?, policy).await?,
                };
                instances.push((instance, overrides, policy));
            }
            // All at once, so that they are written down together.
            let changes = instances.into_iter().map(|(instance, overrides, policy)| async move {
                let message = |reply| InstanceMsg::SetPolicy { policy, overrides, reply: Some(reply) };
                self.change(&instance, message).await
            });
            join_all(changes).await.into_iter().collect::<Result<(), OpError>>()?;
            for change in &diff {
                self.say_change(change, "an operator set it");
            }
        }
        Ok(diff)
    }

    fn say_change(&self, change: &PolicyChange, why: &str) {
        let mut draft = Draft::new(EventKind::Policy, format!("{}: {why}", change.key))
            .transition(Some(change.from.clone()), change.to.clone())
            .effect("in force from now on");
        draft.instance.clone_from(&change.instance);
        self.env.log.say(draft);
    }

    /// Take up another configuration: policies and groups, at once, without touching an instance. All or
    /// nothing. Returns what changed of policies, and one sentence for each group that changed.
    pub async fn reload(&self, settings: Settings) -> Result<(Vec<PolicyChange>, Vec<String>), OpError> {
        let old = self.env.settings().clone();
        let mut diff = changes(None, &old.defaults, &settings.defaults);
        let mut plan = Vec::new();
        for instance in self.directory.all() {
            let (overrides, from) = {
                let r = instance.record();
                (r.overrides.clone(), r.policy)
            };
            let to = settings.policy(&instance.name, &overrides).map_err(|e| refused(&instance.name, &e))?;
            diff.extend(changes(Some(&instance.name), &from, &to));
            if from != to {
                plan.push((instance, to, overrides));
            }
        }
        let mut groups = Vec::new();
        for group in &settings.groups {
            match old.groups.iter().find(|g| g.name == group.name) {
                None => groups.push(format!("group {} is new: {}", group.name, group.members.join(", "))),
                Some(before) if before != group => groups.push(format!("group {} was changed", group.name)),
                Some(_) => {}
            }
        }
        for gone in old.groups.iter().filter(|g| settings.groups.iter().all(|n| n.name != g.name)) {
            groups.push(format!("group {} is gone: its members are on their own", gone.name));
        }
        self.env.set_settings(settings);
        for (instance, policy, overrides) in plan {
            // An actor that is being restarted reads the policy when it is back.
            instance.link.send(InstanceMsg::SetPolicy { policy, overrides, reply: None });
        }
        if !groups.is_empty() {
            for instance in self.directory.all() {
                instance.link.send(InstanceMsg::Regroup);
            }
            self.env.groups.send(GroupsMsg::Reload);
        }
        for change in &diff {
            self.say_change(change, "the configuration was reloaded");
        }
        for text in &groups {
            self.env
                .log
                .say(Draft::new(EventKind::Group, text.clone()).effect("the configuration was reloaded"));
        }
        Ok((diff, groups))
    }

    /// All groups.
    pub async fn groups(&self) -> Result<Vec<GroupView>, OpError> {
        let (reply, answer) = oneshot::channel();
        self.env.groups.send(GroupsMsg::View(reply));
        let Ok(Ok(mut groups)) = timeout(ANSWER_LIMIT, answer).await else {
            return Err(gone("the groups' actor"));
        };
        for member in groups.iter_mut().flat_map(|g| &mut g.members) {
            if let Ok(view) = self.status(&member.name).await {
                member.state = Some(view.state);
                member.reason = view.reason;
            } else {
                member.reason = "it is not defined".into();
            }
        }
        Ok(groups)
    }

    /// One group.
    pub async fn group(&self, name: &str) -> Result<GroupView, OpError> {
        let groups = self.groups().await?;
        let names = groups.iter().map(|g| g.name.clone()).collect::<Vec<_>>().join(", ");
        groups.into_iter().find(|g| g.name == name).ok_or_else(|| {
            let there = if names.is_empty() {
                "there are none: groups are in the configuration file".to_owned()
            } else {
                format!("there are {names}")
            };
            OpError::new(ErrorKind::NotFound, format!("there is no group {name}; {there}"))
        })
    }

    /// Watch an instance without acting on it, or act on it again.
    pub async fn maintenance(&self, name: &str, on: bool) -> Result<InstanceView, OpError> {
        let instance = match self.directory.get(name) {
            Some(instance) => instance,
            None => {
                let policy = self.env.policy(name, &Patch::default());
                self.admit(self.definition(name).await?, policy).await?
            }
        };
        self.change(&instance, |reply| InstanceMsg::Maintenance { on, reply }).await
    }

    /// What happened lately.
    pub fn events(&self) -> &EventLog {
        &self.env.log
    }

    /// Have something that the daemon itself did, or that happened to it, among the events.
    pub fn announce(&self, kind: EventKind, cause: &str, effect: &str) {
        self.env.log.say(Draft::new(kind, cause).effect(effect));
    }

    /// Whether the actors answer: for a service manager's watchdog.
    pub async fn responsive(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.env.groups.send(GroupsMsg::View(reply))
            && matches!(timeout(Duration::from_secs(2), answer).await, Ok(Ok(_)))
    }
}
