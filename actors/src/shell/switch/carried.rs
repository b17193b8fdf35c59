//! A connection that goes on with another kernel: what [`core::carry`](crate::core::carry) decides, carried out.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use kmorph_platform::Stream;
use kmorph_state::session::{FRAME_LIMIT, Greeting, LINE_LIMIT, Welcome};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::debug;

use super::door::{Door, Member};
use super::session::{Ended, FIRST_WAIT, Going, InLane, LONGEST_WAIT, WAIT_LIMIT};
use super::{Go, Lane, Next, Shared};
use crate::core::carry::Carried;
use crate::core::route::{Route, Target};

/// Room for what a service sends, at least.
const READ: usize = 16 << 10;

/// What a client still sends when everything is over is read, and thrown away, for so long at most.
const LINGER: Duration = Duration::from_secs(2);

/// A connection to a service that has welcomed the session.
struct Joined {
    target: Target,
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    lane: InLane,
    consumed: u64,
    from: u64,
}

/// Counts a connection to the next kernel, for as long as it lives.
struct Parked<'a>(&'a Shared);

impl<'a> Parked<'a> {
    fn on(shared: &'a Shared) -> Parked<'a> {
        shared.parked.send_modify(|n| *n += 1);
        Parked(shared)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.parked.send_modify(|n| *n -= 1);
    }
}

/// Counts a connection that can go on with another kernel, for as long as it lives.
struct CanMove<'a>(&'a Shared);

impl<'a> CanMove<'a> {
    fn on(shared: &'a Shared) -> CanMove<'a> {
        shared.carried.fetch_add(1, Ordering::Relaxed);
        CanMove(shared)
    }
}

impl Drop for CanMove<'_> {
    fn drop(&mut self) {
        self.0.carried.fetch_sub(1, Ordering::Relaxed);
        // Who waits until all are ready looks again.
        self.0.parked.send_modify(|_| {});
    }
}

/// Serve a client until it or the service ends.
pub(super) async fn run<S>(client: &mut S, door: &Door) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let id = rand::random();
    let began = Instant::now();
    let nobody = watch::Sender::new(None);
    let greeting = Greeting { id, resume: false };
    let placed = door.place(|m| {
        let nobody = nobody.subscribe();
        async move { join(&m.shared, greeting, m.publish.port, nobody).await }.boxed()
    });
    let Some((member, first)) = timeout(WAIT_LIMIT, placed).await.unwrap_or(None) else {
        door.failed();
        debug!(instance = %door.names(), "no kernel took a client's session");
        return Ended::Broken;
    };
    let ended = tokio::select! {
        ended = carry(client, &member, first, id, began) => ended,
        // Published no more, while others still are at this address.
        () = member.shared.ended() => Ended::Orderly,
    };
    if ended == Ended::Broken {
        member.counts.failed.fetch_add(1, Ordering::Relaxed);
    }
    ended
}

async fn carry<S>(client: &mut S, member: &Member, first: Joined, id: u64, began: Instant) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Member { shared, counts, publish } = member;
    let port = publish.port;
    let (mut carried, mut now) = (Carried::new(), first);
    if let Err(error) = carried.joined(now.consumed, now.from) {
        debug!(instance = %shared.instance, %error, "a service does not keep to the protocol");
        return Ended::Broken;
    }
    let waited = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    counts.longest_wait_us.fetch_max(waited, Ordering::Relaxed);
    let going = (Going::on(&counts.open), CanMove::on(shared));
    let (mut client_reader, mut client_writer) = tokio::io::split(client);
    let resume = Greeting { id, resume: true };
    // The kernel that carries it, for as long as the connection there is whole.
    let carrier = watch::Sender::new(Some(now.target));
    let mut next = join(shared, resume, port, carrier.subscribe());
    // The connection to the service is lost since then.
    let mut lost: Option<Instant> = None;
    let mut input = vec![0; FRAME_LIMIT];
    loop {
        if carried.is_over() {
            // One that is gone already needs no end.
            let _ = client_writer.shutdown().await;
            // It counts no more, neither here nor with a kernel.
            drop((going, now, next));
            // Closed with something unread, TCP takes back what the client has not read yet.
            let mut nowhere = tokio::io::sink();
            let _ = timeout(LINGER, tokio::io::copy(&mut client_reader, &mut nowhere)).await;
            return Ended::Orderly;
        }
        let room = carried.room().min(input.len());
        carried.arriving.reserve(READ);
        let there = lost.is_none();
        tokio::select! {
            biased;
            joined = &mut next => {
                let Some(joined) = joined else { return Ended::Broken };
                if let Err(error) = carried.joined(joined.consumed, joined.from) {
                    debug!(instance = %shared.instance, %error, "a session cannot go on");
                    return Ended::Broken;
                }
                if joined.target != now.target {
                    now.lane.0.moved.fetch_add(1, Ordering::Relaxed);
                    counts.moved.fetch_add(1, Ordering::Relaxed);
                }
                now = joined;
                lost = None;
                carrier.send_replace(Some(now.target));
                next = join(shared, resume, port, carrier.subscribe());
            }
            written = now.writer.write_buf(&mut carried.to_service), if there && !carried.to_service.is_empty() => {
                if !matches!(written, Ok(1..)) {
                    lost = Some(Instant::now());
                }
            }
            read = now.reader.read_buf(&mut carried.arriving), if there && carried.takes_more() => {
                if !matches!(read, Ok(1..)) {
                    lost = Some(Instant::now());
                } else if let Err(error) = carried.from_service() {
                    debug!(instance = %shared.instance, %error, "a service does not keep to the protocol");
                    return Ended::Broken;
                }
            }
            written = client_writer.write_buf(&mut carried.to_client), if !carried.to_client.is_empty() => {
                match written {
                    Ok(n @ 1..) => {
                        carried.delivered(n);
                        // Frames that had no room.
                        if carried.from_service().is_err() {
                            return Ended::Broken;
                        }
                    }
                    _ => return Ended::Broken,
                }
            }
            read = client_reader.read(&mut input[..room]), if room > 0 => {
                match read {
                    Ok(n) => carried.from_client(&input[..n]),
                    Err(_) => return Ended::Broken,
                }
            }
            () = is_cut(now.lane.0.clone()), if there => return Ended::Broken,
            () = sleep_until(lost.unwrap_or(began) + WAIT_LIMIT), if !there => return Ended::Broken,
        }
        if lost.is_some() && there {
            // Whichever kernel the instance is now goes on with it, if it knows it.
            carrier.send_replace(None);
        }
    }
}

