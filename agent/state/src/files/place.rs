//! Open files as the kernel knows them: what one is, and one that is made like it.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

use super::record::{Kind, Meta};

/// `RAMFS_MAGIC` of linux/magic.h: the root of an initramfs without tmpfs.
const RAMFS: FsType = FsType(0x8584_58f6);
/// What the kernel adds to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";
const MEMORY: &[u8] = b"/memfd:";
/// Flags that are kept. The others have done their work when it was opened.
const KEPT: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DIRECT)
    .union(OFlag::O_NOATIME);

/// Another way to the same file, open for reading (and writing).
pub(super) fn again(file: &File, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).open(link(file))
}

fn link(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Which file it is, whatever it is called.
pub(super) fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|m| (m.dev(), m.ino()))
}

fn kind(file: &File, meta: &fs::Metadata) -> Result<Kind, String> {
    let what = meta.file_type();
    if !what.is_file() {
        let name = match () {
            () if what.is_dir() => "a directory",
            () if what.is_fifo() => "a pipe",
            () if what.is_socket() => "a socket",
            () => "a device",
        };
        return Err(format!("it is {name}, which cannot be taken along"));
    }
    let path = fs::read_link(link(file)).map_err(|e| format!("its path: {e}"))?;
    let bytes = path.as_os_str().as_bytes();
    let system = fstatfs(file.as_fd()).map_err(|e| format!("its file system: {e}"))?.filesystem_type();
    let own = system == TMPFS_MAGIC || system == RAMFS;
    if let Some(name) = bytes.strip_prefix(MEMORY).filter(|_| meta.nlink() == 0) {
        if !own {
            return Err("it is memory in huge pages, which cannot be taken along".into());
        }
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(|e| format!("its seals: {e}"))?;
        let name = name.strip_suffix(DELETED).unwrap_or(name).to_vec();
        return Ok(Kind::Memory { name, seals: seals.cast_unsigned() });
    }
    if meta.nlink() == 0 {
        return Ok(Kind::Unlinked);
    }
    let found = fs::metadata(&path).map_err(|e| format!("its path {}: {e}", path.display()))?;
    if (found.dev(), found.ino()) != (meta.dev(), meta.ino()) {
        return Err(format!("its path {} leads to another file", path.display()));
    }
    Ok(if own { Kind::Along(path) } else { Kind::There(path) })
}

/// What there is to know about an open file. `along` says whether the content of one that has a name goes along, when
/// its file system does not say so.
pub(super) fn describe(name: &str, file: &File, along: Option<bool>, content: u64) -> Result<Meta, String> {
    let meta = file.metadata().map_err(|e| e.to_string())?;
    let kind = match (kind(file, &meta)?, along) {
        (Kind::There(path), Some(true)) => Kind::Along(path),
        (Kind::Along(path), Some(false)) => Kind::There(path),
        (kind, _) => kind,
    };
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).map_err(|e| e.to_string())?);
    if flags.contains(OFlag::O_PATH) {
        return Err("it is open for its path only (O_PATH)".into());
    }
    let own = FdFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFD).map_err(|e| e.to_string())?);
    let mut seen: &File = file;
    Ok(Meta {
        name: name.to_owned(),
        content,
        kind,
        flags: (flags & KEPT).bits().cast_unsigned(),
        close_on_exec: own.contains(FdFlag::FD_CLOEXEC),
        position: seen.stream_position().map_err(|e| format!("its position: {e}"))?,
        size: meta.size(),
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
    })
}

/// Where the content of a file that has a name is kept until it takes its place. Other workloads may have content for the
/// same place: no two get the same name.
fn beside(path: &Path) -> Result<PathBuf, String> {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or_else(|| format!("{} is no path of a file", path.display()))?;
    let (process, number) = (std::process::id(), NUMBERS.fetch_add(1, Ordering::Relaxed));
    Ok(path.with_file_name(format!(".{}.kmorph-{process}-{number}", name.to_string_lossy())))
}

/// Processes of other namespaces can have the same number as this one: a name that is taken is left alone.
fn create_beside(path: &Path) -> Result<(File, PathBuf), String> {
    loop {
        let beside = beside(path)?;
        match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&beside) {
            Ok(file) => return Ok((file, beside)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(format!("{}: {e}", beside.display())),
        }
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), String> {
    fs::rename(from, to).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))
}

fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", path.display())),
        _ => Ok(()),
    }
}

/// A file that content arrives in.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) file: File,
    /// Its name, and the one it gets.
    moves: Option<(PathBuf, PathBuf)>,
    /// Those it gets.
    seals: u32,
}

