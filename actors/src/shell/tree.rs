//! The tree as kmorphd uses it.

use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use super::actor::{self, ActorRef};
use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{
    HealthView, HeartbeatView, InstanceState, InstanceView, PingView, RecoveryLogArgs, RecoveryStep,
    SpawnArgs,
};
use kmorph_platform::{BootRequest, Growth, InstanceSpec, Platform, PlatformError};
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::children::ChildDef;
use super::directory::Directory;
use super::events::{self, EventsArgs};
use super::groups::{self, GroupIncidents, GroupsArgs};
use super::heartbeat::HeartbeatMsg;
use super::instance::{self, Env, Instance, InstanceArgs, InstanceMsg, Plan, Reply};
use super::link::Link;
use super::log::EventLog;
use super::morph;
use super::service::Service;
use super::supervisor::{SupervisorActor, SupervisorArgs, SupervisorMsg, supervisor_child};
use super::switch::Switch;
use super::topology::{self, Broadcast};
use super::transport::{self, Connections, TransportArgs};
use super::view;
use crate::config::{Definitions, StartError, TreeConfig};
use crate::core::policy::{Key, Patch, Policy};
use crate::core::recovery::{Goal, Phase, Saved};
use crate::core::supervisor::{ChildSpec, Flags, Shutdown};
use crate::store::{Handover, InstanceRecord, Role, Store};
use crate::telemetry::Lag;

/// Longest wait for an actor's answer that needs no work.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at a state nobody tells of.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest wait for a heartbeat by hand.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// The running supervision tree.
pub struct Tree {
    pub(super) env: Arc<Env>,
    pub(super) directory: Directory,
    root: ActorRef<SupervisorMsg>,
}

pub(super) fn gone(what: &str) -> OpError {
    OpError::new(ErrorKind::Internal, format!("{what} is being restarted: try again"))
}

fn not_found(name: &str) -> OpError {
    OpError::new(ErrorKind::NotFound, format!("there is no instance {name}"))
}

/// The kind of error a platform's refusal is to an operator.
pub(super) fn refused(name: &str, error: &PlatformError) -> OpError {
    let kind = match error {
        PlatformError::Invalid(_) | PlatformError::BadImage(_) => ErrorKind::BadInput,
        PlatformError::Busy(_) => ErrorKind::Busy,
        PlatformError::Unknown(_) => ErrorKind::NotFound,
        PlatformError::StaleIncarnation { .. } | PlatformError::NotFenced(_) => ErrorKind::Conflict,
        PlatformError::Timeout { .. } => ErrorKind::Timeout,
        PlatformError::Unavailable(_) | PlatformError::Os { .. } => ErrorKind::Internal,
    };
    OpError::new(kind, format!("instance {name}: {error}"))
}

impl Tree {
    /// Start the tree: remember the instances, adopt those that run, finish or undo what a daemon before left
    /// half done.
    pub async fn start(
        config: TreeConfig,
        platform: Arc<dyn Platform>,
        store: Arc<dyn Store>,
        definitions: Arc<dyn Definitions>,
    ) -> Result<Tree, StartError> {
        crate::telemetry::describe();
        let directory = Directory::default();
        let instances: Link<SupervisorMsg> = Link::new("instances");
        let transport = Link::new("transport");
        let connections = Connections::default();
        let topology = Broadcast::new();
        let env = Arc::new(Env {
            config: config.clone(),
            platform: platform.clone(),
            store,
            transport: transport.clone(),
            connections: connections.clone(),
            lag: Lag::default(),
            base: Instant::now(),
            log: EventLog::default(),
            groups: Link::new("groups"),
            incidents: GroupIncidents::default(),
            settings: RwLock::new(config.settings.clone()),
            directory: directory.clone(),
            definitions: definitions.clone(),
            instances: instances.clone(),
            admission: Mutex::new(()),
            switch: Switch::new(platform.clone()),
            topology: topology.clone(),
        });
        remember(&env, &directory, &definitions).await?;
        morph::sweep(&platform).await;

        let children = vec![
            transport::child(TransportArgs {
                platform: platform.clone(),
                directory: directory.clone(),
                link: transport,
                connections,
                release: config.release.clone(),
                seed: config.seed,
                topology: topology.told.clone(),
            }),
            topology::child(env.clone()),
            instances_child(&env, &directory, &instances),
            groups::child(GroupsArgs { env: env.clone(), directory: directory.clone() }),
            events::child(EventsArgs {
                source: platform.take_events().map(|r| Arc::new(Mutex::new(r))),
                directory: directory.clone(),
            }),
        ];
        let flags = Flags { intensity: 3, period: Duration::from_secs(10), ..Flags::default() };
        let args = SupervisorArgs { name: "root".into(), flags, children };
        let root = actor::spawn(SupervisorActor, args).await.map_err(|e| StartError::Actor(e.to_string()))?;
        Ok(Tree { env, directory, root })
    }

