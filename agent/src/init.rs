//! Whether the user's init runs.
//!
//! A kernel panics when its init ends. An agent that answered before an init that ends at once has done so would have
//! kmorphd say that the kernel came up. So the first agent of a kernel answers nobody before PID 1 has become the
//! user's init and that waits for something, as every init does soon. One that only works is believed to run in the end.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::sleep;

use crate::kmsg;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// An init that was not seen waiting in so many looks (1 s) runs as well. Looks are counted and not time, which passes for
/// the agent while the init gets no CPU.
const LOOKS: u32 = 500;

/// The state in a line of `/proc/<pid>/stat` (proc_pid_stat(5)). The name before it is in parentheses and may hold anything,
/// parentheses and spaces included.
fn state(line: &str) -> Option<&str> {
    line.rsplit_once(')')?.1.split_ascii_whitespace().next()
}

/// Look at a process until it waits for something; how often that was needed.
async fn settled(stat: PathBuf) -> Result<u32, String> {
    for looks in 1..LOOKS {
        let line =
            std::fs::read_to_string(&stat).map_err(|e| format!("cannot read {}: {e}", stat.display()))?;
        let state = state(&line).ok_or_else(|| format!("{}: no state in {line:?}", stat.display()))?;
        if state == "S" {
            return Ok(looks);
        }
        sleep(LOOK).await;
    }
    Ok(LOOKS)
}

/// Wait until the user's init runs. `begun` is the end of a pipe that PID 1 alone holds the other end of until it
/// becomes the init, or knows that it will not; `proc` is a procfs.
pub async fn runs(begun: OwnedFd, proc: &Path) {
    let wait = async {
        let mut begun = Receiver::from_owned_fd(begun).map_err(|e| e.to_string())?;
        // Nobody writes: it ends.
        begun.read(&mut [0u8]).await.map_err(|e| e.to_string())?;
        settled(proc.join("1/stat")).await
    };
    if let Err(e) = wait.await {
        kmsg::log(kmsg::ERROR, &format!("it cannot be told whether the init runs: {e}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that is ended with the test.
    struct Runs(Child);

    impl Runs {
        /// A shell that has done `echo` and goes on with `then`.
        fn script(then: &str) -> Runs {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("echo; {then}")]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut runs = Runs(shell.spawn().unwrap());
            runs.0.stdout.as_mut().unwrap().read_exact(&mut [0u8]).unwrap();
            runs
        }

        fn stat(&self) -> PathBuf {
            format!("/proc/{}/stat", self.0.id()).into()
        }
    }

    impl Drop for Runs {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn reads_the_state_whatever_the_name_is() {
        assert_eq!(state("1 (init) S 0 1 1"), Some("S"));
        assert_eq!(state("1 (a) S (b) R 0 1 1"), Some("R"));
        for bad in ["", "1 (init", "1 (init)", "1 (init) "] {
            assert_eq!(state(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn one_that_waits_runs_and_one_that_works_runs_in_the_end() {
        assert!(settled(Runs::script("read line").stat()).await.unwrap() < LOOKS);
        let busy = Runs::script("while :; do :; done");
        tokio::time::pause();
        assert_eq!(settled(busy.stat()).await, Ok(LOOKS));
    }

    #[tokio::test]
    async fn one_that_is_gone_does_not_run() {
        let mut ended = Command::new("true").spawn().unwrap();
        let stat = PathBuf::from(format!("/proc/{}/stat", ended.id()));
        assert!(ended.wait().unwrap().success());
        let gone = settled(stat).await.unwrap_err();
        assert!(gone.contains("cannot read"), "{gone}");
    }

    #[tokio::test]
    async fn is_not_looked_for_before_pid_1_let_go() {
        let (begun, held) = nix::unistd::pipe().unwrap();
        tokio::time::pause();
        let waits = tokio::spawn(async { runs(begun, Path::new("/nowhere")).await });
        sleep(LOOK * LOOKS * 2).await;
        assert!(!waits.is_finished());
        drop(held);
        waits.await.unwrap();
    }
}
