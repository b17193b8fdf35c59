//! What operators see of an instance.

use kmorph_control::views::{
    CpuHealth, HealthView, HeartbeatView, InstanceState, InstanceView, IoHealth, MemoryHealth,
};
use kmorph_platform::InstanceSpec;
use tokio::time::Instant;

use super::effects::Incident;
use super::heartbeat::Readings;
use super::morph;
use crate::core::health::{Missing, State as HealthState};
use crate::core::policy::{AgentSilent, Policy, hang_bound};
use crate::core::recovery::{Goal, Phase, Saved};
use crate::store::{InstanceRecord, Role};

fn ms(at: Option<Instant>) -> Option<u64> {
    at.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX))
}

fn us(d: std::time::Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

fn millis(d: std::time::Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// The state operators see, from the states of both machines.
pub(crate) fn state(phase: Phase, saved: Saved, health: &HealthState, started: bool) -> InstanceState {
    match phase {
        Phase::Stopped if started => InstanceState::Stopped,
        Phase::Stopped => InstanceState::Defined,
        // It came up with something missing.
        Phase::AwaitingService if matches!(health, HealthState::Suspect { .. }) => InstanceState::Suspect,
        Phase::Booting | Phase::AwaitingService if saved.first && saved.goal == Goal::Restart => {
            InstanceState::Starting
        }
        Phase::Booting
        | Phase::AwaitingService
        | Phase::PreparingRecovery
        | Phase::CapturingVmcore
        | Phase::ReclaimingResources
        | Phase::TakingOver
        | Phase::Held
        | Phase::Restarting => InstanceState::Recovering,
        Phase::Monitoring => match health {
            HealthState::Healthy => InstanceState::Healthy,
            HealthState::Suspect { .. } => InstanceState::Suspect,
            HealthState::AgentSilent => InstanceState::AgentSilent,
            HealthState::Starting => InstanceState::Starting,
            HealthState::Down | HealthState::Dead(_) => InstanceState::Recovering,
        },
        Phase::DetectingFailure => InstanceState::Suspect,
        Phase::PartialFence => InstanceState::PartialFence,
        Phase::Degraded => InstanceState::Degraded,
    }
}

/// One sentence on an instance that is not well.
pub(crate) fn trouble(health: &HealthState) -> String {
    match health {
        HealthState::Suspect { missing: Missing::Pulse, .. } => {
            "its kernel's pulse is silent while its agent was heard: being probed".into()
        }
        HealthState::Suspect { missing: Missing::Agent, .. } => {
            "its agent does not answer while its kernel lives: being probed".into()
        }
        HealthState::Suspect { missing: Missing::Both, .. } => {
            "neither its kernel's pulse nor its agent is heard: being probed".into()
        }
        _ => "its agent does not answer while its kernel lives: its user space is dead or starved".into(),
    }
}

/// What an operator can do about an instance that does not run as it should.
pub(crate) fn advice(record: &InstanceRecord, state: InstanceState) -> String {
    let name = &record.spec.name;
    match state {
        InstanceState::Degraded => format!(
            "look at kmorphctl console {name} and kmorphctl recovery-log --instance={name}, then kmorphctl recover {name} or kmorphctl terminate {name}"
        ),
        InstanceState::PartialFence => {
            format!(
                "a CPU may still run: kmorphctl recover {name} tries to stop it again; else restart the machine"
            )
        }
        InstanceState::AgentSilent => match record.policy.agent_silent {
            AgentSilent::Restart => format!(
                "its guardian restarts its agent; if that does not help: kmorphctl console {name}, kmorphctl recover {name}"
            ),
            AgentSilent::Notify => format!("kmorphctl console {name}, then kmorphctl recover {name}"),
        },
        InstanceState::Suspect if record.saved.phase == Phase::DetectingFailure => {
            format!("kmorphctl recover {name} or kmorphctl terminate {name}")
        }
        InstanceState::Healthy if record.morph.is_none() && record.role == Role::Own => {
            morph::lacks(&record.growth).map_or(String::new(), |lacks| {
                format!(
                    "{lacks} missing since the last morph: kmorphctl morph {name}, or kmorphctl recover {name}, brings them back"
                )
            })
        }
        _ => String::new(),
    }
}

/// An instance that is defined and was never started here.
pub(crate) fn defined(spec: &InstanceSpec, policy: &Policy) -> InstanceView {
    let record = InstanceRecord::new(spec.clone(), *policy);
    instance(&record, InstanceState::Defined, None, None, &Readings::default(), false)
}

/// An instance, in full.
pub(crate) fn instance(
    record: &InstanceRecord,
    state: InstanceState,
    booted: Option<Instant>,
    incident: Option<Incident>,
    readings: &Readings,
    watching: bool,
) -> InstanceView {
    let spec = &record.spec;
    // After the daemon was restarted only the wall clock knows when the instance was started.
    let uptime = booted.map(|at| at.elapsed().as_secs_f64()).or_else(|| {
        let since = super::effects::unix_ms().checked_sub(record.booted_unix_ms?)?;
        (watching && record.region.is_some()).then_some(since as f64 / 1e3)
    });
    InstanceView {
        name: spec.name.clone(),
        id: spec.id.0,
        cid: spec.id.cid(),
        state,
        reason: record.reason.clone(),
        advice: advice(record, state),
        maintenance: record.maintenance,
        group: None,
        agent_restarts: 0,
        release: record.release.clone(),
        kernel: record.kernel.display().to_string(),
        incarnation: record.incarnation,
        recoveries: record.recoveries,
        // What it is to get it does not have. Of one side of a morph that comes on top.
        cpus: spec.cpus.iter().copied().filter(|c| !record.growth.cpus.contains(c)).collect(),
        memory_bytes: match record.role {
            Role::Own => spec.memory_bytes.saturating_sub(record.growth.memory_bytes),
            Role::Side(_) | Role::Standby(_) => spec.memory_bytes,
        },
        memory_base: record.region.map(|r| r.base).or(spec.memory_base),
        monitor: record.policy.auto_heal,
        heartbeat_timeout_ms: millis(record.policy.heartbeat_timeout),
        last_heartbeat_ms: if watching { ms(readings.answered) } else { None },
        pulse_age_ms: if watching { ms(readings.pulse_moved) } else { None },
        uptime_s: uptime,
        incident: incident.map(|i| i.number),
        morph: record.morph.as_ref().map(|m| m.saved.phase.name().to_owned()),
        side_of: match &record.role {
            Role::Own | Role::Standby(_) => None,
            Role::Side(of) => Some(of.clone()),
        },
        standby_of: match &record.role {
            Role::Own | Role::Side(_) => None,
            Role::Standby(of) => Some(of.clone()),
        },
        standby: None,
        publish: vec![],
        handover_bytes: 0,
    }
}

/// Heartbeat figures.
pub(crate) fn heartbeat(name: &str, policy: &Policy, readings: &Readings) -> HeartbeatView {
    let s = readings.stats;
    HeartbeatView {
        name: name.to_owned(),
        sent: s.sent,
        received: s.received,
        missed: s.missed,
        missed_in_row: s.missed_in_row,
        rtt_last_us: s.last.map(us),
        rtt_min_us: s.min.map(us),
        rtt_mean_us: s.mean().map(us),
        rtt_max_us: s.max.map(us),
        last_ms: ms(readings.answered),
        interval_ms: millis(policy.heartbeat_interval()),
        timeout_ms: millis(policy.heartbeat_timeout),
        hang_bound_ms: millis(hang_bound(policy)),
        pulse_age_ms: ms(readings.pulse_moved),
        pulse_count: readings.pulse_count,
    }
}

/// Health figures.
pub(crate) fn health(name: &str, readings: &Readings) -> HealthView {
    let Some((at, metrics)) = &readings.metrics else {
        return HealthView { name: name.to_owned(), ..HealthView::default() };
    };
    HealthView {
        name: name.to_owned(),
        age_ms: millis(at.elapsed()),
        cpu: metrics.cpu.as_ref().map(|c| CpuHealth {
            online: c.online,
            busy_percent: c.busy_percent,
            load1: c.load1,
            pressure: c.pressure,
        }),
        memory: metrics.memory.as_ref().map(|m| MemoryHealth {
            total: m.total,
            available: m.available,
            pressure: m.pressure,
        }),
        io: metrics.io.as_ref().map(|i| IoHealth { probe_us: i.probe_us, pressure: i.pressure }),
    }
}
