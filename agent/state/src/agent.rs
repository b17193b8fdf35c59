//! What is said on the connection to the agent: orders come, reports and pieces go.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::hook::HookError;
use crate::piece::{Piece, Sink, length};
use crate::window::Window;
use crate::wire::{LINE_LIMIT, Order, PIECE_LIMIT, Report, WireError};

/// Reports of pieces that go together: saying each alone takes longer than copying it.
const TOGETHER: u32 = 8;

/// Why nothing more is heard.
pub(crate) enum Trouble {
    Io(io::Error),
    Wire(WireError),
}

impl Trouble {
    /// As the workload is told of it.
    pub(crate) fn of(self, address: &str) -> HookError {
        match self {
            Trouble::Io(error) => HookError::Io { address: address.to_owned(), error },
            Trouble::Wire(error) => HookError::Wire(error),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Io(error)
    }
}

impl From<WireError> for Trouble {
    fn from(error: WireError) -> Trouble {
        Trouble::Wire(error)
    }
}

/// What comes from the agent.
pub(crate) enum Heard {
    Order(Order),
    /// A piece whose bytes came along.
    Piece {
        section: String,
        offset: u64,
        bytes: Vec<u8>,
    },
}

/// Reads, and keeps the descriptor that came last.
struct Ears<'a> {
    stream: &'a UnixStream,
    came: Option<OwnedFd>,
}

impl Read for Ears<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        let got = retry_on_intr(|| recvmsg(self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                self.came = came.last().or(self.came.take());
            }
        }
        Ok(got.bytes)
    }
}

/// A piece that was taken and is to be sent.
enum Taken {
    /// It is in the window.
    Placed(Report),
    /// It is in the buffer.
    Here(u64),
}

/// The connection.
pub(crate) struct Agent<'a> {
    reader: BufReader<Ears<'a>>,
    writer: BufWriter<&'a UnixStream>,
    /// What came while a piece waited for room.
    waiting: VecDeque<Heard>,
    window: Option<Window>,
    taken: Option<Taken>,
    /// Reports of pieces that the agent was not told of yet.
    untold: u32,
    buffer: Vec<u8>,
    /// Of a piece that has come and is done with.
    spare: Vec<u8>,
}

