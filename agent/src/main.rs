//! kmorph-agent: the part of kmorph inside an instance.
//!
//! kmorphd boots every instance with `rdinit=` at this program. As PID 1 it loads the substrate
//! modules, leaves a child that answers the Kernel Morphing Protocol on vsock port 9000, and becomes
//! the user's own init. The user's initramfs needs to know nothing of it.

mod clock;
mod end;
mod fork;
mod guardian;
mod init;
mod kmsg;
mod metrics;
mod modules;
mod serve;
mod stage1;
mod stand_in;
mod state;
mod topology;

use std::io::Write;
use std::process::ExitCode;

const HELP: &str = concat!(
    "kmorph-agent ",
    env!("CARGO_PKG_VERSION"),
    r#"

Started by kmorphd as the first process of a kernel instance (rdinit=/.kmorph/agent). By hand:

  kmorph-agent fault --dir DIR ID FAULT...
        Make a stand-in of the process platform misbehave. DIR is the run-time folder of the daemon.

          panic [REASON...]    report a panic and stop, as a dead kernel does, until fenced
          park [HOW...]        stop as a kernel that halts or reboots
          crash                the process is gone at once
          hang                 pulse and agent stop; the process stays
          agent-hang           the agent stands still, the pulse goes on
          agent-exit [stay]    the agent ends; its guardian starts it again, with "stay" not until recover
          slow MS              every answer is late
          lie                  wrong incarnation, wrong sequences, absurd metrics
          flood                frames nobody asked for, as fast as it can
          die-mid-message      half of the next heartbeat answer, then crash
          half-open            connections are accepted and never answered
          pulse-stop           the agent answers, the pulse stands still
          recover              end slow, lie, flood, half-open, pulse-stop, agent-hang and "agent-exit stay"

        A stand-in's kernel command line orders the same at its start, with ":" for spaces:
          kmorph.fault=panic:out_of_luck@200ms   kmorph.fault=slow:300   kmorph.fault=never-serve

  kmorph-agent stand-in --dir DIR --id N --incarnation N --name NAME --pulse-period-ms MS --cpus N
                        [--memory BYTES] [--release TEXT] -- CMDLINE
        Be a stand-in. Started by kmorphd; DIR is the folder of the instance.

  kmorph-agent --help | --version
"#
);

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return stage1::run();
    }
    let args: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    match args.first().map(String::as_str) {
        Some("stand-in") => stand_in::run(&args[1..]),
        Some("fault") => stand_in::order(&args[1..]),
        Some("--help" | "-h" | "help") => say(HELP),
        Some("--version" | "-V") => say(concat!("kmorph-agent ", env!("CARGO_PKG_VERSION"), "\n")),
        _ => usage("it does nothing when started without one of these"),
    }
}

fn say(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Say what is wrong with the arguments.
fn usage(wrong: &str) -> ExitCode {
    // Nothing can be done when even this cannot be written.
    let _ = write!(std::io::stderr(), "kmorph-agent: {wrong}\n\n{HELP}");
    ExitCode::from(2)
}
