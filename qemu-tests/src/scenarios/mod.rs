//! The scenarios. To add one: a file with a `SCENARIO`, and its name here.

mod bad_input;
mod bench;
mod blackout;
mod boot_failures;
mod boots;
mod criu;
mod documentation;
mod failures;
mod handover;
mod high_memory;
mod morph;
mod morph_group;
mod offlined;
mod readopt;
mod rounds;
mod soak;
mod sockets;
mod standby;
mod state;
mod state_languages;
mod story;
mod substrate;
mod supervision;
mod swapped;
mod switch;
mod takeover;
mod transfer;
mod transport;
mod two_cpus;
mod window;

use std::time::Duration;

use crate::Result;
use crate::guest::Guest;
use crate::host::MachineSpec;

/// Configuration for scenarios that fail one instance more often than an operator would stand.
const OFTEN: &str =
    "recovery:\n  boot-timeout: 45s\n  restart-intensity: 1000\n  restart-period: 1s\n  restart-delay: 1ms\n";

/// A story told on one machine.
pub struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Whether `run` without names includes it.
    pub in_run: bool,
    /// The machine.
    pub machine: fn() -> MachineSpec,
    /// What happens inside its primary kernel.
    pub guest: fn(&Guest) -> Result<()>,
    /// Longest it may take.
    pub limit: Duration,
}

/// All of them, in the order they run.
pub const ALL: &[&Scenario] = &[
    &story::SCENARIO,
    &substrate::SCENARIO,
    &substrate::ON_NEWER,
    &swapped::SCENARIO,
    &two_cpus::SCENARIO,
    &high_memory::SCENARIO,
    &offlined::SCENARIO,
    &boot_failures::SCENARIO,
    &bad_input::SCENARIO,
    &readopt::SCENARIO,
    &handover::SCENARIO,
    &handover::ON_NEWER,
    &morph::SCENARIO,
    &morph_group::SCENARIO,
    &switch::SCENARIO,
    &standby::SCENARIO,
    &state::SCENARIO,
    &state::HANDOVER,
    &takeover::SCENARIO,
    &failures::SCENARIO,
    &state_languages::SCENARIO,
    &criu::SCENARIO,
    &supervision::SCENARIO,
    &supervision::KILLED,
    &rounds::SCENARIO,
    &sockets::SCENARIO,
    &sockets::AGAIN,
    &soak::SCENARIO,
    &documentation::SCENARIO,
    &bench::SCENARIO,
    &blackout::SCENARIO,
    &transfer::SCENARIO,
    &transport::SCENARIO,
    &boots::SCENARIO,
    &failures::PARTS[0],
    &failures::PARTS[1],
    &failures::PARTS[2],
    &failures::PARTS[3],
];