impl<'a> Agent<'a> {
    pub(crate) fn new(stream: &'a UnixStream) -> Agent<'a> {
        Agent {
            reader: BufReader::with_capacity(PIECE_LIMIT as usize, Ears { stream, came: None }),
            writer: BufWriter::with_capacity(PIECE_LIMIT as usize + LINE_LIMIT, stream),
            waiting: VecDeque::new(),
            window: None,
            taken: None,
            untold: 0,
            buffer: vec![],
            spare: vec![],
        }
    }

    /// The next order or piece; `None` at the end of the connection.
    pub(crate) fn next(&mut self) -> Result<Option<Heard>, Trouble> {
        loop {
            match self.waiting.pop_front() {
                Some(heard) => return Ok(Some(heard)),
                None if self.hear()? => {}
                None => return Ok(None),
            }
        }
    }

    /// Have the next line carried out, or wait for its turn; `false` at the end of the connection.
    fn hear(&mut self) -> Result<bool, Trouble> {
        // The agent is not kept waiting for an answer by what it has not said yet.
        if !self.reader.buffer().contains(&b'\n') {
            self.flush()?;
        }
        let Some(line) = line(&mut self.reader)? else { return Ok(false) };
        match line.parse()? {
            Order::Freed { place } => {
                // One of a morph before this one means nothing.
                let _ = self.window.as_mut().is_some_and(|w| w.freed(place));
            }
            Order::Import { section, offset, bytes } => {
                if self.reader.buffer().len() < bytes as usize {
                    self.flush()?;
                }
                let mut piece = std::mem::take(&mut self.spare);
                piece.resize(bytes as usize, 0);
                self.reader.read_exact(&mut piece)?;
                self.waiting.push_back(Heard::Piece { section, offset, bytes: piece });
            }
            order => self.waiting.push_back(Heard::Order(order)),
        }
        Ok(true)
    }

    /// Bytes of a piece that are not needed any more.
    pub(crate) fn done_with(&mut self, bytes: Vec<u8>) {
        self.spare = bytes;
    }

    /// Whether nothing has come that is to be answered.
    fn is_waited_for(&mut self) -> Result<bool, Trouble> {
        while self.waiting.is_empty() && self.reader.buffer().contains(&b'\n') {
            self.hear()?;
        }
        Ok(self.waiting.is_empty())
    }

    pub(crate) fn say(&mut self, report: &Report) -> io::Result<()> {
        writeln!(self.writer, "{report}")
    }

    /// Answer an order, with the answers to those that have come already.
    pub(crate) fn answer(&mut self, report: &Report) -> Result<(), Trouble> {
        self.say(report)?;
        if self.is_waited_for()? {
            self.flush()?;
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.untold = 0;
        self.writer.flush()
    }

    /// The descriptor that came last is the window from now on; without one there is none.
    pub(crate) fn open_window(&mut self, from: u64, size: u64) -> Result<(), String> {
        let file = self.reader.get_mut().came.take().map(File::from);
        let missing = size > 0 && file.is_none();
        self.window = file.map(|file| Window::new(file, from, size));
        if missing { Err("no descriptor came along".into()) } else { Ok(()) }
    }

    /// The morph is over.
    pub(crate) fn close_window(&mut self) {
        self.window = None;
    }

    /// A piece that is in the window.
    pub(crate) fn placed(&self, place: u64, bytes: u32) -> Result<Piece<'_>, String> {
        let window = self.window.as_ref().ok_or("there is no window")?;
        Ok(Piece::window(&window.file, place, bytes as usize))
    }
}

impl Sink for Agent<'_> {
    fn ready(&mut self, bytes: usize) -> io::Result<()> {
        let mut wanted = bytes;
        while let Some(window) = &self.window
            && window.is_for(bytes)
            && !window.has_room(wanted)
        {
            wanted = window.worth(bytes);
            // The other side takes what it knows of.
            self.flush()?;
            let heard = self.hear().map_err(|trouble| match trouble {
                Trouble::Io(error) => error,
                Trouble::Wire(error) => io::Error::other(error),
            })?;
            if !heard {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // These come with the export. Any other says that nobody waits for it any more, or takes what is in the window:
            // the rest goes to the agent, which throws it away.
            let round = |order: &Heard| {
                matches!(order, Heard::Order(Order::Freeze | Order::Export { .. } | Order::Digest { .. }))
            };
            if !self.waiting.iter().all(round) {
                self.window = None;
            }
        }
        Ok(())
    }

    fn take(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let bytes = u32::try_from(length(parts)).ok().filter(|n| *n <= PIECE_LIMIT);
        let bytes = bytes.ok_or_else(|| io::Error::other("a piece is too long"))?;
        let placed = match &mut self.window {
            // One that is taken away takes nothing along: pieces go with the reports again.
            Some(window) => window.put(parts).unwrap_or_else(|_| {
                self.window = None;
                None
            }),
            None => None,
        };
        self.taken = Some(match placed {
            Some(place) => Taken::Placed(Report::Placed { offset, bytes, place }),
            None => {
                self.buffer.clear();
                parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
                Taken::Here(offset)
            }
        });
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        match self.taken.take() {
            Some(Taken::Placed(report)) => {
                self.say(&report)?;
                // The rest is told when somebody waits for it: for room, or for the end.
                self.untold += 1;
                if self.untold < TOGETHER { Ok(()) } else { self.flush() }
            }
            Some(Taken::Here(offset)) => {
                let bytes = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
                self.say(&Report::Piece { offset, bytes })?;
                // They need no copy.
                self.writer.flush()?;
                self.writer.get_mut().write_all(&self.buffer)
            }
            None => Ok(()),
        }
    }
}

/// The next line; `None` at the end.
pub(crate) fn line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    reader.by_ref().take(LINE_LIMIT as u64).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => String::from_utf8(line).map(Some).map_err(io::Error::other),
        Some(_) if line.len() < LINE_LIMIT => Err(io::ErrorKind::UnexpectedEof.into()),
        Some(_) => Err(io::Error::other(format!("a line is longer than {LINE_LIMIT} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;

    use super::*;

    /// The agent's end.
    struct Other(BufReader<UnixStream>);

    impl Other {
        fn window(&self, file: &File, from: u64, size: u64) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            let line = format!("{}\n", Order::Window { from, size });
            let parts = [IoSlice::new(line.as_bytes())];
            sendmsg(self.0.get_ref(), &parts, &mut control, SendFlags::empty()).unwrap();
        }

        fn say(&mut self, order: &Order) {
            writeln!(self.0.get_mut(), "{order}").unwrap();
        }

        fn hear(&mut self) -> Report {
            line(&mut self.0).unwrap().unwrap().parse().unwrap()
        }
    }

    fn order(agent: &mut Agent<'_>) -> Order {
        match agent.next() {
            Ok(Some(Heard::Order(order))) => order,
            _ => panic!("no order"),
        }
    }

    fn given(agent: &mut Agent<'_>) {
        let Order::Window { from, size } = order(agent) else { panic!("no window") };
        agent.open_window(from, size).unwrap();
    }

    #[test]
    fn a_piece_waits_for_room_and_orders_that_come_meanwhile_wait_for_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut agent, mut other) = (Agent::new(&ours), Other(BufReader::new(theirs)));
        let file = tempfile::tempfile().unwrap();
        other.window(&file, 1000, 100);
        given(&mut agent);
        agent.piece(0, &[1; 60]).unwrap();
        agent.flush().unwrap();
        assert_eq!(other.hear(), Report::Placed { offset: 0, bytes: 60, place: 1000 });
        let digest = Order::Digest { section: "a".into() };
        other.say(&digest);
        other.say(&Order::Freed { place: 1000 });
        agent.piece(60, &[2; 50]).unwrap();
        agent.flush().unwrap();
        assert_eq!(other.hear(), Report::Placed { offset: 60, bytes: 50, place: 1000 });
        other.say(&Order::Import { section: "b".into(), offset: 7, bytes: 2 });
        other.0.get_mut().write_all(b"\n\n").unwrap();
        assert!(matches!(agent.is_waited_for(), Ok(false)));
        assert_eq!(order(&mut agent), digest);
        let Ok(Some(Heard::Piece { section, offset, bytes })) = agent.next() else { panic!("no piece") };
        assert_eq!((section.as_str(), offset, &bytes[..]), ("b", 7, &b"\n\n"[..]));
        // That a place is free is not answered.
        other.say(&Order::Freed { place: 7 });
        other.say(&digest);
        assert_eq!(order(&mut agent), digest);
        assert!(matches!(agent.is_waited_for(), Ok(true)));
        assert_eq!(&*agent.placed(1000, 3).unwrap().bytes().unwrap(), [2, 2, 2]);
        // One that never fits goes the other way, and so do all when there is no window any more.
        agent.piece(110, &[3; 101]).unwrap();
        assert_eq!(other.hear(), Report::Piece { offset: 110, bytes: 101 });
        other.0.read_exact(&mut [0; 101]).unwrap();
        agent.close_window();
        assert!(agent.placed(1000, 3).is_err());
        agent.piece(211, &[4; 1]).unwrap();
        assert_eq!(other.hear(), Report::Piece { offset: 211, bytes: 1 });
        other.0.read_exact(&mut [0]).unwrap();
        other.say(&Order::Window { from: 0, size: 9 });
        assert!(matches!(order(&mut agent), Order::Window { from: 0, size: 9 }));
        assert_eq!(agent.open_window(0, 9).unwrap_err(), "no descriptor came along");
    }

