//! The zero page and the kernel command line.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::bzimage::{BzImage, HEADER};
use super::layout::{ACPI, CMDLINE, CMDLINE_MAX, Layout};
use crate::{MemoryRange, PlatformError};

/// Command-line words every instance needs; each keeps a stock kernel off the primary's devices or
/// makes it fit for sharing the machine (see docs/kernel-modules.md).
const BASE: &[&str] = &[
    "nokaslr",
    "no5lvl",
    "no_ipi_broadcast=1",
    "pci=off",
    "8250.nr_uarts=0",
    "printk.devkmsg=on",
    "panic=0",
    "tsc=reliable",
    "nmi_watchdog=0",
    "hpet=disable",
    "module_blacklist=kvm,kvm_intel,kvm_amd",
];

/// What the command line is made from.
#[derive(Clone, Copy)]
pub struct CmdlineParts<'a> {
    /// TSC frequency of the machine: calibrating it would use the primary's timer.
    pub tsc_khz: u32,
    /// Physical address of the control area.
    pub control: u64,
    /// Number of the instance.
    pub instance: u16,
    /// Which of its lives this is.
    pub incarnation: u64,
    /// CPUs of the instance.
    pub cpus: usize,
    /// CPUs it gets later.
    pub later_cpus: usize,
    /// Whether it gets memory later.
    pub later_memory: bool,
    /// Path of the agent in the initramfs.
    pub agent: &'a str,
    /// The user's part.
    pub user: &'a str,
}

/// The command line. The user's words come before those the instance cannot do without.
pub fn cmdline(parts: &CmdlineParts<'_>, image: &BzImage) -> Result<String, PlatformError> {
    if let Some(c) = parts.user.chars().find(|c| c.is_control() || !c.is_ascii()) {
        return Err(PlatformError::Invalid(format!(
            "the kernel command line has the character {c:?}; only printable ASCII is possible"
        )));
    }
    let mut line = BASE.join(" ");
    if !parts.user.trim().is_empty() {
        line.push(' ');
        line.push_str(parts.user.trim());
    }
    let mut own = String::new();
    if parts.cpus + parts.later_cpus > 1 {
        own.push_str(&format!(" disable_cpu_apicid={:#x}", super::acpi::SACRIFICIAL_APIC_ID));
    }
    if parts.later_cpus > 0 {
        // The others run another kernel still: to start them would kill it. And a kernel that starts with one CPU
        // takes the lock prefixes out of its code; putting them back when it gets a second one stops all work.
        own.push_str(&format!(" maxcpus={} noreplace-smp", parts.cpus));
    }
    if parts.later_memory {
        own.push_str(" memhp_default_state=online_movable memory_hotplug.memmap_on_memory=1");
    }
    own.push_str(&format!(
        " tsc_early_khz={} kmorph.control={:#x} kmorph.instance={} kmorph.incarnation={} rdinit={}",
        parts.tsc_khz, parts.control, parts.instance, parts.incarnation, parts.agent
    ));
    // Before "--": what follows it goes to init.
    match line.find(" -- ") {
        Some(at) => line.insert_str(at, &own),
        None => line.push_str(&own),
    }
    let max = image.cmdline_size.min(CMDLINE_MAX - 1);
    if line.len() > max {
        return Err(PlatformError::Invalid(format!(
            "the kernel command line has {} characters, {} too many for this kernel; shorten the {} of --kernel-cmdline",
            line.len(),
            line.len() - max,
            parts.user.len()
        )));
    }
    Ok(line)
}

