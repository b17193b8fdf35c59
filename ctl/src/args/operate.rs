//! Commands about policies, groups, maintenance, events and the configuration.

use std::path::PathBuf;

use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use kmorph_actors::Key;

use super::{Destination, format_or_file, since};

#[derive(Debug, clap::Args)]
pub struct Events {
    /// Only this instance
    #[arg(long, value_name = "NAME")]
    pub instance: Option<String>,
    /// Only this incident
    #[arg(long, value_name = "NUMBER")]
    pub incident: Option<u64>,
    /// Only since then: a duration (10m, 2h) or a time (2026-01-31T12:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub since: Option<u64>,
    /// Go on as they happen
    #[arg(long, short)]
    pub follow: bool,
}

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Show every setting, its value and where it comes from
    Show {
        /// Of this instance; without it, the defaults
        #[arg(long, value_name = "NAME")]
        instance: Option<String>,
    },
    /// Change a setting of an instance
    #[command(after_help = settings())]
    Set {
        /// Setting
        #[arg(value_parser = keys(), hide_possible_values = true)]
        key: String,
        /// Instance name
        instance: String,
        /// Value
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Leave a setting of an instance to the configuration again
    #[command(after_help = settings())]
    Unset {
        /// Setting
        #[arg(value_parser = keys(), hide_possible_values = true)]
        key: String,
        /// Instance name
        instance: String,
    },
    /// Write what operators set, as YAML that import and the configuration read
    Export {
        /// File to write, as with --output
        #[arg(hide = true)]
        file: Option<PathBuf>,
        /// File to write (default: standard output); the words table and json are formats here too, so a file of such
        /// a name is written ./json
        // It has the name of the global option and replaces it here.
        #[arg(long, short = 'o', value_parser = format_or_file(), default_value = "table", hide_default_value = true,
              value_name = "FILE")]
        output: Destination,
    },
    /// Replace what operators set of the instances named in a file; all or nothing
    Import {
        /// File, as export wrote it
        file: PathBuf,
        /// Only show what would change
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Group {
    /// List groups
    List,
    /// Show one group and its members, in start order
    Show {
        /// Group name
        group: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Maintenance {
    /// From now on watch the instance and do not act: breakpoints and experiments accuse nobody
    On {
        /// Instance name
        instance: String,
    },
    /// Act again
    Off {
        /// Instance name
        instance: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read the configuration as kmorphd would, without a daemon, and show what differs from the defaults
    ///
    /// Every mistake is shown with file, line, column, key and what is allowed there (exit code 6).
    Check {
        /// Configuration file; its drop-ins lie in <FILE>.d (default: the one kmorphd reads)
        file: Option<PathBuf>,
    },
}

fn keys() -> PossibleValuesParser {
    PossibleValuesParser::new(Key::ALL.map(Key::name))
}

/// What there is to set.
fn settings() -> String {
    let lines = Key::ALL.map(|k| format!("  {:<18} {} ({})", k.name(), k.help(), k.allowed()));
    format!("Settings, what they are for and what they take:\n{}", lines.join("\n"))
}
