//! Files that a request names.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc;

use crate::PlatformError;

/// Longest file that is read: an initramfs has a length of 32 bits in the boot protocol
/// (Documentation/arch/x86/boot.rst, `ramdisk_size`).
const LONGEST: u64 = u32::MAX as u64;

fn bad(what: &str, path: &Path, why: impl std::fmt::Display) -> PlatformError {
    PlatformError::BadImage(format!("cannot read the {what} {}: {why}", path.display()))
}

/// Open a file that is there, regular and readable.
pub fn readable(what: &str, path: &Path) -> Result<File, PlatformError> {
    let bad = |why: &dyn std::fmt::Display| bad(what, path, why);
    // A FIFO would block.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|e| bad(&e))?;
    match file.metadata() {
        Ok(m) if m.is_file() => Ok(file),
        Ok(_) => Err(bad(&"it is not a regular file")),
        Err(e) => Err(bad(&e)),
    }
}

/// All of such a file.
pub fn read(what: &str, path: &Path) -> Result<Vec<u8>, PlatformError> {
    let file = readable(what, path)?;
    let length = file.metadata().map_err(|e| bad(what, path, e))?.len();
    if length > LONGEST {
        return Err(bad(what, path, format!("it has {length} bytes, at most {LONGEST} are possible")));
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(length as usize).map_err(|e| bad(what, path, e))?;
    // It may grow meanwhile.
    file.take(LONGEST).read_to_end(&mut bytes).map_err(|e| bad(what, path, e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_possible_length_are_read() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("kernel");
        std::fs::write(&path, "bytes").unwrap();
        assert_eq!(read("kernel", &path).unwrap(), b"bytes");
        File::options().write(true).open(&path).unwrap().set_len(LONGEST + 1).unwrap();
        let fifo = d.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, why) in [
            (path.as_path(), "at most 4294967295"),
            (&fifo, "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (d.path(), "not a regular file"),
            (&d.path().join("none"), "No such file"),
        ] {
            let text = read("kernel", path).unwrap_err().to_string();
            assert!(text.contains("cannot read the kernel") && text.contains(why), "{text}");
        }
    }
}
