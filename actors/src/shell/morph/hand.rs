//! What one piece of a morph's work leaves to the next.

use std::time::Duration;

use kmorph_control::views::{BlackoutView, TransferView};
use tokio::time::Instant;

use super::lines::{Last, Lines};
use super::live::Live;
use crate::store::InstanceRecord;

/// Both records, from before it was decided.
#[derive(Clone, Debug)]
pub(super) struct Parted {
    pub(super) old: InstanceRecord,
    pub(super) new: InstanceRecord,
}

/// Everything that is kept from one piece of work to the next. Nothing of it outlives the daemon.
#[derive(Default)]
pub(super) struct Hand {
    /// Both kernels agreed on what is handed over, if anything is.
    pub(super) negotiated: bool,
    /// Connections to both agents. Absent while they are used: what is interrupted leaves none that is half-way
    /// through a conversation.
    pub(super) lines: Option<Lines>,
    pub(super) parted: Option<Parted>,
    /// The new kernel has taken over by itself: there is no way back.
    pub(super) taken: bool,
    /// The new kernel's actor does not stand aside for the record since then.
    pub(super) new_refuses: Option<Instant>,
    /// It has, and does not serve; why.
    pub(super) stuck: Option<String>,
    /// The workload stands still since then, and what came after that.
    still: Option<(Instant, BlackoutView)>,
    marked: Duration,
    /// The workload serves again.
    over: bool,
    /// What was copied, for reports.
    pub(super) transfer: Option<TransferView>,
    /// The round under way.
    pub(super) live: Live,
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Hand {
    /// Nothing yet; rounds of copying are seen in `live`.
    pub(super) fn new(live: Live) -> Hand {
        Hand { live, ..Hand::default() }
    }

    /// What is handed over has to be agreed on: that it is nothing is not the same as not knowing.
    pub(super) fn agreed(&self) -> Result<(), String> {
        match self.negotiated {
            true => Ok(()),
            false => Err("what is handed over was not agreed on".into()),
        }
    }

    /// Whether there is state that has to be handed over.
    pub(super) fn has_state(&self) -> bool {
        self.transfer.is_some()
    }

    /// The workload is being told to stand still.
    pub(super) fn begin_blackout(&mut self) {
        let began_unix_us = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, us);
        self.still = Some((Instant::now(), BlackoutView { began_unix_us, ..BlackoutView::default() }));
        (self.marked, self.over) = (Duration::ZERO, false);
    }

    /// It stands still, and the new kernel has all of its state.
    pub(super) fn last(&mut self, last: &Last) {
        if let Some((since, b)) = &mut self.still {
            (b.freeze_us, b.copy_us, b.check_us) = (us(last.froze), us(last.copied), us(last.checked));
            b.bytes = last.bytes;
            self.marked = since.elapsed();
        }
    }

    /// The new kernel took over by itself, so long after the workload was told to stand still.
    pub(super) fn took_over(&mut self, after: Duration, last: &Last) {
        if let Some((_, b)) = &mut self.still {
            let copied = last.copied.min(after.saturating_sub(last.froze));
            (b.freeze_us, b.copy_us, b.bytes) = (us(last.froze), us(copied), last.bytes);
            b.activate_us = us(after.saturating_sub(last.froze + copied));
            b.total_us = us(after);
        }
        (self.taken, self.over) = (true, true);
    }

    /// How long the workload stands still so far.
    pub(super) fn still_for(&self) -> Duration {
        self.still.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    /// Time since the mark before this one, as long as the workload stands still.
    pub(super) fn mark(&mut self, set: impl FnOnce(&mut BlackoutView, u64)) {
        if let Some((since, blackout)) = self.still.as_mut().filter(|_| !self.over) {
            let now = since.elapsed();
            set(blackout, us(now.saturating_sub(self.marked)));
            blackout.total_us = us(now);
            self.marked = now;
        }
    }

    /// The interruption so far.
    pub(super) fn blackout(&self) -> Option<BlackoutView> {
        self.still.as_ref().map(|(_, b)| b.clone())
    }
}
