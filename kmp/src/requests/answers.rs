//! Answers a server keeps for requests that come again.

use std::collections::VecDeque;

use bytes::Bytes;

/// Whether a request is new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Carry it out and call [`Answers::finish`].
    New,
    /// It is being carried out: its answer will do for both.
    Running,
    /// It was carried out: send this frame again.
    Answered(Bytes),
    /// It was carried out so long ago that its answer is gone, or it was never answered and others came
    /// since: refuse it with ERROR `conflict`.
    Forgotten,
}

/// The latest answers of one connection.
#[derive(Debug)]
pub struct Answers {
    /// Requests in order of arrival; an answer when there is one.
    pub(super) kept: VecDeque<(u32, Option<Bytes>)>,
    pub(super) bytes: usize,
    max_entries: usize,
    max_bytes: usize,
    newest: u32,
}

impl Answers {
    /// Keep at most this many requests, and at most this many bytes of answers.
    pub fn new(max_entries: usize, max_bytes: usize) -> Answers {
        Answers { kept: VecDeque::new(), bytes: 0, max_entries: max_entries.max(1), max_bytes, newest: 0 }
    }

    /// A request arrived.
    pub fn begin(&mut self, sequence: u32) -> Seen {
        if let Some((_, answer)) = self.kept.iter().find(|(s, _)| *s == sequence) {
            return answer.clone().map_or(Seen::Running, Seen::Answered);
        }
        // Half the number space lies ahead of the newest sequence, half behind it.
        let ahead = sequence.wrapping_sub(self.newest);
        if self.newest != 0 && (ahead == 0 || ahead > u32::MAX / 2) {
            return Seen::Forgotten;
        }
        self.newest = sequence;
        self.kept.push_back((sequence, None));
        self.trim();
        Seen::New
    }

    /// A request was answered with this frame.
    pub fn finish(&mut self, sequence: u32, frame: Bytes) {
        if let Some((_, answer)) = self.kept.iter_mut().find(|(s, _)| *s == sequence) {
            self.bytes += frame.len();
            if let Some(old) = answer.replace(frame) {
                self.bytes -= old.len();
            }
            self.trim();
        }
    }

    fn trim(&mut self) {
        while self.kept.len() > self.max_entries || (self.bytes > self.max_bytes && !self.kept.is_empty()) {
            if let Some((_, Some(old))) = self.kept.pop_front() {
                self.bytes -= old.len();
            }
        }
    }
}
