//! Folders and files that nobody else may change: who does, commands the daemon.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use kmorph_control::{ErrorKind, OpError};
use nix::unistd::Uid;

/// Others may write; not in folders such as /tmp, where everybody's files are one's own.
const WRITABLE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Make a folder, or see that it is ours alone to change. Root's can be entered by all, for the sockets in it;
/// a user's are private.
pub fn own_folder(dir: &Path, what: &str) -> Result<(), OpError> {
    let mode = if Uid::effective().is_root() { 0o755 } else { 0o700 };
    own_folder_with(dir, what, mode)
}

/// [`own_folder`] with a mode for a new one.
pub fn own_folder_with(dir: &Path, what: &str, mode: u32) -> Result<(), OpError> {
    // That of a path without one.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let fail = |doing: &str, e: std::io::Error| {
        let kind = match e.kind() {
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            _ => ErrorKind::Internal,
        };
        OpError::new(kind, format!("cannot {doing} {what} {}: {e}", dir.display()))
    };
    DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(|e| fail("make", e))?;
    let m = std::fs::symlink_metadata(dir).map_err(|e| fail("look at", e))?;
    // A link could lead somewhere else tomorrow, so its owner counts as well.
    let target = std::fs::metadata(dir).map_err(|e| fail("look at", e))?;
    let why = trouble(m.uid(), 0).or_else(|| trouble(target.uid(), target.mode()));
    match why {
        Some(why) => Err(OpError::new(
            ErrorKind::Denied,
            format!("{what} {0}: {1} {0}", dir.display(), why.replace("MODE", &format!("{mode:04o}"))),
        )),
        None => Ok(()),
    }
}

/// What is wrong with the owner and mode of a configuration file or folder, and the command that mends it.
pub(crate) fn changeable(path: &Path) -> std::io::Result<Option<String>> {
    let m = std::fs::metadata(path)?;
    let mode = if m.is_dir() { "0755" } else { "0644" };
    // Users share files with their groups; what root runs by is root's.
    let checked = if Uid::effective().is_root() { m.mode() } else { m.mode() & !0o020 };
    let why = trouble(m.uid(), checked & !STICKY);
    Ok(why.map(|why| format!("{} {}", why.replace("MODE", mode), path.display())))
}

fn trouble(owner: u32, mode: u32) -> Option<String> {
    let me = Uid::effective();
    if owner != me.as_raw() && owner != 0 {
        return Some(format!("it belongs to user {owner}: chown {me}"));
    }
    if mode & STICKY == 0 && mode & WRITABLE != 0 {
        return Some(format!("others may write to it ({:04o}): chmod MODE", mode & 0o7777));
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_is_made_and_one_that_others_may_change_is_refused_with_the_way_out() {
        let d = tempfile::tempdir().unwrap();
        let dir = d.path().join("a/b");
        own_folder_with(&dir, "the state folder", 0o750).unwrap();
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o750);
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        let e = own_folder_with(&dir, "the state folder", 0o750).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Denied);
        let want =
            format!("the state folder {0}: others may write to it (0777): chmod 0750 {0}", dir.display());
        assert_eq!(e.message, want);
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o1777)).unwrap();
        own_folder(&dir, "the socket's folder").unwrap();
    }

    #[test]
    fn owners_are_compared() {
        assert_eq!(trouble(Uid::effective().as_raw(), 0o700), None);
        assert_eq!(trouble(0, 0o755), None);
        let why = trouble(4242, 0o700).unwrap();
        assert!(why.contains("4242") && why.contains("chown"), "{why}");
    }
}
