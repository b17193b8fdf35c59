//! State in one piece of memory whose changes are tracked by page.

use std::io::{self, IoSlice, IoSliceMut};

use crate::handover::Region;
use crate::hash;
use crate::piece::Piece;
use crate::wire::PIECE_LIMIT;

/// Changes are tracked in units of so many bytes.
pub const PAGE: usize = 4096;
/// Bytes before the pages of a piece: where each belongs, little-endian.
const PLACE: usize = 8;
/// Pages of one piece: few enough that whoever owns the memory is not kept waiting.
const PIECE_PAGES: usize = PIECE_LIMIT as usize / (PLACE + PAGE);
/// Longest piece.
pub(crate) const PIECE: usize = PIECE_PAGES * (PLACE + PAGE);

/// One bit a page.
#[derive(Clone, Debug, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(pages: usize) -> Bits {
        Bits(vec![0; pages.div_ceil(64)])
    }

    /// Whether it was not set before.
    fn set(&mut self, page: usize) -> bool {
        let (word, bit) = (&mut self.0[page / 64], 1 << (page % 64));
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    fn clear(&mut self, page: usize) {
        self.0[page / 64] &= !(1 << (page % 64));
    }

    /// The first page at or after this one whose bit is set.
    fn next(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = self.0.get(word)? & (u64::MAX << (from % 64));
        loop {
            if bits != 0 {
                return Some(word * 64 + bits.trailing_zeros() as usize);
            }
            word += 1;
            bits = *self.0.get(word)?;
        }
    }
}

#[derive(Debug)]
enum Bytes {
    Own(Vec<u8>),
    Handover(Region),
}

/// A piece of memory. It begins as zeros.
///
/// It can be handover memory, which is not copied: the new kernel has it when the morph is committed.
///
/// Its digest is a sum over its pages, kept up to date as they are exported or imported, so that giving it takes no
/// time that grows with the memory. It finds mistakes; it is no defence against a workload that lies.
#[derive(Debug)]
pub struct Memory {
    bytes: Bytes,
    /// Changed since they were last exported.
    dirty: Bits,
    /// Ever changed: the others are zeros on both sides.
    touched: Bits,
    /// Pages that became different from what was last exported, since it was made.
    changes: u64,
    hashes: Hashes,
}

impl Memory {
    /// So many bytes, rounded up to whole pages.
    pub fn new(size: usize) -> Memory {
        let pages = size.div_ceil(PAGE);
        Memory {
            bytes: Bytes::Own(vec![0; pages * PAGE]),
            dirty: Bits::new(pages),
            touched: Bits::new(pages),
            changes: 0,
            hashes: Hashes { each: vec![0; pages], sum: 0 },
        }
    }

    /// The same, all of which is there from the beginning: what arrives in a morph waits for no page, and what does not fit
    /// into this kernel shows at once. For memory that is going to be full of state.
    pub fn populated(size: usize) -> Memory {
        let mut memory = Memory::new(size);
        if let Bytes::Own(bytes) = &mut memory.bytes {
            for first in bytes.iter_mut().step_by(PAGE) {
                // It would be left out otherwise: it is zero already.
                *std::hint::black_box(first) = 0;
            }
        }
        memory
    }

    /// A region that changes hands. It is what its last writer left.
    pub fn handover(region: Region) -> Memory {
        Memory { bytes: Bytes::Handover(region), ..Memory::new(0) }
    }

    /// Whether it changes hands instead of being copied.
    pub fn is_handover(&self) -> bool {
        matches!(self.bytes, Bytes::Handover(_))
    }

