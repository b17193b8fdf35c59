//! What the other side of a morph runs on: a number, CPUs that no instance has and none is defined with, and memory
//! from the pool.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use kmorph_platform::{CpuInfo, CpuState, Growth, InstanceId, InstanceSpec, Inventory};

/// The highest number; the other sides of morphs are numbered from there downwards, where definitions are rare.
const HIGHEST: u16 = 511;

/// Numbers and CPUs that are spoken for.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken {
    pub(super) ids: BTreeSet<u16>,
    pub(super) cpus: BTreeSet<u32>,
}

/// What an operator wants of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Wish<'a> {
    /// CPUs it starts with; empty: any that are free.
    pub(super) cpus: &'a [u32],
    /// Bytes of memory it starts with; `None`: as much as the instance has, if there is room.
    pub(super) memory_bytes: Option<u64>,
}

/// The other side of this instance, and what it gets of the old kernel later: it may start with fewer CPUs, one at
/// least, and with less memory.
pub(super) fn side(
    name: String,
    of: &InstanceSpec,
    wish: &Wish<'_>,
    inventory: &Inventory,
    taken: &Taken,
) -> Result<(InstanceSpec, Growth), String> {
    let id = (1..=HIGHEST).rev().find(|id| !taken.ids.contains(id));
    let id = InstanceId(id.ok_or("every number is in use")?);
    let cpus = cpus(of, wish.cpus, inventory, taken)?;
    let memory_bytes = memory(of, wish.memory_bytes, inventory)?;
    // Those it takes over first are those the old kernel was started with.
    let missing = of.cpus.len().saturating_sub(cpus.len());
    let later: Vec<u32> = of.cpus.iter().copied().filter(|c| !cpus.contains(c)).take(missing).collect();
    let growth = Growth { cpus: later, memory_bytes: of.memory_bytes.saturating_sub(memory_bytes) };
    Ok((InstanceSpec { name, id, cpus, memory_bytes, memory_base: None }, growth))
}

fn cpus(of: &InstanceSpec, wanted: &[u32], inventory: &Inventory, taken: &Taken) -> Result<Vec<u32>, String> {
    let free = |c: &&CpuInfo| !c.boot && c.state != CpuState::Lent && !taken.cpus.contains(&c.apic_id);
    let mut free: Vec<&CpuInfo> = inventory.cpus.iter().filter(free).collect();
    // Those that nobody uses; then the primary's, its first ones last.
    free.sort_by_key(|c| (c.state == CpuState::Online, Reverse(c.apic_id)));
    let free: Vec<u32> = free.iter().map(|c| c.apic_id).collect();
    if wanted.is_empty() {
        if free.is_empty() {
            return Err(
                "the new kernel needs a CPU that no instance has or is defined with, and there is none"
                    .into(),
            );
        }
        return Ok(free.into_iter().take(of.cpus.len()).collect());
    }
    if let Some(cpu) = wanted.iter().find(|cpu| !free.contains(cpu)) {
        return Err(format!("CPU {cpu} is not free; free are {free:?}"));
    }
    if wanted.iter().collect::<BTreeSet<_>>().len() < wanted.len() {
        return Err(format!("a CPU is named twice: {wanted:?}"));
    }
    Ok(wanted.to_vec())
}

