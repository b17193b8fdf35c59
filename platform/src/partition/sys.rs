//! The only place that talks to `/dev/kmorph` and touches physical memory.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::abi::{self, request};
use crate::{InstanceId, PlatformError};

mod calls {
    use super::abi;
    const IOC: u8 = b'm';
    nix::ioctl_readwrite!(info, IOC, 0x01, abi::Info);
    nix::ioctl_readwrite!(pool_add, IOC, 0x02, abi::Pool);
    nix::ioctl_readwrite!(pool_remove, IOC, 0x03, abi::Pool);
    nix::ioctl_readwrite!(pool_list, IOC, 0x04, abi::PoolList);
    nix::ioctl_readwrite!(cpu_take, IOC, 0x05, abi::Cpu);
    nix::ioctl_readwrite!(cpu_give, IOC, 0x06, abi::Cpu);
    nix::ioctl_readwrite!(cpu_list, IOC, 0x07, abi::CpuList);
    nix::ioctl_readwrite!(create, IOC, 0x08, abi::Instance);
    nix::ioctl_readwrite!(query, IOC, 0x09, abi::Instance);
    nix::ioctl_readwrite!(instance_list, IOC, 0x0a, abi::InstanceList);
    nix::ioctl_readwrite!(start, IOC, 0x0b, abi::Start);
    nix::ioctl_readwrite!(stop, IOC, 0x0c, abi::Stop);
    nix::ioctl_readwrite!(destroy, IOC, 0x0d, abi::Ref);
    nix::ioctl_readwrite!(link_add, IOC, 0x0f, abi::LinkReq);
    nix::ioctl_readwrite!(cpu_assign, IOC, 0x12, abi::Cpu);
    nix::ioctl_readwrite!(cpu_withdraw, IOC, 0x13, abi::Cpu);
    nix::ioctl_readwrite!(memory_assign, IOC, 0x1a, abi::Memory);
    nix::ioctl_readwrite!(handover_create, IOC, 0x14, abi::Handover);
    nix::ioctl_readwrite!(handover_destroy, IOC, 0x15, abi::Handover);
    nix::ioctl_readwrite!(handover_list, IOC, 0x16, abi::HandoverList);
    nix::ioctl_readwrite!(handover_share, IOC, 0x17, abi::HandoverShare);
    nix::ioctl_readwrite!(handover_unshare, IOC, 0x18, abi::HandoverShare);
    nix::ioctl_readwrite!(handover_assign, IOC, 0x19, abi::HandoverAssign);
}

/// The opened device.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
}

