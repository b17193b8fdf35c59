//! Requests and their answers.
//!
//! The client side ([`Requests`]) numbers requests, repeats those that get no answer, and gives up at
//! their deadline. The server side ([`Answers`]) keeps the latest answers, so that a repeated request is
//! answered again and not carried out again. Sequences belong to one connection: on a new connection both
//! sides start anew, and what must survive a reconnect carries a number of its own (incident, morph).

mod answers;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::backoff::{Backoff, Jitter};

pub use answers::{Answers, Seen};

/// When requests are repeated and given up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Waits before the first, second, ... repetition.
    pub backoff: Backoff,
    /// Repetitions at most.
    pub max_retries: u32,
}

impl Default for RetryPolicy {
    /// Repeat after 100 ms, 200 ms, ... up to 2 s, five times at most, each wait up to a fifth shorter.
    fn default() -> Self {
        RetryPolicy {
            backoff: Backoff {
                base: Duration::from_millis(100),
                factor: 2.0,
                max: Duration::from_secs(2),
                jitter: 0.2,
            },
            max_retries: 5,
        }
    }
}

#[derive(Debug)]
struct Pending<T> {
    context: T,
    sent: Duration,
    deadline: Duration,
    /// When it is repeated; `None` when it is not any more.
    retry_at: Option<Duration>,
    retries: u32,
}

/// What an answer belongs to.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<T> {
    /// A request that waited for it.
    Matched {
        /// What the owner attached to the request.
        context: T,
        /// Time since the request was first sent.
        elapsed: Duration,
        /// How often it was repeated.
        retries: u32,
    },
    /// No request waits for it: it came late, or twice, or was never asked for. Counted in
    /// [`Requests::late`].
    Late,
}

/// What a request needs now.
#[derive(Debug, PartialEq, Eq)]
pub enum Due<T> {
    /// Send it again, with the same sequence.
    Resend(u32),
    /// Its deadline passed. It is forgotten.
    Expired {
        /// Sequence.
        sequence: u32,
        /// What the owner attached to it.
        context: T,
        /// How often it was repeated.
        retries: u32,
    },
}

/// Outstanding requests of one connection. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Requests<T> {
    policy: RetryPolicy,
    jitter: Jitter,
    next: u32,
    pending: BTreeMap<u32, Pending<T>>,
    late: u64,
}

impl<T> Requests<T> {
    /// No requests yet. The seed decides the jitter.
    pub fn new(policy: RetryPolicy, seed: u64) -> Requests<T> {
        Requests { policy, jitter: Jitter::new(seed), next: 1, pending: BTreeMap::new(), late: 0 }
    }

    /// A new request that is given up `timeout` from now. Returns its sequence, never 0 and never one that
    /// is outstanding.
    pub fn begin(&mut self, now: Duration, timeout: Duration, context: T) -> u32 {
        let sequence = self.begin_once(now, timeout, context);
        if let Some(p) = self.pending.get_mut(&sequence) {
            p.retry_at = retry_time(&self.policy, &mut self.jitter, p, now);
        }
        sequence
    }

    /// Like [`Requests::begin`], for a request that is never repeated, such as a heartbeat.
    pub fn begin_once(&mut self, now: Duration, timeout: Duration, context: T) -> u32 {
        while self.next == 0 || self.pending.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let sequence = self.next;
        self.next = self.next.wrapping_add(1);
        let deadline = now.saturating_add(timeout);
        self.pending.insert(sequence, Pending { context, sent: now, deadline, retry_at: None, retries: 0 });
        sequence
    }

    /// An answer came.
    pub fn answer(&mut self, sequence: u32, now: Duration) -> Answer<T> {
        match self.pending.remove(&sequence) {
            Some(p) => Answer::Matched {
                context: p.context,
                elapsed: now.saturating_sub(p.sent),
                retries: p.retries,
            },
            None => {
                self.late += 1;
                Answer::Late
            }
        }
    }

    /// RETRY came: the request is sent again `after` from now, unless its deadline is earlier. Returns
    /// whether there was such a request.
    pub fn postpone(&mut self, sequence: u32, now: Duration, after: Duration) -> bool {
        match self.pending.get_mut(&sequence) {
            Some(p) => {
                p.retry_at = Some(now.saturating_add(after)).filter(|at| *at < p.deadline);
                true
            }
            None => {
                self.late += 1;
                false
            }
        }
    }

    /// Everything that is due, in order of sequence.
    pub fn poll(&mut self, now: Duration) -> Vec<Due<T>> {
        let mut due = Vec::new();
        let expired: Vec<u32> =
            self.pending.iter().filter(|(_, p)| p.deadline <= now).map(|(s, _)| *s).collect();
        for sequence in expired {
            if let Some(p) = self.pending.remove(&sequence) {
                due.push(Due::Expired { sequence, context: p.context, retries: p.retries });
            }
        }
        for (sequence, p) in &mut self.pending {
            if p.retry_at.is_some_and(|at| at <= now) {
                p.retries += 1;
                p.retry_at = retry_time(&self.policy, &mut self.jitter, p, now);
                due.push(Due::Resend(*sequence));
            }
        }
        due
    }

    /// When [`Requests::poll`] has something to do next.
    pub fn next_due(&self) -> Option<Duration> {
        self.pending.values().map(|p| p.retry_at.map_or(p.deadline, |r| r.min(p.deadline))).min()
    }

    /// What is attached to an outstanding request.
    pub fn get(&self, sequence: u32) -> Option<&T> {
        self.pending.get(&sequence).map(|p| &p.context)
    }

    /// The connection is gone: everything outstanding, in order of sequence.
    pub fn drain(&mut self) -> Vec<(u32, T)> {
        std::mem::take(&mut self.pending).into_iter().map(|(s, p)| (s, p.context)).collect()
    }

    /// Number of outstanding requests.
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether none is outstanding.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Answers nobody waited for.
    pub fn late(&self) -> u64 {
        self.late
    }
}

fn retry_time<T>(
    policy: &RetryPolicy,
    jitter: &mut Jitter,
    p: &Pending<T>,
    now: Duration,
) -> Option<Duration> {
    (p.retries < policy.max_retries)
        .then(|| now.saturating_add(policy.backoff.wait(p.retries, jitter)))
        .filter(|at| *at < p.deadline)
}
