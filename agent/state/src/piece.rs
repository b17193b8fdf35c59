//! Pieces of sections, on their way out and in.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::sys::uio::preadv;

/// Takes the pieces of an export.
///
/// Whoever has to hold a lock while a piece is gathered does so for [`Sink::take`] alone: the two others may wait for the
/// other kernel.
pub trait Sink {
    /// Wait until a piece of so many bytes can be taken.
    fn ready(&mut self, bytes: usize) -> io::Result<()>;

    /// Take a piece, 256 KiB at most, made of these parts one behind the other. It is copied; nobody is waited for.
    fn take(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Send what was taken.
    fn send(&mut self) -> io::Result<()>;

    /// All three for a piece that is in one place.
    fn piece(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.ready(bytes.len())?;
        self.take(offset, &[IoSlice::new(bytes)])?;
        self.send()
    }
}

/// Bytes of a piece in parts.
pub(crate) fn length(parts: &[IoSlice<'_>]) -> usize {
    parts.iter().map(|p| p.len()).sum()
}

struct Each<F>(F);

impl<F: FnMut(u64, &[u8]) -> io::Result<()>> Sink for Each<F> {
    fn ready(&mut self, _bytes: usize) -> io::Result<()> {
        Ok(())
    }

    fn take(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let parts: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
        (self.0)(offset, &parts.concat())
    }

    fn send(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A sink that gives each piece and its offset to a function.
pub fn each(take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> impl Sink {
    Each(take)
}

#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    Here(&'a [u8]),
    Window(&'a File, u64),
}

/// A piece that has come. Its bytes are read where they are, which may be memory that another kernel writes: nothing that
/// was read once is as it was when it is read again.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    place: Place<'a>,
    length: usize,
}

impl<'a> From<&'a [u8]> for Piece<'a> {
    fn from(bytes: &'a [u8]) -> Piece<'a> {
        Piece { place: Place::Here(bytes), length: bytes.len() }
    }
}

impl<'a> Piece<'a> {
    /// One that is in this file, from this place on.
    pub(crate) fn window(file: &'a File, place: u64, length: usize) -> Piece<'a> {
        Piece { place: Place::Window(file, place), length }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// All of it.
    pub fn bytes(&self) -> io::Result<Cow<'a, [u8]>> {
        match self.place {
            Place::Here(bytes) => Ok(Cow::Borrowed(bytes)),
            Place::Window(file, place) => {
                let mut bytes = vec![0; self.length];
                file.read_exact_at(&mut bytes, place)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    /// Read from `at` on, one part after the other. All of it has to be in the piece.
    pub fn read(&self, at: usize, parts: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let wanted: usize = parts.iter().map(|p| p.len()).sum();
        let ends = || io::Error::new(io::ErrorKind::UnexpectedEof, "a piece ends before what it should have");
        let end = at.checked_add(wanted).filter(|end| *end <= self.length).ok_or_else(ends)?;
        match self.place {
            Place::Here(bytes) => {
                let mut rest = bytes.get(at..end).ok_or_else(ends)?;
                for part in parts {
                    let (now, later) = rest.split_at_checked(part.len()).ok_or_else(ends)?;
                    part.copy_from_slice(now);
                    rest = later;
                }
                Ok(())
            }
            Place::Window(file, place) => {
                let mut from = place.checked_add(at as u64).ok_or_else(ends)?;
                let mut parts = parts;
                while !parts.is_empty() {
                    let offset = i64::try_from(from).map_err(|_| ends())?;
                    match preadv(file, parts, offset)? {
                        0 if parts.iter().all(|p| p.is_empty()) => break,
                        0 => return Err(ends()),
                        n => {
                            IoSliceMut::advance_slices(&mut parts, n);
                            from += n as u64;
                        }
                    }
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_sink_of_a_function_gets_whole_pieces() {
        let mut got = vec![];
        let mut sink = each(|at, piece| {
            got.push((at, piece.to_vec()));
            Ok(())
        });
        sink.take(3, &[IoSlice::new(b"ab"), IoSlice::new(b"c")]).unwrap();
        sink.piece(4, b"d").unwrap();
        drop(sink);
        assert_eq!(got, [(3, b"abc".to_vec()), (4, b"d".to_vec())]);
    }

    #[test]
    fn a_piece_in_a_file_that_ends_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let piece = Piece::window(&file, 6, 8);
        assert_eq!(piece.bytes().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut buffer = [0; 8];
        let error = piece.read(0, &mut [IoSliceMut::new(&mut buffer)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn parts_are_read_alike_wherever_they_are(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            at in 0usize..210,
            lengths in proptest::collection::vec(0usize..60, 0..5),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[&[0xee; 11][..], &bytes].concat(), 0).unwrap();
            let read = |piece: Piece<'_>| {
                let mut parts: Vec<Vec<u8>> = lengths.iter().map(|n| vec![0; *n]).collect();
                let mut slices: Vec<IoSliceMut<'_>> = parts.iter_mut().map(|p| IoSliceMut::new(p)).collect();
                piece.read(at, &mut slices).map(|()| parts.concat()).map_err(|e| e.kind())
            };
            let end = at + lengths.iter().sum::<usize>();
            let want = bytes.get(at..end).map(<[u8]>::to_vec).ok_or(io::ErrorKind::UnexpectedEof);
            prop_assert_eq!(read(Piece::from(&*bytes)), want.clone());
            prop_assert_eq!(read(Piece::window(&file, 11, bytes.len())), want);
        }
    }
}