    /// Its size in bytes.
    pub fn size(&self) -> usize {
        self.bytes().len()
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Own(bytes) => bytes,
            Bytes::Handover(region) => region.bytes(),
        }
    }

    /// These bytes, to be changed. `None` when they are not all in it.
    pub fn change(&mut self, offset: usize, length: usize) -> Option<&mut [u8]> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size())?;
        let bytes = match &mut self.bytes {
            Bytes::Own(bytes) => bytes,
            Bytes::Handover(region) => return region.bytes_mut().get_mut(offset..end),
        };
        for page in offset / PAGE..end.div_ceil(PAGE) {
            self.changes += u64::from(self.dirty.set(page));
            self.touched.set(page);
        }
        bytes.get_mut(offset..end)
    }

    /// Pages that changed and that the next export has therefore, counted since the beginning: what changes twice
    /// between two exports counts once.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// From now on the next export has everything.
    pub fn export_all(&mut self) {
        self.dirty = self.touched.clone();
    }

    /// Pages that changed since they were last exported, from this one on: as many as one piece holds are given to
    /// `take`, where they are, behind a table that says where each belongs. Returns the page to go on with; `None` when
    /// there are no more.
    pub fn export(
        &mut self,
        from: usize,
        take: impl FnOnce(&[IoSlice<'_>]) -> io::Result<()>,
    ) -> io::Result<Option<usize>> {
        let Bytes::Own(bytes) = &self.bytes else { return Ok(None) };
        let (mut pages, mut next) = (Vec::with_capacity(PIECE_PAGES), Some(from));
        while pages.len() < PIECE_PAGES {
            next = next.and_then(|from| self.dirty.next(from));
            let Some(page) = next else { break };
            pages.push(page);
            self.dirty.clear(page);
            self.hashes.put(page, &bytes[page * PAGE..(page + 1) * PAGE]);
            next = Some(page + 1);
        }
        if pages.is_empty() {
            return Ok(None);
        }
        let table: Vec<u8> = pages.iter().flat_map(|page| ((page * PAGE) as u64).to_le_bytes()).collect();
        let mut parts = vec![IoSlice::new(&table)];
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            parts.extend(run.first().map(|p| IoSlice::new(&bytes[p * PAGE..(p + run.len()) * PAGE])));
        }
        take(&parts)?;
        Ok(next)
    }

    /// Put the pages of a piece where they belong.
    pub fn import(&mut self, piece: &Piece<'_>) -> Result<(), String> {
        let Bytes::Own(own) = &mut self.bytes else {
            return Err("handover memory is not copied".into());
        };
        let (size, count) = (own.len(), piece.len() / (PLACE + PAGE));
        if !piece.len().is_multiple_of(PLACE + PAGE) || count > PIECE_PAGES {
            return Err(format!("a piece of {} bytes is not pages with their places", piece.len()));
        }
        let mut table = vec![0; count * PLACE];
        piece.read(0, &mut [IoSliceMut::new(&mut table)]).map_err(|e| e.to_string())?;
        let mut pages: Vec<usize> = Vec::with_capacity(count);
        for place in table.as_chunks::<PLACE>().0 {
            let at = u64::from_le_bytes(*place);
            let page = usize::try_from(at).ok().filter(|at| at.is_multiple_of(PAGE) && *at < size);
            let page = page.ok_or_else(|| format!("a page at {at} is not within {size} bytes"))? / PAGE;
            if pages.last().is_some_and(|before| *before >= page) {
                return Err(format!("a page at {at} comes behind a later one"));
            }
            pages.push(page);
        }
        let (mut parts, mut rest, mut passed) = (vec![], &mut own[..], 0);
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            let begin = run.first().copied().unwrap_or_default();
            let (_, from) = rest.split_at_mut((begin - passed) * PAGE);
            let (part, later) = from.split_at_mut(run.len() * PAGE);
            parts.push(IoSliceMut::new(part));
            (rest, passed) = (later, begin + run.len());
        }
        piece.read(table.len(), &mut parts).map_err(|e| e.to_string())?;
        for page in pages {
            self.touched.set(page);
            // What is exported next is not what came from another memory.
            self.dirty.set(page);
            self.hashes.put(page, &own[page * PAGE..(page + 1) * PAGE]);
        }
        Ok(())
    }

    /// Zeros again. Handover memory is the other kernel's, and stays as it is.
    pub fn reset(&mut self) {
        if !self.is_handover() {
            *self = Memory::new(self.size());
        }
    }

    /// The same for two memories with the same content, if everything that changed was exported, or imported.
    pub fn digest(&self) -> Vec<u8> {
        let which = match &self.bytes {
            Bytes::Own(_) => self.hashes.sum,
            Bytes::Handover(region) => region.key(),
        };
        [which.to_le_bytes(), (self.size() as u64).to_le_bytes()].concat()
    }
}

/// Of each page, as it was last exported or imported; 0 for one that never was; and their sum.
#[derive(Clone, Debug, Default)]
struct Hashes {
    each: Vec<u64>,
    sum: u64,
}

