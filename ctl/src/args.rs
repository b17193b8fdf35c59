//! The command line.

mod morph;
mod operate;

use std::path::PathBuf;

use clap::builder::{EnumValueParser, PathBufValueParser, TypedValueParser, ValueParser};
use clap::{Parser, Subcommand, ValueEnum};

pub use morph::{Morph, MorphStep, NewKernel};
pub use operate::{ConfigCommand, Events, Group, Maintenance, Policy};

const AFTER: &str = "\
A first session:
  kmorphctl daemon start
  kmorphctl spawn web-server --kernel=/boot/vmlinuz-6.1 --heartbeat-timeout=1
  kmorphctl list
  kmorphctl recovery-log --instance=web-server
  kmorphctl policy set heartbeat-timeout web-server 2s
  kmorphctl events --follow

Exit codes: 0 done; 1 internal error; 2 wrong usage; 3 not found; 4 the state does not allow it; 5 a CPU, memory
or name is taken; 6 a definition, image, configuration or policy is not usable; 7 not permitted; 8 not in time; 9 the kernel did not
come up; 10 not every CPU could be seen stopped, nothing was taken back; 11 versions differ; 12 no daemon answers;
13 a morph was rolled back.";

/// Run, watch and heal the kernels of a multikernel machine.
///
/// kmorphctl talks to kmorphd over its control socket. Instances are defined with kerf (device trees under
/// /var/lib/kerf/instances); kmorph starts a kernel in each, watches it, and restarts it when it dies.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER, max_term_width = 110)]
pub struct Args {
    /// Control socket of the daemon (default: /run/kmorph/kmorphd.sock; for other users than root the one in
    /// $XDG_RUNTIME_DIR/kmorph when there is a daemon of their own)
    #[arg(long, global = true, env = "KMORPH_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// How results are printed: for people or as JSON
    #[arg(long, short = 'o', global = true, value_parser = format(), default_value = "table", value_name = "FORMAT")]
    output: Destination,

    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// How results are printed.
    pub fn format(&self) -> Format {
        match self.output {
            Destination::Format(format) => format,
            Destination::File(_) => Format::Table,
        }
    }
}

/// What `--output` says. `policy export` takes a file there, all others a format. It is one type, because clap copies
/// the value of a global option up and down between a command and its subcommands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A format; the result is printed.
    Format(Format),
    /// A file for the result.
    File(PathBuf),
}

fn format() -> ValueParser {
    EnumValueParser::<Format>::new().map(Destination::Format).into()
}

