//! What the kernel that has the state gives in a round: to the other kernel, or to kmorphd.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kmorph_state::wire::{Order, THROTTLE_LIMIT};
use kmp::io::Connection;
use kmp::message::{Blob, Message, MorphTransferState, MorphValidate, SectionDigest};
use kmp::session::Event;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::direct::Out;
use super::hook::{Answer, Content, Hook, Piece};
use super::serve::{ANSWER_LIMIT, Outcome, Over, all, all_digests, ask_digests, reply, say_all};
use super::{Broker, Plan, Stage};
use crate::kmsg;

/// Bytes that may wait to be written before more is read from a workload.
const BACKLOG: usize = 256 << 10;
/// The daemon hears so often of pieces that do not come through it.
const PROGRESS: Duration = Duration::from_millis(200);

/// Answer with a round of pieces.
pub(super) async fn export<S: AsyncRead + AsyncWrite + Unpin>(
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
        let digests = if freeze || m.takes_over { ask_digests(&plan).await? } else { vec![] };
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
        // Of what is not whole the other kernel gets no end, and nothing more.
        if m.takes_over && outcome.is_err() {
            break;
        }
        let of = MorphTransferState { morph, round, section, ..Default::default() };
        let exported = match &mut out {
            Some(out) => pass_directly(c, sequence, out, of, pieces, ended).await?,
            None => pass_on(c, sequence, of, pieces, ended).await?,
        };
        outcome = outcome.and(exported);
    }
    let (mut direct, mut bytes, mut shared, mut sent) = (false, 0, 0, 0);
    let mut digests = Box::pin(all_digests(digests));
    let mut made = None;
    if let Some(mut out) = out.filter(|_| outcome.is_ok() || !m.takes_over) {
        let ended = async {
            out.end(round).await.map_err(lost)?;
            if m.takes_over {
                made = Some(hand_over(&mut out, &mut digests).await?);
            }
            out.flush().await.map_err(lost)
        };
        outcome = outcome.and(until_closed(c, ended).await?);
        (direct, bytes, shared, sent) = (true, out.bytes, out.shared, out.sent);
        *broker.out.lock().await = Some(out).filter(|_| outcome.is_ok());
    }
    let made = match (made, &outcome) {
        (Some(made), _) => Ok(made),
        (None, Ok(())) => until_closed(c, digests).await?,
        // They may be what is missing.
        (None, Err(_)) => Ok(vec![]),
    };
    match outcome.and(made) {
        Err(why) => send(c, &end(Err(why), froze_ns)),
        Ok(digests) => {
            let end =
                MorphTransferState { throttle, direct, bytes, shared, sent, ..ended(Ok(held), froze_ns) };
            send(c, &end.into())?;
            if freeze && !m.takes_over {
                send(c, &MorphValidate { morph, digests, reply: None }.into())?;
            }
            Ok(())
        }
    }
}

/// Give the other kernel the digests. It makes its own meanwhile, unless these are there already.
async fn hand_over<D>(out: &mut Out, digests: &mut D) -> Result<Vec<SectionDigest>, String>
where
    D: Future<Output = Result<Vec<SectionDigest>, String>> + Unpin,
{
    let made = tokio::select! {
        biased;
        made = &mut *digests => made,
        flushed = out.flush() => {
            flushed.map_err(lost)?;
            digests.await
        }
    }?;
    for digest in &made {
        out.digest(digest.section, &digest.digest.0).await.map_err(lost)?;
    }
    Ok(made)
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
            match pieces.try_recv() {
                Ok(piece) => return Ok(Some(piece)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                // The other kernel takes what there is while the next one is made.
                Err(TryRecvError::Empty) => out.flush().await.map_err(lost)?,
            }
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
        let sent = async {
            match &content {
                Content::Bytes(data) => out.piece(of.section, offset, data).await,
                Content::Placed { place, bytes } => out.placed(of.section, offset, *bytes, *place).await,
            }
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

impl Broker {
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

    /// Have everybody stand still whose state goes. One that came too late for that would begin anew.
    async fn freeze(&self, plan: &Plan) -> Result<Vec<Answer>, String> {
        let left = |h: &Arc<Hook>| {
            h.serves_soon() && !h.sections.is_empty() && !plan.sections.iter().any(|(p, _)| Arc::ptr_eq(p, h))
        };
        if let Some(hook) = self.hooks().into_iter().find(left) {
            return Err(format!(
                "workload {} came when it was agreed on what is handed over: its state would be lost",
                hook.name
            ));
        }
        {
            let mut inner = self.lock();
            (inner.stage, inner.goes_on) = (Stage::Frozen, false);
        }
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
}
