//! A kernel stand-in: a process that beats, serves KMP on a Unix socket, and misbehaves on demand.
//!
//! As in a real instance there are two processes. The first plays the kernel and the agent's guardian: one
//! thread, no runtime, one wake-up a beat. It forks the second, the agent.

mod agent;
mod fault;
mod kernel;
mod order;
mod user;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use kmp::stand_in::MAX_CPUS;

use crate::{kmsg, usage};

pub use order::order;

/// What it is told at its start.
#[derive(Debug, PartialEq, Eq)]
struct Args {
    dir: PathBuf,
    id: u16,
    incarnation: u64,
    name: String,
    period: Duration,
    cpus: usize,
    memory: u64,
    release: String,
    cmdline: String,
}

fn parse(args: &[String]) -> Result<Args, String> {
    let mut out = Args {
        dir: PathBuf::new(),
        id: 0,
        incarnation: 0,
        name: String::new(),
        period: Duration::from_millis(10),
        cpus: 0,
        memory: 0,
        release: "stand-in".into(),
        cmdline: String::new(),
    };
    let mut args = args.iter();
    while let Some(option) = args.next() {
        if option == "--" {
            out.cmdline = args.by_ref().cloned().collect::<Vec<_>>().join(" ");
            break;
        }
        let value = args.next().ok_or_else(|| format!("{option} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("{option} {value}: {e}"));
        match option.as_str() {
            "--dir" => out.dir = value.into(),
            "--id" => out.id = value.parse().map_err(|e| format!("{option} {value}: {e}"))?,
            "--incarnation" => out.incarnation = number()?,
            "--name" => out.name = value.clone(),
            "--pulse-period-ms" => out.period = Duration::from_millis(number()?.clamp(1, 60_000)),
            "--cpus" => out.cpus = usize::try_from(number()?).unwrap_or(usize::MAX),
            "--memory" => out.memory = number()?,
            "--release" => out.release = value.clone(),
            _ => return Err(format!("stand-in does not know {option}")),
        }
    }
    if !out.dir.is_absolute() {
        return Err("stand-in needs --dir with the absolute path of the instance's folder".into());
    }
    if out.id == 0 || out.incarnation == 0 {
        return Err("stand-in needs --id and --incarnation, from 1".into());
    }
    if out.cpus == 0 || out.cpus > MAX_CPUS {
        return Err(format!("stand-in needs --cpus from 1 to {MAX_CPUS}"));
    }
    Ok(out)
}

/// Be a stand-in until something ends it.
pub fn run(args: &[String]) -> ExitCode {
    let args = match parse(args) {
        Ok(args) => args,
        Err(wrong) => return usage(&wrong),
    };
    kmsg::to_console();
    match kernel::Kernel::start(args) {
        Ok(kernel) => kernel.run(),
        Err(e) => {
            kmsg::log(kmsg::ERROR, &e);
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn arguments_are_taken_or_refused_by_name() {
        let line = "--dir /d/7 --id 7 --incarnation 2 --name web --pulse-period-ms 500 --cpus 2 --memory 9 \
                    --release 6.1 -- quiet --id 9";
        let want = Args {
            dir: "/d/7".into(),
            id: 7,
            incarnation: 2,
            name: "web".into(),
            period: Duration::from_millis(500),
            cpus: 2,
            memory: 9,
            release: "6.1".into(),
            cmdline: "quiet --id 9".into(),
        };
        assert_eq!(parse(&words(line)).unwrap(), want);
        for (line, wrong) in [
            ("--dir", "--dir needs a value"),
            ("--id x", "--id x"),
            ("--id 70000", "--id 70000"),
            ("--what 1", "does not know --what"),
            ("--dir d --id 1 --incarnation 1 --cpus 1", "absolute"),
            ("--dir /d --id 1 --cpus 1", "--incarnation"),
            ("--dir /d --id 1 --incarnation 1 --cpus 65", "1 to 64"),
        ] {
            let text = parse(&words(line)).unwrap_err();
            assert!(text.contains(wrong), "{line}: {text}");
        }
    }
}
