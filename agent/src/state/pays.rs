//! Whether compressing pieces gets them to the other kernel faster. That depends on what is in them, on the machine, and on
//! whoever takes them: it is tried, a few pieces each way, and again now and then.

use std::time::Duration;

/// Pieces that are sent one way before it is judged.
const TRIAL: u32 = 8;
/// Pieces until it is tried again.
const KEPT: u32 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// As they are, to see how fast that is.
    TryPlain,
    TryPacked,
    Plain,
    Packed,
    /// Whatever it takes.
    #[cfg(test)]
    Always,
}

/// What was seen.
#[derive(Clone, Debug)]
pub struct Pays {
    way: Way,
    /// Pieces until the next thought.
    left: u32,
    bytes: u64,
    took: Duration,
    /// Bytes a second as they are.
    plain: f64,
}

impl Default for Pays {
    fn default() -> Self {
        Pays { way: Way::TryPlain, left: TRIAL, bytes: 0, took: Duration::ZERO, plain: 0.0 }
    }
}

impl Pays {
    #[cfg(test)]
    pub(super) fn always() -> Pays {
        Pays { way: Way::Always, ..Pays::default() }
    }

    /// Whether the next piece is to be compressed, if that makes it smaller.
    pub fn tries(&self) -> bool {
        !matches!(self.way, Way::TryPlain | Way::Plain)
    }

    fn go(&mut self, way: Way, left: u32) {
        (self.way, self.left, self.bytes, self.took) = (way, left, 0, Duration::ZERO);
    }

    /// A piece of so many bytes was sent, and that took so long with everything. `packed`: it had become smaller.
    pub fn sent(&mut self, bytes: u32, packed: bool, took: Duration) {
        self.bytes += u64::from(bytes);
        self.took += took;
        // One that does not become smaller is as good as many.
        if self.tries() && !packed && self.way != Way::Packed {
            #[cfg(test)]
            if self.way == Way::Always {
                return;
            }
            return self.go(Way::Plain, KEPT);
        }
        self.left = self.left.saturating_sub(1);
        if self.left > 0 {
            return;
        }
        let rate = self.bytes as f64 / self.took.as_secs_f64().max(1e-9);
        match self.way {
            Way::TryPlain => {
                self.plain = rate;
                self.go(Way::TryPacked, TRIAL);
            }
            Way::TryPacked if rate > self.plain => self.go(Way::Packed, KEPT),
            Way::TryPacked => self.go(Way::Plain, KEPT),
            Way::Plain | Way::Packed => self.go(Way::TryPlain, TRIAL),
            #[cfg(test)]
            Way::Always => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many pieces of 100 KB are compressed, when they take so long each way (microseconds).
    fn compressed(pieces: u32, plain: u64, packed: Option<u64>) -> u32 {
        let mut pays = Pays::default();
        let mut count = 0;
        for _ in 0..pieces {
            let (tries, smaller) = (pays.tries(), packed.is_some());
            let took = if tries { packed.unwrap_or(plain + 100) } else { plain };
            count += u32::from(tries && smaller);
            pays.sent(100_000, tries && smaller, Duration::from_micros(took));
        }
        count
    }

    #[test]
    fn it_is_done_when_it_is_faster_and_only_then() {
        assert_eq!(compressed(10_000, 1000, None), 0, "what does not become smaller is sent as it is");
        let (slower, faster) = (compressed(10_000, 100, Some(200)), compressed(10_000, 1000, Some(300)));
        assert!(slower < 700, "{slower}: a try now and then");
        assert!(faster > 9000, "{faster}");
    }
}
