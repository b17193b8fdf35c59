//! Finding and reading the files.

use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kmorph_control::ErrorKind;

use crate::folder::changeable;
use crate::node::{Node, Place, Value};
use crate::reader::{ConfigError, Problem, Reader};
use crate::{Config, Paths};

/// A value that is not the default.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    /// Key, with the sections it is in.
    pub key: String,
    /// Value.
    pub value: String,
    /// File, line and column; or the profile it follows from.
    pub source: String,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Files it was read from, in order.
    pub files: Vec<PathBuf>,
    /// Every value that is not the default.
    pub settings: Vec<Setting>,
}

fn unreadable(file: &Path, e: &std::io::Error) -> ConfigError {
    let kind = match e.kind() {
        Io::NotFound => ErrorKind::NotFound,
        Io::PermissionDenied => ErrorKind::Denied,
        _ => ErrorKind::BadInput,
    };
    let place = Place { file: file.into(), line: 0, column: 0 };
    ConfigError::one(kind, Problem { place, key: String::new(), message: format!("cannot be read: {e}") })
}

/// Whoever writes the configuration commands the daemon.
fn ours(path: &Path) -> Result<(), ConfigError> {
    match changeable(path).map_err(|e| unreadable(path, &e))? {
        None => Ok(()),
        Some(message) => {
            let place = Place { file: path.into(), line: 0, column: 0 };
            Err(ConfigError::one(ErrorKind::Denied, Problem { place, key: String::new(), message }))
        }
    }
}

/// Drop-ins of a file, in lexical order.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut dir = file.as_os_str().to_owned();
    dir.push(".d");
    let dir = PathBuf::from(dir);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == Io::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(&dir, &e)),
    };
    ours(&dir)?;
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| unreadable(&dir, &e))?.path();
        if path.extension().is_some_and(|e| e == "conf") {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// Read the configuration: `file` or the default one, and its drop-ins. The default file may be absent, a
/// named one may not.
pub fn load(file: Option<&Path>, paths: &Paths) -> Result<Loaded, ConfigError> {
    let main = file.unwrap_or(&paths.config);
    let mut texts = Vec::new();
    match std::fs::read_to_string(main) {
        Ok(text) => texts.push((main.to_owned(), text)),
        Err(e) if file.is_none() && e.kind() == Io::NotFound => {}
        Err(e) => return Err(unreadable(main, &e)),
    }
    for path in drop_ins(main)? {
        let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
        texts.push((path, text));
    }
    let start = Place { file: main.into(), line: 0, column: 0 };
    let mut root = Node { place: start, value: Value::Map(Vec::new()) };
    let mut broken = Vec::new();
    for (path, text) in &texts {
        ours(path)?;
        let name: Arc<Path> = path.as_path().into();
        match Node::parse(text, &name) {
            Ok(Some(node)) => root.merge(node),
            Ok(None) => {}
            Err(problem) => broken.push(problem),
        }
    }
    if !broken.is_empty() {
        return Err(ConfigError { kind: ErrorKind::BadInput, problems: broken });
    }
    let reader = Reader::default();
    let config = Config::read(&reader, &root, paths);
    let places = reader.finish()?;
    let settings = changed(&config, &Config::new(paths), &places);
    Ok(Loaded { config, files: texts.into_iter().map(|(path, _)| path).collect(), settings })
}

fn changed(config: &Config, default: &Config, places: &[(String, Place)]) -> Vec<Setting> {
    let defaults = default.values();
    config
        .values()
        .into_iter()
        .filter(|value| !defaults.contains(value))
        .map(|(key, value)| {
            let source = places.iter().rev().find(|(k, _)| *k == key).map_or_else(
                || format!("profile {}", format!("{:?}", config.profile).to_lowercase()),
                |(_, place)| place.to_string(),
            );
            Setting { key, value, source }
        })
        .collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
