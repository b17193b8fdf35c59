//! Initramfs images: the primary's, an instance's, and the probe's.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc::{Builder, ModeFileType, trailer};

use super::cache::Cache;
use crate::{Context, Result};

/// An archive being written.
struct Image {
    out: Vec<u8>,
    dirs: std::collections::BTreeSet<String>,
}

impl Image {
    fn new() -> Result<Image> {
        let mut image = Image { out: Vec::new(), dirs: Default::default() };
        for dir in ["proc", "sys", "dev", "tmp", "run", "root", "etc", "var"] {
            image.dir(dir)?;
        }
        for (name, minor) in [("dev/console", (5, 1)), ("dev/null", (1, 3)), ("dev/kmsg", (1, 11))] {
            let b = Builder::new(name).mode(0o600).set_mode_file_type(ModeFileType::Char).nlink(1);
            image.put(b.rdev_major(minor.0).rdev_minor(minor.1), b"")?;
        }
        Ok(image)
    }

    fn put(&mut self, builder: Builder, bytes: &[u8]) -> Result<()> {
        let out = std::mem::take(&mut self.out);
        let len = u32::try_from(bytes.len()).context("file too large for an initramfs")?;
        let mut w = builder.write(out, len);
        w.write_all(bytes).context("write the image")?;
        self.out = w.finish().context("write the image")?;
        Ok(())
    }

    fn dir(&mut self, path: &str) -> Result<()> {
        let mut at = String::new();
        for part in path.split('/').filter(|p| !p.is_empty()) {
            if !at.is_empty() {
                at.push('/');
            }
            at.push_str(part);
            if self.dirs.insert(at.clone()) {
                self.put(
                    Builder::new(&at).mode(0o755).set_mode_file_type(ModeFileType::Directory).nlink(2),
                    b"",
                )?;
            }
        }
        Ok(())
    }

    fn bytes(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.dir(dir)?;
        }
        self.put(Builder::new(path).mode(mode).set_mode_file_type(ModeFileType::Regular).nlink(1), bytes)
    }

    fn file(&mut self, path: &str, mode: u32, from: &Path) -> Result<()> {
        let bytes = std::fs::read(from).map_err(|e| format!("read {}: {e}", from.display()))?;
        self.bytes(path, mode, &bytes)
    }

    fn link(&mut self, path: &str, to: &str) -> Result<()> {
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.dir(dir)?;
        }
        self.put(
            Builder::new(path).mode(0o777).set_mode_file_type(ModeFileType::Symlink).nlink(1),
            to.as_bytes(),
        )
    }

    fn busybox(&mut self) -> Result<()> {
        self.file("bin/busybox", 0o755, Path::new("/bin/busybox"))?;
        for applet in [
            "sh", "mount", "insmod", "sleep", "cat", "ls", "echo", "poweroff", "grep", "seq", "dmesg",
            "rmmod",
        ] {
            self.link(&format!("bin/{applet}"), "busybox")?;
        }
        Ok(())
    }

    /// A dynamic program of the host with the libraries it needs.
    fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        self.file(path, 0o755, from)?;
        let out = Command::new("ldd").arg(from).output().context("ldd")?;
        for line in String::from_utf8_lossy(&out.stdout).lines() {
            if let Some(lib) = line.split_whitespace().find(|w| w.starts_with('/'))
                && !self.dirs.contains(lib)
            {
                self.dirs.insert(lib.to_string());
                self.file(lib.trim_start_matches('/'), 0o755, Path::new(lib))?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<u8>> {
        trailer(self.out).context("write the image")
    }
}

fn store(path: PathBuf, bytes: &[u8]) -> Result<PathBuf> {
    std::fs::write(&path, bytes).map_err(|e| format!("write {}: {e}", path.display()))?;
    Ok(path)
}

/// An image that says `mark` and powers off.
pub fn probe(cache: &Cache, mark: &str) -> Result<PathBuf> {
    let mut i = Image::new()?;
    i.busybox()?;
    let init = format!(
        "#!/bin/sh\n/bin/mount -t proc proc /proc\necho {mark} >/dev/console\n/bin/busybox poweroff -f\n"
    );
    i.bytes("init", 0o755, init.as_bytes())?;
    store(cache.work("probe.cpio"), &i.finish()?)
}

/// What an instance runs in the scenarios: the user's side, which knows nothing of kmorph.
fn workload(cache: &Cache, releases: &[String]) -> Result<Vec<u8>> {
    let mut i = Image::new()?;
    i.busybox()?;
    i.file("kmorph-qemu", 0o755, &cache.binary("kmorph-qemu")?)?;
    i.file("vsock_check", 0o755, &cache.vsock_check()?)?;
    for release in releases {
        i.file(&format!("hang/{release}.ko"), 0o600, &cache.hang_module(release)?)?;
    }
    i.file("counter", 0o755, &cache.counter()?)?;
    i.bytes("init", 0o755, include_bytes!("../guest/workload-init.sh"))?;
    i.finish()
}

/// What an instance runs whose workload is the example in Python: the host's interpreter, with no more of its library
/// than that needs.
fn python(cache: &Cache) -> Result<Vec<u8>> {
    const PYTHON: &str = "/usr/bin/python3";
    let (program, compiled) = (cache.source("agent/state/examples/counter.py"), cache.work("python"));
    let made = Command::new(PYTHON)
        .args(["-I", "-S"])
        .args([&cache.source("qemu-tests/src/host/stdlib.py"), &program, &compiled])
        .output()
        .context(PYTHON)?;
    if !made.status.success() {
        return Err(format!("the library of Python: {}", String::from_utf8_lossy(&made.stderr)));
    }
    let mut i = Image::new()?;
    i.busybox()?;
    i.program(PYTHON.trim_start_matches('/'), Path::new(PYTHON))?;
    for line in String::from_utf8_lossy(&made.stdout).lines() {
        let (path, from) = line.split_once('\t').ok_or_else(|| format!("what is {line:?}?"))?;
        let (path, from) = (path.trim_start_matches('/'), Path::new(from));
        if path.ends_with(".pyc") { i.file(path, 0o644, from)? } else { i.program(path, from)? }
    }
    i.file("counter.py", 0o755, &program)?;
    i.bytes("init", 0o755, include_bytes!("../guest/python-init.sh"))?;
    i.finish()
}

/// A module of the stock kernel, decompressed.
fn stock_module(cache: &Cache, release: &str, path: &str) -> Result<Vec<u8>> {
    let plain = cache.stock_modules(release).join(format!("{path}.ko"));
    if let Ok(bytes) = std::fs::read(&plain) {
        return Ok(bytes);
    }
    let packed = cache.stock_modules(release).join(format!("{path}.ko.xz"));
    let bytes = std::fs::read(&packed).map_err(|e| format!("read {}: {e}", packed.display()))?;
    let mut out = Vec::new();
    lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut out).context("decompress a module")?;
    Ok(out)
}

