//! Who has what.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;

use kmp::stand_in::MAX_CPUS;
use tokio::task::AbortHandle;

use super::leader::Leader;
use crate::{
    ConsoleLog, CpuInfo, CpuState, Growth, InstanceId, InstanceSpec, Inventory, MemoryRange, PlatformError,
};

/// Where the one range of memory begins: above everything a PC has at fixed places.
pub const MEMORY_BASE: u64 = 4 << 30;
/// Regions begin at multiples of this, as on real kernels.
pub const ALIGN: u64 = 2 << 20;
/// Largest instance number; a CID is the number plus 2.
pub const MAX_ID: u16 = 65_533;

/// A task that ends when this is dropped.
pub struct Task(pub AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An instance that has resources.
pub struct Live {
    pub incarnation: u64,
    pub region: MemoryRange,
    /// Memory it got while it ran.
    pub extents: Vec<MemoryRange>,
    pub cpus: Vec<u32>,
    /// Its control file, kept open.
    pub control: Option<Arc<File>>,
    /// Its first process, when it is known.
    pub leader: Option<Arc<Leader>>,
    /// It is being stopped or was: its end is no news.
    pub fencing: bool,
    /// How its first process ended.
    pub ended: Option<String>,
    /// Waits for that end.
    pub watch: Option<Task>,
}

#[derive(Default)]
pub struct State {
    pub live: HashMap<InstanceId, Live>,
    /// Starts under way.
    pub booting: HashMap<InstanceId, (MemoryRange, Vec<u32>)>,
    /// CPUs taken from the primary that nobody has.
    pub pooled: HashSet<u32>,
    /// Log of the last life.
    pub last_log: HashMap<InstanceId, ConsoleLog>,
}

impl State {
    /// The instance, if the caller means its present life.
    pub fn current(&mut self, id: InstanceId, asked: u64) -> Result<&mut Live, PlatformError> {
        match self.live.get_mut(&id) {
            None => Err(PlatformError::Unknown(id)),
            Some(l) if l.incarnation != asked => {
                Err(PlatformError::StaleIncarnation { id, asked, current: l.incarnation })
            }
            Some(l) => Ok(l),
        }
    }

    fn owners(&self) -> impl Iterator<Item = (InstanceId, &MemoryRange, &Vec<u32>)> {
        let booting = self.booting.iter().map(|(id, (r, c))| (*id, r, c));
        self.live.iter().map(|(id, l)| (*id, &l.region, &l.cpus)).chain(booting)
    }

    /// Memory that somebody has, in order.
    fn used(&self) -> Vec<(MemoryRange, InstanceId)> {
        let extents = self.live.iter().flat_map(|(id, l)| l.extents.iter().map(|r| (*r, *id)));
        let mut used: Vec<_> = self.owners().map(|(id, r, _)| (*r, id)).chain(extents).collect();
        used.sort_by_key(|(r, _)| r.base);
        used
    }

    /// Give a running instance what it does not have of this.
    pub fn grow(
        &mut self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        cpus: u32,
        pool: MemoryRange,
    ) -> Result<(Vec<u32>, Vec<MemoryRange>), PlatformError> {
        let live = self.current(id, incarnation)?;
        let has: u64 = live.extents.iter().map(|r| r.size).sum();
        let new: Vec<u32> = growth.cpus.iter().copied().filter(|c| !live.cpus.contains(c)).collect();
        if live.cpus.len() + new.len() > MAX_CPUS {
            return Err(PlatformError::Invalid(format!("{MAX_CPUS} CPUs are the most an instance can have")));
        }
        for cpu in &new {
            self.check_cpu(*cpu, cpus)?;
        }
        let piece = match growth.memory_bytes.saturating_sub(has) {
            0 => None,
            more => Some(place(pool, &self.used(), more, None)?),
        };
        self.pooled.retain(|c| !new.contains(c));
        let live = self.current(id, incarnation)?;
        live.cpus.extend(new);
        live.extents.extend(piece);
        Ok((live.cpus.clone(), live.extents.clone()))
    }

    fn check_cpu(&self, cpu: u32, cpus: u32) -> Result<(), PlatformError> {
        if cpu >= cpus {
            return Err(PlatformError::Invalid(format!(
                "it wants CPU {cpu} (physical id), which this machine does not have; it has 0 to {}",
                cpus.saturating_sub(1)
            )));
        }
        if cpu == 0 {
            return Err(PlatformError::Invalid(
                "it wants CPU 0, the machine's boot processor; it always stays with the primary kernel"
                    .into(),
            ));
        }
        if let Some((owner, ..)) = self.owners().find(|(.., c)| c.contains(&cpu)) {
            return Err(PlatformError::Busy(format!(
                "it wants CPU {cpu}, which instance {owner} has; terminate that one or change the definition"
            )));
        }
        Ok(())
    }

    /// Check what a definition wants and place its memory. Nothing is taken.
    pub fn place(
        &self,
        spec: &InstanceSpec,
        cpus: u32,
        pool: MemoryRange,
    ) -> Result<MemoryRange, PlatformError> {
        let id = spec.id;
        if id.0 == 0 || id.0 > MAX_ID {
            return Err(PlatformError::Invalid(format!(
                "{} has number {id}; instances here have numbers from 1 to {MAX_ID}",
                spec.name
            )));
        }
        if self.owners().any(|(owner, ..)| owner == id) {
            return Err(PlatformError::Busy(format!("{} (instance {id}) already runs", spec.name)));
        }
        let distinct: HashSet<&u32> = spec.cpus.iter().collect();
        if spec.cpus.is_empty() || spec.cpus.len() > MAX_CPUS || distinct.len() != spec.cpus.len() {
            return Err(PlatformError::Invalid(format!(
                "it is defined with CPUs {:?}; 1 to {MAX_CPUS} different ones are possible",
                spec.cpus
            )));
        }
        for cpu in &spec.cpus {
            self.check_cpu(*cpu, cpus)?;
        }
        let used = self.used();
        place(pool, &used, spec.memory_bytes, spec.memory_base)
    }

    /// CPUs and memory, and who has them.
    pub fn inventory(&self, cpus: u32, pool: MemoryRange) -> Inventory {
        let mut owner: HashMap<u32, InstanceId> = HashMap::new();
        for (id, _, cpus) in self.owners() {
            owner.extend(cpus.iter().map(|c| (*c, id)));
        }
        // An instance that was started under a larger configuration still has its CPUs.
        let mut numbers: Vec<u32> = (0..cpus).chain(owner.keys().copied().filter(|c| *c >= cpus)).collect();
        numbers.sort();
        let info = |number: u32| {
            let owner = owner.get(&number).copied();
            let state = match owner {
                Some(_) => CpuState::Lent,
                None if self.pooled.contains(&number) => CpuState::Pool,
                None => CpuState::Online,
            };
            CpuInfo { apic_id: number, number, state, owner, boot: number == 0 }
        };
        let used = self.used();
        Inventory {
            cpus: numbers.into_iter().map(info).collect(),
            pool: vec![pool],
            used,
            memory_block: ALIGN,
        }
    }
}

/// Find memory: at `fixed` when the definition demands it, else first fit. `used` is sorted.
fn place(
    pool: MemoryRange,
    used: &[(MemoryRange, InstanceId)],
    size: u64,
    fixed: Option<u64>,
) -> Result<MemoryRange, PlatformError> {
    if size == 0 {
        return Err(PlatformError::Invalid("an instance needs memory; memory-bytes is 0".into()));
    }
    if let Some(base) = fixed {
        let want = MemoryRange { base, size };
        if base.checked_add(size).is_none() || base < pool.base || want.end() > pool.end() {
            return Err(PlatformError::Invalid(format!(
                "memory {base:#x}+{size:#x} is not inside the pool ({:#x}-{:#x}); change memory-base or extend the pool",
                pool.base,
                pool.end().saturating_sub(1)
            )));
        }
        return match used.iter().find(|(u, _)| u.overlaps(&want)) {
            Some((u, owner)) => Err(PlatformError::Busy(format!(
                "memory {base:#x}+{size:#x} overlaps {:#x}+{:#x}, which instance {owner} has",
                u.base, u.size
            ))),
            None => Ok(want),
        };
    }
    let mut at = pool.base;
    for (u, _) in used {
        if at.checked_add(size).is_some_and(|end| end <= u.base) {
            break;
        }
        at = at.max(u.end().checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX));
    }
    if at.checked_add(size).is_some_and(|end| end <= pool.end()) {
        return Ok(MemoryRange { base: at, size });
    }
    let taken: u64 = used.iter().map(|(r, _)| r.size).sum();
    Err(PlatformError::Busy(format!(
        "no {} MiB of contiguous memory are free in the pool ({} MiB, {} MiB of it used); terminate an instance or extend \
         the pool",
        size >> 20,
        pool.size >> 20,
        taken >> 20
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;
    const POOL: MemoryRange = MemoryRange { base: MEMORY_BASE, size: 512 * M };

    fn spec(id: u16, cpus: &[u32], mib: u64) -> InstanceSpec {
        InstanceSpec {
            name: format!("i{id}"),
            id: InstanceId(id),
            cpus: cpus.to_vec(),
            memory_bytes: mib * M,
            memory_base: None,
        }
    }

    fn with(state: &mut State, s: &InstanceSpec) {
        let region = state.place(s, 8, POOL).unwrap();
        state.booting.insert(s.id, (region, s.cpus.clone()));
    }

    #[test]
    fn nothing_has_two_owners_and_the_owner_is_named() {
        let mut state = State::default();
        with(&mut state, &spec(1, &[1, 2], 128));
        let text = |s: &InstanceSpec| state.place(s, 8, POOL).unwrap_err().to_string();
        assert!(text(&spec(1, &[3], 1)).contains("already runs"));
        assert!(text(&spec(2, &[3, 2], 1)).contains("CPU 2, which instance 1 has"));
        assert!(text(&spec(2, &[0], 1)).contains("boot processor"));
        assert!(text(&spec(2, &[8], 1)).contains("it has 0 to 7"));
        assert!(text(&spec(2, &[3, 3], 1)).contains("[3, 3]"));
        assert!(text(&spec(2, &[], 1)).contains("[]"));
        assert!(text(&spec(0, &[3], 1)).contains("1 to 65533"));
        assert!(text(&spec(65_534, &[3], 1)).contains("1 to 65533"));
        assert!(text(&spec(2, &[3], 0)).contains("memory-bytes is 0"));
        assert!(text(&spec(2, &[3], 385)).contains("385 MiB"));
        let fixed = |base| InstanceSpec { memory_base: Some(base), ..spec(2, &[3], 1) };
        assert!(text(&fixed(MEMORY_BASE + 127 * M)).contains("instance 1 has"));
        assert!(text(&fixed(MEMORY_BASE - M)).contains("not inside the pool"));
        assert!(text(&fixed(u64::MAX)).contains("not inside the pool"));
        assert_eq!(state.place(&fixed(MEMORY_BASE + 128 * M), 8, POOL).unwrap().base, MEMORY_BASE + 128 * M);
        assert_eq!(state.place(&spec(65_533, &[3], 384), 8, POOL).unwrap().base, MEMORY_BASE + 128 * M);
    }

    #[test]
    fn the_inventory_names_owners_and_what_was_taken() {
        let mut state = State::default();
        with(&mut state, &spec(1, &[1], 128));
        state.booting.insert(InstanceId(9), (MemoryRange { base: 0, size: M }, vec![20]));
        state.pooled.insert(3);
        let i = state.inventory(4, POOL);
        let states: Vec<CpuState> = i.cpus.iter().map(|c| c.state).collect();
        use CpuState::{Lent, Online, Pool};
        assert_eq!(states, [Online, Lent, Online, Pool, Lent]);
        assert!(i.cpus[0].boot && !i.cpus[1].boot);
        assert_eq!((i.cpus[1].owner, i.cpus[4].number), (Some(InstanceId(1)), 20));
        assert_eq!(i.free_bytes(), (512 - 129) * M);
    }

    proptest! {
        #[test]
        fn regions_never_overlap(sizes in proptest::collection::vec((1u64..64, any::<bool>()), 1..60)) {
            let mut used: Vec<(MemoryRange, InstanceId)> = vec![];
            for (n, (size, drop_one)) in sizes.into_iter().enumerate() {
                if let Ok(r) = place(POOL, &used, size * M, None) {
                    prop_assert!(r.base >= POOL.base && r.end() <= POOL.end() && r.base % ALIGN == 0);
                    prop_assert!(used.iter().all(|(u, _)| !u.overlaps(&r)));
                    used.push((r, InstanceId(n as u16)));
                    used.sort_by_key(|(r, _)| r.base);
                    if drop_one {
                        used.remove(n % used.len());
                    }
                }
            }
        }
    }
}
