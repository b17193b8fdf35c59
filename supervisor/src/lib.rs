//! kmorphd: the supervisor of a multikernel machine.
//!
//! Reads top to bottom: configuration, lock, journal, platform, actors, control socket; then it
//! waits for a signal or a request to end, and takes everything down in reverse. The program is
//! [`main`]; tests put something between the actors and what they work with by [`Wrap`].

mod access;
mod definitions;
mod limits;
mod lock;
mod operate;
mod server;
mod service;
mod settings;
mod store;
mod telemetry;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kmorph_actors::Store;
use kmorph_config::{Config, Paths, PlatformChoice};
use kmorph_control::{ErrorKind, EventKind, OpError};
use kmorph_platform::partition::{Partition, PartitionConfig};
use kmorph_platform::process::{Process, ProcessConfig};
use kmorph_platform::{Platform, PlatformError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::definitions::KerfDefinitions;
use crate::server::Server;
use crate::service::{Service, platform_error};
use crate::settings::Configured;
use crate::store::{Keep, SqliteStore};

pub use crate::telemetry::logs;

/// How long the control server may take to stop.
const CONTROL_LIMIT: Duration = Duration::from_secs(2);
/// How often writing the journal is tried again.
const JOURNAL_RETRY: Duration = Duration::from_secs(2);
/// Why the daemon ends when its actors failed too often: an error, so that a service manager starts it again.
const GAVE_UP: &str = "the supervision tree gave up";
/// One daemon drives the machine's kernels.
const LOCK: &str = "/run/kmorph/kmorphd.lock";
const AGENT: &str = "kmorph-agent";

/// The supervisor of a multikernel machine: starts kernels on CPUs and memory of their own, watches and heals them.
///
/// Started by `kmorphctl daemon start` or by the service manager, as root. Instances run on when it ends; the next
/// one takes them over.
#[derive(Debug, Parser)]
#[command(name = "kmorphd", version, max_term_width = 110)]
pub struct Args {
    /// Configuration file, YAML (default: /etc/kmorph/kmorphd.conf, for other users than root ~/.config/kmorph/kmorphd.conf, when it is
    /// there); files in <FILE>.d/*.conf are read on top
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Control socket (default: /run/kmorph/kmorphd.sock, for other users than root in $XDG_RUNTIME_DIR/kmorph)
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Read the configuration, say what is wrong with it, and end
    #[arg(long)]
    pub check_config: bool,
}

/// Puts something around a part.
pub type Around<T> = Box<dyn FnOnce(Arc<T>) -> Arc<T> + Send>;

/// What is put between the actors and the journal, and between them and the platform.
pub struct Wrap {
    /// Around the journal.
    pub store: Around<dyn Store>,
    /// Around the platform.
    pub platform: Around<dyn Platform>,
}

impl Default for Wrap {
    /// Nothing.
    fn default() -> Self {
        Wrap { store: Box::new(|s| s), platform: Box::new(|p| p) }
    }
}

/// The whole program: log, run, and the exit code that says how it ended.
pub fn main(wrap: Wrap) -> ExitCode {
    let args = Args::parse();
    telemetry::logs();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot start: {e}")))
        .and_then(|rt| rt.block_on(run(&args, wrap)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::from(e.kind.exit_code())
        }
    }
}

/// Run until asked to end.
pub async fn run(args: &Args, wrap: Wrap) -> Result<(), OpError> {
    let started = Instant::now();
    // From here on: what comes while it starts is done when it has.
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let paths = Paths::current();
    let configured = Configured::read(args.config.clone(), paths.clone())?;
    if args.check_config {
        return Ok(());
    }
    let config = configured.loaded().config.clone();
    limits::raise_descriptors();
    let process = runs_processes(&config, &paths);
    // The process platform keeps a lock of its own in its folder.
    let _lock = if process { None } else { Some(lock::take(LOCK.as_ref(), lock::PATIENCE).await?) };
    let store = SqliteStore::open(&config.state, keep(&config))?;
    if let Some(address) = config.metrics {
        telemetry::metrics(address)?;
    }
    let platform = if process { processes(&config).await? } else { kernels(&config).await? };
    // Daemons of the process platform can be several.
    let _journal = lock::folder(&config.state, lock::PATIENCE).await?;
    let platform = (wrap.platform)(platform);
    let definitions = KerfDefinitions::new(config.instances.clone());
    let journal_of = (wrap.store)(Arc::new(store.clone()));
    let tree = tree::start(&config, platform.clone(), journal_of, definitions).await?;

    let (stop, mut stopped) = watch::channel(false);
    let (end, ending) = watch::channel(false);
    let service = Arc::new(Service {
        tree,
        platform: platform.clone(),
        store,
        started,
        configured,
        metrics: config.metrics.map(|a| format!("http://{a}/metrics")),
        stop,
        ending,
    });
    let socket = args.socket.clone().unwrap_or(paths.socket);
    let server = Arc::new(Server::bind(&socket)?);
    service.tree.add_service(control(server.clone(), service.clone())).await.map_err(internal)?;
    service.tree.add_service(journal(service.clone())).await.map_err(internal)?;
    if let Some(period) = sd_notify::watchdog_enabled() {
        service.tree.add_service(watchdog(service.clone(), period)).await.map_err(internal)?;
    }
    info!(socket = %socket.display(), platform = %platform.kind(), "kmorphd serves");
    service.tree.announce(EventKind::Daemon, "kmorphd was started", "instances that run are taken over");
    notify(&[sd_notify::NotifyState::Ready]);

    let why = loop {
        tokio::select! {
            () = service.tree.closed() => break GAVE_UP,
            _ = stopped.wait_for(|s| *s) => break "asked by a client",
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hangup.recv() => reload(&service).await,
        }
    };
    info!(why, "kmorphd ends");
    notify(&[sd_notify::NotifyState::Stopping]);
    end.send_replace(true);
    service.tree.shutdown().await;
    service.store.finish().await;
    let given_back = service.give_back().await;
    server.unlink();
    given_back?;
    if why == GAVE_UP {
        return Err(internal(format!("{GAVE_UP}; its kernels run on, and a new daemon takes them over")));
    }
    Ok(())
}

/// The control server as a child of the tree: started again when it fails, stopped in its turn.
fn control(server: Arc<Server>, service: Arc<Service>) -> kmorph_actors::Service {
    kmorph_actors::Service::new("control", CONTROL_LIMIT, move |mut stop| {
        let (server, service) = (server.clone(), service.clone());
        async move {
            tokio::select! {
                () = server.run(service) => Err("it stopped accepting".to_string()),
                () = stop.asked() => Ok(()),
            }
        }
    })
}

fn internal(e: impl std::fmt::Display) -> OpError {
    OpError::new(ErrorKind::Internal, e.to_string())
}

/// SIGHUP: what is wrong with the new configuration is said, and the old one stays in force.
async fn reload(service: &Service) {
    if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
        notify(&[sd_notify::NotifyState::Reloading, now]);
    }
    if let Err(error) = service.configured.reload(&service.tree, &service.store).await {
        error!("the configuration was not reloaded: {error}");
        let effect = "the configuration before stays in force";
        service.tree.announce(
            EventKind::Daemon,
            &format!("the configuration was not reloaded: {error}"),
            effect,
        );
    }
    notify(&[sd_notify::NotifyState::Ready]);
}

