//! What a section with open files is made of: a table of the files, and blocks of their content.
//!
//! A piece is whole records. Numbers are little-endian, texts have their length before them (16 bits).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Content is compared in blocks of so many bytes.
pub(super) const BLOCK: usize = 4096;
/// Bytes of blocks that follow each other and go along together.
pub(super) const RUN: usize = 64 << 10;

const TABLE: u8 = b'T';
const FILE: u8 = b'F';
const CONTENT: u8 = b'B';

/// What kind of file it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It has a name, and its content goes along.
    Along(PathBuf),
    /// It has a name, and its content is there in the new kernel, too.
    There(PathBuf),
    /// It has no name any more.
    Unlinked,
    /// It never had one: `memfd_create`.
    Memory {
        /// The name that is shown of it.
        name: Vec<u8>,
        seals: u32,
    },
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    /// Name in the section.
    pub(super) name: String,
    /// Number of the file whose content this is: several may be open on one.
    pub(super) content: u64,
    pub(super) kind: Kind,
    /// As `F_GETFL` gives them.
    pub(super) flags: u32,
    pub(super) close_on_exec: bool,
    pub(super) position: u64,
    pub(super) size: u64,
    /// Permissions and owner.
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record<'a> {
    /// So many files follow, and there are no others.
    Table(u32),
    File(Meta),
    /// One or several blocks, the last of which may be cut off by the end of the file.
    Blocks {
        content: u64,
        at: u64,
        bytes: &'a [u8],
    },
}

fn text(out: &mut Vec<u8>, text: &[u8]) {
    // Names and paths are short.
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&text[..usize::from(length)]);
}

pub(super) fn table(out: &mut Vec<u8>, files: u32) {
    out.push(TABLE);
    out.extend_from_slice(&files.to_le_bytes());
}

/// Head of blocks.
pub(super) const BLOCK_HEAD: usize = 1 + 8 + 8 + 4;

pub(super) fn blocks(out: &mut Vec<u8>, content: u64, at: u64, bytes: &[u8]) {
    out.push(CONTENT);
    out.extend_from_slice(&content.to_le_bytes());
    out.extend_from_slice(&at.to_le_bytes());
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(bytes);
}

impl Meta {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(FILE);
        text(out, self.name.as_bytes());
        out.extend_from_slice(&self.content.to_le_bytes());
        let (kind, what, seals) = match &self.kind {
            Kind::Along(path) => (0, path.as_os_str().as_bytes(), 0),
            Kind::There(path) => (1, path.as_os_str().as_bytes(), 0),
            Kind::Unlinked => (2, &[][..], 0),
            Kind::Memory { name, seals } => (3, name.as_slice(), *seals),
        };
        out.extend_from_slice(&[kind, u8::from(self.close_on_exec)]);
        text(out, what);
        for number in [seals, self.flags, self.mode, self.owner.0, self.owner.1] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.position.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
    }
}

/// What is left of a piece.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(length)?;
        self.0 = later;
        Some(now)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.first_chunk().map(|b| u32::from_le_bytes(*b))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.first_chunk().map(|b| u64::from_le_bytes(*b))
    }

    fn text(&mut self) -> Option<Vec<u8>> {
        let length = self.take(2)?.first_chunk().map(|b| u16::from_le_bytes(*b))?;
        self.take(length.into()).map(<[u8]>::to_vec)
    }

    fn meta(&mut self) -> Option<Meta> {
        let (name, content) = (String::from_utf8(self.text()?).ok()?, self.u64()?);
        let (kind, close_on_exec) = (self.byte()?, self.byte()? != 0);
        let (what, seals) = (self.text()?, self.u32()?);
        let path = |what| PathBuf::from(OsString::from_vec(what));
        Some(Meta {
            name,
            content,
            kind: match kind {
                0 => Kind::Along(path(what)),
                1 => Kind::There(path(what)),
                2 => Kind::Unlinked,
                3 => Kind::Memory { name: what, seals },
                _ => return None,
            },
            close_on_exec,
            flags: self.u32()?,
            mode: self.u32()?,
            owner: (self.u32()?, self.u32()?),
            position: self.u64()?,
            size: self.u64()?,
        })
    }

    fn record(&mut self) -> Option<Record<'a>> {
        Some(match self.byte()? {
            TABLE => Record::Table(self.u32()?),
            FILE => Record::File(self.meta()?),
            CONTENT => {
                let (content, at, length) = (self.u64()?, self.u64()?, self.u32()? as usize);
                let bytes = self.take(length).filter(|b| b.len() <= RUN)?;
                Record::Blocks { content, at, bytes }
            }
            _ => return None,
        })
    }
}

/// The records of a piece.
pub(super) fn records(piece: &[u8]) -> Result<Vec<Record<'_>>, String> {
    let (mut rest, mut all) = (Rest(piece), vec![]);
    while !rest.0.is_empty() {
        let at = piece.len() - rest.0.len();
        all.push(rest.record().ok_or_else(|| format!("a piece makes no sense at byte {at}"))?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind() -> impl Strategy<Value = Kind> {
        let path = "[a-z/]{1,40}".prop_map(PathBuf::from);
        prop_oneof![
            path.clone().prop_map(Kind::Along),
            path.prop_map(Kind::There),
            Just(Kind::Unlinked),
            (any::<Vec<u8>>(), any::<u32>()).prop_map(|(name, seals)| Kind::Memory { name, seals }),
        ]
    }

    fn meta() -> impl Strategy<Value = Meta> {
        let numbers = any::<(u64, u32, bool, u64, u64, u32, (u32, u32))>();
        ("[a-z]{1,63}", kind(), numbers).prop_map(|(name, kind, n)| {
            let (content, flags, close_on_exec, position, size, mode, owner) = n;
            Meta { name, content, kind, flags, close_on_exec, position, size, mode, owner }
        })
    }

    proptest! {
        #[test]
        fn records_are_read_as_they_were_written(
            files in proptest::collection::vec(meta(), 0..4),
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
            at in any::<u64>(),
        ) {
            let mut piece = vec![];
            table(&mut piece, files.len() as u32);
            files.iter().for_each(|f| f.encode(&mut piece));
            let before = piece.len();
            blocks(&mut piece, 7, at, &bytes);
            prop_assert_eq!(piece.len() - before, BLOCK_HEAD + bytes.len());
            let mut want = vec![Record::Table(files.len() as u32)];
            want.extend(files.into_iter().map(Record::File));
            want.push(Record::Blocks { content: 7, at, bytes: &bytes });
            prop_assert_eq!(records(&piece), Ok(want));
        }

        #[test]
        fn whatever_comes_nothing_panics(piece in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = records(&piece);
        }

        #[test]
        fn a_piece_that_is_cut_is_refused(files in proptest::collection::vec(meta(), 1..3), cut in 1usize..20) {
            let mut piece = vec![];
            files.iter().for_each(|f| f.encode(&mut piece));
            piece.truncate(piece.len() - cut);
            prop_assert!(records(&piece).is_err());
        }
    }
}
