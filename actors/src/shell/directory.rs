//! Which instances there are and how they are reached. Shared by the tree, the transport and the events actor.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use kmorph_platform::InstanceId;

use super::instance::{Instance, InstanceMsg};
use super::link::Link;

/// The instances by name.
#[derive(Clone, Default)]
pub(crate) struct Directory(Arc<RwLock<BTreeMap<String, Arc<Instance>>>>);

impl Directory {
    /// The instance of this name.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<Instance>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Instance>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Add one. False when its name or number is taken.
    pub(crate) fn insert(&self, instance: Arc<Instance>) -> bool {
        let mut map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if map.contains_key(&instance.name) || map.values().any(|i| i.id() == instance.id()) {
            return false;
        }
        map.insert(instance.name.clone(), instance);
        true
    }

    /// Give an instance another number. False when that is taken.
    pub(crate) fn renumber(&self, instance: &Instance, id: InstanceId) -> bool {
        let map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if map.values().any(|i| i.id() == id) {
            return false;
        }
        instance.renumber(id);
        true
    }

    /// Forget one.
    pub(crate) fn remove(&self, name: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Which life the instance with this number is in.
    pub(crate) fn incarnation(&self, id: InstanceId) -> Option<u64> {
        let found = {
            let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
            map.values().find(|i| i.id() == id).cloned()
        };
        found.map(|i| i.record().incarnation)
    }

    /// The link of the instance with this number.
    pub(crate) fn link(&self, id: InstanceId) -> Option<Link<InstanceMsg>> {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        map.values().find(|i| i.id() == id).map(|i| i.link.clone())
    }
}
