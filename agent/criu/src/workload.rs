//! The program as a workload: one section, whose pieces are an archive after the other, one for each round.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kmorph_state::hook::{ExportError, Workload};
use kmorph_state::piece::{Piece, Sink};
use kmorph_state::wire::{PIECE_LIMIT, Section, State};
use nix::sys::signal::Signal;
use xxhash_rust::xxh3::Xxh3;

use crate::criu::Criu;
use crate::process;

const SECTION: &str = "processes";
/// In the archive of a round: its images, by number; the files the processes have open; their first one's id.
const FILES: &str = "files";
const PID: &str = "pid";

/// The program.
pub struct Program {
    name: String,
    criu: Criu,
    /// Images that leave, and that arrive.
    out: PathBuf,
    arriving: PathBuf,
    pid: i32,
    limit: u64,
    command: Vec<String>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    state: State,
    /// The first process: it runs, or stands still.
    pid: Option<i32>,
    /// Rounds that were written down; the last of them has everything when it is frozen.
    rounds: u32,
    /// Rounds that were sent.
    sent: u32,
    /// Of the bytes that were sent, or came.
    bytes: u64,
    digest: Option<Box<Xxh3>>,
    /// Files that were put in place for what was imported.
    placed: Vec<PathBuf>,
}

fn fails(what: &Path) -> impl Fn(io::Error) -> String {
    let what = what.display().to_string();
    move |e| format!("{what}: {e}")
}

/// A folder without what was in it.
fn empty(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fails(dir)(e)),
        _ => {}
    }
    fs::create_dir_all(dir).map_err(fails(dir))
}

/// Cuts what is written into pieces.
struct Pieces<'a> {
    piece: Vec<u8>,
    inner: &'a mut Inner,
    limit: u64,
    out: &'a mut dyn Sink,
}

