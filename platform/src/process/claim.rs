//! What an instance has, written down before its stand-in is started.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use kmp::stand_in::MAX_CPUS;
use serde::{Deserialize, Serialize};

use super::folder;
use crate::{InstanceId, MemoryRange, PlatformError};

/// Name of the file in the instance's folder.
pub const FILE: &str = "claim";
const LIMIT: u64 = 64 << 10;
const VERSION: u32 = 1;

/// The claim of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    version: u32,
    /// Number.
    pub id: InstanceId,
    /// Which of its lives.
    pub incarnation: u64,
    /// Name.
    pub name: String,
    /// CPUs.
    pub cpus: Vec<u32>,
    /// Memory.
    pub region: MemoryRange,
    /// Memory it got while it ran.
    #[serde(default)]
    pub extents: Vec<MemoryRange>,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Release read from it.
    pub release: String,
}

impl Claim {
    /// A claim of a request.
    pub fn new(r: &crate::BootRequest, region: MemoryRange, release: &str) -> Claim {
        Claim {
            version: VERSION,
            id: r.spec.id,
            incarnation: r.incarnation,
            name: r.spec.name.clone(),
            cpus: r.spec.cpus.clone(),
            region,
            extents: vec![],
            kernel: r.kernel.clone(),
            release: release.to_owned(),
        }
    }

    /// Write it. A daemon that dies here leaves the whole claim or none.
    pub fn write(&self, dir: &Path) -> Result<(), PlatformError> {
        let (new, path) = (dir.join("claim.new"), dir.join(FILE));
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| PlatformError::os(format!("write the claim of instance {}", self.id), e))?;
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|e| PlatformError::os(format!("write {}", path.display()), e))
    }

    /// Read and check the claim of the instance whose folder this is. `None` when there is none.
    pub fn read(dir: &Path, id: InstanceId) -> Result<Option<Claim>, String> {
        let path = dir.join(FILE);
        let bad = |why: String| format!("{}: {why}", path.display());
        let text = match folder::read_plain(&path, LIMIT) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| bad(e.to_string()))?,
        };
        let claim: Claim = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        claim.check(id).map_err(bad)?;
        Ok(Some(claim))
    }

    fn check(&self, id: InstanceId) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has layout {}; this release reads layout {VERSION}", self.version));
        }
        if self.id != id {
            return Err(format!("it is the claim of instance {}, in the folder of instance {id}", self.id));
        }
        if self.incarnation == 0 {
            return Err("its incarnation is 0".into());
        }
        let distinct: HashSet<&u32> = self.cpus.iter().collect();
        if self.cpus.is_empty() || self.cpus.len() > MAX_CPUS || distinct.len() != self.cpus.len() {
            return Err(format!("its CPUs are {:?}; 1 to {MAX_CPUS} different ones are possible", self.cpus));
        }
        if self.cpus.contains(&0) {
            return Err("it claims CPU 0, which always stays with the primary".into());
        }
        let all = || std::iter::once(&self.region).chain(&self.extents);
        if let Some(r) = all().find(|r| r.size == 0 || r.base.checked_add(r.size).is_none()) {
            return Err(format!("its memory is {:#x}+{:#x}", r.base, r.size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Claim {
        Claim {
            version: VERSION,
            id: InstanceId(3),
            incarnation: 7,
            name: "web".into(),
            cpus: vec![1, 2],
            region: MemoryRange { base: 4 << 30, size: 64 << 20 },
            extents: vec![],
            kernel: "/boot/k".into(),
            release: "6.1".into(),
        }
    }

    #[test]
    fn a_claim_comes_back_and_a_lie_is_refused_with_its_reason() {
        let d = tempfile::tempdir().unwrap();
        let read = || Claim::read(d.path(), InstanceId(3));
        assert_eq!(read(), Ok(None));
        claim().write(d.path()).unwrap();
        assert_eq!(read(), Ok(Some(claim())));
        assert!(Claim::read(d.path(), InstanceId(4)).unwrap_err().contains("claim of instance 3"));
        type Harm = fn(&mut Claim);
        let cases: [(&str, Harm); 7] = [
            ("layout 9", |c| c.version = 9),
            ("incarnation is 0", |c| c.incarnation = 0),
            ("CPU 0", |c| c.cpus = vec![1, 0]),
            ("CPUs are []", |c| c.cpus.clear()),
            ("CPUs are [1, 1]", |c| c.cpus = vec![1, 1]),
            ("+0x0", |c| c.region.size = 0),
            ("memory is", |c| c.region = MemoryRange { base: u64::MAX, size: 2 }),
        ];
        for (want, harm) in cases {
            let mut c = claim();
            harm(&mut c);
            c.write(d.path()).unwrap();
            let text = read().unwrap_err();
            assert!(text.contains(want) && text.contains("claim"), "{want}: {text}");
        }
        for junk in ["", "{", "null", "{\"id\": -4}"] {
            std::fs::write(d.path().join(FILE), junk).unwrap();
            assert!(read().is_err(), "{junk}");
        }
        std::fs::write(d.path().join(FILE), vec![b' '; 1 << 17]).unwrap();
        assert!(read().unwrap_err().contains("longer than"));
    }
}
