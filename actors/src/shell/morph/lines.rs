//! The connections a morph's state goes over: one to the agent of each kernel. What the old one gives is passed on to
//! the new one as it comes.

use std::collections::BTreeSet;
use std::time::Duration;

use kmorph_platform::Stream;
use kmp::io::Connection;
use kmp::message::{
    DIRECT, ErrorCode, Hello, Message, MorphCommit, MorphNegotiate, MorphPrepare, MorphRollback,
    MorphTransferState, MorphValidate, Reply, Role, Section, SectionDigest,
};
use kmp::session::Event;
use tokio::time::{Instant, timeout};

use super::live::{Live, Round};
use crate::core::route::Target;
use crate::shell::connection::boot_ns;
use crate::shell::instance::{Env, Instance};

/// Longest time for connecting and the HELLO exchange, each.
const OPEN_LIMIT: Duration = Duration::from_secs(2);

/// Bytes that may wait for the new side before more is read from the old one.
const BACKLOG: usize = 256 << 10;

/// What is wrong with a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The connection cannot be used (any more): nobody knows what the agent did last.
    Lost(String),
    /// The agent says no.
    Refused(String),
    /// The new kernel has taken over, and its workload does not serve.
    Stuck(String),
    /// The agent does not know such messages.
    Unsupported,
}

impl Trouble {
    pub(super) fn text(self) -> String {
        match self {
            Trouble::Lost(why) | Trouble::Refused(why) | Trouble::Stuck(why) => why,
            Trouble::Unsupported => "the agent knows nothing of morphs".into(),
        }
    }
}

/// A bulk connection to one agent.
pub(super) struct Line {
    name: String,
    instance: u16,
    connection: Connection<Box<dyn Stream>>,
    sequence: u32,
    /// Longest time without a word.
    silence: Option<Duration>,
}

impl Line {
    /// Connect to the agent of the kernel this instance has now.
    pub(super) async fn open(env: &Env, instance: &Instance) -> Result<Line, Trouble> {
        let (target, name) = {
            let r = instance.record();
            (Target { id: r.spec.id, incarnation: r.incarnation }, r.spec.name.clone())
        };
        let lost = |why: String| Trouble::Lost(format!("{name}: {why}"));
        let connect = env.platform.connect(target.id, target.incarnation, kmp::PORT);
        let stream = timeout(OPEN_LIMIT, connect)
            .await
            .map_err(|_| lost(format!("no connection within {OPEN_LIMIT:?}")))?
            .map_err(|e| lost(e.to_string()))?;
        let wanted = Hello {
            instance: target.id.0,
            incarnation: target.incarnation,
            role: Role::Bulk,
            ..Hello::default()
        };
        let opened = Connection::connect(stream, wanted, boot_ns, OPEN_LIMIT).await;
        let (connection, _) = opened.map_err(|e| lost(e.to_string()))?;
        Ok(Line { name, instance: target.id.0, connection, sequence: 0, silence: None })
    }

    fn lost(&self, why: impl std::fmt::Display) -> Trouble {
        Trouble::Lost(format!("{}: {why}", self.name))
    }