impl Stage {
    pub(super) fn new(meta: &Meta) -> Result<Stage, String> {
        let (name, seals) = match &meta.kind {
            Kind::Along(path) => {
                let (file, beside) = create_beside(path)?;
                return Ok(Stage { file, moves: Some((beside, path.clone())), seals: 0 });
            }
            Kind::There(path) => {
                return Err(format!("{} is to be there, and its content comes", path.display()));
            }
            Kind::Unlinked => (b"unlinked".to_vec(), 0),
            Kind::Memory { name, seals } => (name.clone(), *seals),
        };
        let name = CString::new(name).map_err(|_| "its name has a zero in it")?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let made = memfd_create(name.as_c_str(), flags).map_err(|e| format!("memory: {e}"))?;
        Ok(Stage { file: made.into(), moves: None, seals })
    }

    /// What it was made for may have been renamed, unlinked or sealed since.
    pub(super) fn follow(&mut self, meta: &Meta) -> Result<(), String> {
        match (&meta.kind, &self.moves) {
            (Kind::Along(path), Some((_, to))) if to == path => {}
            (Kind::Along(path), Some((from, _))) => {
                // A folder that is not there is noticed now, and not when it is to serve.
                let beside = beside(path)?;
                rename(from, &beside)?;
                self.moves = Some((beside, path.clone()));
            }
            // One that was unlinked gets no name any more.
            (Kind::Along(path), None) => {
                return Err(format!("it comes without a name, and is to be {}", path.display()));
            }
            (Kind::Unlinked, Some((from, _))) => {
                remove(from)?;
                self.moves = None;
            }
            (Kind::Memory { seals, .. }, _) => self.seals = *seals,
            (Kind::Unlinked, None) | (Kind::There(_), _) => {}
        }
        Ok(())
    }

    /// Everything has arrived, for now.
    pub(super) fn complete(&self, meta: &Meta) -> Result<(), String> {
        self.file.set_len(meta.size).map_err(|e| format!("{} bytes: {e}", meta.size))?;
        let (uid, gid) = meta.owner;
        if self.file.metadata().map(|m| (m.uid(), m.gid())).ok() != Some((uid, gid)) {
            std::os::unix::fs::fchown(&self.file, Some(uid), Some(gid))
                .map_err(|e| format!("owner {uid}:{gid}: {e}"))?;
        }
        self.file
            .set_permissions(Permissions::from_mode(meta.mode))
            .map_err(|e| format!("mode {:o}: {e}", meta.mode))
    }

    /// Give it its name and its seals. Done again it changes nothing.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        if let Some((from, to)) = &self.moves {
            rename(from, to)?;
            self.moves = None;
        }
        if self.seals != 0 {
            let seals = SealFlag::from_bits_retain(self.seals.cast_signed());
            fcntl(&self.file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| format!("seals {seals:?}: {e}"))?;
            self.seals = 0;
        }
        Ok(())
    }

    /// Nobody wants it.
    pub(super) fn discard(self) -> Result<(), String> {
        self.moves.map_or(Ok(()), |(from, _)| remove(&from))
    }
}

/// Open a file as the old kernel had it open. `stage` has its content when that came along.
pub(super) fn open(meta: &Meta, stage: Option<&Stage>) -> Result<File, String> {
    let path = match (&meta.kind, stage) {
        (Kind::There(path), _) => path.clone(),
        (_, Some(stage)) => link(&stage.file),
        (_, None) => return Err("its content did not come".into()),
    };
    let flags = OFlag::from_bits_retain(meta.flags.cast_signed());
    let access = flags & OFlag::O_ACCMODE;
    let opened = OpenOptions::new()
        .read(access != OFlag::O_WRONLY)
        .write(access != OFlag::O_RDONLY)
        .custom_flags((flags & !OFlag::O_ACCMODE).bits())
        .open(&path);
    let mut file = opened.map_err(|e| format!("{}: {e}", path.display()))?;
    let size = file.metadata().map_err(|e| e.to_string())?.size();
    if matches!(meta.kind, Kind::There(_)) && size < meta.size {
        return Err(format!(
            "{} has {size} bytes here and had {}: it is not the same file",
            path.display(),
            meta.size
        ));
    }
    file.seek(SeekFrom::Start(meta.position)).map_err(|e| format!("position {}: {e}", meta.position))?;
    if !meta.close_on_exec {
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| e.to_string())?;
    }
    Ok(file)
}
