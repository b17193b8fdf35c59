//! The control connection to one life of one instance: a task that connects, says HELLO, carries requests,
//! and connects again when the connection is lost.

use std::sync::Arc;
use std::time::Duration;

use kmorph_platform::{InstanceId, Platform, Stream};
use kmp::backoff::{Backoff, Jitter};
use kmp::frame::Header;
use kmp::io::Connection;
use kmp::message::{Bye, ByeAck, ByeReason, HeartbeatReq, HeartbeatRsp, Hello, Message, Role};
use kmp::requests::{Answer, Due, Requests, RetryPolicy};
use kmp::session::{End, Event};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info};

use super::heartbeat::HeartbeatMsg;
use super::instance::InstanceMsg;
use super::link::Link;
use super::topology::Told;

/// Longest time for connecting and the HELLO exchange, each.
const OPEN_LIMIT: Duration = Duration::from_secs(2);
/// How long a heartbeat's answer is waited for: later ones only count as late.
const BEAT_LIMIT: Duration = Duration::from_secs(120);
/// Sequence of what is not answered.
const UNASKED: u32 = 0;
/// Bytes that may wait to be written before heartbeats are left out: the other side does not read.
const MAX_BACKLOG: usize = 16 << 10;
/// Waits between attempts to connect. A booting agent needs a while; an answer in time matters more than
/// the few attempts this costs.
const RECONNECT: Backoff =
    Backoff { base: Duration::from_millis(20), factor: 1.6, max: Duration::from_secs(1), jitter: 0.2 };

/// What a connection is asked to do.
pub(crate) enum Command {
    /// Send a heartbeat request; the answer goes to the link.
    Beat { serial: u64, request: HeartbeatReq, to: Link<HeartbeatMsg> },
    /// There is news for the agent.
    Look,
    /// Ask the agent to stop its workload; the answer is what it did. The connection ends.
    Terminate { grace: Duration, reply: oneshot::Sender<Result<String, String>> },
}

/// What the task needs.
pub(crate) struct ConnectionArgs {
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) id: InstanceId,
    pub(crate) incarnation: u64,
    pub(crate) release: String,
    pub(crate) owner: Link<InstanceMsg>,
    pub(crate) seed: u64,
    /// What the agent is told.
    pub(crate) topology: Told,
}

/// Nanoseconds since boot, for frame headers.
pub(crate) fn boot_ns() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    // The clock exists on every Linux; a header without a time is still a header.
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| (t.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec() as u64))
}

struct Beat {
    serial: u64,
    sent: Instant,
    to: Link<HeartbeatMsg>,
}

enum Over {
    /// Connect again.
    Lost(String),
    /// Nobody wants the connection any more.
    Done,
}

/// Run until the command channel is closed or the instance was asked to terminate.
pub(crate) async fn run(args: ConnectionArgs, mut commands: mpsc::Receiver<Command>) {
    let mut jitter = Jitter::new(args.seed ^ args.incarnation);
    let mut attempt = 0;
    let mut said_down = false;
    loop {
        // Boxed: memory for what is rare is not kept.
        let mut why = match Box::pin(open(&args, &mut commands)).await {
            Ok(Some((connection, peer))) => {
                info!(instance = %args.id, incarnation = args.incarnation, release = %peer.release, "agent connected");
                (attempt, said_down) = (0, false);
                args.owner.send(InstanceMsg::ChannelUp { incarnation: args.incarnation, peer });
                match serve(connection, &mut commands, &args.topology).await {
                    Over::Lost(why) => why,
                    Over::Done => return,
                }
            }
            Ok(None) => return,
            Err(why) => why,
        };
        if !std::mem::replace(&mut said_down, true) {
            debug!(instance = %args.id, incarnation = args.incarnation, %why, "no connection to the agent");
            args.owner.send(InstanceMsg::ChannelDown { incarnation: args.incarnation, why: why.clone() });
        }
        let wait = sleep(RECONNECT.wait(attempt, &mut jitter));
        attempt += 1;
        tokio::pin!(wait);
        loop {
            tokio::select! {
                // In order, so that a simulated run replays exactly.
                biased;
                () = &mut wait => break,
                command = commands.recv() => match command {
                    Some(command) => refuse(command, &mut why),
                    None => return,
                },
            }
        }
    }
}

/// Without a connection a heartbeat has no answer, and a wish cannot be carried out.
fn refuse(command: Command, why: &mut String) {
    match command {
        Command::Beat { .. } | Command::Look => {}
        // Who asked may have given up waiting.
        Command::Terminate { reply, .. } => drop(reply.send(Err(std::mem::take(why)))),
    }
}

type Opened = (Connection<Box<dyn Stream>>, Hello);

