//! Commands that go to the daemon as one request.

use std::path::{Path, PathBuf};

use kmorph_control::{
    Client, ConsoleChunk, ErrorKind, HealthView, HeartbeatView, InstanceView, Next, OpError, PingView,
    RecoveryLogArgs, RecoveryStep, Request, SpawnArgs,
};

use crate::args::{Command, Metric, Spawn};
use crate::output::{self, Output};
use crate::{morph, operate};

/// The daemon has another working directory: send it absolute paths of files that exist.
pub fn file(what: &str, path: &Path) -> Result<String, OpError> {
    let full: PathBuf = path.canonicalize().map_err(|e| {
        OpError::new(ErrorKind::NotFound, format!("cannot find the {what} {}: {e}", path.display()))
    })?;
    if !full.is_file() {
        return Err(OpError::new(
            ErrorKind::BadInput,
            format!("the {what} {} is not a file", path.display()),
        ));
    }
    full.into_os_string()
        .into_string()
        .map_err(|p| OpError::new(ErrorKind::BadInput, format!("the path {} is not UTF-8", p.display())))
}

fn spawn_args(s: &Spawn) -> Result<SpawnArgs, OpError> {
    Ok(SpawnArgs {
        name: s.instance.clone(),
        kernel: file("kernel", &s.kernel)?,
        cmdline: s.kernel_cmdline.clone(),
        initramfs: s.initramfs.as_deref().map(|p| file("initramfs", p)).transpose()?,
        monitor: s.monitor,
        heartbeat_timeout_s: s.heartbeat_timeout,
        boot_timeout_s: s.boot_timeout,
        wait: !s.no_wait,
        publish: s.publish.clone(),
        handover_bytes: s.handover_memory,
    })
}

pub async fn run(command: &Command, socket: &Path, out: &Output) -> Result<(), OpError> {
    let connect = || Client::connect(socket);
    match command {
        Command::Daemon(_) | Command::Generate { .. } | Command::Config(_) => Ok(()), // do without a request
        Command::Events(args) => operate::events(args, socket, out).await,
        Command::Policy(command) => operate::policy(command, socket, out).await,
        Command::Group(command) => operate::group(command, socket, out).await,
        Command::Morph(command) => morph::run(command, socket, out).await,
        Command::Maintenance(command) => operate::maintenance(command, socket, out).await,
        Command::Spawn(s) => {
            let request = Request::Spawn(spawn_args(s)?);
            let view: InstanceView = connect().await?.call(&request).await?;
            out.show(&view, |v| {
                let how = if s.no_wait { "started" } else { "runs" };
                format!(
                    "{} {how}: instance {} (CID {}), kernel {}, CPUs {:?}\n",
                    v.name, v.id, v.cid, v.release, v.cpus
                )
            })
        }
        Command::List { verbose } => {
            let all: Vec<InstanceView> = connect().await?.call(&Request::List).await?;
            out.show(&all, |a| output::instances(a, *verbose))
        }
        Command::Status { instance } => {
            let view: InstanceView =
                connect().await?.call(&Request::Status { name: instance.clone() }).await?;
            out.show(&view, output::instance)
        }
        Command::Terminate { instance, force } => {
            let request = Request::Terminate { name: instance.clone(), force: *force };
            let view: InstanceView = connect().await?.call(&request).await?;
            out.show(&view, |v| {
                format!("{} is stopped; its CPUs and memory are back with the primary kernel\n", v.name)
            })
        }
        Command::Heartbeat { instance } => {
            let view: HeartbeatView =
                connect().await?.call(&Request::Heartbeat { name: instance.clone() }).await?;
            out.show(&view, output::heartbeat)
        }
        Command::Health { instance, metrics } => {
            let mut view: HealthView =
                connect().await?.call(&Request::Health { name: instance.clone() }).await?;
            view.cpu = view.cpu.filter(|_| metrics.contains(&Metric::Cpu));
            view.memory = view.memory.filter(|_| metrics.contains(&Metric::Memory));
            view.io = view.io.filter(|_| metrics.contains(&Metric::Io));
            out.show(&view, |v| output::health(v, metrics))
        }
        Command::Ping { instance } => {
            let view: PingView = connect().await?.call(&Request::Ping { name: instance.clone() }).await?;
            out.show(&view, output::ping)
        }
        Command::Recover { instance } => {
            let view: InstanceView =
                connect().await?.call(&Request::Recover { name: instance.clone() }).await?;
            out.show(&view, |v| format!("{} runs again: incarnation {}\n", v.name, v.incarnation))
        }
        Command::RecoveryLog { instance, since, follow } => {
            let filter = RecoveryLogArgs { instance: instance.clone(), since_unix_ms: *since };
            let mut client = connect().await?;
            client.start(&Request::RecoveryLog { filter, follow: *follow }).await?;
            let mut none = true;
            while let Next::Item(step) = client.next::<RecoveryStep, ()>().await? {
                out.item(&step, output::step)?;
                none = false;
            }
            if none {
                out.note("no recoveries are recorded");
            }
            Ok(())
        }
        Command::Console { instance, follow } => {
            let mut client = connect().await?;
            client.start(&Request::Console { name: instance.clone(), follow: *follow }).await?;
            let mut said = None;
            while let Next::Item(chunk) = client.next::<ConsoleChunk, ()>().await? {
                for line in &chunk.lines {
                    out.item(line, output::line)?;
                }
                if chunk.note != said
                    && let Some(note) = &chunk.note
                {
                    out.note(note);
                }
                said = chunk.note;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_checked_before_the_daemon_is_asked() {
        let d = tempfile::tempdir().unwrap();
        let e = file("kernel", &d.path().join("none")).unwrap_err();
        assert_eq!(e.kind, ErrorKind::NotFound);
        assert!(e.message.contains("kernel") && e.message.contains("none"), "{e}");
        assert_eq!(file("kernel", d.path()).unwrap_err().kind, ErrorKind::BadInput);
    }
}
