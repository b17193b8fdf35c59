//! One workload's connection.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kmorph_state::wire::{
    LINE_LIMIT, NAME_LIMIT, Order, PIECE_LIMIT, Report, SECTION_LIMIT, Section, State, VERSION,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// A workload that could not begin is told again after this time, which doubles with every try.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest time until it is.
const AGAIN_LIMIT: Duration = Duration::from_secs(60);
/// Orders that may wait, and pieces that arrive: together they are a few times what is read from the daemon at once.
const QUEUE: usize = 32;
/// Orders that were said and not answered. Those of a round, two for each section and a few more, are said before anybody
/// takes a piece, and what is told after them, such as that there is room again, must not wait for the first answer.
const UNANSWERED: usize = 4 * SECTION_LIMIT;

/// Key of a window that is of no use any more. It is the key of none.
const OUTDATED: u64 = u64::MAX;

/// A piece of a section that a workload has exported.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Where in the section it belongs.
    pub offset: u64,
    /// Its bytes.
    pub content: Content,
}

/// Bytes of a piece.
#[derive(Clone, Debug)]
pub enum Content {
    /// They came along.
    Bytes(Bytes),
    /// They are in the window.
    Placed {
        /// Where.
        place: u64,
        /// How many.
        bytes: u32,
    },
}

/// An answer to come.
pub struct Answer {
    answer: oneshot::Receiver<Result<Report, String>>,
    lost: String,
}

impl Answer {
    /// Wait for it.
    pub async fn get(self) -> Result<Report, String> {
        self.answer.await.map_err(|_| self.lost)?
    }

    /// Wait for a digest.
    pub async fn digest(self) -> Result<Vec<u8>, String> {
        match self.get().await? {
            Report::Digest(value) => Ok(value),
            other => Err(format!("a digest was asked for, and {other:?} is the answer")),
        }
    }
}

type Reply = oneshot::Sender<Result<Report, String>>;

enum Job {
    /// Say it and give the answer; nobody may want that.
    Order(Order, Option<Reply>),
    /// Have a section exported.
    Export { order: Order, pieces: mpsc::Sender<Piece>, done: oneshot::Sender<Result<(), String>> },
    /// Give it a piece.
    Import { section: String, offset: u64, bytes: Bytes },
    /// Give it the window.
    Window { order: Order, window: Option<Arc<File>>, reply: Reply },
}

/// A workload that has introduced itself.
pub struct Hook {
    /// Its name.
    pub name: String,
    /// What it can export and import.
    pub sections: Vec<Section>,
    /// It can be throttled.
    pub throttles: bool,
    /// It knows what to do with a window.
    windows: bool,
    /// Key of the window it has; 0: none.
    window: AtomicU64,
    /// It was given pieces of state.
    given: AtomicBool,
    state: AtomicU8,
    /// Orders to begin or to go on that are not answered yet.
    beginning: AtomicU32,
    refused: Mutex<Refused>,
    jobs: mpsc::Sender<Job>,
    /// Orders nobody waits for: they never find the queue full.
    told: mpsc::UnboundedSender<Order>,
}

/// It was told to begin and could not.
#[derive(Default)]
struct Refused {
    times: u32,
    /// To be told again then.
    until: Option<Instant>,
}

const STATES: [State; 4] = [State::New, State::Active, State::Frozen, State::Retired];

impl Hook {
    /// What it is doing, as far as is known.
    pub fn state(&self) -> State {
        STATES.get(usize::from(self.state.load(Ordering::SeqCst))).copied().unwrap_or_default()
    }

    fn set_state(&self, state: State) {
        let index = STATES.iter().position(|s| *s == state).unwrap_or(0);
        self.state.store(u8::try_from(index).unwrap_or(0), Ordering::SeqCst);
    }

    /// Whether it serves, or was told to.
    pub fn serves_soon(&self) -> bool {
        self.state() == State::Active || self.beginning.load(Ordering::SeqCst) > 0
    }

