//! The ACPI tables an instance finds.
//!
//! Hardware-reduced ACPI without I/O APIC: no PIC, PIT, PM timer or reset register is described, so
//! a stock kernel leaves the primary's devices alone. Forced physical APIC destination mode keeps
//! the instance's logical destination register empty; with it set the instance would receive
//! interrupts the primary sends to its own CPUs.

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::PlatformError;

const OEM: [u8; 6] = *b"KMORPH";
const TABLE: [u8; 8] = *b"KMINST  ";
const XSDT_AT: u64 = 0x40;
const FADT_AT: u64 = 0x100;
const DSDT_AT: u64 = 0x240;
const MADT_AT: u64 = 0x300;
/// Room for the tables, bytes.
pub const ROOM: usize = 0x6000;

/// FADT flags (ACPI 6.4, table 5.10).
const FORCE_APIC_PHYSICAL_DESTINATION_MODE: u32 = 1 << 19;
const HW_REDUCED_ACPI: u32 = 1 << 20;
/// IAPC_BOOT_ARCH (table 5.11).
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
/// An APIC id no CPU has. Linux from 6.9 takes the first enabled entry for the machine's boot
/// processor and, finding another one marked so, limits itself to one CPU; this entry goes first
/// and `disable_cpu_apicid=` makes older kernels ignore it.
pub const SACRIFICIAL_APIC_ID: u8 = 0xfe;

/// All tables as one block to be placed at physical address `at`; the RSDP comes first. The CPUs are all that the
/// kernel may ever have; how many of them it starts is its command line's business.
pub fn build(at: u64, cpus: &[u32]) -> Result<Vec<u8>, PlatformError> {
    let mut madt = Sdt::new(*b"APIC", 44, 4, OEM, TABLE, 1);
    madt.write_u32(36, 0xfee0_0000);
    if cpus.len() > 1 {
        madt.append_slice(&[0, 8, SACRIFICIAL_APIC_ID, SACRIFICIAL_APIC_ID, 1, 0, 0, 0]);
    }
    for (n, apic) in cpus.iter().enumerate() {
        let uid = u32::try_from(n).map_err(|e| PlatformError::Invalid(format!("too many CPUs: {e}")))?;
        match u8::try_from(*apic) {
            // Type 0: processor local APIC, enabled.
            Ok(id) if id < SACRIFICIAL_APIC_ID => madt.append_slice(&[0, 8, n as u8, id, 1, 0, 0, 0]),
            // Type 9: processor local x2APIC, enabled.
            _ => {
                let mut e = vec![9u8, 16, 0, 0];
                e.extend_from_slice(&apic.to_le_bytes());
                e.extend_from_slice(&1u32.to_le_bytes());
                e.extend_from_slice(&uid.to_le_bytes());
                madt.append_slice(&e);
            }
        }
    }
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM, TABLE, 1);
    let dsdt_address = at + DSDT_AT;
    fadt.write_u32(40, u32::try_from(dsdt_address).unwrap_or(0)); // 32-bit form; X_DSDT has it in full
    fadt.write_u16(109, VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT);
    fadt.write_u32(112, HW_REDUCED_ACPI | FORCE_APIC_PHYSICAL_DESTINATION_MODE);
    // Minor 1: from 6.3 on Linux wants "online capable" bits in the MADT of newer tables.
    fadt.write_u8(131, 1);
    fadt.write_u64(140, dsdt_address);
    let dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(at + FADT_AT);
    xsdt.add_entry(at + MADT_AT);

    let mut block = vec![0u8; MADT_AT as usize + madt.len()];
    let mut put = |offset: u64, bytes: &[u8]| {
        let o = offset as usize;
        block[o..o + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &bytes_of(&Rsdp::new(OEM, at + XSDT_AT)));
    put(XSDT_AT, &bytes_of(&xsdt));
    put(FADT_AT, fadt.as_slice());
    put(DSDT_AT, dsdt.as_slice());
    put(MADT_AT, madt.as_slice());
    if block.len() > ROOM {
        return Err(PlatformError::Invalid(format!("{} CPUs do not fit the ACPI tables", cpus.len())));
    }
    Ok(block)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut v = Vec::new();
    table.to_aml_bytes(&mut v);
    v
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(b: &[u8]) -> u8 {
        b.iter().fold(0u8, |a, x| a.wrapping_add(*x))
    }

    fn table(block: &[u8], at: usize) -> &[u8] {
        let len = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap()) as usize;
        &block[at..at + len]
    }

    #[test]
    fn checksums_and_pointers_hold() {
        let at = 0x1_4000_2000u64;
        let b = build(at, &[2, 3]).unwrap();
        assert_eq!(sum(&b[..20]), 0);
        assert_eq!(sum(&b[..36]), 0);
        assert_eq!(u64::from_le_bytes(b[24..32].try_into().unwrap()), at + XSDT_AT);
        for t in [XSDT_AT, FADT_AT, DSDT_AT, MADT_AT] {
            assert_eq!(sum(table(&b, t as usize)), 0, "table at {t:#x}");
        }
        let fadt = table(&b, FADT_AT as usize);
        assert_eq!(u64::from_le_bytes(fadt[140..148].try_into().unwrap()), at + DSDT_AT);
        assert_eq!(fadt[112..116], ((1u32 << 20) | (1 << 19)).to_le_bytes());
    }

    #[test]
    fn several_cpus_get_the_sacrificial_entry_first_and_one_does_not() {
        let two = build(0x1000, &[2, 3]).unwrap();
        let m = table(&two, MADT_AT as usize);
        assert_eq!(&m[44..], &[0, 8, 0xfe, 0xfe, 1, 0, 0, 0, 0, 8, 0, 2, 1, 0, 0, 0, 0, 8, 1, 3, 1, 0, 0, 0]);
        let one = build(0x1000, &[2]).unwrap();
        assert_eq!(table(&one, MADT_AT as usize).len(), 52);
    }

    #[test]
    fn large_apic_ids_get_x2apic_entries() {
        let b = build(0x1000, &[300]).unwrap();
        let m = table(&b, MADT_AT as usize);
        assert_eq!(m[44], 9);
        assert_eq!(m[48..52], 300u32.to_le_bytes());
    }
}
