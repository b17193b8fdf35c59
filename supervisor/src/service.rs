//! What each request of the control socket does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kmorph_actors::Tree;
use kmorph_control::{
    ConsoleChunk, ConsoleLine, DaemonView, ErrorKind, InstanceState, OpError, RecoveryLogArgs, RecoveryStep,
    Request, encode,
};
use kmorph_platform::{CpuState, InstanceId, Platform, PlatformError};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, interval};

use crate::server::{Client, Handler};
use crate::settings::Configured;
use crate::store::{FOLLOW_QUEUE, SqliteStore};

/// How often a followed console is read again: there is no event for a line in another kernel's memory.
const CONSOLE_PERIOD: Duration = Duration::from_millis(100);
/// Lines in one frame.
const CONSOLE_LINES: usize = 1000;

/// States in which an instance has no CPUs and no memory.
const IDLE: [InstanceState; 3] = [InstanceState::Defined, InstanceState::Stopped, InstanceState::Degraded];

/// Everything requests need.
pub struct Service {
    /// The actors.
    pub tree: Tree,
    /// CPUs and memory.
    pub platform: Arc<dyn Platform>,
    /// History.
    pub store: SqliteStore,
    /// When the daemon started.
    pub started: Instant,
    /// Configuration.
    pub configured: Configured,
    /// Where metrics are served.
    pub metrics: Option<String>,
    /// Asks the daemon to end.
    pub stop: watch::Sender<bool>,
    /// Ends with the daemon: what still follows something ends with it.
    pub ending: watch::Receiver<bool>,
}

#[async_trait]
impl Handler for Service {
    async fn handle(&self, request: &Request, client: &mut Client) -> Result<Vec<u8>, OpError> {
        if let Some(result) = self.operate(request, client).await {
            return result;
        }
        match request {
            Request::DaemonStatus => encode(&self.status().await?),
            Request::DaemonStop { graceful } => {
                let mut given_back = Ok(());
                if *graceful {
                    self.terminate_all().await?;
                    given_back = self.all_given_back().await;
                }
                self.stop.send_replace(true);
                given_back.and_then(|()| encode(&()))
            }
            Request::Spawn(args) => encode(&self.tree.spawn(args.clone()).await?),
            Request::List => encode(&self.tree.list().await),
            Request::Status { name } => encode(&self.tree.status(name).await?),
            Request::Terminate { name, force } => encode(&self.tree.terminate(name, *force).await?),
            Request::Heartbeat { name } => encode(&self.tree.heartbeat(name).await?),
            Request::Health { name } => encode(&self.tree.health(name).await?),
            Request::Ping { name } => encode(&self.tree.ping(name).await?),
            Request::Recover { name } => encode(&self.tree.recover(name).await?),
            Request::RecoveryLog { filter, follow } => {
                self.recovery_log(filter, *follow, client).await?;
                encode(&())
            }
            Request::Console { name, follow } => {
                self.console(name, *follow, client).await?;
                encode(&())
            }
            other => Err(OpError::new(ErrorKind::Internal, format!("{other:?} is not handled"))),
        }
    }
}

impl Service {
    /// Terminate every instance. One that cannot be keeps its daemon, which then goes on.
    async fn terminate_all(&self) -> Result<(), OpError> {
        self.tree.terminate_all(false).await.into_iter().next().map_or(Ok(()), Err)
    }

    /// The same, and an error when something runs after all.
    async fn all_given_back(&self) -> Result<(), OpError> {
        self.give_back().await?;
        let used = self.platform.inventory().await.map_err(|e| platform_error(&e))?.used;
        if used.is_empty() {
            return Ok(());
        }
        let mut ids: Vec<String> = used.iter().map(|(_, id)| id.to_string()).collect();
        ids.dedup();
        let text = format!(
            "kmorphd ends, and memory of the pool is still in use by kernels it has no definition of: {}; a machine is free of \
             them with its next start",
            ids.join(", ")
        );
        Err(OpError::new(ErrorKind::Internal, text))
    }

    /// The primary gets its CPUs and memory back, when nothing runs.
    pub(crate) async fn give_back(&self) -> Result<(), OpError> {
        if self.platform.inventory().await.is_ok_and(|i| i.used.is_empty()) {
            self.platform.release_all().await.map_err(|e| {
                let OpError { kind, message, .. } = platform_error(&e);
                let all =
                    "its log names everything that was not; the next kmorphd that is stopped tries again";
                OpError::new(
                    kind,
                    format!("kmorphd ends, and not everything was given back: {message}; {all}"),
                )
            })?;
        }
        Ok(())
    }

