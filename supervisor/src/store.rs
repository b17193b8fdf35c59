//! The journal: instances, and every step of every recovery, in SQLite.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kmorph_control::{ErrorKind, OpError, RecoveryLogArgs, RecoveryStep};
use rusqlite::{Connection, Row, params};
use tokio::sync::broadcast;

/// Layout of the database; grows with every change of it.
const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE instances (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE steps (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        incident INTEGER NOT NULL, instance TEXT NOT NULL, incarnation INTEGER NOT NULL,
        at_unix_ms INTEGER NOT NULL, offset_us INTEGER NOT NULL,
        phase TEXT NOT NULL, detail TEXT NOT NULL, recovered INTEGER
    ) STRICT;
    CREATE INDEX steps_by_time ON steps (at_unix_ms);
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
";
/// Steps kept; the oldest go first.
const KEEP_STEPS: i64 = 100_000;
/// Steps a follower may lag behind.
const FOLLOW_QUEUE: usize = 1024;

/// The database and those who follow it.
#[derive(Clone)]
pub struct SqliteStore {
    db: Arc<Mutex<Connection>>,
    steps: broadcast::Sender<RecoveryStep>,
}

fn fail(what: &str, e: impl std::fmt::Display) -> OpError {
    OpError::new(ErrorKind::Internal, format!("journal: {what}: {e}"))
}

impl SqliteStore {
    /// Open or create the database in a folder.
    pub fn open(dir: &Path) -> Result<SqliteStore, OpError> {
        std::fs::create_dir_all(dir).map_err(|e| fail(&format!("create {}", dir.display()), e))?;
        let path = dir.join("kmorph.db");
        let what = format!("open {}", path.display());
        let mut db = Connection::open(&path).map_err(|e| fail(&what, e))?;
        db.pragma_update(None, "journal_mode", "WAL").map_err(|e| fail(&what, e))?;
        // A step is on disk before it is taken.
        db.pragma_update(None, "synchronous", "FULL").map_err(|e| fail(&what, e))?;
        let version: i64 =
            db.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(|e| fail(&what, e))?;
        match version {
            SCHEMA_VERSION => {}
            0 => {
                let tx = db.transaction().map_err(|e| fail(&what, e))?;
                tx.execute_batch(SCHEMA).map_err(|e| fail(&what, e))?;
                tx.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(|e| fail(&what, e))?;
                tx.commit().map_err(|e| fail(&what, e))?;
            }
            newer => {
                return Err(OpError::new(
                    ErrorKind::Version,
                    format!(
                        "{} has layout {newer}, this kmorphd knows up to {SCHEMA_VERSION}; use the newer kmorphd, or move the file away",
                        path.display()
                    ),
                ));
            }
        }
        Ok(SqliteStore { db: Arc::new(Mutex::new(db)), steps: broadcast::channel(FOLLOW_QUEUE).0 })
    }

    /// Run something on the database off the async threads.
    async fn with<T: Send + 'static>(
        &self,
        what: &'static str,
        f: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, OpError> {
        let db = self.db.clone();
        tokio::task::spawn_blocking(move || f(&mut db.lock().unwrap_or_else(PoisonError::into_inner)))
            .await
            .map_err(|e| fail(what, e))?
            .map_err(|e| fail(what, e))
    }

    /// Steps as they are journaled from now on.
    pub fn follow(&self) -> broadcast::Receiver<RecoveryStep> {
        self.steps.subscribe()
    }

    /// Write a step; it is on disk when this returns.
    pub async fn write_step(&self, step: RecoveryStep) -> Result<(), OpError> {
        let s = step.clone();
        self.with("write a step", move |db| {
            let tx = db.transaction()?;
            tx.prepare_cached(
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
            ])?;
            tx.prepare_cached("DELETE FROM steps WHERE n <= (SELECT max(n) FROM steps) - ?1")?
                .execute([KEEP_STEPS])?;
            tx.commit()
        })
        .await?;
        // Nobody needs to be following.
        let _ = self.steps.send(step);
        Ok(())
    }

    /// Steps, oldest first.
    pub async fn read_steps(&self, filter: RecoveryLogArgs) -> Result<Vec<RecoveryStep>, OpError> {
        self.with("read steps", move |db| {
            db.prepare_cached(
                "SELECT incident, instance, incarnation, at_unix_ms, offset_us, phase, detail, recovered FROM steps
                 WHERE (?1 IS NULL OR instance = ?1) AND (?2 IS NULL OR at_unix_ms >= ?2) ORDER BY n",
            )?
            .query_map(params![filter.instance, filter.since_unix_ms.map(|v| v as i64)], step)?
            .collect()
        })
        .await
    }

    /// The next incident's number.
    pub async fn count_incident(&self) -> Result<u64, OpError> {
        self.with("number an incident", |db| {
            db.query_row(
                "INSERT INTO counters VALUES ('incident', 1)
                 ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value",
                [],
                |r| r.get::<_, i64>(0),
            )
        })
        .await
        .map(|n| n as u64)
    }

    /// Save an instance's record under its name.
    pub async fn put_record(&self, name: String, record: Vec<u8>) -> Result<(), OpError> {
        self.with("save an instance", move |db| {
            db.execute(
                "INSERT INTO instances VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET record = ?2",
                params![name, record],
            )
            .map(|_| ())
        })
        .await
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

    /// Whether the database is whole.
    #[cfg(test)]
    async fn check(&self) -> Option<String> {
        self.with("check", |db| db.query_row("PRAGMA integrity_check", [], |r| r.get(0)).map(Some))
            .await
            .unwrap()
    }
}

fn step(r: &Row<'_>) -> rusqlite::Result<RecoveryStep> {
    Ok(RecoveryStep {
        incident: r.get::<_, i64>(0)? as u64,
        instance: r.get(1)?,
        incarnation: r.get::<_, i64>(2)? as u64,
        at_unix_ms: r.get::<_, i64>(3)? as u64,
        offset_us: r.get::<_, i64>(4)? as u64,
        phase: r.get(5)?,
        detail: r.get(6)?,
        recovered: r.get(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_step(instance: &str, at: u64, recovered: Option<bool>) -> RecoveryStep {
        RecoveryStep {
            incident: 1,
            instance: instance.into(),
            incarnation: 2,
            at_unix_ms: at,
            offset_us: 5,
            phase: "PREPARING_RECOVERY".into(),
            detail: "fence".into(),
            recovered,
        }
    }

    #[tokio::test]
    async fn survives_a_restart_and_filters() {
        let d = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(d.path()).unwrap();
        let mut follower = store.follow();
        for s in [a_step("a", 10, None), a_step("b", 20, None), a_step("a", 30, Some(true))] {
            store.write_step(s).await.unwrap();
        }
        assert_eq!(follower.recv().await.unwrap().at_unix_ms, 10);
        assert_eq!(store.count_incident().await.unwrap(), 1);
        store.put_record("a".into(), vec![1]).await.unwrap();
        store.put_record("a".into(), vec![2]).await.unwrap();
        drop(store);
        let store = SqliteStore::open(d.path()).unwrap();
        assert_eq!(store.count_incident().await.unwrap(), 2);
        assert_eq!(store.records().await.unwrap(), [("a".to_string(), vec![2])]);
        let only_a = RecoveryLogArgs { instance: Some("a".into()), since_unix_ms: Some(11) };
        assert_eq!(store.read_steps(only_a).await.unwrap(), [a_step("a", 30, Some(true))]);
        assert_eq!(store.read_steps(RecoveryLogArgs::default()).await.unwrap().len(), 3);
        assert_eq!(store.check().await.as_deref(), Some("ok"));
    }

    #[tokio::test]
    async fn a_newer_layout_is_refused() {
        let d = tempfile::tempdir().unwrap();
        drop(SqliteStore::open(d.path()).unwrap());
        let db = Connection::open(d.path().join("kmorph.db")).unwrap();
        db.pragma_update(None, "user_version", 99).unwrap();
        let e = SqliteStore::open(d.path()).err().unwrap();
        assert_eq!(e.kind, ErrorKind::Version);
        assert!(e.message.contains("99"), "{e}");
    }
}
