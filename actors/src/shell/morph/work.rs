//! What a morph's machine wants done.

use std::sync::Arc;
use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{InstanceState, RecoveryStep};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, warn};

use super::{MorphArgs, Wanted, side};
use crate::core::morph::{Action, Event, Phase, Round};
use crate::core::recovery;
use crate::core::route::Target;
use crate::shell::effects::unix_ms;
use crate::shell::heartbeat::HeartbeatMsg;
use crate::shell::instance::{Env, Instance, InstanceMsg};
use crate::shell::switch::Drained;
use crate::store::{InstanceRecord, MorphRecord, Role};

/// Between two looks at a state nobody tells of.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest time for an actor's answer that needs no work.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Longest time until a kernel that took over is seen to serve.
const SERVES_LIMIT: Duration = Duration::from_secs(30);

/// Do it; what came of it, and what an operator may want to know of that.
pub(super) async fn run(args: &MorphArgs, what: Action, wanted: Option<Wanted>) -> (Event, String) {
    let done = match what {
        Action::Start => start(args, wanted).await,
        Action::Negotiate => negotiate(args),
        Action::Transfer { .. } => Ok((Event::Round(Round::default()), String::new())),
        Action::Validate => validate(args).await,
        Action::Freeze => freeze(args).await,
        Action::Record => return record(args).await,
        Action::LookUpRecord => return look_up(args).await,
        Action::Activate => activate(args).await,
        Action::Undo => undo(args).await,
        // Not work.
        _ => Ok((Event::Failed("nothing to do".into()), String::new())),
    };
    done.unwrap_or_else(|why| (Event::Failed(why), String::new()))
}

/// Have what is remembered of an instance written down.
pub(super) async fn persist(instance: &Instance) {
    let (reply, written) = oneshot::channel();
    instance.link.send(InstanceMsg::Persist(reply));
    // An actor that is being started anew writes it when it is back.
    if timeout(ANSWER_LIMIT, written).await.is_err() {
        warn!(instance = %instance.name, "what is remembered of it may not be written down yet");
    }
}

/// Whether a morph can begin: the instance serves.
pub(super) fn may_begin(i: &Instance) -> Result<(), OpError> {
    let r = i.record();
    let refused =
        |text: String| Err(OpError::new(ErrorKind::Conflict, format!("instance {}: {text}", i.name)));
    if let Role::Side(of) = &r.role {
        return refused(format!("it is one side of a morph of {of}"));
    }
    if r.saved.phase != recovery::Phase::Monitoring {
        return refused("only an instance that runs can be morphed".into());
    }
    if r.maintenance {
        return refused(format!("it is in maintenance: kmorphctl maintenance off {}", i.name));
    }
    Ok(())
}

type Worked = Result<(Event, String), String>;

async fn start(args: &MorphArgs, wanted: Option<Wanted>) -> Worked {
    let Some(wanted) = wanted else { return Err("nobody said which kernel".into()) };
    let env = &args.env;
    let number = timeout(env.config.store_limit, env.store.next_incident()).await;
    let number = number.ok().and_then(Result::ok).unwrap_or_else(unix_ms);
    {
        let mut r = args.instance.record();
        let saved = crate::core::morph::Saved { phase: Phase::Preparing, ..Default::default() };
        let (side, from) = (side::name(&r.spec.name), r.release.clone());
        r.morph = Some(MorphRecord { number, side, from, saved });
    }
    // Whoever finds the new kernel knows whose it is.
    persist(&args.instance).await;
    let view = side::start(args, &wanted).await?;
    let detail = format!(
        "kernel {} serves beside the old one as {}: CPUs {:?}, {} MiB",
        view.release,
        view.name,
        view.cpus,
        view.memory_bytes >> 20
    );
    Ok((Event::Ready, detail))
}

fn sides(args: &MorphArgs) -> Result<Arc<Instance>, String> {
    let record = args.instance.record().morph.clone();
    let side = record.and_then(|m| args.env.directory.get(&m.side));
    side.ok_or_else(|| "the new kernel is gone".into())
}

fn negotiate(args: &MorphArgs) -> Worked {
    sides(args)?;
    Ok((Event::Agreed, "the workload offers no state: the new kernel begins with its own".into()))
}

/// Both serve, and the new kernel answers in time.
async fn validate(args: &MorphArgs) -> Worked {
    let side = sides(args)?;
    let rtt = healthy(&args.env, &side).await?;
    healthy(&args.env, &args.instance).await?;
    Ok((Event::Valid, format!("the new kernel is healthy: it answered within {rtt:?}")))
}

