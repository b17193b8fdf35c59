//! The run-time folder and what lies in it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kmp::stand_in::names;
use nix::libc;

use crate::{InstanceId, PlatformError};

/// Longest folder: `sun_path` has 108 bytes with its NUL, and the longest socket below is `/65535_4294967295`.
const LONGEST: usize = 107 - 17;

/// The folder.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Make it, or check that it is fit.
    pub fn open(dir: &Path) -> Result<Folder, PlatformError> {
        let bad = |why: String| {
            Err(PlatformError::Unavailable(format!("run-time folder {}: {why}", dir.display())))
        };
        match std::fs::symlink_metadata(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                if let Err(e) = DirBuilder::new().recursive(true).mode(0o700).create(dir) {
                    return bad(format!("it cannot be made: {e}; name a folder this user may write to"));
                }
            }
            Err(e) => return bad(e.to_string()),
            Ok(_) => {}
        }
        let meta = match std::fs::symlink_metadata(dir) {
            Ok(meta) => meta,
            Err(e) => return bad(e.to_string()),
        };
        let me = nix::unistd::geteuid().as_raw();
        if meta.file_type().is_symlink() {
            return bad("it is a symbolic link; name the folder itself".into());
        }
        if !meta.is_dir() {
            return bad("it is not a folder; name another place or remove the file".into());
        }
        if meta.uid() != me {
            return bad(format!("it belongs to user {}, not {me}; name a folder of this user", meta.uid()));
        }
        if meta.mode() & 0o077 != 0 {
            return bad(format!(
                "others may enter it (mode {:o}); run `chmod 700 {}`",
                meta.mode() & 0o777,
                dir.display()
            ));
        }
        let path = match dir.canonicalize() {
            Ok(path) => path,
            Err(e) => return bad(e.to_string()),
        };
        let long = path.as_os_str().len();
        if long > LONGEST {
            return bad(format!(
                "its path has {long} bytes, and names of sockets in it must fit 107; name one of at most {LONGEST} \
                 bytes, such as /run/user/{me}/kmorph"
            ));
        }
        Ok(Folder { path })
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of an instance.
    pub fn instance(&self, id: InstanceId) -> PathBuf {
        self.path.join(id.0.to_string())
    }

    /// The socket that stands for a port of an instance.
    pub fn port(&self, id: InstanceId, port: u32) -> PathBuf {
        self.path.join(names::port(id.0, port))
    }

    /// The daemon's socket for notices.
    pub fn events(&self) -> PathBuf {
        self.path.join(names::EVENTS)
    }

    /// The file of a window.
    pub fn window(&self, key: u64) -> PathBuf {
        self.path.join(names::window(key))
    }

    /// Keys of the windows that have a file, in order.
    pub fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        let mut keys: Vec<u64> = self
            .names()?
            .iter()
            .filter_map(|n| {
                let key = u64::from_str_radix(n.strip_prefix("window-")?, 16).ok()?;
                (names::window(key) == *n).then_some(key)
            })
            .collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// Numbers of the instances that have a folder.
    pub fn instances(&self) -> Result<Vec<InstanceId>, PlatformError> {
        let mut ids: Vec<InstanceId> = self
            .names()?
            .iter()
            .filter_map(|n| {
                n.parse::<u16>().ok().filter(|id| id.to_string() == **n && *id != 0).map(InstanceId)
            })
            .collect();
        ids.sort();
        Ok(ids)
    }

    fn names(&self) -> Result<Vec<String>, PlatformError> {
        let list = || -> std::io::Result<Vec<String>> {
            std::fs::read_dir(&self.path)?
                .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
                .collect()
        };
        list().map_err(|e| PlatformError::os(format!("list {}", self.path.display()), e))
    }

    /// Remove the sockets of all instances that `keep` does not want.
    pub fn sweep_sockets(&self, keep: impl Fn(InstanceId) -> bool) -> Result<(), PlatformError> {
        for name in self.names()? {
            let instance = name
                .split_once('_')
                .filter(|(_, port)| port.parse::<u32>().is_ok())
                .and_then(|(cid, _)| cid.parse::<u16>().ok()?.checked_sub(2));
            if instance.is_some_and(|id| !keep(InstanceId(id))) {
                remove(&self.path.join(name))?;
            }
        }
        Ok(())
    }

    /// Remove everything of an instance, the claim after what it protects.
    pub fn clear(&self, id: InstanceId) -> Result<(), PlatformError> {
        self.sweep_sockets(|other| other != id)?;
        let dir = self.instance(id);
        let list = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            list => list.map_err(|e| PlatformError::os(format!("list {}", dir.display()), e))?,
        };
        for entry in list {
            let entry = entry.map_err(|e| PlatformError::os(format!("list {}", dir.display()), e))?;
            if entry.file_name() != super::claim::FILE && entry.file_name() != names::LOCK {
                remove(&entry.path())?;
            }
        }
        remove(&dir.join(super::claim::FILE))?;
        remove(&dir.join(names::LOCK))?;
        std::fs::remove_dir(&dir).map_err(|e| PlatformError::os(format!("remove {}", dir.display()), e))
    }
}