/// Tell the service manager that the daemon lives, as long as its actors answer.
fn watchdog(service: Arc<Service>, period: Duration) -> kmorph_actors::Service {
    kmorph_actors::Service::new("watchdog", CONTROL_LIMIT, move |mut stop| {
        let service = service.clone();
        async move {
            let mut ticks = tokio::time::interval(period / 3);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stop.asked() => return Ok(()),
                }
                if service.tree.responsive().await {
                    notify(&[sd_notify::NotifyState::Watchdog]);
                } else {
                    error!("the actors do not answer: the service manager's watchdog is not told otherwise");
                }
            }
        }
    })
}

/// How much history is kept.
fn keep(config: &Config) -> Keep {
    Keep { steps: config.history.keep_steps, days: config.history.keep_days }
}

/// Says when the journal cannot be written, and tries again until it can.
fn journal(service: Arc<Service>) -> kmorph_actors::Service {
    kmorph_actors::Service::new("journal", CONTROL_LIMIT, move |mut stop| {
        let service = service.clone();
        async move {
            let mut troubles = service.store.troubles();
            // The journal may have been in trouble before this began.
            troubles.mark_changed();
            let mut ticks = tokio::time::interval(JOURNAL_RETRY);
            let mut before = None;
            loop {
                tokio::select! {
                    changed = troubles.changed() => changed.map_err(|e| e.to_string())?,
                    _ = ticks.tick(), if before.is_some() => drop(service.store.retry().await),
                    () = stop.asked() => return Ok(()),
                }
                let now = troubles.borrow_and_update().clone();
                telemetry::store_trouble(now.is_some());
                match (&before, &now) {
                    (None, Some(why)) => service.tree.announce(
                        EventKind::Daemon,
                        &format!("the journal cannot be written: {why}"),
                        "supervision goes on without history; writes are kept in memory and tried again",
                    ),
                    (Some(_), None) => service.tree.announce(
                        EventKind::Daemon,
                        "the journal can be written again",
                        "what was kept in memory is on disk",
                    ),
                    _ => {}
                }
                before = now;
            }
        }
    })
}

/// Whether instances are stand-ins: root gets kernels unless the configuration says otherwise.
fn runs_processes(config: &Config, paths: &Paths) -> bool {
    match config.platform {
        PlatformChoice::Process => true,
        PlatformChoice::Partition => false,
        PlatformChoice::Auto => !paths.root,
    }
}

async fn processes(config: &Config) -> Result<Arc<dyn Platform>, OpError> {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join(AGENT)).filter(|p| p.is_file());
    let agent = if config.agent.is_file() { None } else { beside() };
    let process = ProcessConfig {
        dir: config.process.dir.clone(),
        agent: agent.unwrap_or_else(|| config.agent.clone()),
        cpus: config.process.cpus,
        memory: config.process.memory,
    };
    Ok(Arc::new(Process::open(process).await.map_err(|e| platform_error(&e))?))
}

async fn kernels(config: &Config) -> Result<Arc<dyn Platform>, OpError> {
    let partition = PartitionConfig {
        pool: config.pool_source(),
        agent: config.agent.clone(),
        modules: config.modules.clone(),
        vsock_area: config.vsock_area,
        peer_area: config.peer_area,
        ..PartitionConfig::default()
    };
    match Partition::open(partition).await {
        Ok(partition) => Ok(Arc::new(partition)),
        Err(e @ PlatformError::Unavailable(_)) if config.platform == PlatformChoice::Auto => {
            let e = platform_error(&e);
            let text = format!(
                "{e}; to run stand-ins instead of kernels, without a module, set platform: process in the configuration"
            );
            Err(OpError::new(e.kind, text))
        }
        Err(e) => Err(platform_error(&e)),
    }
}

fn listen(kind: SignalKind) -> Result<tokio::signal::unix::Signal, OpError> {
    signal(kind).map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot wait for signals: {e}")))
}

/// Tell the service manager, if there is one.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "the service manager could not be told");
    }
}
