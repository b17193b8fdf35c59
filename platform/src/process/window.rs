//! Windows: a file that the old stand-in of a morph writes and the new one reads. It takes nothing of the
//! pretended memory.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

use super::folder::{Folder, remove};
use crate::{PlatformError, WINDOW};

pub(super) fn open(folder: &Folder, key: u64, size: u64) -> Result<(), PlatformError> {
    let path = folder.window(key);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(|e| {
        if e.kind() == ErrorKind::AlreadyExists {
            PlatformError::Busy(format!("there is a window {key:#x} already: {}", path.display()))
        } else {
            PlatformError::os(format!("make {}", path.display()), e)
        }
    })?;
    file.set_len(size).map_err(|e| {
        // Whether it goes or not, this is the error that says why there is no window.
        let _ = remove(&path);
        PlatformError::os(format!("make {} {size} bytes long", path.display()), e)
    })
}

/// Take it away. A process that has the file open reads its end from then on, and what it writes nobody sees.
pub(super) fn close(folder: &Folder, key: u64) -> Result<(), PlatformError> {
    let path = folder.window(key);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    if let Ok(file) = OpenOptions::new().write(true).custom_flags(flags).open(&path) {
        // Its memory is then free although somebody keeps it open. Where that fails it is free when he ends.
        let _ = file.set_len(0);
    }
    remove(&path)
}

pub(super) fn list(folder: &Folder) -> Result<Vec<u64>, PlatformError> {
    let mut keys = folder.windows()?;
    keys.retain(|key| key & WINDOW != 0);
    Ok(keys)
}

/// Take all away.
pub(super) fn clear(folder: &Folder) -> Result<(), PlatformError> {
    list(folder)?.into_iter().try_for_each(|key| close(folder, key))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::time::Duration;

    use super::super::{Process, ProcessConfig};
    use super::*;
    use crate::{InstanceId, Platform};

    const KEY: u64 = WINDOW | 0x2a;
    const SIZE: u64 = 64 << 20;
    const NONE: [u64; 0] = [];
    const LIMIT: Duration = Duration::from_secs(1);

    #[test]
    fn a_window_is_a_sparse_file_until_it_is_closed() {
        let d = tempfile::tempdir().unwrap();
        let folder = Folder::open(&d.path().join("run")).unwrap();
        assert_eq!(list(&folder).unwrap(), NONE);
        close(&folder, KEY).unwrap();
        open(&folder, KEY, SIZE).unwrap();
        let path = folder.path().join("window-800000000000002a");
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.blocks(), meta.mode() & 0o777), (SIZE, 0, 0o600));
        let again = open(&folder, KEY, SIZE).unwrap_err();
        assert!(matches!(again, PlatformError::Busy(_)) && again.to_string().contains("already"), "{again}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);

        let (writer, reader) =
            (OpenOptions::new().write(true).open(&path).unwrap(), std::fs::File::open(&path).unwrap());
        writer.write_all_at(b"state", SIZE - 5).unwrap();
        let mut got = [0; 5];
        reader.read_exact_at(&mut got, SIZE - 5).unwrap();
        assert_eq!(&got, b"state");

        open(&folder, u64::MAX, SIZE).unwrap();
        assert_eq!(list(&folder).unwrap(), [KEY, u64::MAX]);
        close(&folder, KEY).unwrap();
        assert!(!path.exists());
        assert_eq!(reader.read_at(&mut got, 0).unwrap(), 0);
        close(&folder, KEY).unwrap();
        assert_eq!(list(&folder).unwrap(), [u64::MAX]);
    }

    #[test]
    fn a_window_that_cannot_be_made_leaves_nothing() {
        let d = tempfile::tempdir().unwrap();
        let folder = Folder::open(&d.path().join("run")).unwrap();
        let error = open(&folder, KEY, u64::MAX << 21).unwrap_err().to_string();
        assert!(error.contains("window-800000000000002a") && error.contains("bytes long"), "{error}");
        assert_eq!(list(&folder).unwrap(), NONE);
    }

    #[test]
    fn other_names_are_no_windows() {
        let d = tempfile::tempdir().unwrap();
        let folder = Folder::open(&d.path().join("run")).unwrap();
        for name in [
            "window-2a",
            "window-000000000000002a",
            "window-800000000000002A",
            "window-+80000000000002a",
            "x",
        ] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(list(&folder).unwrap(), NONE);
        // Somebody's link is removed, not what it leads to.
        let target = d.path().join("target");
        std::fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, folder.window(KEY)).unwrap();
        close(&folder, KEY).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
        assert_eq!(list(&folder).unwrap(), NONE);
    }

    #[tokio::test]
    async fn the_platform_refuses_what_cannot_be_and_finds_what_was_left() {
        let d = tempfile::tempdir().unwrap();
        let config = || ProcessConfig {
            dir: d.path().join("run"),
            agent: "/nowhere".into(),
            cpus: 4,
            memory: 1 << 30,
        };
        let (one, two) = ((InstanceId(1), 1), (InstanceId(2), 1));
        let p = Process::open(config()).await.unwrap();
        for (key, size) in [(0x2a, SIZE), (KEY, 0), (KEY, SIZE + 4096)] {
            let got = p.window_open(key, size, one, two).await;
            assert!(matches!(got, Err(PlatformError::Invalid(_))), "{key:#x} {size}: {got:?}");
        }
        let got = p.window_open(KEY, SIZE, one, one).await;
        assert!(matches!(got, Err(PlatformError::Invalid(_))), "{got:?}");
        let got = p.window_open(KEY, SIZE, one, two).await;
        assert!(matches!(got, Err(PlatformError::Unknown(InstanceId(1)))), "{got:?}");
        assert!(matches!(p.window_close(0x2a, LIMIT).await, Err(PlatformError::Invalid(_))));
        assert_eq!(p.windows().await.unwrap(), NONE);

        let folder = Folder::open(&d.path().join("run")).unwrap();
        for key in [KEY, KEY + 1] {
            open(&folder, key, SIZE).unwrap();
        }
        drop(p);
        let p = Process::open(config()).await.unwrap();
        assert_eq!(p.windows().await.unwrap(), [KEY, KEY + 1]);
        assert_eq!(p.inventory().await.unwrap().free_bytes(), 1 << 30);
        p.window_close(KEY, LIMIT).await.unwrap();
        p.window_close(KEY, LIMIT).await.unwrap();
        assert_eq!(p.windows().await.unwrap(), [KEY + 1]);
        p.release_all().await.unwrap();
        assert_eq!(p.windows().await.unwrap(), NONE);
    }
}
