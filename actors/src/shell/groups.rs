//! The groups of instances: hears where members stand, and tells them to stop and start.

use std::sync::{Arc, Mutex, PoisonError};

use super::actor::{self, Actor, ActorCell, ActorRef, Failure};
use futures::FutureExt;
use kmorph_control::views::{EventKind, GroupMember, GroupView};
use tokio::sync::oneshot;
use tracing::{error, info};

use super::children::{ChildDef, Started};
use super::directory::Directory;
use super::instance::{Env, GroupOrder, InstanceMsg};
use super::log::Draft;
use crate::core::group::{Action, Group, GroupSpec, State};
use crate::core::recovery::Standing;
use crate::core::supervisor::{ChildSpec, Strategy};

/// Messages of the groups actor.
pub(crate) enum GroupsMsg {
    /// A member says where it stands.
    Standing { member: String, standing: Standing },
    /// The configuration has other groups now.
    Reload,
    /// What operators see; members' own states are filled in by the asker.
    View(oneshot::Sender<Vec<GroupView>>),
    #[cfg(test)]
    Panic,
}

/// The number of the incident that a group is answering, shared by its members: failures that follow from one
/// another are one incident.
#[derive(Clone, Default)]
pub(crate) struct GroupIncidents(Arc<Mutex<std::collections::BTreeMap<String, u64>>>);

impl GroupIncidents {
    fn lock(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<String, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The incident that is open in this group.
    pub(crate) fn get(&self, group: &str) -> Option<u64> {
        self.lock().get(group).copied()
    }

    /// Open one, unless another member was first: whoever is second joins.
    pub(crate) fn open(&self, group: &str, number: u64) -> u64 {
        *self.lock().entry(group.to_owned()).or_insert(number)
    }

    fn close(&self, group: &str) {
        self.lock().remove(group);
    }
}

/// What it needs.
#[derive(Clone)]
pub(crate) struct GroupsArgs {
    pub(crate) env: Arc<Env>,
    pub(crate) directory: Directory,
}

pub(crate) struct GroupsState {
    args: GroupsArgs,
    groups: Vec<Group>,
    shown: std::collections::BTreeMap<String, State>,
}

impl GroupsState {
    /// Take up groups as they are configured. Those that did not change go on with what they do.
    fn configure(&mut self) {
        let specs: Vec<GroupSpec> = self.args.env.settings().groups.clone();
        let mut old = std::mem::take(&mut self.groups);
        for spec in specs {
            match old.iter().position(|g| *g.spec() == spec) {
                Some(at) => self.groups.push(old.swap_remove(at)),
                None => {
                    self.args.env.incidents.close(&spec.name);
                    self.groups.push(Group::new(spec.clone()));
                    self.gather(&spec);
                }
            }
        }
        for gone in old {
            self.shown.remove(&gone.spec().name);
            self.args.env.incidents.close(&gone.spec().name);
        }
    }

    /// Have every member say where it stands. One that was never started stands outside.
    fn gather(&mut self, spec: &GroupSpec) {
        for member in &spec.members {
            match self.args.directory.get(member) {
                Some(instance) => drop(instance.link.send(InstanceMsg::Regroup)),
                None => self.standing(member, Standing::Left),
            }
        }
    }

    fn standing(&mut self, member: &str, standing: Standing) {
        let now = self.args.env.now();
        let Some(at) = self.groups.iter().position(|g| g.spec().members.iter().any(|m| m == member)) else {
            return;
        };
        let actions = self.groups[at].step(now, member, standing);
        let name = self.groups[at].spec().name.clone();
        for action in actions {
            match action {
                Action::Stop { member, why } => {
                    info!(group = %name, %member, %why, "stopping a member");
                    let effect = format!("stopping {member}");
                    self.say(at, Draft::new(EventKind::Group, why.clone()).effect(effect));
                    self.order(&member, GroupOrder::Stop(why));
                }
                Action::Start(member) => {
                    info!(group = %name, %member, "starting a member");
                    let draft = Draft::new(EventKind::Group, format!("it is {member}'s turn"))
                        .effect(format!("starting {member}"));
                    self.say(at, draft);
                    self.order(&member, GroupOrder::Start);
                }
                Action::GiveUp { member, why } => self.order(&member, GroupOrder::GiveUp(why)),
                Action::Settled => self.args.env.incidents.close(&name),
                Action::Alert(text) => {
                    error!(group = %name, "operator needed: {text}");
                    let effect = "its members stay stopped until an operator recovers them";
                    self.say(at, Draft::new(EventKind::Group, text).effect(effect));
                }
            }
        }
        let state = self.groups[at].state();
        let before = self.shown.insert(name, state);
        if before != Some(state) {
            let cause = self.groups[at].reason().unwrap_or("its members said where they stand").to_owned();
            let draft = Draft::new(EventKind::Group, cause)
                .transition(before.map(|s| s.name().to_owned()), state.name());
            self.say(at, draft);
        }
    }

