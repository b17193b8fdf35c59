//! The release a kernel file names.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::PlatformError;
use crate::file::readable;
use crate::partition::bzimage;

/// Files remembered.
const MOST: usize = 64;

/// Path, and what changes when the file does.
type Key = (PathBuf, u64, u64, u64, i64, i64);

/// Releases by file: many instances start the same kernel, and reading it takes longer than starting one.
#[derive(Default)]
pub struct Releases(Mutex<HashMap<Key, String>>);

impl Releases {
    /// The release: from the header of a bzImage; any other file stands for itself by its name.
    pub fn of(&self, path: &Path) -> Result<String, PlatformError> {
        let mut file = readable("kernel", path)?;
        let bad = |e: std::io::Error| {
            PlatformError::BadImage(format!("cannot read the kernel {}: {e}", path.display()))
        };
        let m = file.metadata().map_err(bad)?;
        let key = (path.to_owned(), m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec());
        if let Some(known) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(known.clone());
        }
        let mut magic = [0; 4];
        let release =
            if m.len() >= 0x206 && file.read_exact_at(&mut magic, 0x202).is_ok() && &magic == b"HdrS" {
                let mut image = Vec::new();
                file.read_to_end(&mut image).map_err(bad)?;
                bzimage::parse(&path.display().to_string(), &image)?.0.release
            } else {
                path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
            };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key, release.clone());
        Ok(release)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::bzimage::tests::sample;

    #[test]
    fn a_release_is_read_from_an_image_and_else_the_name() {
        let d = tempfile::tempdir().unwrap();
        let releases = Releases::default();
        let image = d.path().join("vmlinuz");
        std::fs::write(&image, sample()).unwrap();
        for _ in 0..2 {
            assert_eq!(releases.of(&image).unwrap(), "6.1.0-54-cloud-amd64");
        }
        let plain = d.path().join("stand-in-6.6");
        std::fs::write(&plain, "no kernel").unwrap();
        assert_eq!(releases.of(&plain).unwrap(), "stand-in-6.6");
        let mut broken = sample();
        broken[0x236] = 0;
        std::fs::write(&plain, broken).unwrap();
        assert!(releases.of(&plain).unwrap_err().to_string().contains("64-bit"));
        let text = releases.of(d.path()).unwrap_err().to_string();
        assert!(text.contains("not a regular file"), "{text}");
        assert!(releases.of(&d.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
