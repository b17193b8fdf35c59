//! Memory that a workload writes and that of the other kernel reads: pieces go there instead of into a socket. It is a
//! file for both of them, and never mapped: when it is taken away, reading and writing are errors and nothing else.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};

use nix::sys::uio::pwritev;

use crate::piece::length;

/// Pieces that were put somewhere and not freed yet, in order.
#[derive(Debug)]
struct Slot {
    place: u64,
    /// With what was left out before it because it did not fit there.
    bytes: u64,
    free: bool,
}

/// Which part of the window is in use: each piece is behind the one before it, or at the beginning again.
#[derive(Debug)]
struct Ring {
    size: u64,
    next: u64,
    used: u64,
    slots: VecDeque<Slot>,
}

impl Ring {
    fn new(size: u64) -> Ring {
        Ring { size, next: 0, used: 0, slots: VecDeque::new() }
    }

    /// Where a piece of so many bytes could go, and what is left out before it.
    fn place(&self, bytes: u64) -> Option<(u64, u64)> {
        let left = self.size - self.next;
        let (place, skipped) = if bytes <= left { (self.next, 0) } else { (0, left) };
        let fits = self.used.checked_add(skipped)?.checked_add(bytes)? <= self.size;
        fits.then_some((place, skipped))
    }

    fn put(&mut self, bytes: u64) -> Option<u64> {
        let (place, skipped) = self.place(bytes)?;
        self.next = place + bytes;
        self.used += skipped + bytes;
        self.slots.push_back(Slot { place, bytes: skipped + bytes, free: false });
        Some(place)
    }

    /// Whether there was such a piece.
    fn free(&mut self, place: u64) -> bool {
        let found = self.slots.iter_mut().find(|s| s.place == place && !s.free);
        let known = found.map(|s| s.free = true).is_some();
        while self.slots.front().is_some_and(|s| s.free) {
            self.used -= self.slots.pop_front().map_or(0, |s| s.bytes);
        }
        if self.slots.is_empty() {
            (self.next, self.used) = (0, 0);
        }
        known
    }
}

/// A workload's part of the window.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) file: File,
    from: u64,
    ring: Ring,
}

impl Window {
    /// So many bytes of the file from this place on are this workload's to write. It reads wherever it is told.
    pub(crate) fn new(file: File, from: u64, size: u64) -> Window {
        Window { file, from, ring: Ring::new(size) }
    }

    /// Whether a piece of so many bytes ever fits.
    pub(crate) fn is_for(&self, bytes: usize) -> bool {
        bytes as u64 <= self.ring.size
    }

    /// Whether there is room for one now.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.ring.place(bytes as u64).is_some()
    }

    /// How much room is worth going on for when there was too little for this: waking up for each piece costs more than
    /// the piece.
    pub(crate) fn worth(&self, bytes: usize) -> usize {
        bytes.max(usize::try_from(self.ring.size / 4).unwrap_or(bytes))
    }

    /// The other workload has taken what is at this place.
    pub(crate) fn freed(&mut self, place: u64) -> bool {
        place.checked_sub(self.from).is_some_and(|place| self.ring.free(place))
    }

    /// Put a piece there, and say where that is; `None` when there is no room now.
    pub(crate) fn put(&mut self, parts: &[IoSlice<'_>]) -> io::Result<Option<u64>> {
        let bytes = length(parts);
        let Some(place) = self.ring.put(bytes as u64) else { return Ok(None) };
        let place = self.from + place;
        let at = |place: u64| i64::try_from(place).map_err(io::Error::other);
        // Files take all of it at once, as a rule.
        let written = pwritev(&self.file, parts, at(place)?)?;
        if written < bytes {
            let all: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
            let rest = all.concat().split_off(written);
            std::os::unix::fs::FileExt::write_all_at(&self.file, &rest, place + written as u64)?;
        }
        Ok(Some(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_are_where_it_says_and_there_is_room_again_when_they_are_taken() {
        let file = tempfile::tempfile().unwrap();
        let mut window = Window::new(file.try_clone().unwrap(), 100, 10);
        let mut put = |parts: [&[u8]; 2]| window.put(&parts.map(IoSlice::new)).unwrap();
        assert_eq!(
            (put([b"abc", b"d"]), put([b"", b"efgh"]), put([b"ij", b"k"])),
            (Some(100), Some(104), None)
        );
        let mut all = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut all, 100).unwrap();
        assert_eq!(&all, b"abcdefgh");
        assert!(window.is_for(10) && !window.is_for(11) && window.has_room(2) && !window.has_room(3));
        // Behind the first one there is no room for three before the second is taken, too.
        assert!(window.freed(104) && !window.freed(104) && !window.freed(7) && !window.has_room(3));
        assert!(window.freed(100) && window.has_room(10));
    }

    proptest! {
        #[test]
        fn no_two_pieces_overlap_and_nothing_is_lost(
            size in 1u64..200,
            steps in proptest::collection::vec((1u64..80, 0usize..4, any::<prop::sample::Index>()), 1..100),
        ) {
            let mut ring = Ring::new(size);
            let mut there: Vec<(u64, u64)> = vec![];
            for (bytes, frees, which) in steps {
                if let Some(place) = ring.put(bytes) {
                    prop_assert!(place + bytes <= size);
                    for (at, n) in &there {
                        prop_assert!(place + bytes <= *at || at + n <= place, "{place}+{bytes} in {there:?}");
                    }
                    there.push((place, bytes));
                } else {
                    prop_assert!(!there.is_empty() || bytes > size);
                }
                for _ in 0..frees.min(there.len()) {
                    let (place, _) = there.remove(which.index(there.len()));
                    prop_assert!(ring.free(place));
                }
            }
            for (place, _) in there {
                prop_assert!(ring.free(place));
            }
            prop_assert_eq!(ring.place(size), Some((0, 0)));
        }
    }
}
