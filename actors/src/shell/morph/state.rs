//! The state of workloads, from the old kernel to the new one.

use std::time::Duration;

use kmorph_control::views::TransferView;
use kmorph_platform::PlatformError;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::hand::{Hand, Parted};
use super::lines::{Copied, Line, Lines, Trouble};
use super::record::{hand_over, part, runs, unite};
use super::work::{LOOK_AGAIN, Worked, bytes, healthy, persist, sides};
use super::{MorphArgs, window};
use crate::core::morph::{Event, Round};
use crate::core::route::Target;
use crate::shell::handover::REVOKE_LIMIT;
use crate::shell::instance::{Instance, InstanceMsg};
use crate::store::MorphRecord;

/// How long a kernel may take to say what it has: a share of the time of the whole phase, so that the reason is known
/// when it is over.
const NEGOTIATION_SHARE: f64 = 0.8;

pub(super) fn number(args: &MorphArgs) -> u64 {
    args.instance.record().morph.as_ref().map_or(0, |m| m.number)
}

/// Ask the old kernel what it has, and the new one whether it takes that.
pub(super) async fn negotiate(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let side = sides(args)?;
    (hand.lines, hand.transfer, hand.negotiated) = (None, None, false);
    let live = hand.live.clone();
    let agreed = async {
        let mut lines = Lines::open(&args.env, &args.instance, &side, number(args), live).await?;
        let wait = args.instance.record().policy.morph_timeout.mul_f64(NEGOTIATION_SHARE);
        lines.offers().await?;
        if !lines.sections.is_empty() {
            let window = window::open(&args.env, &args.instance, &side, number(args)).await;
            lines.agree(wait, window).await?;
        }
        Ok(lines)
    };
    let lines = match agreed.await {
        Ok(lines) => lines,
        // Agents of an earlier release: there is no state to keep.
        Err(Trouble::Unsupported) => {
            hand.negotiated = true;
            return Ok((
                Event::Agreed,
                "an agent knows nothing of state: the new kernel begins with its own".into(),
            ));
        }
        Err(trouble) => return Err(trouble.text()),
    };
    let sections = lines.sections.len();
    let text = if sections == 0 {
        "the workload offers no state: the new kernel begins with its own".to_owned()
    } else {
        hand.transfer = Some(TransferView { sections: sections as u64, ..TransferView::default() });
        let names: Vec<&str> = lines.sections.iter().map(|s| s.name.as_str()).collect();
        format!("{sections} sections are handed over: {}", names.join(", "))
    };
    (hand.lines, hand.negotiated) = (Some(lines), true);
    Ok((Event::Agreed, text))
}

/// Copy what there is, or what changed since, with the workload held back by so many percent of its pace.
pub(super) async fn transfer(hand: &mut Hand, round: u32, throttle: u8) -> Worked {
    hand.agreed()?;
    if !hand.has_state() {
        return Ok((Event::Round(Round::default()), String::new()));
    }
    let mut lines = hand.lines.take().ok_or("the connections to the agents are lost")?;
    let began = Instant::now();
    let Copied { bytes: copied, throttled, unheld, shared, sent, .. } =
        lines.round(round, throttle).await.map_err(Trouble::text)?;
    let took = began.elapsed();
    let rate = copied as f64 / took.as_secs_f64().max(1e-9) / 1_048_576.0;
    if let Some(t) = &mut hand.transfer {
        (t.rounds, t.bytes, t.last_bytes) = (u64::from(lines.rounds), lines.copied, copied);
        t.mib_per_s = rate;
        t.sent_bytes += sent;
        t.shared_bytes += shared;
        if round == 0 {
            t.full_mib_per_s = rate;
        }
        t.throttled_percent = t.throttled_percent.max(throttled.into());
    }
    hand.lines = Some(lines);
    let held = match (throttle, throttled, unheld) {
        (0, _, _) => String::new(),
        (_, 0, why) => format!(", not throttled: {why}"),
        (_, percent, _) => format!(", throttled by {percent} %"),
    };
    let how = match (shared, sent) {
        (0, sent) if sent < copied => format!(" ({} sent)", bytes(sent)),
        (0, _) => String::new(),
        (_, 0) => " through shared memory".to_owned(),
        (_, sent) => format!(" ({} through shared memory, {} sent)", bytes(shared), bytes(sent)),
    };
    let text = format!("round {round}: {}{how} in {took:.1?}, {rate:.0} MiB/s{held}", bytes(copied));
    Ok((Event::Round(Round { bytes: copied, took, throttled }), text))
}

