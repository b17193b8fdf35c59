//! Frames, requests and replies.
//!
//! A frame is a u32 length (big-endian, as `tokio_util`'s codec writes it) and that many bytes of
//! MessagePack. Frames above [`MAX_FRAME`] end the connection.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::{ErrorKind, EventsArgs, MorphArgs, OpError, RecoveryLogArgs, SpawnArgs};

/// Version of this protocol. A daemon serves clients of its own version only; both are shipped
/// together.
pub const PROTOCOL_VERSION: u32 = 2;
/// Longest frame, bytes.
pub const MAX_FRAME: usize = 4 << 20;
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// First frame of both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// "kmorph-control".
    pub protocol: String,
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// Version of the program.
    pub program: String,
}

impl Hello {
    /// The hello of this build.
    pub fn new() -> Hello {
        Hello {
            protocol: "kmorph-control".into(),
            version: PROTOCOL_VERSION,
            program: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Whether the other side's hello fits.
    pub fn check(&self, other: &Hello) -> Result<(), OpError> {
        if other.protocol != self.protocol || other.version != self.version {
            return Err(OpError::new(
                ErrorKind::Version,
                format!(
                    "control protocol versions differ: {} {} here, {} {} there; use kmorphctl and kmorphd of one release",
                    self.protocol, self.version, other.protocol, other.version
                ),
            ));
        }
        Ok(())
    }
}

impl Default for Hello {
    fn default() -> Self {
        Hello::new()
    }
}

/// What a client can ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// [`crate::DaemonView`].
    DaemonStatus,
    /// Stop the daemon. `graceful` terminates every instance first; without it kernels run on and
    /// the next daemon takes them over.
    DaemonStop {
        /// Terminate instances first.
        graceful: bool,
    },
    /// [`crate::InstanceView`].
    Spawn(SpawnArgs),
    /// A list of [`crate::InstanceView`].
    List,
    /// [`crate::InstanceView`].
    Status {
        /// Instance.
        name: String,
    },
    /// [`crate::InstanceView`].
    Terminate {
        /// Instance.
        name: String,
        /// Do not ask its user space first.
        force: bool,
    },
    /// [`crate::HeartbeatView`].
    Heartbeat {
        /// Instance.
        name: String,
    },
    /// [`crate::HealthView`].
    Health {
        /// Instance.
        name: String,
    },
    /// [`crate::PingView`].
    Ping {
        /// Instance.
        name: String,
    },
    /// [`crate::InstanceView`].
    Recover {
        /// Instance.
        name: String,
    },
    /// A stream of [`crate::RecoveryStep`].
    RecoveryLog {
        /// Which.
        filter: RecoveryLogArgs,
        /// Go on as steps are taken.
        follow: bool,
    },
    /// A stream of [`crate::ConsoleChunk`].
    Console {
        /// Instance.
        name: String,
        /// Go on as records come.
        follow: bool,
    },
    /// [`crate::ReloadView`].
    DaemonReload,
    /// A stream of [`crate::EventView`].
    Events {
        /// Which.
        filter: EventsArgs,
        /// Go on as they happen.
        follow: bool,
    },
    /// [`crate::PolicyView`].
    PolicyShow {
        /// Instance; `None` for the defaults.
        instance: Option<String>,
    },
    /// A list of [`crate::PolicyChange`].
    PolicySet {
        /// Instance.
        instance: String,
        /// Setting.
        key: String,
        /// Value; `None` leaves it to the configuration again.
        value: Option<String>,
    },
    /// YAML text: what operators set, for [`Request::PolicyImport`] or a configuration file.
    PolicyExport,
    /// A list of [`crate::PolicyChange`]. All or nothing.
    PolicyImport {
        /// YAML text, as exported.
        text: String,
        /// Its file, for errors.
        file: String,
        /// Only say what would change.
        dry_run: bool,
    },
    /// A list of [`crate::GroupView`].
    GroupList,
    /// [`crate::GroupView`].
    GroupShow {
        /// Group.
        name: String,
    },
    /// [`crate::InstanceView`].
    Maintenance {
        /// Instance.
        name: String,
        /// Watch it and do not act; off: act again.
        on: bool,
    },
    /// [`crate::MorphView`], when the goal is reached.
    Morph(MorphArgs),
    /// [`crate::MorphView`], when the old kernel goes on.
    MorphRollback {
        /// Instance.
        name: String,
    },
    /// [`crate::MorphView`].
    MorphStatus {
        /// Instance.
        name: String,
    },
    /// A list of [`crate::MorphView`], of the group's members in order.
    MorphGroup(crate::MorphGroupArgs),
}

impl Request {
    /// Whether it changes something, or has the daemon read a file that it names: those need an administrator and leave an
    /// audit line.
    pub fn changes(&self) -> bool {
        matches!(
            self,
            Request::DaemonStop { .. }
                | Request::Spawn(_)
                | Request::Terminate { .. }
                | Request::Recover { .. }
                | Request::DaemonReload
                | Request::PolicySet { .. }
                | Request::PolicyImport { dry_run: false, .. }
                | Request::Maintenance { .. }
                | Request::Morph(_)
                | Request::MorphRollback { .. }
                | Request::MorphGroup(_)
        )
    }
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Part of a stream, MessagePack of the request's item type.
    Item(Vec<u8>),
    /// The end, with the result in MessagePack.
    Done(Vec<u8>),
    /// The end, failed.
    Error(OpError),
}

/// Encode a value: maps with field names, so that fields can be added.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, OpError> {
    rmp_serde::to_vec_named(value)
        .map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot encode a control message: {e}")))
}

