//! Events of the module, as they come.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::sys::{Device, tsc};
use super::{Inner, abi};
use crate::{InstanceId, PlatformError, PlatformEvent, PlatformEventKind};

/// Events waiting for the supervisor. The module keeps its own queue behind this one.
const QUEUE: usize = 256;

/// Read events until the receiver is gone.
pub(super) fn start(inner: Arc<Inner>) -> Result<mpsc::Receiver<PlatformEvent>, PlatformError> {
    let device = inner.device.reopen()?.watch()?;
    let (send, receive) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let mut lost = 0;
        let mut buf = [Device::blank_event(); 16];
        loop {
            let ready = tokio::select! {
                ready = device.readable() => ready,
                () = send.closed() => return, // nobody listens any more: let go of the device
            };
            let mut guard = match ready {
                Ok(guard) => guard,
                Err(error) => return tracing::error!(%error, "no more events from kmorph.ko"),
            };
            let n = match device.get_ref().read_events(&mut buf) {
                Ok(0) => {
                    guard.clear_ready();
                    continue;
                }
                Ok(n) => n,
                Err(error) => return tracing::error!(%error, "reading events of kmorph.ko failed"),
            };
            for event in buf.iter().take(n).filter_map(|e| convert(e, inner.tsc_khz)) {
                if send.send(event).await.is_err() {
                    return;
                }
            }
            let mut info: abi::Info = abi::request();
            if device.get_ref().info(&mut info).is_ok() && info.events_lost != lost {
                let missed = info.events_lost.wrapping_sub(lost);
                lost = info.events_lost;
                let event = PlatformEvent {
                    id: InstanceId::PRIMARY,
                    incarnation: 0,
                    age: Duration::ZERO,
                    kind: PlatformEventKind::Lost(missed),
                };
                if send.send(event).await.is_err() {
                    return;
                }
            }
        }
    });
    Ok(receive)
}

fn convert(e: &abi::Event, tsc_khz: u32) -> Option<PlatformEvent> {
    use abi::event_type as t;
    let kind = match e.kind {
        t::READY => PlatformEventKind::Ready,
        t::PANIC => PlatformEventKind::Panic(abi::text(&e.text)),
        t::PARKED => PlatformEventKind::Parked(abi::text(&e.text)),
        t::LINK_UP if e.data == 0 => PlatformEventKind::LinkUp,
        t::LINK_DOWN if e.data == 0 => PlatformEventKind::LinkDown,
        t::LEFT => PlatformEventKind::Left,
        _ => return None,
    };
    // The stamp may come from a dying kernel: an age below zero or above an hour is no age.
    let ticks = tsc().saturating_sub(e.tsc);
    let age = if e.tsc == 0 || tsc_khz == 0 { 0 } else { ticks.saturating_mul(1000) / u64::from(tsc_khz) };
    let age = Duration::from_micros(if age > 3_600_000_000 { 0 } else { age });
    Some(PlatformEvent {
        id: InstanceId(u16::try_from(e.instance).ok()?),
        incarnation: e.incarnation,
        age,
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u32, data: u64, tsc: u64) -> abi::Event {
        let mut e = Device::blank_event();
        (e.kind, e.instance, e.incarnation, e.data, e.tsc) = (kind, 3, 7, data, tsc);
        e.text[..5].copy_from_slice(b"oops\n");
        e
    }

    #[test]
    fn panic_carries_its_reason_and_a_sane_age() {
        let e = convert(&event(abi::event_type::PANIC, 0, tsc()), 1_000_000).unwrap();
        assert_eq!(e.kind, PlatformEventKind::Panic("oops".into()));
        assert_eq!((e.id, e.incarnation), (InstanceId(3), 7));
        assert!(e.age < Duration::from_secs(60));
        let wild = convert(&event(abi::event_type::PANIC, 0, u64::MAX), 1_000_000).unwrap();
        assert_eq!(wild.age, Duration::ZERO);
    }

    #[test]
    fn links_between_two_instances_are_not_the_supervisors_channel() {
        assert!(convert(&event(abi::event_type::LINK_UP, 2, 1), 1).is_none());
        assert!(convert(&event(abi::event_type::LINK_UP, 0, 1), 1).is_some());
        assert!(convert(&event(99, 0, 1), 1).is_none());
    }
}
