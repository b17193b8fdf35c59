//! What a morph's machine wants done.

use std::sync::Arc;
use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::InstanceState;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::hand::Hand;
use super::{MorphArgs, Wanted, grow, record, side, standby, state, window};
use crate::core::morph::{Action, Event, Phase};
use crate::core::recovery;
use crate::core::route::Target;
use crate::shell::effects::unix_ms;
use crate::shell::heartbeat::HeartbeatMsg;
use crate::shell::instance::{Env, Instance, InstanceMsg};
use crate::shell::switch::Drained;
use crate::store::{MorphRecord, Role};

/// Between two looks at a state nobody tells of.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// A suspicion is confirmed or gone after so long, as a rule.
const PROBED: Duration = Duration::from_secs(2);
/// Longest time for an actor's answer that needs no work.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Longest time for connections to a workload that is retired.
const RETIRED_LIMIT: Duration = Duration::from_secs(1);
/// Longest time until a kernel that took over is seen to serve.
const SERVES_LIMIT: Duration = Duration::from_secs(30);

/// Do it; what came of it, and what an operator may want to know of that.
pub(super) async fn run(
    args: &MorphArgs,
    hand: &mut Hand,
    what: Action,
    wanted: Option<Wanted>,
) -> (Event, String) {
    let done = match what {
        Action::Start => start(args, wanted).await,
        Action::Negotiate => state::negotiate(args, hand).await,
        Action::Transfer { round, throttle } => state::transfer(hand, round, throttle).await,
        Action::Validate { lift } => match if lift { state::lift(hand).await } else { Ok(()) } {
            Ok(()) => validate(args, hand).await,
            Err(why) => Err(why),
        },
        Action::Freeze => {
            // Until it serves again, or the new kernel does.
            args.env.switch.away(&args.instance.name, true);
            state::freeze(args, hand).await
        }
        Action::Withdraw => state::withdraw(args, hand).await,
        Action::WriteDown => record::write_down(args, hand).await,
        Action::Record => return record::record(args, hand).await,
        Action::LookUpRecord => return record::look_up(args, hand).await,
        Action::Activate => activate(args, hand).await,
        Action::GiveBack => record::give_back(args, hand).await,
        Action::Grow => grow::grow(args).await,
        Action::Undo => undo(args, hand).await,
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
    match &r.role {
        Role::Side(of) => return refused(format!("it is one side of a morph of {of}")),
        Role::Standby(of) => return refused(format!("it is the standby of {of}")),
        Role::Own => {}
    }
    if r.saved.phase != recovery::Phase::Monitoring {
        return refused("only an instance that runs can be morphed".into());
    }
    if r.maintenance {
        return refused(format!("it is in maintenance: kmorphctl maintenance off {}", i.name));
    }
    Ok(())
}

pub(super) type Worked = Result<(Event, String), String>;

async fn start(args: &MorphArgs, wanted: Option<Wanted>) -> Worked {
    let Some(wanted) = wanted else { return Err("nobody said which kernel".into()) };
    let env = &args.env;
    let number = timeout(env.config.store_limit, env.store.next_incident()).await;
    let number = number.ok().and_then(Result::ok).unwrap_or_else(unix_ms);
    let standby = standby::claim(args, &wanted).await;
    {
        let mut r = args.instance.record();
        let saved = crate::core::morph::Saved { phase: Phase::Preparing, ..Default::default() };
        let side = standby.as_ref().map_or_else(|| side::name(&r.spec.name), |s| s.name.clone());
        let from = r.release.clone();
        r.morph = Some(MorphRecord { number, side, from, saved, frozen: false, handed_over: false });
    }
    // Whoever finds the new kernel knows whose it is.
    persist(&args.instance).await;
    let (view, how) = match standby {
        Some(standby) => {
            let how = standby::use_claimed(args, &standby).await?;
            let view = ask(&standby, InstanceMsg::View).await.ok_or("its actor does not answer")?;
            (view, format!("; {how}"))
        }
        None => (side::start(args, &wanted).await?, String::new()),
    };
    let detail = format!(
        "kernel {} serves beside the old one as {}: CPUs {:?}, {} MiB{how}",
        view.release,
        view.name,
        view.cpus,
        view.memory_bytes >> 20
    );
    Ok((Event::Ready, detail))
}

pub(super) fn sides(args: &MorphArgs) -> Result<Arc<Instance>, String> {
    let record = args.instance.record().morph.clone();
    let side = record.and_then(|m| args.env.directory.get(&m.side));
    side.ok_or_else(|| "the new kernel is gone".into())
}

/// Both serve, and the new kernel answers in time.
async fn validate(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let side = sides(args)?;
    let rtt = healthy_soon(&args.env, &side).await?;
    healthy_soon(&args.env, &args.instance).await?;
    let state = match &hand.lines {
        Some(l) if hand.has_state() => {
            format!("; {} of state in {} rounds so far", bytes(l.copied), l.rounds)
        }
        _ => String::new(),
    };
    Ok((Event::Valid, format!("the new kernel is healthy: it answered within {rtt:?}{state}")))
}

/// It is, or will be when it is known after so long whether it is.
pub(super) async fn healthy_soon(env: &Env, instance: &Instance) -> Result<Duration, String> {
    let policy = instance.record().policy;
    healthy(env, instance, policy.heartbeat_timeout.min(PROBED)).await
}

/// It is, by what is known within `patience`, and answers.
pub(super) async fn healthy(env: &Env, instance: &Instance, patience: Duration) -> Result<Duration, String> {
    let name = &instance.name;
    let until = Instant::now() + patience;
    loop {
        let view = ask(instance, InstanceMsg::View)
            .await
            .ok_or_else(|| format!("{name}: its actor does not answer"))?;
        match view.state {
            InstanceState::Healthy => break,
            // Being probed, or just taken over from another daemon: that is over soon.
            InstanceState::Suspect | InstanceState::Starting if Instant::now() < until => {
                sleep(LOOK_AGAIN).await;
            }
            state => return Err(format!("{name} is {state}: {}", view.reason)),
        }
    }
    let limit = instance.record().policy.heartbeat_timeout.min(env.config.effect_limit);
    let (reply, answer) = oneshot::channel();
    instance.heartbeat.send(HeartbeatMsg::Ping(reply));
    match timeout(limit, answer).await {
        Ok(Ok((rtt, _))) => Ok(rtt),
        Ok(Err(_)) | Err(_) => Err(format!("{name}: its agent did not answer a heartbeat within {limit:?}")),
    }
}

pub(super) async fn ask<T>(
    instance: &Instance,
    message: impl FnOnce(oneshot::Sender<T>) -> InstanceMsg,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    instance.link.send(message(reply));
    timeout(ANSWER_LIMIT, answer).await.ok().and_then(Result::ok)
}

/// The new kernel's workload takes over, both actors go on as what they are now; wait until the new kernel is seen to
/// serve.
async fn activate(args: &MorphArgs, hand: &mut Hand) -> Worked {
    if let Err(why) = state::take_over(args, hand).await {
        let done = state::not_activated(args, hand, why).await;
        if done.is_err() {
            // The morph ends here; otherwise it is undone.
            window::close(&args.env, state::number(args)).await;
        }
        return done;
    }
    args.instance.link.send(InstanceMsg::Unite);
    state::retire(args, hand).await;
    let moved = hand.has_state();
    let (serves, drained) = tokio::join!(seen_to_serve(args), let_go(args, moved));
    let old = if serves.is_ok() { old_stopped(args).await } else { String::new() };
    window::close(&args.env, state::number(args)).await;
    let release = serves?;
    let event = if args.instance.record().growth.is_empty() { Event::Activated } else { Event::Grows };
    Ok((event, format!("kernel {release} serves; {drained}{old}")))
}

/// The other side's clients end what they began; then it is let go, which is its end.
async fn let_go(args: &MorphArgs, moved: bool) -> String {
    let Ok(side) = sides(args) else { return String::new() };
    let limit = args.instance.record().policy.drain_timeout;
    // Those that can go on have done so. A workload that is retired answers no others.
    let limit = if moved { limit.min(RETIRED_LIMIT) } else { limit };
    let old = {
        let r = side.record();
        Target { id: r.spec.id, incarnation: r.incarnation }
    };
    side.link.send(InstanceMsg::StandAside(limit));
    let drained = args.env.switch.drain(&args.instance.name, old, limit).await;
    side.link.send(InstanceMsg::Unite);
    let Some(Drained { ended, moved, cut, took }) = drained else { return String::new() };
    let mut parts = vec![];
    if moved > 0 {
        parts.push(format!("{moved} connections went on with the new kernel"));
    }
    if ended > 0 || (cut == 0 && moved == 0) {
        parts.push(format!("{ended} connections to the old kernel ended by themselves within {took:.1?}"));
    }
    if cut > 0 {
        parts.push(format!("{cut} were reset after {took:.1?}"));
    }
    format!("{}; ", parts.join(", "))
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
    // A standby of that name is another one.
    let old = || args.env.directory.get(&m.side).filter(|i| matches!(i.record().role, Role::Side(_)));
    while old().is_some() {
        if Instant::now() >= until {
            return format!("the old one is still being stopped: kmorphctl status {}", m.side);
        }
        sleep(LOOK_AGAIN).await;
    }
    "the old one is stopped, its CPUs and memory are back".into()
}

async fn undo(args: &MorphArgs, hand: &mut Hand) -> Worked {
    args.env.switch.unpark(&args.instance.name);
    let Some(m) = args.instance.record().morph.clone() else { return Ok((Event::Undone, String::new())) };
    if let Some(m) = &mut args.instance.record().morph {
        m.handed_over = false;
    }
    // Whoever stands aside goes on as what it was.
    for instance in std::iter::once(args.instance.clone()).chain(args.env.directory.get(&m.side)) {
        instance.link.send(InstanceMsg::Unite);
    }
    (hand.parted, hand.stuck, hand.new_refuses) = (None, None, None);
    if std::mem::take(&mut hand.taken) {
        // Clients were sent to a kernel that is lost.
        args.env.switch.redirect(&args.instance.name, state::kernel_of(&args.instance));
    }
    let thawed = state::thaw(args, hand, &m).await;
    let removed = side::remove(&args.env, &m.side).await;
    window::close(&args.env, m.number).await;
    removed?;
    thawed.map(|()| (Event::Undone, String::new()))
}

/// Bytes as people read them.
pub(super) fn bytes(n: u64) -> String {
    match n {
        0..0x400 => format!("{n} bytes"),
        0x400..0x10_0000 => format!("{:.1} KiB", n as f64 / 1024.0),
        _ => format!("{:.1} MiB", n as f64 / 1_048_576.0),
    }
}