    #[test]
    fn who_waits_for_room_goes_on_when_nobody_takes_anything_any_more() {
        for (order_of, goes_on) in [
            (Order::Digest { section: "a".into() }, false),
            (Order::Freeze, false),
            (Order::Export { section: "b".into(), full: false }, false),
            (Order::Thaw, true),
            (Order::Throttle { percent: 0 }, true),
            (Order::Window { from: 0, size: 0 }, true),
            (Order::Retire, true),
        ] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut agent, mut other) = (Agent::new(&ours), Other(BufReader::new(theirs)));
            other.window(&tempfile::tempfile().unwrap(), 0, 10);
            given(&mut agent);
            agent.piece(0, b"0123456789").unwrap();
            other.say(&order_of);
            if !goes_on {
                other.say(&Order::Freed { place: 0 });
            }
            agent.piece(10, b"abc").unwrap();
            agent.flush().unwrap();
            assert_eq!(other.hear(), Report::Placed { offset: 0, bytes: 10, place: 0 });
            let second = other.hear();
            let placed = matches!(second, Report::Placed { offset: 10, .. });
            assert_eq!(placed, !goes_on, "{order_of}: {second:?}");
            // It is carried out in its turn.
            assert_eq!(order(&mut agent), order_of);
        }
    }

    #[test]
    fn an_answer_does_not_wait_for_the_order_after_the_pieces_that_follow_it() {
        for (there, rest) in [(&b"xyz"[..], &b""[..]), (b"x", b"yz")] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut agent, mut other) = (Agent::new(&ours), Other(BufReader::new(theirs)));
            other.0.get_ref().set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            let take = Order::Take { section: "a".into(), offset: 0, bytes: 1, place: 0 };
            let import = Order::Import { section: "a".into(), offset: 1, bytes: 3 };
            let said = [format!("{take}\n{import}\n").as_bytes(), there].concat();
            other.0.get_mut().write_all(&said).unwrap();
            assert_eq!(order(&mut agent), take);
            std::thread::scope(|s| {
                s.spawn(|| {
                    assert!(agent.answer(&Report::Ok).is_ok());
                    assert!(matches!(agent.next(), Ok(Some(Heard::Piece { .. }))));
                    assert!(matches!(agent.next(), Ok(None)));
                });
                // It goes when this fails, and nobody waits for it any more.
                let mut other = other;
                assert_eq!(other.hear(), Report::Ok);
                other.0.get_mut().write_all(rest).unwrap();
            });
        }
    }

    #[test]
    fn a_window_that_is_taken_away_costs_nothing_but_time() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut agent, mut other) = (Agent::new(&ours), Other(BufReader::new(theirs)));
        // What cannot be written is as good as taken away.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("w"), "").unwrap();
        other.window(&File::open(dir.path().join("w")).unwrap(), 0, 100);
        given(&mut agent);
        let mut bytes = [0; 3];
        for n in 0..2 {
            agent.piece(n, b"abc").unwrap();
            assert_eq!(other.hear(), Report::Piece { offset: n, bytes: 3 });
            other.0.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"abc");
        }
    }

    #[test]
    fn an_agent_that_is_lost_lets_nobody_wait_for_room() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut agent, other) = (Agent::new(&ours), Other(BufReader::new(theirs)));
        other.window(&tempfile::tempfile().unwrap(), 0, 10);
        given(&mut agent);
        agent.piece(0, &[1; 10]).unwrap();
        drop(other);
        let error = agent.piece(10, &[1; 10]).unwrap_err();
        let lost = [io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        assert!(lost.contains(&error.kind()), "{error}");
    }
}
