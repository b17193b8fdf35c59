//! Kernels that never come up: each gives a clear error, and everything goes back.

use std::time::Duration;

use super::Scenario;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "boot-failures",
    about: "a kernel of garbage, a panic in early boot, an init that ends, no modules: clear errors, nothing kept",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(170),
};

fn everything_is_back(g: &Guest) -> Result<()> {
    let d = g.daemon()?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.check(d.pool_free_bytes == d.pool_bytes, || format!("memory is missing: {d:?}"))
}

fn guest(g: &Guest) -> Result<()> {
    g.define("one", 1, &[2], 128)?;
    g.ctl(&["daemon", "start"])?;
    let initramfs = format!("--initramfs={WORKLOAD}");

    g.chapter("garbage where the kernel's code should be");
    let mut image = std::fs::read("/boot/vmlinuz-6.1").context("read a kernel")?;
    let code = 0x8000;
    for (n, b) in image[code..code + 0x10000].iter_mut().enumerate() {
        *b = if n % 2 == 0 { 0xeb } else { 0xfe }; // jmp to itself: it spins, whatever the entry is
    }
    std::fs::write("/boot/garbage", &image).context("write the image")?;
    g.ctl_fails(
        &["spawn", "one", "--kernel=/boot/garbage", &initramfs, "--boot-timeout=4"],
        9,
        &["one", "did not"],
    )?;
    everything_is_back(g)?;

    g.chapter(
        "a panic in boot, before anything of ours runs: the initramfs lies beyond the memory it may use",
    );
    g.ctl_fails(
        &[
            "spawn",
            "one",
            "--kernel=/boot/vmlinuz-6.1",
            &initramfs,
            "--kernel-cmdline=mem=1100M",
            "--boot-timeout=15",
        ],
        9,
        &["one", "did not come up"],
    )?;
    let log = g.command("kmorphctl", &["console", "one"])?;
    g.check(log.out.contains("Kernel panic"), || {
        format!("its panic is not in its log: {}{}", log.out, log.err)
    })?;
    everything_is_back(g)?;

    g.chapter("an init that ends before it waits for anything: the kernel panics");
    panic_image()?;
    g.ctl_fails(
        &["spawn", "one", "--kernel=/boot/vmlinuz-6.1", "--initramfs=/boot/panic.img", "--boot-timeout=20"],
        9,
        &["one", "panic"],
    )?;
    everything_is_back(g)?;

    g.chapter("a release no modules were built for");
    let mut other = std::fs::read("/boot/vmlinuz-6.1").context("read a kernel")?;
    let at = usize::from(u16::from_le_bytes([other[0x20e], other[0x20f]])) + 0x200;
    other[at..at + 3].copy_from_slice(b"5.9");
    std::fs::write("/boot/other", &other).context("write the image")?;
    g.ctl_fails(
        &["spawn", "one", "--kernel=/boot/other", &initramfs],
        6,
        &["no vsock.ko for kernel 5.9", "install"],
    )?;
    everything_is_back(g)?;

    g.chapter("and the same instance boots when it is given a good kernel");
    g.ctl(&["spawn", "one", "--kernel=/boot/vmlinuz-6.12", &initramfs])?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// An initramfs whose init ends before it has waited for anything: the kernel panics. It works for long enough for an
/// agent to answer meanwhile.
fn panic_image() -> Result<()> {
    use cpio::newc::{Builder, ModeFileType, trailer};
    use std::io::Write;
    let busybox = std::fs::read("/bin/busybox").context("read busybox")?;
    let script = b"#!/bin/busybox sh\ni=0\nwhile [ $i -lt 10000 ]; do i=$((i+1)); done\nexit 7\n";
    let mut out = Vec::new();
    let dir = Builder::new("bin").mode(0o755).set_mode_file_type(ModeFileType::Directory).nlink(2);
    out = dir.write(out, 0).finish().context("write an archive")?;
    for (name, bytes) in [("bin/busybox", busybox.as_slice()), ("init", script.as_slice())] {
        let b = Builder::new(name).mode(0o755).set_mode_file_type(ModeFileType::Regular).nlink(1);
        let mut w = b.write(out, bytes.len() as u32);
        w.write_all(bytes).context("write an archive")?;
        out = w.finish().context("write an archive")?;
    }
    std::fs::write("/boot/panic.img", trailer(out).context("write an archive")?).context("write the image")
}
