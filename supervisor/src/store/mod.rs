//! The journal: instances, and every step of every recovery, in SQLite.
//!
//! A thread of its own writes: what is asked for at the same time is one transaction, and every caller hears
//! when its write is on disk. A disk that is full or read-only costs history, not supervision: writes are kept
//! in memory, tried again, and flushed in order.

mod schema;
#[cfg(test)]
mod tests;
mod writer;

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kmorph_control::{ErrorKind, OpError, RecoveryLogArgs, RecoveryStep};
use rusqlite::{Connection, Row, params};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::error;

pub use writer::Keep;
use writer::{Ask, Write, Writer};

/// Steps a follower may lag behind.
pub const FOLLOW_QUEUE: usize = 1024;
/// Steps read at a time.
const PAGE: i64 = 1000;
/// Writes that may wait for the thread.
const QUEUE: usize = 4096;
/// How long another program may hold the database.
const BUSY_LIMIT: Duration = Duration::from_secs(1);
/// How long a daemon that ends waits for its last writes.
const LAST_LIMIT: Duration = Duration::from_secs(5);

/// The database and those who follow it.
#[derive(Clone)]
pub struct SqliteStore {
    asks: mpsc::Sender<Ask>,
    steps: broadcast::Sender<RecoveryStep>,
    trouble: Arc<watch::Sender<Option<String>>>,
    keep: Arc<watch::Sender<Keep>>,
    /// Incidents numbered so far.
    incidents: Arc<AtomicU64>,
}

fn fail(what: &str, e: impl std::fmt::Display) -> OpError {
    OpError::new(ErrorKind::Internal, format!("journal: {what}: {e}"))
}

/// What SQLite says, and the way out when the file is damaged.
fn said(e: &rusqlite::Error) -> String {
    match e.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
            format!("{e}; move the file away: kernels that run are adopted without it")
        }
        _ => e.to_string(),
    }
}

/// Make the folder, or see that nobody else can write there: who changes the journal commands the daemon.
fn folder(dir: &Path) -> Result<(), OpError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(dir);
    made.map_err(|e| fail(&format!("create {}", dir.display()), e))?;
    let m = std::fs::metadata(dir).map_err(|e| fail(&format!("look at {}", dir.display()), e))?;
    let me = nix::unistd::Uid::effective();
    let denied = |text: String| Err(OpError::new(ErrorKind::Denied, text));
    if m.uid() != me.as_raw() {
        return denied(format!(
            "{0} belongs to user {1}, not to the user kmorphd runs as: chown {me} {0}",
            dir.display(),
            m.uid()
        ));
    }
    if m.permissions().mode() & 0o022 != 0 {
        return denied(format!("others may write to {0}: chmod go-w {0}", dir.display()));
    }
    Ok(())
}

/// Open the database and read something from it. Alone, without what it shares with other programs.
fn connect(path: &Path, alone: bool) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(BUSY_LIMIT)?;
    if alone {
        db.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    }
    db.pragma_update(None, "journal_mode", "WAL")?;
    // A step is on disk before it is taken.
    db.pragma_update(None, "synchronous", "FULL")?;
    db.query_row("PRAGMA user_version", [], |_| Ok(()))?;
    Ok(db)
}

