//! The KMP server of the instance.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kmp::io::Connection;
use kmp::message::{
    Bye, ByeAck, ByeReason, Error as ErrorMessage, ErrorCode, HeartbeatRsp, Hello, Message, MessageType,
    Metrics, Role,
};
use kmp::session::Event;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::clock::boot_ns;
use crate::guardian::Link;
use crate::metrics::Sampler;
use crate::stage1::{self, Cmdline, First};
use crate::state::{self, Address, Broker, Over, Reach};
use crate::topology::{self, News};
use crate::{end, init, kmsg};

/// A client has this long to say HELLO.
pub const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Connections at once; the daemon needs two.
const MAX_CONNECTIONS: usize = 16;
/// Metrics older than this are measured anew for a heartbeat that asks.
const FRESH: Duration = Duration::from_millis(200);
/// After a failed accept: descriptors or memory may be short for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Metrics, shared by all connections.
struct Gauges {
    sampler: Sampler,
    last: Option<(Instant, Metrics)>,
}

impl Gauges {
    fn metrics(&mut self) -> Metrics {
        if let Some((at, m)) = &self.last
            && at.elapsed() < FRESH
        {
            return m.clone();
        }
        let m = self.sampler.sample();
        self.last = Some((Instant::now(), m.clone()));
        m
    }
}

/// Where metrics come from.
enum Figures {
    /// This kernel.
    Measured(Box<Mutex<Gauges>>),
    /// A stand-in is no machine of its own, and a thousand of them measuring their host would be a load.
    Fixed(Metrics),
}

/// When it is dropped, workloads go on unhindered, and nothing is given to another kernel or taken from one.
pub struct Held(Option<Arc<Broker>>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(broker) = &self.0 {
            broker.let_go();
        }
    }
}

/// What all connections share.
pub struct Server {
    identity: Hello,
    figures: Figures,
    link: Link,
    broker: Arc<Broker>,
    news: News,
}

/// Serve until the kernel ends. The first agent says when the port is open, and answers once the user's init runs.
pub fn run(first: Option<First>, cmdline: &Cmdline, link: Link) -> i32 {
    let identity = Hello {
        instance: cmdline.instance,
        incarnation: cmdline.incarnation,
        capabilities: vec!["terminate".into()],
        release: nix::sys::utsname::uname()
            .map(|u| u.release().to_string_lossy().into_owned())
            .unwrap_or_default(),
        ..Hello::default()
    };
    let sampler = Sampler::new(Path::new(stage1::PROC), Path::new("/.kmorph/probe"));
    go_first();
    let figures = Figures::Measured(Box::new(Mutex::new(Gauges { sampler, last: None })));
    let server = Arc::new(Server { identity, figures, link, broker: Arc::default(), news: News::default() });
    on_a_runtime(listen_on_vsock(server, first))
}

/// Be scheduled before the workload: a kernel that is busy still answers in time, and while a workload stands still
/// nothing else should run first.
fn go_first() {
    if let Err(error) = rustix::process::setpriority_process(None, -20) {
        kmsg::log(
            kmsg::ERROR,
            &format!("the priority cannot be raised: heartbeats of a busy kernel may be late: {error}"),
        );
    }
}

/// Run a server's future on one thread.
pub fn on_a_runtime(server: impl Future<Output = Result<(), String>>) -> i32 {
    // A task that panics ends alone; nobody would know why.
    std::panic::set_hook(Box::new(|info| kmsg::log(kmsg::ERROR, &info.to_string())));
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|e| format!("cannot start the server: {e}"))
        .and_then(|runtime| runtime.block_on(server));
    match result {
        Ok(()) => 0,
        Err(e) => {
            kmsg::log(kmsg::ERROR, &e);
            1
        }
    }
}

async fn listen_on_vsock(server: Arc<Server>, first: Option<First>) -> Result<(), String> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, kmp::PORT))
        .map_err(|e| format!("cannot listen on vsock port {}: {e}", kmp::PORT))?;
    server.reaches(Reach::Vsock);
    server.hear_workloads(Address::Abstract(kmorph_state::wire::ADDRESS));
    server.tell_topology(Address::Abstract(topology::ADDRESS));
    kmsg::log(kmsg::INFO, &format!("listening on vsock port {}", kmp::PORT));
    if let Some(first) = first {
        init::runs(first.say_ready(), Path::new(stage1::PROC)).await;
    }
    let accept = async || {
        let (stream, peer) = listener.accept().await?;
        // Only the primary kernel commands an instance.
        if peer.cid() != VMADDR_CID_HOST {
            kmsg::log(kmsg::ERROR, &format!("refused a connection from CID {}", peer.cid()));
            return Ok(None);
        }
        Ok(Some(stream))
    };
    let serving = server.clone();
    server
        .listen(accept, move |stream| {
            let server = serving.clone();
            async move { server.connection(stream).await }
        })
        .await
}

