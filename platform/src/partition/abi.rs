//! The ioctl ABI of `/dev/kmorph` and the control area, as `kmod/include/*.h` define them.
//!
//! `tests/abi.rs` compiles the C headers and compares every size and offset with these.
#![allow(dead_code)] // the ABI is mirrored whole, so that the comparison covers all of it

/// ABI version this crate was written for.
pub const ABI_VERSION: u32 = 2;
/// Most CPUs an instance can have.
pub const MAX_CPUS: usize = 64;
/// Most pool ranges.
pub const MAX_POOL: usize = 32;
/// Most CPUs of the machine the module reports.
pub const MAX_MACHINE_CPUS: usize = 256;
/// Entries of the instance list.
pub const MAX_LISTED: usize = 16;
/// Most handover regions.
pub const MAX_HANDOVERS: usize = 32;
/// Most ranges of memory an instance can get while it runs.
pub const MAX_EXTENTS: usize = 8;
/// Handover regions start at multiples of this, and are multiples of it long.
pub const HANDOVER_ALIGN: u64 = 0x20_0000;
/// Longest wait for a writer to confirm that it no longer is one.
pub const HANDOVER_MAX_US: u32 = 10_000_000;
/// Bytes of text in an event.
pub const EVENT_TEXT: usize = 128;

/// `struct kmorph_head`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Size of the whole structure.
    pub size: u32,
    /// ABI version.
    pub version: u32,
}

/// Structures that start with a [`Head`] and are valid when all other bytes are zero.
///
/// # Safety
/// The type must be `repr(C)`, start with a `Head`, and allow any bit pattern.
#[allow(unsafe_code)] // the promise that makes `request` sound
pub unsafe trait Versioned: Sized {}

/// A zeroed structure with its head filled in.
#[allow(unsafe_code)]
pub fn request<T: Versioned>() -> T {
    // SAFETY: `Versioned` promises that any bit pattern, zero included, is a valid value.
    let mut value: T = unsafe { std::mem::zeroed() };
    let head = Head { size: size_of::<T>() as u32, version: ABI_VERSION };
    // SAFETY: `Versioned` promises that the structure starts with a `Head`.
    unsafe { std::ptr::write((&raw mut value).cast::<Head>(), head) };
    value
}

macro_rules! versioned {
    ($($t:ty),*) => { $(
        // SAFETY: repr(C), starts with `Head`, and holds integers only.
        #[allow(unsafe_code)]
        unsafe impl Versioned for $t {}
    )* };
}

/// `struct kmorph_info`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Info {
    pub head: Head,
    pub role: u32,
    pub instance_id: u32,
    pub tsc_khz: u32,
    pub x2apic: u32,
    pub memory_block_size: u64,
    pub boot_apicid: u32,
    pub door_apicid: u32,
    pub door_vector: u32,
    pub events_lost: u32,
    pub low_base: u64,
    pub low_size: u64,
    pub release: [u8; 64],
}

/// `struct kmorph_pool`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Pool {
    pub head: Head,
    pub base: u64,
    pub size: u64,
    pub source: u32,
    pub mappings: u32,
    pub bad_address: u64,
}

/// `struct kmorph_pool_list`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PoolList {
    pub head: Head,
    pub count: u32,
    pub reserved: u32,
    pub range: [Pool; MAX_POOL],
}

/// `enum kmorph_cpu_state`.
pub mod cpu_state {
    /// Runs the primary kernel.
    pub const ONLINE: u32 = 1;
    /// Offline and free.
    pub const OFFLINE: u32 = 2;
    /// Kept for instances.
    pub const TAKEN: u32 = 3;
    /// Belongs to an instance.
    pub const LENT: u32 = 4;
}

/// `struct kmorph_cpu`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Cpu {
    pub head: Head,
    pub apicid: u32,
    pub cpu: u32,
    pub state: u32,
    pub instance: u32,
}

/// `struct kmorph_cpu_list`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct CpuList {
    pub head: Head,
    pub count: u32,
    pub reserved: u32,
    pub cpu: [Cpu; MAX_MACHINE_CPUS],
}

