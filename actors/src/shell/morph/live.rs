//! How far a round of copying is, for whoever looks on: the work itself is busy until it has ended.

use std::sync::{Arc, Mutex, PoisonError};

use kmorph_control::views::TransferView;
use tokio::time::Instant;

/// The round under way: since when, and bytes so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Live(Arc<Mutex<Option<(Instant, u64)>>>);

impl Live {
    fn set(&self, round: Option<(Instant, u64)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = round;
    }

    /// A round begins, and ends with what this returns.
    pub(super) fn begin(&self) -> Round {
        let began = Instant::now();
        self.set(Some((began, 0)));
        Round { live: self.clone(), began }
    }

    /// What is known, with the round under way when there is one.
    pub(super) fn show(&self, transfer: Option<TransferView>) -> Option<TransferView> {
        let round = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((began, bytes)) = round else { return transfer };
        let took = began.elapsed().as_secs_f64();
        let rate = if took > 0.0 { bytes as f64 / took / 1_048_576.0 } else { 0.0 };
        Some(TransferView { round_bytes: bytes, round_mib_per_s: rate, ..transfer.unwrap_or_default() })
    }
}

/// A round under way.
pub(super) struct Round {
    live: Live,
    began: Instant,
}

impl Round {
    /// So many bytes of it are copied.
    pub(super) fn copied(&self, bytes: u64) {
        self.live.set(Some((self.began, bytes)));
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        self.live.set(None);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_round_is_seen_while_it_lasts() {
        let live = Live::default();
        assert_eq!(live.show(None), None);
        let round = live.begin();
        tokio::time::advance(Duration::from_secs(2)).await;
        round.copied(4 << 20);
        let seen = live.show(Some(TransferView { rounds: 3, ..Default::default() })).unwrap();
        assert_eq!((seen.rounds, seen.round_bytes, seen.round_mib_per_s), (3, 4 << 20, 2.0));
        drop(round);
        assert_eq!(live.show(None), None);
    }
}