/// Let the workload change its state as fast as it wants again.
pub(super) async fn lift(hand: &mut Hand) -> Result<(), String> {
    let Some(mut lines) = hand.lines.take() else { return Ok(()) };
    lines.round(lines.rounds, 0).await.map_err(Trouble::text)?;
    hand.lines = Some(lines);
    Ok(())
}

/// Have the workload stand still and copy its last changes. Where there is no state nothing stands still; but nobody
/// takes over who is not well.
pub(super) async fn freeze(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let side = sides(args)?;
    hand.agreed()?;
    // What changes while one waits would have to be copied while nobody serves.
    healthy(&args.env, &side, Duration::ZERO).await?;
    if !hand.has_state() {
        return Ok((Event::Frozen, String::new()));
    }
    let mut lines = hand.lines.take().ok_or("the connections to the agents are lost")?;
    // With handover memory it has to be seen that the old kernel writes no more.
    let mut hands_over = lines.can_hand_over() && args.instance.record().handover.is_none();
    // Whoever finds the workload standing still knows that it is to be told to go on.
    if let Some(m) = &mut args.instance.record().morph {
        m.frozen = true;
    }
    persist(&args.instance).await;
    let target = kernel_of(&side);
    args.env.switch.park(&args.instance.name, target).await;
    // Also has the new kernel done with what those connections gave it to do.
    lines.rehearse(hands_over).await.map_err(Trouble::text)?;
    let mut parted = part(args, &side).await?;
    if hands_over && let Err(why) = hand_over(args, &mut parted).await {
        warn!(instance = %args.instance.name, %why, "the new kernel does not take over by itself");
        hands_over = false;
    }
    hand.parted = Some(parted);
    let policy = args.instance.record().policy;
    for instance in [&*args.instance, &*side] {
        instance.link.send(InstanceMsg::StandAside(policy.morph_timeout));
    }
    lines.hurry(policy.heartbeat_timeout);
    let round = lines.rounds;
    let mut served = None;
    let last = if hands_over {
        let switch = &args.env.switch;
        // Of several workloads one that serves says nothing about the others.
        if lines.workloads() == 1 {
            switch.decide(&args.instance.name, target);
        }
        hand.begin_blackout();
        let handed = lines.hand_over(round);
        tokio::pin!(handed);
        tokio::select! {
            biased;
            last = &mut handed => last,
            // A client's session goes on there: the agents' words come later.
            () = switch.passed(&args.instance.name, target) => {
                served = Some(hand.still_for());
                handed.await
            }
        }
    } else {
        hand.begin_blackout();
        lines.last(round).await
    };
    match last {
        Ok(last) => {
            if last.taken {
                let after = served.unwrap_or_else(|| hand.still_for());
                args.env.switch.release(&args.instance.name, target);
                hand.took_over(after, &last);
            } else {
                hand.last(&last);
            }
            if let Some(t) = &mut hand.transfer {
                (t.rounds, t.bytes, t.last_bytes) = (u64::from(lines.rounds), lines.copied, last.bytes);
            }
            hand.lines = Some(lines);
            Ok((if last.taken { Event::Taken } else { Event::Frozen }, String::new()))
        }
        // Before it is given up it is seen whether the new kernel has taken over.
        Err(trouble) if hands_over => {
            if let Trouble::Stuck(why) = &trouble {
                hand.stuck = Some(why.clone());
            }
            Err(trouble.text())
        }
        Err(trouble) => {
            hand.parted = None;
            unite(args, &side);
            // This conversation may be half-way through: the workload is told to go on by another one.
            Err(trouble.text())
        }
    }
}

pub(super) fn kernel_of(instance: &Instance) -> Target {
    let r = instance.record();
    Target { id: r.spec.id, incarnation: r.incarnation }
}