    fn count(&self, order: &Order) {
        if begins(order) {
            self.beginning.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn refused(&self) -> MutexGuard<'_, Refused> {
        // Every change is one assignment, so a panic elsewhere left it whole.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is to be told to begin once more. It says so once a try.
    pub fn begins_again(&self) -> bool {
        let due = |until: &mut Instant| *until <= Instant::now();
        self.state() == State::New && self.refused().until.take_if(due).is_some()
    }

    fn begins(&self, began: bool) {
        let mut refused = self.refused();
        *refused = match began {
            true => Refused::default(),
            false => {
                let wait = AGAIN.saturating_mul(1 << refused.times.min(16)).min(AGAIN_LIMIT);
                Refused { times: refused.times.saturating_add(1), until: Some(Instant::now() + wait) }
            }
        };
    }

    /// Whether the connection is over.
    pub fn is_gone(&self) -> bool {
        self.jobs.is_closed()
    }

    fn lost(&self) -> String {
        format!("workload {}: its connection is lost", self.name)
    }

    /// Say it when what it was told before is done. Nobody waits for the answer.
    pub fn tell(&self, order: Order) {
        self.count(&order);
        // A connection that is over is noticed by whoever asks next.
        let _ = self.told.send(order);
    }

    /// What it was given for a morph that was broken off would be mixed with what comes: it forgets that.
    pub fn forgets(&self) {
        if self.given.swap(false, Ordering::SeqCst) {
            self.tell(Order::Discard);
        }
    }

    /// Say it after what was said before. The answer can be awaited when more was said.
    pub async fn say(&self, order: Order) -> Result<Answer, String> {
        let (reply, answer) = oneshot::channel();
        if matches!(order, Order::Take { .. }) {
            self.given.store(true, Ordering::SeqCst);
        }
        let room = self.jobs.reserve().await.map_err(|_| self.lost())?;
        self.count(&order);
        room.send(Job::Order(order, Some(reply)));
        Ok(Answer { answer, lost: self.lost() })
    }

    /// Have a section exported. The pieces come in order; when the receiver is dropped the rest is thrown away.
    pub async fn export(
        &self,
        section: &str,
        full: bool,
    ) -> Result<(mpsc::Receiver<Piece>, oneshot::Receiver<Result<(), String>>), String> {
        let (pieces, arriving) = mpsc::channel(16);
        let (done, ended) = oneshot::channel();
        let order = Order::Export { section: section.to_owned(), full };
        self.jobs.send(Job::Export { order, pieces, done }).await.map_err(|_| self.lost())?;
        Ok((arriving, ended))
    }

    /// Give it a piece of a section.
    pub async fn import(&self, section: &str, offset: u64, bytes: Bytes) -> Result<(), String> {
        self.given.store(true, Ordering::SeqCst);
        let job = Job::Import { section: section.to_owned(), offset, bytes };
        self.jobs.send(job).await.map_err(|_| self.lost())
    }

    /// Whether it needs no window of this key: it has it, or knows nothing of windows.
    pub fn has_window_of(&self, key: u64) -> bool {
        !self.windows || self.window.load(Ordering::SeqCst) == key
    }

    /// A window it may have is that of a morph, or a try, before this one: it needs another, whatever that one's key is.
    pub fn outdate_window(&self) {
        let outdated = |key: u64| (key != 0).then_some(OUTDATED);
        // It has none.
        let _ = self.window.fetch_update(Ordering::SeqCst, Ordering::SeqCst, outdated);
    }

    /// Whether it has a window.
    pub fn has_window(&self) -> bool {
        self.window.load(Ordering::SeqCst) != 0
    }

    /// Have it use this window: it writes `size` bytes from `from` on, and reads all of it. `None`: there is none any more.
    /// One that has this window already is not told, nor one that knows nothing of windows.
    pub async fn give_window(
        &self,
        window: Option<(u64, Arc<File>)>,
        from: u64,
        size: u64,
    ) -> Result<(), String> {
        let key = window.as_ref().map_or(0, |(key, _)| *key);
        if !self.windows || self.window.load(Ordering::SeqCst) == key {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        let order = Order::Window { from, size };
        let job = Job::Window { order, window: window.map(|(_, file)| file), reply };
        self.window.store(0, Ordering::SeqCst);
        self.jobs.send(job).await.map_err(|_| self.lost())?;
        Answer { answer, lost: self.lost() }.get().await?;
        self.window.store(key, Ordering::SeqCst);
        Ok(())
    }
}

type Reader = BufReader<OwnedReadHalf>;

/// What comes in from a workload that introduces itself.
pub struct Introduced {
    hook: Arc<Hook>,
    reader: Reader,
    writer: OwnedWriteHalf,
    jobs: mpsc::Receiver<Job>,
    told: mpsc::UnboundedReceiver<Order>,
}

async fn line(stream: &mut Reader) -> io::Result<String> {
    let mut line = Vec::new();
    let read = (&mut *stream).take(LINE_LIMIT as u64).read_until(b'\n', &mut line).await?;
    match line.last() {
        Some(b'\n') => String::from_utf8(line).map_err(io::Error::other),
        _ if read == LINE_LIMIT => Err(io::Error::other(format!("a line is longer than {LINE_LIMIT} bytes"))),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn report(stream: &mut Reader) -> io::Result<Report> {
    line(stream).await?.parse().map_err(io::Error::other)
}

/// Hear who it is and what it has.
pub async fn introduce(stream: UnixStream) -> io::Result<Introduced> {
    let (reader, writer) = stream.into_split();
    let mut stream = BufReader::with_capacity(PIECE_LIMIT as usize, reader);
    let wrong = |text: String| Err(io::Error::other(text));
    let (name, state, throttles, windows) = match report(&mut stream).await? {
        Report::Hello { version: VERSION, name, state, throttles, windows } => {
            (name, state, throttles, windows)
        }
        Report::Hello { version, .. } => {
            return wrong(format!("it speaks version {version}, this agent speaks version {VERSION}"));
        }
        other => return wrong(format!("it says {other:?} before hello")),
    };
    let mut sections: Vec<Section> = vec![];
    loop {
        match report(&mut stream).await? {
            Report::Ready => break,
            Report::Section(s) if sections.iter().any(|t| t.name == s.name) => {
                return wrong(format!("workload {name} names section {} twice", s.name));
            }
            Report::Section(_) if sections.len() >= SECTION_LIMIT => {
                return wrong(format!("workload {name} has more than {SECTION_LIMIT} sections"));
            }
            Report::Section(section) => sections.push(section),
            other => return wrong(format!("workload {name} says {other:?} where it names its sections")),
        }
    }
    let (jobs, waiting) = mpsc::channel(QUEUE);
    let (told, hearing) = mpsc::unbounded_channel();
    debug_assert!(name.len() <= NAME_LIMIT);
    let hook = Hook {
        name,
        sections,
        throttles,
        windows,
        window: AtomicU64::new(0),
        given: AtomicBool::new(false),
        state: AtomicU8::new(0),
        beginning: AtomicU32::new(0),
        refused: Mutex::default(),
        jobs,
        told,
    };
    hook.set_state(state);
    Ok(Introduced { hook: Arc::new(hook), reader: stream, writer, jobs: waiting, told: hearing })
}

/// Whether a workload that does this serves then.
fn begins(order: &Order) -> bool {
    matches!(order, Order::Activate | Order::Thaw)
}

/// An answer that is owed.
enum Owed {
    Order(Order, Option<Reply>),
    Export(Order, mpsc::Sender<Piece>, oneshot::Sender<Result<(), String>>),
}

impl Introduced {
    /// The workload.
    pub fn hook(&self) -> Arc<Hook> {
        self.hook.clone()
    }

    /// Talk to it until it ends. Orders are said as they come, and answered in order; it says nothing by itself.
    pub async fn run(self) -> io::Result<()> {
        let Introduced { hook, reader, writer, jobs, told } = self;
        let (owed, owing) = mpsc::channel(UNANSWERED);
        tokio::select! {
            ended = say(writer, jobs, told, owed) => ended,
            ended = hear(&hook, reader, owing) => ended,
        }
    }
}

/// Lines that nobody waits for at the workload's end are sent together, up to so many bytes.
const TOGETHER: usize = 16 << 10;

async fn say(
    mut writer: OwnedWriteHalf,
    mut jobs: mpsc::Receiver<Job>,
    mut told: mpsc::UnboundedReceiver<Order>,
    owed: mpsc::Sender<Owed>,
) -> io::Result<()> {
    let mut out = Vec::new();
    loop {
        let now = told.try_recv().map(|order| Job::Order(order, None)).or_else(|_| jobs.try_recv());
        let job = match now {
            Ok(job) if out.len() < TOGETHER => job,
            Ok(job) => {
                send(&mut writer, &mut out).await?;
                job
            }
            Err(_) => {
                send(&mut writer, &mut out).await?;
                tokio::select! {
                    biased;
                    Some(order) = told.recv() => Job::Order(order, None),
                    Some(job) = jobs.recv() => job,
                    // Nobody can say anything any more.
                    else => return Ok(()),
                }
            }
        };
        let mut line = |order: &Order| out.extend_from_slice(format!("{order}\n").as_bytes());
        let mut along = None;
        let owes = match job {
            Job::Import { section, offset, bytes } => {
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                line(&Order::Import { section, offset, bytes: length });
                send(&mut writer, &mut out).await?;
                // They need no copy.
                writer.write_all(&bytes).await?;
                continue;
            }
            Job::Order(order @ Order::Freed { .. }, _) => {
                line(&order);
                continue;
            }
            Job::Order(order, reply) => {
                line(&order);
                Owed::Order(order, reply)
            }
            Job::Window { order, window, reply } => {
                send(&mut writer, &mut out).await?;
                out.extend_from_slice(format!("{order}\n").as_bytes());
                along = window;
                Owed::Order(order, Some(reply))
            }
            Job::Export { order, pieces, done } => {
                line(&order);
                Owed::Export(order, pieces, done)
            }
        };
        let owes = match owed.try_send(owes) {
            Err(mpsc::error::TrySendError::Full(owes)) => Some(owes),
            Err(mpsc::error::TrySendError::Closed(_)) => return Ok(()),
            Ok(()) => None,
        };
        if let Some(owes) = owes {
            // What is to be answered first may not have been said yet.
            if along.is_none() {
                send(&mut writer, &mut out).await?;
            }
            if owed.send(owes).await.is_err() {
                return Ok(());
            }
        }
        if let Some(file) = along {
            let sent = send_along(&writer, &out, &file).await?;
            out.drain(..sent.min(out.len()));
        }
    }
}

async fn send(writer: &mut OwnedWriteHalf, out: &mut Vec<u8>) -> io::Result<()> {
    if !out.is_empty() {
        writer.write_all(out).await?;
        out.clear();
    }
    Ok(())
}

/// Send a descriptor with bytes; how many of them went.
async fn send_along(writer: &OwnedWriteHalf, bytes: &[u8], file: &File) -> io::Result<usize> {
    let stream: &UnixStream = writer.as_ref();
    let send = || {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

async fn hear(hook: &Hook, mut reader: Reader, mut owing: mpsc::Receiver<Owed>) -> io::Result<()> {
    loop {
        let owed = tokio::select! {
            biased;
            owed = owing.recv() => owed,
            more = reader.fill_buf() => {
                if more?.is_empty() {
                    return Ok(());
                }
                // It answers what was said this moment, or says something it was not asked.
                owing.try_recv().ok()
            }
        };
        match owed {
            Some(Owed::Order(order, reply)) => answered(hook, &mut reader, order, reply).await?,
            Some(Owed::Export(order, pieces, done)) => {
                exported(hook, &mut reader, order, pieces, done).await?;
            }
            None => return Err(io::Error::other("it says something it was not asked")),
        }
    }
}

async fn answered(
    hook: &Hook,
    reader: &mut Reader,
    order: Order,
    reply: Option<oneshot::Sender<Result<Report, String>>>,
) -> io::Result<()> {
    let report = report(reader).await?;
    let becomes = match order {
        Order::Activate | Order::Thaw => Some(State::Active),
        Order::Freeze => Some(State::Frozen),
        Order::Retire => Some(State::Retired),
        Order::Discard | Order::Throttle { .. } | Order::Export { .. } | Order::Digest { .. } => None,
        Order::Import { .. } | Order::Imported { .. } => None,
        Order::Window { .. } | Order::Take { .. } | Order::Freed { .. } => None,
    };
    // It has none from here on: a morph has ended, or what it has is taken away. One that it gets is noted by who gives it.
    let ends = matches!(order, Order::Activate | Order::Thaw | Order::Retire | Order::Discard);
    if ends || matches!(order, Order::Window { .. }) {
        hook.window.store(0, Ordering::SeqCst);
    }
    let name = &hook.name;
    let answer = match report {
        Report::Error(why) => Err(format!("workload {name}, {order}: {why}")),
        Report::Digest(_) if matches!(order, Order::Digest { .. }) => Ok(report),
        Report::Ok if !matches!(order, Order::Digest { .. }) => Ok(report),
        other => return Err(io::Error::other(format!("it answers {order} with {other:?}"))),
    };
    if let (Ok(_), Some(state)) = (&answer, becomes) {
        hook.set_state(state);
    }
    if order == Order::Activate {
        hook.begins(answer.is_ok());
    }
    if begins(&order) {
        hook.beginning.fetch_sub(1, Ordering::SeqCst);
    }
    match (reply, answer) {
        // Who asked may have given up waiting.
        (Some(reply), answer) => drop(reply.send(answer)),
        (None, Err(why)) => crate::kmsg::log(crate::kmsg::ERROR, &why),
        (None, Ok(_)) => {}
    }
    Ok(())
}

async fn exported(
    hook: &Hook,
    reader: &mut Reader,
    order: Order,
    pieces: mpsc::Sender<Piece>,
    done: oneshot::Sender<Result<(), String>>,
) -> io::Result<()> {
    let mut wanted = true;
    loop {
        tokio::select! {
            biased;
            more = reader.fill_buf() => {
                more?;
            }
            // A workload that waits for room would wait for ever: nobody takes what it has put there.
            () = pieces.closed(), if wanted => {
                wanted = false;
                hook.tell(Order::Window { from: 0, size: 0 });
                continue;
            }
        }
        let ended = match report(reader).await? {
            Report::Piece { offset, bytes } => {
                let mut piece = BytesMut::with_capacity(bytes as usize);
                while piece.len() < bytes as usize {
                    let more = u64::from(bytes) - piece.len() as u64;
                    if (&mut *reader).take(more).read_buf(&mut piece).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                // When nobody wants the rest it is read all the same: the next answer comes after it.
                let _ = pieces.send(Piece { offset, content: Content::Bytes(piece.freeze()) }).await;
                continue;
            }
            Report::Placed { offset, bytes, place } if hook.windows => {
                let _ = pieces.send(Piece { offset, content: Content::Placed { place, bytes } }).await;
                continue;
            }
            Report::Done => Ok(()),
            Report::Error(why) => Err(format!("workload {}, {order}: {why}", hook.name)),
            other => return Err(io::Error::other(format!("it answers {order} with {other:?}"))),
        };
        drop(pieces);
        // Who asked may have given up waiting.
        let _ = done.send(ended);
        return Ok(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_workload_hears_of_room_for_pieces_when_as_much_as_possible_was_asked_of_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut ours = BufReader::new(ours);
        let section = |n: usize| format!("section name=s{n} version=1 size=1 compatible=c\n");
        let sections: String = (0..SECTION_LIMIT).map(section).collect();
        let hello = format!("hello version=1 name=w state=active knows=window\n{sections}ready\n");
        ours.write_all(hello.as_bytes()).await.unwrap();
        let introduced = introduce(theirs).await.unwrap();
        let hook = introduced.hook();
        tokio::spawn(introduced.run());
        let said = async {
            hook.say(Order::Freeze).await.unwrap();
            let (mut exports, mut digests) = (vec![], vec![]);
            for section in &hook.sections {
                exports.push(hook.export(&section.name, true).await.unwrap());
            }
            for section in &hook.sections {
                let section = section.name.clone();
                digests.push(hook.say(Order::Digest { section }).await.unwrap());
            }
            // The other kernel has taken the first piece.
            hook.tell(Order::Freed { place: 0 });
            let mut heard = String::new();
            while !heard.ends_with("freed place=0\n") {
                assert!(ours.read_line(&mut heard).await.unwrap() > 0);
            }
            let answered = format!(
                "ok\n{}{}",
                "done\n".repeat(SECTION_LIMIT),
                "digest value=00\n".repeat(SECTION_LIMIT)
            );
            ours.write_all(answered.as_bytes()).await.unwrap();
            for (_, ended) in exports {
                assert_eq!(ended.await.unwrap(), Ok(()));
            }
            for digest in digests {
                assert_eq!(digest.digest().await, Ok(vec![0]));
            }
        };
        tokio::time::timeout(Duration::from_secs(20), said).await.unwrap();
    }
}
