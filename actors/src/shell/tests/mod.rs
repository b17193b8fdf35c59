//! The tree on a scripted platform, in paused time.

mod actors;
mod failures;
mod fake;
mod figures;
mod groups;
mod growth;
mod morphs;
mod operators;
mod policies;
mod restart;
mod service;
mod sessions;
mod shared;
mod sim;
mod standbys;
mod states;
mod switch;
mod takeovers;
mod topology;
mod workload;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::*;
use kmorph_platform::{InstanceId, InstanceSpec, Platform};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{Definitions, Settings, TreeConfig};
use crate::core::policy::Policy;
use crate::store::{InstanceRecord, MemoryStore, Store, StoreError};
use crate::{Service, Tree};
use fake::{Agent, Fake, Next};

const MS: Duration = Duration::from_millis(1);
/// Longest wait for anything, in paused time.
const PATIENCE: Duration = Duration::from_secs(900);

/// web is instance 1, db is 2, more are "i3", "i4", ...
struct Defs;

fn spec(name: &str, id: u16) -> InstanceSpec {
    InstanceSpec {
        name: name.into(),
        id: InstanceId(id),
        cpus: vec![u32::from(id) * 2, u32::from(id) * 2 + 1],
        memory_bytes: 512 << 20,
        memory_base: None,
    }
}

impl Definitions for Defs {
    fn load(&self, name: &str) -> Result<InstanceSpec, OpError> {
        self.all()
            .into_iter()
            .find(|s| s.name == name)
            .ok_or_else(|| OpError::new(ErrorKind::NotFound, format!("no definition of {name}")))
    }

    fn save(&self, _: &InstanceSpec) -> Result<(), OpError> {
        Err(OpError::new(ErrorKind::Internal, "definitions cannot be written here"))
    }

    fn all(&self) -> Vec<InstanceSpec> {
        vec![spec("web", 1), spec("db", 2), spec("i3", 3)]
    }
}

/// A store whose steps can be waited for, and that can be made to fail.
#[derive(Default)]
struct TestStore {
    memory: MemoryStore,
    steps: watch::Sender<Vec<RecoveryStep>>,
    broken: std::sync::atomic::AtomicBool,
    /// The next decision is refused.
    refused: std::sync::atomic::AtomicBool,
    /// The next save waits for it.
    gate: std::sync::Mutex<Option<Arc<tokio::sync::Notify>>>,
    /// The next decision waits for it.
    decides: std::sync::Mutex<Option<Arc<tokio::sync::Notify>>>,
}

impl TestStore {
    fn check(&self) -> Result<(), StoreError> {
        if self.broken.load(std::sync::atomic::Ordering::SeqCst) {
            Err(StoreError("disk full".into()))
        } else {
            Ok(())
        }
    }

    /// The next decision is refused.
    fn refuse_decisions(&self) {
        self.refused.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    /// Wait for a step in this phase.
    async fn phase(&self, phase: &str) -> RecoveryStep {
        let mut steps = self.steps.subscribe();
        let there = steps.wait_for(|s| s.iter().any(|s| s.phase == phase));
        match tokio::time::timeout(PATIENCE, there).await {
            Ok(steps) => steps.unwrap().iter().find(|s| s.phase == phase).cloned().unwrap(),
            Err(_) => panic!("there is no step {phase}: {:?}", self.phases()),
        }
    }

    fn phases(&self) -> Vec<String> {
        self.steps.borrow().iter().map(|s| s.phase.clone()).collect()
    }
}

#[async_trait]
impl Store for TestStore {
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError> {
        self.check()?;
        self.memory.journal(step).await?;
        self.steps.send_modify(|s| s.push(step.clone()));
        Ok(())
    }
    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError> {
        self.memory.recovery_log(filter).await
    }
    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        self.check()?;
        let gate = self.gate.lock().unwrap().take();
        if let Some(gate) = gate {
            gate.notified().await;
        }
        self.memory.save_instance(record).await
    }
    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError> {
        self.check()?;
        if self.refused.swap(false, std::sync::atomic::Ordering::SeqCst) {
            return Err(StoreError("disk full".into()));
        }
        let gate = self.decides.lock().unwrap().take();
        if let Some(gate) = gate {
            gate.notified().await;
        }
        self.memory.decide(records, steps).await?;
        self.steps.send_modify(|s| s.extend_from_slice(steps));
        Ok(())
    }
    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.memory.forget(name).await
    }
    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        self.memory.load_instances().await
    }
    async fn next_incident(&self) -> Result<u64, StoreError> {
        self.check()?;
        self.memory.next_incident().await
    }
}

struct World {
    tree: Tree,
    fake: Arc<Fake>,
    store: Arc<TestStore>,
}

fn with_defaults(defaults: Policy) -> TreeConfig {
    let settings = Settings { defaults, ..Settings::default() };
    TreeConfig { settings, ..TreeConfig::default() }
}

fn config() -> TreeConfig {
    let defaults = Policy { boot_grace: Duration::from_secs(20), ..Policy::default() };
    with_defaults(defaults)
}

async fn tree(fake: &Arc<Fake>, store: &Arc<TestStore>, config: TreeConfig) -> Tree {
    let platform: Arc<dyn Platform> = fake.clone();
    Tree::start(config, platform, store.clone(), Arc::new(Defs)).await.unwrap()
}

async fn world_with(config: TreeConfig) -> World {
    let (fake, store) = (Fake::new(), Arc::new(TestStore::default()));
    let tree = tree(&fake, &store, config).await;
    World { tree, fake, store }
}

async fn world() -> World {
    world_with(config()).await
}

fn args(name: &str) -> SpawnArgs {
    SpawnArgs {
        name: name.into(),
        kernel: "/boot/vmlinuz".into(),
        cmdline: Some("quiet".into()),
        initramfs: None,
        monitor: None,
        heartbeat_timeout_s: None,
        boot_timeout_s: None,
        wait: true,
        publish: vec![],
        handover_bytes: 0,
    }
}

impl World {
    /// Wait, in paused time, until the instance shows this state.
    async fn shows(&self, name: &str, state: InstanceState) -> InstanceView {
        let limit = Instant::now() + Duration::from_secs(600);
        loop {
            let view = self.tree.status(name).await.unwrap();
            if view.state == state {
                return view;
            }
            assert!(Instant::now() < limit, "{name} never shows {state}, it is {view:?}");
            tokio::time::sleep(MS).await;
        }
    }

    async fn up(&self, name: &str) -> InstanceView {
        let view = self.tree.spawn(args(name)).await.unwrap();
        assert_eq!(view.state, InstanceState::Healthy);
        view
    }

    /// Let this much time pass.
    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}