/// A word that is a format stays one: a file of that name is written `./json`.
pub(super) fn format_or_file() -> ValueParser {
    PathBufValueParser::new()
        .map(|path| match path.to_str().map(|word| <Format as ValueEnum>::from_str(word, false)) {
            Some(Ok(format)) => Destination::Format(format),
            _ => Destination::File(path),
        })
        .into()
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs; one document, or one a line where a stream is followed
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start, stop or look at the daemon
    #[command(subcommand)]
    Daemon(Daemon),

    /// Start a kernel in an instance that kerf defined
    ///
    /// Claims the instance's CPUs and memory, loads the kernel with the agent added to the initramfs, starts it and
    /// waits until it answers heartbeats. If it does not come up, everything is given back and the end of its log is
    /// shown.
    Spawn(Spawn),

    /// List instances
    List {
        /// CPUs, memory, heartbeat and kernel image too
        #[arg(long, short)]
        verbose: bool,
    },

    /// Replace the kernel of a running instance by another
    ///
    /// The new kernel is started beside the old one on CPUs and memory of its own, and validated. Committed, it takes
    /// the instance over, and the old one is stopped and gives back what it had; until then everything can be rolled
    /// back, and is when anything fails. In one command, or step by step.
    Morph(Morph),

    /// Show one instance
    Status {
        /// Instance name
        instance: String,
    },

    /// Stop an instance and give its CPUs and memory back to the primary kernel
    ///
    /// The instance's user space is asked first, then its CPUs are stopped and seen stopped.
    Terminate {
        /// Instance name
        instance: String,
        /// Stop its CPUs at once
        #[arg(long)]
        force: bool,
    },

    /// Show heartbeat counters and round trips
    Heartbeat {
        /// Instance name
        instance: String,
    },

    /// Show what the instance's agent measured
    Health {
        /// Instance name
        instance: String,
        /// Which figures
        #[arg(long, value_enum, value_delimiter = ',', default_value = "cpu,memory,io", value_name = "LIST")]
        metrics: Vec<Metric>,
    },

    /// Send one heartbeat now
    Ping {
        /// Instance name
        instance: String,
    },

    /// Fence an instance, take its resources back and start it again
    Recover {
        /// Instance name
        instance: String,
    },

    /// Show recoveries step by step
    RecoveryLog {
        /// Only this instance
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
        /// Only since then: a duration (10m, 2h) or a time (2026-01-31T12:00:00Z)
        #[arg(long, value_name = "TIME", value_parser = since)]
        since: Option<u64>,
        /// Go on as steps are taken
        #[arg(long, short)]
        follow: bool,
    },

    /// Show what happened, and go on as it happens
    ///
    /// State changes with their cause and what is done about it, steps of recoveries, groups that act, changes of
    /// policies, and the daemon's own: started, reloaded, journal trouble.
    Events(Events),

    /// Look at and change how instances are watched and healed
    ///
    /// A setting comes from the topmost layer that has it: what an operator set, what the configuration says of the
    /// instance (policies:), the defaults (profile: and policy:). A change is in force at once, for a running instance
    /// too, and survives restarts of the daemon.
    #[command(subcommand)]
    Policy(Policy),

    /// Look at groups: instances that fail and start together
    #[command(subcommand)]
    Group(Group),

    /// Watch an instance without acting on it, while somebody works on it
    #[command(subcommand)]
    Maintenance(Maintenance),

    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),

    /// Write manual pages or shell completions (for packages)
    #[command(hide = true)]
    Generate {
        /// Which
        #[arg(value_enum)]
        what: Generate,
        /// Folder to write to
        dir: PathBuf,
    },

    /// Show an instance's kernel log, read from its memory: live, or after its death
    Console {
        /// Instance name
        instance: String,
        /// Go on as lines come
        #[arg(long, short)]
        follow: bool,
    },
}

/// What `generate` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Generate {
    /// A manual page for each command
    Man,
    /// Completions for bash, zsh and fish
    Completions,
}

#[derive(Debug, Subcommand)]
pub enum Daemon {
    /// Start kmorphd and wait until it answers
    Start {
        /// Configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The daemon's program
        #[arg(long, value_name = "PATH", env = "KMORPHD")]
        program: Option<PathBuf>,
    },
    /// Stop kmorphd; instances run on and the next daemon takes them over
    Stop {
        /// Terminate every instance first and give everything back to the primary kernel
        #[arg(long)]
        graceful: bool,
    },
    /// Read the configuration again and put what can be changed into force; no instance is touched
    ///
    /// All or nothing: a mistake anywhere leaves everything as it is. Policies, groups and history are taken up at once;
    /// what needs a restart of the daemon is named.
    Reload,
    /// Show the daemon, the machine's CPUs and the memory pool
    Status,
}

#[derive(Debug, clap::Args)]
pub struct Spawn {
    /// Instance name, as kerf defined it
    pub instance: String,
    /// The kernel: a 64-bit bzImage
    #[arg(long, value_name = "VMLINUZ")]
    pub kernel: PathBuf,
    /// Kernel command line, added to what the platform needs
    #[arg(long, value_name = "WORDS")]
    pub kernel_cmdline: Option<String>,
    /// The initramfs; without one the instance runs the agent only
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// Restart the instance after a confirmed failure, or not (default: as its policy says)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
          action = clap::ArgAction::Set)]
    pub monitor: Option<bool>,
    /// Seconds without a heartbeat until the instance is suspected
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub heartbeat_timeout: Option<f64>,
    /// Seconds the kernel may take from its start to its first heartbeat
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub boot_timeout: Option<f64>,
    /// Return as soon as the kernel was started
    #[arg(long)]
    pub no_wait: bool,
    /// Offer a service of the instance on the primary kernel: tcp:[ADDRESS:]PORT=vsock:PORT or unix:/PATH=vsock:PORT.
    /// May be given several times
    ///
    /// Clients connect to the primary and are joined to the kernel that is the instance at that moment. While it is
    /// being restarted they wait; when a morph replaces it, new connections go to the new kernel, and those there are
    /// go on with the old one until they end. Without an address the port is open on all IPv4 addresses.
    #[arg(long, value_name = "LISTEN=vsock:PORT")]
    pub publish: Vec<kmorph_control::Publish>,
    /// Memory of the pool that the workload keeps through morphs without a copy: bytes, or with K, M or G; whole 2 MiB
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0", hide_default_value = true)]
    pub handover_memory: u64,
}

