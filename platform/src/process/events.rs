//! What stand-ins report by themselves, and their unannounced ends.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use kmp::stand_in::{Control, Notice, NoticeKind, State as Word};
use nix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;
use tokio::sync::{Notify, mpsc};

use super::leader::Leader;
use super::{Inner, view};
use crate::{InstanceId, PlatformError, PlatformEvent, PlatformEventKind};

/// Events waiting for the supervisor; what does not fit is counted.
const QUEUE: usize = 4096;
/// A stamp further back than this is no stamp.
const OLDEST: Duration = Duration::from_secs(3600);

/// Events on their way to the supervisor, in bounded memory.
pub struct Outbox {
    send: mpsc::Sender<PlatformEvent>,
    lost: AtomicU32,
    wake: Notify,
}

impl Outbox {
    pub fn new() -> (Arc<Outbox>, mpsc::Receiver<PlatformEvent>) {
        let (send, receive) = mpsc::channel(QUEUE);
        (Arc::new(Outbox { send, lost: AtomicU32::new(0), wake: Notify::new() }), receive)
    }

    /// Hand an event over, or count it as lost. The order of what is not lost stays.
    pub fn put(&self, event: PlatformEvent) {
        if self.lost.load(Ordering::Relaxed) == 0
            && !matches!(self.send.try_send(event), Err(mpsc::error::TrySendError::Full(_)))
        {
            return;
        }
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Tell how many were lost as soon as there is room.
    pub async fn confess(&self) {
        loop {
            self.wake.notified().await;
            let Ok(room) = self.send.reserve().await else { return };
            let kind = PlatformEventKind::Lost(self.lost.swap(0, Ordering::Relaxed));
            room.send(PlatformEvent { id: InstanceId::PRIMARY, incarnation: 0, age: Duration::ZERO, kind });
        }
    }
}

/// Open the daemon's socket for notices in place of an earlier daemon's.
pub fn bind(inner: &Inner) -> Result<UnixDatagram, PlatformError> {
    let path = inner.folder.events();
    super::folder::remove(&path)?;
    UnixDatagram::bind(&path).map_err(|e| PlatformError::os(format!("listen on {}", path.display()), e))
}

/// Read notices until the platform is gone.
pub async fn pump(inner: Weak<Inner>, socket: UnixDatagram) {
    // One byte more than a notice has: a longer datagram shows.
    let mut buf = [0; Notice::MAX_LEN + 1];
    loop {
        match socket.recv(&mut buf).await {
            Ok(n) => {
                let Some(inner) = inner.upgrade() else { return };
                match Notice::decode(&buf[..n]) {
                    Ok(notice) => take(&inner, notice),
                    Err(error) => {
                        tracing::warn!(%error, "a datagram that is no notice of a stand-in was ignored")
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "reading notices of stand-ins failed");
                // Whatever it is must not make this loop spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn take(inner: &Inner, notice: Notice) {
    let id = InstanceId(notice.instance);
    if let Err(error) = inner.state().current(id, notice.incarnation) {
        tracing::debug!(%error, kind = ?notice.kind, "a notice was ignored");
        return;
    }
    let kind = match notice.kind {
        NoticeKind::Ready => PlatformEventKind::Ready,
        NoticeKind::Panic => PlatformEventKind::Panic(notice.text),
        NoticeKind::Parked => PlatformEventKind::Parked(notice.text),
    };
    let age = age(now_ns(), notice.stamp_ns);
    inner.outbox.put(PlatformEvent { id, incarnation: notice.incarnation, age, kind });
}

fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |t| (t.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec() as u64))
}

/// The stamp may come from a liar: an age below zero or above an hour is no age.
fn age(now: u64, stamp: u64) -> Duration {
    now.checked_sub(stamp).map(Duration::from_nanos).filter(|a| *a <= OLDEST).unwrap_or_default()
}

/// Wait until the first process of an instance ends, and report it unless it was to.
pub async fn watch(inner: Weak<Inner>, id: InstanceId, incarnation: u64, leader: Arc<Leader>) {
    if let Err(error) = leader.gone().await {
        return tracing::error!(instance = %id, %error, "its end cannot be waited for");
    }
    let how =
        leader.reap().unwrap_or_else(|| "it was started by an earlier daemon, so how is not known".into());
    let text = format!("its process ended: {how}");
    let Some(inner) = inner.upgrade() else { return };
    let control = {
        let mut state = inner.state();
        let Ok(live) = state.current(id, incarnation) else { return };
        live.ended = Some(text.clone());
        if live.fencing {
            return;
        }
        live.control.clone()
    };
    // It may have said more than its end does, and the notice of that may be unread yet.
    let last = control.and_then(|c| view::read_control(&c).ok());
    let kind = match last {
        Some(Control { state: Word::Panicked, text, .. }) => PlatformEventKind::Panic(text),
        Some(Control { state: Word::Parked, text, .. }) => PlatformEventKind::Parked(text),
        _ => PlatformEventKind::Parked(text),
    };
    inner.outbox.put(PlatformEvent { id, incarnation, age: Duration::ZERO, kind });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u64) -> PlatformEvent {
        PlatformEvent {
            id: InstanceId(1),
            incarnation: n,
            age: Duration::ZERO,
            kind: PlatformEventKind::Ready,
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_counted() {
        let (outbox, mut receive) = Outbox::new();
        for n in 0..QUEUE as u64 + 5 {
            outbox.put(event(n));
        }
        let teller = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.confess().await }
        });
        for n in 0..QUEUE as u64 {
            assert_eq!(receive.recv().await.unwrap().incarnation, n);
        }
        assert_eq!(receive.recv().await.unwrap().kind, PlatformEventKind::Lost(5));
        outbox.put(event(9));
        assert_eq!(receive.recv().await.unwrap().incarnation, 9);
        teller.abort();
    }

    #[test]
    fn only_sane_stamps_give_an_age() {
        assert_eq!(age(5_000_000, 2_000_000), Duration::from_millis(3));
        assert_eq!(age(5, 6), Duration::ZERO);
        assert_eq!(age(u64::MAX, 1), Duration::ZERO);
    }
}