impl Server {
    /// The server of a stand-in.
    pub fn stand_in(identity: Hello, metrics: Metrics, link: Link) -> Server {
        Server {
            identity,
            figures: Figures::Fixed(metrics),
            link,
            broker: Arc::default(),
            news: News::default(),
        }
    }

    /// Where agents of other kernels are found.
    pub fn reaches(&self, reach: Reach) {
        self.broker.reaches(reach);
    }

    /// From now on workloads can connect.
    pub fn hear_workloads(&self, address: Address) {
        tokio::spawn(state::listen(self.broker.clone(), address));
    }

    /// From now on anybody can ask which kernels there are.
    pub fn tell_topology(&self, address: Address) {
        tokio::spawn(topology::tell(self.news.clone(), address));
    }

    /// Carry out a message of a morph and answer it.
    pub async fn morph<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        c: &mut Connection<S>,
        sequence: u32,
        message: Message,
    ) -> Result<(), Over> {
        state::serve(&self.broker, c, sequence, message).await
    }

    /// What a connection of this peer has done to workloads ends with it.
    pub fn held(&self, peer: &Hello) -> Held {
        Held((peer.role == Role::Bulk).then(|| self.broker.clone()))
    }

    /// Who it is.
    pub fn identity(&self) -> &Hello {
        &self.identity
    }

    /// Tell a stand-in's kernel that its latest order is being followed.
    pub fn obeyed(&self) {
        self.link.obeyed();
    }

    /// Accept connections for ever, and pet the guardian.
    pub async fn listen<S, F: Future<Output = ()> + Send + 'static>(
        &self,
        accept: impl AsyncFn() -> std::io::Result<Option<S>>,
        serve: impl Fn(S) -> F,
    ) -> Result<(), String> {
        let room = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
        let connections = async {
            loop {
                let stream = match accept().await {
                    Ok(Some(stream)) => stream,
                    Ok(None) => continue,
                    Err(e) => {
                        kmsg::log(kmsg::ERROR, &format!("accept: {e}"));
                        sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let Ok(permit) = room.clone().try_acquire_owned() else {
                    kmsg::log(kmsg::ERROR, &format!("refused a connection: {MAX_CONNECTIONS} are open"));
                    continue;
                };
                let connection = serve(stream);
                tokio::spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
        };
        tokio::select! {
            never = connections => never,
            never = self.link.pet() => never,
        }
    }

    async fn connection<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) {
        let (mut c, peer) =
            match Connection::accept(stream, self.identity.clone(), boot_ns, HELLO_LIMIT).await {
                Ok(opened) => opened,
                Err(e) => return kmsg::log(kmsg::ERROR, &format!("a connection was not opened: {e}")),
            };
        let _held = self.held(&peer);
        loop {
            match c.next().await {
                Event::Message { message: Message::Bye(bye), .. } => return self.bye(&mut c, bye).await,
                Event::Message { header, message } if state::is_morph(&message) => {
                    if let Err(Over(why)) = self.morph(&mut c, header.sequence, message).await {
                        return kmsg::log(kmsg::INFO, &format!("a connection for a morph ended: {why}"));
                    }
                }
                Event::Message { header, message } => {
                    if let Some(answer) = self.answer(&message)
                        && let Err(e) = c.queue(header.sequence, &answer)
                    {
                        return kmsg::log(kmsg::ERROR, &format!("cannot answer: {e}"));
                    }
                }
                Event::Unreadable { .. } | Event::Open { .. } => {} // the session answers by itself
                Event::Closed { .. } => return,
            }
        }
    }

    /// What a message is answered with. A repeated heartbeat is simply answered again.
    pub fn answer(&self, message: &Message) -> Option<Message> {
        match message {
            Message::HeartbeatReq(req) => {
                self.link.tell(req.guardian_ms);
                if req.serves {
                    self.broker.serves();
                }
                Some(
                    HeartbeatRsp {
                        incarnation: self.identity.incarnation,
                        uptime_ns: Some(boot_ns()),
                        agent_pid: Some(std::process::id()),
                        metrics: if req.metrics { self.metrics() } else { Metrics::default() },
                        agent_restarts: self.link.restarts,
                    }
                    .into(),
                )
            }
            Message::Topology(topology) => {
                self.news.set(topology);
                None
            }
            // Told to all survivors; there is nothing to do for them in an instance yet, and no answer.
            Message::RecoverPrepare(_) | Message::RecoverReclaim(_) | Message::RecoverComplete(_) => None,
            Message::Error(_) | Message::Retry(_) => None,
            other => Some(unsupported(other.kind())),
        }
    }

    fn metrics(&self) -> Metrics {
        match &self.figures {
            Figures::Measured(gauges) => gauges.lock().unwrap_or_else(PoisonError::into_inner).metrics(),
            Figures::Fixed(metrics) => metrics.clone(),
        }
    }

    /// Do what a BYE asks for, and confirm it.
    pub async fn bye<S: AsyncRead + AsyncWrite + Unpin>(&self, c: &mut Connection<S>, bye: Bye) {
        let detail = self.end(bye.reason, Duration::from_millis(bye.grace_ms)).await;
        if let Err(e) = c.confirm_bye(ByeAck { detail }).await {
            kmsg::log(kmsg::ERROR, &format!("cannot confirm BYE: {e}"));
        }
    }

    /// The daemon says BYE: for good, or because the instance is to end.
    async fn end(&self, reason: ByeReason, grace: Duration) -> String {
        if reason != ByeReason::Terminate {
            return "closed".into();
        }
        kmsg::log(kmsg::INFO, "kmorphd ends this instance");
        if matches!(self.figures, Figures::Fixed(_)) {
            // Every other process here is somebody else's.
            return "a stand-in has no processes to end and no file systems to sync".into();
        }
        end::workload(Path::new(stage1::PROC), grace).await
    }
}

fn unsupported(kind: MessageType) -> Message {
    ErrorMessage {
        code: ErrorCode::Unsupported,
        message: format!("this agent does not handle {}", kind.name()),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp::message::{HeartbeatReq, VmcoreStart};

    fn server() -> Server {
        let probe = std::env::temp_dir().join(format!("kmorph-agent-test-{}", std::process::id()));
        let gauges = Gauges { sampler: Sampler::new(Path::new("/proc"), &probe), last: None };
        Server {
            identity: Hello { instance: 3, incarnation: 9, release: "6.1-test".into(), ..Hello::default() },
            figures: Figures::Measured(Box::new(Mutex::new(gauges))),
            link: Link::unheard(4),
            broker: Arc::default(),
            news: News::default(),
        }
    }

    async fn message<S: AsyncRead + AsyncWrite + Unpin>(c: &mut Connection<S>) -> (u32, Message) {
        match c.next().await {
            Event::Message { header, message } => (header.sequence, message),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn answers_heartbeats_refuses_the_unknown_and_confirms_bye() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let s = server();
        let client = async {
            let target = Hello { instance: 3, incarnation: 9, ..Hello::default() };
            let (mut c, peer) = Connection::connect(ours, target, boot_ns, HELLO_LIMIT).await.unwrap();
            assert_eq!((peer.incarnation, peer.release.as_str()), (9, "6.1-test"));
            c.queue(1, &HeartbeatReq { metrics: true, ..HeartbeatReq::default() }.into()).unwrap();
            let (seq, m) = message(&mut c).await;
            let Message::HeartbeatRsp(rsp) = m else { panic!("{m:?}") };
            assert_eq!((seq, rsp.incarnation, rsp.agent_restarts), (1, 9, 4));
            assert!(rsp.metrics.memory.unwrap().total > 0);
            c.queue(2, &HeartbeatReq::default().into()).unwrap();
            let (_, m) = message(&mut c).await;
            assert!(matches!(m, Message::HeartbeatRsp(r) if r.metrics == Metrics::default()));
            c.queue(3, &VmcoreStart::default().into()).unwrap();
            let (seq, m) = message(&mut c).await;
            assert!(
                matches!(m, Message::Error(e) if e.code == ErrorCode::Unsupported && e.message.contains("VMCORE_START"))
            );
            assert_eq!(seq, 3);
            c.close(Bye::default());
            assert!(matches!(message(&mut c).await.1, Message::ByeAck(a) if a.detail == "closed"));
        };
        tokio::join!(client, s.connection(theirs));
    }

    #[tokio::test]
    async fn a_daemon_that_means_another_life_is_refused() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let s = server();
        let client = async {
            let target = Hello { instance: 3, incarnation: 8, ..Hello::default() };
            let e = Connection::connect(ours, target, boot_ns, HELLO_LIMIT).await.unwrap_err();
            assert!(matches!(e, kmp::io::OpenError::Refused(_)), "{e}");
        };
        tokio::join!(client, s.connection(theirs));
    }
}
