//! The folder of definitions.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::instance::name_is_valid;
use crate::tree::MAX_BLOB;
use crate::{Instance, KerfError, Tree, compile, instances_of};

/// Where kerf keeps them.
pub const INSTANCES: &str = "/var/lib/kerf/instances";

/// Everything a folder defines; one broken file does not hide the others.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Sound definitions, by id.
    pub instances: Vec<Instance>,
    /// What was wrong with the rest.
    pub errors: Vec<KerfError>,
}

/// The tree of a file, source or blob.
pub(crate) fn read_tree(path: &Path) -> Result<Tree, KerfError> {
    if path.extension().is_some_and(|e| e == "dts") {
        compile(path)
    } else {
        let io = |e: std::io::Error| KerfError::Io {
            what: format!("read {}", path.display()),
            why: e.to_string(),
        };
        let mut blob = Vec::new();
        // One byte more than allowed is enough to refuse it.
        std::fs::File::open(path)
            .map_err(io)?
            .take(MAX_BLOB as u64 + 1)
            .read_to_end(&mut blob)
            .map_err(io)?;
        Tree::from_blob(&path.display().to_string(), &blob)
    }
}

fn read(path: &Path) -> Result<Vec<Instance>, KerfError> {
    instances_of(&read_tree(path)?)
}

/// The definition of one instance, from `<name>.dts` or `<name>.dtb`. The source wins when both
/// exist: it is what people edit.
pub fn load_named(dir: &Path, name: &str) -> Result<Instance, KerfError> {
    if !name_is_valid(name) {
        return Err(KerfError::Conflict(format!(
            "{name:?} is no instance name: use letters, digits, '-', '_' and '.', a letter or digit first"
        )));
    }
    let path = path_of(dir, name)?;
    let all = read(&path)?;
    let found: Vec<String> = all.iter().map(|i| i.name.clone()).collect();
    all.into_iter().find(|i| i.name == name).ok_or_else(|| {
        KerfError::Conflict(format!(
            "{} defines {} and not {name}; rename the file or its model",
            path.display(),
            found.join(", ")
        ))
    })
}

/// The file that defines an instance.
pub(crate) fn path_of(dir: &Path, name: &str) -> Result<PathBuf, KerfError> {
    let mut forms = ["dts", "dtb"].iter().map(|e| dir.join(format!("{name}.{e}")));
    forms
        .find(|p| p.is_file())
        .ok_or_else(|| KerfError::NotFound { name: name.into(), dir: dir.display().to_string() })
}

/// All definitions of a folder, with contradictions among them found.
pub fn load_all(dir: &Path) -> Result<Loaded, KerfError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Loaded::default()),
        Err(e) => return Err(KerfError::Io { what: format!("list {}", dir.display()), why: e.to_string() }),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "dts" || e == "dtb"))
        .collect();
    paths.sort();
    // "x.dts" sorts after "x.dtb"; the source wins.
    let sources: Vec<PathBuf> =
        paths.iter().filter(|p| p.extension().is_some_and(|e| e == "dts")).cloned().collect();
    paths
        .retain(|p| p.extension().is_some_and(|e| e == "dts") || !sources.contains(&p.with_extension("dts")));
    let mut out = Loaded::default();
    for path in paths {
        match read(&path) {
            Err(e) => out.errors.push(e),
            Ok(all) => {
                for new in all {
                    match conflict(&out.instances, &new) {
                        Some(e) => out.errors.push(e),
                        None => out.instances.push(new),
                    }
                }
            }
        }
    }
    out.instances.sort_by_key(|i| i.id);
    Ok(out)
}

/// Names and ids are unique. CPUs and memory may be promised twice: who starts first has them, and
/// the second is refused then.
fn conflict(known: &[Instance], new: &Instance) -> Option<KerfError> {
    let twin = known.iter().find(|k| k.name == new.name || k.id == new.id)?;
    let what =
        if twin.name == new.name { format!("the name {}", new.name) } else { format!("the id {}", new.id) };
    Some(KerfError::Conflict(format!("{} uses {what}, which {} has already", new.file, twin.file)))
}
