//! What is remembered across restarts of the daemon.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use kmorph_control::Publish;
use kmorph_control::views::{RecoveryLogArgs, RecoveryStep};
use kmorph_platform::{Growth, InstanceSpec, MemoryRange};
use serde::{Deserialize, Serialize};

use crate::core::morph;
use crate::core::policy::{Patch, Policy};
use crate::core::recovery::Saved;

/// The store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// Everything that is remembered of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Its definition when it was last started.
    pub spec: InstanceSpec,
    /// Its policy, as it was in force when this was written.
    pub policy: Policy,
    /// What operators set of it.
    #[serde(default)]
    pub overrides: Patch,
    /// Watched, not acted on.
    #[serde(default)]
    pub maintenance: bool,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs of the user.
    pub initramfs: Option<PathBuf>,
    /// The user's part of the kernel command line.
    pub cmdline: String,
    /// Number of its latest start.
    pub incarnation: u64,
    /// Completed recoveries.
    pub recoveries: u64,
    /// The incident that is open, 0 for none.
    pub incident: u64,
    /// Kernel release that runs, empty for none.
    pub release: String,
    /// Its memory while it has any.
    pub region: Option<MemoryRange>,
    /// When its latest start ended, milliseconds since the Unix epoch.
    pub booted_unix_ms: Option<u64>,
    /// One sentence on its state.
    pub reason: String,
    /// State of its machine.
    pub saved: Saved,
    /// What it is there for.
    #[serde(default)]
    pub role: Role,
    /// The morph that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub morph: Option<MorphRecord>,
    /// Services of it that are offered on the primary kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// What of its definition it does not have yet: the new kernel of a morph gets it from the old one. A new start
    /// takes everything.
    #[serde(default, skip_serializing_if = "Growth::is_empty")]
    pub growth: Growth,
    /// Memory its workload keeps through morphs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<Handover>,
}

/// A region of handover memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Its number, from the same count as incidents.
    pub key: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// What an instance is there for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It is one of the operator's.
    #[default]
    Own,
    /// One side of a morph of the instance of this name: the new kernel until it is committed, the old one
    /// after that. It is never restarted, and forgotten when it has stopped.
    Side(String),
    /// The standby of the instance of this name: it waits until it is needed. It is never restarted, and forgotten when
    /// it has stopped; the instance has another one started.
    Standby(String),
}

/// What has to be remembered of a morph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MorphRecord {
    /// Number, from the same count as incidents.
    pub number: u64,
    /// Name of the other side.
    pub side: String,
    /// Kernel release it began with.
    pub from: String,
    /// State of its machine.
    pub saved: morph::Saved,
    /// The old kernel's workload may stand still: it has to be told to go on when the morph is undone.
    #[serde(default)]
    pub frozen: bool,
    /// The new kernel may take over by itself, and may have.
    #[serde(default)]
    pub handed_over: bool,
}

impl InstanceRecord {
    /// What operators have set is as it is set there.
    pub(crate) fn set_as(&mut self, there: &InstanceRecord) {
        (self.policy, self.maintenance) = (there.policy, there.maintenance);
        self.overrides.clone_from(&there.overrides);
    }

    /// An instance that was never started.
    pub fn new(spec: InstanceSpec, policy: Policy) -> InstanceRecord {
        InstanceRecord {
            spec,
            policy,
            overrides: Patch::default(),
            maintenance: false,
            kernel: PathBuf::new(),
            initramfs: None,
            cmdline: String::new(),
            incarnation: 0,
            recoveries: 0,
            incident: 0,
            release: String::new(),
            region: None,
            booted_unix_ms: None,
            reason: "not started".into(),
            saved: Saved::default(),
            role: Role::Own,
            morph: None,
            publish: vec![],
            growth: Growth::default(),
            handover: None,
        }
    }
}

/// Durable memory of the daemon. Every call returns when what it wrote is safe.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Append one step of a recovery.
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError>;

    /// Steps, oldest first.
    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError>;

    /// Remember an instance, replacing what was remembered under its name.
    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError>;

    /// Remember an instance together with the steps that led there, so that a daemon killed at any moment finds
    /// both or neither. A store that cannot do both at once remembers the instance first: a step that is
    /// missing costs history, a record that is missing would leave an incident open for ever.
    async fn commit(&self, record: &InstanceRecord, steps: &[RecoveryStep]) -> Result<(), StoreError> {
        let saved = self.save_instance(record).await;
        for step in steps {
            self.journal(step).await?;
        }
        saved
    }

    /// Remember all of these together with the steps, or nothing. After an error nothing of it is there and nothing
    /// will be; a call that does not return may have done either.
    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError>;

    /// Forget an instance; its history stays.
    async fn forget(&self, name: &str) -> Result<(), StoreError>;

    /// Everything remembered of instances.
    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError>;

    /// A number no incident had before, from 1.
    async fn next_incident(&self) -> Result<u64, StoreError>;
}

/// Whether a step is one the filter asks for.
pub fn matches(filter: &RecoveryLogArgs, step: &RecoveryStep) -> bool {
    filter.instance.as_ref().is_none_or(|i| *i == step.instance)
        && filter.since_unix_ms.is_none_or(|t| step.at_unix_ms >= t)
}

#[derive(Default)]
struct Memory {
    steps: Vec<RecoveryStep>,
    instances: BTreeMap<String, InstanceRecord>,
    incidents: u64,
}

/// A store that forgets when the process ends.
#[derive(Default)]
pub struct MemoryStore(Mutex<Memory>);

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        // Every change is one insert or push, so a panic elsewhere left it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError> {
        self.lock().steps.push(step.clone());
        Ok(())
    }

    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError> {
        Ok(self.lock().steps.iter().filter(|s| matches(filter, s)).cloned().collect())
    }

    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        self.lock().instances.insert(record.spec.name.clone(), record.clone());
        Ok(())
    }

    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError> {
        let mut memory = self.lock();
        memory.instances.extend(records.iter().map(|r| (r.spec.name.clone(), r.clone())));
        memory.steps.extend_from_slice(steps);
        Ok(())
    }

    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.lock().instances.remove(name);
        Ok(())
    }

    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        Ok(self.lock().instances.values().cloned().collect())
    }

    async fn next_incident(&self) -> Result<u64, StoreError> {
        let mut memory = self.lock();
        memory.incidents += 1;
        Ok(memory.incidents)
    }
}