    async fn status(&self) -> Result<DaemonView, OpError> {
        let inventory = self.platform.inventory().await.map_err(|e| platform_error(&e))?;
        let instances = self.tree.list().await;
        let count = |s: CpuState| inventory.cpus.iter().filter(|c| c.state == s).count();
        Ok(DaemonView {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            platform: self.platform.kind().to_string(),
            running: instances.iter().filter(|i| !IDLE.contains(&i.state)).count(),
            instances: instances.len(),
            cpus_total: inventory.cpus.len(),
            cpus_online: count(CpuState::Online),
            cpus_lent: count(CpuState::Lent),
            pool_bytes: inventory.pool.iter().map(|r| r.size).sum(),
            pool_free_bytes: inventory.free_bytes(),
            max_lag_ms: self.tree.max_lag().as_secs_f64() * 1e3,
            lag_p99_ms: self.tree.lag(0.99).as_secs_f64() * 1e3,
            metrics: self.metrics.clone(),
            store_trouble: self.store.trouble(),
            config_files: self.configured.files(),
        })
    }

    async fn recovery_log(
        &self,
        filter: &RecoveryLogArgs,
        follow: bool,
        client: &mut Client,
    ) -> Result<(), OpError> {
        if let Some(name) = &filter.instance {
            self.tree.status(name).await?; // an unknown name is an error, not an empty log
        }
        // Subscribed before the past is read, so nothing falls between.
        let mut news = self.store.follow();
        let (mut past, mut after) = (VecDeque::new(), 0);
        loop {
            let some = self.store.read_some(filter, after).await?;
            let Some((last, _)) = some.last() else { break };
            after = *last;
            for (_, step) in some {
                client.item(&step).await?;
                past.push_back(step);
            }
            past.drain(..past.len().saturating_sub(FOLLOW_QUEUE));
        }
        if !follow {
            return Ok(());
        }
        // Some may be both in what was read and in what is followed.
        let known = |s: &RecoveryStep| past.contains(s);
        let mut ending = self.ending.clone();
        loop {
            let step = tokio::select! {
                step = news.recv() => step,
                () = client.gone() => return Ok(()),
                _ = ending.wait_for(|e| *e) => return Ok(()),
            };
            match step {
                Ok(s) if known(&s) => {}
                Ok(s) => {
                    let wanted = filter.instance.as_ref().is_none_or(|n| *n == s.instance)
                        && filter.since_unix_ms.is_none_or(|t| s.at_unix_ms >= t);
                    if wanted {
                        client.item(&s).await?;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(n)) => {
                    return Err(OpError::new(
                        ErrorKind::Internal,
                        format!("this client was too slow and lost {n} steps; ask for the log again"),
                    ));
                }
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            }
        }
    }

    async fn console(&self, name: &str, follow: bool, client: &mut Client) -> Result<(), OpError> {
        let mut from = 0;
        let mut kernel = (0, 0);
        let mut ticks = interval(CONSOLE_PERIOD);
        let mut ending = self.ending.clone();
        loop {
            // After a morph it has another number.
            let now = self.tree.status(name).await?;
            if kernel != (now.id, now.incarnation) {
                (kernel, from) = ((now.id, now.incarnation), 0); // a new kernel counts from the start
            }
            let log = match self.platform.console(InstanceId(now.id), from).await {
                Ok(log) => log,
                // Between two lives there is none; who follows waits for the next.
                Err(PlatformError::Unknown(_)) if follow => Default::default(),
                Err(PlatformError::Unknown(_)) => {
                    return Err(OpError::new(
                        ErrorKind::Conflict,
                        format!("{name} has not run since this daemon started: there is no log of it"),
                    ));
                }
                Err(e) => return Err(platform_error(&e)),
            };
            let lines: Vec<ConsoleLine> = log
                .records
                .into_iter()
                .map(|r| ConsoleLine { seq: r.seq, at_s: r.ts_ns as f64 / 1e9, level: r.level, text: r.text })
                .collect();
            from = lines.last().map_or(from, |l| l.seq + 1);
            let mut note = log.note.filter(|_| !follow || !lines.is_empty());
            for part in lines.chunks(CONSOLE_LINES) {
                client.item(&ConsoleChunk { lines: part.to_vec(), note: note.take() }).await?;
            }
            if let Some(note) = note {
                client.item(&ConsoleChunk { lines: Vec::new(), note: Some(note) }).await?;
            }
            if !follow {
                return Ok(());
            }
            tokio::select! {
                _ = ticks.tick() => {}
                () = client.gone() => return Ok(()),
                _ = ending.wait_for(|e| *e) => return Ok(()),
            }
        }
    }
}

/// The kind an operator sees.
pub fn platform_error(e: &PlatformError) -> OpError {
    let kind = match e {
        PlatformError::Unavailable(_) => ErrorKind::Conflict,
        PlatformError::Invalid(_) | PlatformError::BadImage(_) => ErrorKind::BadInput,
        PlatformError::Busy(_) => ErrorKind::Busy,
        PlatformError::Unknown(_) | PlatformError::StaleIncarnation { .. } => ErrorKind::Conflict,
        PlatformError::NotFenced(_) => ErrorKind::PartialFence,
        PlatformError::Timeout { .. } => ErrorKind::Timeout,
        PlatformError::Os { .. } => ErrorKind::Internal,
    };
    OpError::new(kind, e.to_string())
}
