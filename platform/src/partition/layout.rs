//! Where everything lies in an instance's region.
//!
//! ```text
//! B+0x000000  boot_params, command line (0x1000), ACPI tables (0x2000)      e820: ACPI
//! B+0x080000  control area                                                  e820: reserved
//! B+0x100000  RAM
//! B+0x200000  the kernel (moved up to its alignment), init_size bytes
//!             ...
//! T-initrd    the initramfs, page aligned, just below T
//! T           vsock area of the link with the primary                       e820: reserved
//! B+S         end
//! ```

use super::bzimage::BzImage;
use crate::{MemoryRange, PlatformError};

/// Regions start at multiples of this.
pub const REGION_ALIGN: u64 = 0x20_0000;
/// Offset of the command line.
pub const CMDLINE: u64 = 0x1000;
/// Longest command line with its NUL (COMMAND_LINE_SIZE on x86).
pub const CMDLINE_MAX: usize = 2048;
/// Offset of the ACPI tables.
pub const ACPI: u64 = 0x2000;
/// Offset of the reserved part that holds the control area.
pub const CONTROL: u64 = 0x8_0000;
/// Offset of ordinary memory.
pub const RAM: u64 = 0x10_0000;
/// Lowest offset of the kernel.
pub const KERNEL: u64 = 0x20_0000;
/// Memory a booting kernel needs besides its image and initramfs; below it boots end in out-of-memory
/// panics that are hard to read.
pub const HEADROOM: u64 = 24 << 20;
const PAGE: u64 = 0x1000;

/// The plan for one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The region.
    pub region: MemoryRange,
    /// Physical address the kernel is loaded at.
    pub kernel: u64,
    /// Physical address of the initramfs.
    pub initramfs: u64,
    /// Its length.
    pub initramfs_len: u64,
    /// The vsock area.
    pub vsock: MemoryRange,
}

fn align_up(value: u64, align: u64) -> Option<u64> {
    value.checked_add(align - 1).map(|v| v & !(align - 1))
}

/// Smallest region a kernel with this initramfs can boot in, bytes.
pub fn minimum(image: &BzImage, initramfs_len: u64, vsock: u64) -> u64 {
    let align = image.alignment.max(REGION_ALIGN);
    let pages = initramfs_len.div_ceil(PAGE).saturating_mul(PAGE);
    align
        .saturating_add(image.init_size)
        .saturating_add(pages)
        .saturating_add(vsock)
        .saturating_add(HEADROOM)
        .div_ceil(REGION_ALIGN)
        .saturating_mul(REGION_ALIGN)
}

impl Layout {
    /// Lay out a region, or say why it is too small.
    pub fn plan(
        region: MemoryRange,
        image: &BzImage,
        initramfs_len: u64,
        vsock: u64,
    ) -> Result<Layout, PlatformError> {
        let need = minimum(image, initramfs_len, vsock);
        let too_small = || {
            PlatformError::Invalid(format!(
                "{} MiB of memory are too few for this kernel: it needs at least {} MiB (image {} MiB, initramfs {} \
                 MiB, vsock area {} MiB); raise memory-bytes in the instance's definition",
                region.size >> 20,
                need >> 20,
                image.init_size >> 20,
                initramfs_len >> 20,
                vsock >> 20
            ))
        };
        if !region.base.is_multiple_of(REGION_ALIGN) || !region.size.is_multiple_of(PAGE) {
            return Err(PlatformError::Invalid(format!(
                "region {:#x}+{:#x} is not aligned to {} MiB and whole pages",
                region.base,
                region.size,
                REGION_ALIGN >> 20
            )));
        }
        if region.size < need {
            return Err(too_small());
        }
        let align = image.alignment.max(REGION_ALIGN);
        let kernel = align_up(region.base + KERNEL, align).ok_or_else(too_small)?;
        let top = region.end().checked_sub(vsock).ok_or_else(too_small)?;
        let initramfs = top.checked_sub(initramfs_len).map(|a| a & !(PAGE - 1)).ok_or_else(too_small)?;
        if kernel.checked_add(image.init_size).is_none_or(|end| end > initramfs) {
            return Err(too_small());
        }
        Ok(Layout { region, kernel, initramfs, initramfs_len, vsock: MemoryRange { base: top, size: vsock } })
    }

    /// Physical address of boot_params.
    pub fn boot_params(&self) -> u64 {
        self.region.base
    }

    /// Physical address of the control area.
    pub fn control(&self) -> u64 {
        self.region.base + CONTROL
    }

    /// The memory map the instance gets: (base, size, e820 type), ascending.
    pub fn e820(&self, low: MemoryRange) -> [(u64, u64, u32); 5] {
        const E820_RAM: u32 = 1;
        const E820_RESERVED: u32 = 2;
        const E820_ACPI: u32 = 3;
        let b = self.region.base;
        [
            (low.base, low.size, E820_RAM),
            (b, CONTROL, E820_ACPI),
            (b + CONTROL, RAM - CONTROL, E820_RESERVED),
            (b + RAM, self.vsock.base - b - RAM, E820_RAM),
            (self.vsock.base, self.vsock.size, E820_RESERVED),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> BzImage {
        BzImage {
            release: "6.1".into(),
            payload_offset: 512,
            init_size: 54 << 20,
            alignment: REGION_ALIGN,
            cmdline_size: 2047,
            setup_end: 0x268,
        }
    }

    #[test]
    fn parts_do_not_overlap_and_fill_the_region() {
        let region = MemoryRange { base: 0x4000_0000, size: 128 << 20 };
        let l = Layout::plan(region, &image(), 5_000_001, 8 << 20).unwrap();
        assert_eq!(l.kernel, 0x4020_0000);
        assert_eq!(l.vsock.end(), region.end());
        assert!(l.initramfs + l.initramfs_len <= l.vsock.base);
        assert_eq!(l.initramfs % PAGE, 0);
        let map = l.e820(MemoryRange { base: 0x2_0000, size: 0x8000 });
        for w in map[1..].windows(2) {
            assert_eq!(w[0].0 + w[0].1, w[1].0, "gap or overlap in {map:x?}");
        }
        assert_eq!(map[1].0, region.base);
        assert_eq!(map[4].0 + map[4].1, region.end());
    }

    #[test]
    fn too_small_names_the_minimum() {
        let min = minimum(&image(), 1 << 20, 8 << 20);
        let fits = MemoryRange { base: 0x4000_0000, size: min };
        assert!(Layout::plan(fits, &image(), 1 << 20, 8 << 20).is_ok());
        let less = MemoryRange { base: 0x4000_0000, size: min - REGION_ALIGN };
        let text = Layout::plan(less, &image(), 1 << 20, 8 << 20).unwrap_err().to_string();
        assert!(text.contains(&format!("at least {} MiB", min >> 20)), "{text}");
    }

    #[test]
    fn huge_numbers_do_not_wrap() {
        let mut i = image();
        i.init_size = u64::MAX - 5;
        let region = MemoryRange { base: 0x4000_0000, size: 1 << 30 };
        assert!(Layout::plan(region, &i, u64::MAX - 7, 8 << 20).is_err());
    }

    #[test]
    fn misaligned_region_is_refused() {
        let region = MemoryRange { base: 0x4000_1000, size: 1 << 30 };
        assert!(Layout::plan(region, &image(), 0, 8 << 20).is_err());
    }
}