/// Wait until the connections to a kernel are cut.
async fn is_cut(lane: Arc<Lane>) {
    // The lane outlives its users: the only way this ends is that it is cut.
    let _ = lane.cut.subscribe().wait_for(|cut| *cut).await;
}

type Joining<'a> = Pin<Box<dyn Future<Output = Option<Joined>> + Send + 'a>>;

/// Have a kernel other than its carrier go on with a session. `None` when none will.
fn join(
    shared: &Shared,
    greeting: Greeting,
    port: u32,
    mut carrier: watch::Receiver<Option<Target>>,
) -> Joining<'_> {
    Box::pin(async move {
        let (mut route, mut next) = (shared.route.subscribe(), shared.next.subscribe());
        let mut wait = FIRST_WAIT;
        loop {
            let (now, coming) = (*route.borrow_and_update(), *next.borrow_and_update());
            let than = *carrier.borrow_and_update();
            // It goes on with the next kernel already, a moment before new clients are sent there.
            let ahead = coming.is_some_and(|n| n.go == Go::Passed && Some(n.target) == than);
            let goes = |n: &Next| n.go != Go::Yes || now == Route::Open(n.target);
            let coming = coming.filter(|n| Some(n.target) != than && goes(n));
            let target = match (now, coming) {
                _ if ahead => None,
                // A session that begins does so with the kernel that serves.
                (_, Some(n)) if greeting.resume => Some(n.target),
                (Route::Open(t), _) if Some(t) != than => Some(t),
                (Route::Closed, _) => return None,
                // Its kernel is being recovered: a crash has taken the session along.
                (Route::Held, _) if greeting.resume && than.is_none() => return None,
                _ => None,
            };
            let Some(target) = target else {
                tokio::select! {
                    changed = route.changed() => changed.ok()?,
                    changed = next.changed() => changed.ok()?,
                    changed = carrier.changed() => changed.ok()?,
                }
                continue;
            };
            let changed = changes(target, route.clone(), next.clone());
            tokio::select! {
                joined = welcome(shared, greeting, port, target) => match joined {
                    Ok(Some(joined)) => return Some(joined),
                    Ok(None) => return None,
                    Err(error) => {
                        debug!(instance = %shared.instance, %error, "not joined yet");
                        sleep(wait).await;
                        wait = (wait * 2).min(LONGEST_WAIT);
                    }
                },
                () = changed => wait = FIRST_WAIT,
            }
        }
    })
}

/// Wait until clients are to go somewhere else than to this kernel.
async fn changes(target: Target, mut route: watch::Receiver<Route>, mut next: watch::Receiver<Option<Next>>) {
    loop {
        let gone = tokio::select! {
            changed = route.changed() => changed.is_err(),
            changed = next.changed() => changed.is_err(),
        };
        let wanted =
            *route.borrow() == Route::Open(target) || next.borrow().is_some_and(|n| n.target == target);
        if gone || !wanted {
            return;
        }
    }
}

/// Connect, greet, and wait until the service goes on with the session and clients may go there. `None`: it does not
/// know it.
async fn welcome(
    shared: &Shared,
    greeting: Greeting,
    port: u32,
    target: Target,
) -> Result<Option<Joined>, String> {
    let lane = InLane::new(shared.lane(target));
    let connect = shared.platform.connect(target.id, target.incarnation, port);
    let mut stream = connect.await.map_err(|e| e.to_string())?;
    stream.write_all(greeting.to_string().as_bytes()).await.map_err(|e| e.to_string())?;
    let parked = Parked::on(shared);
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() >= LINE_LIMIT {
            return Err("the answer to the greeting is too long".into());
        }
        line.push(stream.read_u8().await.map_err(|e| e.to_string())?);
    }
    // It serves, and is not followed before that is decided for good.
    let (mut route, mut next) = (shared.route.subscribe(), shared.next.subscribe());
    while !shared.passes(target) {
        let changed = tokio::select! {
            changed = route.changed() => changed,
            changed = next.changed() => changed,
        };
        changed.map_err(|_| "the switch has ended")?;
    }
    drop(parked);
    let line = String::from_utf8(line).map_err(|e| e.to_string())?;
    match Welcome::parse(&line).map_err(|e| e.to_string())? {
        Welcome::Unknown => Ok(None),
        Welcome::Ok { consumed, from } => {
            let (reader, writer) = tokio::io::split(stream);
            Ok(Some(Joined { target, reader, writer, lane, consumed, from }))
        }
    }
}
