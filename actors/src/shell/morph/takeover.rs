//! The record by which a standby becomes the instance after a failure: as the commit record of a morph, one transaction
//! in which two records change places.

use std::sync::Arc;

use kmorph_control::views::RecoveryStep;
use kmorph_platform::Growth;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tracing::{error, warn};

use super::lines::Line;
use super::side;
use super::standby::standby_name;
use super::work::{LOOK_AGAIN, ask};
use crate::core::recovery::{Goal, Phase, Saved};
use crate::core::route::Target;
use crate::shell::effects::{Incident, unix_ms};
use crate::shell::instance::{Env, Instance, InstanceMsg};
use crate::store::{InstanceRecord, Role};

/// Which kernel an instance is, between a decision about it and the moment that is written down. Held while either is
/// written, so that what was decided of the kernel before does not undo the exchange.
#[derive(Clone, Default)]
pub(crate) struct Seat(Arc<Mutex<Option<Seated>>>);

/// The kernel an instance was, and its record since it is another.
pub(crate) struct Seated {
    from: Target,
    to: Box<InstanceRecord>,
}

fn target(r: &InstanceRecord) -> Target {
    Target { id: r.spec.id, incarnation: r.incarnation }
}

impl Seat {
    /// Nobody exchanges records meanwhile. `record` becomes one of the kernel the instance is now.
    pub(crate) async fn settled(
        &self,
        record: &mut InstanceRecord,
    ) -> tokio::sync::OwnedMutexGuard<Option<Seated>> {
        let held = self.0.clone().lock_owned().await;
        if let Some(Seated { from, to }) = &*held
            && *from == target(record)
        {
            seat(record, to);
        }
        held
    }
}

/// The record of an instance becomes one of this kernel. Everything else in it stays.
fn seat(record: &mut InstanceRecord, new: &InstanceRecord) {
    let name = std::mem::take(&mut record.spec.name);
    record.spec = new.spec.clone();
    record.spec.name = name;
    record.kernel.clone_from(&new.kernel);
    record.initramfs.clone_from(&new.initramfs);
    record.cmdline.clone_from(&new.cmdline);
    record.release.clone_from(&new.release);
    (record.incarnation, record.region) = (new.incarnation, new.region);
    record.booted_unix_ms = new.booted_unix_ms;
    record.growth = new.growth.clone();
    if record.saved.phase == Phase::TakingOver {
        record.saved = coming_up(record.saved);
    }
}

/// The new kernel runs; that it serves has to be seen.
fn coming_up(saved: Saved) -> Saved {
    Saved { phase: Phase::AwaitingService, first: false, incident: true, held: true, ..saved }
}

/// Both records afterwards: of the instance, and of the kernel that was it, under the standby's name.
fn exchanged(env: &Env, old: &InstanceRecord, new: &InstanceRecord) -> (InstanceRecord, InstanceRecord) {
    let mut taken =
        InstanceRecord { saved: coming_up(old.saved), reason: "its standby took over".into(), ..old.clone() };
    seat(&mut taken, new);
    let (overrides, policy) = side::policy(env, old);
    let saved = match old.saved.held {
        true => Saved { phase: Phase::PreparingRecovery, goal: Goal::Stop, held: true, ..Saved::default() },
        false => Saved::default(),
    };
    let mut retired = InstanceRecord {
        policy,
        overrides,
        role: Role::Side(old.spec.name.clone()),
        saved,
        morph: None,
        publish: vec![],
        handover: None,
        incident: 0,
        growth: Growth::default(),
        reason: "its standby took over".into(),
        ..old.clone()
    };
    retired.spec.name.clone_from(&new.spec.name);
    (taken, retired)
}

