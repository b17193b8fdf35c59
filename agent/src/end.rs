//! Ending the workload in order, as shutdown does: everyone is told, who does not end in time is killed, what is dirty is
//! written. PID 1 gets no signal: its end would be a panic.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid, sync};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout_at};

/// Part of the grace after which those who still run are killed.
const ENDED_BY: f64 = 0.6;
/// Part of the grace after which nothing is waited for any more: the answer has to come within it.
const SYNCED_BY: f64 = 0.8;
/// Between the first two looks at who still runs; it doubles with each.
const LOOK: Duration = Duration::from_millis(5);
/// Longest time between two.
const LOOK_LAST: Duration = Duration::from_millis(80);

/// A process that was told to end.
#[derive(Debug)]
struct Told {
    pid: i32,
    /// In ticks since boot: the number may be another's afterwards.
    began: u64,
}

/// When a process began, by its line in `/proc/<pid>/stat` (proc_pid_stat(5)); `None` when it has ended.
fn began(line: &str) -> Option<u64> {
    // The name is in parentheses and may hold anything, parentheses and spaces included.
    let mut words = line.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = words.next()?;
    // The state was the 3rd field, this is the 22nd.
    let began = words.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(began)
}

impl Told {
    fn new(proc: &Path, pid: i32) -> Option<Told> {
        let line = std::fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        Some(Told { pid, began: began(&line)? })
    }

    fn runs(&self, proc: &Path) -> bool {
        Told::new(proc, self.pid).is_some_and(|now| now.began == self.began)
    }

    fn signal(&self, signal: Signal) -> bool {
        kill(Pid::from_raw(self.pid), signal).is_ok()
    }
}

/// Every process but kernel threads, PID 1, the guardian and this one.
fn others(proc: &Path) -> Vec<Told> {
    let Ok(entries) = std::fs::read_dir(proc) else { return vec![] };
    entries
        .filter_map(|e| e.ok()?.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| is_other(*pid, Pid::this(), getppid()))
        .filter(|pid| std::fs::read(proc.join(pid.to_string()).join("cmdline")).is_ok_and(|c| !c.is_empty()))
        .filter_map(|pid| Told::new(proc, pid))
        .collect()
}

/// The guardian is the agent's parent.
fn is_other(pid: i32, agent: Pid, guardian: Pid) -> bool {
    pid > 1 && pid != agent.as_raw() && pid != guardian.as_raw()
}

/// Wait until these have ended, not longer than until then, and kill those who have not; how many that were.
async fn end(proc: &Path, mut told: Vec<Told>, until: Instant) -> usize {
    let mut look = LOOK;
    loop {
        told.retain(|p| p.runs(proc));
        let now = Instant::now();
        if told.is_empty() || now >= until {
            break;
        }
        sleep(look.min(until - now)).await;
        look = (look * 2).min(LOOK_LAST);
    }
    told.retain(|p| p.signal(Signal::SIGKILL));
    told.len()
}

/// End everything but PID 1 within this time; what was done, for the daemon's log.
pub async fn workload(proc: &Path, grace: Duration) -> String {
    let now = Instant::now();
    let mut all = others(proc);
    all.retain(|p| p.signal(Signal::SIGTERM));
    let told = all.len();
    // Most is written by the time they have ended; and an init that ends with them ends the kernel.
    let first = spawn_blocking(sync);
    let killed = end(proc, all, now + grace.mul_f64(ENDED_BY)).await;
    let all = async { (first.await, spawn_blocking(sync).await) };
    let synced = timeout_at(now + grace.mul_f64(SYNCED_BY), all).await.is_ok();
    let killed = if killed > 0 { format!(", {killed} of them killed") } else { String::new() };
    let synced = if synced { "synced" } else { "not synced in time" };
    format!("{told} processes told to end{killed}, file systems {synced}")
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    const PROC: &str = "/proc";

    /// A shell that has set this trap and waits.
    fn shell(trap: &str) -> Child {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("trap '{trap}' TERM; echo; read line; read line")]);
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0u8]).unwrap();
        child
    }

    /// It, told to end.
    fn told(child: &Child) -> Vec<Told> {
        let told = Told::new(Path::new(PROC), child.id() as i32).unwrap();
        assert!(told.signal(Signal::SIGTERM));
        vec![told]
    }

    #[test]
    fn the_guardian_is_spared() {
        let (agent, guardian) = (Pid::from_raw(70), Pid::from_raw(69));
        let others: Vec<i32> = (0..72)
            .filter(|pid| *pid >= 68 || *pid < 3)
            .filter(|pid| is_other(*pid, agent, guardian))
            .collect();
        assert_eq!(others, [2, 68, 71]);
    }

    #[test]
    fn a_process_is_known_by_its_beginning() {
        let line = "7 (a) Z (b) S 1 7 7 0 -1 4194560 1 2 3 4 17 5 8 9 20 0 1 0 4711 2";
        assert_eq!(began(line), Some(4711));
        assert_eq!(began(&line.replace(" S ", " Z ")), None);
        assert_eq!(began("7 (a) S 1 7 7 0"), None);
        let own = Told::new(Path::new(PROC), std::process::id() as i32).unwrap();
        assert!(own.runs(Path::new(PROC)));
        assert!(!Told { began: own.began + 1, ..own }.runs(Path::new(PROC)));
    }

    #[tokio::test]
    async fn who_ends_in_time_is_waited_for_and_who_does_not_is_killed() {
        let until = Instant::now() + Duration::from_secs(60);
        let mut polite = shell("exit 3");
        assert_eq!(end(Path::new(PROC), told(&polite), until).await, 0);
        assert!(Instant::now() < until);
        assert_eq!(polite.wait().unwrap().code(), Some(3));

        let mut deaf = shell("");
        assert_eq!(end(Path::new(PROC), told(&deaf), Instant::now() + 20 * LOOK).await, 1);
        assert_eq!(deaf.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    }
}
