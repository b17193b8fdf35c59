//! kmorphd with boundaries at which something happens: before and after each thing that lasts.
//!
//! `KMORPH_FAIL_LOG` is a file that gets the name of every boundary as it is reached. `KMORPH_FAIL_AT` is the number of the
//! boundary, from 1, at which it sends itself SIGKILL. `KMORPH_FAIL_ARM` is a file that need not be there yet: once it
//! says `<number> [<command>...]`, boundaries are counted anew, and at that one the command is run to its end, or the
//! daemon killed when there is none. `tests/killed.rs` starts it, and the scenario `failures`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kmorph_actors::{InstanceRecord, Store, StoreError};
use kmorph_control::{RecoveryLogArgs, RecoveryStep};
use kmorph_platform::{
    BootRequest, Booted, ConsoleLog, ExistingInstance, FenceReport, Grown, Growth, HandoverMoved,
    HandoverRegion, InstanceId, Inventory, MemoryRange, Platform, PlatformError, PlatformEvent, PlatformKind,
    PulseSample, ReclaimReport, Stream,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use tokio::sync::mpsc;

/// What happens where.
#[derive(Default)]
struct Plan {
    at: u64,
    command: Vec<String>,
    passed: u64,
}

struct Points {
    plan: Mutex<Plan>,
    arm: Option<PathBuf>,
    log: PathBuf,
}

impl Points {
    /// Count one more; what has to be done now.
    fn count(&self, what: &str) -> std::io::Result<Option<Vec<String>>> {
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(arm) = &self.arm
            && let Ok(text) = std::fs::read_to_string(arm)
            && std::fs::remove_file(arm).is_ok()
        {
            let mut words = text.split_whitespace().map(str::to_owned);
            let at = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            *plan = Plan { at, command: words.collect(), passed: 0 };
        }
        plan.passed += 1;
        let mut log = std::fs::File::options().create(true).append(true).open(&self.log)?;
        writeln!(log, "{} {what}", plan.passed)?;
        Ok((plan.passed == plan.at).then(|| plan.command.clone()))
    }

    async fn pass(&self, what: &str) {
        let kills = match self.count(what) {
            Ok(None) => false,
            Ok(Some(command)) => match command.split_first() {
                Some((program, args)) => {
                    let done = tokio::process::Command::new(program).args(args).output().await;
                    // Whoever wrote the command finds what came of it beside the boundaries.
                    let said = done.map_or_else(|e| e.to_string(), |d| format!("{d:?}"));
                    let _ = std::fs::write(self.log.with_extension("done"), said);
                    false
                }
                None => true,
            },
            Err(_) => true,
        };
        if kills {
            // A signal that cannot be sent leaves the daemon waiting, and the test says so.
            let _ = kill(getpid(), Signal::SIGKILL);
            std::future::pending::<()>().await;
        }
    }

    async fn around<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        self.pass(&format!("before {what}")).await;
        let result = work.await;
        self.pass(&format!("after {what}")).await;
        result
    }
}

struct Journal(Arc<dyn Store>, Arc<Points>);

#[async_trait]
impl Store for Journal {
    async fn journal(&self, step: &RecoveryStep) -> Result<(), StoreError> {
        self.1
            .around(
                &format!("journal {} {} {}", step.instance, step.phase, step.detail),
                self.0.journal(step),
            )
            .await
    }

    async fn recovery_log(&self, filter: &RecoveryLogArgs) -> Result<Vec<RecoveryStep>, StoreError> {
        self.0.recovery_log(filter).await
    }

    async fn save_instance(&self, record: &InstanceRecord) -> Result<(), StoreError> {
        self.1
            .around(&format!("save {} {:?}", record.spec.name, record.saved), self.0.save_instance(record))
            .await
    }

    async fn commit(&self, record: &InstanceRecord, steps: &[RecoveryStep]) -> Result<(), StoreError> {
        self.1
            .around(&format!("commit {} {:?}", record.spec.name, record.saved), self.0.commit(record, steps))
            .await
    }

    async fn decide(&self, records: &[InstanceRecord], steps: &[RecoveryStep]) -> Result<(), StoreError> {
        let names: Vec<&str> = records.iter().map(|r| r.spec.name.as_str()).collect();
        self.1.around(&format!("decide {names:?}"), self.0.decide(records, steps)).await
    }

    async fn forget(&self, name: &str) -> Result<(), StoreError> {
        self.1.around(&format!("forget {name}"), self.0.forget(name)).await
    }

    async fn load_instances(&self) -> Result<Vec<InstanceRecord>, StoreError> {
        self.0.load_instances().await
    }

    async fn next_incident(&self) -> Result<u64, StoreError> {
        self.1.around("next incident", self.0.next_incident()).await
    }
}

struct Machine(Arc<dyn Platform>, Arc<Points>);

