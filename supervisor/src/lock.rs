//! One daemon a machine, and one a journal.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use kmorph_config::own_folder;
use kmorph_control::{ErrorKind, OpError};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{Instant, sleep};

/// Held as long as the daemon lives; the kernel lets go of it whatever way the daemon ends.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] Flock<File>);

/// How long a lock may be held by a daemon that is about to be gone: killed, it has it until its last thread has ended.
pub const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

async fn lock(mut file: File, patience: Duration) -> Result<Flock<File>, (File, Errno)> {
    let until = Instant::now() + patience;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((back, Errno::EAGAIN)) if Instant::now() < until => file = back,
            result => return result,
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Take the lock, or say who has it and does not let go for so long.
pub async fn take(path: &Path, patience: Duration) -> Result<Lock, OpError> {
    let io = |what: &str, e: &dyn std::fmt::Display| {
        OpError::new(
            ErrorKind::Denied,
            format!("cannot {what} {}: {e}; kmorphd runs as root", path.display()),
        )
    };
    if let Some(dir) = path.parent() {
        own_folder(dir, "the folder of the lock")?;
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| io("open", &e))?;
    let mut lock = lock(file, patience).await.map_err(|(mut file, e)| match e {
        Errno::EAGAIN => {
            let mut pid = String::new();
            // Without it the message is only less precise.
            let _ = file.read_to_string(&mut pid);
            OpError::new(
                ErrorKind::Conflict,
                format!("kmorphd runs already on this machine (process {}); one is enough", pid.trim()),
            )
        }
        e => io("lock", &e),
    })?;
    lock.set_len(0)
        .and_then(|()| lock.seek(SeekFrom::Start(0)))
        .and_then(|_| lock.write_all(std::process::id().to_string().as_bytes()))
        .map_err(|e| io("write", &e))?;
    Ok(Lock(lock))
}

/// Have a folder's content for oneself, waiting for so long. Nothing is written: the disk may be full.
pub async fn folder(dir: &Path, patience: Duration) -> Result<Lock, OpError> {
    let fail = |e: &dyn std::fmt::Display| {
        OpError::new(ErrorKind::Internal, format!("cannot lock the state folder {}: {e}", dir.display()))
    };
    let file = File::open(dir).map_err(|e| fail(&e))?;
    lock(file, patience).await.map(Lock).map_err(|(_, e)| match e {
        Errno::EAGAIN => OpError::new(
            ErrorKind::Conflict,
            format!(
                "another kmorphd has its journal in {}: give this one a folder of its own (state: in its \
                 configuration), or stop that one",
                dir.display()
            ),
        ),
        e => fail(&e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_journal_is_one_daemons() {
        let d = tempfile::tempdir().unwrap();
        let first = folder(d.path(), Duration::ZERO).await.unwrap();
        let e = folder(d.path(), Duration::ZERO).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::Conflict);
        assert!(e.message.contains(&d.path().display().to_string()), "{e}");
        drop(first);
        folder(d.path(), Duration::ZERO).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_is_told_about_the_first() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("run/lock");
        let first = take(&path, Duration::ZERO).await.unwrap();
        let e = take(&path, Duration::ZERO).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::Conflict);
        assert!(e.message.contains(&std::process::id().to_string()), "{e}");
        drop(first);
        take(&path, Duration::ZERO).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_about_to_be_gone_is_waited_for() {
        let d = tempfile::tempdir().unwrap();
        let first = folder(d.path(), Duration::ZERO).await.unwrap();
        let (path, began) = (d.path().to_owned(), Instant::now());
        let second = tokio::spawn(async move { folder(&path, PATIENCE).await });
        sleep(PATIENCE / 2).await;
        assert!(!second.is_finished(), "it was refused");
        drop(first);
        let _second = second.await.unwrap().unwrap();
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        assert_eq!(folder(d.path(), PATIENCE).await.unwrap_err().kind, ErrorKind::Conflict);
        assert!(began.elapsed() >= PATIENCE, "it was not waited for");
    }
}
