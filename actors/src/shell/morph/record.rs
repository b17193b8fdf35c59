//! The commit record, which says which kernel an instance is, and the record that gives it back.

use kmorph_control::views::RecoveryStep;
use kmorph_platform::Growth;
use tokio::time::{Instant, sleep, timeout};
use tracing::error;

use super::hand::{Hand, Parted};
use super::state::{kernel_of, stop};
use super::work::{LOOK_AGAIN, Worked, ask, sides};
use super::{MorphArgs, side};
use crate::core::morph::{Event, Phase, Saved};
use crate::core::recovery;
use crate::core::route::Target;
use crate::shell::effects::unix_ms;
use crate::shell::instance::{Instance, InstanceMsg};
use crate::store::{InstanceRecord, MorphRecord, Role};

/// Have both kernels' actors stand aside: from now on only this morph says which kernel is which. The new kernel's is asked
/// first: when it refuses, that is what has to be known.
pub(super) async fn part(args: &MorphArgs, side: &Instance) -> Result<Parted, Refused> {
    let mut parted: Vec<InstanceRecord> = vec![];
    for (instance, new) in [(side, true), (&*args.instance, false)] {
        let (by, why) = match ask(instance, InstanceMsg::Part).await {
            Some(Ok(record)) => {
                parted.push(record);
                continue;
            }
            Some(Err(why)) if new => (Refuses::New, why),
            Some(Err(why)) => (Refuses::Old, why),
            None => (Refuses::Nobody, format!("{}: its actor does not answer", instance.name)),
        };
        unite(args, side);
        return Err(Refused { by, why });
    }
    match <[InstanceRecord; 2]>::try_from(parted) {
        Ok([new, old]) => Ok(Parted { old, new }),
        Err(_) => Err(Refused { by: Refuses::Nobody, why: "their actors do not answer".into() }),
    }
}

/// Whose actor does not stand aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refuses {
    New,
    Old,
    /// One does not answer, which says nothing of its kernel.
    Nobody,
}

/// An actor does not stand aside.
pub(super) struct Refused {
    by: Refuses,
    why: String,
}

impl From<Refused> for String {
    fn from(refused: Refused) -> String {
        refused.why
    }
}

/// What operators set of an instance that stands aside is set in whatever becomes of it.
fn as_set(args: &MorphArgs, mut of: InstanceRecord) -> InstanceRecord {
    of.set_as(&args.instance.record());
    of
}

/// Write the commit record: in one transaction the instance becomes the new kernel, and the other side the old
/// one, which is to be stopped.
pub(super) async fn record(args: &MorphArgs, hand: &mut Hand) -> (Event, String) {
    let not = |why: String| (Event::NotRecorded(why), String::new());
    // When the new kernel serves already nobody goes on as what it was.
    let unite = |hand: &mut Hand, parted: Option<Parted>, side: &Instance| match hand.taken {
        true => hand.parted = parted,
        false => unite(args, side),
    };
    let side = match sides(args) {
        Ok(side) => side,
        Err(why) => return not(why),
    };
    let parted = match hand.parted.take() {
        Some(parted) => parted,
        None => match part(args, &side).await {
            Ok(parted) => parted,
            Err(refused) => {
                match refused.by {
                    Refuses::New => drop(hand.new_refuses.get_or_insert_with(Instant::now)),
                    Refuses::Old => hand.new_refuses = None,
                    Refuses::Nobody => {}
                }
                return not(refused.why);
            }
        },
    };
    hand.new_refuses = None;
    let Parted { old, new } = &parted;
    let Some(morph) = old.morph.clone() else {
        unite(hand, None, &side);
        return not("nothing is remembered of it".into());
    };
    let detail = format!("commit record: kernel {} takes over from {}", new.release, old.release);
    let step = step(&morph, &old.spec.name, new.incarnation, Phase::Committing, detail);
    let (committed, retired) = exchanged(args, &as_set(args, old.clone()), new, morph);
    let env = &args.env;
    let records = [committed.clone(), retired.clone()];
    let decide = env.store.decide(&records, std::slice::from_ref(&step));
    match timeout(env.config.store_limit, decide).await {
        Ok(Ok(())) => {
            hand.mark(|b, took| b.record_us = took);
            exchange(args, hand, &side, committed, retired);
            hand.parted = Some(parted);
            (Event::Recorded, String::new())
        }
        Ok(Err(error)) => {
            unite(hand, Some(parted), &side);
            not(error.to_string())
        }
        Err(_) => {
            hand.parted = Some(parted);
            (Event::RecordUnknown, String::new())
        }
    }
}