    /// Add a service of kmorphd as a child of the root. It is stopped before everything that was started
    /// earlier.
    pub async fn add_service(&self, service: Service) -> Result<(), StartError> {
        add(|m| self.root.send_message(m).is_ok(), service.child()).await.map_err(StartError::Actor)
    }

    /// Returns when the tree has ended, by itself or because it was asked to.
    pub async fn closed(&self) {
        // Without a limit the only error is a cell that is gone, which is an end as well.
        let _ = self.root.cell().wait(None).await;
    }

    /// Start an instance. With `args.wait` it returns when the instance serves. A start that fails gives
    /// everything back and says why, with the last lines of the instance's console.
    pub async fn spawn(&self, args: SpawnArgs) -> Result<InstanceView, OpError> {
        let spec = self.definition(&args.name).await?;
        let known = self.directory.get(&args.name);
        let before = known.as_ref().map(|i| i.record().overrides.clone()).unwrap_or_default();
        let overrides = overrides(&args, before)?;
        let policy = self.env.settings().policy(&args.name, &overrides);
        let policy = policy.map_err(|e| OpError::new(ErrorKind::Usage, format!("policy: {e}")))?;
        let handover = match args.handover_bytes {
            0 => None,
            bytes => {
                let store = &self.env.store;
                let key = store.next_incident().await;
                let key = key.map_err(|e| OpError::new(ErrorKind::Internal, e.to_string()))?;
                // What the platform cannot do is said before anything is started.
                self.env.platform.handover_list().await.map_err(|e| refused(&args.name, &e))?;
                Some(Handover { key, bytes })
            }
        };
        let incarnation = known.as_ref().map_or(1, |i| i.record().incarnation + 1);
        let plan = Plan {
            spec: spec.clone(),
            policy,
            overrides,
            kernel: PathBuf::from(&args.kernel),
            initramfs: args.initramfs.as_ref().map(PathBuf::from),
            cmdline: args.cmdline.clone().unwrap_or_default(),
            publish: args.publish.clone(),
            handover,
            growth: Growth::default(),
        };
        if self.may_start(known.as_deref()).await {
            morph::make_way(&self.env, &plan.spec).await?;
            let request = BootRequest {
                spec: plan.spec.clone(),
                incarnation,
                kernel: plan.kernel.clone(),
                initramfs: plan.initramfs.clone(),
                cmdline: plan.cmdline.clone(),
                pulse_period: policy.pulse_period,
                growth: Growth::default(),
            };
            self.env.platform.check(&request).await.map_err(|e| refused(&args.name, &e))?;
        }
        let instance = self.admit(spec, policy).await?;
        // A start, its grace, and giving everything back when it fails.
        let limit = policy.boot_grace.saturating_mul(2) + self.env.config.effect_limit * 4;
        self.wish(&instance, limit, |reply| InstanceMsg::Spawn {
            plan: Box::new(plan),
            wait: args.wait,
            reply,
        })
        .await
    }

