//! Which acceleration works: found by booting, because /dev/kvm can exist and not run a stock kernel.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::cache::Cache;
use super::image;
use super::machine::wait_limited;
use crate::{Context, Result};

/// How QEMU runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Hardware.
    Kvm,
    /// Emulation, a thread per vCPU.
    Tcg,
}

impl Accel {
    /// QEMU arguments.
    pub fn args(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"],
        }
    }
}

const LIMIT: Duration = Duration::from_secs(20);
const MARK: &str = "KMORPH-PROBE-OK";

/// Probe, once per boot of the host.
pub fn probe(cache: &Cache) -> Result<Accel> {
    match std::env::var("KMORPH_QEMU_ACCEL").as_deref() {
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("tcg") => return Ok(Accel::Tcg),
        Ok(other) => return Err(format!("KMORPH_QEMU_ACCEL={other}: kvm or tcg")),
        Err(_) => {}
    }
    if !std::path::Path::new("/dev/kvm").exists() {
        return Ok(Accel::Tcg);
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the boot id")?;
    let memo = cache.work("accel");
    if let Ok(text) = std::fs::read_to_string(&memo)
        && let Some((id, accel)) = text.split_once(' ')
        && id == boot.trim()
    {
        return Ok(if accel == "kvm" { Accel::Kvm } else { Accel::Tcg });
    }
    let works = boots(cache)?;
    let name = if works { "kvm" } else { "tcg" };
    println!(
        "acceleration: {name} (a stock kernel {} under /dev/kvm)",
        if works { "boots" } else { "does not boot" }
    );
    std::fs::write(&memo, format!("{} {name}", boot.trim())).context("remember the acceleration")?;
    Ok(if works { Accel::Kvm } else { Accel::Tcg })
}

/// Whether a stock kernel reaches its init with two CPUs under KVM.
fn boots(cache: &Cache) -> Result<bool> {
    let release = cache.release("6.1")?;
    let initramfs = image::probe(cache, MARK)?;
    let mut child = Command::new("qemu-system-x86_64")
        .args(Accel::Kvm.args())
        .args([
            "-smp",
            "2",
            "-m",
            "512M",
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(cache.vmlinuz(&release))
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let mut out = child.stdout.take().ok_or("no output of QEMU")?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        // The pipe ends when QEMU does; an error ends it too.
        let _ = out.read_to_end(&mut text);
        String::from_utf8_lossy(&text).contains(MARK)
    });
    wait_limited(&mut child, LIMIT)?;
    reader.join().map_err(|_| "the reader of the probe failed".to_string())
}
