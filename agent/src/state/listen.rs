//! Where workloads connect.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Uid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::{Broker, hook};
use crate::kmsg;

/// Workloads at once.
const WORKLOADS: usize = 64;
/// A workload has this long to say who it is.
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(5);
/// After an accept that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Address {
    /// This name in the abstract namespace, where no change of the file systems can hide it.
    Abstract(&'static str),
    /// For a stand-in, which shares its host with others.
    Path(PathBuf),
}

impl Address {
    /// Listen there.
    pub fn bind(&self) -> io::Result<UnixListener> {
        let listener = match self {
            Address::Abstract(name) => {
                let name = name.trim_start_matches('@');
                net::UnixListener::bind_addr(&net::SocketAddr::from_abstract_name(name)?)?
            }
            Address::Path(path) => {
                match std::fs::remove_file(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
                net::UnixListener::bind(path)?
            }
        };
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    }
}

/// Accept workloads for ever. Only those of root, or of the user the agent itself runs as, are heard: what they say
/// decides whether a kernel can be replaced.
pub async fn listen(broker: Arc<Broker>, address: Address) {
    let listener = match address.bind() {
        Ok(listener) => listener,
        Err(e) => {
            return kmsg::log(kmsg::ERROR, &format!("workloads cannot connect, {address:?}: {e}"));
        }
    };
    let places = Arc::new(Semaphore::new(WORKLOADS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("a workload could not connect: {e}"));
                sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(why) = admit(&stream) {
            kmsg::log(kmsg::ERROR, &format!("a workload was refused: {why}"));
            continue;
        }
        let Ok(place) = places.clone().try_acquire_owned() else {
            kmsg::log(kmsg::ERROR, &format!("a workload was refused: {WORKLOADS} are connected"));
            continue;
        };
        let broker = broker.clone();
        tokio::spawn(async move {
            one(&broker, stream).await;
            drop(place);
        });
    }
}

fn admit(stream: &UnixStream) -> Result<(), String> {
    let uid = stream.peer_cred().map_err(|e| format!("nobody knows whose it is: {e}"))?.uid();
    if uid == 0 || uid == Uid::effective().as_raw() {
        return Ok(());
    }
    Err(format!("it runs as user {uid}, and only root's are heard"))
}

async fn one(broker: &Broker, stream: UnixStream) {
    let introduced = match timeout(INTRODUCTION_LIMIT, hook::introduce(stream)).await {
        Ok(Ok(introduced)) => introduced,
        Ok(Err(e)) => return kmsg::log(kmsg::ERROR, &format!("a workload was not understood: {e}")),
        Err(_) => {
            return kmsg::log(
                kmsg::ERROR,
                &format!("a workload did not say who it is within {INTRODUCTION_LIMIT:?}"),
            );
        }
    };
    let hook = introduced.hook();
    kmsg::log(
        kmsg::INFO,
        &format!("workload {}: {}, {} sections", hook.name, hook.state().name(), hook.sections.len()),
    );
    broker.enter(hook.clone());
    match introduced.run().await {
        Ok(()) => kmsg::log(kmsg::INFO, &format!("workload {}: disconnected", hook.name)),
        Err(e) => kmsg::log(kmsg::ERROR, &format!("workload {}: {e}", hook.name)),
    }
}