    fn send(&mut self, message: &Message) -> Result<u32, Trouble> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let (sequence, queued) = (self.sequence, self.connection.queue(self.sequence, message));
        queued.map(|()| sequence).map_err(|e| self.lost(e))
    }

    /// Write what waits.
    async fn flush(&mut self) -> Result<(), Trouble> {
        let flushed = self.connection.flush();
        let flushed = match self.silence {
            Some(limit) => timeout(limit, flushed).await,
            None => Ok(flushed.await),
        };
        match flushed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(self.lost(e)),
            Err(_) => Err(self.lost("it takes nothing more")),
        }
    }

    /// What its sections have come to.
    async fn digests(&mut self, request: u32) -> Result<Vec<SectionDigest>, Trouble> {
        match self.next(request).await? {
            Message::MorphValidate(m) => Ok(m.digests),
            other => Err(self.out_of_place(&other)),
        }
    }

    /// The next message about this request.
    async fn next(&mut self, request: u32) -> Result<Message, Trouble> {
        loop {
            let next = self.connection.next();
            let event = match self.silence {
                Some(limit) => match timeout(limit, next).await {
                    Ok(event) => event,
                    Err(_) => return Err(self.lost(format!("not a word within {limit:?}"))),
                },
                None => next.await,
            };
            match event {
                Event::Message { header, message: Message::Error(e) } if header.sequence == request => {
                    return Err(match e.code {
                        ErrorCode::Unsupported => Trouble::Unsupported,
                        _ => Trouble::Refused(format!("{}: {}", self.name, e.message)),
                    });
                }
                Event::Message { header, message } if header.sequence == request => return Ok(message),
                Event::Unreadable { error, .. } => return Err(self.lost(error)),
                Event::Closed { detail, .. } => return Err(self.lost(detail)),
                // Of a request before this one, or about nothing that was asked.
                Event::Message { .. } | Event::Open { .. } => {}
            }
        }
    }

    fn judge(&self, reply: Option<Reply>) -> Result<(), Trouble> {
        match reply {
            Some(Reply { ok: true, .. }) => Ok(()),
            Some(Reply { detail, .. }) => Err(Trouble::Refused(format!("{}: {detail}", self.name))),
            None => Err(self.lost("an answer that says neither yes nor no")),
        }
    }

    fn out_of_place(&self, message: &Message) -> Trouble {
        self.lost(format!("{} is no answer to what was asked", message.kind()))
    }

    /// The new kernel serves, or the old one never again.
    pub(super) async fn commit(&mut self, morph: u64, serves: bool) -> Result<(), Trouble> {
        let request = self.send(&MorphCommit { morph, serves, reply: None }.into())?;
        match self.next(request).await? {
            Message::MorphCommit(m) => self.judge(m.reply),
            other => Err(self.out_of_place(&other)),
        }
    }

    /// The old kernel goes on, and the new one forgets.
    pub(super) async fn roll_back(&mut self, morph: u64, reason: &str, serves: bool) -> Result<(), Trouble> {
        let rollback = MorphRollback { morph, reason: reason.to_owned(), serves, ..Default::default() };
        let request = self.send(&rollback.into())?;
        match self.next(request).await? {
            Message::MorphRollback(m) => self.judge(m.reply),
            other => Err(self.out_of_place(&other)),
        }
    }

    /// The new kernel forgets, unless it has taken over: whether it has. One that has and does not serve is an error.
    pub(super) async fn withdraw(&mut self, morph: u64, reason: &str) -> Result<bool, Trouble> {
        let rollback = MorphRollback { morph, reason: reason.to_owned(), ..Default::default() };
        let request = self.send(&rollback.into())?;
        match self.next(request).await? {
            Message::MorphRollback(m) if m.took_over => self.judge(m.reply).map(|()| true),
            Message::MorphRollback(m) => self.judge(m.reply).map(|()| false),
            other => Err(self.out_of_place(&other)),
        }
    }

    async fn prepare(&mut self, morph: u64, from: &str, to: &str) -> Result<(), Trouble> {
        let prepare =
            MorphPrepare { morph, from_release: from.to_owned(), to_release: to.to_owned(), reply: None };
        let request = self.send(&prepare.into())?;
        match self.next(request).await? {
            Message::MorphPrepare(m) => self.judge(m.reply),
            other => Err(self.out_of_place(&other)),
        }
    }

    async fn negotiate(
        &mut self,
        morph: u64,
        sections: Vec<Section>,
        wait: Duration,
        window: u64,
    ) -> Result<MorphNegotiate, Trouble> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let capabilities = vec![DIRECT.to_owned()];
        let ask = MorphNegotiate { morph, capabilities, sections, wait_ms, window, ..Default::default() };
        let request = self.send(&ask.into())?;
        match self.next(request).await? {
            Message::MorphNegotiate(mut m) => self.judge(m.reply.take()).map(|()| m),
            other => Err(self.out_of_place(&other)),
        }
    }
}

/// What was copied with the workload standing still, and how long everything took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Last {
    pub(super) bytes: u64,
    /// Until the workload stood still.
    pub(super) froze: Duration,
    /// Until the last changes were in place, without that.
    pub(super) copied: Duration,
    /// Until they were found to be right.
    pub(super) checked: Duration,
    /// The new kernel has taken over.
    pub(super) taken: bool,
}