/// Have the standby become the instance, whose kernel was seen stopped. What is said of that, or why it is not.
pub(crate) async fn take_over(
    env: &Env,
    name: &str,
    seat_of: &Seat,
    incident: Option<Incident>,
) -> Result<String, String> {
    let instance = env.directory.get(name).ok_or("it is not known any more")?;
    let standby = env.directory.get(&standby_name(name)).ok_or("it is gone")?;
    if !matches!(&standby.record().role, Role::Standby(of) if *of == name) {
        return Err("somebody else has it".into());
    }
    // That its agent answers is the proof that it lives.
    let limit = instance.record().policy.heartbeat_timeout.min(env.config.effect_limit);
    let opened = timeout(limit, Line::open(env, &standby)).await;
    let mut line = opened.map_err(|_| format!("no answer within {limit:?}"))?.map_err(|t| t.text())?;

    let mut seated = seat_of.0.clone().lock_owned().await;
    let parted =
        ask(&standby, InstanceMsg::Part).await.unwrap_or_else(|| Err("its actor does not answer".into()));
    let new = match parted {
        Ok(new) => new,
        Err(why) => {
            standby.link.send(InstanceMsg::Unite);
            return Err(why);
        }
    };
    let old = instance.record().clone();
    let (mut taken, retired) = exchanged(env, &old, &new);
    // The incident goes on. Of it the record that is not written down may not know.
    taken.incident = incident.map_or(old.incident, |i| i.number);
    let step = step(&taken, &old, incident);
    if let Err(why) = write(env, &[taken.clone(), retired.clone()], &step, &instance).await {
        standby.link.send(InstanceMsg::Unite);
        return Err(why);
    }
    {
        let mut r = instance.record();
        seat(&mut r, &taken);
    }
    instance.renumber(taken.spec.id);
    standby.become_record(retired);
    *seated = Some(Seated { from: target(&old), to: Box::new(taken.clone()) });
    drop(seated);
    // It goes on as what is left of the dead kernel.
    standby.link.send(InstanceMsg::Unite);
    // What the dead one was about to get nobody gets.
    if !old.growth.cpus.is_empty()
        && let Err(error) = env.platform.release_cpus(&old.growth.cpus).await
    {
        warn!(instance = %name, cpus = ?old.growth.cpus, %error, "CPUs that nobody uses stay in the pool");
    }

    let told = timeout(limit, line.commit(step.incident, true)).await;
    if !matches!(told, Ok(Ok(()))) {
        // Every heartbeat tells it too.
        warn!(instance = %name, "the standby was not told to serve yet");
    }
    env.switch.redirect(name, target(&taken));
    Ok(format!("its standby is the instance: kernel {}, incarnation {}", taken.release, taken.incarnation))
}

fn step(taken: &InstanceRecord, old: &InstanceRecord, incident: Option<Incident>) -> RecoveryStep {
    let offset = incident.map(|i| i.noticed.elapsed()).unwrap_or_default();
    RecoveryStep {
        incident: incident.map_or(old.incident, |i| i.number),
        instance: taken.spec.name.clone(),
        incarnation: taken.incarnation,
        at_unix_ms: unix_ms(),
        offset_us: u64::try_from(offset.as_micros()).unwrap_or(u64::MAX),
        phase: Phase::TakingOver.name().into(),
        detail: format!(
            "instance {} with kernel {} takes over from instance {}",
            taken.spec.id, taken.release, old.spec.id
        ),
        recovered: None,
    }
}

/// Write it down; return when it certainly is, or certainly is not.
async fn write(
    env: &Env,
    records: &[InstanceRecord; 2],
    step: &RecoveryStep,
    instance: &Instance,
) -> Result<(), String> {
    let decide = env.store.decide(records, std::slice::from_ref(step));
    match timeout(env.config.store_limit, decide).await {
        Ok(written) => return written.map_err(|e| format!("it could not be written down: {e}")),
        Err(_) => {
            warn!(instance = %instance.name, "the store takes too long: whether its standby took over has to be looked up")
        }
    }
    loop {
        match side::recall(env, &instance.name).await {
            Ok(found) if target(&found) == target(&records[0]) => return Ok(()),
            Ok(_) => return Err("the journal did not take it".into()),
            Err(error) => {
                error!(instance = %instance.name, %error, "whether its standby took over is not known yet")
            }
        }
        sleep(LOOK_AGAIN * 25).await;
    }
}