/// `enum kmorph_instance_state`.
pub mod instance_state {
    /// Owns resources, runs nothing.
    pub const CREATED: u32 = 1;
    /// Started.
    pub const RUNNING: u32 = 2;
    /// Every CPU seen stopped.
    pub const STOPPED: u32 = 3;
    /// A stop was not confirmed by every CPU.
    pub const STUCK: u32 = 4;
}

/// `struct kmorph_instance`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Instance {
    pub head: Head,
    pub id: u32,
    pub state: u32,
    pub incarnation: u64,
    pub base: u64,
    pub size: u64,
    pub control: u64,
    pub pulse_us: u32,
    pub cpu_count: u32,
    pub apicid: [u32; MAX_CPUS],
    pub trampoline: u64,
    pub low_base: u64,
    pub low_size: u64,
    pub started_ns: u64,
    pub stopped_cpus: u64,
    pub extent_count: u32,
    pub reserved: u32,
    pub extent: [Extent; MAX_EXTENTS],
}

/// `struct kmorph_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Extent {
    pub base: u64,
    pub size: u64,
}

/// `struct kmorph_memory`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Memory {
    pub head: Head,
    pub instance: u32,
    pub reserved: u32,
    pub base: u64,
    pub size: u64,
    pub memory_block: u64,
}

/// `struct kmorph_instance_list`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct InstanceList {
    pub head: Head,
    pub count: u32,
    pub reserved: u32,
    pub id: [u32; MAX_LISTED],
}

/// `struct kmorph_start`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Start {
    pub head: Head,
    pub id: u32,
    pub stage: u32,
    pub entry: u64,
    pub boot_params: u64,
    pub started_ns: u64,
    pub started_tsc: u64,
}

/// `struct kmorph_stop`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Stop {
    pub head: Head,
    pub id: u32,
    pub reserved: u32,
    pub stopped_cpus: u64,
    pub duration_ns: u64,
}

/// `struct kmorph_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Ref {
    pub head: Head,
    pub id: u32,
    pub cpu: u32,
}

/// `struct kmorph_link_req`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct LinkReq {
    pub head: Head,
    pub id_a: u32,
    pub id_b: u32,
    pub base: u64,
    pub size: u64,
    pub epoch: u32,
    pub reserved: u32,
}

/// `struct kmorph_handover`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Handover {
    pub head: Head,
    pub key: u64,
    pub size: u64,
    pub base: u64,
    pub writer: u32,
    pub share_count: u32,
    pub share: [u32; MAX_LISTED],
}

/// `struct kmorph_handover_list`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct HandoverList {
    pub head: Head,
    pub count: u32,
    pub reserved: u32,
    pub region: [Handover; MAX_HANDOVERS],
}

/// `struct kmorph_handover_share`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct HandoverShare {
    pub head: Head,
    pub key: u64,
    pub incarnation: u64,
    pub instance: u32,
    pub timeout_us: u32,
}

/// `struct kmorph_handover_assign`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct HandoverAssign {
    pub head: Head,
    pub key: u64,
    pub instance: u32,
    pub timeout_us: u32,
    pub revoke_ns: u64,
}

versioned!(Info, Pool, PoolList, Cpu, CpuList, Instance, InstanceList, Start, Stop, Ref, LinkReq);
versioned!(Memory, Handover, HandoverList, HandoverShare, HandoverAssign);

/// `enum kmorph_event_type`.
pub mod event_type {
    /// The instance's kmorph.ko is up.
    pub const READY: u32 = 1;
    /// Panic notice.
    pub const PANIC: u32 = 2;
    /// A reboot or halt was caught.
    pub const PARKED: u32 = 3;
    /// Both sides of a link are there.
    pub const LINK_UP: u32 = 4;
    /// The other side of a link left.
    pub const LINK_DOWN: u32 = 5;
    /// A STOP finished.
    pub const STOPPED: u32 = 6;
    /// The instance's kmorph.ko was unloaded.
    pub const LEFT: u32 = 7;
}

/// `struct kmorph_event`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Event {
    pub size: u32,
    pub kind: u32,
    pub instance: u32,
    pub cpu: u32,
    pub incarnation: u64,
    pub tsc: u64,
    pub seen_ns: u64,
    pub data: u64,
    pub text: [u8; EVENT_TEXT],
}

