//! The thread that owns the database. Writes that wait together are made in one transaction; when they cannot
//! be made, they are kept until they can.

use std::sync::Arc;

use kmorph_control::{ErrorKind, OpError, RecoveryStep};
use rusqlite::{Connection, Transaction, params};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

/// Writes in one transaction.
const BATCH: usize = 512;
/// Steps kept while nothing can be written; the oldest go first.
pub(super) const KEPT_STEPS: usize = 10_000;
/// Steps between two looks at how much history there is.
const TRIM_EVERY: u64 = 256;
/// Steps forgotten at a time.
pub(super) const TRIM_BATCH: usize = 500;

/// Something to remember.
#[derive(Clone, Debug)]
pub(super) enum Write {
    Step(Box<RecoveryStep>),
    Record(String, Vec<u8>),
    /// An instance is forgotten; its steps stay.
    Forget(String),
    /// Incidents are numbered up to this.
    Incident(u64),
}

type Work = Box<dyn FnOnce(&mut Connection) + Send>;

/// What the thread is asked.
pub(super) enum Ask {
    /// All of them in one transaction.
    Write(Vec<Write>, oneshot::Sender<Result<(), OpError>>),
    /// All of them in one transaction, now or never.
    Decide(Vec<Write>, oneshot::Sender<Result<(), OpError>>),
    Read(Work),
    /// Try again what could not be written; how many writes are left.
    Retry(oneshot::Sender<usize>),
}

/// How much history is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Steps.
    pub steps: u64,
    /// Days.
    pub days: Option<u32>,
}

pub(super) struct Writer {
    pub(super) db: Connection,
    pub(super) trouble: Arc<watch::Sender<Option<String>>>,
    pub(super) keep: watch::Receiver<Keep>,
    /// What is to be written, and how many of it are steps.
    pub(super) kept: Vec<Write>,
    pub(super) kept_steps: usize,
    pub(super) dropped: u64,
    /// Steps since history was last looked at.
    pub(super) steps: u64,
    /// There may be more history than is to be kept.
    pub(super) trimming: bool,
}

