//! What kmorphd asks of an agent during a morph.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use kmorph_state::wire::{Order, Section as Own, State, THROTTLE_LIMIT};
use kmp::io::Connection;
use kmp::message::{
    Blob, DIRECT, Message, MorphCommit, MorphNegotiate, MorphPrepare, MorphRollback, MorphTransferState,
    MorphValidate, Reply, Section, SectionDigest,
};
use kmp::session::Event;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::direct::Out;
use super::hook::{Answer, Content, Hook, Piece};
use super::{Broker, Plan, Stage};
use crate::kmsg;

/// A workload that was told to go on, or to give up, answers within this time, or the daemon is told that it does not.
/// It gets the order all the same when it answers again.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Bytes that may wait to be written before more is read from a workload.
const BACKLOG: usize = 256 << 10;
/// The end of a round that comes directly is not far behind the daemon's word that it was sent.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(30);
/// The daemon hears so often of pieces that do not come through it.
const PROGRESS: Duration = Duration::from_millis(200);
/// Name of the way digests are made: it is the workload's own.
const DIGEST: &str = "workload";

/// The connection is of no use any more; why.
pub struct Over(pub String);

type Outcome = Result<String, String>;

fn reply(answer: Outcome) -> Option<Reply> {
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

/// Answer with a round of pieces.
async fn export<S: AsyncRead + AsyncWrite + Unpin>(
    broker: &Arc<Broker>,
    c: &mut Connection<S>,
    sequence: u32,
    m: MorphTransferState,
) -> Result<(), Over> {
    let (morph, round, freeze) = (m.morph, m.round, m.freeze);
    let ended = |answer: Outcome, froze_ns| {
        let (last, reply) = (true, reply(answer));
        MorphTransferState { morph, round, last, freeze, froze_ns, reply, ..Default::default() }
    };
    let end = |answer, froze_ns| -> Message { ended(answer, froze_ns).into() };
    let send = |c: &mut Connection<S>, message: &Message| {
        c.queue(sequence, message).map_err(|e| Over(e.to_string()))
    };
    let plan = match broker.plan(morph) {
        Ok(plan) => plan,
        Err(why) => return send(c, &end(Err(why), 0)),
    };
    let (throttle, held) = match m.throttle {
        Some(percent) => until_closed(c, broker.throttle(&plan, percent)).await?,
        None => (None, String::new()),
    };
    let mut out = until_closed(c, broker.directly(&m)).await?;
    until_closed(c, broker.write_window(&plan, if out.is_some() { m.window } else { 0 })).await?;
    let began = Instant::now();
    // Everything is said at once: the workloads do it one after the other, and wait for nobody in between.
    let said = async {
        let frozen = if freeze { broker.freeze(&plan).await? } else { vec![] };
        let mut exports = vec![];
        for (hook, name) in &plan.sections {
            exports.push(hook.export(name, round == 0).await?);
        }
        let digests = if freeze { ask_digests(&plan).await? } else { vec![] };
        Ok((frozen, exports, digests))
    };
    // A daemon that gives up meanwhile closes the connection, and says so on another one.
    let (frozen, exports, digests) = match until_closed(c, said).await? {
        Ok(said) => said,
        Err(why) => return send(c, &end(Err(why), 0)),
    };
    let mut outcome = until_closed(c, all(frozen)).await?;
    let froze_ns = if freeze { u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX) } else { 0 };
    for (section, (pieces, ended)) in (0..).zip(exports) {
        let of = MorphTransferState { morph, round, section, ..Default::default() };
        let exported = match &mut out {
            Some(out) => pass_directly(c, sequence, out, of, pieces, ended).await?,
            None => pass_on(c, sequence, of, pieces, ended).await?,
        };
        outcome = outcome.and(exported);
    }
    let (mut direct, mut bytes, mut shared, mut sent) = (false, 0, 0, 0);
    if let Some(mut out) = out {
        outcome = outcome.and(until_closed(c, out.end(round)).await?.map_err(lost));
        (direct, bytes, shared, sent) = (true, out.bytes, out.shared, out.sent);
        *broker.out.lock().await = Some(out);
    }
    match outcome.and(until_closed(c, all_digests(digests)).await?) {
        Err(why) => send(c, &end(Err(why), froze_ns)),
        Ok(digests) => {
            let end =
                MorphTransferState { throttle, direct, bytes, shared, sent, ..ended(Ok(held), froze_ns) };
            send(c, &end.into())?;
            if freeze {
                send(c, &MorphValidate { morph, digests, reply: None }.into())?;
            }
            Ok(())
        }
    }
}

fn lost(error: std::io::Error) -> String {
    format!("the connection to the other kernel is lost: {error}")
}

