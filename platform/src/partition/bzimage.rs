//! The header of a bzImage, as Documentation/arch/x86/boot.rst defines it.

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use crate::PlatformError;

/// Offset of the setup header in the image and in boot_params.
pub const HEADER: usize = 0x1f1;
const MAGIC: u32 = 0x5372_6448; // "HdrS"
const XLF_KERNEL_64: u16 = 1 << 0;
/// Where the 64-bit entry point lies relative to the loaded kernel.
pub const ENTRY_64: u64 = 0x200;

/// What the loader needs to know of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BzImage {
    /// Kernel release, "6.1.0-54-cloud-amd64".
    pub release: String,
    /// Offset of the protected-mode kernel in the file.
    pub payload_offset: usize,
    /// Bytes the kernel needs at its load address before it finds its memory map.
    pub init_size: u64,
    /// Required alignment of the load address.
    pub alignment: u64,
    /// Longest command line it takes, without NUL.
    pub cmdline_size: usize,
    /// End of the setup header in the file.
    pub setup_end: usize,
}

/// Check an image and read its header. `name` is for messages.
pub fn parse(name: &str, image: &[u8]) -> Result<(BzImage, setup_header), PlatformError> {
    let bad = |why: &str| {
        PlatformError::BadImage(format!(
            "{name} is not a kernel this machine can start: {why}; give a 64-bit x86 bzImage (a distribution's \
             /boot/vmlinuz-<release>)"
        ))
    };
    let bytes = image
        .get(HEADER..HEADER + size_of::<setup_header>())
        .ok_or_else(|| bad(&format!("{} bytes are too few for a setup header", image.len())))?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(bytes);
    let (magic, version) = (header.header, header.version);
    if magic != MAGIC {
        return Err(bad("no \"HdrS\" at offset 0x202"));
    }
    if version < 0x020c {
        return Err(bad(&format!("boot protocol {}.{:02} is older than 2.12", version >> 8, version & 0xff)));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(bad("it has no 64-bit entry point"));
    }
    if header.relocatable_kernel == 0 {
        return Err(bad("it is not relocatable (CONFIG_RELOCATABLE)"));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
    let payload_offset = (sectors + 1) * 512;
    if image.len() <= payload_offset {
        return Err(bad("it is cut off before the kernel itself"));
    }
    // syssize counts the protected-mode code in 16-byte paragraphs.
    let stated = u64::from(header.syssize) * 16;
    if ((image.len() - payload_offset) as u64) + 16 < stated {
        return Err(bad(&format!(
            "it is cut off: {stated} bytes of kernel are announced, {} are there",
            image.len() - payload_offset
        )));
    }
    let alignment = u64::from(header.kernel_alignment);
    if !alignment.is_power_of_two() || !(0x1000..=1 << 30).contains(&alignment) {
        return Err(bad(&format!("its alignment {alignment:#x} makes no sense")));
    }
    let at = usize::from(header.kernel_version) + 0x200;
    let release = image
        .get(at..(at + 128).min(image.len()))
        .and_then(|s| s.split(|b| *b == 0 || *b == b' ').next())
        .and_then(|s| std::str::from_utf8(s).ok())
        .filter(|s| {
            header.kernel_version != 0
                && !s.is_empty()
                && s.bytes().all(|b| b.is_ascii_graphic())
                && !s.contains('/')
        })
        .ok_or_else(|| bad("it does not name its release"))?
        .to_string();
    let image = BzImage {
        release,
        payload_offset,
        init_size: u64::from(header.init_size)
            .max(((image.len() - payload_offset) as u64).next_multiple_of(4096)),
        alignment,
        cmdline_size: header.cmdline_size as usize,
        // boot.rst: the header ends at 0x202 plus the byte at 0x201.
        setup_end: 0x202 + usize::from(image.get(0x201).copied().unwrap_or(0)),
    };
    Ok((image, header))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A minimal image that passes.
    pub(crate) fn sample() -> Vec<u8> {
        let mut v = vec![0u8; 0x4000];
        let mut h = setup_header {
            setup_sects: 3,
            header: MAGIC,
            version: 0x020f,
            xloadflags: XLF_KERNEL_64,
            relocatable_kernel: 1,
            kernel_alignment: 0x20_0000,
            init_size: 0x300_0000,
            cmdline_size: 2047,
            kernel_version: 0x300,
            ..Default::default()
        };
        h.syssize = ((0x4000 - 4 * 512) / 16) as u32;
        v[HEADER..HEADER + size_of::<setup_header>()].copy_from_slice(h.as_slice());
        v[0x201] = 0x66;
        v[0x500..0x500 + 26].copy_from_slice(b"6.1.0-54-cloud-amd64 (x) \0");
        v
    }

    #[test]
    fn reads_the_header() {
        let (i, _) = parse("k", &sample()).unwrap();
        assert_eq!(i.release, "6.1.0-54-cloud-amd64");
        assert_eq!(i.payload_offset, 2048);
        assert_eq!(i.init_size, 0x300_0000);
        assert_eq!(i.setup_end, 0x268);
    }

    #[test]
    fn each_defect_has_its_own_reason() {
        type Harm = fn(&mut Vec<u8>);
        let cases: [(&str, Harm); 6] = [
            ("too few", |v| v.truncate(0x200)),
            ("HdrS", |v| v[0x202] = b'X'),
            ("older than", |v| v[0x207] = 1),
            ("64-bit", |v| v[0x236] = 0),
            ("cut off", |v| v.truncate(0x2000)),
            ("release", |v| v[0x500] = 0),
        ];
        for (want, harm) in cases {
            let mut v = sample();
            harm(&mut v);
            let text = parse("/boot/x", &v).unwrap_err().to_string();
            assert!(text.contains(want) && text.contains("/boot/x"), "{want}: {text}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..0x900), magic: bool) {
            if magic && bytes.len() > 0x240 {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
                bytes[0x207] = 2;
                bytes[0x236] |= 1;
            }
            let _ = parse("x", &bytes);
        }
    }
}
