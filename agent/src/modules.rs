//! Loading the substrate.

use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Parameters of a module, by its file's name (`1-kmorph.ko`).
fn parameters(file: &str, control: u64) -> String {
    if file.ends_with("-kmorph.ko") { format!("control={control:#x}") } else { String::new() }
}

/// Module files in load order: their names start with their number.
fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    all.retain(|p| p.extension().is_some_and(|e| e == "ko"));
    all.sort();
    Ok(all)
}

/// Load all of them; the first failure ends it, because the later ones need the earlier.
pub fn load_all(dir: &Path, control: u64) -> Result<usize, String> {
    let all = list(dir).map_err(|e| format!("cannot list {}: {e}", dir.display()))?;
    for path in &all {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let file = File::open(path).map_err(|e| format!("cannot open {}: {e}", path.display()))?;
        let args = CString::new(parameters(&name, control)).map_err(|e| e.to_string())?;
        match finit_module(&file, &args, ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {} // EEXIST: built in or loaded already
            Err(e) => return Err(format!("cannot load {name} ({args:?}): {e}; the kernel log says why")),
        }
    }
    Ok(all.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_parameters() {
        let d = tempfile::tempdir().unwrap();
        for n in ["2-kerf-vsock.ko", "0-vsock.ko", "1-kmorph.ko", "readme"] {
            std::fs::write(d.path().join(n), "").unwrap();
        }
        let names: Vec<String> = list(d.path())
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["0-vsock.ko", "1-kmorph.ko", "2-kerf-vsock.ko"]);
        assert_eq!(parameters("1-kmorph.ko", 0x4008_0000), "control=0x40080000");
        assert_eq!(parameters("2-kerf-vsock.ko", 1), "");
    }
}
