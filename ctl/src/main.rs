//! kmorphctl: the command line of kmorph.

mod args;
mod commands;
mod daemon;
mod generate;
mod morph;
mod operate;
mod output;
mod progress;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use kmorph_config::Paths;
use kmorph_control::{ErrorKind, OpError};

use crate::args::{Args, Command};
use crate::output::Output;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) => {
            // clap prints help and version to stdout with success, the rest to stderr; a closed
            // stream changes nothing about the verdict.
            let _ = e.print();
            return if e.use_stderr() {
                ExitCode::from(ErrorKind::Usage.exit_code())
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let out = Output::new(args.format());
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot start: {e}")))
        .and_then(|rt| rt.block_on(run(&args, &out)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            out.error(&e);
            ExitCode::from(e.kind.exit_code())
        }
    }
}

async fn run(args: &Args, out: &Output) -> Result<(), OpError> {
    match &args.command {
        Command::Daemon(d) => daemon::run(d, args.socket.as_deref(), out).await,
        Command::Generate { what, dir } => generate::run(*what, dir),
        Command::Config(command) => operate::config(command, out),
        other => commands::run(other, &socket(args.socket.as_deref()), out).await,
    }
}

/// The daemon that is meant: one's own when there is one, else the machine's.
fn socket(named: Option<&Path>) -> PathBuf {
    if let Some(path) = named {
        return path.into();
    }
    let (own, machine) = (Paths::current().socket, Paths::system().socket);
    // One that was killed leaves its socket behind.
    let lives = own.exists() && std::os::unix::net::UnixStream::connect(&own).is_ok();
    if !lives && machine.exists() { machine } else { own }
}
