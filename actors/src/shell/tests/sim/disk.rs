//! A disk that is slow, full, or stuck, and remembers what was written.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Well,
    Slow,
    Full,
    Stuck,
}

struct State {
    dice: Dice,
    mood: Mood,
    alive: Arc<AtomicBool>,
    lost: bool,
}

/// What is on it outlives daemons.
pub(super) struct Disk {
    memory: MemoryStore,
    steps: Mutex<Vec<RecoveryStep>>,
    state: Mutex<State>,
}

/// The disk as one daemon has it open.
pub(super) struct Open {
    disk: Arc<Disk>,
    alive: Arc<AtomicBool>,
}

impl Disk {
    pub(super) fn new(dice: Dice) -> Arc<Disk> {
        let state = State { dice, mood: Mood::Well, alive: Arc::default(), lost: false };
        Arc::new(Disk { memory: MemoryStore::default(), steps: Mutex::default(), state: Mutex::new(state) })
    }

    pub(super) fn life(self: Arc<Disk>) -> Open {
        let alive = Arc::new(AtomicBool::new(true));
        self.state.lock().unwrap().alive = alive.clone();
        Open { disk: self, alive }
    }

    pub(super) fn end_life(&self) {
        self.state.lock().unwrap().alive.store(false, Ordering::SeqCst);
    }

    pub(super) fn spoil(&self) {
        let mut s = self.state.lock().unwrap();
        s.mood = [Mood::Slow, Mood::Full, Mood::Stuck][s.dice.roll(3) as usize];
    }

    pub(super) fn mend(&self) {
        self.state.lock().unwrap().mood = Mood::Well;
    }

    pub(super) fn steps(&self) -> Vec<RecoveryStep> {
        self.steps.lock().unwrap().clone()
    }

    /// Whether something could not be written.
    pub(super) fn lost(&self) -> bool {
        self.state.lock().unwrap().lost
    }
}

impl Open {
    async fn touch(&self) -> Result<(), StoreError> {
        let (mood, wait) = {
            let mut s = self.disk.state.lock().unwrap();
            let most = if s.mood == Mood::Slow { 1500 } else { 3 };
            (s.mood, Duration::from_millis(s.dice.roll(most)))
        };
        tokio::time::sleep(wait).await;
        if mood == Mood::Stuck {
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        if !self.alive.load(Ordering::SeqCst) {
            // The daemon died: nothing it had asked for happens any more.
            std::future::pending::<()>().await;
        }
        if mood == Mood::Full {
            self.disk.state.lock().unwrap().lost = true;
            return Err(StoreError("disk full".into()));
        }
        Ok(())
    }

    fn keep(&self, steps: &[RecoveryStep]) {
        self.disk.steps.lock().unwrap().extend_from_slice(steps);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::SeqCst);
    }
}

#[async_trait]
impl Store for Open {
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError> {
        self.touch().await?;
        self.keep(std::slice::from_ref(step));
        Ok(())
    }

    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError> {
        self.disk.memory.recovery_log(filter).await
    }

    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        self.touch().await?;
        self.disk.memory.save_instance(record).await
    }

    async fn commit(&self, record: &InstanceRecord, steps: &[RecoveryStep]) -> Result<(), StoreError> {
        // A caller that gave up waiting loses what it wanted written.
        struct Lost<'a>(&'a Disk, bool);
        impl Drop for Lost<'_> {
            fn drop(&mut self) {
                if !self.1 && self.0.state.lock().unwrap().alive.load(Ordering::SeqCst) {
                    self.0.state.lock().unwrap().lost = true;
                }
            }
        }
        let mut lost = Lost(&self.disk, false);
        self.touch().await?;
        lost.1 = true;
        self.disk.memory.save_instance(record).await?;
        self.keep(steps);
        Ok(())
    }

    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError> {
        self.touch().await?;
        self.disk.memory.decide(records, &[]).await?;
        self.keep(steps);
        Ok(())
    }

    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.touch().await?;
        self.disk.memory.forget(name).await
    }

    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        self.disk.memory.load_instances().await
    }

    async fn next_incident(&self) -> Result<u64, StoreError> {
        self.touch().await?;
        self.disk.memory.next_incident().await
    }
}