    fn say(&self, at: usize, mut draft: Draft) {
        let name = &self.groups[at].spec().name;
        draft.incident = self.args.env.incidents.get(name);
        draft.group = Some(name.clone());
        self.args.env.log.say(draft);
    }

    fn order(&mut self, member: &str, order: GroupOrder) {
        if let Some(instance) = self.args.directory.get(member) {
            instance.link.send(InstanceMsg::Group(order));
        }
    }

    fn views(&self) -> Vec<GroupView> {
        let now = self.args.env.now();
        self.groups
            .iter()
            .map(|group| {
                let (spec, state) = (group.spec(), group.state());
                let reason = match (state, group.reason(), group.culprit()) {
                    (_, Some(reason), _) => reason.to_owned(),
                    (State::Restarting, None, Some(culprit)) => format!("{culprit} failed"),
                    (State::Restarting, None, None) => "members are being started".into(),
                    (State::Up, None, _) => "its members run".into(),
                    (State::Stopped, None, _) => "no member runs".into(),
                    (State::Gathering, None, _) => "not every member has said where it stands".into(),
                    (State::Degraded, None, _) => String::new(),
                };
                let advice = match state {
                    State::Degraded => format!(
                        "find the cause, then start them again in this order: {}",
                        spec.members
                            .iter()
                            .map(|m| format!("kmorphctl recover {m}"))
                            .collect::<Vec<_>>()
                            .join("; ")
                    ),
                    _ => String::new(),
                };
                GroupView {
                    name: spec.name.clone(),
                    strategy: match spec.strategy {
                        Strategy::OneForOne => "one-for-one",
                        Strategy::OneForAll => "one-for-all",
                        Strategy::RestForOne => "rest-for-one",
                    }
                    .into(),
                    state: state.name().into(),
                    reason,
                    advice,
                    restart_intensity: spec.intensity,
                    restart_period_ms: u64::try_from(spec.period.as_millis()).unwrap_or(u64::MAX),
                    restarts: u32::try_from(group.restarts(now)).unwrap_or(u32::MAX),
                    incident: self.args.env.incidents.get(&spec.name),
                    members: spec
                        .members
                        .iter()
                        .map(|name| GroupMember { name: name.clone(), state: None, reason: String::new() })
                        .collect(),
                }
            })
            .collect()
    }
}

/// The actor.
pub(crate) struct Groups;

impl Actor for Groups {
    type Msg = GroupsMsg;
    type State = GroupsState;
    type Arguments = GroupsArgs;

    async fn pre_start(&self, myself: ActorRef<GroupsMsg>, args: GroupsArgs) -> Result<GroupsState, Failure> {
        // Members answer to the link.
        args.env.groups.set(myself);
        let mut state = GroupsState { args, groups: vec![], shown: Default::default() };
        state.configure();
        Ok(state)
    }

    async fn handle(
        &self,
        _: ActorRef<GroupsMsg>,
        message: GroupsMsg,
        state: &mut GroupsState,
    ) -> Result<(), Failure> {
        state.args.env.groups.taken();
        match message {
            GroupsMsg::Standing { member, standing } => state.standing(&member, standing),
            GroupsMsg::Reload => state.configure(),
            // Who asked may have given up waiting.
            GroupsMsg::View(reply) => drop(reply.send(state.views())),
            #[cfg(test)]
            GroupsMsg::Panic => panic!("asked to panic"),
        }
        Ok(())
    }
}

/// The actor as a child.
pub(crate) fn child(args: GroupsArgs) -> ChildDef {
    let start = Arc::new(move |parent: ActorCell| {
        let args = args.clone();
        async move {
            let actor = actor::spawn_linked(Groups, args, parent).await.map_err(|e| e.to_string())?;
            Ok(Started::worker(actor.cell()))
        }
        .boxed()
    });
    ChildDef { spec: ChildSpec::new("groups"), start }
}
