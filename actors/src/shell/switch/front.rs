//! Listeners, and the connections they accept.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net as std_unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kmorph_control::{Listen, Publish};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::session::{self, Ended};
use super::{Counts, Shared};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Wait after an accept that failed for want of descriptors or memory, and before an address is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// A Unix socket is there for everybody; its folder says who may reach it.
const UNIX_MODE: u32 = 0o666;

/// A listener and its connections.
pub(super) struct Front {
    pub(super) publish: Publish,
    pub(super) counts: Arc<Counts>,
    pub(super) listening: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Front {
    /// End it and its connections. The address is free when the task has ended.
    pub(super) fn close(self) -> JoinHandle<()> {
        if let (Listen::Unix(path), true) = (&self.publish.listen, self.listening.load(Ordering::Relaxed))
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %path.display(), %error, "the socket of a service that is not published any more is left");
        }
        self.task.abort();
        self.task
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Listen, or say why that cannot be.
pub(super) fn listen(publish: &Publish, shared: &Arc<Shared>) -> io::Result<Front> {
    let listener = bind(&publish.listen)?;
    Ok(front(publish, shared, Some(listener)))
}

/// Listen as soon as that can be.
pub(super) fn listen_in_time(publish: &Publish, shared: &Arc<Shared>) -> Front {
    match bind(&publish.listen) {
        Ok(listener) => front(publish, shared, Some(listener)),
        Err(error) => {
            error!(instance = %shared.instance, %publish, %error, "cannot be published yet: trying again every {AGAIN:?}");
            front(publish, shared, None)
        }
    }
}

fn front(publish: &Publish, shared: &Arc<Shared>, listener: Option<Listener>) -> Front {
    let counts = Arc::<Counts>::default();
    let listening = Arc::new(AtomicBool::new(listener.is_some()));
    let task =
        tokio::spawn(run(publish.clone(), shared.clone(), counts.clone(), listening.clone(), listener));
    Front { publish: publish.clone(), counts, listening, task }
}

fn bind(listen: &Listen) -> io::Result<Listener> {
    match listen {
        Listen::Tcp(address) => bind_tcp(*address).map(Listener::Tcp),
        Listen::Unix(path) => bind_unix(path).map(Listener::Unix),
    }
}

/// Unlike `TcpListener::bind` this resolves no names and so does not wait.
fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Connections of a listener before this one may still be ending.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn bind_unix(path: &PathBuf) -> io::Result<UnixListener> {
    let listener = match std_unix::UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && left_behind(path) => {
            fs::remove_file(path)?;
            std_unix::UnixListener::bind(path)?
        }
        bound => bound?,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(UNIX_MODE))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// A socket nobody listens on: a daemon that was killed left it.
fn left_behind(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && std_unix::UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

async fn bound(publish: &Publish, shared: &Shared, listening: &AtomicBool) -> Listener {
    loop {
        sleep(AGAIN).await;
        if let Ok(listener) = bind(&publish.listen) {
            info!(instance = %shared.instance, %publish, "published");
            listening.store(true, Ordering::Relaxed);
            return listener;
        }
    }
}

async fn run(
    publish: Publish,
    shared: Arc<Shared>,
    counts: Arc<Counts>,
    listening: Arc<AtomicBool>,
    listener: Option<Listener>,
) {
    let listener = match listener {
        Some(listener) => listener,
        None => bound(&publish, &shared, &listening).await,
    };
    // Ended with this task.
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            next = accept(&listener, &shared) => match next {
                Some(Ok((client, place))) => {
                    counts.accepted.fetch_add(1, Ordering::Relaxed);
                    let (shared, counts, port) = (shared.clone(), counts.clone(), publish.port);
                    sessions.spawn(async move {
                        serve(client, &shared, &counts, port).await;
                        drop(place);
                    });
                }
                Some(Err(error)) => {
                    warn!(instance = %shared.instance, %publish, %error, "a connection could not be accepted");
                    sleep(AGAIN).await;
                }
                // The places are never closed.
                None => return,
            },
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    error!(instance = %shared.instance, %publish, %error, "a connection ended by a mistake of the switch");
                }
            }
        }
    }
}

/// The next connection, when there is a place for it.
async fn accept(listener: &Listener, shared: &Shared) -> Option<io::Result<(Client, OwnedSemaphorePermit)>> {
    let place = shared.places.clone().acquire_owned().await.ok()?;
    let client = match listener {
        Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Client::Tcp(stream)),
        Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Client::Unix(stream)),
    };
    Some(client.map(|client| (client, place)))
}

async fn serve(client: Client, shared: &Shared, counts: &Counts, port: u32) {
    match client {
        Client::Tcp(mut stream) => {
            // Small answers are not to wait for the next ones. A client that is gone already says so when it is read.
            let _ = stream.set_nodelay(true);
            if session::run(&mut stream, shared, counts, port).await == Ended::Broken {
                // It must not look like the end of an answer that was cut short.
                let _ = stream.set_zero_linger();
            }
        }
        Client::Unix(mut stream) => {
            session::run(&mut stream, shared, counts, port).await;
        }
    }
}
