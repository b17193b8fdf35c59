//! A service with open files: every line of a client is written to a journal and answered with its number. What it has
//! open is of every kind there is, and every answer says that all of them still are what they were, whichever kernel
//! gives it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::files::{Content, Files};
use crate::hook;
use crate::memory::{Memory, PAGE};
use crate::service::{App, Service};

/// Most bytes of all files together.
const LIMIT: u64 = 64 << 20;
/// Longest line.
const REQUEST: usize = 1000;

/// The service.
pub struct Journal {
    path: PathBuf,
    content: Content,
    files: Files,
}

impl Journal {
    /// A journal at this path, which is made anew when the service begins without one.
    pub fn new(path: &Path, content: Content) -> Journal {
        Journal { path: path.to_owned(), content, files: Files::new(LIMIT) }
    }

    fn file(&self, name: &str) -> io::Result<&File> {
        self.files.get(name).ok_or_else(|| io::Error::other(format!("file {name} is not open")))
    }

    /// The journal, open for appending and once more for reading; a file without a name, written from its position on;
    /// memory whose size is sealed.
    fn create(&mut self) -> io::Result<()> {
        let _ = std::fs::remove_file(&self.path);
        let journal = OpenOptions::new().append(true).create_new(true).open(&self.path)?;
        let reader = File::open(&self.path)?;
        let scratch = self.path.with_extension("scratch");
        let unnamed = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&scratch)?;
        std::fs::remove_file(&scratch)?;
        let memory = memfd_create("journal", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let memory = File::from(memory);
        memory.set_len(PAGE as u64)?;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK))?;
        for (name, file, content) in [
            ("journal", journal, self.content),
            ("reader", reader, self.content),
            ("unnamed", unnamed, Content::AsNeeded),
            ("memory", memory, Content::AsNeeded),
        ] {
            self.files.insert(name, file, content).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Write line number `number`, and see that it is read where the one before it ended, and so on.
    fn write(&self, number: u64, line: &[u8]) -> io::Result<()> {
        let wrong = |what: &str| Err(io::Error::other(format!("line {number}: {what}")));
        let text = [format!("{number} ").as_bytes(), line].concat();
        self.file("journal")?.write_all(&text)?;
        let mut read = vec![0; text.len()];
        self.file("reader")?.read_exact(&mut read)?;
        if read != text {
            return wrong("the journal is read from another place");
        }
        let mut unnamed = self.file("unnamed")?;
        if unnamed.stream_position()? != (number - 1) * 8 {
            return wrong("the file without a name is at another position");
        }
        unnamed.write_all(&number.to_le_bytes())?;
        let (memory, mut last) = (self.file("memory")?, [0; 8]);
        memory.read_exact_at(&mut last, 0)?;
        memory.write_all_at(&number.to_le_bytes(), 0)?;
        if u64::from_le_bytes(last) + 1 != number {
            return wrong("the memory has another number");
        }
        match memory.set_len(1) {
            Err(_) => Ok(()),
            Ok(()) => wrong("the memory has lost its seals"),
        }
    }

    /// Every line there is, in order.
    fn check(&self, lines: u64) -> io::Result<()> {
        let mut journal = File::open(&self.path)?;
        journal.seek(SeekFrom::Start(0))?;
        let mut all = String::new();
        journal.read_to_string(&mut all)?;
        let numbers = all.lines().map(|l| l.split(' ').next().and_then(|n| n.parse::<u64>().ok()));
        match numbers.eq((1..=lines).map(Some)) {
            true => Ok(()),
            false => Err(io::Error::other(format!("the journal does not have the lines 1 to {lines}"))),
        }
    }
}

impl App for Journal {
    fn layout(&self) -> (&'static str, u32) {
        ("kmorph,journal", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        let Some(end) = input.iter().position(|b| *b == b'\n') else {
            return if input.len() < REQUEST { Ok(0) } else { Err("a line has no end".into()) };
        };
        let count = memory.change(0, 8).ok_or("no memory")?;
        let number = u64::from_le_bytes(*count.first_chunk().ok_or("no memory")?) + 1;
        let line = input.get(..=end).unwrap_or_default();
        self.write(number, line).map_err(|e| e.to_string())?;
        count.copy_from_slice(&number.to_le_bytes());
        answers.extend_from_slice(format!("{number}\n").as_bytes());
        Ok(end + 1)
    }

    fn files(&mut self) -> Option<&mut Files> {
        Some(&mut self.files)
    }

    fn begin(&mut self, memory: &mut Memory) -> Result<(), String> {
        let lines = memory.bytes().first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let done = match self.files.get("journal") {
            Some(_) => self.check(lines),
            None => self.create(),
        };
        done.map_err(|e| format!("{}: {e}", self.path.display()))
    }
}

/// A journal that is connected to the agent. Its connections are served by [`Service::serve`]; `log` is told of what
/// goes wrong with the agent.
pub fn start(path: &Path, content: Content, log: fn(&hook::HookError)) -> Arc<Service<Journal>> {
    let service = Arc::new(Service::new("counter", Journal::new(path, content), PAGE));
    let hooked = service.clone();
    std::thread::spawn(move || hook::run(&*hooked, &hook::address(), &mut |error| log(error)));
    service
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_numbers_lines_and_sees_when_a_file_is_not_what_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (mut memory, mut answers) = (Memory::new(PAGE), vec![]);
        let mut journal = Journal::new(&dir.path().join("j"), Content::Along);
        journal.begin(&mut memory).unwrap();
        for (request, taken) in [(&b"a\nb"[..], 2), (b"b\n", 2), (b"c", 0)] {
            assert_eq!(journal.take(&mut memory, request, &mut answers), Ok(taken));
        }
        assert_eq!((&answers[..], std::fs::read_dir(dir.path()).unwrap().count()), (&b"1\n2\n"[..], 1));
        journal.begin(&mut memory).unwrap();
        let mut reader = journal.file("reader").unwrap();
        reader.seek(SeekFrom::Start(0)).unwrap();
        let error = journal.take(&mut memory, b"c\n", &mut answers).unwrap_err();
        assert_eq!(error, "line 3: the journal is read from another place");
        std::fs::write(dir.path().join("j"), "1 a\n3 b\n").unwrap();
        assert!(journal.begin(&mut memory).unwrap_err().contains("does not have the lines 1 to 2"));
    }
}
