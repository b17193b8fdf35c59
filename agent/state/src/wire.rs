//! The lines a workload and the agent exchange.
//!
//! A line is a word and `key=value` pairs, separated by single blanks and ended by a newline. The lines `piece` and
//! `import` are followed by as many raw bytes as they say. `docs/state.md` describes the conversation.

use std::fmt;
use std::str::FromStr;

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Longest line in bytes, with its newline.
pub const LINE_LIMIT: usize = 1024;
/// Most bytes that follow a line.
pub const PIECE_LIMIT: u32 = 256 << 10;
/// Longest name of a workload or a section, and longest `compatible`.
pub const NAME_LIMIT: usize = 63;
/// Longest digest in bytes.
pub const DIGEST_LIMIT: usize = 64;
/// Most sections of a workload.
pub const SECTION_LIMIT: usize = 64;
/// Where the agent listens unless the environment says otherwise: a name in the abstract namespace.
pub const ADDRESS: &str = "@kmorph-state";
/// In `knows=` of a workload that carries out [`Order::Throttle`].
pub const THROTTLE: &str = "throttle";
/// In `knows=` of a workload that carries out [`Order::Window`] and what belongs to it.
pub const WINDOW: &str = "window";
/// A workload is throttled by this share at most, in percent.
pub const THROTTLE_LIMIT: u8 = 99;
/// Names the environment variable that says where the agent listens.
pub const ADDRESS_VARIABLE: &str = "KMORPH_STATE";

/// A line that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A word nobody defined.
    #[error("line {line:?}: {word:?} is not known")]
    Unknown {
        /// The line.
        line: String,
        /// Its first word.
        word: String,
    },
    /// A key is missing, or its value makes no sense.
    #[error("line {line:?}: {key}= is missing or wrong: {why}")]
    Value {
        /// The line.
        line: String,
        /// The key.
        key: &'static str,
        /// What is expected.
        why: &'static str,
    },
}

/// What a workload is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// It has just started, and does not know yet whether it is to serve.
    #[default]
    New,
    /// It serves.
    Active,
    /// It stands still: its state does not change.
    Frozen,
    /// Another kernel's workload has taken over for good.
    Retired,
}

impl State {
    const NAMES: [(State, &'static str); 4] = [
        (State::New, "new"),
        (State::Active, "active"),
        (State::Frozen, "frozen"),
        (State::Retired, "retired"),
    ];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(s, _)| *s == self).map_or("new", |(_, n)| n)
    }
}

/// A piece of state with a meaning of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, unique within the workload.
    pub name: String,
    /// What it is, such as `example,kv-v1`. Only a section of the same name and kind takes it.
    pub compatible: String,
    /// Version of its layout. It is taken by workloads of the same version and of later ones.
    pub version: u32,
    /// Bytes it may have at most.
    pub size: u64,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Serve: with the state that was imported, or else with its own. Answered by [`Report::Ok`].
    Activate,
    /// Stand still. Answered by [`Report::Ok`] when no state changes any more.
    Freeze,
    /// Go on as before. Answered by [`Report::Ok`].
    Thaw,
    /// Another workload serves from now on. Answered by [`Report::Ok`].
    Retire,
    /// Forget what was imported. Answered by [`Report::Ok`].
    Discard,
    /// Change the state at no more than the rest of the pace it was changed at before. Said only to workloads that
    /// know it. Answered by [`Report::Ok`].
    Throttle {
        /// Share that is taken away, in percent; 0: go on unhindered.
        percent: u8,
    },
    /// Memory shared with the other kernel is this workload's to use until the morph ends: in place of any before it. A
    /// descriptor comes along; without one there is none any more. The one that gives state writes pieces there, the one
    /// that takes it reads them. Said only to workloads that know it. Answered by [`Report::Ok`].
    Window {
        /// Where in it the part begins that this workload writes.
        from: u64,
        /// Size of that part; 0: it only reads.
        size: u64,
    },
    /// What was [`Report::Placed`] there is taken: the place can be used again. Not answered.
    Freed {
        /// Where.
        place: u64,
    },
    /// Send a section: pieces, then [`Report::Done`].
    Export {
        /// Its name.
        section: String,
        /// All of it, not only what changed since it was last sent.
        full: bool,
    },
    /// Give the digest of a section: of one that is frozen or was imported it decides, of one that changes it is a
    /// rehearsal.
    Digest {
        /// Its name.
        section: String,
    },
    /// A piece of a section; the bytes follow. Not answered.
    Import {
        /// Its name.
        section: String,
        /// Where the piece belongs.
        offset: u64,
        /// Its length.
        bytes: u32,
    },
    /// A piece of a section, which is in the window. Answered by [`Report::Ok`] when nothing is read there any more; what
    /// is wrong with the piece is said later, as for [`Order::Import`].
    Take {
        /// Its name.
        section: String,
        /// Where the piece belongs.
        offset: u64,
        /// Its length.
        bytes: u32,
        /// Where in the window it is.
        place: u64,
    },
    /// The pieces of a section that were sent belong together. Answered by [`Report::Ok`] when they are in place.
    Imported {
        /// Its name.
        section: String,
    },
}