/// Write down that the new kernel may take over by itself. Otherwise it must not: whoever finds the morph under way would
/// not ask it.
pub(super) async fn hand_over(args: &MorphArgs, parted: &mut Parted) -> Result<(), String> {
    let set = |parted: &mut Parted, yes: bool| {
        for m in [&mut parted.old.morph, &mut args.instance.record().morph].into_iter().flatten() {
            m.handed_over = yes;
        }
    };
    set(parted, true);
    let env = &args.env;
    let decide = env.store.decide(std::slice::from_ref(&parted.old), &[]);
    let why = match timeout(env.config.store_limit, decide).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error.to_string(),
        // When it is written all the same, whoever asks is told that it did not.
        Err(_) => "the store takes too long".to_owned(),
    };
    set(parted, false);
    Err(why)
}

/// The new kernel serves already: write the commit record, however long it takes. When that kernel is lost before, there is
/// nothing to write down.
pub(super) async fn write_down(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let began = Instant::now();
    let mut said = String::new();
    hand.taken = true;
    loop {
        let why = match record(args, hand).await {
            (Event::NotRecorded(why), _) => why,
            (Event::RecordUnknown, _) => match look_up(args, hand).await {
                (Event::NotRecorded(why), _) => why,
                recorded => return Ok(recorded),
            },
            recorded => return Ok(recorded),
        };
        if why != said {
            error!(instance = %args.instance.name, %why, "the new kernel serves, and that is not written down yet");
            said = why;
        }
        let Ok(side) = sides(args) else { return Ok((Event::Withdrawn, String::new())) };
        let limit = args.env.config.effect_limit;
        // Its actor does not stand aside for it, all this time, and knows why: it does not run any more.
        if !runs(&side) && hand.new_refuses.is_some_and(|since| since.elapsed() > limit) {
            let r = side.record().clone();
            if stop(args, Target { id: r.spec.id, incarnation: r.incarnation }).await.is_ok() {
                return Ok((Event::Withdrawn, String::new()));
            }
        }
        for instance in [&*args.instance, &*side] {
            instance.link.send(InstanceMsg::StandAside(limit));
        }
        // Clients are not sent anywhere else meanwhile.
        args.env.switch.redirect(&args.instance.name, kernel_of(&side));
        sleep(LOOK_AGAIN).await;
        // What takes that long an operator has to end. A kernel that stands aside is not watched: the one that serves is not
        // asked to before the other one would.
        while hand.parted.is_none()
            && began.elapsed() > limit
            && sides(args).is_ok()
            && runs(&side)
            && !runs(&args.instance)
        {
            hand.new_refuses = None;
            sleep(LOOK_AGAIN * 50).await;
        }
    }
}

/// Whether its kernel runs, as far as is remembered, and nothing is done about it. Its actor may just be looking.
pub(super) fn runs(instance: &Instance) -> bool {
    instance.record().saved.phase == recovery::Phase::Monitoring
}

fn step(morph: &MorphRecord, instance: &str, incarnation: u64, phase: Phase, detail: String) -> RecoveryStep {
    RecoveryStep {
        incident: morph.number,
        instance: instance.to_owned(),
        incarnation,
        at_unix_ms: unix_ms(),
        offset_us: 0,
        phase: phase.name().into(),
        detail,
        recovered: None,
    }
}