/// Find out whether the new kernel has taken over by itself. One that has not is stopped, which it would be anyway: then it
/// certainly never does.
pub(super) async fn withdraw(args: &MorphArgs, hand: &mut Hand) -> Worked {
    let record = args.instance.record().morph.clone();
    let (Some(m), Ok(side)) = (record.filter(|m| m.handed_over), sides(args)) else {
        return Ok((Event::Withdrawn, String::new()));
    };
    let (name, switch, target) = (&args.instance.name, &args.env.switch, kernel_of(&side));
    let taken = |hand: &mut Hand| {
        switch.release(name, target);
        hand.taken = true;
        Ok((Event::TakenAlready, "the new kernel had taken over".to_owned()))
    };
    hand.lines = None;
    if !switch.take_back(name, target) {
        return taken(hand);
    }
    let limit = args.instance.record().policy.heartbeat_timeout.min(args.env.config.effect_limit);
    let mut never = false;
    if hand.stuck.is_none() {
        // Whoever had no part in it so far may find an agent that is being started anew.
        let again = hand.parted.is_none();
        let ask = async {
            loop {
                let asked =
                    async { Line::open(&args.env, &side).await?.withdraw(m.number, &m.saved.why).await };
                match asked.await {
                    Err(Trouble::Lost(_)) if again && runs(&side) => sleep(LOOK_AGAIN).await,
                    answer => break answer,
                }
            }
        };
        match timeout(limit, ask).await {
            Ok(Ok(true)) => return taken(hand),
            Ok(Ok(false)) => never = true,
            Ok(Err(trouble)) => warn!(instance = %name, "the new kernel is stopped: {}", trouble.text()),
            Err(_) => warn!(instance = %name, ?limit, "the new kernel is stopped: it does not answer"),
        }
    }
    let detail = match stop(args, target).await {
        Ok(()) => "the new kernel is stopped and has not taken over".to_owned(),
        Err(why) if never => format!("the new kernel never takes over, and may still run: {why}"),
        Err(why) => {
            // It may serve: then it is the one that does.
            error!(instance = %name, %why, "the new kernel cannot be stopped: the instance is that one");
            return taken(hand);
        }
    };
    if let Some(m) = &mut args.instance.record().morph {
        m.handed_over = false;
    }
    Ok((Event::Withdrawn, detail))
}

/// The new kernel's workload serves, and clients go there.
pub(super) async fn take_over(args: &MorphArgs, hand: &mut Hand) -> Result<(), String> {
    let target = kernel_of(&args.instance);
    let decided_here = hand.parted.is_some() && hand.has_state() && !hand.taken;
    match take_memory(args, hand.parted.clone(), target).await {
        Err(why) if decided_here => return Err(why),
        Err(why) => error!(instance = %args.instance.name, "{why}"),
        Ok(()) => {}
    }
    let mut lines = hand.lines.take();
    let (switch, name) = (&args.env.switch, &args.instance.name);
    // Of several workloads one that serves says nothing about the others.
    if !hand.taken && lines.as_ref().is_some_and(|l| l.workloads() == 1) {
        switch.decide(name, target);
    }
    let mut serves = false;
    let told = {
        let tell = async {
            match &mut lines {
                Some(lines) => lines.new.commit(number(args), true).await,
                None => Line::open(&args.env, &args.instance).await?.commit(number(args), true).await,
            }
        };
        tokio::pin!(tell);
        tokio::select! {
            biased;
            told = &mut tell => told,
            // A client's session goes on there: the agent's word comes later.
            () = switch.passed(name, target) => {
                serves = true;
                hand.mark(|b, took| b.activate_us = took);
                tell.await
            }
        }
    };
    match told {
        Ok(()) | Err(Trouble::Unsupported) => {}
        Err(trouble) if decided_here && switch.take_back(name, target) => return Err(trouble.text()),
        // Every heartbeat tells it too.
        Err(trouble) => warn!(instance = %args.instance.name, "not told to serve yet: {}", trouble.text()),
    }
    switch.release(name, target);
    if !serves {
        hand.mark(|b, took| b.activate_us = took);
    }
    if let Some(b) = hand.blackout() {
        info!(instance = %args.instance.name, ?b, "the workload goes on in the new kernel");
    }
    hand.parted = None;
    hand.lines = lines;
    Ok(())
}

