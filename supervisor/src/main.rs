//! kmorphd: the supervisor of a multikernel machine.
//!
//! Reads top to bottom: configuration, lock, journal, platform, actors, control socket; then it
//! waits for a signal or a request to end, and takes everything down in reverse.

mod access;
mod config;
mod definitions;
mod lock;
mod server;
mod service;
mod store;
mod telemetry;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kmorph_control::{ErrorKind, OpError};
use kmorph_platform::Platform;
use kmorph_platform::partition::{Partition, PartitionConfig};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::definitions::KerfDefinitions;
use crate::server::Server;
use crate::service::{Service, platform_error};
use crate::store::SqliteStore;

/// How long the control server may take to stop.
const CONTROL_LIMIT: Duration = Duration::from_secs(2);
/// Why the daemon ends when its actors failed too often: an error, so that a service manager starts it again.
const GAVE_UP: &str = "the supervision tree gave up";
const LOCK: &str = "/run/kmorph/kmorphd.lock";

/// The supervisor of a multikernel machine: starts kernels on CPUs and memory of their own, watches and heals them.
///
/// Started by `kmorphctl daemon start` or by the service manager, as root. Instances run on when it ends; the next
/// one takes them over.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", help = format!("Configuration file (YAML); {} when it is there", config::DEFAULT))]
    config: Option<PathBuf>,
    /// Control socket
    #[arg(long, value_name = "PATH", default_value = "/run/kmorph/kmorphd.sock")]
    socket: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    telemetry::logs();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot start: {e}")))
        .and_then(|rt| rt.block_on(run(&args)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            ExitCode::from(e.kind.exit_code())
        }
    }
}

async fn run(args: &Args) -> Result<(), OpError> {
    let started = Instant::now();
    let config = Config::load(args.config.as_deref())?;
    let _lock = lock::take(LOCK.as_ref())?;
    let store = SqliteStore::open(&config.state)?;
    if let Some(address) = config.metrics {
        telemetry::metrics(address)?;
    }
    let platform = platform(&config).await?;
    let definitions = KerfDefinitions::new(config.instances.clone());
    let tree = tree::start(&config, platform.clone(), &store, definitions).await?;

    let (stop, mut stopped) = watch::channel(false);
    let (end, ending) = watch::channel(false);
    let service = Arc::new(Service {
        tree,
        platform: platform.clone(),
        store,
        started,
        metrics: config.metrics.map(|a| format!("http://{a}/metrics")),
        stop,
        ending,
    });
    let server = Arc::new(Server::bind(&args.socket)?);
    service.tree.add_service(control(server.clone(), service.clone())).await.map_err(internal)?;
    info!(socket = %args.socket.display(), platform = %platform.kind(), "kmorphd serves");
    notify(&[sd_notify::NotifyState::Ready]);

    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let why = tokio::select! {
        () = service.tree.closed() => GAVE_UP,
        _ = stopped.wait_for(|s| *s) => "asked by a client",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!(why, "kmorphd ends");
    notify(&[sd_notify::NotifyState::Stopping]);
    end.send_replace(true);
    service.tree.shutdown().await;
    if platform.inventory().await.is_ok_and(|i| i.used.is_empty()) {
        // Nothing runs: the primary gets its CPUs and memory back.
        platform.release_all().await.map_err(|e| platform_error(&e))?;
    }
    server.unlink();
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

async fn platform(config: &Config) -> Result<Arc<dyn Platform>, OpError> {
    let partition = PartitionConfig {
        pool: config.pool_source(),
        agent: config.agent.clone(),
        modules: config.modules.clone(),
        vsock_area: config.vsock_area.0,
        peer_area: config.peer_area.0,
        ..PartitionConfig::default()
    };
    Ok(Arc::new(Partition::open(partition).await.map_err(|e| platform_error(&e))?))
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
