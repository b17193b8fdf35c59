//! What kmorphd asks of an agent during a morph.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use kmorph_state::wire::{Order, Section as Own, State};
use kmp::io::Connection;
use kmp::message::{
    DIRECT, Message, MorphCommit, MorphNegotiate, MorphPrepare, MorphRollback, MorphTransferState,
    MorphValidate, Reply, Section, SectionDigest,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout, timeout_at};

use super::export::export;
use super::hook::{Answer, Hook};
use super::{Arrived, Broker, DIGEST, Plan, Stage};

/// A workload that was told to go on, or to give up, answers within this time, or the daemon is told that it does not.
/// It gets the order all the same when it answers again.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Workloads come back to an agent that was started anew within this time.
const RETURN_LIMIT: Duration = Duration::from_millis(600);
/// The end of a round that comes directly is not far behind the daemon's word that it was sent.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(30);

/// The connection is of no use any more; why.
pub struct Over(pub String);

pub(super) type Outcome = Result<String, String>;

pub(super) fn reply(answer: Outcome) -> Option<Reply> {
    Some(match answer {
        Ok(detail) => Reply { ok: true, detail },
        Err(detail) => Reply { ok: false, detail },
    })
}

/// Whether a message is for [`serve`].
pub fn is_morph(message: &Message) -> bool {
    matches!(
        message,
        Message::MorphPrepare(_)
            | Message::MorphNegotiate(_)
            | Message::MorphTransferState(_)
            | Message::MorphValidate(_)
            | Message::MorphCommit(_)
            | Message::MorphRollback(_)
    )
}

/// Carry out one message of a morph and answer it.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    broker: &Arc<Broker>,
    c: &mut Connection<S>,
    sequence: u32,
    message: Message,
) -> Result<(), Over> {
    let answer: Message = match message {
        Message::MorphPrepare(m) => MorphPrepare { reply: reply(Ok(String::new())), ..m }.into(),
        Message::MorphNegotiate(m) if m.sections.is_empty() => broker.offer(m).into(),
        Message::MorphNegotiate(m) => {
            let directly = m.capabilities.iter().any(|c| c == DIRECT);
            let m = broker.accept(m).await;
            let agreed = m.reply.as_ref().is_some_and(|r| r.ok);
            let token = if directly && agreed { broker.take_directly(m.morph) } else { 0 };
            let window = if token != 0 { broker.read_window(m.morph, m.window).await } else { 0 };
            MorphNegotiate { token, window, ..m }.into()
        }
        Message::MorphTransferState(m) if m.last => {
            let (end, digests) = broker.imported(m).await;
            let digests = digests.map(Message::from);
            let said = std::iter::once(end.into()).chain(digests).try_for_each(|m| c.queue(sequence, &m));
            return said.map_err(|e| Over(e.to_string()));
        }
        Message::MorphTransferState(m) if m.data.0.is_empty() => return export(broker, c, sequence, m).await,
        Message::MorphTransferState(m) => {
            broker.piece(m.morph, m.section, m.offset, m.data.0).await;
            return Ok(());
        }
        Message::MorphValidate(m) => broker.validate(m).await.into(),
        Message::MorphCommit(m) => broker.commit(m).await.into(),
        Message::MorphRollback(m) => broker.roll_back(m).await.into(),
        other => return Err(Over(format!("{} is not part of a morph", other.kind()))),
    };
    c.queue(sequence, &answer).map_err(|e| Over(e.to_string()))
}

/// Ask for the digest of every section, all at once.
pub(super) async fn ask_digests(plan: &Plan) -> Result<Vec<Answer>, String> {
    let mut asked = vec![];
    for (hook, section) in &plan.sections {
        asked.push(hook.say(Order::Digest { section: section.clone() }).await?);
    }
    Ok(asked)
}

pub(super) async fn all_digests(asked: Vec<Answer>) -> Result<Vec<SectionDigest>, String> {
    let mut digests = vec![];
    for (section, answer) in (0..).zip(asked) {
        let digest = answer.digest().await?.into();
        digests.push(SectionDigest { section, algorithm: DIGEST.into(), digest });
    }
    Ok(digests)
}

pub(super) async fn all(asked: Vec<Answer>) -> Result<(), String> {
    let answers = join_all(asked.into_iter().map(Answer::get)).await;
    answers.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
}