/// Decode a value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, OpError> {
    rmp_serde::from_slice(bytes)
        .map_err(|e| OpError::new(ErrorKind::BadInput, format!("control message does not decode: {e}")))
}

/// The codec of both sides.
pub fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(MAX_FRAME).new_codec()
}

/// A failed exchange, seen from the client.
pub type ClientError = OpError;

/// Part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Next<I, T> {
    /// One of a stream.
    Item(I),
    /// The end.
    Done(T),
}

/// Takes any item without looking at it.
#[derive(Deserialize)]
#[serde(transparent)]
struct IgnoredItem(#[allow(dead_code)] serde::de::IgnoredAny);

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    frames: Framed<UnixStream, LengthDelimitedCodec>,
}

impl Client {
    /// Connect and exchange hellos.
    pub async fn connect(socket: &Path) -> Result<Client, OpError> {
        let stream = UnixStream::connect(socket).await.map_err(|e| {
            let (kind, why) = match e.kind() {
                std::io::ErrorKind::NotFound => (
                    ErrorKind::NoDaemon,
                    "there is no such socket; start the daemon: kmorphctl daemon start".into(),
                ),
                std::io::ErrorKind::ConnectionRefused => (
                    ErrorKind::NoDaemon,
                    "nobody listens there any more; start the daemon: kmorphctl daemon start".to_string(),
                ),
                std::io::ErrorKind::PermissionDenied => (
                    ErrorKind::Denied,
                    "you may not use it; join the group kmorph or kmorph-admin".to_string(),
                ),
                _ => (ErrorKind::NoDaemon, e.to_string()),
            };
            OpError::new(kind, format!("no answer from kmorphd at {}: {why}", socket.display()))
        })?;
        let mut client = Client { frames: Framed::new(stream, codec()) };
        let mine = Hello::new();
        // A daemon that turns clients away may have closed already; why, it has said before.
        let sent = client.send(&mine).await;
        let theirs: Hello = match tokio::time::timeout(HELLO_LIMIT, client.greeting()).await {
            Ok(hello) => hello?,
            Err(_) => {
                return Err(OpError::new(
                    ErrorKind::Timeout,
                    format!("kmorphd at {} did not answer within {HELLO_LIMIT:?}", socket.display()),
                ));
            }
        };
        sent?;
        mine.check(&theirs)?;
        Ok(client)
    }

