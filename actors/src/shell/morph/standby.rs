//! Standbys: started beside an instance, they become a morph's new kernel without a start, or the instance itself after
//! a failure.

use std::sync::Arc;

use kmorph_control::error::OpError;
use kmorph_control::views::InstanceView;
use kmorph_platform::{BootRequest, Growth, InstanceSpec, MemoryRange};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use super::resources::Wish;
use super::side::{ended, place, policy, remove};
use super::work::{ANSWER_LIMIT, healthy_soon, persist};
use super::{MorphArgs, Wanted};
use crate::core::recovery::Phase;
use crate::core::standby::{Event, Want};
use crate::shell::instance::{Env, Instance, InstanceMsg, Plan, StandbyMsg};
use crate::shell::tree::admit;
use crate::store::{InstanceRecord, Role};

/// What follows the name of its instance.
const SUFFIX: &str = "~standby";

/// The name of an instance's standby. No definition can have it.
pub(crate) fn standby_name(of: &str) -> String {
    format!("{of}{SUFFIX}")
}

/// Start one. What is told of that, in order.
pub(crate) async fn start_standby(env: &Arc<Env>, instance: &Instance, want: &Want) -> Vec<Event> {
    let of = instance.record().clone();
    let name = standby_name(&of.spec.name);
    let spec = match room(env, &of, &name).await {
        Ok(spec) => spec,
        Err(why) => return vec![Event::NoRoom(why)],
    };
    let failed = match begin(env, &of, spec, want).await {
        Ok(view) => {
            info!(instance = %of.spec.name, standby = %name, release = %view.release, "a standby waits");
            return vec![Event::Started];
        }
        Err(why) => why,
    };
    match remove(env, &name).await {
        Ok(()) => vec![Event::Failed(failed)],
        // It has something still: it is there, and not well.
        Err(why) => vec![Event::Started, Event::Gone(format!("{failed}; {why}"))],
    }
}

/// What it would run on. What instances that are being brought back need is theirs.
async fn room(env: &Env, of: &InstanceRecord, name: &str) -> Result<InstanceSpec, String> {
    let (spec, growth, inventory) = place(env, &of.spec, name.to_owned(), &Wish::default()).await?;
    if !growth.is_empty() {
        // It may be needed when nobody is there to get the rest from.
        return Err(format!(
            "it needs {} CPUs that no instance has or is defined with and {} MiB of the pool in one piece; there are {} and {} MiB",
            of.spec.cpus.len(),
            of.spec.memory_bytes >> 20,
            spec.cpus.len(),
            inventory.largest_free() >> 20
        ));
    }
    let comes_back = |r: &InstanceRecord| {
        let ended = matches!(r.saved.phase, Phase::Stopped | Phase::Degraded);
        r.role == Role::Own && r.region.is_none() && !ended
    };
    let all = env.directory.all();
    let kept: u64 =
        all.iter().map(|i| i.record()).filter(|r| comes_back(r)).map(|r| r.spec.memory_bytes).sum();
    let free = inventory.free_bytes().saturating_sub(kept);
    if free < spec.memory_bytes {
        return Err(format!(
            "it needs {} MiB of the pool, {} MiB are free that nobody waits for",
            spec.memory_bytes >> 20,
            free >> 20
        ));
    }
    Ok(spec)
}

async fn begin(
    env: &Arc<Env>,
    of: &InstanceRecord,
    spec: InstanceSpec,
    want: &Want,
) -> Result<InstanceView, String> {
    let (overrides, policy) = policy(env, of);
    let request = BootRequest {
        spec: spec.clone(),
        incarnation: of.incarnation + 1,
        kernel: want.kernel.clone(),
        initramfs: want.initramfs.clone(),
        cmdline: want.cmdline.clone(),
        pulse_period: policy.pulse_period,
        growth: Growth::default(),
    };
    env.platform.check(&request).await.map_err(|e| e.to_string())?;
    let mut record = InstanceRecord::new(spec.clone(), policy);
    record.role = Role::Standby(of.spec.name.clone());
    record.overrides = overrides.clone();
    // Starts are counted over both, so that each has a number of its own.
    record.incarnation = of.incarnation;
    let standby = admit(env, record).await.map_err(|e| e.message)?;
    let plan = Plan {
        spec,
        policy,
        overrides,
        kernel: request.kernel,
        initramfs: request.initramfs,
        cmdline: request.cmdline,
        // It gets no clients before it is the instance.
        publish: vec![],
        // As the new kernel of a morph, which it may become, it can read it.
        handover: of.handover,
        growth: Growth::default(),
    };
    let (reply, answer) = oneshot::channel();
    standby.link.send(InstanceMsg::Spawn { plan: Box::new(plan), wait: true, reply });
    ended(answer).await
}

/// The standby as the new kernel of a morph, when it is the kernel that is wanted. Nothing has to be started then.
pub(super) async fn claim(args: &MorphArgs, wanted: &Wanted) -> Option<Arc<Instance>> {
    let (reply, answer) = oneshot::channel();
    let claim = StandbyMsg::Claim { wanted: wanted.clone(), reply };
    args.instance.link.send(InstanceMsg::Standby(claim));
    let name = timeout(ANSWER_LIMIT, answer).await.ok()?.ok()??;
    args.env.directory.get(&name)
}

