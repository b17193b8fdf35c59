//! Memory that changes hands instead of being copied: a region that belongs to no kernel, mapped by the workload in the
//! old kernel and in the new one. The device and its ABI are those of `kmod/include/kmorph_handover.h`.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const DEVICE: &str = "/dev/kmorph-handover";
const ABI_VERSION: u32 = 1;
/// KMORPH_MAX_HANDOVERS.
const MOST: usize = 32;

/// `struct kmorph_handover_state`.
#[repr(C)]
#[derive(Default)]
struct State {
    size_of_this: u32,
    version: u32,
    key: u64,
    size: u64,
    changes: u64,
    writer: u32,
    writable: u32,
}

/// `struct kmorph_handover_keys`.
#[repr(C)]
#[derive(Default)]
struct Keys {
    size_of_this: u32,
    version: u32,
    count: u32,
    reserved: u32,
    key: [u64; MOST],
}

mod calls {
    nix::ioctl_readwrite!(select, b'm', 0x40, super::State);
    nix::ioctl_readwrite!(keys, b'm', 0x42, super::Keys);
}

/// Name of the device in devtmpfs.
pub const NODE: &str = "kmorph-handover";

/// Select the region of this key, which is not a workload's own but carries the state of a morph, on a device that was just
/// opened: it is written and read there from now on. Its size in bytes.
pub fn select(device: &File, key: u64) -> io::Result<u64> {
    let mut state = State { size_of_this: size_of::<State>(), version: ABI_VERSION, key, ..State::default() };
    // SAFETY: the descriptor is open and `state` is the structure the request number encodes.
    let selected = unsafe { calls::select(device.as_raw_fd(), &mut state) };
    selected.map_err(|e| io::Error::other(format!("region {key:#x} of {DEVICE}: {e}")))?;
    Ok(state.size)
}

/// The instance's region, mapped.
#[derive(Debug)]
pub struct Region {
    at: NonNull<u8>,
    size: usize,
    key: u64,
    _device: File,
}

// SAFETY: plain memory that only this owner reaches in this process.
unsafe impl Send for Region {}
// SAFETY: shared references only read.
unsafe impl Sync for Region {}

fn size_of<T>() -> u32 {
    u32::try_from(std::mem::size_of::<T>()).unwrap_or(u32::MAX)
}

impl Region {
    /// Map the region that is shared with this kernel; the first one when there are several. It can be read, and written
    /// while this kernel is the instance: a write at any other time ends the process with SIGBUS.
    pub fn open() -> io::Result<Region> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
        let mut keys = Keys { size_of_this: size_of::<Keys>(), version: ABI_VERSION, ..Keys::default() };
        // SAFETY: the descriptor is open and `keys` is the structure the request number encodes.
        unsafe { calls::keys(device.as_raw_fd(), &mut keys) }?;
        let none =
            || io::Error::new(io::ErrorKind::NotFound, "no handover memory is shared with this kernel");
        let key = keys.key.first().copied().filter(|_| keys.count > 0).ok_or_else(none)?;
        let mut state =
            State { size_of_this: size_of::<State>(), version: ABI_VERSION, key, ..State::default() };
        // SAFETY: as above.
        unsafe { calls::select(device.as_raw_fd(), &mut state) }?;
        let size = usize::try_from(state.size).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(size).ok_or_else(none)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address the kernel chooses; it aliases nothing.
        let at = unsafe { mmap(None, length, rights, MapFlags::MAP_SHARED, &device, 0) }?;
        Ok(Region { at: at.cast(), size, key, _device: device })
    }

    /// Its number.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// All of it. Between the commit of a morph and the moment this workload is activated nobody writes; before that the
    /// workload of the other kernel may, so what is read then means nothing.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has so many bytes for as long as `self` lives. Who calls this before it is activated gets
        // bytes that change under it; the service does not, it waits.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.size) }
    }

    /// All of it, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else in this process has it.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.size) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`, and no reference into it outlives `self`. It cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.at.cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_the_header_has_them() {
        assert_eq!((size_of::<State>(), size_of::<Keys>()), (40, 16 + 8 * MOST as u32));
        let header = include_str!("../../../kmod/include/kmorph_abi.h");
        let most = format!("#define KMORPH_MAX_HANDOVERS\t{MOST}");
        assert!(header.contains(&most), "{most}");
    }

    #[test]
    fn without_the_device_there_is_none() {
        if !std::path::Path::new(DEVICE).exists() {
            assert_eq!(Region::open().unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