/// The control area (`kmorph_shared.h`).
pub mod ctl {
    /// Size of the area, bytes.
    pub const SIZE: u64 = 0x4000;
    /// "KMRPHCTL".
    pub const MAGIC: u64 = 0x4c54_4348_5052_4d4b;
    /// Layout version.
    pub const VERSION: u32 = 3;
    /// Offset of the primary's part.
    pub const OFF_PRIMARY: usize = 0;
    /// Offset of what the instance is granted.
    pub const OFF_GRANTS: usize = 0x200;
    /// Ranges of memory that can be granted.
    pub const EXTENTS: usize = 8;
    /// Offset of the first link.
    pub const OFF_LINK: usize = 0x440;
    /// Links of an instance.
    pub const LINKS: usize = 16;
    /// `enum kmorph_link_state`: the link is in use.
    pub const LINK_LIVE: u32 = 1;
    /// Offset of the instance's part.
    pub const OFF_INSTANCE: usize = 0x1000;
    /// Offset of the pulse lines.
    pub const OFF_PULSE: usize = 0x2000;
    /// Offset of the first handover region.
    pub const OFF_HANDOVER: usize = 0x3040;
    /// Handover regions of an instance.
    pub const HANDOVERS: usize = 32;
    /// Pulse lines.
    pub const CPUS: usize = 64;
    /// Bytes of the reason text.
    pub const TEXT: usize = 192;

    /// `enum kmorph_ctl_state`: kmorph.ko is loaded in the instance.
    pub const READY: u32 = 1;
    /// It panicked.
    pub const PANIC: u32 = 2;
    /// A reboot was caught.
    pub const PARKED: u32 = 3;
    /// kmorph.ko was unloaded.
    pub const LEFT: u32 = 4;

    /// `struct kmorph_ctl_primary`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Primary {
        pub magic: u64,
        pub version: u32,
        pub size: u32,
        pub instance_id: u32,
        pub pulse_us: u32,
        pub incarnation: u64,
        pub base: u64,
        pub region_size: u64,
        pub tsc_khz: u32,
        pub cpu_count: u32,
        pub door: u64,
        pub gone: u32,
        pub reserved: u32,
    }

    /// `struct kmorph_ctl_link`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Link {
        pub base: u64,
        pub size: u64,
        pub peer_id: u32,
        pub epoch: u32,
        pub state: u32,
        pub peer_apicids: [u32; 8],
        pub reserved: u32,
    }

    /// `struct kmorph_ctl_handover`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Handover {
        pub key: u64,
        pub base: u64,
        pub size: u64,
        pub writer: u32,
        pub reserved: [u32; 9],
    }

    /// `struct kmorph_ctl_instance`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Instance {
        pub state: u32,
        pub cpus_online: u32,
        pub boot_nonce: u64,
        pub door: u64,
        pub ready_tsc: u64,
        pub end_tsc: u64,
        pub end_cpu: u32,
        pub notices: u32,
        pub links_seen: u32,
        pub handovers_seen: u32,
        pub release: [u8; 64],
        pub text: [u8; TEXT],
        pub grants_seen: u32,
        pub grants_error: u32,
        pub grants_what: u64,
        pub memory_block: u64,
        pub memory_added: u64,
    }

    /// `struct kmorph_ctl_extent`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Extent {
        pub base: u64,
        pub size: u64,
    }

    /// `struct kmorph_ctl_grants`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Grants {
        pub generation: u32,
        pub cpu_count: u32,
        pub extent_count: u32,
        pub reserved: u32,
        pub apicid: [u32; CPUS],
        pub extent: [Extent; EXTENTS],
    }

    /// `struct kmorph_ctl_pulse`.
    #[repr(C)]
    #[allow(missing_docs)]
    pub struct Pulse {
        pub count: u64,
        pub tsc: u64,
        pub max_gap_tsc: u64,
        pub online: u32,
        pub apicid: u32,
        pub reserved: [u64; 4],
    }
}

/// Text in a fixed-size, NUL-terminated field; whatever is not UTF-8 is replaced.
pub fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).trim().to_string()
}

#[cfg(test)]
#[path = "abi_tests.rs"]
mod tests;