/// What `health` can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// CPUs, load, pressure
    Cpu,
    /// Memory, pressure
    Memory,
    /// Delay of a small write, pressure
    Io,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if value.is_finite() && (0.05..=86_400.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{text} is out of range: 0.05 to 86400 seconds"))
    }
}

/// Milliseconds since the Unix epoch.
pub(super) fn since(text: &str) -> Result<u64, String> {
    let at = if let Ok(ago) = humantime::parse_duration(text) {
        std::time::SystemTime::now().checked_sub(ago).ok_or("that is before time began")?
    } else {
        humantime::parse_rfc3339_weak(text).map_err(|_| {
            format!("{text:?} is neither a duration like 10m nor a time like 2026-01-31T12:00:00Z")
        })?
    };
    at.duration_since(std::time::UNIX_EPOCH)
        .map(|d| d.as_millis() as u64)
        .map_err(|_| "that is before 1970".into())
}

/// Memory comes in pieces of this.
const MEMORY_STEP: u64 = 2 << 20;

/// A size in bytes, or with K, M or G behind it.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let shift = match unit {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err(format!("{unit:?} is not K, M or G")),
    };
    let number: u64 = number.parse().map_err(|_| "a size begins with a number".to_string())?;
    let bytes = number.checked_mul(1 << shift).ok_or("that is too much")?;
    if !bytes.is_multiple_of(MEMORY_STEP) {
        return Err("memory comes in pieces of 2 MiB".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn monitor_takes_a_value_and_is_left_to_the_policy_without_one() {
        let spawn = |extra: &[&str]| {
            let mut v = vec!["kmorphctl", "spawn", "a", "--kernel=/k"];
            v.extend(extra);
            match Args::try_parse_from(v).unwrap().command {
                Command::Spawn(s) => s.monitor,
                _ => unreachable!(),
            }
        };
        assert_eq!(spawn(&[]), None);
        assert_eq!(spawn(&["--monitor"]), Some(true));
        assert_eq!(spawn(&["--monitor=false"]), Some(false));
    }

    #[test]
    fn a_morph_is_one_command_or_steps() {
        let morph = |words: &[&str]| match parse(&[&["morph"], words].concat()).map(|a| a.command) {
            Ok(Command::Morph(m)) => Some((m.instance, m.auto_commit, m.step.is_some())),
            _ => None,
        };
        let web = Some("web".to_owned());
        assert_eq!(morph(&["web", "--kernel=/k"]), Some((web.clone(), false, false)));
        assert_eq!(morph(&["web", "--kernel=/k", "--auto-commit"]), Some((web, true, false)));
        for step in ["validate", "commit", "rollback", "cancel", "status"] {
            assert_eq!(morph(&[step, "web"]), Some((None, false, true)), "{step}");
        }
        assert_eq!(morph(&["prepare", "web", "--kernel=/k", "--cpus=3,4"]), Some((None, false, true)));
        for wrong in
            [&[][..], &["web"], &["prepare", "web"], &["commit"], &["web", "--kernel=/k", "commit", "x"]]
        {
            assert_eq!(morph(wrong), None, "{wrong:?}");
        }
    }

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["kmorphctl"], words].concat())
    }

    #[test]
    fn output_is_a_format_and_for_an_export_a_file_too() {
        let export = |words: &[&str]| match parse(words) {
            Ok(Args { command: Command::Policy(Policy::Export { file: None, output }), .. }) => output,
            other => panic!("{other:?}"),
        };
        let file = |name: &str| Destination::File(name.into());
        assert_eq!(export(&["policy", "export"]), Destination::Format(Format::Table));
        assert_eq!(export(&["policy", "export", "--output=/tmp/p.yaml"]), file("/tmp/p.yaml"));
        assert_eq!(export(&["policy", "export", "-o", "p"]), file("p"));
        assert_eq!(export(&["policy", "export", "--output", "./json"]), file("./json"));
        assert_eq!(export(&["policy", "export", "--output", "json"]), Destination::Format(Format::Json));
        // The option may stand before the command as everywhere.
        assert_eq!(export(&["--output", "json", "policy", "export"]), Destination::Format(Format::Json));
        assert_eq!(export(&["--output", "json", "policy", "export", "-o", "p"]), file("p"));
        assert_eq!(parse(&["policy", "export", "-o", "p"]).unwrap().format(), Format::Table);

        for words in
            [&["--output", "json", "list"][..], &["list", "-o", "json"], &["policy", "show", "-ojson"]]
        {
            assert_eq!(parse(words).unwrap().format(), Format::Json, "{words:?}");
        }
        assert_eq!(parse(&["list"]).unwrap().format(), Format::Table);
        for words in [
            &["list", "--output=/tmp/x"][..],
            &["policy", "show", "--output=x"],
            &["--output=x", "policy", "export"],
        ] {
            let e = parse(words).unwrap_err().to_string();
            assert!(e.contains("table, json"), "{e}");
        }
    }

    #[test]
    fn settings_are_known_by_name() {
        for words in [
            &["policy", "set", "heartbeat-timeout", "web", "0.5"][..],
            &["policy", "unset", "vmcore", "web"],
            // What a value may be is the daemon's to say.
            &["policy", "set", "fence-tries", "web", "-1"],
        ] {
            assert!(parse(words).is_ok(), "{words:?}");
        }
        let e = parse(&["policy", "set", "hart-beat", "web", "2"]).unwrap_err();
        assert!(e.use_stderr());
        let e = e.to_string();
        assert!(e.contains("hart-beat") && e.contains("heartbeat-timeout"), "{e}");
        assert!(parse(&["policy", "set", "vmcore", "web"]).is_err());
    }

    #[test]
    fn operators_words_are_understood() {
        match parse(&["events", "--instance=web", "--incident=3", "--since=1h", "--follow"]).unwrap().command
        {
            Command::Events(e) => {
                assert_eq!((e.instance.as_deref(), e.incident, e.follow), (Some("web"), Some(3), true));
                assert!(e.since.is_some());
            }
            other => panic!("{other:?}"),
        }
        match parse(&["policy", "import", "/tmp/p.yaml", "--dry-run"]).unwrap().command {
            Command::Policy(Policy::Import { file, dry_run }) => {
                assert_eq!((file, dry_run), (PathBuf::from("/tmp/p.yaml"), true));
            }
            other => panic!("{other:?}"),
        }
        for words in [
            &["daemon", "reload"][..],
            &["config", "check"],
            &["config", "check", "/etc/k.conf"],
            &["group", "list"],
            &["group", "show", "shop"],
            &["maintenance", "on", "web"],
            &["maintenance", "off", "web"],
            &["policy", "show"],
            &["policy", "show", "--instance", "web"],
        ] {
            assert!(parse(words).is_ok(), "{words:?}");
        }
        assert!(parse(&["maintenance", "maybe", "web"]).is_err());
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in ["0", "-1", "nan", "1e99", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
        assert_eq!(seconds("0.5"), Ok(0.5));
    }

    #[test]
    fn since_takes_durations_and_times() {
        assert_eq!(since("2026-01-31T12:00:00Z"), Ok(1_769_860_800_000));
        let now = since("0s").unwrap();
        let hour = since("1h").unwrap();
        assert!((now - hour).abs_diff(3_600_000) < 1000);
        assert!(since("yesterday").is_err());
    }

    #[test]
    fn memory_comes_in_whole_pieces() {
        for (text, bytes) in
            [("0", 0), ("4194304", 4 << 20), ("2048K", 2 << 20), ("512M", 512 << 20), ("1GiB", 1 << 30)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1", "3M", "1T", "-2M", "99999999999G"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
