//! The other side of a morph: an instance of its own, which is the new kernel until the morph is committed, and
//! the old one after that.

use std::sync::Arc;
use std::time::Duration;

use kmorph_control::error::OpError;
use kmorph_control::views::InstanceView;
use kmorph_platform::{Growth, InstanceSpec, Inventory};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::resources::{self, Taken, Wish};
use super::{MorphArgs, Wanted};
use crate::core::policy::{Key, Patch};
use crate::shell::instance::{Env, Instance, InstanceMsg, Plan};
use crate::shell::supervisor::SupervisorMsg;
use crate::shell::tree::admit;
use crate::store::{InstanceRecord, Role};

/// Wait before an actor that is being started is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The name of the other side. No definition can have it.
pub(super) fn name(of: &str) -> String {
    format!("{of}~morph")
}

/// What the new kernel would get.
pub(crate) async fn plan(
    env: &Env,
    instance: &Instance,
    wanted: &Wanted,
) -> Result<(InstanceSpec, Growth), String> {
    let of = instance.record().spec.clone();
    let wish = Wish { cpus: &wanted.cpus, memory_bytes: wanted.memory_bytes };
    place(env, &of, name(&of.name), &wish).await.map(|(spec, growth, _)| (spec, growth))
}

/// What another kernel of this instance would get under this name, and what the machine has.
pub(super) async fn place(
    env: &Env,
    of: &InstanceSpec,
    side: String,
    wish: &Wish<'_>,
) -> Result<(InstanceSpec, Growth, Inventory), String> {
    if env.directory.get(&side).is_some() {
        return Err(format!("{side}, another kernel of it, is there: kmorphctl status {side}"));
    }
    let inventory = env.platform.inventory().await.map_err(|e| e.to_string())?;
    let definitions = env.definitions.clone();
    let defined = tokio::task::spawn_blocking(move || definitions.all()).await.map_err(|e| e.to_string())?;
    let mut taken = Taken::default();
    for spec in defined.into_iter().chain(env.directory.all().iter().map(|i| i.record().spec.clone())) {
        taken.ids.insert(spec.id.0);
        // What it is itself defined with it may get, when it does not have it.
        if spec.name != of.name {
            taken.cpus.extend(spec.cpus);
        }
    }
    let (spec, growth) = resources::side(side, of, wish, &inventory, &taken)?;
    Ok((spec, growth, inventory))
}

/// Start the new kernel and wait until it serves.
pub(super) async fn start(args: &MorphArgs, wanted: &Wanted) -> Result<InstanceView, String> {
    let env = &args.env;
    let (spec, growth) = plan(env, &args.instance, wanted).await?;
    let of = args.instance.record().clone();
    let (overrides, policy) = policy(env, &of);
    let mut record = InstanceRecord::new(spec.clone(), policy);
    record.role = Role::Side(of.spec.name.clone());
    record.overrides = overrides.clone();
    // Starts are counted over both, so that each has a number of its own.
    record.incarnation = of.incarnation;
    info!(instance = %of.spec.name, side = %spec.name, id = %spec.id, cpus = ?spec.cpus, "starting the other side");
    let instance = admit(env, record).await.map_err(|e| e.message)?;
    let plan = Plan {
        spec,
        policy,
        overrides,
        kernel: wanted.kernel.clone(),
        initramfs: wanted.initramfs.clone().or(of.initramfs),
        cmdline: wanted.cmdline.clone().unwrap_or(of.cmdline),
        // It gets no clients before it is the instance.
        publish: vec![],
        // It can be read there until the morph is committed.
        handover: of.handover,
        growth,
    };
    let (reply, answer) = oneshot::channel();
    instance.link.send(InstanceMsg::Spawn { plan: Box::new(plan), wait: true, reply });
    ended(answer).await
}

/// The policy of the other side: that of the instance, and nothing of it is healed.
pub(super) fn policy(env: &Env, of: &InstanceRecord) -> (Patch, crate::core::policy::Policy) {
    let mut overrides = of.overrides.clone();
    // The value is one of those allowed.
    let _ = overrides.set(Key::AutoHeal, "disabled");
    let policy = env.policy(&of.spec.name, &overrides);
    (overrides, policy)
}

/// Stop the other side and forget it.
pub(crate) async fn remove(env: &Arc<Env>, side: &str) -> Result<(), String> {
    let Some(instance) = env.directory.get(side) else { return Ok(()) };
    let limit = Instant::now() + env.config.effect_limit * 4;
    loop {
        let (reply, answer) = oneshot::channel();
        instance.link.send(InstanceMsg::Terminate { force: true, reply });
        match answer.await {
            Ok(Ok(_)) => break,
            // It never came up, and owns nothing.
            Ok(Err(_)) if !owns(&instance) => break,
            Ok(Err(error)) => return Err(error.message),
            // Its actor is being started.
            Err(_) if Instant::now() < limit => sleep(ASK_AGAIN).await,
            Err(_) => return Err("its actor does not answer".into()),
        }
    }
    forget(env.clone(), side.to_owned()).await;
    Ok(())
}

/// Whether it may own CPUs or memory.
fn owns(instance: &Instance) -> bool {
    instance.record().saved.held
}

pub(super) async fn ended(
    answer: oneshot::Receiver<Result<InstanceView, OpError>>,
) -> Result<InstanceView, String> {
    match answer.await {
        Ok(result) => result.map_err(|e| e.message),
        Err(_) => Err("its actor was started anew".into()),
    }
}

/// An instance that has stopped and that nobody needs any more.
pub(crate) async fn forget(env: Arc<Env>, name: String) {
    let limit = env.config.shutdown_limit * 3;
    let removed = async {
        loop {
            let (done, removed) = oneshot::channel();
            env.instances.send(SupervisorMsg::Remove(name.clone(), done));
            match removed.await {
                Ok(()) => return,
                // Their supervisor is being started.
                Err(_) => sleep(ASK_AGAIN).await,
            }
        }
    };
    if timeout(limit, removed).await.is_err() {
        warn!(instance = %name, ?limit, "its actor did not end in time");
    }
    env.directory.remove(&name);
    match timeout(env.config.store_limit, env.store.forget(&name)).await {
        Ok(Ok(())) => info!(instance = %name, "forgotten"),
        // The next daemon forgets it when it starts.
        Ok(Err(error)) => warn!(instance = %name, %error, "it is still remembered"),
        Err(_) => warn!(instance = %name, "it is still remembered: the store takes too long"),
    }
    // Another one of this name may be written down from now on.
    super::standby::tell_removed(&env, &name);
}

/// What the journal has of an instance.
pub(crate) async fn recall(env: &Env, name: &str) -> Result<InstanceRecord, String> {
    match timeout(env.config.store_limit, env.store.load_instances()).await {
        Ok(Ok(all)) => {
            let found = all.into_iter().find(|r| r.spec.name == name);
            found.ok_or_else(|| {
                error!(instance = %name, "the journal does not have it");
                format!("the journal has no {name}")
            })
        }
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("the store takes too long".into()),
    }
}
