//! How fast a workload may change its state while a morph copies it.

use std::time::{Duration, Instant};

/// Changes a second that are always allowed: a workload that is throttled does not stand still.
const LEAST: f64 = 20.0;
/// What was not used is kept for this long.
const BURST: Duration = Duration::from_millis(20);
/// A pace that was seen for a shorter time is none.
const SEEN: Duration = Duration::from_millis(1);

/// The time. This crate has no runtime whose clock it could read; tests pass the times they want.
#[allow(clippy::disallowed_methods)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Measures the pace of changes, whatever those are, and holds back who makes them when that is wanted. Changes are
/// counted by the owner from the beginning on.
#[derive(Clone, Debug)]
pub struct Pace {
    /// The measurement began then, with so many changes.
    since: Instant,
    first: u64,
    limit: Option<Limit>,
}

#[derive(Clone, Debug)]
struct Limit {
    /// Changes a second without a limit, and with it.
    free: f64,
    allowed: f64,
    /// Changes that may be made now; below 0 when more were made.
    room: f64,
    at: Instant,
    seen: u64,
}

impl Pace {
    /// Unhindered. `changes` were made so far.
    pub fn new(now: Instant, changes: u64) -> Pace {
        Pace { since: now, first: changes, limit: None }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    /// Take so many percent of the pace away that was seen since it was last unhindered; 0: unhindered from now on.
    pub fn throttle(&mut self, percent: u8, now: Instant, changes: u64) {
        if percent == 0 {
            // What was measured stays when there was no limit.
            if self.limit.is_some() {
                *self = Pace::new(now, changes);
            }
            return;
        }
        let seen = now.saturating_duration_since(self.since).max(SEEN);
        let free = match &self.limit {
            Some(limit) => limit.free,
            None => changes.saturating_sub(self.first) as f64 / seen.as_secs_f64(),
        };
        let allowed = (free * f64::from(100 - percent.min(100)) / 100.0).max(LEAST);
        let room = self.limit.as_ref().map_or(0.0, |l| l.room);
        self.limit = Some(Limit { free, allowed, room, at: now, seen: changes });
    }

    /// Whether one more change may be made, or else how long it takes until that is so.
    pub fn may_change(&mut self, now: Instant, changes: u64) -> Result<(), Duration> {
        let Some(limit) = &mut self.limit else { return Ok(()) };
        let most = (limit.allowed * BURST.as_secs_f64()).max(1.0);
        let more = limit.allowed * now.saturating_duration_since(limit.at).as_secs_f64();
        limit.room = (limit.room + more).min(most) - changes.saturating_sub(limit.seen) as f64;
        (limit.at, limit.seen) = (now, changes);
        if limit.room > 0.0 {
            return Ok(());
        }
        // Rounded up: who waits that long finds room.
        Err(Duration::from_secs_f64(-limit.room / limit.allowed) + Duration::from_micros(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Changes made in so much time by someone who makes as many as there is room for, `at_once` in one go.
    fn made(pace: &mut Pace, now: &mut Instant, changes: &mut u64, time: Duration, at_once: u64) -> u64 {
        let (until, before) = (*now + time, *changes);
        loop {
            match pace.may_change(*now, *changes) {
                Ok(()) => *changes += at_once,
                Err(wait) => *now += wait,
            }
            if *now >= until {
                return *changes - before;
            }
        }
    }

    #[test]
    fn a_share_of_the_pace_that_was_seen_is_left() {
        let mut now = now();
        let mut pace = Pace::new(now, 500);
        now += Duration::from_secs(2);
        let mut changes = 20_500;
        assert!(pace.may_change(now, changes).is_ok() && !pace.is_limited());
        for (percent, want) in [(50, 5000.0), (90, 1000.0), (99, 100.0), (75, 2500.0)] {
            pace.throttle(percent, now, changes);
            let made = made(&mut pace, &mut now, &mut changes, Duration::from_secs(1), 1) as f64;
            assert!((made / want - 1.0).abs() < 0.05, "{percent} %: {made}");
        }
        pace.throttle(0, now, changes);
        assert!(!pace.is_limited() && pace.may_change(now, changes + 1_000_000).is_ok());
        // It is measured anew.
        now += Duration::from_secs(1);
        pace.throttle(90, now, changes + 1000);
        changes += 1000;
        let made = made(&mut pace, &mut now, &mut changes, Duration::from_secs(1), 1);
        assert!((95..=105).contains(&made), "{made}");
    }

    #[test]
    fn nobody_stands_still_for_good() {
        let mut now = now();
        let (mut pace, mut changes) = (Pace::new(now, 0), 0);
        pace.throttle(99, now, 0);
        let made = made(&mut pace, &mut now, &mut changes, Duration::from_secs(10), 1);
        assert!((190..=210).contains(&made), "{made}");
    }

    proptest! {
        #[test]
        fn over_time_no_more_is_made_than_allowed(
            pace_seen in 1u64..1_000_000, percent in 1u8..100, at_once in 1u64..500
        ) {
            let start = now();
            let mut now = start + Duration::from_secs(1);
            let (mut pace, mut changes) = (Pace::new(start, 0), pace_seen);
            pace.throttle(percent, now, changes);
            let allowed = (pace_seen as f64 * f64::from(100 - percent) / 100.0).max(LEAST);
            // What is in flight when there is no room any more is at most one go.
            let made = made(&mut pace, &mut now, &mut changes, Duration::from_secs(3), at_once);
            let elapsed = (now - start).as_secs_f64() - 1.0;
            prop_assert!(made as f64 <= allowed * (elapsed + 0.021) + at_once as f64 + 1.0, "{made} of {allowed}/s");
        }
    }
}
