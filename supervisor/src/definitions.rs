//! Definitions of instances, as kerf left them.

use std::path::PathBuf;

use kmorph_control::{ErrorKind, OpError};
use kmorph_platform::{InstanceId, InstanceSpec};
use libkerf::{Instance, KerfError};

/// A folder of device trees, read anew at each question: kerf may change it at any time.
#[derive(Clone, Debug)]
pub struct KerfDefinitions {
    dir: PathBuf,
}

impl KerfDefinitions {
    /// Of a folder.
    pub fn new(dir: PathBuf) -> KerfDefinitions {
        KerfDefinitions { dir }
    }

    /// One definition.
    pub fn named(&self, name: &str) -> Result<InstanceSpec, OpError> {
        libkerf::load_named(&self.dir, name).map(spec).map_err(|e| error(&e))
    }

    /// Have a definition say what its instance is made of now.
    pub fn put(&self, s: &InstanceSpec) -> Result<(), OpError> {
        let instance = Instance {
            name: s.name.clone(),
            id: s.id.0,
            cpus: s.cpus.clone(),
            memory_bytes: s.memory_bytes,
            memory_base: s.memory_base,
            file: String::new(),
        };
        libkerf::save_named(&self.dir, &instance).map_err(|e| error(&e))
    }

    /// All sound ones; what is wrong with others is logged.
    pub fn every(&self) -> Vec<InstanceSpec> {
        match libkerf::load_all(&self.dir) {
            Ok(loaded) => {
                for error in &loaded.errors {
                    tracing::warn!(%error, "a definition is not usable");
                }
                loaded.instances.into_iter().map(spec).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "definitions cannot be read");
                Vec::new()
            }
        }
    }
}

fn spec(i: Instance) -> InstanceSpec {
    InstanceSpec {
        name: i.name,
        id: InstanceId(i.id),
        cpus: i.cpus,
        memory_bytes: i.memory_bytes,
        memory_base: i.memory_base,
    }
}

fn error(e: &KerfError) -> OpError {
    let kind = match e {
        KerfError::NotFound { .. } => ErrorKind::NotFound,
        KerfError::Io { .. } => ErrorKind::Internal,
        _ => ErrorKind::BadInput,
    };
    OpError::new(kind, e.to_string())
}