impl Hashes {
    fn put(&mut self, page: usize, bytes: &[u8]) {
        // A page that was written with zeros counts as one that never was.
        let hash = hash::of_page(bytes, page);
        let before = std::mem::replace(&mut self.each[page], hash);
        self.sum = self.sum.wrapping_sub(before).wrapping_add(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copy(from: &mut Memory, to: &mut Memory) -> usize {
        let (mut next, mut copied) = (Some(0), 0);
        while let Some(at) = next {
            let mut piece = vec![];
            let take = |parts: &[IoSlice<'_>]| {
                parts.iter().for_each(|p| piece.extend_from_slice(p));
                Ok(())
            };
            next = from.export(at, take).unwrap();
            assert!(piece.len() <= PIECE);
            to.import(&Piece::from(&*piece)).unwrap();
            copied += piece.len() / (PLACE + PAGE) * PAGE;
        }
        copied
    }

    #[test]
    fn only_what_changed_is_copied_again() {
        let (mut a, mut b) = (Memory::new(1_000_000), Memory::new(1_000_000));
        assert_eq!(a.digest(), b.digest());
        a.change(10_000, 500_000).unwrap().fill(7);
        assert_eq!(copy(&mut a, &mut b), 123 * PAGE);
        assert_eq!((a.bytes() == b.bytes(), a.digest() == b.digest()), (true, true));
        assert_eq!(copy(&mut a, &mut b), 0);
        a.change(PAGE - 1, 2).unwrap().fill(9);
        assert_ne!(a.bytes(), b.bytes());
        assert_eq!(copy(&mut a, &mut b), 2 * PAGE);
        assert_eq!(a.digest(), b.digest());
        // A third memory gets everything there ever was, and no page nobody wrote.
        let mut c = Memory::new(1_000_000);
        a.export_all();
        assert_eq!(copy(&mut a, &mut c), 125 * PAGE);
        assert_eq!(c.digest(), b.digest());
    }

    #[test]
    fn a_difference_changes_the_digest() {
        let (mut a, mut b) = (Memory::new(PAGE * 3), Memory::new(PAGE * 3));
        for (m, at) in [(&mut a, 0), (&mut b, PAGE)] {
            m.change(at, 1).unwrap()[0] = 1;
            copy(m, &mut Memory::new(PAGE * 3));
        }
        assert_ne!(a.digest(), b.digest(), "the same page elsewhere");
        assert_ne!(Memory::new(PAGE).digest(), Memory::new(PAGE * 2).digest());
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let mut m = Memory::new(PAGE * 2);
        let places = |all: &[u64]| all.iter().flat_map(|at| at.to_le_bytes()).collect::<Vec<u8>>();
        let many = vec![0; PIECE_PAGES + 1];
        for (at, length, want) in [
            (&[1][..], PAGE, "a page at 1 is not within 8192 bytes"),
            (&[0], PAGE - 1, "4103 bytes is not pages"),
            (&[PAGE as u64 * 2], PAGE, "a page at 8192 is not within 8192 bytes"),
            (&[u64::MAX], PAGE, "is not within 8192 bytes"),
            (&[PAGE as u64, 0], 2 * PAGE, "a page at 0 comes behind a later one"),
            (&[0, 0], 2 * PAGE, "a page at 0 comes behind a later one"),
            (&many, many.len() * PAGE, "is not pages"),
        ] {
            let piece = [places(at), vec![1; length]].concat();
            let error = m.import(&Piece::from(&*piece)).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        assert!(m.bytes().iter().all(|b| *b == 0));
        assert!(m.change(PAGE, PAGE + 1).is_none() && m.change(usize::MAX, 2).is_none());
    }

    proptest! {
        #[test]
        fn rounds_of_changes_end_in_equal_memories(
            rounds in proptest::collection::vec(proptest::collection::vec((0usize..400_000, 1usize..9000, any::<u8>()), 0..8), 1..6)
        ) {
            let (mut a, mut b) = (Memory::new(300_000), Memory::new(300_000));
            for round in rounds {
                for (at, length, value) in round {
                    if let Some(bytes) = a.change(at, length) {
                        bytes.fill(value);
                    }
                }
                copy(&mut a, &mut b);
                prop_assert!(a.bytes() == b.bytes());
                prop_assert_eq!(a.digest(), b.digest());
            }
        }
    }
}