async fn healthy(env: &Env, instance: &Instance) -> Result<Duration, String> {
    let name = &instance.name;
    let view =
        ask(instance, InstanceMsg::View).await.ok_or_else(|| format!("{name}: its actor does not answer"))?;
    if view.state != InstanceState::Healthy {
        return Err(format!("{name} is {}: {}", view.state, view.reason));
    }
    let limit = instance.record().policy.heartbeat_timeout.min(env.config.effect_limit);
    let (reply, answer) = oneshot::channel();
    instance.heartbeat.send(HeartbeatMsg::Ping(reply));
    match timeout(limit, answer).await {
        Ok(Ok((rtt, _))) => Ok(rtt),
        Ok(Err(_)) | Err(_) => Err(format!("{name}: its agent did not answer a heartbeat within {limit:?}")),
    }
}

async fn ask<T>(instance: &Instance, message: impl FnOnce(oneshot::Sender<T>) -> InstanceMsg) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    instance.link.send(message(reply));
    timeout(ANSWER_LIMIT, answer).await.ok().and_then(Result::ok)
}

/// Nothing stands still where there is no state to keep; but nobody takes over who is not well.
async fn freeze(args: &MorphArgs) -> Worked {
    let side = sides(args)?;
    healthy(&args.env, &side).await?;
    Ok((Event::Frozen, String::new()))
}

/// Write the commit record: in one transaction the instance becomes the new kernel, and the other side the old
/// one, which is to be stopped.
async fn record(args: &MorphArgs) -> (Event, String) {
    let not = |why: String| (Event::NotRecorded(why), String::new());
    let side = match sides(args) {
        Ok(side) => side,
        Err(why) => return not(why),
    };
    let mut parted: Vec<InstanceRecord> = vec![];
    for instance in [&args.instance, &side] {
        match ask(instance, InstanceMsg::Part).await {
            Some(Ok(record)) => parted.push(record),
            Some(Err(why)) => {
                unite(args, &side);
                return not(why);
            }
            None => {
                unite(args, &side);
                return not(format!("{}: its actor does not answer", instance.name));
            }
        }
    }
    let (old, new) = (&parted[0], &parted[1]);
    let Some(morph) = old.morph.clone() else {
        unite(args, &side);
        return not("nothing is remembered of it".into());
    };
    let step = RecoveryStep {
        incident: morph.number,
        instance: old.spec.name.clone(),
        incarnation: new.incarnation,
        at_unix_ms: unix_ms(),
        offset_us: 0,
        phase: Phase::Committing.name().into(),
        detail: format!("commit record: kernel {} takes over from {}", new.release, old.release),
        recovered: None,
    };
    let (committed, retired) = exchanged(args, old, new, morph);
    let env = &args.env;
    let records = [committed.clone(), retired.clone()];
    let decide = env.store.decide(&records, std::slice::from_ref(&step));
    match timeout(env.config.store_limit, decide).await {
        Ok(Ok(())) => {
            exchange(args, &side, committed, retired);
            (Event::Recorded, String::new())
        }
        Ok(Err(error)) => {
            unite(args, &side);
            not(error.to_string())
        }
        Err(_) => (Event::RecordUnknown, String::new()),
    }
}

/// From now on each is what the other was. New clients go to the new kernel at once.
fn exchange(args: &MorphArgs, side: &Instance, committed: InstanceRecord, retired: InstanceRecord) {
    let target = Target { id: committed.spec.id, incarnation: committed.incarnation };
    args.instance.become_record(committed);
    side.become_record(retired);
    args.env.switch.redirect(&args.instance.name, target);
}

/// Both records after the commit.
fn exchanged(
    args: &MorphArgs,
    old: &InstanceRecord,
    new: &InstanceRecord,
    mut morph: MorphRecord,
) -> (InstanceRecord, InstanceRecord) {
    morph.saved.phase = Phase::Committing;
    let serves = recovery::Saved { phase: recovery::Phase::Monitoring, held: true, ..Default::default() };
    let stops = recovery::Saved {
        phase: recovery::Phase::PreparingRecovery,
        goal: recovery::Goal::Stop,
        held: true,
        ..Default::default()
    };
    let mut committed = InstanceRecord {
        policy: old.policy,
        overrides: old.overrides.clone(),
        maintenance: old.maintenance,
        recoveries: old.recoveries,
        role: Role::Own,
        saved: serves,
        morph: Some(morph),
        publish: old.publish.clone(),
        reason: "the new kernel took over".into(),
        ..new.clone()
    };
    committed.spec.name.clone_from(&old.spec.name);
    let (overrides, policy) = side::policy(&args.env, old);
    let mut retired = InstanceRecord {
        policy,
        overrides,
        role: Role::Side(old.spec.name.clone()),
        saved: stops,
        morph: None,
        publish: vec![],
        incident: 0,
        reason: "a new kernel took over".into(),
        ..old.clone()
    };
    retired.spec.name.clone_from(&new.spec.name);
    (committed, retired)
}

