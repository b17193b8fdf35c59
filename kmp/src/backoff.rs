//! Exponential backoff with jitter that a seed makes repeatable.

use std::time::Duration;

/// A small generator of jitter (SplitMix64, Steele et al. 2014). Not for secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jitter(u64);

impl Jitter {
    /// The same seed gives the same sequence.
    pub fn new(seed: u64) -> Jitter {
        Jitter(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A fraction in `0.0..1.0`.
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How waits grow: `base * factor^n`, at most `max`, each shortened by up to the share `jitter`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// The first wait.
    pub base: Duration,
    /// Growth from one wait to the next, at least 1.
    pub factor: f64,
    /// No wait is longer.
    pub max: Duration,
    /// Share of a wait that jitter may take away, 0 to 1.
    pub jitter: f64,
}

impl Backoff {
    /// The longest wait number `n` (from 0) can be: the one without jitter.
    pub fn ceiling(&self, n: u32) -> Duration {
        let grown = self.base.as_secs_f64() * self.factor.max(1.0).powi(n.min(1024) as i32);
        if grown.is_finite() && grown < self.max.as_secs_f64() {
            Duration::from_secs_f64(grown)
        } else {
            self.max
        }
    }

    /// Wait number `n` (from 0).
    pub fn wait(&self, n: u32, jitter: &mut Jitter) -> Duration {
        let less = self.jitter.clamp(0.0, 1.0) * jitter.fraction();
        self.ceiling(n).mul_f64(1.0 - less)
    }

    /// The longest that `n` waits in a row can take.
    pub fn total(&self, n: u32) -> Duration {
        (0..n).fold(Duration::ZERO, |sum, k| sum.saturating_add(self.ceiling(k)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_up_to_the_limit() {
        let b = Backoff {
            base: Duration::from_millis(100),
            factor: 2.0,
            max: Duration::from_millis(500),
            jitter: 0.0,
        };
        let mut j = Jitter::new(1);
        let ms: Vec<u128> = (0..5).map(|n| b.wait(n, &mut j).as_millis()).collect();
        assert_eq!(ms, [100, 200, 400, 500, 500]);
        assert_eq!(b.total(3), Duration::from_millis(700));
    }

    #[test]
    fn known_values_of_splitmix64() {
        // First outputs for seed 0, as published with the reference implementation.
        let mut j = Jitter::new(0);
        assert_eq!(j.next_u64(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(j.next_u64(), 0x6E78_9E6A_A1B9_65F4);
    }

    proptest! {
        #[test]
        fn jitter_only_shortens_and_is_repeatable(seed: u64, n in 0u32..4000, share in 0.0f64..=1.0) {
            let b = Backoff { base: Duration::from_millis(3), factor: 1.7, max: Duration::from_secs(9), jitter: share };
            let (mut x, mut y) = (Jitter::new(seed), Jitter::new(seed));
            let w = b.wait(n, &mut x);
            prop_assert_eq!(w, b.wait(n, &mut y));
            prop_assert!(w <= b.ceiling(n) && b.ceiling(n) <= b.max);
            prop_assert!(w.as_secs_f64() >= b.ceiling(n).as_secs_f64() * (1.0 - share) - 1e-9);
        }
    }
}
