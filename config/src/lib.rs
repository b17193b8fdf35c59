//! kmorph's configuration: a YAML file and its drop-ins, merged key by key.
//!
//! Every value keeps its place. A mistake is said with file, line, column, key and what is allowed there, and
//! `kmorphctl config check` says where each value came from. kmorphd and kmorphctl read it with the same code.

mod config;
mod folder;
mod groups;
mod load;
mod node;
mod paths;
mod policies;
mod reader;
mod values;

pub use config::{Config, History, PlatformChoice, Pool, ProcessSection, Profile};
pub use folder::{own_folder, own_folder_with};
pub use load::{Loaded, Setting, load};
pub use node::Place;
pub use paths::Paths;
pub use policies::{export_policies, import_policies};
pub use reader::{ConfigError, Problem};
