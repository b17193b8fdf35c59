//! kmorphd that kills itself: SIGKILL before or after the n-th thing that lasts.
//!
//! `KMORPH_FAIL_AT` is n, from 1; `KMORPH_FAIL_LOG` a file that gets the name of every boundary as it is
//! reached. `tests/killed.rs` starts it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use kmorph_actors::{InstanceRecord, Store, StoreError};
use kmorph_control::{RecoveryLogArgs, RecoveryStep};
use kmorph_platform::{
    BootRequest, Booted, ConsoleLog, ExistingInstance, FenceReport, InstanceId, Inventory, Platform,
    PlatformError, PlatformEvent, PlatformKind, PulseSample, ReclaimReport, Stream,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use tokio::sync::mpsc;

struct Points {
    at: u64,
    log: PathBuf,
    passed: AtomicU64,
}

impl Points {
    async fn pass(&self, what: &str) {
        let n = self.passed.fetch_add(1, Ordering::SeqCst) + 1;
        let said = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .and_then(|mut log| writeln!(log, "{n} {what}"));
        if n == self.at || said.is_err() {
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

    async fn release_all(&self) -> Result<(), PlatformError> {
        self.0.release_all().await
    }
}

fn main() -> ExitCode {
    let at = std::env::var("KMORPH_FAIL_AT").ok().and_then(|n| n.parse().ok());
    let (Some(at), Some(log)) = (at, std::env::var_os("KMORPH_FAIL_LOG")) else { return ExitCode::FAILURE };
    let points = Arc::new(Points { at, log: log.into(), passed: AtomicU64::new(0) });
    let machine = points.clone();
    kmorphd::main(kmorphd::Wrap {
        store: Box::new(move |store| Arc::new(Journal(store, points))),
        platform: Box::new(move |platform| Arc::new(Machine(platform, machine))),
    })
}
