//! A service that answers requests out of one piece of memory, and takes both its memory and its clients along.

use std::io::{self, BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_128;

use crate::files::Files;
use crate::hook::{ExportError, Workload};
use crate::memory::{self, Memory};
use crate::pace::{Pace, now};
use crate::piece::{Piece, Sink, length};
use crate::session::{
    CONFIRM, FRAME_LIMIT, Greeting, HEAD, Head, LINE_LIMIT, Session, Table, WINDOW, Welcome,
};
use crate::wire::{PIECE_LIMIT, Section, State};

/// Name of the section with the memory.
const MEMORY: &str = "memory";
/// Name of the section with the sessions.
const SESSIONS: &str = "sessions";
/// Name of the section with the files.
const FILES: &str = "files";
/// Most bytes the table of sessions may have when it is handed over.
const TABLE_LIMIT: u64 = 1 << 30;

/// What a service does.
pub trait App: Send + 'static {
    /// Kind and version of what is in the memory.
    fn layout(&self) -> (&'static str, u32);

    /// Take whole requests off the front of `input`, change the memory, append the answers to `answers`. Returns how
    /// many bytes were taken; the others come again, with more behind them. Answers to nothing are dropped. An error ends the
    /// session.
    ///
    /// Everything the next request depends on is in the memory: the service may go on in another kernel after any
    /// return.
    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String>;

    /// Files that go along.
    fn files(&mut self) -> Option<&mut Files> {
        None
    }

    /// The service begins to serve: with what was imported, if anything was. Files it does not have yet it opens now.
    fn begin(&mut self, _memory: &mut Memory) -> Result<(), String> {
        Ok(())
    }
}

struct Client {
    session: Session,
    /// Which connection carries it; 0: none since this service serves.
    carried_by: u64,
    /// That connection has ended while nothing could be forgotten.
    left: bool,
}

impl Client {
    fn new(session: Session, carried_by: u64) -> Client {
        Client { session, carried_by, left: false }
    }
}

struct Inner<A> {
    app: A,
    memory: Memory,
    /// Of the memory's changes.
    pace: Pace,
    state: State,
    clients: std::collections::BTreeMap<u64, Client>,
    connections: u64,
    /// The table of sessions as it arrives.
    arriving: Vec<u8>,
}

/// The service. Connections are served by [`Service::serve`], each in a thread of its own; the agent talks to it as a
/// [`Workload`].
pub struct Service<A> {
    name: String,
    inner: Mutex<Inner<A>>,
    changed: Condvar,
    /// Who wants to freeze it is not kept waiting by those who serve.
    freezing: AtomicBool,
}

/// What a turn of a connection leads to.
struct Turn {
    confirmed: u64,
    end: bool,
    /// There is more to take when the state may change again.
    more: bool,
    /// Nothing more is taken: what was taken before is answered, and the session ends.
    failed: Option<String>,
}

/// A connection, for as long as it is served, however that ends.
struct Carrier<'a, A: App> {
    service: &'a Service<A>,
    id: u64,
    connection: u64,
}

impl<A: App> Drop for Carrier<'_, A> {
    fn drop(&mut self) {
        let mut inner = self.service.lock();
        let active = inner.state == State::Active;
        let Some(client) = inner.clients.get_mut(&self.id).filter(|c| c.carried_by == self.connection) else {
            return;
        };
        // The switch holds the client: when it lets go of the session, nobody will come back for it. One that stands
        // still may be on its way to another kernel.
        client.left = true;
        if active {
            inner.clients.remove(&self.id);
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "another connection carries the session")
}

impl<A: App> Service<A> {
    /// A service with so much memory. It serves when the agent says so.
    pub fn new(name: &str, app: A, memory: usize) -> Service<A> {
        Service::with(name, app, Memory::new(memory))
    }