fn unite(args: &MorphArgs, side: &Instance) {
    for instance in [&*args.instance, side] {
        instance.link.send(InstanceMsg::Unite);
    }
}

/// Whether the commit record is in the journal.
async fn look_up(args: &MorphArgs) -> (Event, String) {
    loop {
        match side::recall(&args.env, &args.instance.name).await {
            Ok(record) => {
                let decided = record.morph.as_ref().is_some_and(|m| m.saved.phase == Phase::Committing);
                let Ok(side) = sides(args) else {
                    return (Event::NotRecorded("the new kernel is gone".into()), String::new());
                };
                if !decided {
                    unite(args, &side);
                    return (Event::NotRecorded("the journal did not take it".into()), String::new());
                }
                if let Ok(retired) = side::recall(&args.env, &side.name).await {
                    exchange(args, &side, record, retired);
                    return (Event::Recorded, String::new());
                }
            }
            Err(error) => {
                error!(instance = %args.instance.name, %error, "whether the morph is committed is not known yet")
            }
        }
        sleep(LOOK_AGAIN * 25).await;
    }
}

/// Both actors go on as what they are now; wait until the new kernel is seen to serve.
async fn activate(args: &MorphArgs) -> Worked {
    args.instance.link.send(InstanceMsg::Unite);
    let (serves, drained) = tokio::join!(seen_to_serve(args), let_go(args));
    let release = serves?;
    let old = old_stopped(args).await;
    Ok((Event::Activated, format!("kernel {release} serves; {drained}{old}")))
}

/// The other side's clients end what they began; then it is let go, which is its end.
async fn let_go(args: &MorphArgs) -> String {
    let Ok(side) = sides(args) else { return String::new() };
    let limit = args.instance.record().policy.drain_timeout;
    let old = {
        let r = side.record();
        Target { id: r.spec.id, incarnation: r.incarnation }
    };
    side.link.send(InstanceMsg::StandAside(limit));
    let drained = args.env.switch.drain(&args.instance.name, old, limit).await;
    side.link.send(InstanceMsg::Unite);
    match drained {
        None => String::new(),
        Some(Drained { ended, cut: 0, took }) => {
            format!("{ended} connections to the old kernel ended by themselves within {took:.1?}; ")
        }
        Some(Drained { ended, cut, took }) => {
            format!(
                "{ended} connections to the old kernel ended by themselves, {cut} were reset after {took:.1?}; "
            )
        }
    }
}

async fn seen_to_serve(args: &MorphArgs) -> Result<String, String> {
    let began = Instant::now();
    let mut seen = String::new();
    while began.elapsed() < SERVES_LIMIT {
        if let Some(view) = ask(&args.instance, InstanceMsg::View).await {
            // An actor that stands aside shows what it showed before.
            let there = view.pulse_age_ms.is_some() && view.last_heartbeat_ms.is_some();
            if view.state == InstanceState::Healthy && there {
                return Ok(view.release);
            }
            seen = format!("it is {}: {}", view.state, view.reason);
        }
        sleep(LOOK_AGAIN).await;
    }
    Err(format!("not seen to serve within {SERVES_LIMIT:?}: {seen}"))
}

/// Wait for the end of the old kernel, so that its CPUs and memory are there when an operator is answered.
async fn old_stopped(args: &MorphArgs) -> String {
    let Some(m) = args.instance.record().morph.clone() else { return String::new() };
    let until = Instant::now() + args.env.config.effect_limit;
    while args.env.directory.get(&m.side).is_some() {
        if Instant::now() >= until {
            return format!("the old one is still being stopped: kmorphctl status {}", m.side);
        }
        sleep(LOOK_AGAIN).await;
    }
    "the old one is stopped, its CPUs and memory are back".into()
}

async fn undo(args: &MorphArgs) -> Worked {
    let record = args.instance.record().morph.clone();
    if let Some(m) = record {
        side::remove(&args.env, &m.side).await?;
    }
    Ok((Event::Undone, String::new()))
}
