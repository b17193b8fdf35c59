//! Listeners, and the connections they accept.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net as std_unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kmorph_control::Listen;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::carried;
use super::door::{Door, Member};
use super::session::{self, Ended};

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Wait after an accept that failed for want of descriptors or memory, and before an address is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// A Unix socket is there for everybody; its folder says who may reach it.
const UNIX_MODE: u32 = 0o666;

/// A listener and its connections.
pub(super) struct Front {
    pub(super) door: Arc<Door>,
    task: JoinHandle<()>,
}

impl Front {
    /// End it and its connections. The address is free when the task has ended.
    pub(super) fn close(self) -> JoinHandle<()> {
        if let (Listen::Unix(path), true) = (&self.door.listen, self.door.listening.load(Ordering::Relaxed))
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
pub(super) fn listen(group: Option<String>, first: Member) -> io::Result<Front> {
    let listener = bind(&first.publish.listen)?;
    Ok(front(group, first, Some(listener)))
}

/// Listen as soon as that can be.
pub(super) fn listen_in_time(group: Option<String>, first: Member) -> Front {
    match bind(&first.publish.listen) {
        Ok(listener) => front(group, first, Some(listener)),
        Err(error) => {
            let (instance, publish) = (&first.shared.instance, &first.publish);
            error!(%instance, %publish, %error, "cannot be published yet: trying again every {AGAIN:?}");
            front(group, first, None)
        }
    }
}

fn front(group: Option<String>, first: Member, listener: Option<Listener>) -> Front {
    let door = Door::new(group, first, listener.is_some());
    let task = tokio::spawn(run(door.clone(), listener));
    Front { door, task }
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

async fn bound(door: &Door) -> Listener {
    loop {
        sleep(AGAIN).await;
        if let Ok(listener) = bind(&door.listen) {
            info!(instance = %door.names(), listen = ?door.listen, "published");
            door.listening.store(true, Ordering::Relaxed);
            return listener;
        }
    }
}

async fn run(door: Arc<Door>, listener: Option<Listener>) {
    let listener = match listener {
        Some(listener) => listener,
        None => bound(&door).await,
    };
    // Ended with this task.
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            next = accept(&listener, &door.places) => match next {
                Some(Ok((client, place))) => {
                    let door = door.clone();
                    sessions.spawn(async move {
                        serve(client, &door).await;
                        drop(place);
                    });
                }
                Some(Err(error)) => {
                    warn!(instance = %door.names(), %error, "a connection could not be accepted");
                    sleep(AGAIN).await;
                }
                // The places are never closed.
                None => return,
            },
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    error!(instance = %door.names(), %error, "a connection ended by a mistake of the switch");
                }
            }
        }
    }
}

/// The next connection, when there is a place for it.
async fn accept(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> Option<io::Result<(Client, OwnedSemaphorePermit)>> {
    let place = places.clone().acquire_owned().await.ok()?;
    let client = match listener {
        Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Client::Tcp(stream)),
        Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Client::Unix(stream)),
    };
    Some(client.map(|client| (client, place)))
}

async fn serve(client: Client, door: &Door) {
    match client {
        Client::Tcp(mut stream) => {
            // Small answers are not to wait for the next ones. A client that is gone already says so when it is read.
            let _ = stream.set_nodelay(true);
            if run_one(&mut stream, door).await == Ended::Broken {
                // It must not look like the end of an answer that was cut short.
                let _ = stream.set_zero_linger();
            }
        }
        Client::Unix(mut stream) => {
            run_one(&mut stream, door).await;
        }
    }
}

async fn run_one<S>(client: &mut S, door: &Door) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match door.sessions() {
        true => carried::run(client, door).await,
        false => session::run(client, door).await,
    }
}