/// Remove a file that may be gone already.
pub fn remove(path: &Path) -> Result<(), PlatformError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(PlatformError::os(format!("remove {}; remove it by hand", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// Open a regular file for reading that a stand-in could have replaced by something else.
pub fn open_plain(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Read such a file, up to a limit.
pub fn read_plain(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    open_plain(path)?.take(limit + 1).read_to_end(&mut out)?;
    if out.len() as u64 > limit {
        return Err(std::io::Error::other(format!("it is longer than {limit} bytes")));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn text(dir: &Path) -> String {
        Folder::open(dir).unwrap_err().to_string()
    }

    #[test]
    fn each_unfit_folder_is_told_with_its_fix() {
        let d = tempfile::tempdir().unwrap();
        let good = d.path().join("a/b");
        Folder::open(&good).unwrap();
        assert_eq!(std::fs::metadata(&good).unwrap().mode() & 0o777, 0o700);
        Folder::open(&good).unwrap();
        std::fs::set_permissions(&good, std::fs::Permissions::from_mode(0o750)).unwrap();
        assert!(text(&good).contains("chmod 700"), "{}", text(&good));
        let link = d.path().join("link");
        symlink(d.path(), &link).unwrap();
        assert!(text(&link).contains("symbolic link"));
        let file = d.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(text(&file).contains("not a folder"));
        assert!(text(&file.join("x")).contains("file/x"));
        let long = d.path().join("x".repeat(91));
        assert!(text(&long).contains("at most 90"), "{}", text(&long));
        if !nix::unistd::geteuid().is_root() {
            assert!(text(Path::new("/usr")).contains("belongs to user 0"));
        }
    }

    #[test]
    fn an_instances_files_are_found_and_cleared() {
        let d = tempfile::tempdir().unwrap();
        let f = Folder::open(&d.path().join("run")).unwrap();
        for name in ["3", "007", "0", "x", "70000"] {
            std::fs::create_dir(f.path().join(name)).unwrap();
        }
        for name in ["5_9000", "5_1", "6_9000", "lock", "5_x"] {
            std::fs::write(f.path().join(name), "").unwrap();
        }
        std::fs::write(f.instance(InstanceId(3)).join("claim"), "").unwrap();
        assert_eq!(f.instances().unwrap(), [InstanceId(3)]);
        f.clear(InstanceId(3)).unwrap();
        f.clear(InstanceId(3)).unwrap();
        let mut left = f.names().unwrap();
        left.sort();
        assert_eq!(left, ["0", "007", "5_x", "6_9000", "70000", "lock", "x"]);
    }

    #[test]
    fn what_is_no_plain_file_is_not_read() {
        let d = tempfile::tempdir().unwrap();
        let fifo = d.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read_plain(&fifo, 10).is_err());
        let file = d.path().join("file");
        std::fs::write(&file, [0; 11]).unwrap();
        assert!(read_plain(&file, 10).unwrap_err().to_string().contains("longer than 10"));
        symlink(&file, d.path().join("link")).unwrap();
        assert!(read_plain(&d.path().join("link"), 100).is_err());
    }
}
