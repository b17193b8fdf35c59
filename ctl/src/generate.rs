//! Manual pages and completions, made from the same definition as `--help`.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use kmorph_control::{ErrorKind, OpError};

use crate::args::{Args, Generate};

/// Write them into a folder.
pub fn run(what: Generate, dir: &Path) -> Result<(), OpError> {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        match what {
            Generate::Man => clap_mangen::generate_to(Args::command(), dir),
            Generate::Completions => {
                for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                    clap_complete::generate_to(shell, &mut Args::command(), "kmorphctl", dir)?;
                }
                Ok(())
            }
        }
    };
    write().map_err(|e| OpError::new(ErrorKind::Internal, format!("cannot write to {}: {e}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_shell_its_completions() {
        let d = tempfile::tempdir().unwrap();
        run(Generate::Man, d.path()).unwrap();
        for page in
            ["kmorphctl.1", "kmorphctl-spawn.1", "kmorphctl-daemon-start.1", "kmorphctl-recovery-log.1"]
        {
            let text = std::fs::read_to_string(d.path().join(page)).unwrap();
            assert!(text.contains("kmorphctl"), "{page}");
        }
        run(Generate::Completions, d.path()).unwrap();
        assert!(d.path().join("kmorphctl.bash").exists() && d.path().join("_kmorphctl").exists());
    }
}