impl Pieces<'_> {
    fn send(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        self.out.piece(self.inner.bytes, &self.piece)?;
        self.inner.count(&self.piece);
        self.piece.clear();
        if self.inner.bytes > self.limit {
            return Err(io::Error::other(format!("more than --limit, {} MiB", self.limit >> 20)));
        }
        Ok(())
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = (PIECE_LIMIT as usize).saturating_sub(self.piece.len());
        let now = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        self.piece.extend_from_slice(now);
        if self.piece.len() >= PIECE_LIMIT as usize {
            self.send()?;
        }
        Ok(now.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl Inner {
    fn count(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.digest.get_or_insert_default().update(bytes);
    }

    fn begin_to_copy(&mut self) {
        (self.sent, self.bytes, self.digest) = (0, 0, None);
    }

    fn running(&self) -> Result<i32, String> {
        match self.pid.filter(|pid| process::lives(*pid)) {
            Some(pid) => Ok(pid),
            None => Err("the program has ended".into()),
        }
    }

    fn insist(&self, states: &[State]) -> Result<(), String> {
        match states.contains(&self.state) {
            true => Ok(()),
            false => Err(format!("the program is {}", self.state.name())),
        }
    }
}

impl Program {
    /// A program that is started when an agent says that it is to serve, as process `pid`.
    pub fn new(name: &str, criu: Criu, dir: &Path, pid: i32, limit: u64, command: Vec<String>) -> Program {
        let (out, arriving) = (dir.join("out"), dir.join("in"));
        Program { name: name.into(), criu, out, arriving, pid, limit, command, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic elsewhere left it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spool(&self) -> PathBuf {
        self.arriving.join("spool")
    }

    /// Write a round down: while the program goes on its memory, and when it is frozen everything.
    fn round(&self, inner: &mut Inner, last: bool) -> Result<(), String> {
        let pid = inner.running()?;
        let (images, before) = (self.out.join(inner.rounds.to_string()), inner.rounds.checked_sub(1));
        // One that failed may have left something.
        empty(&images)?;
        match last {
            true => self.criu.dump(pid, &images, before)?,
            false => self.criu.pre_dump(pid, &images, before)?,
        }
        inner.rounds += 1;
        Ok(())
    }

    /// Send rounds that were not sent.
    fn send(&self, inner: &mut Inner, out: &mut dyn Sink) -> io::Result<()> {
        let (from, rounds, frozen) = (inner.sent, inner.rounds, inner.state == State::Frozen);
        if from == rounds {
            return Ok(());
        }
        let pid = inner.running().map_err(io::Error::other)?;
        let pieces =
            Pieces { piece: Vec::with_capacity(PIECE_LIMIT as usize), inner, limit: self.limit, out };
        let mut archive = tar::Builder::new(pieces);
        archive.follow_symlinks(false);
        for round in from..rounds {
            let images = round.to_string();
            archive.append_dir_all(&images, self.out.join(&images))?;
        }
        if frozen {
            for path in process::files(pid).map_err(io::Error::other)? {
                let name = Path::new(FILES).join(path.strip_prefix("/").unwrap_or(&path));
                archive.append_path_with_name(&path, name)?;
            }
            let text = format!("{pid} {}", rounds - 1);
            let mut head = tar::Header::new_gnu();
            head.set_size(text.len() as u64);
            head.set_mode(0o600);
            head.set_uid(0);
            head.set_gid(0);
            head.set_mtime(0);
            archive.append_data(&mut head, PID, text.as_bytes())?;
        }
        let mut pieces = archive.into_inner()?;
        pieces.flush()?;
        pieces.inner.sent = rounds;
        Ok(())
    }

    /// Put what came where it belongs, and bring the processes back when all of them came.
    fn take(&self, inner: &mut Inner) -> Result<(), String> {
        let spool = self.spool();
        let came = match fs::File::open(&spool) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(fails(&spool))?,
        };
        let mut archive = tar::Archive::new(io::BufReader::new(came));
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(true);
        archive.unpack(&self.arriving).map_err(fails(&self.arriving))?;
        fs::remove_file(&spool).map_err(fails(&spool))?;
        let marker = self.arriving.join(PID);
        let text = match fs::read_to_string(&marker) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            read => read.map_err(fails(&marker))?,
        };
        let (pid, images) = text.split_once(' ').ok_or_else(|| format!("what is {text:?}?"))?;
        let pid = pid.parse().map_err(|_| format!("what is {text:?}?"))?;
        place(&self.arriving.join(FILES), Path::new("/"), &mut inner.placed)?;
        self.criu.restore(&self.arriving.join(images))?;
        inner.pid = Some(pid);
        Ok(())
    }

    /// Nothing of what came is left.
    fn forget(&self, inner: &mut Inner) -> Result<(), String> {
        if let Some(pid) = inner.pid.take() {
            process::signal(pid, Signal::SIGKILL)?;
        }
        for path in inner.placed.drain(..) {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fails(&path)(e)),
                _ => {}
            }
        }
        inner.begin_to_copy();
        empty(&self.arriving)
    }
}

/// Copy files to the same place under `to`; those that were not there before are in `new`.
fn place(from: &Path, to: &Path, new: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = match fs::read_dir(from) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(fails(from))?,
    };
    for entry in entries {
        let entry = entry.map_err(fails(from))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata().map_err(fails(&from))?;
        if meta.is_dir() {
            if !to.is_dir() {
                fs::create_dir(&to).map_err(fails(&to))?;
            }
            place(&from, &to, new)?;
            continue;
        }
        let fresh = !to.exists();
        fs::copy(&from, &to).map_err(fails(&to))?;
        use std::os::unix::fs::{MetadataExt, chown};
        chown(&to, Some(meta.uid()), Some(meta.gid())).map_err(fails(&to))?;
        if fresh {
            new.push(to);
        }
    }
    Ok(())
}

impl Workload for Program {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn state(&self) -> State {
        self.lock().state
    }

    fn sections(&self) -> Vec<Section> {
        let (name, compatible) = (SECTION.into(), "kmorph,criu".into());
        vec![Section { name, compatible, version: 1, size: self.limit }]
    }

