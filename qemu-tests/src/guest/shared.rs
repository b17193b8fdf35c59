//! A handover region mapped by a process of an instance: the only place of the scenarios that
//! touches memory another kernel may be writing.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const DEVICE: &str = "/dev/kmorph-handover";
const ABI_VERSION: u32 = 1;
/// Mappings are made of these.
pub const PAGE: usize = 2 << 20;

/// `struct kmorph_handover_state` of `kmorph_handover.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    size_of_this: u32,
    version: u32,
    pub key: u64,
    pub size: u64,
    pub changes: u64,
    pub writer: u32,
    pub writable: u32,
}

/// `struct kmorph_handover_keys`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    size_of_this: u32,
    version: u32,
    count: u32,
    reserved: u32,
    key: [u64; 32],
}

mod calls {
    nix::ioctl_readwrite!(select, b'm', 0x40, super::State);
    nix::ioctl_readwrite!(state, b'm', 0x41, super::State);
    nix::ioctl_readwrite!(keys, b'm', 0x42, super::Keys);
}

/// The device, opened, with a region selected.
#[derive(Debug)]
pub struct Selected(File);

impl Selected {
    /// Nothing selected yet.
    pub fn none() -> Result<Selected, Errno> {
        // Another errno than that of an unknown key.
        OpenOptions::new().read(true).write(true).open(DEVICE).map(Selected).map_err(|_| Errno::ENODEV)
    }

    pub fn open(key: u64) -> Result<(Selected, State), Errno> {
        let this = Selected::none()?;
        let state = this.select(key)?;
        Ok((this, state))
    }

    pub fn select(&self, key: u64) -> Result<State, Errno> {
        let mut s =
            State { size_of_this: size_of::<State>() as u32, version: ABI_VERSION, key, ..State::default() };
        // SAFETY: the descriptor is open and `s` is the structure the request number encodes.
        unsafe { calls::select(self.0.as_raw_fd(), &mut s) }.map(|_| s)
    }

    pub fn state(&self) -> Result<State, Errno> {
        let mut s =
            State { size_of_this: size_of::<State>() as u32, version: ABI_VERSION, ..State::default() };
        // SAFETY: as in `select`.
        unsafe { calls::state(self.0.as_raw_fd(), &mut s) }.map(|_| s)
    }

    /// All keys workloads are told of.
    pub fn keys() -> Result<Vec<u64>, Errno> {
        let device = Selected::none()?;
        let mut k = Keys { size_of_this: size_of::<Keys>() as u32, version: ABI_VERSION, ..Keys::default() };
        // SAFETY: as in `select`.
        unsafe { calls::keys(device.0.as_raw_fd(), &mut k) }?;
        Ok(k.key.iter().take(k.count as usize).copied().collect())
    }

    /// The open file, for calls that need no mapping.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// pwrite() from the beginning of a mapping.
    pub fn write_from(&self, at: i64, from: &Memory, len: usize) -> Result<usize, Errno> {
        let bytes = from.at(0, len)?;
        // SAFETY: the range lies inside the mapping; the kernel checks the access itself.
        Errno::result(unsafe { libc::pwrite(self.0.as_raw_fd(), bytes.cast(), len, at) }).map(|n| n as usize)
    }

    /// pread() to the beginning of a mapping.
    pub fn read_into(&self, at: i64, into: &Memory, len: usize) -> Result<usize, Errno> {
        let bytes = into.at(0, len)?;
        // SAFETY: as in `write_from`.
        Errno::result(unsafe { libc::pread(self.0.as_raw_fd(), bytes.cast(), len, at) }).map(|n| n as usize)
    }

    /// Sleep until the writer has changed since the last look, the region is withdrawn, or the time is up.
    pub fn sleep(&self, ms: u16) -> Result<PollFlags, Errno> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(ms))?;
        Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
    }

    /// Map a part of it, readable and writable.
    pub fn map(&self, offset: i64, len: usize, flags: MapFlags) -> Result<Memory, Errno> {
        let size = std::num::NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses; it aliases no Rust object.
        let at = unsafe { mmap(None, size, rights, flags, &self.0, offset) }?;
        Ok(Memory { at: at.cast(), len })
    }
}

/// A mapping. No reference to its bytes is ever made: another kernel may be writing them.
#[derive(Debug)]
pub struct Memory {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain shared memory; every access below is a copy or a volatile store.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, Errno> {
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        // SAFETY: `offset <= end <= self.len`: inside the mapping.
        if end <= self.len { Ok(unsafe { self.at.as_ptr().add(offset) }) } else { Err(Errno::EINVAL) }
    }

    /// Read directly.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), Errno> {
        let from = self.at(offset, into.len())?;
        // SAFETY: inside the mapping; a torn copy is still plain bytes.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Write directly: raises SIGBUS when this kernel is not the writer.
    pub fn copy(&self, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Store a word directly: raises SIGBUS when this kernel is not the writer.
    pub fn store(&self, offset: usize, word: u64) -> Result<(), Errno> {
        let to = self.at(offset, 8)?.cast::<u64>();
        // SAFETY: inside the mapping, which is page aligned, and callers use multiples of eight.
        unsafe { to.write_volatile(word) };
        Ok(())
    }

    /// Have the kernel read the first word: EFAULT when the region is no longer shared with this one.
    pub fn probe(&self) -> Result<(), Errno> {
        let (out, _back) = UnixStream::pair().map_err(|_| Errno::EIO)?;
        let from = self.at(0, 8)?;
        // SAFETY: the range lies inside the mapping; the kernel checks the access itself.
        Errno::result(unsafe { libc::write(out.as_raw_fd(), from.cast(), 8) }).map(drop)
    }

    /// Wait on the first word as processes that share it do, for no time, when it has another value.
    pub fn shared_futex(&self) -> Result<(), Errno> {
        let mut word = [0; 4];
        self.read(0, &mut word)?;
        let at = self.at(0, word.len())?;
        let other = !u32::from_ne_bytes(word);
        let no_time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the word lies inside the mapping; the kernel checks the access itself.
        let done = unsafe { libc::syscall(libc::SYS_futex, at, libc::FUTEX_WAIT, other, &no_time) };
        Errno::result(done).map(drop)
    }

    /// Have the kernel write bytes there: EFAULT when this kernel is not the writer.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Errno> {
        let to = self.at(offset, bytes.len())?;
        let (mut out, back) = UnixStream::pair().map_err(|_| Errno::EIO)?;
        out.write_all(bytes).map_err(|_| Errno::EIO)?;
        let mut done = 0;
        while done < bytes.len() {
            // SAFETY: the range lies inside the mapping; the kernel checks the access itself.
            let n = unsafe { libc::read(back.as_raw_fd(), to.add(done).cast(), bytes.len() - done) };
            match Errno::result(n)? {
                0 => return Err(Errno::EIO),
                n => done += n as usize,
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and no pointer into it outlives `self`.
        if let Err(e) = unsafe { munmap(self.at.cast(), self.len) } {
            println!("workload: munmap: {e}");
        }
    }
}