#[async_trait]
impl Platform for Machine {
    fn kind(&self) -> PlatformKind {
        self.0.kind()
    }

    async fn inventory(&self) -> Result<Inventory, PlatformError> {
        self.0.inventory().await
    }

    async fn existing(&self) -> Result<Vec<ExistingInstance>, PlatformError> {
        self.0.existing().await
    }

    fn take_events(&self) -> Option<mpsc::Receiver<PlatformEvent>> {
        self.0.take_events()
    }

    async fn check(&self, request: &BootRequest) -> Result<(), PlatformError> {
        self.0.check(request).await
    }

    async fn boot(&self, request: &BootRequest) -> Result<Booted, PlatformError> {
        self.1.around("boot", self.0.boot(request)).await
    }

    fn pulse(&self, id: InstanceId, incarnation: u64) -> Result<PulseSample, PlatformError> {
        self.0.pulse(id, incarnation)
    }

    async fn fence(&self, id: InstanceId, incarnation: u64) -> Result<FenceReport, PlatformError> {
        self.1.around("fence", self.0.fence(id, incarnation)).await
    }

    async fn reclaim(
        &self,
        id: InstanceId,
        incarnation: u64,
        release_cpus: bool,
    ) -> Result<ReclaimReport, PlatformError> {
        self.1.around("reclaim", self.0.reclaim(id, incarnation, release_cpus)).await
    }

    async fn grow(
        &self,
        id: InstanceId,
        incarnation: u64,
        growth: &Growth,
        limit: Duration,
    ) -> Result<Grown, PlatformError> {
        self.1.around("grow", self.0.grow(id, incarnation, growth, limit)).await
    }

    async fn release_cpus(&self, cpus: &[u32]) -> Result<(), PlatformError> {
        self.1.around("release CPUs", self.0.release_cpus(cpus)).await
    }

    async fn connect(
        &self,
        id: InstanceId,
        incarnation: u64,
        port: u32,
    ) -> Result<Box<dyn Stream>, PlatformError> {
        self.0.connect(id, incarnation, port).await
    }

    async fn console(&self, id: InstanceId, from_seq: u64) -> Result<ConsoleLog, PlatformError> {
        self.0.console(id, from_seq).await
    }

    async fn handover_create(&self, key: u64, size: u64) -> Result<MemoryRange, PlatformError> {
        self.1.around("handover create", self.0.handover_create(key, size)).await
    }

    async fn handover_share(&self, key: u64, id: InstanceId, incarnation: u64) -> Result<(), PlatformError> {
        self.1.around("handover share", self.0.handover_share(key, id, incarnation)).await
    }

    async fn handover_unshare(
        &self,
        key: u64,
        id: InstanceId,
        incarnation: u64,
    ) -> Result<(), PlatformError> {
        self.1.around("handover unshare", self.0.handover_unshare(key, id, incarnation)).await
    }

    async fn handover_assign(
        &self,
        key: u64,
        id: Option<InstanceId>,
        limit: Duration,
    ) -> Result<HandoverMoved, PlatformError> {
        self.1.around("handover assign", self.0.handover_assign(key, id, limit)).await
    }

    async fn handover_destroy(&self, key: u64) -> Result<(), PlatformError> {
        self.1.around("handover destroy", self.0.handover_destroy(key)).await
    }

    async fn handover_list(&self) -> Result<Vec<HandoverRegion>, PlatformError> {
        self.0.handover_list().await
    }

    async fn window_open(
        &self,
        key: u64,
        size: u64,
        from: (InstanceId, u64),
        to: (InstanceId, u64),
    ) -> Result<(), PlatformError> {
        self.1.around("window open", self.0.window_open(key, size, from, to)).await
    }

    async fn window_close(&self, key: u64, limit: Duration) -> Result<(), PlatformError> {
        self.1.around("window close", self.0.window_close(key, limit)).await
    }

    async fn windows(&self) -> Result<Vec<u64>, PlatformError> {
        self.0.windows().await
    }

    async fn release_all(&self) -> Result<(), PlatformError> {
        self.0.release_all().await
    }
}

fn main() -> ExitCode {
    let at = std::env::var("KMORPH_FAIL_AT").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let Some(log) = std::env::var_os("KMORPH_FAIL_LOG") else { return ExitCode::FAILURE };
    let points = Arc::new(Points {
        plan: Mutex::new(Plan { at, ..Plan::default() }),
        arm: std::env::var_os("KMORPH_FAIL_ARM").map(PathBuf::from),
        log: log.into(),
    });
    let machine = points.clone();
    kmorphd::main(kmorphd::Wrap {
        store: Box::new(move |store| Arc::new(Journal(store, points))),
        platform: Box::new(move |platform| Arc::new(Machine(platform, machine))),
    })
}
