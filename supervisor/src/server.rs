//! The control socket: who connects, what they ask, what they get.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, SinkExt, StreamExt};
use kmorph_config::own_folder;
use kmorph_control::{ErrorKind, Hello, MAX_FRAME, OpError, Reply, Request, codec, decode, encode};
use nix::unistd::{Group, Uid, chown};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use tracing::{Instrument, info, info_span, warn};

use crate::access::{Peer, READ_GROUP, Right};

/// Carries requests out.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Carry one out. Stream items go to the client as they come; the result is encoded.
    async fn handle(&self, request: &Request, client: &mut Client) -> Result<Vec<u8>, OpError>;
}

/// Clients at once; each costs a task and a buffer.
const MAX_CLIENTS: usize = 1024;
/// Of these, clients that may only look: they cannot keep an administrator out.
const MAX_READERS: usize = MAX_CLIENTS - 64;
/// Longest frame of a client before it has said hello, and of one that may only look. What is announced is
/// allocated, so it is not left to the client.
const SHORT_FRAME: usize = 4 << 10;
/// Longest frame of an administrator: a file of policies fits.
const LONG_FRAME: usize = 2 << 20;
/// A client has this long to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A client that says nothing for this long between requests is let go.
const IDLE_LIMIT: Duration = Duration::from_secs(300);
/// A client that does not take its answer for this long is let go.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// After a failed accept: descriptors may be short for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection.
pub struct Client {
    frames: Framed<UnixStream, LengthDelimitedCodec>,
    /// Longest frame it may send now.
    longest: usize,
}

impl Client {
    async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), OpError> {
        let bytes = Bytes::from(encode(value)?);
        // One limit serves both directions of the codec: what is sent is ours and may be long.
        self.frames.codec_mut().set_max_frame_length(MAX_FRAME);
        match timeout(WRITE_LIMIT, self.frames.send(bytes)).await {
            Err(_) => Err(OpError::new(ErrorKind::Timeout, "the client does not take its answer")),
            Ok(Err(e)) => Err(OpError::new(ErrorKind::Internal, format!("write to the client: {e}"))),
            Ok(Ok(())) => Ok(()),
        }
    }

    /// One of a stream.
    pub async fn item<T: Serialize>(&mut self, value: &T) -> Result<(), OpError> {
        let item = Reply::Item(encode(value)?);
        self.send(&item).await
    }

    /// The next frame; `None` at the end of the stream.
    async fn frame(&mut self, limit: Duration) -> Result<Option<Bytes>, OpError> {
        self.frames.codec_mut().set_max_frame_length(self.longest);
        match timeout(limit, self.frames.next()).await {
            Err(_) => Err(OpError::new(ErrorKind::Timeout, format!("nothing came within {limit:?}"))),
            Ok(None) => Ok(None),
            Ok(Some(Ok(frame))) => Ok(Some(frame.freeze())),
            Ok(Some(Err(e))) => {
                let longest = self.longest >> 10;
                Err(OpError::new(ErrorKind::BadInput, format!("bad frame (at most {longest} KiB): {e}")))
            }
        }
    }

    /// Resolves when the client is gone; what it still sends is its mistake.
    pub async fn gone(&mut self) {
        self.frames.codec_mut().set_max_frame_length(SHORT_FRAME);
        while let Some(Ok(_)) = self.frames.next().await {}
    }
}

