//! kmorphd: the supervisor of a multikernel machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    kmorphd::main(kmorphd::Wrap::default())
}