impl SqliteStore {
    /// Open or create the database in a folder.
    pub fn open(dir: &Path, keep: Keep) -> Result<SqliteStore, OpError> {
        folder(dir)?;
        let path = dir.join("kmorph.db");
        let what = format!("open {}", path.display());
        let unusable = |e: rusqlite::Error| {
            let hint = match e.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ReadOnly | rusqlite::ErrorCode::CannotOpen) => {
                    "; see to it that kmorphd may write to it and that the file system is not read-only"
                }
                Some(rusqlite::ErrorCode::DiskFull | rusqlite::ErrorCode::SystemIoFailure) => {
                    "; its file system is full or does not work: make room, look at dmesg"
                }
                Some(rusqlite::ErrorCode::DatabaseBusy) => "; another program has it open: end that one",
                _ => "",
            };
            fail(&what, format!("{}{hint}", said(&e)))
        };
        let opened = connect(&path, false).or_else(|e| match e.sqlite_error_code() {
            // A full disk has no room for the index that SQLite shares with other programs. Without it there
            // is still a daemon that knows what it supervises.
            Some(rusqlite::ErrorCode::SystemIoFailure | rusqlite::ErrorCode::DiskFull) => {
                tracing::warn!(error = %e, "the journal is opened for kmorphd alone");
                connect(&path, true)
            }
            _ => Err(e),
        });
        let mut db = opened.map_err(unusable)?;
        schema::prepare(&mut db, &path)?;
        let incidents: i64 = db
            .query_row(
                "SELECT max(coalesce((SELECT value FROM counters WHERE name = 'incident'), 0),
                            coalesce((SELECT max(incident) FROM steps), 0))",
                [],
                |r| r.get(0),
            )
            .map_err(unusable)?;
        let (asks, receiver) = mpsc::channel(QUEUE);
        let trouble = Arc::new(watch::Sender::new(None));
        let keep = watch::Sender::new(keep);
        let writer = Writer {
            db,
            trouble: trouble.clone(),
            keep: keep.subscribe(),
            kept: Vec::new(),
            kept_steps: 0,
            dropped: 0,
            steps: 0,
            trimming: true,
        };
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(receiver))
            .map_err(|e| fail("start its thread", e))?;
        Ok(SqliteStore {
            asks,
            steps: broadcast::channel(FOLLOW_QUEUE).0,
            trouble,
            keep: Arc::new(keep),
            incidents: Arc::new(AtomicU64::new(incidents as u64)),
        })
    }

    /// Why it cannot be written now, when it cannot.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Changes of [`SqliteStore::trouble`].
    pub fn troubles(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Try again what could not be written; how many writes are left.
    pub async fn retry(&self) -> usize {
        let (reply, answer) = oneshot::channel();
        match self.asks.send(Ask::Retry(reply)).await {
            Ok(()) => answer.await.unwrap_or_default(),
            // The thread ends with the daemon only.
            Err(_) => 0,
        }
    }

    /// The daemon ends: try again, and say what is lost with it.
    pub async fn finish(&self) {
        match timeout(LAST_LIMIT, self.retry()).await {
            Ok(0) => {}
            Ok(writes) => {
                let why = self.trouble().unwrap_or_default();
                error!(writes, error = %why, "the daemon ends and what could not be written is lost");
            }
            Err(_) => {
                error!(limit = ?LAST_LIMIT, "the daemon ends, and its disk does not say what is written")
            }
        }
    }

    /// From now on keep so much history.
    pub fn set_keep(&self, keep: Keep) {
        self.keep.send_replace(keep);
    }

    async fn write(&self, writes: Vec<Write>) -> Result<(), OpError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Write(writes, reply)).await.map_err(|_| fail("write", "its thread has ended"))?;
        answer.await.map_err(|_| fail("write", "its thread has ended"))?
    }

    /// Run something on the database, after everything that was asked before.
    async fn with<T: Send + 'static>(
        &self,
        what: &'static str,
        f: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, OpError> {
        let (reply, answer) = oneshot::channel();
        let work = Box::new(move |db: &mut Connection| {
            // Who asked may have given up waiting.
            let _ = reply.send(f(db));
        });
        self.asks.send(Ask::Read(work)).await.map_err(|_| fail(what, "its thread has ended"))?;
        answer.await.map_err(|_| fail(what, "its thread has ended"))?.map_err(|e| fail(what, said(&e)))
    }

    /// Steps as they are journaled from now on.
    pub fn follow(&self) -> broadcast::Receiver<RecoveryStep> {
        self.steps.subscribe()
    }

    /// Write a step; it is on disk when this returns without an error.
    pub async fn write_step(&self, step: RecoveryStep) -> Result<(), OpError> {
        let result = self.write(vec![Write::Step(Box::new(step.clone()))]).await;
        // It is taken whether it could be written or not. Nobody needs to be following.
        let _ = self.steps.send(step);
        result
    }

    /// Steps after a place, oldest first, some at a time: who reads slowly keeps nobody from writing. Each comes
    /// with its place.
    pub async fn read_some(
        &self,
        filter: &RecoveryLogArgs,
        after: i64,
    ) -> Result<Vec<(i64, RecoveryStep)>, OpError> {
        let (instance, since) = (filter.instance.clone(), filter.since_unix_ms.map(|v| v as i64));
        self.with("read steps", move |db| {
            const COLUMNS: &str =
                "n, incident, instance, incarnation, at_unix_ms, offset_us, phase, detail, recovered";
            const REST: &str = "n > ?1 AND (?2 IS NULL OR at_unix_ms >= ?2) ORDER BY n LIMIT ?3";
            let row = |r: &Row<'_>| Ok((r.get(0)?, step(r)?));
            match instance {
                None => db
                    .prepare_cached(&format!("SELECT {COLUMNS} FROM steps WHERE {REST}"))?
                    .query_map(params![after, since, PAGE], row)?
                    .collect(),
                Some(name) => db
                    .prepare_cached(&format!("SELECT {COLUMNS} FROM steps WHERE instance = ?4 AND {REST}"))?
                    .query_map(params![after, since, PAGE, name], row)?
                    .collect(),
            }
        })
        .await
    }

    /// All steps, oldest first.
    pub async fn read_steps(&self, filter: RecoveryLogArgs) -> Result<Vec<RecoveryStep>, OpError> {
        let (mut all, mut after) = (Vec::new(), 0);
        loop {
            let some = self.read_some(&filter, after).await?;
            let Some((last, _)) = some.last() else { return Ok(all) };
            after = *last;
            all.extend(some.into_iter().map(|(_, step)| step));
        }
    }

    /// The next incident's number. It is unique even while nothing can be written.
    pub async fn count_incident(&self) -> Result<u64, OpError> {
        let n = self.incidents.fetch_add(1, Ordering::Relaxed) + 1;
        if let Err(error) = self.write(vec![Write::Incident(n)]).await {
            tracing::debug!(%error, incident = n, "the number is kept in memory");
        }
        Ok(n)
    }

    /// Save an instance's record under its name.
    pub async fn put_record(&self, name: String, record: Vec<u8>) -> Result<(), OpError> {
        self.write(vec![Write::Record(name, record)]).await
    }

    /// Save an instance's record and the steps that led there: all of it or nothing.
    pub async fn put_together(
        &self,
        name: String,
        record: Vec<u8>,
        steps: Vec<RecoveryStep>,
    ) -> Result<(), OpError> {
        let mut all: Vec<Write> = steps.iter().cloned().map(|s| Write::Step(Box::new(s))).collect();
        all.push(Write::Record(name, record));
        let result = self.write(all).await;
        for step in steps {
            // It is taken whether it could be written or not. Nobody needs to be following.
            let _ = self.steps.send(step);
        }
        result
    }

    /// Save all of these records and steps, or nothing, now. After an error none of it is there or will be.
    pub async fn decide(
        &self,
        records: Vec<(String, Vec<u8>)>,
        steps: Vec<RecoveryStep>,
    ) -> Result<(), OpError> {
        let mut all: Vec<Write> = steps.iter().cloned().map(|s| Write::Step(Box::new(s))).collect();
        all.extend(records.into_iter().map(|(name, record)| Write::Record(name, record)));
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Decide(all, reply)).await.map_err(|_| fail("decide", "its thread has ended"))?;
        answer.await.map_err(|_| fail("decide", "its thread has ended"))??;
        for step in steps {
            // Nobody needs to be following.
            let _ = self.steps.send(step);
        }
        Ok(())
    }

    /// Forget an instance; its steps stay.
    pub async fn remove_record(&self, name: String) -> Result<(), OpError> {
        self.write(vec![Write::Forget(name)]).await
    }

    /// All records.
    pub async fn records(&self) -> Result<Vec<(String, Vec<u8>)>, OpError> {
        self.with("load instances", |db| {
            db.prepare("SELECT name, record FROM instances ORDER BY name")?
                .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
                .collect()
        })
        .await
    }
}

fn step(r: &Row<'_>) -> rusqlite::Result<RecoveryStep> {
    Ok(RecoveryStep {
        incident: r.get::<_, i64>(1)? as u64,
        instance: r.get(2)?,
        incarnation: r.get::<_, i64>(3)? as u64,
        at_unix_ms: r.get::<_, i64>(4)? as u64,
        offset_us: r.get::<_, i64>(5)? as u64,
        phase: r.get(6)?,
        detail: r.get(7)?,
        recovered: r.get(8)?,
    })
}