/// One method per ioctl: fills the structure, returns the errno on failure. The structure carries
/// the module's answer in both cases.
macro_rules! ioctl {
    ($(#[$doc:meta])* $name:ident, $type:ty) => {
        $(#[$doc])*
        pub fn $name(&self, arg: &mut $type) -> Result<(), Errno> {
            // SAFETY: the descriptor is open, and `arg` is a valid structure of the type the
            // request number encodes (size and direction included).
            unsafe { calls::$name(self.file.as_raw_fd(), arg) }.map(|_| ())
        }
    };
}

impl Device {
    /// Open the device.
    pub fn open(path: &Path) -> Result<Device, PlatformError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| {
                let hint = match e.kind() {
                    std::io::ErrorKind::NotFound => "load the module: modprobe kmorph && modprobe kerf-vsock",
                    std::io::ErrorKind::PermissionDenied => "kmorphd must run as root",
                    _ => "see dmesg",
                };
                PlatformError::Unavailable(format!("cannot open {}: {e}; {hint}", path.display()))
            })?;
        Ok(Device { file, path: path.to_path_buf() })
    }

    /// Open it a second time: each open file has its own event queue.
    pub fn reopen(&self) -> Result<Device, PlatformError> {
        Device::open(&self.path)
    }

    /// Watch for events on the tokio reactor.
    pub fn watch(self) -> Result<AsyncFd<Device>, PlatformError> {
        // SAFETY: `Device` owns its file and never replaces it, so the descriptor stays the same
        // and open for as long as the `AsyncFd` owns the `Device`.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }
            .map_err(|e| PlatformError::os("watch /dev/kmorph for events", e.into_parts().1))
    }

    ioctl!(/// KMORPH_INFO
        info, abi::Info);
    ioctl!(/// KMORPH_POOL_ADD
        pool_add, abi::Pool);
    ioctl!(/// KMORPH_POOL_REMOVE
        pool_remove, abi::Pool);
    ioctl!(/// KMORPH_POOL_LIST
        pool_list, abi::PoolList);
    ioctl!(/// KMORPH_CPU_TAKE
        cpu_take, abi::Cpu);
    ioctl!(/// KMORPH_CPU_GIVE
        cpu_give, abi::Cpu);
    ioctl!(/// KMORPH_CPU_LIST
        cpu_list, abi::CpuList);
    ioctl!(/// KMORPH_CREATE
        create, abi::Instance);
    ioctl!(/// KMORPH_INSTANCE_LIST
        instance_list, abi::InstanceList);
    ioctl!(/// KMORPH_START
        start, abi::Start);
    ioctl!(/// KMORPH_STOP
        stop, abi::Stop);
    ioctl!(/// KMORPH_DESTROY
        destroy, abi::Ref);
    ioctl!(/// KMORPH_LINK_ADD
        link_add, abi::LinkReq);
    ioctl!(/// KMORPH_CPU_ASSIGN
        cpu_assign, abi::Cpu);
    ioctl!(/// KMORPH_CPU_WITHDRAW
        cpu_withdraw, abi::Cpu);
    ioctl!(/// KMORPH_MEMORY_ASSIGN
        memory_assign, abi::Memory);
    ioctl!(/// KMORPH_HANDOVER_CREATE
        handover_create, abi::Handover);
    ioctl!(/// KMORPH_HANDOVER_DESTROY
        handover_destroy, abi::Handover);
    ioctl!(/// KMORPH_HANDOVER_LIST
        handover_list, abi::HandoverList);
    ioctl!(/// KMORPH_HANDOVER_SHARE
        handover_share, abi::HandoverShare);
    ioctl!(/// KMORPH_HANDOVER_UNSHARE
        handover_unshare, abi::HandoverShare);
    ioctl!(/// KMORPH_HANDOVER_ASSIGN
        handover_assign, abi::HandoverAssign);

    /// KMORPH_QUERY of one instance.
    pub fn query(&self, id: InstanceId) -> Result<abi::Instance, Errno> {
        let mut q: abi::Instance = request();
        q.id = u32::from(id.0);
        // SAFETY: as in `ioctl!`.
        unsafe { calls::query(self.file.as_raw_fd(), &mut q) }.map(|_| q)
    }

    /// Read pending events into `buf`; 0 when there is none.
    pub fn read_events(&self, buf: &mut [abi::Event]) -> Result<usize, Errno> {
        // SAFETY: the pointer and length describe `buf`; any bytes are a valid `Event`.
        let n =
            unsafe { libc::read(self.file.as_raw_fd(), buf.as_mut_ptr().cast(), std::mem::size_of_val(buf)) };
        match Errno::result(n) {
            Ok(n) => Ok(n as usize / size_of::<abi::Event>()),
            Err(Errno::EAGAIN) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// An event structure to read into.
    pub fn blank_event() -> abi::Event {
        // SAFETY: `Event` is repr(C) and holds integers only.
        unsafe { std::mem::zeroed() }
    }

    /// Map physical memory, write-back, shared with whatever kernel owns it.
    pub fn map(&self, base: u64, len: u64) -> Result<Mapping, PlatformError> {
        Mapping::new(self.file.as_fd(), base, len)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

/// A window on physical memory that another kernel may be changing.
///
/// No reference to its bytes is ever made: everything is copied or loaded word by word.
#[derive(Debug)]
pub struct Mapping {
    at: NonNull<u8>,
    len: usize,
    base: u64,
}

// SAFETY: the mapping is plain shared memory; every access below is a copy or an atomic load, so
// it may be used from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; there is no interior state besides the memory itself.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, base: u64, len: u64) -> Result<Mapping, PlatformError> {
        let what = || format!("map physical memory {base:#x}+{len:#x}");
        let len = usize::try_from(len)
            .ok()
            .and_then(std::num::NonZeroUsize::new)
            .ok_or_else(|| PlatformError::Invalid(format!("{}: bad length", what())))?;
        let offset = i64::try_from(base).map_err(|e| PlatformError::os(what(), e))?;
        // SAFETY: a fresh mapping at an address the kernel chooses; it aliases no Rust object.
        let at = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, fd, offset)
        }
        .map_err(|e| PlatformError::os(what(), e))?;
        Ok(Mapping { at: at.cast(), len: len.get(), base })
    }

    /// Physical address of the first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // a mapping is never empty
    pub fn len(&self) -> usize {
        self.len
    }

    fn check(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: `offset <= end <= self.len`, so the result stays inside the mapping.
        (end <= self.len).then(|| unsafe { self.at.as_ptr().add(offset) })
    }

    /// Copy bytes in. `false` when the range is outside the mapping.
    #[must_use]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        self.check(offset, bytes.len()).is_some_and(|to| {
            // SAFETY: `to` has room for `bytes`, which is Rust memory and cannot overlap.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            true
        })
    }

    /// Fill with zeros. `false` when the range is outside the mapping.
    #[must_use]
    pub fn zero(&self, offset: usize, len: usize) -> bool {
        self.check(offset, len).is_some_and(|to| {
            // SAFETY: `to` has room for `len` bytes.
            unsafe { std::ptr::write_bytes(to, 0, len) };
            true
        })
    }

    /// Copy bytes out. `false` when the range is outside the mapping.
    #[must_use]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> bool {
        self.check(offset, bytes.len()).is_some_and(|from| {
            // SAFETY: `from` has `bytes.len()` readable bytes; a torn copy is still plain bytes.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
            true
        })
    }

    /// Load a u64 with acquire order; `None` when outside or misaligned.
    pub fn load_u64(&self, offset: usize) -> Option<u64> {
        let at = self.check(offset, 8)?.cast::<u64>();
        // SAFETY: inside the mapping, aligned, and only ever accessed atomically by both sides.
        at.is_aligned().then(|| unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Acquire))
    }

    /// Load a u32 with acquire order; `None` when outside or misaligned.
    pub fn load_u32(&self, offset: usize) -> Option<u32> {
        let at = self.check(offset, 4)?.cast::<u32>();
        // SAFETY: as in `load_u64`.
        at.is_aligned().then(|| unsafe { AtomicU32::from_ptr(at) }.load(Ordering::Acquire))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and no pointer to it outlives `self`.
        if let Err(error) = unsafe { munmap(self.at.cast(), self.len) } {
            tracing::error!(base = self.base, %error, "munmap failed");
        }
    }
}

/// The CPU's time stamp counter, common to all kernels of the machine.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux leaves it enabled for user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}
