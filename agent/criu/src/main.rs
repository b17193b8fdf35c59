//! Runs a program that knows nothing of kmorph and takes it along in a morph: `criu` writes down its processes when they
//! are to stand still and brings them back, stopped, in the new kernel before the commit. See docs/state.md.

mod criu;
mod process;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use kmorph_state::hook;

use criu::Criu;
use workload::Program;

/// Run a program and take it along, unmodified, when kmorph replaces the kernel under it
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Name of the workload, unique in its kernel [default: name of the program]
    #[arg(long)]
    name: Option<String>,
    /// Process id the program gets; that one and those that follow must be free in every kernel
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(i32).range(300..4_000_000))]
    pid: i32,
    /// Folder for images; in memory
    #[arg(long, default_value = "/run/kmorph-criu")]
    dir: PathBuf,
    /// The criu to use
    #[arg(long, default_value = "criu")]
    criu: PathBuf,
    /// Most bytes of images and files together, MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    limit: u64,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    program: Vec<String>,
}

#[allow(clippy::print_stderr)] // nobody else hears it
fn main() -> ExitCode {
    let args = Args::parse();
    let named = args.program.first().map(PathBuf::from).unwrap_or_default();
    let named = named.file_name().map(|n| n.to_string_lossy().into_owned());
    let name = args.name.or(named).unwrap_or_default();
    if !kmorph_state::wire::is_name(&name) {
        eprintln!("kmorph-criu: {name:?} is no name of a workload: give one with --name");
        return ExitCode::from(2);
    }
    let criu = Criu { program: args.criu };
    let program = Program::new(&name, criu, &args.dir.join(&name), args.pid, args.limit << 20, args.program);
    let program = Arc::new(program);
    hook::run(&*program, &hook::address(), &mut |error| {
        // One write: the kernel's log makes a line of each.
        let line = format!("kmorph-criu: {name}: {error}\n");
        eprint!("{line}");
    })
}