/// From now on it is one side of the morph.
pub(super) async fn use_claimed(args: &MorphArgs, standby: &Instance) -> Result<String, String> {
    standby.record().role = Role::Side(args.instance.name.clone());
    persist(standby).await;
    let rtt = healthy_soon(&args.env, standby).await?;
    Ok(format!("it was its standby: no kernel had to be started, it answered within {rtt:?}"))
}

/// The standby of this instance, when a morph to this kernel would use it.
fn usable(env: &Env, instance: &Instance, wanted: &Wanted) -> Option<InstanceSpec> {
    let standby = env.directory.get(&standby_name(&instance.name))?;
    let (of, r) = (instance.record().clone(), standby.record());
    let fits = r.role == Role::Standby(of.spec.name.clone())
        && r.saved.phase == Phase::Monitoring
        && wanted.cpus.is_empty()
        && wanted.memory_bytes.is_none()
        && r.kernel == wanted.kernel
        && r.initramfs == wanted.initramfs.clone().or(of.initramfs)
        && r.cmdline == *wanted.cmdline.as_ref().unwrap_or(&of.cmdline);
    fits.then(|| r.spec.clone())
}

/// Whether a morph to this kernel would use the instance's standby.
pub(crate) fn would_use(env: &Env, instance: &Instance, wanted: &Wanted) -> bool {
    usable(env, instance, wanted).is_some()
}

/// Whoever is told when nothing of an instance of this name is left.
pub(super) fn tell_removed(env: &Env, name: &str) {
    let Some(owner) = name.strip_suffix(SUFFIX).and_then(|of| env.directory.get(of)) else { return };
    let removed = StandbyMsg::Happened { epoch: None, event: Event::Removed };
    owner.link.send(InstanceMsg::Standby(removed));
}

/// Standbys, those of `first` before others.
fn standbys(env: &Env, first: &str) -> Vec<Arc<Instance>> {
    let is = |i: &Arc<Instance>| matches!(i.record().role, Role::Standby(_));
    let mut all: Vec<Arc<Instance>> = env.directory.all().into_iter().filter(is).collect();
    let own = standby_name(first);
    all.sort_by_key(|i| i.name != own);
    all
}

/// Have one give back what it has.
async fn give_way(env: &Env, standby: &Instance, whom: &str) {
    let Role::Standby(of) = standby.record().role.clone() else { return };
    let Some(owner) = env.directory.get(&of) else { return };
    let (reply, done) = oneshot::channel();
    let message = StandbyMsg::GiveWay { whom: whom.to_owned(), reply };
    owner.link.send(InstanceMsg::Standby(message));
    let limit = standby.record().policy.boot_grace + env.config.effect_limit * 4;
    if timeout(limit, done).await.is_err() {
        warn!(standby = %standby.name, %whom, ?limit, "it has not given way in time");
    }
}

/// An operator starts an instance: standbys that have what it needs give way.
pub(crate) async fn make_way(env: &Env, spec: &InstanceSpec) -> Result<(), OpError> {
    let mut standbys = standbys(env, &spec.name);
    if standbys.is_empty() {
        return Ok(());
    }
    let whom = format!("instance {}", spec.name);
    let place = spec.memory_base.map(|base| MemoryRange { base, size: spec.memory_bytes });
    let in_the_way = |i: &Arc<Instance>| {
        let r = i.record();
        let place = place.zip(r.region).is_some_and(|(a, b)| a.overlaps(&b));
        place || r.spec.id == spec.id || r.spec.cpus.iter().any(|c| spec.cpus.contains(c))
    };
    for standby in standbys.extract_if(.., |i| in_the_way(i)) {
        give_way(env, &standby, &whom).await;
    }
    for standby in standbys {
        let inventory = env.platform.inventory().await;
        let inventory = inventory.map_err(|e| crate::shell::tree::refused(&spec.name, &e))?;
        if inventory.largest_free().min(inventory.free_bytes()) >= spec.memory_bytes {
            break;
        }
        give_way(env, &standby, &whom).await;
    }
    Ok(())
}

/// What a morph's new kernel would get. Standbys give way when there is no room beside them.
pub(crate) async fn plan_with_way(
    env: &Env,
    instance: &Instance,
    wanted: &Wanted,
    dry_run: bool,
) -> Result<(InstanceSpec, Growth), String> {
    if let Some(spec) = usable(env, instance, wanted) {
        return Ok((spec, Growth::default()));
    }
    let mut planned = super::side::plan(env, instance, wanted).await;
    for standby in standbys(env, &instance.name) {
        let Err(why) = &planned else { break };
        if dry_run {
            return Err(format!("{why}; {} would give way", standby.name));
        }
        give_way(env, &standby, &format!("a morph of {}", instance.name)).await;
        planned = super::side::plan(env, instance, wanted).await;
    }
    planned
}
