//! The command that replaces a running kernel.

use std::path::PathBuf;

use clap::Subcommand;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Morph {
    #[command(subcommand)]
    pub step: Option<MorphStep>,
    /// Instance name
    #[arg(required = true)]
    pub instance: Option<String>,
    /// The new kernel: a 64-bit bzImage
    #[arg(long, value_name = "VMLINUZ", required = true)]
    pub kernel: Option<PathBuf>,
    #[command(flatten)]
    pub new: NewKernel,
    /// Commit at once when the new kernel is valid; without it, stop there and wait for `morph commit`
    #[arg(long)]
    pub auto_commit: bool,
    /// Only say whether it could begin, and what the new kernel would get
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub struct NewKernel {
    /// Its command line, added to what the platform needs (default: that of the old kernel)
    #[arg(long, value_name = "WORDS")]
    pub kernel_cmdline: Option<String>,
    /// Its initramfs (default: that of the old kernel)
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// Physical ids of the CPUs it starts with, one at least (default: any that no instance has). What is missing of the
    /// instance's number it gets of the old kernel
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub cpus: Vec<u32>,
    /// Memory it starts with, like 128M; the rest it gets of the old kernel (default: all of it, if there is room)
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    pub memory: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub enum MorphStep {
    /// Start the new kernel beside the old one, which goes on serving
    Prepare {
        /// Instance name
        instance: String,
        /// The new kernel: a 64-bit bzImage
        #[arg(long, value_name = "VMLINUZ")]
        kernel: PathBuf,
        #[command(flatten)]
        new: NewKernel,
        /// Only say whether it could begin, and what the new kernel would get
        #[arg(long)]
        dry_run: bool,
    },
    /// Check that the new kernel is healthy and can take over
    Validate {
        /// Instance name
        instance: String,
    },
    /// Have the new kernel take over and stop the old one; validates before
    Commit {
        /// Instance name
        instance: String,
    },
    /// Stop the new kernel and go on with the old one
    #[command(visible_alias = "cancel")]
    Rollback {
        /// Instance name
        instance: String,
    },
    /// Show the morph that is under way
    Status {
        /// Instance name
        instance: String,
    },
    /// Morph the members of a group, together (all are validated before the first is committed) or one by one
    Group {
        /// Group name
        group: String,
        /// The new kernel: a 64-bit bzImage; without it, go on with the morphs that are under way
        #[arg(long, value_name = "VMLINUZ", required_unless_present_any = ["commit", "rollback"])]
        kernel: Option<PathBuf>,
        /// Commit all when all are valid
        #[arg(long, visible_alias = "auto-commit")]
        commit: bool,
        /// Prepare, validate and commit each before the next begins, after its clients were moved to the others; when one
        /// fails, those before it get their former kernel back. Needs CPUs and memory for one new kernel only
        #[arg(long, requires = "kernel", conflicts_with = "rollback")]
        one_by_one: bool,
        /// Roll all back
        #[arg(long, conflicts_with_all = ["kernel", "commit"])]
        rollback: bool,
    },
}
