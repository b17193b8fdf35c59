//! kmorphd with ten thousand instances, and the same job done by Erlang/OTP: CPU time and memory in one run.
//!
//! Three kinds of process work together: a [`farm`] that answers heartbeats for all instances, a supervisor that
//! is measured (kmorphd on a [`platform`] that finds the farm's instances running, or the Erlang program), and
//! the one that starts both, waits, and reads what the kernel says they used.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark measures real time and prints it"
)]

mod blackout;
mod control;
mod daemon;
mod farm;
mod platform;
mod process;
mod scale;
mod stand_ins;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What went wrong, in one sentence.
type Result<T, E = String> = std::result::Result<T, E>;

/// Says what was tried.
trait Context<T> {
    fn context(self, what: &str) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: &str) -> Result<T> {
        self.map_err(|e| format!("{what}: {e}"))
    }
}

/// Measures kmorphd at scale.
#[derive(Debug, Parser)]
#[command(name = "kmorph-bench", version)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Everything: heartbeats beside Erlang/OTP, restart, list, requests; ends with an error when a promise of
    /// SPECIFICATION.md is not kept
    All {
        /// Instances that beat
        #[arg(long, default_value_t = 10_000)]
        count: u16,
        /// Stand-ins that a restarted daemon takes over
        #[arg(long, default_value_t = 1_000)]
        stand_ins: u16,
        /// Seconds of each measurement
        #[arg(long, default_value_t = 15)]
        seconds: u64,
        /// Measurements of each, in turn
        #[arg(long, default_value_t = 2)]
        rounds: u32,
    },
    /// Restart kmorphd with stand-ins running
    StandIns {
        /// How many
        #[arg(default_value_t = 1_000)]
        count: u16,
    },
    /// Replace the kernel of a service under a client, again and again
    Blackout {
        /// How often
        #[arg(default_value_t = 60)]
        morphs: usize,
    },
    /// (inside a stand-in) A store of MIB MiB that goes along
    #[command(hide = true)]
    Kv {
        /// Its size
        mib: usize,
    },
    /// Answer heartbeats for COUNT instances from FIRST on, on Unix sockets in DIR
    Farm {
        /// Folder of the sockets
        dir: PathBuf,
        /// Number of the first one
        first: u16,
        /// How many
        count: u16,
    },
    /// kmorphd over a farm; further arguments are kmorphd's
    Daemon {
        /// Folder of the farm's sockets
        dir: PathBuf,
        /// How many
        count: u16,
        /// Configuration of kmorphd
        config: PathBuf,
        /// Control socket of kmorphd
        socket: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Args::parse().what {
        What::All { count, stand_ins, seconds, rounds } => all(count, stand_ins, seconds, rounds),
        What::StandIns { count } => stand_ins::run(count).map(|_| ()),
        What::Blackout { morphs } => blackout::run(morphs).map(|_| ()),
        What::Kv { mib } => blackout::serve(mib),
        What::Farm { dir, first, count } => farm::run(&dir, first, count),
        What::Daemon { dir, count, config, socket } => daemon::run(dir, count, config, socket),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kmorph-bench: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Morphs whose interruption is measured.
const MORPHS: usize = 60;

fn all(count: u16, stand_ins: u16, seconds: u64, rounds: u32) -> Result<()> {
    process::raise_descriptors()?;
    let mut kept = scale::run(count, seconds, rounds)?;
    kept &= stand_ins::run(stand_ins)?;
    kept &= blackout::run(MORPHS)?;
    if kept { Ok(()) } else { Err("a promise of SPECIFICATION.md was not kept".into()) }
}

/// One line of the table.
fn row(name: &str, measured: &str, promise: &str) {
    println!("  {name:<52} {measured:<34} {promise}");
}