/// What a round came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Copied {
    pub(super) bytes: u64,
    /// Until the workload stood still.
    froze: Duration,
    /// Share of its pace, in percent, by which the workload is held back.
    pub(super) throttled: u8,
    /// Why that is less than it should be.
    pub(super) unheld: String,
    /// Bytes that went through memory both kernels have.
    pub(super) shared: u64,
    /// The others, as they were sent, which may be compressed.
    pub(super) sent: u64,
    /// They went from kernel to kernel.
    direct: bool,
}

/// What a round is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    /// It goes ahead of the last one, while the workload serves.
    Copy,
    /// All that is done in [`Aim::HandOver`] is done once before.
    Rehearse,
    /// The workload stands still; kmorphd decides.
    Last,
    /// The workload stands still; the new kernel takes over when everything is right.
    HandOver,
}

impl Aim {
    fn freezes(self) -> bool {
        matches!(self, Aim::Last | Aim::HandOver)
    }

    fn takes_over(self) -> bool {
        matches!(self, Aim::Rehearse | Aim::HandOver)
    }
}

/// What both kernels were asked of a round, to be answered.
struct Told {
    old: u32,
    new: u32,
}

/// The connections to both kernels.
pub(super) struct Lines {
    pub(super) old: Line,
    pub(super) new: Line,
    morph: u64,
    /// What is handed over; empty: nothing.
    pub(super) sections: Vec<Section>,
    /// Bytes that were copied so far.
    pub(super) copied: u64,
    /// Rounds so far.
    pub(super) rounds: u32,
    /// The workload was told to hold back.
    throttled: bool,
    /// The new side takes state from the old one directly when that says this. 0: it does not.
    token: u64,
    /// The round before this one went from kernel to kernel.
    direct: bool,
    /// Key of the memory pieces are put into; 0: none.
    window: u64,
    /// Both agents know how the new kernel takes over by itself.
    hands_over: bool,
    live: Live,
}

impl Lines {
    /// Connect to both.
    pub(super) async fn open(
        env: &Env,
        old: &Instance,
        new: &Instance,
        morph: u64,
        live: Live,
    ) -> Result<Lines, Trouble> {
        let (mut old_line, mut new_line) = (Line::open(env, old).await?, Line::open(env, new).await?);
        let (from, to) = (old.record().release.clone(), new.record().release.clone());
        old_line.prepare(morph, &from, &to).await?;
        new_line.prepare(morph, &from, &to).await?;
        Ok(Lines {
            old: old_line,
            new: new_line,
            morph,
            sections: vec![],
            copied: 0,
            rounds: 0,
            throttled: false,
            token: 0,
            direct: false,
            window: 0,
            hands_over: false,
            live,
        })
    }

    /// How many workloads hand something over.
    pub(super) fn workloads(&self) -> usize {
        let names = self.sections.iter().filter_map(|s| s.name.split('/').next());
        names.collect::<BTreeSet<_>>().len()
    }

    /// Ask the old kernel what it has.
    pub(super) async fn offers(&mut self) -> Result<(), Trouble> {
        let offered = self.old.negotiate(self.morph, vec![], Duration::ZERO, 0).await?;
        (self.sections, self.hands_over) = (offered.sections, offered.takes_over);
        Ok(())
    }

    /// Have the new kernel agree to take it, with this window, or 0 for none. Its workloads may need so long to start.
    pub(super) async fn agree(&mut self, wait: Duration, window: u64) -> Result<(), Trouble> {
        let agreed = self.new.negotiate(self.morph, self.sections.clone(), wait, window).await?;
        (self.token, self.window) = (agreed.token, if agreed.window == window { window } else { 0 });
        self.hands_over &= agreed.takes_over;
        Ok(())
    }

    /// Copy: everything in round 0, what changed in later ones. From now on the workload is held back by so many
    /// percent of its pace.
    pub(super) async fn round(&mut self, round: u32, throttle: u8) -> Result<Copied, Trouble> {
        // An agent that never was told of this need not know it.
        let changes = throttle > 0 || self.throttled;
        self.throttled = throttle > 0;
        self.copy(round, changes.then_some(throttle)).await
    }