/// What a workload says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Opens the connection.
    Hello {
        /// Protocol version.
        version: u32,
        /// Name of the workload, unique within the kernel.
        name: String,
        /// What it is doing.
        state: State,
        /// It carries out [`Order::Throttle`].
        throttles: bool,
        /// It carries out [`Order::Window`] and what belongs to it.
        windows: bool,
    },
    /// It has this section.
    Section(Section),
    /// All sections were named: orders can come.
    Ready,
    /// The order is carried out.
    Ok,
    /// The order cannot be carried out; why.
    Error(String),
    /// A piece of a section; the bytes follow.
    Piece {
        /// Where the piece belongs.
        offset: u64,
        /// Its length.
        bytes: u32,
    },
    /// A piece of a section, which is in the window until that place is [`Order::Freed`].
    Placed {
        /// Where the piece belongs.
        offset: u64,
        /// Its length.
        bytes: u32,
        /// Where in the window it is.
        place: u64,
    },
    /// The end of an export.
    Done,
    /// The digest of a section.
    Digest(Vec<u8>),
}

/// Whether this can be a name of a workload or section, or a `compatible`.
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= NAME_LIMIT
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._,-".contains(&b))
}

/// A line taken apart.
struct Line<'a> {
    line: &'a str,
    word: &'a str,
    rest: &'a str,
}

