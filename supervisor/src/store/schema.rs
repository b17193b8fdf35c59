//! Layout of the database, and how an older one becomes the newest.

use std::path::Path;

use kmorph_actors::{InstanceRecord, Key, Policy};
use kmorph_control::{ErrorKind, OpError, decode, encode};
use rusqlite::{Connection, Transaction};

use super::fail;

/// What makes each layout out of the one before, from an empty file on. Never changed, only added to.
const LAYOUTS: [&str; 2] = [
    "CREATE TABLE instances (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
    CREATE TABLE steps (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        incident INTEGER NOT NULL, instance TEXT NOT NULL, incarnation INTEGER NOT NULL,
        at_unix_ms INTEGER NOT NULL, offset_us INTEGER NOT NULL,
        phase TEXT NOT NULL, detail TEXT NOT NULL, recovered INTEGER
    ) STRICT;
    CREATE INDEX steps_by_time ON steps (at_unix_ms);
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;",
    "CREATE INDEX steps_by_instance ON steps (instance, n);",
];

/// Bring a database to the newest layout. One that is newer than this program is refused.
pub(super) fn prepare(db: &mut Connection, path: &Path) -> Result<(), OpError> {
    let what = format!("prepare {}", path.display());
    let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(|e| fail(&what, e))?;
    let known = LAYOUTS.len() as i64;
    if version > known || version < 0 {
        return Err(OpError::new(
            ErrorKind::Version,
            format!(
                "{} has layout {version}, this kmorphd knows up to {known}; use the newer kmorphd, or move the file away",
                path.display()
            ),
        ));
    }
    for (at, layout) in LAYOUTS.iter().enumerate().skip(version as usize) {
        let tx = db.transaction().map_err(|e| fail(&what, e))?;
        tx.execute_batch(layout).map_err(|e| fail(&what, e))?;
        if at == 1 {
            keep_what_spawn_was_told(&tx).map_err(|e| fail(&what, e))?;
        }
        tx.pragma_update(None, "user_version", at as i64 + 1).map_err(|e| fail(&what, e))?;
        tx.commit().map_err(|e| fail(&what, e))?;
    }
    Ok(())
}

/// In the first layout what an operator told `spawn` stood in the policy itself. It goes on to hold: a watched
/// instance that was not to be restarted is not restarted after an upgrade.
fn keep_what_spawn_was_told(tx: &Transaction<'_>) -> rusqlite::Result<()> {
    let rows: Vec<(String, Vec<u8>)> = tx
        .prepare("SELECT name, record FROM instances")?
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (name, bytes) in rows {
        // One that does not decode is named when it is loaded.
        let Ok(mut record) = decode::<InstanceRecord>(&bytes) else { continue };
        for key in [Key::HeartbeatTimeout, Key::BootTimeout, Key::AutoHeal] {
            let value = record.policy.get(key);
            if value != Policy::default().get(key)
                && let Err(error) = record.overrides.set(key, &value)
            {
                tracing::warn!(instance = %name, %error, "a setting of an older kmorphd is left out");
            }
        }
        let Ok(bytes) = encode(&record) else { continue };
        tx.execute("UPDATE instances SET record = ?2 WHERE name = ?1", rusqlite::params![name, bytes])?;
    }
    Ok(())
}

/// The first layout, for tests of what comes after it.
#[cfg(test)]
pub(super) fn oldest() -> &'static str {
    LAYOUTS[0]
}