/// Handover memory is the new kernel's. An old one that does not confirm that it writes no more is stopped now rather than
/// later.
async fn take_memory(args: &MorphArgs, parted: Option<Parted>, new: Target) -> Result<(), String> {
    let Some(region) = args.instance.record().handover else { return Ok(()) };
    let platform = &args.env.platform;
    let assign = || platform.handover_assign(region.key, Some(new.id), REVOKE_LIMIT);
    let Err(error) = assign().await else { return Ok(()) };
    warn!(instance = %args.instance.name, %error, "the old kernel does not let go of its handover memory: it is stopped");
    if let Some(parted) = parted {
        let old = (parted.old.spec.id, parted.old.incarnation);
        // Whether that worked is seen by the next try.
        let _ = timeout(args.env.config.effect_limit, platform.fence(old.0, old.1)).await;
    }
    assign().await.map(drop).map_err(|e| format!("handover memory: {e}"))
}

/// Handover memory is the old kernel's again. The new one is stopped: it need not confirm.
async fn return_memory(args: &MorphArgs, parted: Option<Parted>) {
    let (Some(region), Some(parted)) = (args.instance.record().handover, parted) else { return };
    let old = Some(parted.old.spec.id);
    if let Err(error) = args.env.platform.handover_assign(region.key, old, REVOKE_LIMIT).await {
        error!(instance = %args.instance.name, %error, "handover memory cannot be given back to the old kernel");
    }
}

/// The new kernel did not say that it serves. When it is seen stopped it never will, and the old one has everything.
pub(super) async fn not_activated(args: &MorphArgs, hand: &mut Hand, why: String) -> Worked {
    let target = kernel_of(&args.instance);
    warn!(instance = %args.instance.name, %why, "the new kernel does not take over: it is stopped");
    match stop(args, target).await {
        Ok(()) => {
            return_memory(args, hand.parted.clone()).await;
            Ok((Event::NotActivated(why), String::new()))
        }
        Err(more) => {
            hand.parted = None;
            // It may serve: then it is the one that does.
            args.env.switch.release(&args.instance.name, target);
            args.instance.link.send(InstanceMsg::Unite);
            if let Ok(side) = sides(args) {
                side.link.send(InstanceMsg::Unite);
            }
            Err(format!("{why}; {more}"))
        }
    }
}

/// Stop a kernel for good, or say why it may still run. It is tried as often as a recovery does.
pub(super) async fn stop(args: &MorphArgs, target: Target) -> Result<(), String> {
    let limit = args.env.config.effect_limit;
    let tries = args.instance.record().policy.fence_tries.max(1);
    let mut why = String::new();
    for _ in 0..tries {
        why = match timeout(limit, args.env.platform.fence(target.id, target.incarnation)).await {
            Ok(Ok(report)) if report.complete => return Ok(()),
            Ok(Ok(_)) => "a CPU of it may still run".to_owned(),
            // Whoever was here before has stopped it and given back what it had.
            Ok(Err(PlatformError::Unknown(_))) => return Ok(()),
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("not stopped within {limit:?}"),
        };
    }
    Err(why)
}

/// The old kernel's workload may end. It is stopped anyway.
pub(super) async fn retire(args: &MorphArgs, hand: &mut Hand) {
    let Some(mut lines) = hand.lines.take() else { return };
    let told = timeout(args.env.config.effect_limit, lines.old.commit(number(args), false)).await;
    if let Ok(Err(trouble)) = told {
        info!(instance = %args.instance.name, "the old kernel's workload was not told that it is over: {}", trouble.text());
    }
}

/// The old kernel's workload goes on. One that may stand still is told until it says so, or is dead.
pub(super) async fn thaw(args: &MorphArgs, hand: &mut Hand, m: &MorphRecord) -> Result<(), String> {
    hand.lines = None;
    let until = Instant::now() + args.env.config.effect_limit;
    loop {
        let told = async {
            let mut line = Line::open(&args.env, &args.instance).await?;
            line.roll_back(m.number, &m.saved.why, true).await
        };
        let why = match timeout(args.env.config.effect_limit, told).await {
            Ok(Ok(()) | Err(Trouble::Unsupported)) => return Ok(()),
            Ok(Err(trouble)) => trouble.text(),
            Err(_) => "no answer".into(),
        };
        if !m.frozen {
            info!(instance = %args.instance.name, %why, "its workload was not told that the morph is undone");
            return Ok(());
        }
        // A kernel that is dead is started anew by its recovery, and its workload with it.
        if !runs(&args.instance) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("the workload of the old kernel may still stand still: {why}"));
        }
        sleep(LOOK_AGAIN + Duration::from_millis(80)).await;
    }
}
