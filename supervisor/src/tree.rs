//! The actors with this daemon's store, platform and definitions.

use std::sync::Arc;

use async_trait::async_trait;
use kmorph_actors::{Definitions, InstanceRecord, Store, StoreError, Tree, TreeConfig};
use kmorph_config::Config;
use kmorph_control::{ErrorKind, OpError, RecoveryLogArgs, RecoveryStep, decode, encode};
use kmorph_platform::{InstanceSpec, Platform};

use crate::definitions::KerfDefinitions;
use crate::store::SqliteStore;

/// Start the tree; it takes up what runs already.
pub async fn start(
    config: &Config,
    platform: Arc<dyn Platform>,
    store: Arc<dyn Store>,
    definitions: KerfDefinitions,
) -> Result<Tree, OpError> {
    let tree = TreeConfig {
        settings: config.settings.clone(),
        terminate_grace: config.terminate_grace,
        seed: seed(),
        ..TreeConfig::default()
    };
    Tree::start(tree, platform, store, Arc::new(definitions))
        .await
        .map_err(|e| OpError::new(ErrorKind::Internal, e.to_string()))
}

/// Jitter differs from daemon to daemon; it has no other secret.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

fn failed(e: OpError) -> StoreError {
    StoreError(e.message)
}

#[async_trait]
impl Store for SqliteStore {
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError> {
        self.write_step(step.clone()).await.map_err(failed)
    }

    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError> {
        self.read_steps(filter.clone()).await.map_err(failed)
    }

    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        let bytes = encode(record).map_err(failed)?;
        self.put_record(record.spec.name.clone(), bytes).await.map_err(failed)
    }

    async fn commit(&self, record: &InstanceRecord, steps: &[RecoveryStep]) -> Result<(), StoreError> {
        let bytes = encode(record).map_err(failed)?;
        self.put_together(record.spec.name.clone(), bytes, steps.to_vec()).await.map_err(failed)
    }

    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError> {
        let encoded = records.iter().map(|r| Ok((r.spec.name.clone(), encode(r)?)));
        let encoded = encoded.collect::<Result<Vec<_>, OpError>>().map_err(failed)?;
        SqliteStore::decide(self, encoded, steps.to_vec()).await.map_err(failed)
    }

    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.remove_record(name.to_owned()).await.map_err(failed)
    }

    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        self.records()
            .await
            .map_err(failed)?
            .into_iter()
            .map(|(name, bytes)| {
                decode(&bytes).map_err(|e| StoreError(format!("the record of {name} does not decode: {e}")))
            })
            .collect()
    }

    async fn next_incident(&self) -> Result<u64, StoreError> {
        self.count_incident().await.map_err(failed)
    }
}

impl Definitions for KerfDefinitions {
    fn load(&self, name: &str) -> Result<InstanceSpec, OpError> {
        self.named(name)
    }

    fn save(&self, spec: &InstanceSpec) -> Result<(), OpError> {
        self.put(spec)
    }

    fn all(&self) -> Vec<InstanceSpec> {
        self.every()
    }
}
