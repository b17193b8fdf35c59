//! Logs and metrics.

use std::io::IsTerminal;
use std::net::SocketAddr;

use kmorph_control::{ErrorKind, OpError};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use tracing_subscriber::EnvFilter;

/// Buckets of the heartbeat's round trip, seconds: from a local interrupt to a second.
const RTT_BUCKETS: &[f64] =
    &[50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0];

/// Buckets of the daemon's own lateness, seconds.
const LAG_BUCKETS: &[f64] = &[100e-6, 500e-6, 1e-3, 5e-3, 10e-3, 50e-3, 100e-3, 500e-3, 1.0];

/// Buckets of a recovery, seconds: kernels boot in tenths of seconds to minutes.
const RECOVERY_BUCKETS: &[f64] = &[0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0];

/// Log to stderr: journald or kmorphctl's log file keep it. `KMORPH_LOG` chooses levels.
pub fn logs() {
    let filter = EnvFilter::try_from_env("KMORPH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Serve metrics on a loopback address. Needs a tokio runtime.
pub fn metrics(address: SocketAddr) -> Result<(), OpError> {
    let fail = |e: &dyn std::fmt::Display| {
        OpError::new(
            ErrorKind::Busy,
            format!(
                "metrics cannot be served at {address}: {e}; set metrics: in the configuration to another loopback address or to null"
            ),
        )
    };
    // The exporter binds in a task of its own; a busy address is found here, where it can be said.
    drop(std::net::TcpListener::bind(address).map_err(|e| fail(&e))?);
    PrometheusBuilder::new()
        .with_http_listener(address)
        .set_buckets_for_metric(Matcher::Full("kmorph_heartbeat_rtt_seconds".into()), RTT_BUCKETS)
        .and_then(|b| b.set_buckets_for_metric(Matcher::Full("kmorph_loop_lag_seconds".into()), LAG_BUCKETS))
        .and_then(|b| {
            b.set_buckets_for_metric(Matcher::Full("kmorph_recovery_seconds".into()), RECOVERY_BUCKETS)
        })
        .map_err(|e| fail(&e))?
        .install()
        .map_err(|e| fail(&e))?;
    kmorph_actors::telemetry::describe();
    Ok(())
}

/// Whether the journal cannot be written.
pub fn store_trouble(trouble: bool) {
    metrics::gauge!("kmorph_store_degraded").set(if trouble { 1.0 } else { 0.0 });
}