/// How much memory it starts with. What is missing has to be whole memory blocks, which it gets later.
fn memory(of: &InstanceSpec, wanted: Option<u64>, inventory: &Inventory) -> Result<u64, String> {
    let (full, block, room) = (of.memory_bytes, inventory.memory_block, inventory.largest_free());
    let mib = |n: u64| n >> 20;
    let Some(wanted) = wanted else {
        if room >= full {
            return Ok(full);
        }
        // As little less as possible.
        let less = block.checked_mul((full - room).div_ceil(block.max(1))).filter(|l| block > 0 && *l < full);
        return less.map(|l| full - l).ok_or_else(|| {
            format!(
                "the new kernel needs {} MiB of the pool beside the old one, {} MiB are free in one piece",
                mib(full),
                mib(room)
            )
        });
    };
    if wanted > room {
        return Err(format!("{} MiB are not free in one piece, {} MiB are", mib(wanted), mib(room)));
    }
    if wanted < full && (block == 0 || !(full - wanted).is_multiple_of(block)) {
        return Err(format!(
            "the new kernel gets what is missing of {} MiB later, in pieces of {} MiB: {} MiB are not possible",
            mib(full),
            mib(block),
            mib(wanted)
        ));
    }
    Ok(wanted)
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
            memory_block: 128 << 20,
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

    fn pick(of: &InstanceSpec, wanted: &[u32]) -> Result<(InstanceSpec, Growth), String> {
        pick_with(of, &Wish { cpus: wanted, memory_bytes: None })
    }

    fn pick_with(of: &InstanceSpec, wish: &Wish<'_>) -> Result<(InstanceSpec, Growth), String> {
        let taken = Taken { ids: [1, 511].into(), cpus: [2, 3].into() };
        side("web~morph".into(), of, wish, &machine(), &taken)
    }

    #[test]
    fn it_is_as_large_and_takes_what_nobody_has() {
        let (got, growth) = pick(&web(), &[]).unwrap();
        assert_eq!((got.id, got.cpus, got.memory_base), (InstanceId(510), vec![5], None));
        assert!(growth.is_empty());
        assert_eq!(pick(&web(), &[5]).unwrap().0.cpus, [5]);
        assert_eq!(pick(&web(), &[5, 4]).unwrap().0.cpus, [5, 4]);
    }

    #[test]
    fn what_is_not_there_yet_it_gets_of_the_old_kernel() {
        let of = InstanceSpec { cpus: vec![2, 3, 6, 7], memory_bytes: 1 << 30, ..web() };
        let (got, growth) = pick(&of, &[]).unwrap();
        assert_eq!((got.cpus.as_slice(), got.memory_bytes >> 20), (&[5, 4, 1][..], 768));
        assert_eq!((growth.cpus.as_slice(), growth.memory_bytes >> 20), (&[2][..], 256));
        let (got, growth) = pick_with(&of, &Wish { cpus: &[4], memory_bytes: Some(128 << 20) }).unwrap();
        assert_eq!((got.cpus.as_slice(), got.memory_bytes >> 20), (&[4][..], 128));
        assert_eq!((growth.cpus.as_slice(), growth.memory_bytes >> 20), (&[2, 3, 6][..], 896));
        // More than the instance has: there is nothing to come.
        let (_, growth) = pick_with(&web(), &Wish { cpus: &[4, 5], memory_bytes: Some(512 << 20) }).unwrap();
        assert!(growth.is_empty());
    }

    #[test]
    fn what_is_missing_is_said() {
        let text = |of: &InstanceSpec, wish: Wish<'_>| pick_with(of, &wish).unwrap_err();
        for (of, cpus, memory_bytes, want) in [
            (web(), &[3][..], None, "CPU 3 is not free; free are [5, 4, 1]"),
            (web(), &[0], None, "CPU 0 is not free"),
            (web(), &[4, 4], None, "named twice"),
            (web(), &[], Some(1 << 30), "1024 MiB are not free in one piece, 768 MiB are"),
            (web(), &[], Some(100 << 20), "pieces of 128 MiB: 100 MiB are not possible"),
        ] {
            let error = text(&of, Wish { cpus, memory_bytes });
            assert!(error.contains(want), "{error}");
        }
        let taken = Taken { ids: [].into(), cpus: [1, 2, 3, 4, 5].into() };
        let none = side("x".into(), &web(), &Wish::default(), &machine(), &taken).unwrap_err();
        assert!(none.contains("there is none"), "{none}");
        // Nothing can be added to a kernel that runs.
        let fixed = Inventory { memory_block: 0, ..machine() };
        let large = InstanceSpec { memory_bytes: 1 << 30, ..web() };
        let error = memory(&large, None, &fixed).unwrap_err();
        assert!(error.contains("needs 1024 MiB of the pool beside the old one, 768 MiB are free"), "{error}");
    }
}
