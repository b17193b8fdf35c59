//! What can be wrong with a definition. Every text names the file, and the node and property where
//! there is one, what was found, and what is allowed.

use std::path::PathBuf;

/// An error of this library.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KerfError {
    /// A file or program could not be used.
    #[error("{what}: {why}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        why: String,
    },
    /// No definition of that name.
    #[error(
        "there is no instance {name:?}: neither {name}.dts nor {name}.dtb is in {dir}; define it with kerf create"
    )]
    NotFound {
        /// Instance name.
        name: String,
        /// The folder searched.
        dir: String,
    },
    /// dtc refused the source.
    #[error("{file} is not a device tree: {message}")]
    Source {
        /// File.
        file: PathBuf,
        /// dtc's own words; they name the line.
        message: String,
    },
    /// The binary form is damaged.
    #[error("{file} is not a device tree blob: {message}")]
    Blob {
        /// File or what it was compiled from.
        file: String,
        /// What is wrong.
        message: String,
    },
    /// A property is missing or wrong.
    #[error("{file}: {node}: {property}: {message}")]
    Property {
        /// File.
        file: String,
        /// Node path.
        node: String,
        /// Property name.
        property: String,
        /// What was found and what is allowed.
        message: String,
    },
    /// Two definitions contradict each other.
    #[error("{0}")]
    Conflict(String),
}