    async fn copy(&mut self, round: u32, throttle: Option<u8>) -> Result<Copied, Trouble> {
        if self.sections.is_empty() {
            return Ok(Copied::default());
        }
        let request = self.ask_for(round, Aim::Copy, throttle)?;
        let seen = self.live.begin();
        let mut copied = self.pass_on(request, &seen, false).await?;
        self.placed(round, copied.direct).await?;
        if copied.throttled == 0 && copied.unheld.is_empty() {
            copied.unheld = format!("{}: its agent is of an earlier release", self.old.name);
        }
        Ok(copied)
    }

    /// Do once what will be done with the workload standing still, but without that: whoever cannot do it, or needs
    /// longer for the first time, does so now.
    pub(super) async fn rehearse(&mut self, hands_over: bool) -> Result<(), Trouble> {
        if hands_over {
            let told = self.tell_both(self.rounds, Aim::Rehearse).await?;
            self.directly(&told).await?;
            return self.see_placed(told.new).await;
        }
        self.copy(self.rounds, None).await?;
        for line in [&mut self.old, &mut self.new] {
            let ask = MorphValidate { morph: self.morph, digests: vec![], reply: None };
            let request = line.send(&ask.into())?;
            match line.next(request).await? {
                Message::MorphValidate(m) => line.judge(m.reply)?,
                other => return Err(line.out_of_place(&other)),
            }
        }
        Ok(())
    }

    /// From now on neither side may be silent for longer than this.
    pub(super) fn hurry(&mut self, silence: Duration) {
        self.old.silence = Some(silence);
        self.new.silence = Some(silence);
    }

    /// Have a round go from kernel to kernel without another word from here: what comes is put in place as it comes.
    async fn tell_both(&mut self, round: u32, aim: Aim) -> Result<Told, Trouble> {
        let old = self.ask_for(round, aim, None)?;
        self.old.flush().await?;
        let new = self.end_of(round, true, aim)?;
        self.new.flush().await?;
        Ok(Told { old, new })
    }

    /// See how the old kernel ended that round. The new one waits in vain when it did not go there.
    async fn directly(&mut self, told: &Told) -> Result<Copied, Trouble> {
        let seen = self.live.begin();
        let copied = self.pass_on(told.old, &seen, true).await?;
        if !copied.direct {
            return Err(self.old.lost("its connection to the new kernel is lost"));
        }
        Ok(copied)
    }

    /// Whether the new kernel can take over by itself: all that it needs comes from the old one.
    pub(super) fn can_hand_over(&self) -> bool {
        self.hands_over && self.direct
    }

    /// Have the workload stand still, copy what is left, and have the new kernel take over when that is right.
    pub(super) async fn hand_over(&mut self, round: u32) -> Result<Last, Trouble> {
        let began = Instant::now();
        let told = self.tell_both(round, Aim::HandOver).await?;
        let Copied { bytes, froze, .. } = self.directly(&told).await?;
        let copied = began.elapsed().saturating_sub(froze);
        match self.new.next(told.new).await? {
            Message::MorphTransferState(m) if m.took_over => match self.new.judge(m.reply) {
                Ok(()) => Ok(Last { bytes, froze, copied, taken: true, ..Last::default() }),
                Err(trouble) => Err(Trouble::Stuck(trouble.text())),
            },
            Message::MorphTransferState(m) => {
                self.new.judge(m.reply)?;
                Err(self.new.lost("it has everything, and has not taken over"))
            }
            other => Err(self.new.out_of_place(&other)),
        }
    }

    /// Have the workload stand still, copy what is left, and see that it is right.
    pub(super) async fn last(&mut self, round: u32) -> Result<Last, Trouble> {
        if self.sections.is_empty() {
            return Ok(Last::default());
        }
        let began = Instant::now();
        let (request, asked, Copied { bytes, froze, .. }) = if self.direct {
            let told = self.tell_both(round, Aim::Last).await?;
            let copied = self.directly(&told).await?;
            (told.old, told.new, copied)
        } else {
            let request = self.ask_for(round, Aim::Last, None)?;
            let seen = self.live.begin();
            let copied = self.pass_on(request, &seen, false).await?;
            (request, self.end_of(round, copied.direct, Aim::Last)?, copied)
        };
        let sent = self.old.digests(request).await?;
        self.see_placed(asked).await?;
        let copied = began.elapsed().saturating_sub(froze);
        let came = self.new.digests(asked).await?;
        self.compare(&sent, &came)?;
        let checked = began.elapsed().saturating_sub(froze + copied);
        Ok(Last { bytes, froze, copied, checked, taken: false })
    }