/// The zero page, one page long.
pub fn zero_page(
    layout: &Layout,
    low: MemoryRange,
    file: &[u8],
    image: &BzImage,
) -> Result<Vec<u8>, PlatformError> {
    let mut bp = boot_params::default();
    // Copy exactly the part of the header the image has; anything beyond stays zero.
    let end = image.setup_end.clamp(HEADER, HEADER + size_of::<setup_header>());
    let from =
        file.get(HEADER..end).ok_or_else(|| PlatformError::BadImage("the setup header is cut off".into()))?;
    bp.hdr.as_mut_slice()[..from.len()].copy_from_slice(from);
    let command_line = layout.region.base + CMDLINE;
    bp.hdr.vid_mode = 0xffff;
    bp.hdr.type_of_loader = 0xff;
    bp.hdr.loadflags |= 1; // LOADED_HIGH
    bp.hdr.code32_start = layout.kernel as u32;
    bp.hdr.ramdisk_image = layout.initramfs as u32;
    bp.ext_ramdisk_image = (layout.initramfs >> 32) as u32;
    bp.hdr.ramdisk_size = layout.initramfs_len as u32;
    bp.ext_ramdisk_size = (layout.initramfs_len >> 32) as u32;
    bp.hdr.cmd_line_ptr = command_line as u32;
    bp.ext_cmd_line_ptr = (command_line >> 32) as u32;
    bp.acpi_rsdp_addr = layout.region.base + ACPI;
    let map = layout.e820(low);
    bp.e820_entries = map.len() as u8;
    for (slot, (addr, size, kind)) in bp.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    Ok(bp.as_slice().to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::bzimage::{parse, tests::sample};
    use super::*;

    #[test]
    fn zero_page_fields_lie_where_the_protocol_says() {
        let file = sample();
        let (image, _) = parse("k", &file).unwrap();
        let region = MemoryRange { base: 0x1_4000_0000, size: 128 << 20 };
        let layout = Layout::plan(region, &image, 4096, 8 << 20).unwrap();
        let page = zero_page(&layout, MemoryRange { base: 0x20000, size: 0x8000 }, &file, &image).unwrap();
        let u32_at = |o: usize| u32::from_le_bytes(page[o..o + 4].try_into().unwrap());
        let u64_at = |o: usize| u64::from_le_bytes(page[o..o + 8].try_into().unwrap());
        assert_eq!(page.len(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(u64_at(0x70), region.base + ACPI);
        assert_eq!((u64::from(u32_at(0xc0)) << 32) | u64::from(u32_at(0x218)), layout.initramfs);
        assert_eq!((u64::from(u32_at(0xc8)) << 32) | u64::from(u32_at(0x228)), region.base + CMDLINE);
        assert_eq!(page[0x1e8], 5);
        assert_eq!((u64_at(0x2d0), u64_at(0x2d8), u32_at(0x2e0)), (0x20000, 0x8000, 1));
        assert_eq!(page[0x210], 0xff);
    }

    #[test]
    fn command_line_keeps_own_words_last_and_checks_length() {
        let (image, _) = parse("k", &sample()).unwrap();
        let parts = CmdlineParts {
            instance: 1,
            incarnation: 4,
            tsc_khz: 1_000_000,
            control: 0x4008_0000,
            cpus: 2,
            later_cpus: 0,
            later_memory: false,
            agent: "/.kmorph/agent",
            user: "quiet a=b",
        };
        let line = cmdline(&parts, &image).unwrap();
        assert!(
            line.ends_with("tsc_early_khz=1000000 kmorph.control=0x40080000 kmorph.instance=1 kmorph.incarnation=4 rdinit=/.kmorph/agent"),
            "{line}"
        );
        assert!(line.contains(" quiet a=b disable_cpu_apicid=0xfe "), "{line}");
        let with_args = cmdline(&CmdlineParts { user: "quiet -- single", ..parts }, &image).unwrap();
        assert!(with_args.ends_with("rdinit=/.kmorph/agent -- single"), "{with_args}");
        let grows =
            cmdline(&CmdlineParts { cpus: 1, later_cpus: 1, later_memory: true, ..parts }, &image).unwrap();
        assert!(
            grows.contains(
                " disable_cpu_apicid=0xfe maxcpus=1 noreplace-smp memhp_default_state=online_movable \
                 memory_hotplug.memmap_on_memory=1 "
            ),
            "{grows}"
        );
        assert!(!line.contains("maxcpus") && !line.contains("memhp"), "{line}");
        let long = "x".repeat(2100);
        let e = cmdline(
            &CmdlineParts {
                instance: 1,
                incarnation: 4,
                tsc_khz: 1,
                control: 0,
                cpus: 1,
                later_cpus: 0,
                later_memory: false,
                agent: "/a",
                user: &long,
            },
            &image,
        )
        .unwrap_err();
        assert!(e.to_string().contains("too many"), "{e}");
        let e = cmdline(
            &CmdlineParts {
                instance: 1,
                incarnation: 4,
                tsc_khz: 1,
                control: 0,
                cpus: 1,
                later_cpus: 0,
                later_memory: false,
                agent: "/a",
                user: "a\nb",
            },
            &image,
        )
        .unwrap_err();
        assert!(e.to_string().contains("printable"), "{e}");
    }
}