/// Connect and exchange HELLO. `None` when nobody wants the connection any more.
async fn open(
    args: &ConnectionArgs,
    commands: &mut mpsc::Receiver<Command>,
) -> Result<Option<Opened>, String> {
    let target = Hello {
        instance: args.id.0,
        incarnation: args.incarnation,
        role: Role::Control,
        release: args.release.clone(),
        ..Hello::default()
    };
    let attempt = async {
        let stream = timeout(OPEN_LIMIT, args.platform.connect(args.id, args.incarnation, kmp::PORT))
            .await
            .map_err(|_| format!("no connection within {OPEN_LIMIT:?}"))?
            .map_err(|e| e.to_string())?;
        Connection::connect(stream, target, boot_ns, OPEN_LIMIT).await.map_err(|e| e.to_string())
    };
    tokio::pin!(attempt);
    loop {
        tokio::select! {
                // In order, so that a simulated run replays exactly.
                biased;
            opened = &mut attempt => return opened.map(Some),
            command = commands.recv() => match command {
                Some(command) => refuse(command, &mut "it is not connected yet".to_owned()),
                None => return Ok(None),
            },
        }
    }
}

async fn serve(
    mut connection: Connection<Box<dyn Stream>>,
    commands: &mut mpsc::Receiver<Command>,
    topology: &Told,
) -> Over {
    let base = Instant::now();
    // Whoever is connected anew knows nothing.
    let mut told = 0;
    let mut beats: Requests<Beat> = Requests::new(RetryPolicy::default(), 0);
    loop {
        // Before whatever else there is to say; who was not nudged is told with the next heartbeat.
        if let Some(news) = topology.newer(told) {
            told = news.generation;
            if let Err(error) = connection.queue(UNASKED, &Message::Topology((*news).clone())) {
                return Over::Lost(error.to_string());
            }
        }
        let due = beats.next_due().map(|at| base + at);
        tokio::select! {
                // In order, so that a simulated run replays exactly.
                biased;
            event = connection.next() => match event {
                Event::Message { header, message } => {
                    if let Some(over) = message_in(header, message, &mut beats, base, &mut connection).await {
                        return over;
                    }
                }
                Event::Unreadable { header, error } => {
                    debug!(sequence = header.sequence, %error, "message left unread");
                }
                Event::Closed { detail, .. } => return Over::Lost(detail),
                Event::Open { .. } => {}
            },
            command = commands.recv() => match command {
                None => {
                    connection.close(Bye::default());
                    // A courtesy: the agent also notices that the stream ends.
                    let _ = timeout(Duration::from_millis(100), connection.flush()).await;
                    return Over::Done;
                }
                Some(Command::Beat { serial, request, to }) => {
                    if connection.backlog() <= MAX_BACKLOG {
                        let sent = Instant::now();
                        let sequence = beats.begin_once(sent - base, BEAT_LIMIT, Beat { serial, sent, to });
                        if let Err(error) = connection.queue(sequence, &request.into()) {
                            return Over::Lost(error.to_string());
                        }
                    }
                }
                Some(Command::Look) => {}
                Some(Command::Terminate { grace, reply }) => {
                    let done = Box::pin(terminate(&mut connection, grace)).await;
                    // Who asked may have given up waiting.
                    drop(reply.send(done));
                    return Over::Done;
                }
            },
            () = sleep_until(due.unwrap_or(base)), if due.is_some() => {
                // Expired: whoever asked has counted them as missed long ago.
                for due in beats.poll(base.elapsed()) {
                    debug_assert!(matches!(due, Due::Expired { .. }));
                }
            }
        }
    }
}

async fn message_in(
    header: Header,
    message: Message,
    beats: &mut Requests<Beat>,
    base: Instant,
    connection: &mut Connection<Box<dyn Stream>>,
) -> Option<Over> {
    match message {
        Message::HeartbeatRsp(answer) => answered(header.sequence, answer, beats, base),
        Message::Bye(_) => {
            // The stream ends either way; the confirmation is for the agent's log.
            let _ = timeout(Duration::from_millis(100), connection.confirm_bye(ByeAck::default())).await;
            return Some(Over::Lost("the agent said goodbye".into()));
        }
        Message::HealthStatus(status) => {
            info!(level = ?status.level, reason = %status.reason, "the agent reports its health");
        }
        Message::Error(error) => {
            debug!(code = ?error.code, message = %error.message, "the agent reports an error")
        }
        other => debug!(kind = %other.kind(), "message of no use here"),
    }
    None
}

fn answered(sequence: u32, answer: HeartbeatRsp, beats: &mut Requests<Beat>, base: Instant) {
    if let Answer::Matched { context: Beat { serial, sent, to }, .. } = beats.answer(sequence, base.elapsed())
    {
        to.send(HeartbeatMsg::Answer { serial, rtt: sent.elapsed(), answer: Box::new(answer) });
    }
}

/// Say BYE with the wish to terminate and wait for its confirmation.
async fn terminate(connection: &mut Connection<Box<dyn Stream>>, grace: Duration) -> Result<String, String> {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    connection.close(Bye { reason: ByeReason::Terminate, grace_ms });
    let confirmed = async {
        let mut done = None;
        loop {
            match connection.next().await {
                Event::Message { message: Message::ByeAck(ack), .. } => done = Some(ack.detail),
                Event::Closed { end: End::Local, .. } => {
                    return done.ok_or_else(|| "BYE was not confirmed".into());
                }
                Event::Closed { detail, .. } => return Err(detail),
                Event::Message { .. } | Event::Unreadable { .. } | Event::Open { .. } => {}
            }
        }
    };
    timeout(grace, confirmed)
        .await
        .unwrap_or_else(|_| Err(format!("the agent did not confirm within {grace:?}")))
}
