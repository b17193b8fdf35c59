//! The agents of simulated kernels, and the CPU time they get.

use std::sync::atomic::{AtomicBool, Ordering};

use kmp::io::Connection;
use kmp::message::{ByeAck, HeartbeatRsp, Hello, Message, MorphCommit, Reply};
use kmp::session::Event;
use tokio::sync::watch;

use super::machine::Trouble;
use super::*;

/// When somebody has the CPU that it shares with another: slices, in turns.
#[derive(Debug)]
pub(super) struct Shares {
    began: Instant,
    /// Start and end of each slice, microseconds since `began`.
    slices: Vec<(u64, u64)>,
}

impl Shares {
    /// Half of a CPU for `length`. Slices are those of a fair scheduler, 3 to 24 ms, and now and then up to 200 ms,
    /// as a hypervisor or a CPU quota makes them.
    pub(super) fn half(dice: &mut Dice, length: Duration) -> Shares {
        let (mut at, mut slices) = (0, vec![]);
        let mut slice = || {
            let (least, spread) = if dice.roll(100) == 0 { (50_000, 150_000) } else { (3_000, 21_000) };
            least + dice.roll(spread)
        };
        while at < length.as_micros() as u64 {
            let (on, off) = (slice(), slice());
            slices.push((at, at + on));
            at += on + off;
        }
        Shares { began: Instant::now(), slices }
    }

    pub(super) fn slices(&self) -> &[(u64, u64)] {
        &self.slices
    }

    fn slice(&self, now: Instant) -> (u64, usize) {
        let at = now.duration_since(self.began).as_micros() as u64;
        (at, self.slices.partition_point(|(start, _)| *start <= at))
    }

    /// The last moment up to now at which it ran.
    pub(super) fn last(&self, now: Instant) -> Instant {
        let (at, next) = self.slice(now);
        let end = next.checked_sub(1).map_or(at, |i| self.slices[i].1);
        self.began + Duration::from_micros(at.min(end))
    }

    /// The first moment from now on at which it runs.
    fn next(&self, now: Instant) -> Instant {
        let (at, next) = self.slice(now);
        let runs = next.checked_sub(1).is_some_and(|i| at < self.slices[i].1);
        let start = self.slices.get(next).map_or(at, |(start, _)| *start);
        self.began + Duration::from_micros(if runs { at } else { start })
    }
}

/// The agent of one life of a kernel.
pub(super) struct Agent {
    pub(super) id: InstanceId,
    pub(super) incarnation: u64,
    pub(super) trouble: watch::Receiver<Trouble>,
    pub(super) served: Arc<AtomicBool>,
    pub(super) shares: Option<Arc<Shares>>,
    /// Its workload is told to serve.
    pub(super) told: Box<dyn Fn() + Send>,
}

impl Agent {
    pub(super) async fn serve(mut self, stream: tokio::io::DuplexStream) {
        let Agent { id, incarnation, .. } = self;
        let identity = Hello { instance: id.0, incarnation, release: "6.12.9".into(), ..Hello::default() };
        let limit = Duration::from_secs(1);
        let Ok((mut connection, _)) = Connection::accept(stream, identity, || 0, limit).await else { return };
        loop {
            let event = tokio::select! {
                biased;
                changed = self.trouble.changed() => {
                    if changed.is_err() || *self.trouble.borrow() == Trouble::Unreachable {
                        return;
                    }
                    continue;
                }
                event = connection.next() => event,
            };
            if let Some(shares) = &self.shares {
                tokio::time::sleep_until(shares.next(Instant::now())).await;
            }
            let silent = *self.trouble.borrow() != Trouble::None;
            match event {
                Event::Message { message: Message::HeartbeatReq(_), .. } if silent => {}
                Event::Message { header, message: Message::HeartbeatReq(request) } => {
                    if request.serves {
                        (self.told)();
                    }
                    self.served.store(true, Ordering::SeqCst);
                    let answer = HeartbeatRsp { incarnation, ..HeartbeatRsp::default() };
                    if connection.queue(header.sequence, &answer.into()).is_err() {
                        return;
                    }
                }
                Event::Message { header, message: Message::MorphCommit(m) } if !silent => {
                    if m.serves {
                        (self.told)();
                    }
                    let reply = Some(Reply { ok: true, detail: String::new() });
                    if connection.queue(header.sequence, &MorphCommit { reply, ..m }.into()).is_err() {
                        return;
                    }
                }
                Event::Message { message: Message::Bye(_), .. } if !silent => {
                    let _ = connection.confirm_bye(ByeAck { detail: "stopped".into() }).await;
                    return;
                }
                Event::Closed { .. } => return,
                _ => {}
            }
        }
    }
}