    fn activate(&self) -> Result<(), String> {
        let mut inner = self.lock();
        inner.insist(&[State::New, State::Active])?;
        if inner.state == State::Active {
            return Ok(());
        }
        match inner.pid {
            Some(pid) => process::signal(pid, Signal::SIGCONT)?,
            None => {
                process::start(&self.command, self.pid)?;
                inner.pid = Some(self.pid);
                // Its status is nobody's business, but somebody has to take it.
                let pid = self.pid;
                std::thread::spawn(move || process::reap(pid));
            }
        }
        inner.placed.clear();
        inner.state = State::Active;
        Ok(())
    }

    fn freeze(&self) -> Result<(), String> {
        let mut inner = self.lock();
        inner.insist(&[State::Active, State::Frozen])?;
        if inner.state == State::Active {
            self.round(&mut inner, true)?;
            inner.state = State::Frozen;
        }
        Ok(())
    }

    fn thaw(&self) -> Result<(), String> {
        let mut inner = self.lock();
        if inner.state == State::Frozen {
            if let Some(pid) = inner.pid {
                process::signal(pid, Signal::SIGCONT)?;
            }
            inner.state = State::Active;
        }
        if inner.state != State::Retired {
            // The memory they need is the program's, also when it was not to stand still yet.
            inner.rounds = 0;
            empty(&self.out)?;
        }
        Ok(())
    }

    fn retire(&self) -> Result<(), String> {
        let mut inner = self.lock();
        inner.state = State::Retired;
        if let Some(pid) = inner.pid.take() {
            process::signal(pid, Signal::SIGKILL)?;
        }
        empty(&self.out)
    }

    fn discard(&self) -> Result<(), String> {
        let mut inner = self.lock();
        inner.insist(&[State::New])?;
        self.forget(&mut inner)
    }

    fn export(&self, section: &str, full: bool, out: &mut dyn Sink) -> Result<(), ExportError> {
        let mut inner = self.lock();
        let refused = ExportError::Refused;
        if section != SECTION {
            return Err(refused(format!("there is no section {section}")));
        }
        inner.insist(&[State::Active, State::Frozen]).map_err(refused)?;
        if full {
            inner.begin_to_copy();
        }
        if inner.state == State::Active {
            if full {
                inner.rounds = 0;
                empty(&self.out).map_err(refused)?;
            }
            self.round(&mut inner, false).map_err(refused)?;
        }
        self.send(&mut inner, out).map_err(|e| match e.kind() {
            io::ErrorKind::Other => refused(e.to_string()),
            _ => ExportError::Io(e),
        })
    }

    fn digest(&self, section: &str) -> Result<Vec<u8>, String> {
        match section {
            SECTION => {
                let digest = self.lock().digest.as_ref().map_or(0, |d| d.digest128());
                Ok(digest.to_le_bytes().to_vec())
            }
            _ => Err(format!("there is no section {section}")),
        }
    }

    fn import(&self, _section: &str, offset: u64, piece: &Piece<'_>) -> Result<(), String> {
        let bytes = piece.bytes().map_err(|e| e.to_string())?;
        let mut inner = self.lock();
        inner.insist(&[State::New])?;
        if offset == 0 {
            self.forget(&mut inner)?;
        }
        if offset != inner.bytes || offset + bytes.len() as u64 > self.limit {
            return Err(format!(
                "{} bytes at {offset} do not follow the {} before",
                bytes.len(),
                inner.bytes
            ));
        }
        let spool = self.spool();
        let mut file = fs::File::options().append(true).create(true).open(&spool).map_err(fails(&spool))?;
        file.write_all(&bytes).map_err(fails(&spool))?;
        inner.count(&bytes);
        Ok(())
    }

