//! `kmorphctl daemon`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kmorph_config::{Paths, own_folder};
use kmorph_control::{Client, DaemonView, ErrorKind, OpError, ReloadView, Request};
use tokio::time::{Instant, sleep};

use crate::args::Daemon;
use crate::output::{self, Output};

/// How long a daemon may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(20);
const PROGRAM: &str = "kmorphd";

pub async fn run(command: &Daemon, named: Option<&Path>, out: &Output) -> Result<(), OpError> {
    let socket = &crate::socket(named);
    match command {
        Daemon::Start { config, program } => {
            // Who starts a daemon starts one's own.
            let own = named.map_or_else(|| Paths::current().socket, Path::to_owned);
            start(config.as_deref(), program.as_deref(), &own, out).await
        }
        Daemon::Stop { graceful } => stop(*graceful, socket, out).await,
        Daemon::Reload => {
            let view: ReloadView = Client::connect(socket).await?.call(&Request::DaemonReload).await?;
            out.show(&view, output::operate::reload)
        }
        Daemon::Status => {
            let view: DaemonView = Client::connect(socket).await?.call(&Request::DaemonStatus).await?;
            out.show(&view, output::daemon)
        }
    }
}

fn internal(what: &str, e: impl std::fmt::Display) -> OpError {
    OpError::new(ErrorKind::Internal, format!("{what}: {e}"))
}

/// The daemon lies beside this program, or where packages put it.
fn find(program: Option<&Path>) -> PathBuf {
    if let Some(p) = program {
        return p.into();
    }
    let beside = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join(PROGRAM)));
    [beside, Some("/usr/sbin/kmorphd".into())]
        .into_iter()
        .flatten()
        .find(|p| p.is_file())
        .unwrap_or_else(|| PROGRAM.into())
}

async fn start(
    config: Option<&Path>,
    program: Option<&Path>,
    socket: &Path,
    out: &Output,
) -> Result<(), OpError> {
    if let Ok(mut client) = Client::connect(socket).await {
        let view: DaemonView = client.call(&Request::DaemonStatus).await?;
        return Err(OpError::new(
            ErrorKind::Conflict,
            format!(
                "kmorphd runs already at {} (process {}); stop it first: kmorphctl daemon stop",
                socket.display(),
                view.pid
            ),
        ));
    }
    let program = find(program);
    let log_path = socket.with_extension("log");
    if let Some(dir) = socket.parent() {
        own_folder(dir, "the control socket's folder")?;
    }
    // What operators ask for is in it.
    let log = File::options().create(true).append(true).read(true).mode(0o640).open(&log_path);
    let log = log.map_err(|e| internal(&format!("cannot write {}", log_path.display()), e))?;
    let began_at = log.metadata().map_or(0, |m| m.len());
    let mut command = Command::new(&program);
    command.arg("--socket").arg(socket);
    if let Some(c) = config {
        command.arg("--config").arg(c);
    }
    let stderr = log.try_clone().map_err(|e| internal("cannot share the log file", e))?;
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0).spawn().map_err(
            |e| OpError::new(ErrorKind::NotFound, format!("cannot start {}: {e}", program.display())),
        )?;
    let view = wait_for(&mut child, socket, log, began_at).await?;
    out.show(&view, |v| format!("kmorphd {} runs: process {}, platform {}\n", v.version, v.pid, v.platform))
}

/// Wait until it answers; when it ends instead, its own words are the error.
async fn wait_for(
    child: &mut Child,
    socket: &Path,
    mut log: File,
    began_at: u64,
) -> Result<DaemonView, OpError> {
    let until = Instant::now() + START_LIMIT;
    loop {
        if let Ok(mut client) = Client::connect(socket).await {
            return client.call(&Request::DaemonStatus).await;
        }
        if let Some(status) = child.try_wait().map_err(|e| internal("cannot wait for kmorphd", e))? {
            let mut text = String::new();
            log.seek(SeekFrom::Start(began_at))
                .and_then(|_| log.read_to_string(&mut text))
                .map_err(|e| internal("cannot read kmorphd's log", e))?;
            let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing");
            return Err(OpError::new(kind_of(status.code()), format!("kmorphd ended ({status}): {last}")));
        }
        if Instant::now() >= until {
            return Err(OpError::new(
                ErrorKind::Timeout,
                format!(
                    "kmorphd did not answer at {} within {START_LIMIT:?}; see {}",
                    socket.display(),
                    socket.with_extension("log").display()
                ),
            ));
        }
        sleep(RETRY).await;
    }
}

/// kmorphd ends with the same codes.
fn kind_of(code: Option<i32>) -> ErrorKind {
    use ErrorKind::*;
    [Usage, NotFound, Conflict, Busy, BadInput, Denied, Timeout, BootFailed, PartialFence, Version]
        .into_iter()
        .find(|k| code == Some(i32::from(k.exit_code())))
        .unwrap_or(Internal)
}

async fn stop(graceful: bool, socket: &Path, out: &Output) -> Result<(), OpError> {
    let mut client = Client::connect(socket).await?;
    let view: DaemonView = client.call(&Request::DaemonStatus).await?;
    let () = client.call(&Request::DaemonStop { graceful }).await?;
    // Its connections close when it is gone, and not before.
    client.closed().await;
    out.show(&view, |v| {
        let what = if graceful || v.running == 0 { "" } else { "; its instances run on" };
        format!("kmorphd (process {}) is stopped{what}\n", v.pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_of_the_daemon_are_understood() {
        assert_eq!(kind_of(Some(6)), ErrorKind::BadInput);
        assert_eq!(kind_of(Some(99)), ErrorKind::Internal);
        assert_eq!(kind_of(None), ErrorKind::Internal);
    }

    #[tokio::test]
    async fn a_daemon_that_ends_is_quoted() {
        let d = tempfile::tempdir().unwrap();
        let program = d.path().join("kmorphd");
        std::fs::write(&program, "#!/bin/sh\necho 'no pool for instances' >&2\nexit 5\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let out = Output::new(crate::args::Format::Table);
        let e = start(None, Some(&program), &d.path().join("s.sock"), &out).await.unwrap_err();
        assert_eq!(e.kind, ErrorKind::Busy);
        assert!(e.message.contains("no pool for instances"), "{e}");
    }
}
