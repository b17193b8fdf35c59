//! What kmorphd gives the tree.

use std::collections::BTreeMap;
use std::time::Duration;

use kmorph_control::error::OpError;
use kmorph_platform::{InstanceSpec, PlatformError};

use crate::core::group::GroupSpec;
use crate::core::policy::{Patch, Policy};
use crate::store::StoreError;

/// What a reload of the configuration can change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Policy of instances that have none of their own.
    pub defaults: Policy,
    /// What the configuration says of single instances, by name.
    pub policies: BTreeMap<String, Patch>,
    /// Groups.
    pub groups: Vec<GroupSpec>,
}

/// Settings of the tree.
#[derive(Clone, Debug)]
pub struct TreeConfig {
    /// Policies and groups. They can be changed while the tree runs.
    pub settings: Settings,
    /// How long each actor may take to stop before it is killed.
    pub shutdown_limit: Duration,
    /// How long an agent may take to stop its workload when its instance is terminated.
    pub terminate_grace: Duration,
    /// How long one call to the store may take.
    pub store_limit: Duration,
    /// How long a fence, and how long taking resources back, may take.
    pub effect_limit: Duration,
    /// Seed of every jitter.
    pub seed: u64,
    /// What HELLO says of this side.
    pub release: String,
}

impl Default for TreeConfig {
    fn default() -> Self {
        TreeConfig {
            settings: Settings::default(),
            shutdown_limit: Duration::from_secs(5),
            terminate_grace: Duration::from_secs(10),
            store_limit: Duration::from_secs(5),
            effect_limit: Duration::from_secs(30),
            seed: 0,
            release: concat!("kmorphd ", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// Where instance definitions come from. Calls may block: the tree makes them off its own threads.
pub trait Definitions: Send + Sync + 'static {
    /// The definition of this name.
    fn load(&self, name: &str) -> Result<InstanceSpec, OpError>;

    /// Have the definition of this name say this from now on: a morph gave the instance another number, other CPUs, or
    /// another place.
    fn save(&self, spec: &InstanceSpec) -> Result<(), OpError>;

    /// All definitions that can be read; one that cannot is left out and logged by the implementation.
    fn all(&self) -> Vec<InstanceSpec>;
}

/// Why the tree did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store could not be read.
    #[error("read what is remembered of instances: {0}")]
    Store(#[from] StoreError),
    /// The platform could not be asked.
    #[error("ask the platform what runs: {0}")]
    Platform(#[from] PlatformError),
    /// An actor did not start.
    #[error("start the supervision tree: {0}")]
    Actor(String),
}