    fn imported(&self, _section: &str) -> Result<(), String> {
        let mut inner = self.lock();
        inner.insist(&[State::New])?;
        self.take(&mut inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use kmorph_state::piece::each;

    use super::*;

    /// Stands for criu: it writes down what it was asked, and fails when it is told to.
    const SCRIPT: &str = r#"#!/bin/sh
what=$1 images=$3
if [ -e "$0.fails" ]; then
	printf '(0.1) Error (a.c:1): harmless\n(0.2) Error (b.c:2): no room\n(0.3) Error (c.c:3): FAILED\n' >"$images/$what.log"
	exit 1
fi
echo "$@" >"$images/asked-$what"
[ "$what" != restore ] || ls "$images"/.. >"$0.restored"
"#;

    fn program(dir: &Path, name: &str) -> Program {
        let criu = dir.join("criu");
        fs::write(&criu, SCRIPT).unwrap();
        fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
        Program::new(name, Criu { program: criu }, &dir.join(name), 10_000, 1 << 20, vec!["/bin/true".into()])
    }

    fn round(old: &Program, new: &Program, full: bool) {
        let mut take =
            each(|offset, piece| new.import(SECTION, offset, &Piece::from(piece)).map_err(io::Error::other));
        old.export(SECTION, full, &mut take).unwrap();
        new.imported(SECTION).unwrap();
        assert_eq!(old.digest(SECTION), new.digest(SECTION));
    }

    #[test]
    fn rounds_go_over_and_only_the_last_one_brings_the_processes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (program(dir.path(), "old"), program(dir.path(), "new"));
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        *old.lock() = Inner { state: State::Active, pid: Some(pid), ..Inner::default() };
        let restored = dir.path().join("criu.restored");
        round(&old, &new, true);
        round(&old, &new, false);
        assert!(!restored.exists());
        let asked = |n: &str| fs::read_to_string(old.out.join(n)).unwrap();
        assert!(
            asked("1/asked-pre-dump").contains(&format!("--tree {pid} --track-mem --prev-images-dir ../0"))
        );
        old.freeze().unwrap();
        assert_eq!(old.state(), State::Frozen);
        round(&old, &new, false);
        assert!(asked("2/asked-dump").contains("--leave-stopped") && asked("2/asked-dump").contains("../1"));
        let there = fs::read_to_string(&restored).unwrap();
        assert!(["0", "1", "2", "pid"].iter().all(|n| there.lines().any(|l| l == *n)), "{there}");
        // A morph that is undone: the new one ends what it has, which here is the same process.
        new.discard().unwrap();
        assert!(!child.wait().unwrap().success() && fs::read_dir(&new.arriving).unwrap().next().is_none());
        assert_eq!(
            old.export(SECTION, true, &mut each(|_, _| Ok(()))).unwrap_err().to_string(),
            "the program has ended"
        );
        let gap = new.import(SECTION, 5, &Piece::from(&b"x"[..])).unwrap_err();
        assert_eq!(gap, "1 bytes at 5 do not follow the 0 before");
    }

    #[test]
    fn nothing_is_kept_of_a_morph_that_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (program(dir.path(), "old"), program(dir.path(), "new"));
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        *old.lock() = Inner { state: State::Active, pid: Some(pid), ..Inner::default() };
        for frozen in [false, true] {
            round(&old, &new, true);
            if frozen {
                old.freeze().unwrap();
            }
            assert!(old.out.join("0").exists());
            old.thaw().unwrap();
            assert!(fs::read_dir(&old.out).unwrap().next().is_none(), "frozen: {frozen}");
            assert_eq!(old.state(), State::Active);
        }
        old.retire().unwrap();
        assert!(!child.wait().unwrap().success());
        old.thaw().unwrap();
        assert_eq!(old.state(), State::Retired);
    }

    #[test]
    fn what_criu_says_of_a_failure_is_passed_on_and_the_program_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let old = program(dir.path(), "old");
        fs::write(dir.path().join("criu.fails"), "").unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        *old.lock() = Inner { state: State::Active, pid: Some(pid), ..Inner::default() };
        let error = old.freeze().unwrap_err();
        assert!(error.starts_with("criu dump: ") && error.ends_with("(b.c:2): no room"), "{error}");
        assert!(old.state() == State::Active && process::lives(pid));
        old.retire().unwrap();
        assert!(!child.wait().unwrap().success() && old.state() == State::Retired);
    }
}