/// Modules without which no command of criu works, in the order in which they are loaded.
const CRIU_MODULES: [&str; 12] = [
    "lib/libcrc32c",
    "net/netfilter/nfnetlink",
    "net/netfilter/nf_tables",
    "drivers/net/veth",
    "net/unix/unix_diag",
    "net/ipv4/inet_diag",
    "net/ipv4/tcp_diag",
    "net/ipv4/udp_diag",
    "net/ipv4/raw_diag",
    "net/netlink/netlink_diag",
    "net/packet/af_packet_diag",
    "drivers/net/tun",
];

/// What is appended to the workload's image so that criu takes a program along.
fn criu(cache: &Cache, releases: &[String]) -> Result<Vec<u8>> {
    let mut i = Image::new()?;
    i.program("usr/bin/criu", Path::new("/usr/sbin/criu"))?;
    i.file("usr/bin/kmorph-criu", 0o755, &cache.binary("kmorph-criu")?)?;
    i.file("ticker", 0o755, &cache.ticker()?)?;
    for release in releases {
        for (n, path) in CRIU_MODULES.iter().enumerate() {
            let name = path.rsplit('/').next().unwrap_or(path);
            let bytes = stock_module(cache, release, path)?;
            i.bytes(&format!("criu/{release}/{n:02}-{name}.ko"), 0o600, &bytes)?;
        }
    }
    i.finish()
}

/// The primary's initramfs: kmorph installed as a package would, both kernels in /boot.
pub fn primary(cache: &Cache, series: &str) -> Result<PathBuf> {
    let own = cache.release(series)?;
    let releases: Vec<String> = ["6.1", "6.12"].iter().map(|s| cache.release(s)).collect::<Result<_>>()?;
    let mut i = Image::new()?;
    i.busybox()?;
    for (name, path) in [
        ("kmorphd", "usr/sbin/kmorphd"),
        ("kmorphctl", "usr/bin/kmorphctl"),
        ("kmorph-agent", "usr/lib/kmorph/kmorph-agent"),
        ("kmorph-qemu", "usr/bin/kmorph-qemu"),
    ] {
        i.file(path, 0o755, &cache.binary(name)?)?;
    }
    i.file("usr/lib/kmorph/kmorphd-failpoints", 0o755, &cache.binary("examples/kmorphd-failpoints")?)?;
    i.file("usr/bin/vsock_check", 0o755, &cache.vsock_check()?)?;
    i.program("usr/bin/dtc", Path::new("/usr/bin/dtc"))?;
    for (series, release) in ["6.1", "6.12"].iter().zip(&releases) {
        let dir = format!("lib/modules/{release}");
        let vsock = stock_module(cache, release, "net/vmw_vsock/vsock")?;
        i.bytes(&format!("{dir}/kernel/net/vmw_vsock/vsock.ko"), 0o600, &vsock)?;
        for name in ["kmorph.ko", "kerf-vsock.ko"] {
            i.file(&format!("{dir}/extra/{name}"), 0o600, &cache.own_module(release, name)?)?;
        }
        i.file(&format!("boot/vmlinuz-{series}"), 0o600, &cache.vmlinuz(release))?;
    }
    for name in ["vmw_vsock_virtio_transport_common", "vsock_loopback"] {
        let bytes = stock_module(cache, &own, &format!("net/vmw_vsock/{name}"))?;
        i.bytes(&format!("lib/modules/{own}/kernel/net/vmw_vsock/{name}.ko"), 0o600, &bytes)?;
    }
    i.bytes("boot/workload.img", 0o600, &workload(cache, &releases)?)?;
    i.bytes("boot/criu.img", 0o600, &criu(cache, &releases)?)?;
    i.bytes("boot/python.img", 0o600, &python(cache)?)?;
    i.bytes("init", 0o755, include_bytes!("../guest/primary-init.sh"))?;
    store(cache.work(&format!("primary-{series}.cpio")), &i.finish()?)
}
