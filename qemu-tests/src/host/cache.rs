//! Where built and fetched things lie.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Context, Result};

/// The build directory: `<repository>/build`, or `KMORPH_BUILD`.
pub struct Cache {
    root: PathBuf,
    build: PathBuf,
}

impl Cache {
    /// Find it.
    pub fn open() -> Result<Cache> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no repository")?.to_path_buf();
        let build = std::env::var_os("KMORPH_BUILD").map_or_else(|| root.join("build"), PathBuf::from);
        std::fs::create_dir_all(build.join("qemu")).context("create the build directory")?;
        Ok(Cache { root, build })
    }

    /// A file of the repository.
    pub fn source(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Scratch space of the harness.
    pub fn work(&self, path: &str) -> PathBuf {
        self.build.join("qemu").join(path)
    }

    fn kernels(&self) -> PathBuf {
        std::env::var_os("KMORPH_CACHE")
            .map_or_else(|| self.build.join("cache"), PathBuf::from)
            .join("kernels")
    }

    /// The newest release of a series.
    pub fn release(&self, series: &str) -> Result<String> {
        let link = self.kernels().join(series);
        let target = std::fs::read_link(&link).map_err(|e| {
            format!("no kernel of series {series} ({}: {e}); run `make kernels`", link.display())
        })?;
        Ok(target.file_name().unwrap_or(target.as_os_str()).to_string_lossy().into_owned())
    }

    /// Its bzImage.
    pub fn vmlinuz(&self, release: &str) -> PathBuf {
        self.kernels().join(release).join("vmlinuz")
    }

    /// Its own modules.
    pub fn stock_modules(&self, release: &str) -> PathBuf {
        self.kernels().join(release).join("modules/lib/modules").join(release).join("kernel")
    }

    fn headers(&self, release: &str) -> PathBuf {
        self.kernels().join(release).join("headers")
    }

    /// Our modules for it.
    pub fn own_module(&self, release: &str, name: &str) -> Result<PathBuf> {
        let path = self.build.join("modules").join(release).join(name);
        if path.exists() {
            Ok(path)
        } else {
            Err(format!("{} is missing; run `make modules`", path.display()))
        }
    }

    /// A static binary of the workspace.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let path = self.build.join("static/x86_64-unknown-linux-gnu/release").join(name);
        if path.exists() {
            Ok(path)
        } else {
            Err(format!("{} is missing; run `make binaries`", path.display()))
        }
    }

    /// The checker of what stream sockets promise, a static C program.
    pub fn vsock_check(&self) -> Result<PathBuf> {
        self.static_c("vsock_check", &["kmod/test/vsock_check.c", "kmod/test/vsock_peer.c"])
    }

    /// The example workload in C, a static program.
    pub fn counter(&self) -> Result<PathBuf> {
        self.static_c("counter", &["agent/state/examples/counter.c"])
    }

    /// A program that knows nothing of kmorph, static.
    pub fn ticker(&self) -> Result<PathBuf> {
        self.static_c("ticker", &["qemu-tests/src/guest/ticker.c"])
    }

    fn static_c(&self, name: &str, sources: &[&str]) -> Result<PathBuf> {
        let out = self.work(name);
        let made = Command::new("gcc")
            .args(["-O2", "-Wall", "-Werror", "-static", "-pthread", "-o"])
            .arg(&out)
            .args(sources.iter().map(|s| self.source(s)))
            .output()
            .context("gcc")?;
        if !made.status.success() {
            return Err(format!("building {name}: {}", String::from_utf8_lossy(&made.stderr)));
        }
        Ok(out)
    }

    /// The module that hangs a kernel, built when its source is newer.
    pub fn hang_module(&self, release: &str) -> Result<PathBuf> {
        let dir = self.work(&format!("hang-{release}"));
        let out = dir.join("kmorph-hang.ko");
        let newer = |a: &Path, b: &Path| {
            let time = |p: &Path| std::fs::metadata(p).and_then(|m| m.modified()).ok();
            time(a) >= time(b)
        };
        if out.exists() && newer(&out, &self.source("qemu-tests/hang/kmorph-hang.c")) {
            return Ok(out);
        }
        std::fs::create_dir_all(&dir).context("create a directory")?;
        for file in ["Kbuild", "kmorph-hang.c"] {
            std::fs::copy(self.source("qemu-tests/hang").join(file), dir.join(file)).context(file)?;
        }
        let made = Command::new("make")
            .arg("-C")
            .arg(self.headers(release))
            .arg(format!("M={}", dir.display()))
            .args(["CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"])
            .output()
            .context("make")?;
        if !made.status.success() {
            return Err(format!(
                "building kmorph-hang.ko for {release}: {}",
                String::from_utf8_lossy(&made.stderr)
            ));
        }
        Ok(out)
    }
}