/// Say it to several workloads; the answers can be awaited.
pub(super) async fn say_all(hooks: &[Arc<Hook>], order: &Order) -> Result<Vec<Answer>, String> {
    let mut asked = vec![];
    for hook in hooks {
        asked.push(hook.say(order.clone()).await?);
    }
    Ok(asked)
}

/// Have several workloads do something. One that does not answer in time does it when it can.
async fn all_in_time(hooks: Vec<Arc<Hook>>, order: Order) -> Result<(), String> {
    let names: Vec<&str> = hooks.iter().map(|h| h.name.as_str()).collect();
    let done = async { all(say_all(&hooks, &order).await?).await };
    let late = || Err(format!("{order}: no answer of all of {names:?} within {ANSWER_LIMIT:?}"));
    timeout(ANSWER_LIMIT, done).await.unwrap_or_else(|_| late())
}

/// A workload that is lost has lost what it was given.
fn lost(plan: &Plan) -> Result<(), String> {
    match plan.hooks().into_iter().find(|h| h.is_gone()) {
        Some(hook) => Err(is_lost(&hook)),
        None => Ok(()),
    }
}

fn is_lost(hook: &Hook) -> String {
    format!("workload {} is lost, and what it was given with it", hook.name)
}

fn offered(hook: &Hook, section: &Own) -> Section {
    Section {
        compatible: section.compatible.clone(),
        name: format!("{}/{}", hook.name, section.name),
        size: section.size,
        version: section.version,
    }
}

impl Broker {
    /// What the workloads that serve can hand over.
    fn offer(&self, m: MorphNegotiate) -> MorphNegotiate {
        let mut plan = Plan { morph: m.morph, sections: vec![] };
        let mut sections = vec![];
        for hook in self.hooks().into_iter().filter(|h| matches!(h.state(), State::Active | State::Frozen)) {
            hook.outdate_window();
            for section in &hook.sections {
                sections.push(offered(&hook, section));
                plan.sections.push((hook.clone(), section.name.clone()));
            }
        }
        self.lock().plan = Some(plan);
        MorphNegotiate { sections, takes_over: true, reply: reply(Ok(String::new())), ..m }
    }

    /// Take what the other kernel offers, or say what is missing.
    async fn accept(&self, m: MorphNegotiate) -> MorphNegotiate {
        let until = Instant::now() + Duration::from_millis(m.wait_ms);
        let mut came = self.came.subscribe();
        let outcome = loop {
            came.mark_unchanged();
            match self.match_up(&m.sections) {
                Ok(sections) => {
                    for (hook, _) in &sections {
                        hook.forgets();
                        hook.outdate_window();
                    }
                    self.lock().plan = Some(Plan { morph: m.morph, sections });
                    break Ok(String::new());
                }
                Err(why) => {
                    // The sender lives in this broker.
                    if !matches!(timeout_at(until, came.changed()).await, Ok(Ok(()))) {
                        break Err(why);
                    }
                }
            }
        };
        MorphNegotiate { takes_over: true, reply: reply(outcome), ..m }
    }

    fn match_up(&self, wanted: &[Section]) -> Result<Vec<(Arc<Hook>, String)>, String> {
        let hooks = self.hooks();
        let find = |w: &Section| {
            let (workload, name) =
                w.name.split_once('/').ok_or_else(|| format!("section {:?} has no workload", w.name))?;
            let hook = hooks.iter().find(|h| h.name == workload);
            let hook = hook.ok_or_else(|| format!("no workload {workload} has come to take its state"))?;
            if hook.state() != State::New {
                return Err(format!("workload {workload} is {} and takes no state", hook.state().name()));
            }
            let own = hook.sections.iter().find(|s| s.name == name && s.compatible == w.compatible);
            let own =
                own.ok_or_else(|| format!("workload {workload} takes no section {name} ({})", w.compatible))?;
            if own.version < w.version {
                return Err(format!(
                    "workload {workload} takes section {name} up to version {}, and is offered version {}",
                    own.version, w.version
                ));
            }
            Ok((hook.clone(), name.to_owned()))
        };
        wanted.iter().map(find).collect()
    }

    pub(super) fn section(&self, morph: u64, index: u32) -> Result<(Arc<Hook>, String), String> {
        let plan = self.plan(morph)?;
        let found = plan.sections.get(index as usize).cloned();
        found.ok_or_else(|| format!("section {index} of {} that were agreed on", plan.sections.len()))
    }