/// Send the pieces of a section to the other kernel as they come. The outer error ends the connection to the daemon.
async fn pass_directly<S: AsyncRead + AsyncWrite + Unpin>(
    c: &mut Connection<S>,
    sequence: u32,
    out: &mut Out,
    of: MorphTransferState,
    mut pieces: mpsc::Receiver<Piece>,
    ended: oneshot::Receiver<Result<(), String>>,
) -> Result<Result<(), String>, Over> {
    let mut told = Instant::now();
    let gone = out.gone();
    loop {
        let next = async {
            tokio::select! {
                biased;
                piece = pieces.recv() => Ok(piece),
                () = gone.cancelled() => Err(lost(std::io::ErrorKind::UnexpectedEof.into())),
            }
        };
        let Piece { offset, content } = match until_closed(c, next).await? {
            Ok(Some(piece)) => piece,
            Ok(None) => break,
            Err(why) => return Ok(Err(why)),
        };
        let last = pieces.is_empty();
        let sent = async {
            match &content {
                Content::Bytes(data) => out.piece(of.section, offset, data).await?,
                Content::Placed { place, bytes } => out.placed(of.section, offset, *bytes, *place).await?,
            }
            // The other kernel takes this one while the next is made.
            if last { out.flush().await } else { Ok(()) }
        };
        if let Err(e) = until_closed(c, sent).await? {
            return Ok(Err(lost(e)));
        }
        if told.elapsed() >= PROGRESS {
            let so_far = MorphTransferState { bytes: out.bytes, ..of.clone() };
            c.queue(sequence, &so_far.into()).map_err(|e| Over(e.to_string()))?;
            told = Instant::now();
        }
    }
    // It has said how it ended when the last piece is through.
    Ok(ended.await.unwrap_or_else(|_| Err("the connection of a workload is lost".into())))
}

/// Send the pieces of a section as they come. The outer error ends the connection.
async fn pass_on<S: AsyncRead + AsyncWrite + Unpin>(
    c: &mut Connection<S>,
    sequence: u32,
    of: MorphTransferState,
    mut pieces: mpsc::Receiver<Piece>,
    ended: oneshot::Receiver<Result<(), String>>,
) -> Result<Result<(), String>, Over> {
    while let Some(Piece { offset, content }) = until_closed(c, pieces.recv()).await? {
        // One that goes through the daemon is given no window.
        let Content::Bytes(data) = content else {
            return Ok(Err("a piece is in a window that there is not".into()));
        };
        let piece = MorphTransferState { offset, data: Blob(data), ..of.clone() };
        c.queue(sequence, &piece.into()).map_err(|e| Over(e.to_string()))?;
        if c.backlog() >= BACKLOG {
            c.flush().await.map_err(|e| Over(format!("write: {e}")))?;
        }
    }
    // It has said how it ended when the last piece is through.
    Ok(ended.await.unwrap_or_else(|_| Err("the connection of a workload is lost".into())))
}

/// Wait for something while the daemon is there.
async fn until_closed<S, T>(c: &mut Connection<S>, what: impl Future<Output = T>) -> Result<T, Over>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::pin!(what);
    loop {
        tokio::select! {
            biased;
            done = &mut what => return Ok(done),
            event = c.next() => match event {
                Event::Closed { detail, .. } => return Err(Over(detail)),
                Event::Message { message: Message::Bye(_), .. } => return Err(Over("the daemon said goodbye".into())),
                Event::Message { message, .. } => {
                    return Err(Over(format!("{} came before the answer to what was asked", message.kind())));
                }
                Event::Unreadable { .. } | Event::Open { .. } => {}
            },
        }
    }
}

/// Ask for the digest of every section, all at once.
async fn ask_digests(plan: &Plan) -> Result<Vec<Answer>, String> {
    let mut asked = vec![];
    for (hook, section) in &plan.sections {
        asked.push(hook.say(Order::Digest { section: section.clone() }).await?);
    }
    Ok(asked)
}

async fn all_digests(asked: Vec<Answer>) -> Result<Vec<SectionDigest>, String> {
    let mut digests = vec![];
    for (section, answer) in (0..).zip(asked) {
        let digest = answer.digest().await?.into();
        digests.push(SectionDigest { section, algorithm: DIGEST.into(), digest });
    }
    Ok(digests)
}

async fn all(asked: Vec<Answer>) -> Result<(), String> {
    let answers = join_all(asked.into_iter().map(Answer::get)).await;
    answers.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
}

