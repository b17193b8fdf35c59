//! Where connections of clients go: to a kernel, nowhere yet, or nowhere.

use kmorph_platform::InstanceId;

use super::recovery::Phase;

/// One life of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Its instance.
    pub id: InstanceId,
    /// Number of its start.
    pub incarnation: u64,
}

/// What becomes of a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// It goes to this kernel.
    Open(Target),
    /// It waits: a kernel is coming up.
    Held,
    /// It is ended: no kernel will serve it before an operator acts.
    Closed,
}

/// The route to an instance whose recovery is in this phase.
pub fn route(phase: Phase, target: Target) -> Route {
    match phase {
        // Nothing is known to be dead yet: a connect that fails is tried again.
        Phase::Monitoring | Phase::DetectingFailure => Route::Open(target),
        Phase::Booting
        | Phase::AwaitingService
        | Phase::PreparingRecovery
        | Phase::CapturingVmcore
        | Phase::ReclaimingResources
        | Phase::TakingOver
        | Phase::Held
        | Phase::Restarting => Route::Held,
        Phase::Stopped | Phase::PartialFence | Phase::Degraded => Route::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_route() {
        let target = Target { id: InstanceId(3), incarnation: 2 };
        for (phase, expected) in [
            (Phase::Monitoring, Route::Open(target)),
            (Phase::DetectingFailure, Route::Open(target)),
            (Phase::Booting, Route::Held),
            (Phase::AwaitingService, Route::Held),
            (Phase::PreparingRecovery, Route::Held),
            (Phase::CapturingVmcore, Route::Held),
            (Phase::ReclaimingResources, Route::Held),
            (Phase::TakingOver, Route::Held),
            (Phase::Held, Route::Held),
            (Phase::Restarting, Route::Held),
            (Phase::Stopped, Route::Closed),
            (Phase::PartialFence, Route::Closed),
            (Phase::Degraded, Route::Closed),
        ] {
            assert_eq!(route(phase, target), expected, "{phase:?}");
        }
    }
}