/// From now on each is what the other was. New clients go to the new kernel at once, unless it has to take over state
/// first.
fn exchange(
    args: &MorphArgs,
    hand: &Hand,
    side: &Instance,
    committed: InstanceRecord,
    retired: InstanceRecord,
) {
    let target = Target { id: committed.spec.id, incarnation: committed.incarnation };
    args.instance.become_record(as_set(args, committed));
    side.become_record(retired);
    args.env.topology.changed();
    if !hand.has_state() {
        args.env.switch.redirect(&args.instance.name, target);
    }
}

/// Both records after the commit.
fn exchanged(
    args: &MorphArgs,
    old: &InstanceRecord,
    new: &InstanceRecord,
    mut morph: MorphRecord,
) -> (InstanceRecord, InstanceRecord) {
    (morph.saved.phase, morph.handed_over) = (Phase::Committing, false);
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
        handover: old.handover,
        reason: "the new kernel took over".into(),
        ..new.clone()
    };
    committed.spec.name.clone_from(&old.spec.name);
    // That is what the instance is made of; what of it is not there yet it gets when the old kernel is stopped.
    committed.spec.cpus.extend(&new.growth.cpus);
    committed.spec.memory_bytes += new.growth.memory_bytes;
    let (overrides, policy) = side::policy(&args.env, old);
    let mut retired = InstanceRecord {
        policy,
        overrides,
        role: Role::Side(old.spec.name.clone()),
        saved: stops,
        morph: None,
        publish: vec![],
        growth: Growth::default(),
        handover: None,
        incident: 0,
        reason: "a new kernel took over".into(),
        ..old.clone()
    };
    retired.spec.name.clone_from(&new.spec.name);
    (committed, retired)
}

/// Both go on as what they are now.
pub(super) fn unite(args: &MorphArgs, side: &Instance) {
    for instance in [&*args.instance, side] {
        instance.link.send(InstanceMsg::Unite);
    }
}

/// Whether the commit record is in the journal.
pub(super) async fn look_up(args: &MorphArgs, hand: &mut Hand) -> (Event, String) {
    loop {
        match side::recall(&args.env, &args.instance.name).await {
            Ok(record) => {
                let decided = record.morph.as_ref().is_some_and(|m| m.saved.phase == Phase::Committing);
                let Ok(side) = sides(args) else {
                    return (Event::NotRecorded("the new kernel is gone".into()), String::new());
                };
                if !decided {
                    if !hand.taken {
                        unite(args, &side);
                    }
                    return (Event::NotRecorded("the journal did not take it".into()), String::new());
                }
                if let Ok(retired) = side::recall(&args.env, &side.name).await {
                    exchange(args, hand, &side, record, retired);
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

/// The instance is the old kernel again, which still has all of its state: the new one was stopped before it served
/// anybody.
pub(super) async fn give_back(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let Some(Parted { mut old, new }) = hand.parted.take() else {
        return Err("nobody remembers what the old kernel was".into());
    };
    let side = sides(args)?;
    let Some(morph) = &mut old.morph else { return Err("nothing is remembered of it".into()) };
    morph.saved = Saved { phase: Phase::RollingBack, ..saved(args) };
    let detail = format!("the instance is given back to kernel {}", old.release);
    let step = step(morph, &old.spec.name, old.incarnation, Phase::RollingBack, detail);
    let env = &args.env;
    let old = as_set(args, old);
    let records = [old.clone(), new.clone()];
    loop {
        let decide = env.store.decide(&records, std::slice::from_ref(&step));
        match timeout(env.config.store_limit, decide).await {
            Ok(Ok(())) => break,
            // There is nothing else that could be done: one kernel is stopped, the other stands still.
            Ok(Err(error)) => error!(instance = %args.instance.name, %error, "it cannot be given back yet"),
            Err(_) => {
                error!(instance = %args.instance.name, "it cannot be given back yet: the store is slow")
            }
        }
        sleep(LOOK_AGAIN).await;
    }
    args.instance.become_record(as_set(args, old));
    side.become_record(new);
    args.env.topology.changed();
    Ok((Event::Returned, String::new()))
}

fn saved(args: &MorphArgs) -> Saved {
    args.instance.record().morph.as_ref().map(|m| m.saved.clone()).unwrap_or_default()
}
