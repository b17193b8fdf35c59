//! What happened lately, for operators: numbered, bounded, and followed by whoever wants to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kmorph_control::views::{EventKind, EventView, EventsArgs};
use tokio::sync::broadcast;

use super::effects::unix_ms;

/// Events that are kept.
const KEEP: usize = 8192;
/// Events a slow follower may be behind.
const FOLLOW: usize = 4096;

/// An event that has no number and no time yet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) kind: EventKind,
    pub(crate) instance: Option<String>,
    pub(crate) group: Option<String>,
    pub(crate) incident: Option<u64>,
    pub(crate) incarnation: Option<u64>,
    pub(crate) from: Option<String>,
    pub(crate) to: Option<String>,
    pub(crate) cause: String,
    pub(crate) effect: String,
}

impl Draft {
    /// An event of this kind with a cause.
    pub(crate) fn new(kind: EventKind, cause: impl Into<String>) -> Draft {
        Draft {
            kind,
            instance: None,
            group: None,
            incident: None,
            incarnation: None,
            from: None,
            to: None,
            cause: cause.into(),
            effect: String::new(),
        }
    }

    /// What is done about it.
    pub(crate) fn effect(mut self, effect: impl Into<String>) -> Draft {
        self.effect = effect.into();
        self
    }

    /// The instance, the group it belongs to, and which of its lives.
    pub(crate) fn of(mut self, instance: &str, group: Option<String>, incarnation: u64) -> Draft {
        self.instance = Some(instance.to_owned());
        self.group = group;
        self.incarnation = (incarnation > 0).then_some(incarnation);
        self
    }

    /// A transition.
    pub(crate) fn transition(mut self, from: Option<String>, to: impl Into<String>) -> Draft {
        self.from = from;
        self.to = Some(to.into());
        self
    }
}

struct Inner {
    events: VecDeque<Arc<EventView>>,
    seq: u64,
}

/// The latest events of the daemon.
pub struct EventLog {
    inner: Mutex<Inner>,
    follow: broadcast::Sender<EventView>,
}

impl Default for EventLog {
    fn default() -> Self {
        EventLog {
            inner: Mutex::new(Inner { events: VecDeque::new(), seq: 0 }),
            follow: broadcast::channel(FOLLOW).0,
        }
    }
}

/// Whether an event is one the filter asks for.
pub fn wanted(filter: &EventsArgs, event: &EventView) -> bool {
    filter.instance.as_ref().is_none_or(|i| event.instance.as_ref() == Some(i))
        && filter.incident.is_none_or(|n| event.incident == Some(n))
        && filter.since_unix_ms.is_none_or(|t| event.at_unix_ms >= t)
}

impl EventLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A push is all that happens under the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number it, keep it, tell followers.
    pub(crate) fn say(&self, draft: Draft) {
        let mut inner = self.lock();
        inner.seq += 1;
        let event = EventView {
            seq: inner.seq,
            at_unix_ms: unix_ms(),
            kind: draft.kind,
            instance: draft.instance,
            group: draft.group,
            incident: draft.incident,
            incarnation: draft.incarnation,
            from: draft.from,
            to: draft.to,
            cause: draft.cause,
            effect: draft.effect,
        };
        if inner.events.len() == KEEP {
            inner.events.pop_front();
        }
        inner.events.push_back(Arc::new(event.clone()));
        // Sent under the lock, so that followers see numbers in order. Nobody needs to be following.
        let _ = self.follow.send(event);
    }

    /// Events that are kept and wanted, oldest first.
    pub fn since(&self, filter: &EventsArgs) -> Vec<EventView> {
        let kept: Vec<Arc<EventView>> = self.lock().events.iter().cloned().collect();
        kept.iter().filter(|e| wanted(filter, e)).map(|e| EventView::clone(e)).collect()
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<EventView> {
        self.follow.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_numbered_bounded_filtered_and_followed() {
        let log = EventLog::default();
        let mut follower = log.subscribe();
        for n in 0..KEEP as u64 + 2 {
            let mut draft =
                Draft::new(EventKind::State, "seen").of(if n % 2 == 0 { "a" } else { "b" }, None, 1);
            draft.incident = Some(n);
            log.say(draft);
            if n == 0 {
                assert_eq!(follower.recv().await.unwrap().seq, 1);
            }
        }
        let all = log.since(&EventsArgs::default());
        assert_eq!((all.len(), all[0].seq, all[KEEP - 1].seq), (KEEP, 3, KEEP as u64 + 2));
        let a = log.since(&EventsArgs { instance: Some("a".into()), ..EventsArgs::default() });
        assert_eq!(a.len(), KEEP / 2);
        let one = log.since(&EventsArgs { incident: Some(5), ..EventsArgs::default() });
        assert_eq!(one.iter().map(|e| e.seq).collect::<Vec<_>>(), [6]);
        let later = EventsArgs { since_unix_ms: Some(u64::MAX), ..EventsArgs::default() };
        assert!(log.since(&later).is_empty());
    }
}
