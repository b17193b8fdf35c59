//! What the other side of a morph runs on: a number, CPUs that no instance has and none is defined with, and memory
//! from the pool.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use kmorph_platform::{CpuInfo, CpuState, InstanceId, InstanceSpec, Inventory};

/// The highest number; the other sides of morphs are numbered from there downwards, where definitions are rare.
const HIGHEST: u16 = 511;

/// Numbers and CPUs that are spoken for.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken {
    pub(super) ids: BTreeSet<u16>,
    pub(super) cpus: BTreeSet<u32>,
}

/// The other side of this instance: as large as it is. Empty `wanted`: any CPUs that are free.
pub(super) fn side(
    name: String,
    of: &InstanceSpec,
    wanted: &[u32],
    inventory: &Inventory,
    taken: &Taken,
) -> Result<InstanceSpec, String> {
    let id = (1..=HIGHEST).rev().find(|id| !taken.ids.contains(id));
    let id = InstanceId(id.ok_or("every number is in use")?);
    let free = |c: &&CpuInfo| !c.boot && c.state != CpuState::Lent && !taken.cpus.contains(&c.apic_id);
    let mut free: Vec<&CpuInfo> = inventory.cpus.iter().filter(free).collect();
    // Those that nobody uses; then the primary's, its first ones last.
    free.sort_by_key(|c| (c.state == CpuState::Online, Reverse(c.apic_id)));
    let free: Vec<u32> = free.iter().map(|c| c.apic_id).collect();
    let cpus = if wanted.is_empty() {
        let count = of.cpus.len();
        if free.len() < count {
            return Err(format!(
                "the new kernel needs {count} CPUs that no instance has, there are {}: {free:?}; say which it gets with --cpus, or define fewer for others",
                free.len()
            ));
        }
        free[..count].to_vec()
    } else {
        if let Some(cpu) = wanted.iter().find(|cpu| !free.contains(cpu)) {
            return Err(format!("CPU {cpu} is not free; free are {free:?}"));
        }
        if wanted.iter().collect::<BTreeSet<_>>().len() < wanted.len() {
            return Err(format!("a CPU is named twice: {wanted:?}"));
        }
        wanted.to_vec()
    };
    let room = inventory.free_bytes();
    if room < of.memory_bytes {
        return Err(format!(
            "the new kernel needs {} MiB of the pool beside the old one, {} MiB are free",
            of.memory_bytes >> 20,
            room >> 20
        ));
    }
    Ok(InstanceSpec { name, id, cpus, memory_bytes: of.memory_bytes, memory_base: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmorph_platform::MemoryRange;

    fn machine() -> Inventory {
        let cpu = |apic_id| CpuInfo {
            apic_id,
            number: apic_id,
            state: if apic_id == 2 { CpuState::Lent } else { CpuState::Online },
            owner: None,
            boot: apic_id == 0,
        };
        Inventory {
            cpus: (0..6).map(cpu).collect(),
            pool: vec![MemoryRange { base: 1 << 30, size: 1 << 30 }],
            used: vec![(MemoryRange { base: 1 << 30, size: 256 << 20 }, InstanceId(1))],
        }
    }

    fn web() -> InstanceSpec {
        InstanceSpec {
            name: "web".into(),
            id: InstanceId(1),
            cpus: vec![2],
            memory_bytes: 256 << 20,
            memory_base: Some(1 << 30),
        }
    }

    fn pick(of: &InstanceSpec, wanted: &[u32]) -> Result<InstanceSpec, String> {
        let taken = Taken { ids: [1, 511].into(), cpus: [2, 3].into() };
        side("web~morph".into(), of, wanted, &machine(), &taken)
    }

    #[test]
    fn it_is_as_large_and_takes_what_nobody_has() {
        let got = pick(&web(), &[]).unwrap();
        assert_eq!((got.id, got.cpus, got.memory_base), (InstanceId(510), vec![5], None));
        assert_eq!(pick(&web(), &[5]).unwrap().cpus, [5]);
        assert_eq!(pick(&web(), &[5, 4]).unwrap().cpus, [5, 4]);
    }

    #[test]
    fn what_is_missing_is_said() {
        for (of, wanted, want) in [
            (
                InstanceSpec { cpus: vec![2, 3, 6, 7], ..web() },
                &[][..],
                "needs 4 CPUs that no instance has, there are 3: [5, 4, 1]",
            ),
            (web(), &[3], "CPU 3 is not free; free are [5, 4, 1]"),
            (web(), &[0], "CPU 0 is not free"),
            (web(), &[4, 4], "named twice"),
            (
                InstanceSpec { memory_bytes: 1 << 30, ..web() },
                &[],
                "needs 1024 MiB of the pool beside the old one, 768 MiB are free",
            ),
        ] {
            let error = pick(&of, wanted).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}
