//! Devices of this kernel, whatever its user space has made of /dev.

use std::fs::File;
use std::io;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Open a device by its name in devtmpfs, for reading and writing. That is mounted for the moment, and nowhere: an
/// initramfs need not have it, and who changes to another root cannot take it away.
pub fn open(name: &str) -> io::Result<File> {
    let opened = || {
        let system = fsopen("devtmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&system)?;
        let mounted = fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        openat(&mounted, name, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    };
    let text =
        |e: rustix::io::Errno| io::Error::new(io::Error::from(e).kind(), format!("device {name}: {e}"));
    opened().map(File::from).map_err(text)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn devices_are_found_without_dev_and_others_are_named() {
        match open("zero") {
            Ok(mut zero) => {
                let mut bytes = [1; 3];
                zero.read_exact(&mut bytes).unwrap();
                assert_eq!(bytes, [0; 3]);
                let error = open("no-such-device").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::NotFound);
                assert!(error.to_string().contains("device no-such-device"), "{error}");
            }
            // Not everybody may mount, or has a devtmpfs. Nothing else may go wrong.
            Err(error) => {
                let text = error.to_string();
                let may_not = error.kind() == io::ErrorKind::PermissionDenied;
                assert!(
                    text.contains("device zero") && (may_not || text.contains("No such device")),
                    "{text}"
                );
            }
        }
    }
}
