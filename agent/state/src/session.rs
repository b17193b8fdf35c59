//! How a client's connection goes on with another kernel.
//!
//! The connection ends in the primary kernel. The switch there joins it to the service by a *session*, which has a
//! number and may be carried by several connections one after the other. Both directions count their bytes, and a side
//! keeps what it sent until the other has confirmed it, so that after a change of kernels nothing is lost or repeated.
//!
//! A connection begins with a line of the switch ([`Greeting`]), which the service answers with one
//! ([`Welcome`]) when it is active; after that both send frames: a [`Head`] and its bytes.

use std::collections::BTreeMap;
use std::fmt;

/// Longest line in bytes, with its newline.
pub const LINE_LIMIT: usize = 128;
/// Most bytes of a frame, without its head.
pub const FRAME_LIMIT: usize = 64 << 10;
/// Most bytes a side sends that the other has not confirmed.
pub const WINDOW: usize = 256 << 10;
/// So many bytes are confirmed at the latest, even when there is nothing to say.
pub const CONFIRM: u64 = 32 << 10;
/// Bytes of a head.
pub const HEAD: usize = 16;
/// Most sessions that are exported or imported.
const SESSIONS: usize = 1 << 16;
const END: u32 = 1;

/// A line or a frame that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {text:?}")]
pub struct SessionError {
    what: &'static str,
    text: String,
}

fn wrong(what: &'static str, text: &str) -> SessionError {
    SessionError { what, text: text.chars().take(LINE_LIMIT).collect() }
}

fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

/// What the switch says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Number of the session, random.
    pub id: u64,
    /// The session was there before: one that is not known is not begun.
    pub resume: bool,
}

impl Greeting {
    /// Read the line.
    pub fn parse(line: &str) -> Result<Greeting, SessionError> {
        let bad = || wrong("not the greeting of a kmorph session, version 1", line);
        let rest = line.trim_end().strip_prefix("kmorph-session version=1 ").ok_or_else(bad)?;
        let id = value(rest, "id").and_then(|v| u64::from_str_radix(v, 16).ok()).ok_or_else(bad)?;
        let resume = match value(rest, "resume") {
            Some("0") => false,
            Some("1") => true,
            _ => return Err(bad()),
        };
        Ok(Greeting { id, resume })
    }
}

impl fmt::Display for Greeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kmorph-session version=1 id={:016x} resume={}", self.id, u8::from(self.resume))
    }
}

/// What the service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Welcome {
    /// It goes on.
    Ok {
        /// Bytes of the client it has taken.
        consumed: u64,
        /// Number of the first byte it will send.
        from: u64,
    },
    /// It does not know the session.
    Unknown,
}

impl Welcome {
    /// Read the line.
    pub fn parse(line: &str) -> Result<Welcome, SessionError> {
        let line = line.trim_end();
        if line == "unknown" {
            return Ok(Welcome::Unknown);
        }
        let number = |key| value(line, key).and_then(|v| v.parse().ok());
        match (line.starts_with("ok "), number("consumed"), number("from")) {
            (true, Some(consumed), Some(from)) => Ok(Welcome::Ok { consumed, from }),
            _ => Err(wrong("not an answer to a greeting", line)),
        }
    }
}

impl fmt::Display for Welcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Welcome::Ok { consumed, from } => writeln!(f, "ok consumed={consumed} from={from}"),
            Welcome::Unknown => f.write_str("unknown\n"),
        }
    }
}

/// What precedes the bytes of a frame: their number and flags as u32, the confirmation as u64, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Bytes that follow.
    pub length: usize,
    /// Nothing comes after these bytes.
    pub end: bool,
    /// Bytes of the other direction that are taken care of, counted from the beginning of the session.
    pub confirmed: u64,
}

impl Head {
    /// Read it.
    pub fn decode(bytes: [u8; HEAD]) -> Result<Head, SessionError> {
        let [a, b, c, d, e, f, g, h, confirmed @ ..] = bytes;
        let (length, flags) = (u32::from_le_bytes([a, b, c, d]) as usize, u32::from_le_bytes([e, f, g, h]));
        if length > FRAME_LIMIT || flags & !END != 0 {
            return Err(wrong("not the head of a frame of a session", &format!("{bytes:02x?}")));
        }
        Ok(Head { length, end: flags & END != 0, confirmed: u64::from_le_bytes(confirmed) })
    }

    /// Its bytes. `length` is [`FRAME_LIMIT`] at most.
    pub fn encode(self) -> [u8; HEAD] {
        let mut out = [0; HEAD];
        out[..4].copy_from_slice(&u32::try_from(self.length).unwrap_or(u32::MAX).to_le_bytes());
        out[4..8].copy_from_slice(&(if self.end { END } else { 0 }).to_le_bytes());
        out[8..].copy_from_slice(&self.confirmed.to_le_bytes());
        out
    }
}

/// Bytes that were sent and not yet confirmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unconfirmed {
    from: u64,
    bytes: Vec<u8>,
}

impl Unconfirmed {
    /// None, after so many that were confirmed.
    pub fn after(from: u64) -> Unconfirmed {
        Unconfirmed { from, bytes: vec![] }
    }

