//! What operators ask of an instance.

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::InstanceView;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use super::super::transport::TransportMsg;
use super::{Asking, InstanceActorState, InstanceMsg, Plan, Reply, Waiter, Wish};
use crate::core::recovery::{Action, Event, Outcome, Phase};

impl InstanceActorState {
    /// Whether it may be started as something else.
    fn is_free(&self) -> bool {
        let machine = self.machine.as_ref();
        machine.is_some_and(|m| matches!(m.phase(), Phase::Stopped | Phase::Degraded) && !m.held())
    }

    /// What was published of it before it is started again is not in the way.
    pub(super) async fn make_room(&mut self) {
        if self.is_free() {
            let switch = &self.args.env.switch;
            switch.close(&self.args.instance.name);
            switch.settle().await;
        }
    }

    pub(super) fn spawn(&mut self, plan: Plan, wait: bool, reply: Reply<InstanceView>) {
        if self.is_free() {
            let i = &self.args.instance;
            let group = self.args.env.group_of(&i.name);
            if let Err(error) = self.args.env.switch.publish(&i.name, group, &plan.publish) {
                // Who asked may have given up waiting.
                drop(reply.send(Err(error)));
                return;
            }
            let mut r = self.args.instance.record();
            (r.spec, r.policy, r.overrides) = (plan.spec, plan.policy, plan.overrides);
            (r.kernel, r.initramfs, r.cmdline) = (plan.kernel, plan.initramfs, plan.cmdline);
            (r.publish, r.handover, r.growth) = (plan.publish, plan.handover, plan.growth);
            drop(r);
            self.use_policy(plan.policy);
        }
        self.operator(Event::Spawn, if wait { Wish::Serve } else { Wish::Start }, reply);
    }

    pub(super) fn terminate(&mut self, force: bool, reply: Reply<InstanceView>) {
        let phase = self.machine.as_ref().map(|m| m.phase());
        let serves = matches!(phase, Some(Phase::Monitoring | Phase::AwaitingService));
        if force || !serves || self.channel.is_none() {
            self.asking = None;
            return self.operator(Event::OperatorTerminate, Wish::Stop, reply);
        }
        self.waiters.push(Waiter { wish: Wish::Stop, reply });
        if self.asking.replace(Asking::Terminate).is_none() {
            self.ask();
        }
    }

    /// Ask the agent to stop its workload; the answer, or its absence, comes back as a message.
    pub(super) fn ask(&mut self) {
        let (env, link) = (self.args.env.clone(), self.args.instance.link.clone());
        let (id, incarnation, epoch) = (self.args.instance.id(), self.incarnation(), self.epoch);
        let grace = env.config.terminate_grace;
        info!(instance = %self.args.instance.name, ?grace, "asking its agent to stop the workload");
        tokio::spawn(async move {
            let (reply, answer) = oneshot::channel();
            env.transport.send(TransportMsg::Terminate { id, incarnation, grace, reply });
            // The connection keeps to the grace itself; this limit is for a transport that is gone.
            let result = match timeout(grace * 2, answer).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err("there is no connection to it".into()),
                Err(_) => Err(format!("it was not asked within {:?}", grace * 2)),
            };
            link.send(InstanceMsg::Asked { epoch, result });
        });
    }

    pub(super) fn asked(&mut self, result: Result<String, String>) {
        let Some(asking) = self.asking.take() else { return };
        match result {
            Ok(detail) => info!(instance = %self.args.instance.name, %detail, "its workload is stopped"),
            Err(why) => {
                warn!(instance = %self.args.instance.name, %why, "its workload was not stopped in order")
            }
        }
        match asking {
            Asking::Terminate => self.recovery(Event::OperatorTerminate),
            Asking::Group(why) => self.recovery(Event::GroupStop(why)),
        }
    }

    /// Step the machine with an operator's wish; the waiter is answered when it is settled, or now when it is
    /// refused.
    pub(super) fn operator(&mut self, event: Event, wish: Wish, reply: Reply<InstanceView>) {
        let now = self.args.env.now();
        let Some(machine) = &mut self.machine else { return };
        let actions = machine.step(now, event);
        let refusal =
            actions.iter().find_map(|a| if let Action::Refuse(why) = a { Some(*why) } else { None });
        if let Some(why) = refusal {
            let text = format!("instance {}: {why}", self.args.instance.name);
            // Who asked may have given up waiting.
            let _ = reply.send(Err(OpError::new(ErrorKind::Conflict, text)));
            return;
        }
        self.waiters.push(Waiter { wish, reply });
        self.carry_out(actions);
    }
}

/// The answer to a wish, when this outcome is one.
pub(super) fn answer(
    name: &str,
    wish: Wish,
    outcome: &Outcome,
    view: &InstanceView,
    console: &str,
) -> Option<Result<InstanceView, OpError>> {
    let error = |kind, text: String| Some(Err(OpError::new(kind, format!("instance {name}: {text}"))));
    match (wish, outcome) {
        (Wish::Start, Outcome::Started | Outcome::Serving)
        | (Wish::Serve | Wish::Recover, Outcome::Serving)
        | (Wish::Stop, Outcome::Stopped | Outcome::BootFailed(_)) => Some(Ok(view.clone())),
        (Wish::Serve | Wish::Recover, Outcome::Started)
        | (Wish::Stop, Outcome::Started | Outcome::Serving) => None,
        (Wish::Start | Wish::Serve | Wish::Recover, Outcome::BootFailed(why)) => {
            error(ErrorKind::BootFailed, format!("{why}; everything was given back{console}"))
        }
        (Wish::Start | Wish::Serve | Wish::Recover, Outcome::Stopped) => {
            error(ErrorKind::Conflict, "it was stopped by an operator".into())
        }
        (_, Outcome::PartialFence(why)) => error(ErrorKind::PartialFence, why.clone()),
        (Wish::Stop, Outcome::Degraded(why)) => error(ErrorKind::Internal, why.clone()),
        (Wish::Start | Wish::Serve | Wish::Recover, Outcome::Degraded(why)) => {
            error(ErrorKind::BootFailed, format!("{why}{console}"))
        }
    }
}