    /// Whether everything arrived as it was sent.
    fn compare(&self, sent: &[SectionDigest], came: &[SectionDigest]) -> Result<(), Trouble> {
        for (index, section) in self.sections.iter().enumerate() {
            if sent.get(index).is_none_or(|sent| came.get(index) != Some(sent)) {
                let text = format!("section {} differs from what was sent", section.name);
                return Err(Trouble::Refused(format!("{}: {text}", self.new.name)));
            }
        }
        Ok(())
    }

    fn ask_for(&mut self, round: u32, aim: Aim, throttle: Option<u8>) -> Result<u32, Trouble> {
        self.rounds = self.rounds.max(round.saturating_add(1));
        let (morph, token) = (self.morph, self.token);
        let (peer, window) = if token == 0 { (0, 0) } else { (self.new.instance, self.window) };
        let (freeze, takes_over) = (aim.freezes(), aim.takes_over());
        let to = MorphTransferState { peer, token, window, ..Default::default() };
        let ask = MorphTransferState { morph, round, freeze, throttle, takes_over, ..to };
        self.old.send(&ask.into())
    }

    /// Give the new side what the old one sends, until that says how it ended. `ahead`: it has been told already that it comes
    /// from kernel to kernel.
    async fn pass_on(&mut self, request: u32, seen: &Round, ahead: bool) -> Result<Copied, Trouble> {
        let mut bytes = 0;
        loop {
            match self.old.next(request).await? {
                Message::MorphTransferState(m) if m.last => {
                    let unheld = m.reply.as_ref().map(|r| r.detail.clone()).unwrap_or_default();
                    self.old.judge(m.reply)?;
                    let direct = m.direct;
                    self.direct = direct;
                    let sent = if direct { m.sent } else { bytes };
                    bytes += m.bytes;
                    self.copied += bytes;
                    let (froze, throttled) = (Duration::from_nanos(m.froze_ns), m.throttle.unwrap_or(0));
                    return Ok(Copied { bytes, froze, throttled, unheld, shared: m.shared, sent, direct });
                }
                // It goes to the other kernel by itself.
                Message::MorphTransferState(m) if m.data.0.is_empty() => seen.copied(m.bytes),
                // Who takes it waits for what comes directly.
                Message::MorphTransferState(_) if ahead => {
                    return Err(self.old.lost("its connection to the new kernel is lost"));
                }
                Message::MorphTransferState(m) => {
                    bytes += m.data.0.len() as u64;
                    seen.copied(bytes);
                    self.new.send(&m.into())?;
                    // What waits is written while more is read; no more waits than the new side takes.
                    if self.new.connection.backlog() < BACKLOG {
                        continue;
                    }
                    self.new.flush().await?;
                }
                other => return Err(self.old.out_of_place(&other)),
            }
        }
    }

    fn end_of(&mut self, round: u32, direct: bool, aim: Aim) -> Result<u32, Trouble> {
        let (morph, last) = (self.morph, true);
        let (freeze, takes_over) = (aim.freezes(), aim.takes_over());
        let end = MorphTransferState { morph, round, last, direct, freeze, takes_over, ..Default::default() };
        self.new.send(&end.into())
    }

    async fn see_placed(&mut self, request: u32) -> Result<(), Trouble> {
        match self.new.next(request).await? {
            Message::MorphTransferState(m) => self.new.judge(m.reply),
            other => Err(self.new.out_of_place(&other)),
        }
    }

    async fn placed(&mut self, round: u32, direct: bool) -> Result<(), Trouble> {
        let request = self.end_of(round, direct, Aim::Copy)?;
        self.see_placed(request).await
    }
}