/// The listening socket.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Listen. A socket left by a daemon that died is replaced: nobody listens there any more.
    pub fn bind(path: &Path) -> Result<Server, OpError> {
        let fail = |what: &str, e: &dyn std::fmt::Display| {
            OpError::new(
                ErrorKind::Internal,
                format!("cannot {what} the control socket {}: {e}", path.display()),
            )
        };
        if let Some(dir) = path.parent() {
            own_folder(dir, "the control socket's folder")?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(OpError::new(
                ErrorKind::Conflict,
                format!(
                    "a daemon listens at {} already: stop it first, or choose another --socket",
                    path.display()
                ),
            ));
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail("replace", &e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(|e| fail("open", &e))?;
        // Everybody of the two groups may connect; what they may do is decided by their credentials.
        let group = Group::from_name(READ_GROUP).ok().flatten();
        let group = group.filter(|_| Uid::effective().is_root());
        let mode = if group.is_some() { 0o666 } else { 0o600 };
        if let Some(g) = &group {
            chown(path, None, Some(g.gid)).map_err(|e| fail("set the group of", &e))?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(|e| fail("set the mode of", &e))?;
        Ok(Server { listener, path: path.into() })
    }

    /// Remove the socket: the daemon ends.
    pub fn unlink(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            warn!(%error, socket = %self.path.display(), "the control socket could not be removed");
        }
    }

    /// Serve until cancelled.
    pub async fn run(&self, service: Arc<dyn Handler>) {
        let room = Arc::new(Semaphore::new(MAX_CLIENTS));
        let readers = Arc::new(Semaphore::new(MAX_READERS));
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "accepting a control client failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let service = service.clone();
            let peer = match Peer::of(&stream) {
                Ok(peer) => peer,
                Err(error) => {
                    warn!(%error, "a client's credentials could not be read");
                    continue;
                }
            };
            let client = Client { frames: Framed::new(stream, codec()), longest: SHORT_FRAME };
            match admit(&peer, &room, &readers) {
                Ok(permits) => drop(tokio::spawn(async move {
                    serve(client, peer, &*service).await;
                    drop(permits);
                })),
                Err(error) => turn_away(client, &error),
            }
        }
    }
}

/// A place for a client, or why there is none. Who may do nothing takes nobody's.
fn admit(
    peer: &Peer,
    room: &Arc<Semaphore>,
    readers: &Arc<Semaphore>,
) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), OpError> {
    let full = |_| OpError::new(ErrorKind::Busy, format!("{MAX_CLIENTS} clients are connected; try again"));
    peer.may_connect()?;
    let reader = match peer.right {
        Right::Admin => None,
        _ => Some(readers.clone().try_acquire_owned().map_err(full)?),
    };
    Ok((room.clone().try_acquire_owned().map_err(full)?, reader))
}

/// Say why, if that can be done without waiting: a new connection has room for it.
fn turn_away(mut client: Client, error: &OpError) {
    // It is turned away whether it hears why or not.
    let _ = client.send(&Reply::Error(error.clone())).now_or_never();
}

async fn serve(mut client: Client, peer: Peer, service: &dyn Handler) {
    let span = info_span!("client", uid = peer.uid, pid = peer.pid);
    async {
        if let Err(error) = talk(&mut client, &peer, service).await {
            info!(%error, "a control connection ended");
            // The client may be gone already.
            let _ = client.send(&Reply::Error(error)).await;
        }
    }
    .instrument(span)
    .await;
}

async fn talk(client: &mut Client, peer: &Peer, service: &dyn Handler) -> Result<(), OpError> {
    let Some(frame) = client.frame(HELLO_LIMIT).await? else { return Ok(()) };
    let theirs: Hello = decode(&frame)?;
    let ours = Hello::new();
    client.send(&ours).await?;
    ours.check(&theirs)?;
    if peer.right == Right::Admin {
        client.longest = LONG_FRAME;
    }
    while let Some(frame) = client.frame(IDLE_LIMIT).await? {
        let request: Request = decode(&frame)?;
        let allowed = peer.check(&request);
        if request.changes() {
            info!(target: "audit", ?request, allowed = allowed.is_ok(), "change asked for");
        }
        let result = match allowed {
            Ok(()) => service.handle(&request, client).await,
            Err(e) => Err(e),
        };
        if request.changes() {
            info!(target: "audit", ?request, ok = result.is_ok(), "change ended");
        }
        let reply = match result {
            Ok(done) => Reply::Done(done),
            Err(e) => Reply::Error(e),
        };
        client.send(&reply).await?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
