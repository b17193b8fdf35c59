//! The commands of criu. Each writes its log into the folder of its images.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Most bytes of an unlinked file that is taken along.
const GHOST_LIMIT: &str = "64M";
/// Lines of a log that are shown when something fails.
const LINES: usize = 20;
/// Seconds criu may take to stop the processes.
const TIMEOUT: &str = "5";

/// Where criu is.
pub struct Criu {
    pub program: PathBuf,
}

impl Criu {
    fn run(&self, what: &str, images: &Path, args: &[&str]) -> Result<(), String> {
        std::fs::create_dir_all(images).map_err(|e| format!("{}: {e}", images.display()))?;
        let log = format!("{what}.log");
        let done = Command::new(&self.program)
            .arg(what)
            .arg("--images-dir")
            .arg(images)
            .args(["--log-file", &log, "-v1", "--manage-cgroups=ignore"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let status = done.map_err(|e| format!("{}: {e}", self.program.display()))?;
        if status.success() {
            return Ok(());
        }
        let said = std::fs::read_to_string(images.join(&log)).unwrap_or_default();
        self.say(&said);
        // The last one says only that it failed. What is harmless comes first.
        let errors: Vec<&str> = said.lines().filter_map(|l| l.split_once("Error ")).map(|(_, e)| e).collect();
        let why = match errors.as_slice() {
            [.., cause, _] => cause,
            [only] => only,
            [] => "its log says nothing",
        };
        Err(format!("criu {what}: {status}: {}", why.trim()))
    }

    /// The end of a log, for the console: each line is a write of its own.
    fn say(&self, log: &str) {
        let lines: Vec<&str> = log.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(LINES)) {
            // There is nobody to be told that it cannot be told.
            let _ = std::io::stderr().write_all(format!("criu: {line}\n").as_bytes());
        }
    }

    /// Write down what memory the processes have while they go on. `before`: the round before this one.
    pub fn pre_dump(&self, pid: i32, images: &Path, before: Option<u32>) -> Result<(), String> {
        let (pid, before) = (pid.to_string(), before.map(|n| format!("../{n}")));
        let mut args = vec!["--tree", &pid, "--track-mem"];
        if let Some(before) = &before {
            args.extend(["--prev-images-dir", before]);
        }
        self.run("pre-dump", images, &args)
    }

    /// Stop the processes and write down everything that changed since.
    pub fn dump(&self, pid: i32, images: &Path, before: Option<u32>) -> Result<(), String> {
        let (pid, before) = (pid.to_string(), before.map(|n| format!("../{n}")));
        let mut args = vec!["--tree", &pid, "--leave-stopped", "--track-mem"];
        args.extend(["--ghost-limit", GHOST_LIMIT, "--timeout", TIMEOUT]);
        if let Some(before) = &before {
            args.extend(["--prev-images-dir", before]);
        }
        self.run("dump", images, &args)
    }

    /// Bring the processes back, stopped.
    pub fn restore(&self, images: &Path) -> Result<(), String> {
        self.run("restore", images, &["--restore-detached", "--leave-stopped"])
    }
}