    /// A service with this memory.
    pub fn with(name: &str, app: A, memory: Memory) -> Service<A> {
        let inner = Inner {
            app,
            pace: Pace::new(now(), memory.changes()),
            memory,
            state: State::New,
            clients: Default::default(),
            connections: 0,
            arriving: vec![],
        };
        Service {
            name: name.to_owned(),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            freezing: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<A>> {
        // An app that panicked took that connection with it; its memory is what it left.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until the service is active.
    fn active(&self) -> io::Result<MutexGuard<'_, Inner<A>>> {
        let mut inner = self.lock();
        loop {
            match inner.state {
                State::Active if !self.freezing.load(Ordering::SeqCst) => return Ok(inner),
                State::Retired => return Err(io::Error::other("the service has gone to another kernel")),
                _ => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Wait until the service is active and its state may change.
    fn may_change(&self) -> io::Result<MutexGuard<'_, Inner<A>>> {
        loop {
            let mut inner = self.active()?;
            match inner.may_change() {
                Ok(()) => return Ok(inner),
                // Also ends when it is not throttled any more.
                Err(wait) => {
                    drop(self.changed.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner))
                }
            }
        }
    }

    /// Serve one connection of the switch until it ends.
    pub fn serve(&self, reader: impl Read, mut writer: impl Write) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(FRAME_LIMIT, reader);
        let greeting = Greeting::parse(&line(&mut reader)?).map_err(io::Error::other)?;
        let id = greeting.id;
        let connection = self.lock().announce(greeting);
        let _carrier = Carrier { service: self, id, connection };
        let (welcome, answers, ended) = self.active()?.attach(greeting, connection)?;
        writer.write_all(welcome.to_string().as_bytes())?;
        let Welcome::Ok { consumed, .. } = welcome else { return writer.flush() };
        frames(&mut writer, &answers, consumed, ended)?;
        self.turns(&mut reader, &mut writer, id, connection)
    }

    fn turns(
        &self,
        reader: &mut impl Read,
        writer: &mut impl Write,
        id: u64,
        connection: u64,
    ) -> io::Result<()> {
        let mut input = Vec::new();
        let mut told = 0;
        let mut client_ended = false;
        let mut answers = Vec::new();
        loop {
            let mut head = [0; HEAD];
            match reader.read_exact(&mut head) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            }
            let head = Head::decode(head).map_err(io::Error::other)?;
            let before = input.len();
            if before + head.length > WINDOW + FRAME_LIMIT {
                return Err(io::Error::other("the switch sends more than the window"));
            }
            input.resize(before + head.length, 0);
            reader.read_exact(&mut input[before..])?;
            client_ended |= head.end;
            loop {
                let turn = {
                    let mut inner = self.may_change()?;
                    inner.confirm(id, connection, head.confirmed)?;
                    inner.turn(id, &mut input, client_ended, &mut answers)?
                };
                if !answers.is_empty() || turn.end || turn.confirmed - told >= CONFIRM {
                    frames(writer, &answers, turn.confirmed, turn.end)?;
                    told = turn.confirmed;
                }
                if let Some(why) = turn.failed {
                    return Err(io::Error::other(why));
                }
                if !turn.more {
                    break;
                }
            }
        }
    }
}

/// Write the bytes in frames, the last of which may end the direction.
fn frames(writer: &mut impl Write, bytes: &[u8], confirmed: u64, end: bool) -> io::Result<()> {
    let mut rest = bytes;
    let mut out = Vec::with_capacity(rest.len().min(FRAME_LIMIT) + HEAD);
    loop {
        let (now, later) = rest.split_at(rest.len().min(FRAME_LIMIT));
        rest = later;
        let end = end && rest.is_empty();
        if now.is_empty() && !end && confirmed == 0 {
            return writer.flush();
        }
        out.clear();
        out.extend_from_slice(&Head { length: now.len(), end, confirmed }.encode());
        out.extend_from_slice(now);
        writer.write_all(&out)?;
        if rest.is_empty() {
            return writer.flush();
        }
    }
}

fn line(reader: &mut impl Read) -> io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while byte[0] != b'\n' {
        reader.read_exact(&mut byte)?;
        line.push(byte[0]);
        if line.len() > LINE_LIMIT {
            return Err(io::Error::other("the greeting is too long"));
        }
    }
    String::from_utf8(line).map_err(io::Error::other)
}

