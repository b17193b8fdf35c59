//! One QEMU machine running one scenario.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use tokio::time::Instant;

use super::accel::Accel;
use super::cache::Cache;
use crate::scenarios::Scenario;
use crate::{Context, Result};

/// What kind of machine a scenario wants.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Kernel series of the primary.
    pub primary: &'static str,
    /// CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Added to the primary's command line: where instances' memory comes from.
    pub cmdline: &'static str,
}

impl Default for MachineSpec {
    fn default() -> Self {
        MachineSpec { primary: "6.1", cpus: 4, memory_mib: 2048, cmdline: "memmap=512M$0x40000000" }
    }
}

/// Lines of the scenario start with this; everything else is the kernel's.
pub const STORY: &str = "KM| ";
/// A command takes too long: see what every CPU does.
pub const STUCK: &str = "KMORPH-STUCK ";
/// How the emulator's known crash looks in a kernel's log: a trap of the kernel's code patching that memory has no more, while it
/// is still translated. The text before it differs between releases.
pub const EMULATOR_CRASH: &str = "int3: 0000 [#";
/// The scenario's verdict.
pub const RESULT: &str = "KMORPH-RESULT ";

pub struct Run {
    pub result: Result<()>,
    pub log: PathBuf,
    pub tail: String,
    pub emulator_crash: bool,
}

/// Wait for a process, and kill it when the limit is over. `true` when it ended by itself.
pub fn wait_limited(child: &mut Child, limit: Duration) -> Result<bool> {
    let until = Instant::now() + limit;
    while Instant::now() < until {
        if child.try_wait().context("wait for QEMU")?.is_some() {
            return Ok(true);
        }
        #[allow(clippy::disallowed_methods)] // a child process gives no event std can wait for with a limit
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().context("kill QEMU")?;
    child.wait().context("wait for QEMU")?;
    Ok(false)
}

/// What QEMU's monitor says of every CPU, a few times: where it is and which interrupts wait.
fn registers(monitor: &Path, cpus: u32) -> Result<String> {
    let mut stream = UnixStream::connect(monitor).context("connect to QEMU's monitor")?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).context("limit QEMU's monitor")?;
    let lapics: String = (0..cpus).map(|n| format!("info lapic {n}\n")).collect();
    for _ in 0..3 {
        write!(stream, "info registers -a\n{lapics}").context("ask QEMU's monitor")?;
    }
    let mut text = Vec::new();
    // It never ends the answer: the limit does.
    match stream.read_to_end(&mut text) {
        Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => Err(format!("QEMU's monitor: {e}")),
        _ => {
            // Not what was asked, nor registers that say nothing of where it is.
            let noise = |line: &&str| ["(qemu)", "YMM", "XMM", "FPR"].iter().any(|n| line.starts_with(n));
            let text = String::from_utf8_lossy(&text);
            Ok(text.lines().filter(|line| !noise(line)).collect::<Vec<_>>().join("\n"))
        }
    }
}

/// Of that, where each CPU was and which interrupts waited.
fn brief(registers: &str) -> String {
    let tells = |line: &&str| {
        ["CPU#", "RIP=", "ISR", "IRR", "Timer", "dumping local APIC"].iter().any(|t| line.starts_with(t))
    };
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    registers.lines().filter(tells).map(words).collect::<Vec<_>>().join(" / ")
}

/// Boot, show, and judge.
pub fn run(
    cache: &Cache,
    s: &Scenario,
    spec: &MachineSpec,
    initramfs: &Path,
    accel: Accel,
    verbose: bool,
) -> Result<Run> {
    let release = cache.release(spec.primary)?;
    let log = cache.work(&format!("{}.log", s.name));
    let mut file = std::fs::File::create(&log).context("create the log")?;
    let monitor = cache.work(&format!("{}.monitor", s.name));
    let append = format!(
        "console=ttyS0,115200 loglevel=4 panic=-1 no_ipi_broadcast=1 memmap=448K$64K {} kmorph.scenario={}",
        spec.cmdline, s.name
    );
    let mut child = Command::new("qemu-system-x86_64")
        .args(accel.args())
        .args(["-smp", &spec.cpus.to_string(), "-m", &format!("{}M", spec.memory_mib)])
        .args(["-display", "none", "-no-reboot", "-nic", "none", "-serial", "stdio"])
        .args(["-monitor", &format!("unix:{},server=on,wait=off", monitor.display())])
        .arg("-kernel")
        .arg(cache.vmlinuz(&release))
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &append])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let out = child.stdout.take().ok_or("no output of QEMU")?;
    let (send, lines) = mpsc::channel::<Vec<u8>>();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n').map_while(std::io::Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + s.limit;
    let mut verdict: Option<Result<()>> = None;
    let mut emulator_crash = false;
    let mut stuck: Option<String> = None;
    let mut tail = std::collections::VecDeque::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_string();
                writeln!(file, "{line}").context("write the log")?;
                emulator_crash |= line.contains(EMULATOR_CRASH);
                if let Some(at) = line.find(RESULT) {
                    let text = &line[at + RESULT.len()..];
                    // The first failure counts; an "ok" after it does not.
                    let this = if text.trim() == "ok" { Ok(()) } else { Err(text.trim().to_string()) };
                    verdict = Some(verdict.map_or(this.clone(), |v| v.and(this)));
                } else if line.contains(STUCK) {
                    // What hung kernels do can be seen only from outside, and only now.
                    let seen = registers(&monitor, spec.cpus).unwrap_or_else(|e| e);
                    writeln!(file, "{line}\n{seen}").context("write the log")?;
                    stuck = Some(format!("{}: {}", line.replace(STUCK, ""), brief(&seen)));
                    continue;
                } else if let Some(at) = line.find(STORY) {
                    println!("{}", &line[at + STORY.len()..]);
                } else if verbose {
                    println!("{line}");
                }
                tail.push_back(line);
                if tail.len() > 40 {
                    tail.pop_front();
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                verdict.get_or_insert_with(|| Err(format!("not done within {:?}", s.limit)));
                break;
            }
        }
    }
    wait_limited(
        &mut child,
        Duration::from_secs(if verdict.as_ref().is_some_and(Result::is_ok) { 10 } else { 0 }),
    )?;
    drop(lines);
    reader.join().map_err(|_| "the reader of QEMU's output failed".to_string())?;
    let result = verdict.unwrap_or_else(|| Err("the machine ended without a verdict".into()));
    Ok(Run {
        result: result.map_err(|why| match stuck {
            Some(seen) => format!("{why}; what took long before, and where the CPUs were: {seen}"),
            None => why,
        }),
        log,
        tail: tail.into_iter().collect::<Vec<_>>().join("\n"),
        emulator_crash,
    })
}
