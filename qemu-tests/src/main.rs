//! kmorph-qemu: boots real kernels under QEMU and runs scenarios on them.
//!
//! One program, three places: on the host it builds images and runs machines; as `guest` it is the
//! scenario inside the primary kernel; as `tool` it is the workload inside an instance.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a command-line tool for developers

mod guest;
mod host;
mod scenarios;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Result of anything here: an error is a text for the developer.
pub type Result<T> = std::result::Result<T, String>;

/// Adds what was tried to an error.
pub trait Context<T> {
    /// Prefix the error.
    fn context(self, what: &str) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: &str) -> Result<T> {
        self.map_err(|e| format!("{what}: {e}"))
    }
}

/// Boots real kernels under QEMU and runs scenarios on them.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the scenarios
    List,
    /// Run scenarios (all but `bench` without names); exits non-zero when one fails
    Run {
        /// Names, as `list` shows them
        names: Vec<String>,
        /// Print the machine's whole console while it runs
        #[arg(long)]
        verbose: bool,
    },
    /// Tell the story of the README on one machine, as it happens
    Demo,
    /// Run the benchmark and print every number beside its promise
    Bench,
    /// Build images only
    Build,
    /// (inside the primary kernel) run a scenario
    #[command(hide = true)]
    Guest {
        /// Its name
        name: String,
    },
    /// (inside an instance) a store whose memory survives its kernel
    #[command(hide = true)]
    Kv {
        /// Its size in MiB
        mib: usize,
    },
    /// (inside an instance) a service with open files that survive its kernel
    #[command(hide = true)]
    Journal {
        /// The vsock port it serves on
        port: u32,
    },
    /// (inside an instance) serve what scenarios ask for
    #[command(hide = true)]
    Tool,
    /// (inside the primary kernel) have the workload of an instance do something
    #[command(hide = true)]
    Ask {
        /// Its CID
        cid: u32,
        /// What
        line: String,
    },
    /// (inside an instance) store to a handover region
    #[command(hide = true)]
    Poke {
        /// Its key
        key: u64,
        /// `once` or `for-ever`
        how: String,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::List => {
            for s in scenarios::ALL {
                println!("{:<18} {}", s.name, s.about);
            }
            Ok(())
        }
        Command::Run { names, verbose } => host::run(&names, verbose),
        Command::Demo => host::demo(),
        Command::Bench => host::bench(),
        Command::Build => host::build(),
        Command::Guest { name } => guest::run(&name),
        Command::Kv { mib } => guest::kv::serve(mib),
        Command::Journal { port } => guest::journal::serve(port),
        Command::Tool => guest::tool::serve(),
        Command::Ask { cid, line } => guest::tool::ask(cid, &line),
        Command::Poke { key, how } => guest::handover::poke(key, &how),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kmorph-qemu: {e}");
            ExitCode::FAILURE
        }
    }
}