impl<'a> Line<'a> {
    fn of(line: &'a str) -> Line<'a> {
        let line = line.strip_suffix('\n').unwrap_or(line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Line { line, word, rest }
    }

    fn wrong(&self, key: &'static str, why: &'static str) -> WireError {
        WireError::Value { line: self.line.to_owned(), key, why }
    }

    fn get(&self, key: &'static str) -> Option<&'a str> {
        self.rest.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
    }

    fn number<T: FromStr>(&self, key: &'static str) -> Result<T, WireError> {
        let digits = |v: &&str| v.bytes().all(|b| b.is_ascii_digit());
        let number = self.get(key).filter(digits).and_then(|v| v.parse().ok());
        number.ok_or_else(|| self.wrong(key, "a decimal number that is not too large"))
    }

    fn name(&self, key: &'static str) -> Result<String, WireError> {
        let name = self.get(key).filter(|v| is_name(v)).map(str::to_owned);
        name.ok_or_else(|| self.wrong(key, "1 to 63 letters, digits, '.', '_', ',' and '-'"))
    }

    fn bytes(&self) -> Result<u32, WireError> {
        let bytes = self.number("bytes")?;
        if bytes > PIECE_LIMIT {
            return Err(self.wrong("bytes", "a piece has 262144 bytes at most"));
        }
        Ok(bytes)
    }

    fn knows(&self, what: &str) -> bool {
        self.get("knows").is_some_and(|all| all.split(',').any(|one| one == what))
    }

    fn unknown(&self) -> WireError {
        WireError::Unknown { line: self.line.to_owned(), word: self.word.to_owned() }
    }
}

impl FromStr for Order {
    type Err = WireError;

    fn from_str(line: &str) -> Result<Order, WireError> {
        let l = Line::of(line);
        let section = || l.name("section");
        Ok(match l.word {
            "activate" => Order::Activate,
            "freeze" => Order::Freeze,
            "thaw" => Order::Thaw,
            "retire" => Order::Retire,
            "discard" => Order::Discard,
            "throttle" => match l.number("percent")? {
                percent @ 0..=THROTTLE_LIMIT => Order::Throttle { percent },
                _ => return Err(l.wrong("percent", "0 to 99")),
            },
            "window" => Order::Window { from: l.number("from")?, size: l.number("size")? },
            "freed" => Order::Freed { place: l.number("place")? },
            "take" => Order::Take {
                section: section()?,
                offset: l.number("offset")?,
                bytes: l.bytes()?,
                place: l.number("place")?,
            },
            "export" => Order::Export { section: section()?, full: l.number::<u8>("full")? != 0 },
            "digest" => Order::Digest { section: section()? },
            "import" => Order::Import { section: section()?, offset: l.number("offset")?, bytes: l.bytes()? },
            "imported" => Order::Imported { section: section()? },
            _ => return Err(l.unknown()),
        })
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Activate => f.write_str("activate"),
            Order::Freeze => f.write_str("freeze"),
            Order::Thaw => f.write_str("thaw"),
            Order::Retire => f.write_str("retire"),
            Order::Discard => f.write_str("discard"),
            Order::Throttle { percent } => write!(f, "throttle percent={percent}"),
            Order::Window { from, size } => write!(f, "window from={from} size={size}"),
            Order::Freed { place } => write!(f, "freed place={place}"),
            Order::Take { section, offset, bytes, place } => {
                write!(f, "take section={section} offset={offset} bytes={bytes} place={place}")
            }
            Order::Export { section, full } => write!(f, "export section={section} full={}", u8::from(*full)),
            Order::Digest { section } => write!(f, "digest section={section}"),
            Order::Import { section, offset, bytes } => {
                write!(f, "import section={section} offset={offset} bytes={bytes}")
            }
            Order::Imported { section } => write!(f, "imported section={section}"),
        }
    }
}

impl FromStr for Report {
    type Err = WireError;

    fn from_str(line: &str) -> Result<Report, WireError> {
        let l = Line::of(line);
        Ok(match l.word {
            "hello" => {
                let state = l.get("state").unwrap_or("new");
                let state = State::NAMES.iter().find(|(_, n)| *n == state).map(|(s, _)| *s);
                Report::Hello {
                    version: l.number("version")?,
                    name: l.name("name")?,
                    state: state.ok_or_else(|| l.wrong("state", "new, active, frozen or retired"))?,
                    throttles: l.knows(THROTTLE),
                    windows: l.knows(WINDOW),
                }
            }
            "section" => Report::Section(Section {
                name: l.name("name")?,
                compatible: l.name("compatible")?,
                version: l.number("version")?,
                size: l.number("size")?,
            }),
            "ready" => Report::Ready,
            "ok" => Report::Ok,
            "error" => Report::Error(l.rest.to_owned()),
            "piece" => Report::Piece { offset: l.number("offset")?, bytes: l.bytes()? },
            "placed" => {
                Report::Placed { offset: l.number("offset")?, bytes: l.bytes()?, place: l.number("place")? }
            }
            "done" => Report::Done,
            "digest" => {
                let digest = l.get("value").and_then(from_hex);
                Report::Digest(digest.ok_or_else(|| l.wrong("value", "up to 64 bytes in hexadecimal"))?)
            }
            _ => return Err(l.unknown()),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Report::Hello { version, name, state, throttles, windows } => {
                write!(f, "hello version={version} name={name} state={}", state.name())?;
                let knows = [throttles.then_some(THROTTLE), windows.then_some(WINDOW)];
                let knows: Vec<&str> = knows.into_iter().flatten().collect();
                if knows.is_empty() { Ok(()) } else { write!(f, " knows={}", knows.join(",")) }
            }
            Report::Section(Section { name, compatible, version, size }) => {
                write!(f, "section name={name} compatible={compatible} version={version} size={size}")
            }
            Report::Ready => f.write_str("ready"),
            Report::Ok => f.write_str("ok"),
            // It must stay one line, and a short one.
            Report::Error(why) => {
                let why = why.replace(['\n', '\r'], " ");
                write!(f, "error {}", why.chars().take(400).collect::<String>().trim())
            }
            Report::Piece { offset, bytes } => write!(f, "piece offset={offset} bytes={bytes}"),
            Report::Placed { offset, bytes, place } => {
                write!(f, "placed offset={offset} bytes={bytes} place={place}")
            }
            Report::Done => f.write_str("done"),
            Report::Digest(value) => {
                f.write_str("digest value=")?;
                value.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let hex = text.bytes().all(|b| b.is_ascii_hexdigit());
    if !text.len().is_multiple_of(2) || text.len() > DIGEST_LIMIT * 2 || !hex {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_line_is_read_as_it_was_written() {
        let data = || "data".to_owned();
        for order in [
            Order::Activate,
            Order::Freeze,
            Order::Thaw,
            Order::Retire,
            Order::Discard,
            Order::Throttle { percent: THROTTLE_LIMIT },
            Order::Window { from: 0, size: 1 << 23 },
            Order::Freed { place: u64::MAX },
            Order::Take { section: data(), offset: 3, bytes: PIECE_LIMIT, place: 4096 },
            Order::Export { section: data(), full: true },
            Order::Digest { section: data() },
            Order::Import { section: data(), offset: u64::MAX, bytes: PIECE_LIMIT },
            Order::Imported { section: data() },
        ] {
            assert_eq!(format!("{order}\n").parse(), Ok(order));
        }
        let hello = |state, throttles, windows| Report::Hello {
            version: VERSION,
            name: "kv".into(),
            state,
            throttles,
            windows,
        };
        let section = Section { name: data(), compatible: "example,kv-v1".into(), version: 3, size: 1 << 40 };
        for report in [
            hello(State::Frozen, true, false),
            hello(State::Active, true, true),
            hello(State::Retired, false, true),
            hello(State::New, false, false),
            Report::Section(section),
            Report::Ready,
            Report::Ok,
            Report::Error("no room left".into()),
            Report::Piece { offset: 4096, bytes: 0 },
            Report::Placed { offset: 1, bytes: 2, place: 3 },
            Report::Done,
            Report::Digest(vec![0, 0xab, 255]),
        ] {
            assert_eq!(format!("{report}\r\n").parse(), Ok(report));
        }
        assert_eq!(Report::Error("two\nlines".into()).to_string(), "error two lines");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, want) in [
            ("", "\"\" is not known"),
            ("dance", "\"dance\" is not known"),
            ("import section=data offset=0 bytes=262145", "262144 bytes at most"),
            ("import section=da/ta offset=0 bytes=1", "section= is missing or wrong"),
            ("import section=data offset=-1 bytes=1", "offset= is missing or wrong"),
            ("take section=data offset=0 bytes=1", "place= is missing or wrong"),
            ("window from=0", "size= is missing or wrong"),
            ("export section=data", "full= is missing or wrong"),
            ("throttle", "percent= is missing or wrong"),
            ("throttle percent=100", "0 to 99"),
            ("import section=data offset=+1 bytes=1", "offset= is missing or wrong"),
        ] {
            let error = line.parse::<Order>().unwrap_err().to_string();
            assert!(error.contains(want), "{line}: {error}");
        }
        for (line, want) in [
            ("hello version=1 name=a state=dancing", "new, active, frozen or retired"),
            ("digest value=abc", "hexadecimal"),
            ("digest value=zz", "hexadecimal"),
            ("digest value=+f", "hexadecimal"),
            ("section name=a compatible=b version=1", "size= is missing or wrong"),
        ] {
            let error = line.parse::<Report>().unwrap_err().to_string();
            assert!(error.contains(want), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_a_reader_panic(line in "\\PC{0,80}") {
            let _ = line.parse::<Order>();
            let _ = line.parse::<Report>();
            let _ = format!("digest value={line}").parse::<Report>();
        }
    }
}
