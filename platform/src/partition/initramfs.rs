//! The initramfs an instance boots with: the user's, unchanged, followed by our own archive.

use std::io::Write;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::{PlatformError, file};

/// Folder of our archive inside the instance.
pub const FOLDER: &str = ".kmorph";
/// The agent's path inside the instance.
pub const AGENT: &str = "/.kmorph/agent";

/// Where our own files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The agent, a static binary.
    pub agent: PathBuf,
    /// Roots like `/lib/modules`: each has a folder per release. Searched in order.
    pub modules: Vec<PathBuf>,
}

/// The modules an instance loads, in load order.
const MODULES: &[&str] = &["vsock", "kmorph", "kerf-vsock"];
/// Places of modules below `<root>/<release>/`.
const PLACES: &[&str] = &["", "updates/dkms", "updates", "extra", "kernel/net/vmw_vsock", "kernel/extra"];

/// Read one module of one release, decompressed.
fn module(sources: &Sources, release: &str, name: &str) -> Result<Vec<u8>, PlatformError> {
    // Module files are named with either separator.
    let spellings = [name.to_string(), name.replace('-', "_")];
    for root in &sources.modules {
        for place in PLACES {
            for spelling in &spellings {
                for suffix in ["ko", "ko.xz"] {
                    let path = root.join(release).join(place).join(format!("{spelling}.{suffix}"));
                    match std::fs::read(&path) {
                        Ok(bytes) if suffix == "ko" => return Ok(bytes),
                        Ok(bytes) => {
                            let mut out = Vec::new();
                            lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut out).map_err(|e| {
                                PlatformError::BadImage(format!("cannot decompress {}: {e}", path.display()))
                            })?;
                            return Ok(out);
                        }
                        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                        Err(e) => return Err(PlatformError::os(format!("read {}", path.display()), e)),
                    }
                }
            }
        }
    }
    let roots: Vec<String> = sources.modules.iter().map(|p| p.display().to_string()).collect();
    let fix = if name == "vsock" {
        format!("install that kernel's own modules (package linux-image-{release})")
    } else {
        format!(
            "build it: scripts/build-modules.sh {release}, or dkms install kmorph/{} -k {release}",
            env!("CARGO_PKG_VERSION")
        )
    };
    Err(PlatformError::BadImage(format!(
        "no {name}.ko for kernel {release} under {}; {fix}",
        roots.join(", ")
    )))
}

/// Our archive for one release.
pub fn own_archive(sources: &Sources, release: &str) -> Result<Vec<u8>, PlatformError> {
    let agent = std::fs::read(&sources.agent)
        .map_err(|e| PlatformError::os(format!("read the agent {}", sources.agent.display()), e))?;
    let modules = MODULES
        .iter()
        .enumerate()
        .map(|(n, m)| Ok((format!("{FOLDER}/modules/{n}-{m}.ko"), module(sources, release, m)?)))
        .collect::<Result<Vec<_>, PlatformError>>()?;
    let write = || -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for dir in [FOLDER.to_string(), format!("{FOLDER}/modules")] {
            out = Builder::new(&dir)
                .mode(0o700)
                .set_mode_file_type(ModeFileType::Directory)
                .nlink(2)
                .write(out, 0)
                .finish()?;
        }
        let files = std::iter::once((format!("{FOLDER}/agent"), 0o700, agent.as_slice()))
            .chain(modules.iter().map(|(n, b)| (n.clone(), 0o600, b.as_slice())));
        for (name, mode, bytes) in files {
            let len = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
            let mut w = Builder::new(&name)
                .mode(mode)
                .set_mode_file_type(ModeFileType::Regular)
                .nlink(1)
                .write(out, len);
            w.write_all(bytes)?;
            out = w.finish()?;
        }
        trailer(out)
    };
    write().map_err(|e| PlatformError::os("write the agent's archive", e))
}