    /// Stop an instance and give its CPUs and memory back. Without `force` its agent is first asked to stop
    /// the workload.
    pub async fn terminate(&self, name: &str, force: bool) -> Result<InstanceView, OpError> {
        let instance = self.instance(name).await?;
        let c = &self.env.config;
        let limit = c.terminate_grace * 2 + c.effect_limit * 4 + instance.record().policy.boot_grace;
        let ended = self.wish(&instance, limit, |reply| InstanceMsg::Terminate { force, reply }).await?;
        // What its standby has goes back with the rest.
        let standby = morph::standby_name(name);
        let until = Instant::now() + c.effect_limit * 4 + instance.record().policy.boot_grace;
        while self.directory.get(&standby).is_some() && Instant::now() < until {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(ended)
    }

    /// Recover an instance now: fence it, take its resources back, start it again. Returns when it serves.
    pub async fn recover(&self, name: &str) -> Result<InstanceView, OpError> {
        let instance = self.instance(name).await?;
        let limit = instance.record().policy.boot_grace.saturating_mul(2) + self.env.config.effect_limit * 4;
        self.wish(&instance, limit, |reply| InstanceMsg::Recover { reply }).await
    }

    /// All instances: those that are known here and those that are only defined.
    pub async fn list(&self) -> Vec<InstanceView> {
        let mut views = Vec::new();
        for instance in self.directory.all() {
            match self.view(&instance).await {
                Ok(view) => views.push(view),
                Err(error) => warn!(instance = %instance.name, %error, "left out of the list"),
            }
        }
        let definitions = self.env.definitions.clone();
        match tokio::task::spawn_blocking(move || definitions.all()).await {
            Ok(specs) => {
                for spec in specs.iter().filter(|s| self.directory.get(&s.name).is_none()) {
                    views.push(self.defined(spec));
                }
            }
            Err(error) => warn!(%error, "definitions cannot be read"),
        }
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    /// One instance.
    pub async fn status(&self, name: &str) -> Result<InstanceView, OpError> {
        match self.directory.get(name) {
            Some(instance) => self.view(&instance).await,
            None => Ok(self.defined(&self.definition(name).await?)),
        }
    }

    /// Heartbeat figures of an instance.
    pub async fn heartbeat(&self, name: &str) -> Result<HeartbeatView, OpError> {
        let instance = self.instance(name).await?;
        self.ask(&instance, InstanceMsg::HeartbeatView).await
    }

    /// Health figures of an instance.
    pub async fn health(&self, name: &str) -> Result<HealthView, OpError> {
        let instance = self.instance(name).await?;
        self.ask(&instance, InstanceMsg::HealthView).await
    }

    /// One heartbeat by hand.
    pub async fn ping(&self, name: &str) -> Result<PingView, OpError> {
        let instance = self.instance(name).await?;
        let (reply, answer) = oneshot::channel();
        if !instance.heartbeat.send(HeartbeatMsg::Ping(reply)) {
            return Err(gone("its heartbeat actor"));
        }
        match timeout(PING_LIMIT, answer).await {
            Ok(Ok((rtt, incarnation))) => {
                let rtt_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
                Ok(PingView { name: name.to_owned(), rtt_us, incarnation })
            }
            Ok(Err(_)) => {
                Err(OpError::new(ErrorKind::Conflict, format!("instance {name} is not being watched")))
            }
            Err(_) => {
                let text = format!("instance {name} did not answer within {PING_LIMIT:?}");
                Err(OpError::new(ErrorKind::Timeout, text))
            }
        }
    }

    /// Steps of recoveries, oldest first.
    pub async fn recovery_log(&self, args: RecoveryLogArgs) -> Result<Vec<RecoveryStep>, OpError> {
        let limit = self.env.config.store_limit;
        match timeout(limit, self.env.store.recovery_log(&args)).await {
            Ok(Ok(steps)) => Ok(steps),
            Ok(Err(error)) => {
                Err(OpError::new(ErrorKind::Internal, format!("read the recovery log: {error}")))
            }
            Err(_) => Err(OpError::new(
                ErrorKind::Timeout,
                format!("the recovery log was not read within {limit:?}"),
            )),
        }
    }

    /// The policy an instance is watched and recovered by.
    pub async fn policy_of(&self, name: &str) -> Result<Policy, OpError> {
        match self.directory.get(name) {
            Some(instance) => Ok(instance.record().policy),
            None => self.definition(name).await.map(|_| self.env.policy(name, &Patch::default())),
        }
    }

    /// The latest that a timer of the daemon came since it started.
    pub fn max_lag(&self) -> Duration {
        self.env.lag.max()
    }

    /// How late this share of the daemon's timers came at most in the last ten to twenty seconds.
    pub fn lag(&self, share: f64) -> Duration {
        self.env.lag.quantile(share, self.env.now())
    }

    /// End the tree and leave running kernels running: the next daemon adopts them. Safe to call again.
    pub async fn shutdown(&self) {
        // A root that is gone has nothing to end.
        let _ = self.root.send_message(SupervisorMsg::Shutdown);
        self.env.switch.close_all();
        let n = u32::try_from(self.directory.all().len()).unwrap_or(u32::MAX).saturating_add(8);
        let limit = self.env.config.shutdown_limit.saturating_mul(n).saturating_mul(2);
        if self.root.cell().wait(Some(limit)).await.is_err() {
            warn!(?limit, "the tree did not end in time: killed");
            self.root.cell().kill();
        }
    }

    /// Stop every instance. Returns what could not be stopped.
    pub async fn terminate_all(&self, force: bool) -> Vec<OpError> {
        let running: Vec<Arc<Instance>> =
            self.directory.all().into_iter().filter(|i| is_to_stop(&i.record())).collect();
        let ends = running.iter().map(|i| async {
            let ended = self.terminate(&i.name, force).await;
            // One side of a morph may have ended and been forgotten by itself.
            if self.directory.get(&i.name).is_none() { Ok(()) } else { ended.map(|_| ()) }
        });
        futures::future::join_all(ends).await.into_iter().filter_map(Result::err).collect()
    }

    /// Stop every instance, then end the tree. Returns what could not be stopped.
    pub async fn drain(&self, force: bool) -> Vec<OpError> {
        let errors = self.terminate_all(force).await;
        self.shutdown().await;
        errors
    }

    #[cfg(test)]
    pub(crate) fn env_for_test(&self) -> &Env {
        &self.env
    }

    /// As kill -9 would: nothing is said, nothing is waited for.
    #[cfg(test)]
    pub(crate) fn kill_for_test(&self) {
        self.root.cell().kill();
    }

    #[cfg(test)]
    pub(crate) fn instance_for_test(&self, name: &str) -> Arc<Instance> {
        self.directory.get(name).unwrap()
    }

    // Inside.

    fn defined(&self, spec: &InstanceSpec) -> InstanceView {
        let mut view = view::defined(spec, &self.env.policy(&spec.name, &Patch::default()));
        view.group = self.env.group_of(&spec.name);
        view
    }

    pub(super) async fn definition(&self, name: &str) -> Result<InstanceSpec, OpError> {
        let (definitions, name) = (self.env.definitions.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || definitions.load(&name))
            .await
            .map_err(|e| OpError::new(ErrorKind::Internal, format!("read a definition: {e}")))?
    }

    /// Whether a start would be accepted, so that its request is worth checking; if not, the instance's own
    /// refusal says why.
    async fn may_start(&self, known: Option<&Instance>) -> bool {
        match known {
            None => true,
            Some(instance) => match self.view(instance).await {
                Ok(v) => {
                    matches!(
                        v.state,
                        InstanceState::Defined | InstanceState::Stopped | InstanceState::Degraded
                    )
                }
                Err(_) => false,
            },
        }
    }

    /// The instance with this definition, known from now on.
    pub(super) async fn admit(&self, spec: InstanceSpec, policy: Policy) -> Result<Arc<Instance>, OpError> {
        admit(&self.env, InstanceRecord::new(spec, policy)).await
    }

    /// An instance that is known here; one that is only defined never ran.
    pub(super) async fn instance(&self, name: &str) -> Result<Arc<Instance>, OpError> {
        match self.directory.get(name) {
            Some(instance) => Ok(instance),
            None => {
                self.definition(name).await.map_err(|e| match e.kind {
                    ErrorKind::NotFound => not_found(name),
                    _ => e,
                })?;
                Err(OpError::new(ErrorKind::Conflict, format!("instance {name} does not run: spawn it")))
            }
        }
    }

    async fn view(&self, instance: &Instance) -> Result<InstanceView, OpError> {
        self.ask(instance, InstanceMsg::View).await
    }

    pub(super) async fn ask<T>(
        &self,
        instance: &Instance,
        message: impl FnOnce(oneshot::Sender<T>) -> InstanceMsg,
    ) -> Result<T, OpError> {
        self.ask_within(instance, ANSWER_LIMIT, "", message).await
    }

    /// Have something changed, which is answered when it is written down: that may wait for writes before it.
    pub(super) async fn change<T>(
        &self,
        instance: &Instance,
        message: impl FnOnce(oneshot::Sender<T>) -> InstanceMsg,
    ) -> Result<T, OpError> {
        let limit = ANSWER_LIMIT + self.env.config.store_limit * 2;
        let hint = "; it may be in force and not be written down: is the disk well?";
        self.ask_within(instance, limit, hint, message).await
    }

    async fn ask_within<T>(
        &self,
        instance: &Instance,
        limit: Duration,
        hint: &str,
        message: impl FnOnce(oneshot::Sender<T>) -> InstanceMsg,
    ) -> Result<T, OpError> {
        let (reply, answer) = oneshot::channel();
        if !instance.link.send(message(reply)) {
            return Err(gone("its actor"));
        }
        match timeout(limit, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(gone("its actor")),
            Err(_) => {
                let text =
                    format!("instance {}: its actor did not answer within {limit:?}{hint}", instance.name);
                Err(OpError::new(ErrorKind::Timeout, text))
            }
        }
    }

    async fn wish(
        &self,
        instance: &Instance,
        limit: Duration,
        message: impl FnOnce(Reply<InstanceView>) -> InstanceMsg,
    ) -> Result<InstanceView, OpError> {
        let (reply, answer) = oneshot::channel();
        if !instance.link.send(message(reply)) {
            return Err(gone("its actor"));
        }
        match timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(gone("its actor")),
            Err(_) => {
                let text = format!("instance {}: not done within {limit:?}; it goes on", instance.name);
                Err(OpError::new(ErrorKind::Timeout, text))
            }
        }
    }
}

/// A standby ends with its instance.
fn is_to_stop(r: &InstanceRecord) -> bool {
    r.saved.phase != Phase::Stopped && !matches!(r.role, Role::Standby(_))
}

/// What an operator set of an instance, with what he asks for now.
fn overrides(args: &SpawnArgs, mut overrides: Patch) -> Result<Patch, OpError> {
    let mut set = |key: Key, value: String| {
        let result = overrides.set(key, &value);
        result.map_err(|e| OpError::new(ErrorKind::Usage, e.to_string()))
    };
    if let Some(monitor) = args.monitor {
        set(Key::AutoHeal, if monitor { "enabled" } else { "disabled" }.into())?;
    }
    if let Some(seconds) = args.heartbeat_timeout_s {
        set(Key::HeartbeatTimeout, seconds.to_string())?;
    }
    if let Some(seconds) = args.boot_timeout_s {
        set(Key::BootTimeout, seconds.to_string())?;
    }
    Ok(overrides)
}

/// The instance of this record, known from now on; the one that is known already when it has the same number.
pub(crate) async fn admit(env: &Arc<Env>, record: InstanceRecord) -> Result<Arc<Instance>, OpError> {
    let _one_at_a_time = env.admission.lock().await;
    let (name, id) = (record.spec.name.clone(), record.spec.id);
    if let Some(instance) = env.directory.get(&name) {
        if instance.id() == id {
            return Ok(instance);
        }
        // A morph gave it another number; one that is stopped begins again as it is defined.
        let stopped = instance.record().saved.phase == Phase::Stopped;
        if stopped && env.directory.renumber(&instance, id) {
            return Ok(instance);
        }
        let text = format!(
            "instance {name} is known here with id {}, its definition now has id {id}: terminate it first",
            instance.id()
        );
        return Err(OpError::new(ErrorKind::Conflict, text));
    }
    let instance = Arc::new(Instance::new(record));
    if !env.directory.insert(instance.clone()) {
        let text = format!("instance {name}: id {id} belongs to another instance");
        return Err(OpError::new(ErrorKind::Conflict, text));
    }
    let args = InstanceArgs { instance: instance.clone(), env: env.clone() };
    if let Err(why) = add(|m| env.instances.send(m), instance::child(args)).await {
        env.directory.remove(&name);
        return Err(OpError::new(ErrorKind::Internal, format!("instance {name}: {why}")));
    }
    Ok(instance)
}

/// Have a supervisor start a child.
async fn add(send: impl FnOnce(SupervisorMsg) -> bool, def: ChildDef) -> Result<(), String> {
    let (reply, answer) = oneshot::channel();
    if !send(SupervisorMsg::Add(def, reply)) {
        return Err("its supervisor does not run".into());
    }
    answer.await.unwrap_or_else(|_| Err("its supervisor ended".into()))
}

/// The instances' supervisor. Whenever it is started, it starts every instance that is known.
fn instances_child(env: &Arc<Env>, directory: &Directory, link: &Link<SupervisorMsg>) -> ChildDef {
    let (env, directory, link) = (env.clone(), directory.clone(), link.clone());
    let mut spec = ChildSpec::new("instances");
    spec.shutdown = Shutdown::Infinity;
    let args = move || SupervisorArgs {
        name: "instances".into(),
        // One budget for all instances, so it is a larger one.
        flags: Flags { intensity: 10, period: Duration::from_secs(10), ..Flags::default() },
        children: directory
            .all()
            .into_iter()
            .map(|instance| instance::child(InstanceArgs { instance, env: env.clone() }))
            .collect(),
    };
    supervisor_child(spec, args, move |actor| link.set(actor))
}

/// Fill the directory with what the store and the platform know.
async fn remember(
    env: &Env,
    directory: &Directory,
    definitions: &Arc<dyn Definitions>,
) -> Result<(), StartError> {
    let remembered = env.store.load_instances().await?;
    let morphs: Vec<String> =
        remembered.iter().filter_map(|r| r.morph.as_ref()).map(|m| m.side.clone()).collect();
    let owners: Vec<String> =
        remembered.iter().filter(|r| r.role == Role::Own).map(|r| r.spec.name.clone()).collect();
    for mut record in remembered {
        let name = record.spec.name.clone();
        if let Role::Side(of) | Role::Standby(of) = &record.role {
            if record.saved.phase == Phase::Stopped && !record.saved.held {
                if let Err(error) = env.store.forget(&name).await {
                    warn!(instance = %name, %error, "it is not there any more and stays in the journal");
                }
                continue;
            }
            let wanted = match &record.role {
                Role::Standby(of) => owners.contains(of),
                Role::Side(_) | Role::Own => morphs.contains(&name),
            };
            if !wanted {
                info!(instance = %name, %of, "nobody needs it any more: it is stopped");
                record.saved = Saved { phase: Phase::PreparingRecovery, goal: Goal::Stop, ..record.saved };
            }
        }
        record.policy = env.policy(&name, &record.overrides);
        if !directory.insert(Arc::new(Instance::new(record))) {
            warn!(instance = %name, "remembered twice under its name or id: the second is ignored");
        }
    }
    let existing = env.platform.existing().await?;
    let unknown: Vec<_> = existing.into_iter().filter(|e| directory.link(e.id).is_none()).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let definitions = definitions.clone();
    let specs = tokio::task::spawn_blocking(move || definitions.all()).await.unwrap_or_default();
    for e in unknown {
        let Some(spec) = specs.iter().find(|s| s.id == e.id) else {
            warn!(instance = %e.id, incarnation = e.incarnation, "runs here and is neither remembered nor defined: left alone");
            continue;
        };
        info!(instance = %spec.name, incarnation = e.incarnation, "runs here and is not remembered: adopted without auto-heal");
        let mut overrides = Patch::default();
        // The value is one of those allowed.
        let _ = overrides.set(Key::AutoHeal, "disabled");
        let mut record = InstanceRecord::new(spec.clone(), env.policy(&spec.name, &overrides));
        record.overrides = overrides;
        record.incarnation = e.incarnation;
        record.region = Some(e.region);
        record.saved = Saved { phase: Phase::Monitoring, held: true, ..Saved::default() };
        directory.insert(Arc::new(Instance::new(record)));
    }
    Ok(())
}
