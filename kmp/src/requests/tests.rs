use bytes::Bytes;
use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn exact() -> RetryPolicy {
    let mut p = RetryPolicy::default();
    p.backoff.jitter = 0.0;
    p
}

#[test]
fn repeats_back_off_until_the_deadline() {
    let mut r = Requests::new(exact(), 1);
    let s = r.begin(Duration::ZERO, 1000 * MS, "a");
    let mut resent = Vec::new();
    let mut expired = None;
    while let Some(at) = r.next_due() {
        for due in r.poll(at) {
            match due {
                Due::Resend(n) => {
                    assert_eq!(n, s);
                    resent.push(at.as_millis());
                }
                Due::Expired { context, retries, .. } => expired = Some((at.as_millis(), context, retries)),
            }
        }
    }
    assert_eq!(resent, [100, 300, 700]);
    assert_eq!(expired, Some((1000, "a", 3)));
}

#[test]
fn answers_match_once_and_late_ones_are_counted() {
    let mut r = Requests::new(exact(), 1);
    let a = r.begin(5 * MS, 100 * MS, 'a');
    let b = r.begin(5 * MS, 100 * MS, 'b');
    assert_eq!(r.answer(b, 9 * MS), Answer::Matched { context: 'b', elapsed: 4 * MS, retries: 0 });
    assert_eq!(r.answer(b, 9 * MS), Answer::Late);
    assert_eq!(r.poll(105 * MS).len(), 1);
    assert_eq!(r.answer(a, 106 * MS), Answer::Late);
    assert_eq!((r.late(), r.len()), (2, 0));
}

#[test]
fn a_request_sent_once_only_expires() {
    let mut r = Requests::new(exact(), 1);
    let sequence = r.begin_once(Duration::ZERO, 1000 * MS, ());
    assert_eq!(r.next_due(), Some(1000 * MS));
    assert_eq!(r.poll(1000 * MS), [Due::Expired { sequence, context: (), retries: 0 }]);
}

#[test]
fn retry_messages_postpone() {
    let mut r = Requests::new(exact(), 1);
    let s = r.begin(Duration::ZERO, 1000 * MS, ());
    assert!(r.postpone(s, 10 * MS, 500 * MS));
    assert_eq!(r.next_due(), Some(510 * MS));
    assert_eq!(r.poll(510 * MS), [Due::Resend(s)]);
    assert!(r.postpone(s, 520 * MS, 600 * MS), "later than the deadline: not repeated any more");
    assert_eq!(r.next_due(), Some(1000 * MS));
    assert!(!r.postpone(77, MS, MS));
}

#[test]
fn sequences_skip_zero_and_outstanding_ones() {
    let mut r = Requests::new(exact(), 1);
    r.next = u32::MAX;
    let seqs: Vec<u32> = (0..3).map(|_| r.begin(Duration::ZERO, MS, ())).collect();
    assert_eq!(seqs, [u32::MAX, 1, 2]);
    r.next = u32::MAX;
    assert_eq!(r.begin(Duration::ZERO, MS, ()), 3);
    assert_eq!(r.drain().len(), 4);
}

#[test]
fn a_server_carries_a_request_out_once() {
    let mut a = Answers::new(2, 100);
    assert_eq!(a.begin(1), Seen::New);
    assert_eq!(a.begin(1), Seen::Running);
    a.finish(1, Bytes::from_static(b"one"));
    assert_eq!(a.begin(1), Seen::Answered(Bytes::from_static(b"one")));
    assert_eq!((a.begin(2), a.begin(3)), (Seen::New, Seen::New));
    assert_eq!(a.begin(1), Seen::Forgotten, "only two are kept, and it must not run again");
    a.finish(3, Bytes::from(vec![0; 101]));
    assert_eq!(a.begin(3), Seen::Forgotten, "too long to keep");
    assert_eq!(a.begin(4), Seen::New);
}

proptest! {
    /// Requests lose nothing: each is answered or expires, once, no later than its deadline.
    #[test]
    fn each_request_ends_once(ops in prop::collection::vec((0u8..4, 0u32..12, 0u64..400), 0..80), seed: u64) {
        let mut r = Requests::new(RetryPolicy::default(), seed);
        let mut now = Duration::ZERO;
        let (mut begun, mut ended) = (0, 0);
        for (op, seq, ms) in ops {
            match op {
                0 => { r.begin(now, Duration::from_millis(ms), ()); begun += 1; }
                1 => if let Answer::Matched { retries, .. } = r.answer(seq, now) { ended += 1; prop_assert!(retries <= 5); },
                2 => { r.postpone(seq, now, Duration::from_millis(ms)); }
                _ => {
                    now += Duration::from_millis(ms);
                    ended += r.poll(now).iter().filter(|d| matches!(d, Due::Expired { .. })).count();
                    prop_assert!(r.next_due().is_none_or(|at| at > now));
                }
            }
            prop_assert_eq!(begun, ended + r.len());
        }
    }

    /// Whatever is asked in whatever order, no sequence is new twice.
    #[test]
    fn nothing_runs_twice(seqs in prop::collection::vec(1u32..40, 0..100), keep in 1usize..8) {
        let mut a = Answers::new(keep, 50);
        let mut run = std::collections::HashSet::new();
        for s in seqs {
            if a.begin(s) == Seen::New {
                prop_assert!(run.insert(s));
                a.finish(s, Bytes::from(vec![0; s as usize]));
            }
            prop_assert!(a.kept.len() <= keep && a.bytes <= 50);
        }
    }
}