impl Writer {
    /// Serve until nobody can ask any more.
    pub(super) fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        while let Some(first) = asks.blocking_recv() {
            let mut waiting = Vec::new();
            let mut next = Some(first);
            while let Some(ask) = next {
                match ask {
                    Ask::Write(writes, reply) => {
                        writes.into_iter().for_each(|write| self.keep(write));
                        waiting.push(reply);
                        if waiting.len() == BATCH {
                            self.settle(&mut waiting);
                        }
                    }
                    // In order: what was written before is seen.
                    Ask::Read(work) => {
                        self.settle(&mut waiting);
                        work(&mut self.db);
                    }
                    Ask::Decide(writes, reply) => {
                        self.settle(&mut waiting);
                        let decided = self.decide(&writes);
                        // Who asked may have given up waiting: he looks it up.
                        let _ = reply.send(decided);
                        self.sync_again();
                    }
                    Ask::Retry(reply) => {
                        self.settle(&mut waiting);
                        self.retry();
                        // Who asked may have given up waiting.
                        let _ = reply.send(self.kept.len());
                    }
                }
                next = asks.try_recv().ok();
            }
            self.settle(&mut waiting);
            // A little at a time, and only while nobody waits: no step is slowed by it.
            while self.trimming && asks.is_empty() {
                self.trim();
            }
        }
        self.retry();
    }

    /// Add to what is to be written. Of an instance only the latest record counts.
    fn keep(&mut self, write: Write) {
        if let Write::Record(name, _) | Write::Forget(name) = &write {
            self.kept.retain(|w| !matches!(w, Write::Record(other, _) if other == name));
        }
        self.kept_steps += usize::from(matches!(write, Write::Step(_)));
        self.kept.push(write);
        if self.trouble.borrow().is_some()
            && self.kept_steps > KEPT_STEPS
            && let Some(oldest) = self.kept.iter().position(|w| matches!(w, Write::Step(_)))
        {
            self.kept.remove(oldest);
            self.kept_steps -= 1;
            self.dropped += 1;
        }
    }

    /// Write, unless it is known that this does not work now, and tell those who wait.
    fn settle(&mut self, waiting: &mut Vec<oneshot::Sender<Result<(), OpError>>>) {
        if waiting.is_empty() {
            return;
        }
        if self.trouble.borrow().is_none() {
            self.flush();
        }
        let trouble = self.trouble.borrow().clone();
        for reply in waiting.drain(..) {
            let result = match &trouble {
                None => Ok(()),
                Some(why) => {
                    Err(OpError::new(ErrorKind::Internal, format!("journal: kept in memory: {why}")))
                }
            };
            // Who asked may have given up waiting.
            let _ = reply.send(result);
        }
    }

    /// Write these, or never: they are not kept for later. Whoever decides keeps clients waiting, so this does not wait
    /// for the disk: the operating system has it, whatever becomes of this process, and when the machine loses its power
    /// the kernels that were decided about are gone with it.
    fn decide(&mut self, writes: &[Write]) -> Result<(), OpError> {
        let failed = |why: String| OpError::new(ErrorKind::Internal, format!("journal: not written: {why}"));
        if let Some(why) = &*self.trouble.borrow() {
            return Err(failed(why.clone()));
        }
        let written = self.db.pragma_update(None, "synchronous", "NORMAL").and_then(|()| {
            let tx = self.db.transaction()?;
            writes.iter().try_for_each(|write| apply(&tx, write))?;
            tx.commit()
        });
        written.map_err(|e| failed(e.to_string()))
    }

    /// What is written from now on is on the disk when its writers are answered.
    fn sync_again(&mut self) {
        if let Err(error) = self.db.pragma_update(None, "synchronous", "FULL") {
            error!(%error, "steps may reach the disk late");
        }
    }

    fn retry(&mut self) {
        if self.trouble.borrow().is_some() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        match self.commit() {
            Ok(()) => {
                let n = self.kept.len();
                self.steps += self.kept_steps as u64;
                self.kept.clear();
                self.kept_steps = 0;
                if self.trouble.borrow().is_some() {
                    info!(writes = n, "the journal can be written again");
                    if self.dropped > 0 {
                        warn!(steps = self.dropped, "steps were lost while the journal could not be written");
                    }
                    (self.dropped, self.steps) = (0, TRIM_EVERY);
                    self.trouble.send_replace(None);
                }
            }
            Err(e) => {
                let why = e.to_string();
                if self.trouble.borrow().as_ref() != Some(&why) {
                    error!(
                        error = %why,
                        "the journal cannot be written: supervision goes on without history; make room, or make it writable"
                    );
                    self.trouble.send_replace(Some(why));
                }
            }
        }
        if self.steps >= TRIM_EVERY {
            (self.steps, self.trimming) = (0, true);
        }
    }

    /// Forget some of what is older than is to be kept.
    fn trim(&mut self) {
        let keep = *self.keep.borrow();
        self.trimming = match trim(&self.db, keep) {
            Ok(n) => n > 0 && self.trouble.borrow().is_none(),
            Err(error) => {
                warn!(%error, "old history could not be removed");
                false
            }
        };
    }

    fn commit(&mut self) -> rusqlite::Result<()> {
        let tx = self.db.transaction()?;
        for write in &self.kept {
            apply(&tx, write)?;
        }
        tx.commit()
    }
}

fn apply(tx: &Transaction<'_>, write: &Write) -> rusqlite::Result<()> {
    match write {
        Write::Step(s) => tx
            .prepare_cached(
                "INSERT INTO steps (incident, instance, incarnation, at_unix_ms, offset_us, phase, detail, recovered)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![
                s.incident as i64,
                s.instance,
                s.incarnation as i64,
                s.at_unix_ms as i64,
                s.offset_us as i64,
                s.phase,
                s.detail,
                s.recovered
            ]),
        Write::Record(name, record) => tx
            .prepare_cached("INSERT INTO instances VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET record = ?2")?
            .execute(params![name, record]),
        Write::Forget(name) => {
            tx.prepare_cached("DELETE FROM instances WHERE name = ?1")?.execute(params![name])
        }
        Write::Incident(n) => tx
            .prepare_cached(
                "INSERT INTO counters VALUES ('incident', ?1)
                 ON CONFLICT (name) DO UPDATE SET value = max(value, ?1)",
            )?
            .execute(params![*n as i64]),
    }
    .map(|_| ())
}

/// Forget some steps that are older than is to be kept; how many.
pub(super) fn trim(db: &Connection, keep: Keep) -> rusqlite::Result<usize> {
    let oldest = "DELETE FROM steps WHERE n IN (SELECT n FROM steps WHERE";
    let some = "ORDER BY n LIMIT ?2)";
    let many = db
        .prepare_cached(&format!("{oldest} n <= (SELECT max(n) FROM steps) - ?1 {some}"))?
        .execute(params![i64::try_from(keep.steps).unwrap_or(i64::MAX), TRIM_BATCH])?;
    let Some(days) = keep.days.filter(|_| many == 0) else { return Ok(many) };
    let age = i64::from(days) * 86_400_000;
    db.prepare_cached(&format!("{oldest} at_unix_ms < (SELECT max(at_unix_ms) FROM steps) - ?1 {some}"))?
        .execute(params![age, TRIM_BATCH])
}