/// The user's initramfs, if any, followed by ours. The kernel unpacks one archive after the other,
/// whatever each is compressed with; each has to start at a multiple of four bytes.
pub fn combined(user: Option<&Path>, own: &[u8]) -> Result<Vec<u8>, PlatformError> {
    let mut all = match user {
        None => Vec::new(),
        Some(path) => {
            let bytes = file::read("initramfs", path)?;
            if !looks_like_archive(&bytes) {
                return Err(PlatformError::BadImage(format!(
                    "{} is not an initramfs: it starts neither like a cpio archive nor like a compressed one",
                    path.display()
                )));
            }
            bytes
        }
    };
    all.resize(all.len().next_multiple_of(4), 0);
    all.extend_from_slice(own);
    Ok(all)
}

/// First bytes of what Linux unpacks: cpio newc and crc, gzip, bzip2, xz, lzma, lzo, lz4, zstd.
fn looks_like_archive(bytes: &[u8]) -> bool {
    const STARTS: &[&[u8]] = &[
        b"070701",
        b"070702",
        &[0x1f, 0x8b],
        b"BZh",
        &[0xfd, b'7', b'z', b'X', b'Z'],
        &[0x5d, 0, 0],
        &[0x89, b'L', b'Z', b'O'],
        &[0x02, 0x21, 0x4c, 0x18],
        &[0x28, 0xb5, 0x2f, 0xfd],
    ];
    STARTS.iter().any(|s| bytes.starts_with(s))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(dir: &Path, with: &[(&str, &[u8])]) -> Sources {
        std::fs::write(dir.join("agent"), b"ELF").unwrap();
        for (path, bytes) in with {
            let p = dir.join("modules").join(path);
            std::fs::create_dir_all(p.parent().unwrap()).unwrap();
            std::fs::write(p, bytes).unwrap();
        }
        Sources { agent: dir.join("agent"), modules: vec![dir.join("modules")] }
    }

    #[test]
    fn archive_holds_agent_and_modules_in_load_order() {
        let d = tempfile::tempdir().unwrap();
        let mut xz = Vec::new();
        lzma_rs::xz_compress(&mut &b"VSOCK"[..], &mut xz).unwrap();
        let s = sources(
            d.path(),
            &[
                ("6.1/kernel/net/vmw_vsock/vsock.ko.xz", &xz),
                ("6.1/updates/dkms/kmorph.ko", b"KM"),
                ("6.1/extra/kerf-vsock.ko", b"KV"),
            ],
        );
        let own = own_archive(&s, "6.1").unwrap();
        let mut at: &[u8] = &own;
        let mut seen = Vec::new();
        loop {
            let r = cpio::newc::Reader::new(at).unwrap();
            if r.entry().is_trailer() {
                break;
            }
            let name = r.entry().name().to_string();
            let mut body = Vec::new();
            at = r.to_writer(&mut body).unwrap();
            seen.push((name, body));
        }
        let names: Vec<&str> = seen.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(
            names,
            [
                ".kmorph",
                ".kmorph/modules",
                ".kmorph/agent",
                ".kmorph/modules/0-vsock.ko",
                ".kmorph/modules/1-kmorph.ko",
                ".kmorph/modules/2-kerf-vsock.ko"
            ]
        );
        assert_eq!(seen[3].1, b"VSOCK");
    }

    #[test]
    fn a_missing_module_names_the_command_that_builds_it() {
        let d = tempfile::tempdir().unwrap();
        let s = sources(d.path(), &[("6.1/vsock.ko", b"V")]);
        let text = own_archive(&s, "6.1").unwrap_err().to_string();
        assert!(
            text.contains("no kmorph.ko for kernel 6.1") && text.contains("scripts/build-modules.sh 6.1"),
            "{text}"
        );
    }

    #[test]
    fn ours_starts_aligned_after_the_users_bytes() {
        let d = tempfile::tempdir().unwrap();
        let user = d.path().join("u");
        std::fs::write(&user, [0x1f, 0x8b, 1, 2, 3]).unwrap();
        let all = combined(Some(&user), b"070701x").unwrap();
        assert_eq!(&all[..8], &[0x1f, 0x8b, 1, 2, 3, 0, 0, 0]);
        assert_eq!(&all[8..], b"070701x");
        std::fs::write(&user, b"hello").unwrap();
        assert!(combined(Some(&user), b"").unwrap_err().to_string().contains("not an initramfs"));
    }
}