    /// Number of the first one.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// Number of the one that is sent next.
    pub fn end(&self) -> u64 {
        self.from + self.bytes.len() as u64
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes from this number on.
    pub fn since(&self, at: u64) -> &[u8] {
        let skip = usize::try_from(at.saturating_sub(self.from)).unwrap_or(usize::MAX);
        self.bytes.get(skip..).unwrap_or_default()
    }

    /// More are sent.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The other side has those before this number. One that was confirmed earlier, or never sent, is an error.
    pub fn confirm(&mut self, at: u64) -> Result<(), SessionError> {
        if at < self.from || at > self.end() {
            let text = format!("{at}, where {} to {} can be", self.from, self.end());
            return Err(wrong("a confirmation of bytes that were not sent", &text));
        }
        // No more than the bytes that are there.
        self.bytes.drain(..(at - self.from) as usize);
        self.from = at;
        Ok(())
    }
}

/// A session, as the service knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Bytes of the client that were taken.
    pub consumed: u64,
    /// Answers the client may not have.
    pub answers: Unconfirmed,
    /// There will be no more answers.
    pub ended: bool,
}

/// Every session of a service, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(pub BTreeMap<u64, Session>);

impl Table {
    /// As it is handed over: a count, then for each session its number, the bytes taken, the number of the first
    /// answer kept, whether it ended, and the answers with their length; numbers are little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = (self.0.len() as u64).to_le_bytes().to_vec();
        for (id, s) in &self.0 {
            for n in [*id, s.consumed, s.answers.from, u64::from(s.ended), s.answers.bytes.len() as u64] {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.extend_from_slice(&s.answers.bytes);
        }
        out
    }

    /// Read what was handed over.
    pub fn decode(mut bytes: &[u8]) -> Result<Table, SessionError> {
        let short = || wrong("a table of sessions", "ends too early");
        let number = |bytes: &mut &[u8]| {
            let (first, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
            *bytes = rest;
            Ok(u64::from_le_bytes(*first))
        };
        let count = number(&mut bytes)?;
        if count > SESSIONS as u64 {
            return Err(wrong("a table of sessions", "has too many"));
        }
        let mut table = Table::default();
        for _ in 0..count {
            let id = number(&mut bytes)?;
            let (consumed, from, ended) =
                (number(&mut bytes)?, number(&mut bytes)?, number(&mut bytes)? != 0);
            let length = usize::try_from(number(&mut bytes)?).map_err(|_| short())?;
            let (answers, rest) = bytes.split_at_checked(length).ok_or_else(short)?;
            from.checked_add(length as u64).ok_or_else(|| wrong("a table of sessions", "counts too far"))?;
            bytes = rest;
            let answers = Unconfirmed { from, bytes: answers.to_vec() };
            table.0.insert(id, Session { consumed, answers, ended });
        }
        if bytes.is_empty() {
            Ok(table)
        } else {
            Err(wrong("a table of sessions", "does not end where it should"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_and_heads_are_read_as_they_were_written() {
        for g in [Greeting { id: u64::MAX, resume: true }, Greeting { id: 7, resume: false }] {
            let line = g.to_string();
            assert!(line.len() <= LINE_LIMIT);
            assert_eq!(Greeting::parse(&line), Ok(g));
        }
        for w in [Welcome::Unknown, Welcome::Ok { consumed: u64::MAX, from: 5 }] {
            assert!(w.to_string().len() <= LINE_LIMIT);
            assert_eq!(Welcome::parse(&w.to_string()), Ok(w));
        }
        for line in
            ["", "GET / HTTP/1.1", "kmorph-session version=2 id=1 resume=0", "kmorph-session version=1 id=1"]
        {
            assert!(Greeting::parse(line).is_err(), "{line}");
        }
        assert!(Welcome::parse("ok consumed=1").is_err());
        let head = Head { length: FRAME_LIMIT, end: true, confirmed: 1 << 60 };
        assert_eq!(Head::decode(head.encode()), Ok(head));
        assert!(Head::decode(Head { length: FRAME_LIMIT + 1, ..head }.encode()).is_err());
        assert!(Head::decode([255; HEAD]).is_err());
    }

    #[test]
    fn only_what_was_sent_is_confirmed() {
        let mut u = Unconfirmed::after(100);
        u.push(b"abcdef");
        u.confirm(102).unwrap();
        assert_eq!((u.from(), u.end(), u.bytes()), (102, 106, &b"cdef"[..]));
        assert_eq!((u.since(0), u.since(104), u.since(999)), (&b"cdef"[..], &b"ef"[..], &b""[..]));
        assert!(u.confirm(101).is_err() && u.confirm(107).is_err());
        u.confirm(106).unwrap();
        assert_eq!(u, Unconfirmed::after(106));
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let mut t = Table::default();
        for id in 0..3 {
            let answers = Unconfirmed { from: id * 10, bytes: vec![id as u8; id as usize * 100] };
            t.0.insert(id, Session { consumed: id + 5, answers, ended: id == 1 });
        }
        let bytes = t.encode();
        assert_eq!(Table::decode(&bytes), Ok(t));
        for cut in 0..bytes.len() {
            assert!(Table::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(Table::decode(&u64::MAX.to_le_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_table_makes_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0u64..4) {
            let mut table = count.to_le_bytes().to_vec();
            table.extend(bytes);
            let _ = Table::decode(&table);
        }
    }
}