    /// Wait until everything of a round has come from the other kernel, and that many digests.
    async fn arrives(&self, round: u32, digests: usize) -> Result<Vec<SectionDigest>, String> {
        let mut arrived = self.arrived.subscribe();
        let whole = |a: &Arrived| a.rounds > round && a.digests.len() >= digests;
        let there = arrived.wait_for(|a| whole(a) || a.over.is_some());
        match timeout(ARRIVAL_LIMIT, there).await {
            Ok(Ok(a)) if whole(&a) => Ok(a.digests.clone()),
            // The sender lives in this broker.
            Ok(Ok(a)) => Err(format!("state comes no more: {}", a.over.clone().unwrap_or_default())),
            Ok(Err(_)) => Err("state comes no more".into()),
            Err(_) => Err(format!("not all of round {round} came within {ARRIVAL_LIMIT:?}")),
        }
    }

    /// Give a workload a piece. What goes wrong is said at the end of the round.
    pub(super) async fn piece(&self, morph: u64, section: u32, offset: u64, data: Bytes) {
        let given = async {
            let (hook, name) = self.section(morph, section)?;
            let import = hook.import(&name, offset, data);
            timeout(ANSWER_LIMIT, import).await.unwrap_or_else(|_| {
                Err(format!(
                    "workload {} takes no state: nothing was read within {ANSWER_LIMIT:?}",
                    hook.name
                ))
            })
        };
        if !self.has_failed()
            && let Err(why) = given.await
        {
            self.fail(why);
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failed.is_some()
    }

    /// What goes wrong with a piece; the first that does is said at the end of the round.
    pub(super) fn fail(&self, why: String) {
        self.lock().failed.get_or_insert(why);
    }

    /// The end of a round: every workload has put what it got in place. When the other kernel's workloads stand still,
    /// what everything has come to. When this kernel is to take over by itself, it does.
    async fn imported(&self, m: MorphTransferState) -> (MorphTransferState, Option<MorphValidate>) {
        let arrived = if m.direct { self.arrives(m.round, 0).await } else { Ok(vec![]) };
        let failed = self.lock().failed.take().or(arrived.err());
        let done = async {
            if let Some(why) = failed {
                return Err(why);
            }
            let plan = self.plan(m.morph)?;
            let mut asked = vec![];
            for (hook, section) in &plan.sections {
                asked.push(hook.say(Order::Imported { section: section.clone() }).await?);
            }
            // Said along with that: a workload does both before it is waited for.
            let digests = if m.freeze || m.takes_over { ask_digests(&plan).await? } else { vec![] };
            all(asked).await?;
            all_digests(digests).await
        };
        let (digests, done) = match done.await {
            Ok(digests) => (digests, Ok(())),
            Err(why) => (vec![], Err(why)),
        };
        let ready = match done {
            Ok(()) if m.takes_over => self.may_take_over(&m, &digests).await,
            done => done,
        };
        let took_over = m.takes_over && m.freeze && ready.is_ok();
        let served = match took_over {
            true => all_in_time(self.in_state(&[State::New]), Order::Activate).await,
            false => ready,
        };
        if took_over && served.is_ok() {
            self.lock().served = Some(m.morph);
        }
        // Who takes over by itself has compared them.
        let says = m.freeze && !m.takes_over && served.is_ok();
        let digests = says.then(|| MorphValidate { morph: m.morph, digests, reply: None });
        (MorphTransferState { took_over, reply: reply(served.map(|()| String::new())), ..m }, digests)
    }

    /// Whether everything is as it was sent. Then, and unless that was ruled out meanwhile, this kernel is the one that
    /// serves from now on.
    async fn may_take_over(&self, m: &MorphTransferState, own: &[SectionDigest]) -> Result<(), String> {
        if !m.direct {
            return Err("a kernel takes over by itself when the other one sends directly".into());
        }
        let plan = self.plan(m.morph)?;
        let sent = self.arrives(m.round, plan.sections.len()).await?;
        // A rehearsal: what the workload does meanwhile makes them differ.
        if !m.freeze {
            return Ok(());
        }
        for (index, (hook, section)) in plan.sections.iter().enumerate() {
            if sent.get(index).is_none_or(|sent| own.get(index) != Some(sent)) {
                return Err(format!("section {}/{section} differs from what was sent", hook.name));
            }
        }
        lost(&plan)?;
        let mut inner = self.lock();
        // It is forgotten with the morph.
        if inner.plan.as_ref().is_none_or(|p| p.morph != m.morph) {
            return Err(format!("morph {} was rolled back meanwhile", m.morph));
        }
        inner.stage = Stage::Serves;
        Ok(())
    }

    /// Never take over in this morph. `false`: it has already.
    async fn rule_out(&self, morph: u64) -> bool {
        let knows = {
            let inner = self.lock();
            let plan = inner.plan.as_ref().is_some_and(|p| p.morph == morph);
            plan || inner.ruled_out == Some(morph) || inner.stage != Stage::Unknown
        };
        if !knows {
            // An agent that was started anew learns from its workloads what it did.
            let until = Instant::now() + RETURN_LIMIT;
            let mut came = self.came.subscribe();
            while self.lock().stage == Stage::Unknown
                && matches!(timeout_at(until, came.changed()).await, Ok(Ok(())))
            {}
        }
        let mut inner = self.lock();
        let serves = inner.stage == Stage::Serves;
        if !serves {
            (inner.plan, inner.ruled_out) = (None, Some(morph));
        }
        !serves
    }

    /// This kernel has taken over: whether the workloads that were given their state serve, or have served. Those that are
    /// beginning are waited for.
    async fn all_serve(&self, morph: u64) -> Result<(), String> {
        if self.lock().served == Some(morph) {
            return Ok(());
        }
        let active = self.in_state(&[State::Active]);
        let beginning = match self.plan(morph) {
            Ok(plan) => {
                let came_back = |h: &Hook| active.iter().any(|a| a.name == h.name);
                let mut hooks = plan.hooks();
                hooks.retain(|h| !(h.is_gone() && came_back(h)));
                if let Some(hook) = hooks.iter().find(|h| h.is_gone()) {
                    return Err(is_lost(hook));
                }
                hooks.retain(|h| h.state() == State::New);
                hooks
            }
            // Nobody remembers which were: those that serve were.
            Err(_) if !active.is_empty() => return Ok(()),
            Err(_) => self.in_state(&[State::New]),
        };
        all_in_time(beginning, Order::Activate).await?;
        self.lock().served = Some(morph);
        Ok(())
    }

    /// Say what everything here has come to.
    async fn validate(&self, m: MorphValidate) -> MorphValidate {
        let own = async { all_digests(ask_digests(&self.plan(m.morph)?).await?).await };
        let (digests, done) = match own.await {
            Ok(digests) => (digests, Ok(String::new())),
            Err(why) => (vec![], Err(why)),
        };
        MorphValidate { digests, reply: reply(done), ..m }
    }

    fn in_state(&self, states: &[State]) -> Vec<Arc<Hook>> {
        self.hooks().into_iter().filter(|h| states.contains(&h.state())).collect()
    }

    async fn commit(&self, m: MorphCommit) -> MorphCommit {
        let done = if m.serves {
            self.set(Stage::Serves);
            let begun = all_in_time(self.in_state(&[State::New]), Order::Activate).await;
            let whole = begun.and_then(|()| self.plan(m.morph).map_or(Ok(()), |plan| lost(&plan)));
            if whole.is_ok() {
                self.lock().served = Some(m.morph);
            }
            whole
        } else {
            {
                let mut inner = self.lock();
                (inner.stage, inner.goes_on) = (Stage::Retired, false);
            }
            all_in_time(self.in_state(&[State::Active, State::Frozen]), Order::Retire).await
        };
        let reply = reply(done.map(|()| String::new()));
        MorphCommit { reply, ..m }
    }

    async fn roll_back(&self, m: MorphRollback) -> MorphRollback {
        let done = if m.serves {
            {
                let mut inner = self.lock();
                (inner.stage, inner.goes_on, inner.plan) = (Stage::Serves, true, None);
            }
            // Who came meanwhile was not told to begin.
            for hook in self.in_state(&[State::New]) {
                hook.tell(Order::Activate);
            }
            // Also those that were being frozen when the daemon turned away: they are told after that.
            all_in_time(self.in_state(&[State::Active, State::Frozen]), Order::Thaw).await
        } else {
            if !self.rule_out(m.morph).await {
                let serve = self.all_serve(m.morph).await;
                return MorphRollback { took_over: true, reply: reply(serve.map(|()| String::new())), ..m };
            }
            all_in_time(self.in_state(&[State::New]), Order::Discard).await
        };
        let reply = reply(done.map(|()| String::new()));
        MorphRollback { reply, ..m }
    }
}