/// The service has no such section.
struct NoSection(&'static str);

impl From<NoSection> for String {
    fn from(NoSection(name): NoSection) -> String {
        format!("there is no section {name}")
    }
}

impl From<NoSection> for ExportError {
    fn from(none: NoSection) -> ExportError {
        ExportError::Refused(none.into())
    }
}

impl<A: App> Inner<A> {
    /// Number of a connection that has greeted. From here on a session that it resumes is waited for.
    fn announce(&mut self, greeting: Greeting) -> u64 {
        self.connections += 1;
        if let Some(client) = self.clients.get_mut(&greeting.id).filter(|_| greeting.resume) {
            (client.carried_by, client.left) = (self.connections, false);
        }
        self.connections
    }

    fn attach(&mut self, greeting: Greeting, connection: u64) -> io::Result<(Welcome, Vec<u8>, bool)> {
        // Those that waited go on in any order.
        if self.clients.get(&greeting.id).is_some_and(|c| c.carried_by > connection) {
            return Err(gone());
        }
        if !greeting.resume {
            self.clients.insert(greeting.id, Client::new(Session::default(), connection));
        }
        let Some(client) = self.clients.get_mut(&greeting.id) else {
            return Ok((Welcome::Unknown, vec![], false));
        };
        (client.carried_by, client.left) = (connection, false);
        let s = &client.session;
        let welcome = Welcome::Ok { consumed: s.consumed, from: s.answers.from() };
        Ok((welcome, s.answers.bytes().to_vec(), s.ended))
    }

    fn confirm(&mut self, id: u64, connection: u64, at: u64) -> io::Result<()> {
        let client = self.clients.get_mut(&id).filter(|c| c.carried_by == connection).ok_or_else(gone)?;
        client.session.answers.confirm(at).map_err(io::Error::other)
    }

    fn may_change(&mut self) -> Result<(), Duration> {
        match self.pace.is_limited() {
            true => self.pace.may_change(now(), self.memory.changes()),
            false => Ok(()),
        }
    }

    fn turn(
        &mut self,
        id: u64,
        input: &mut Vec<u8>,
        client_ended: bool,
        answers: &mut Vec<u8>,
    ) -> io::Result<Turn> {
        answers.clear();
        let Inner { app, memory, pace, clients, .. } = self;
        let session = &mut clients.get_mut(&id).ok_or_else(gone)?.session;
        // A client that does not read its answers gets no more of them before it does.
        let full = |session: &Session| session.answers.bytes().len() >= WINDOW;
        let (mut taken, mut waits, mut more, mut failed) = (0, full(session), false, None);
        while !session.ended && !waits && taken < input.len() {
            if taken > 0 && pace.is_limited() {
                more = pace.may_change(now(), memory.changes()).is_err();
                if more {
                    break;
                }
            }
            let (rest, before) = (input.get(taken..).unwrap_or_default(), answers.len());
            match app.take(memory, rest, answers) {
                // Nothing was taken, so nothing is answered: it comes again.
                Ok(0) => {
                    answers.truncate(before);
                    break;
                }
                Ok(n) if n <= rest.len() => {
                    // It counts before the next one, which may fail.
                    taken += n;
                    session.consumed += n as u64;
                    session.answers.push(answers.get(before..).unwrap_or_default());
                }
                not_taken => {
                    let why = not_taken.err().unwrap_or_else(|| "the service took more than there is".into());
                    answers.truncate(before);
                    failed = Some(why);
                    break;
                }
            }
            waits = full(session);
        }
        input.drain(..taken);
        let end = client_ended && !waits && !more && failed.is_none() && !session.ended;
        session.ended |= end;
        Ok(Turn { confirmed: session.consumed, end, more, failed })
    }

    fn files(&mut self) -> Result<&mut Files, NoSection> {
        self.app.files().ok_or(NoSection(FILES))
    }

    fn throttle(&mut self, percent: u8) {
        self.pace.throttle(percent, now(), self.memory.changes());
    }

    fn table(&self) -> Table {
        Table(self.clients.iter().map(|(id, c)| (*id, c.session.clone())).collect())
    }
}

impl<A: App> Workload for Service<A> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn state(&self) -> State {
        self.lock().state
    }

    fn sections(&self) -> Vec<Section> {
        let mut inner = self.lock();
        let (layout, version) = inner.app.layout();
        // One side's memory cannot be copied into the other's hand.
        let compatible =
            if inner.memory.is_handover() { format!("{layout},handover") } else { layout.into() };
        let files = inner.app.files().map(|files| Section {
            name: FILES.into(),
            compatible: "kmorph,files".into(),
            version: 1,
            size: files.size(),
        });
        let own = [
            Section { name: MEMORY.into(), compatible, version, size: inner.memory.size() as u64 },
            Section {
                name: SESSIONS.into(),
                compatible: "kmorph,sessions".into(),
                version: 1,
                size: TABLE_LIMIT,
            },
        ];
        own.into_iter().chain(files).collect()
    }

    fn activate(&self) -> Result<(), String> {
        let mut inner = self.lock();
        match inner.state {
            State::New => {
                let Inner { app, memory, .. } = &mut *inner;
                app.files().map_or(Ok(()), Files::activate)?;
                app.begin(memory)?;
                inner.state = State::Active;
            }
            State::Active => {}
            State::Frozen | State::Retired => {
                return Err(format!("the service is {}: it cannot be activated", inner.state.name()));
            }
        }
        drop(inner);
        self.changed.notify_all();
        // With one CPU those who wait go on before the agent has its answer: clients wait for them.
        std::thread::yield_now();
        Ok(())
    }

    fn throttles(&self) -> bool {
        true
    }

    fn throttle(&self, percent: u8) -> Result<(), String> {
        self.lock().throttle(percent);
        self.changed.notify_all();
        Ok(())
    }

    fn freeze(&self) -> Result<(), String> {
        self.freezing.store(true, Ordering::SeqCst);
        let mut inner = self.lock();
        let frozen = match inner.state {
            State::Active | State::Frozen => {
                inner.state = State::Frozen;
                Ok(())
            }
            State::New | State::Retired => {
                Err(format!("the service is {}: it does not serve", inner.state.name()))
            }
        };
        self.freezing.store(false, Ordering::SeqCst);
        frozen
    }

    fn thaw(&self) -> Result<(), String> {
        let mut inner = self.lock();
        if inner.state == State::Frozen {
            inner.state = State::Active;
            inner.clients.retain(|_, c| !c.left);
        }
        inner.throttle(0);
        self.changed.notify_all();
        Ok(())
    }

    fn retire(&self) -> Result<(), String> {
        let mut inner = self.lock();
        inner.state = State::Retired;
        inner.throttle(0);
        self.changed.notify_all();
        Ok(())
    }

    fn discard(&self) -> Result<(), String> {
        let mut inner = self.lock();
        if inner.state != State::New {
            return Err(format!("the service is {}: what it has is its own", inner.state.name()));
        }
        inner.memory.reset();
        inner.clients.clear();
        inner.arriving.clear();
        inner.app.files().map_or(Ok(()), Files::discard)
    }

    fn export(&self, section: &str, full: bool, out: &mut dyn Sink) -> Result<(), ExportError> {
        if section == SESSIONS {
            let table = {
                let mut inner = self.lock();
                // Nobody came back for these since the kernel before this one.
                inner.clients.retain(|_, c| c.carried_by != 0);
                inner.table().encode()
            };
            for (n, piece) in table.chunks(PIECE_LIMIT as usize).enumerate() {
                out.piece((n * PIECE_LIMIT as usize) as u64, piece)?;
            }
            return Ok(());
        }
        if section == FILES {
            let refused = ExportError::Refused;
            let mut export = self.lock().files()?.begin(full).map_err(refused)?;
            let (mut sent, mut piece) = (0, vec![]);
            while self.lock().files()?.piece(&mut export, &mut piece).map_err(refused)? {
                if !piece.is_empty() {
                    out.piece(sent, &piece)?;
                    sent += piece.len() as u64;
                }
            }
            return Ok(());
        }
        if section != MEMORY {
            return Err(ExportError::Refused(format!("there is no section {section}")));
        }
        if full {
            let mut inner = self.lock();
            inner.memory.export_all();
            // A morph begins: the pace is what it is from here on.
            if !inner.pace.is_limited() {
                inner.pace = Pace::new(now(), inner.memory.changes());
            }
        }
        let (mut next, mut sent) = (Some(0), 0);
        while let Some(at) = next {
            // Clients are served until there is room for the next piece, and while it is sent.
            out.ready(memory::PIECE)?;
            next = self.lock().memory.export(at, |parts| {
                let offset = sent;
                sent += length(parts) as u64;
                out.take(offset, parts)
            })?;
            out.send()?;
        }
        Ok(())
    }

    fn digest(&self, section: &str) -> Result<Vec<u8>, String> {
        let mut inner = self.lock();
        match section {
            MEMORY => Ok(inner.memory.digest()),
            FILES => Ok(inner.files()?.digest()),
            SESSIONS => Ok(xxh3_128(&inner.table().encode()).to_le_bytes().to_vec()),
            _ => Err(format!("there is no section {section}")),
        }
    }

    fn import(&self, section: &str, offset: u64, piece: &Piece<'_>) -> Result<(), String> {
        let mut inner = self.lock();
        if inner.state != State::New {
            return Err(format!("the service is {}: it takes no state", inner.state.name()));
        }
        match section {
            MEMORY => inner.memory.import(piece),
            FILES => inner.files()?.import(&piece.bytes().map_err(|e| e.to_string())?),
            SESSIONS => {
                let bytes = piece.bytes().map_err(|e| e.to_string())?;
                if offset == 0 {
                    inner.arriving.clear();
                }
                if offset != inner.arriving.len() as u64 || offset + bytes.len() as u64 > TABLE_LIMIT {
                    return Err(format!(
                        "a piece of {section} at {offset} does not follow the one before it"
                    ));
                }
                inner.arriving.extend_from_slice(&bytes);
                Ok(())
            }
            _ => Err(format!("there is no section {section}")),
        }
    }

    fn imported(&self, section: &str) -> Result<(), String> {
        let mut inner = self.lock();
        if section == FILES {
            return inner.files()?.imported();
        }
        // A round may bring nothing of it.
        if section == SESSIONS && !inner.arriving.is_empty() {
            let table = Table::decode(&std::mem::take(&mut inner.arriving)).map_err(|e| e.to_string())?;
            let clients = table.0.into_iter().map(|(id, session)| (id, Client::new(session, 0)));
            inner.clients = clients.collect();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