    async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), OpError> {
        self.frames
            .send(Bytes::from(encode(value)?))
            .await
            .map_err(|e| OpError::new(ErrorKind::NoDaemon, format!("kmorphd closed the connection: {e}")))
    }

    /// The daemon's hello, or why it turns this client away.
    async fn greeting(&mut self) -> Result<Hello, OpError> {
        let frame = self.frame().await?;
        decode(&frame).map_err(|e| match decode(&frame) {
            Ok(Reply::Error(refused)) => refused,
            _ => e,
        })
    }

    async fn frame(&mut self) -> Result<bytes::BytesMut, OpError> {
        match self.frames.next().await {
            Some(Ok(frame)) => Ok(frame),
            Some(Err(e)) => Err(OpError::new(ErrorKind::Internal, format!("bad frame from kmorphd: {e}"))),
            None => Err(OpError::new(ErrorKind::NoDaemon, "kmorphd closed the connection")),
        }
    }

    async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, OpError> {
        decode(&self.frame().await?)
    }

    /// Ask; the answer is then read with [`Client::next`].
    pub async fn start(&mut self, request: &Request) -> Result<(), OpError> {
        self.send(request).await
    }

    /// The next part of the answer.
    pub async fn next<I: DeserializeOwned, T: DeserializeOwned>(&mut self) -> Result<Next<I, T>, OpError> {
        match self.receive::<Reply>().await? {
            Reply::Item(bytes) => decode(&bytes).map(Next::Item),
            Reply::Done(bytes) => decode(&bytes).map(Next::Done),
            Reply::Error(e) => Err(e),
        }
    }

    /// Wait until the daemon closes the connection; whatever it still says is of no interest.
    pub async fn closed(mut self) {
        while let Some(Ok(_)) = self.frames.next().await {}
    }

    /// Ask and wait for the answer.
    pub async fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, OpError> {
        self.start(request).await?;
        loop {
            if let Next::Done(value) = self.next::<IgnoredItem, T>().await? {
                return Ok(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_changed_version_is_refused_with_both() {
        let other = Hello { version: 9, ..Hello::new() };
        let e = Hello::new().check(&other).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Version);
        let ours = PROTOCOL_VERSION.to_string();
        assert!(e.message.contains(&ours) && e.message.contains('9'), "{e}");
        assert!(Hello::new().check(&Hello::new()).is_ok());
    }

    #[test]
    fn requests_round_trip_and_know_what_changes() {
        let spawn = Request::Spawn(SpawnArgs {
            name: "a".into(),
            kernel: "/k".into(),
            cmdline: None,
            initramfs: None,
            monitor: Some(true),
            heartbeat_timeout_s: Some(1.0),
            boot_timeout_s: None,
            wait: true,
            publish: vec![],
            handover_bytes: 0,
        });
        let morph = |dry_run| MorphArgs {
            name: "x".into(),
            kernel: Some("/k".into()),
            cmdline: None,
            initramfs: None,
            cpus: vec![3],
            memory_bytes: Some(128 << 20),
            goal: crate::MorphGoal::Commit,
            dry_run,
        };
        for (r, changes) in [
            (spawn, true),
            (Request::List, false),
            (Request::DaemonStop { graceful: true }, true),
            (Request::Console { name: "x".into(), follow: true }, false),
            (Request::Recover { name: "x".into() }, true),
            (Request::DaemonReload, true),
            (Request::PolicyShow { instance: None }, false),
            (Request::PolicySet { instance: "x".into(), key: "vmcore".into(), value: None }, true),
            (Request::PolicyExport, false),
            (Request::PolicyImport { text: "{}".into(), file: "f".into(), dry_run: true }, false),
            (Request::PolicyImport { text: "{}".into(), file: "f".into(), dry_run: false }, true),
            (Request::GroupList, false),
            (Request::GroupShow { name: "g".into() }, false),
            (Request::Maintenance { name: "x".into(), on: false }, true),
            (Request::Morph(morph(false)), true),
            // It names a kernel.
            (Request::Morph(morph(true)), true),
            (Request::MorphRollback { name: "x".into() }, true),
            (Request::MorphStatus { name: "x".into() }, false),
            (
                Request::MorphGroup(crate::MorphGroupArgs {
                    group: "x".into(),
                    kernel: None,
                    what: crate::GroupMorph::Commit,
                    one_by_one: false,
                }),
                true,
            ),
            (Request::Events { filter: EventsArgs::default(), follow: true }, false),
        ] {
            assert_eq!(decode::<Request>(&encode(&r).unwrap()).unwrap(), r);
            assert_eq!(r.changes(), changes, "{r:?}");
        }
    }

    #[tokio::test]
    async fn a_client_that_is_turned_away_hears_why() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let refused = OpError::new(ErrorKind::Busy, "1024 clients are connected; try again");
        let (client, ()) = tokio::join!(Client::connect(&path), async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut frames = Framed::new(stream, codec());
            let bytes = encode(&Reply::Error(refused.clone())).unwrap();
            frames.send(Bytes::from(bytes)).await.unwrap();
        });
        assert_eq!(client.unwrap_err(), refused);
    }

    #[tokio::test]
    async fn a_missing_socket_says_how_to_start_the_daemon() {
        let e = Client::connect(Path::new("/nonexistent/kmorphd.sock")).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::NoDaemon);
        assert!(e.message.contains("kmorphctl daemon start"), "{e}");
    }

    proptest! {
        #[test]
        fn garbage_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Reply>(&bytes);
        }
    }
}
