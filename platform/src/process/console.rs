//! The log of a stand-in. A record's number is its place in the file: the stand-in frees the old part of the file
//! and places stay what they were.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kmp::stand_in::{names, parse_log_line};

use super::folder::open_plain;
use crate::{ConsoleLog, ConsoleRecord};

/// Bytes that are looked at, from the end.
const WINDOW: u64 = 64 << 10;
/// Longest text of a record.
const LONGEST: usize = 1000;

/// Read the log in an instance's folder. `ended`: no more can come, so an unfinished line is a record too.
pub fn read(dir: &Path, from_seq: u64, ended: bool) -> io::Result<ConsoleLog> {
    let file = open_plain(&dir.join(names::CONSOLE))?;
    let size = file.metadata()?.len();
    let start = size.saturating_sub(WINDOW);
    let mut bytes = vec![0; usize::try_from(size - start).unwrap_or(0)];
    let mut have = 0;
    while have < bytes.len() {
        match file.read_at(&mut bytes[have..], start + have as u64)? {
            0 => break, // it became shorter meanwhile
            n => have += n,
        }
    }
    bytes.truncate(have);
    Ok(parse(&bytes, start, from_seq, ended))
}

fn parse(bytes: &[u8], start: u64, from_seq: u64, ended: bool) -> ConsoleLog {
    let mut log = ConsoleLog { next_seq: from_seq, ..ConsoleLog::default() };
    let mut at = 0;
    // Without its beginning the first line cannot be told from a torn one.
    if start > 0 {
        at = bytes.iter().position(|b| *b == b'\n').map_or(bytes.len(), |n| n + 1);
        if from_seq < start {
            log.note = Some(format!("only the last {} KiB are kept", WINDOW >> 10));
        }
    }
    while at < bytes.len() {
        let len = match bytes[at..].iter().position(|b| *b == b'\n') {
            Some(len) => len,
            None if ended => bytes.len() - at,
            None => break, // still being written
        };
        // The freed part of the file reads as zeros.
        let skip = bytes[at..at + len].iter().take_while(|b| **b == 0).count();
        let seq = start + (at + skip) as u64;
        let line = String::from_utf8_lossy(&bytes[at + skip..at + len]);
        at += len + 1;
        if seq >= from_seq {
            log.next_seq = start + at as u64;
            if !line.trim().is_empty() {
                log.records.push(record(seq, &line));
            }
        }
    }
    log
}

fn record(seq: u64, line: &str) -> ConsoleRecord {
    // What the stand-in did not write as a record is its runtime's last words.
    let (level, ts_ns, text) = parse_log_line(line).unwrap_or((3, 0, line));
    let text = text.chars().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    ConsoleRecord { seq, ts_ns, level, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(log: &ConsoleLog) -> Vec<&str> {
        log.records.iter().map(|r| r.text.as_str()).collect()
    }

    #[test]
    fn records_are_read_on_from_where_one_stopped() {
        let bytes = b"6,5;one\n3,9;two\nthread panicked\n4,10;to";
        let log = parse(bytes, 0, 0, false);
        assert_eq!(texts(&log), ["one", "two", "thread panicked"]);
        assert_eq!((log.records[1].level, log.records[1].ts_ns, log.records[2].level), (3, 9, 3));
        let more = b"6,5;one\n3,9;two\nthread panicked\n4,10;torn\n";
        assert_eq!(texts(&parse(more, 0, log.next_seq, false)), ["torn"]);
        assert_eq!(texts(&parse(bytes, 0, log.next_seq, true)), ["to"]);
        assert_eq!(parse(bytes, 0, 1000, false).next_seq, 1000);
    }

    #[test]
    fn the_freed_part_and_a_cut_line_are_no_records() {
        let mut bytes = vec![0; 50];
        bytes.extend_from_slice(b"tail of a line\n6,1;whole\n");
        let log = parse(&bytes, 1000, 0, false);
        assert_eq!(texts(&log), ["whole"]);
        assert!(log.note.is_some());
        assert_eq!(log.records[0].seq, 1065);
    }

    #[test]
    fn a_long_file_is_read_at_its_end() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("console");
        assert!(read(d.path(), 0, false).is_err());
        std::fs::write(&path, "6,1;x\n".repeat(40_000)).unwrap();
        let log = read(d.path(), 0, false).unwrap();
        assert_eq!(log.next_seq, 240_000);
        assert_eq!(log.records.len(), (WINDOW / 6) as usize);
    }

    proptest! {
        #[test]
        fn any_bytes_are_readable(bytes in proptest::collection::vec(any::<u8>(), 0..600), start in 0u64..3, from in 0u64..700, ended: bool) {
            let log = parse(&bytes, start, from, ended);
            prop_assert!(log.records.iter().all(|r| r.seq >= from && r.seq < log.next_seq.max(from)));
            prop_assert!(log.records.windows(2).all(|w| w[0].seq < w[1].seq));
        }
    }
}