/// Say it to several workloads; the answers can be awaited.
async fn say_all(hooks: &[Arc<Hook>], order: &Order) -> Result<Vec<Answer>, String> {
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
            for section in &hook.sections {
                sections.push(offered(&hook, section));
                plan.sections.push((hook.clone(), section.name.clone()));
            }
        }
        self.lock().plan = Some(plan);
        MorphNegotiate { sections, reply: reply(Ok(String::new())), ..m }
    }

    /// Take what the other kernel offers, or say what is missing.
    async fn accept(&self, m: MorphNegotiate) -> MorphNegotiate {
        let until = Instant::now() + Duration::from_millis(m.wait_ms);
        let mut came = self.came.subscribe();
        let outcome = loop {
            came.mark_unchanged();
            match self.match_up(&m.sections) {
                Ok(sections) => {
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
        MorphNegotiate { reply: reply(outcome), ..m }
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

    /// Where the pieces of this round go, when not to the daemon.
    async fn directly(self: &Arc<Self>, m: &MorphTransferState) -> Option<Out> {
        let reach = self.reach.get().filter(|_| m.peer != 0)?;
        let before = self.out.lock().await.take().filter(|out| out.is_for(m.token));
        let connected = match before {
            Some(out) => Ok(out),
            None => Out::connect(reach, m.peer, m.morph, m.token, self.frees(m.morph)).await,
        };
        match connected {
            Ok(mut out) => {
                out.begin();
                Some(out)
            }
            Err(e) => {
                let text =
                    format!("state goes through the daemon: instance {} does not take it: {e}", m.peer);
                kmsg::log(kmsg::ERROR, &text);
                None
            }
        }
    }

    /// Wait until everything of a round has come from the other kernel.
    async fn arrives(&self, round: u32) -> Result<(), String> {
        let mut arrived = self.arrived.subscribe();
        let there = arrived.wait_for(|a| a.rounds > round || a.over.is_some());
        match timeout(ARRIVAL_LIMIT, there).await {
            Ok(Ok(a)) if a.rounds > round => Ok(()),
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
    /// what everything has come to.
    async fn imported(&self, m: MorphTransferState) -> (MorphTransferState, Option<MorphValidate>) {
        let arrived = if m.direct { self.arrives(m.round).await } else { Ok(()) };
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
            let digests = if m.freeze { ask_digests(&plan).await? } else { vec![] };
            all(asked).await?;
            all_digests(digests).await
        };
        let (digests, done) = match done.await {
            Ok(digests) => (digests, Ok(String::new())),
            Err(why) => (vec![], Err(why)),
        };
        let digests =
            (m.freeze && done.is_ok()).then(|| MorphValidate { morph: m.morph, digests, reply: None });
        (MorphTransferState { reply: reply(done), ..m }, digests)
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

    /// Have everybody stand still whose state goes.
    async fn freeze(&self, plan: &Plan) -> Result<Vec<Answer>, String> {
        self.set(Stage::Frozen);
        say_all(&plan.hooks(), &Order::Freeze).await
    }

    /// Have the workloads change their state more slowly; by how much all of them do, and why that is not more.
    async fn throttle(&self, plan: &Plan, percent: u8) -> (Option<u8>, String) {
        self.lock().throttled |= percent > 0;
        let order = Order::Throttle { percent: percent.min(THROTTLE_LIMIT) };
        let one = async |hook: &Hook| {
            let done = async { hook.say(order.clone()).await?.get().await.map(drop) };
            let late = || Err(format!("workload {}, {order}: no answer within {ANSWER_LIMIT:?}", hook.name));
            match hook.throttles {
                true => timeout(ANSWER_LIMIT, done).await.unwrap_or_else(|_| late()),
                false if percent == 0 => Ok(()),
                false => Err(format!("workload {} does not know how to be throttled", hook.name)),
            }
        };
        let hooks = plan.hooks();
        let told = join_all(hooks.iter().map(|hook| one(hook))).await;
        let why = told.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; ");
        (Some(if why.is_empty() { percent } else { 0 }), why)
    }

    fn in_state(&self, states: &[State]) -> Vec<Arc<Hook>> {
        self.hooks().into_iter().filter(|h| states.contains(&h.state())).collect()
    }

    async fn commit(&self, m: MorphCommit) -> MorphCommit {
        let done = if m.serves {
            self.set(Stage::Serves);
            all_in_time(self.in_state(&[State::New]), Order::Activate).await
        } else {
            self.set(Stage::Retired);
            all_in_time(self.in_state(&[State::Active, State::Frozen]), Order::Retire).await
        };
        let reply = reply(done.map(|()| String::new()));
        MorphCommit { reply, ..m }
    }

    async fn roll_back(&self, m: MorphRollback) -> MorphRollback {
        let done = if m.serves {
            self.set(Stage::Serves);
            self.lock().plan = None;
            // Who came meanwhile was not told to begin.
            for hook in self.in_state(&[State::New]) {
                hook.tell(Order::Activate);
            }
            // Also those that were being frozen when the daemon turned away: they are told after that.
            all_in_time(self.in_state(&[State::Active, State::Frozen]), Order::Thaw).await
        } else {
            self.lock().plan = None;
            all_in_time(self.in_state(&[State::New]), Order::Discard).await
        };
        let reply = reply(done.map(|()| String::new()));
        MorphRollback { reply, ..m }
    }
}
