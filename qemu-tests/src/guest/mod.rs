//! Inside the primary kernel: what scenarios are written with.

pub mod handover;
pub mod journal;
pub mod kv;
pub mod pingpong;
pub mod relay;
pub mod shared;
pub mod tool;
pub mod window;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kmorph_control::{
    Client, DaemonView, HeartbeatView, InstanceState, InstanceView, Next, RecoveryLogArgs, RecoveryStep,
    Request,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::host::{RESULT, STORY, STUCK};
use crate::{Context, Result, scenarios};

/// The daemon's socket.
const SOCKET: &str = "/run/kmorph/kmorphd.sock";
/// What instances run.
pub const WORKLOAD: &str = "/boot/workload.img";
/// What instances run whose workload is written in Python.
pub const PYTHON: &str = "/boot/python.img";
/// What is appended to that for programs that criu takes along.
pub const CRIU: &str = "/boot/criu.img";
/// No single command takes longer, even on a loaded host.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// A command that takes longer than any boot is worth a look at what every CPU does.
const STUCK_AFTER: Duration = Duration::from_secs(18);

/// Run a scenario and say how it ended.
pub fn run(name: &str) -> Result<()> {
    let verdict = scenarios::ALL
        .iter()
        .find(|s| s.name == name)
        .ok_or_else(|| format!("no scenario {name:?}"))
        .and_then(|s| (s.guest)(&Guest::new()?));
    match verdict {
        Ok(()) => println!("{RESULT}ok"),
        Err(e) => {
            if let Ok(log) = std::fs::read_to_string("/run/kmorph/kmorphd.log") {
                let lines: Vec<&str> = log.lines().collect();
                for line in &lines[lines.len().saturating_sub(60)..] {
                    println!("kmorphd: {line}");
                }
            }
            println!("{RESULT}{}", e.replace('\n', " / "));
            consoles();
        }
    }
    Ok(())
}

/// The end of every instance's kernel log, for who reads the console of a failed run.
fn consoles() {
    let Ok(dir) = std::fs::read_dir("/var/lib/kerf/instances") else { return };
    for name in dir.filter_map(|e| Some(e.ok()?.path().file_stem()?.to_string_lossy().into_owned())) {
        let Ok(out) = Command::new("kmorphctl").args(["console", &name]).output() else { continue };
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(150)..] {
            println!("{name}: {line}");
        }
    }
}

/// What a command did.
pub struct Done {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

async fn drain(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) -> std::io::Result<()> {
    match from {
        Some(mut from) => from.read_to_end(into).await.map(|_| ()),
        None => Ok(()),
    }
}

/// A scenario's hands and eyes.
pub struct Guest {
    rt: Runtime,
    began: Instant,
}

impl Guest {
    fn new() -> Result<Guest> {
        let rt = Runtime::new().context("start tokio")?;
        let began = rt.block_on(async { Instant::now() });
        Ok(Guest { rt, began })
    }

    /// Run something asynchronous.
    pub fn wait<T>(&self, f: impl Future<Output = T>) -> T {
        self.rt.block_on(f)
    }

    /// Have something go on beside the scenario.
    pub fn beside<T: Send + 'static>(&self, f: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.rt.spawn(f)
    }

    /// Between two looks at something that gives no event.
    pub fn pause(&self, time: Duration) {
        self.wait(async { tokio::time::sleep(time).await });
    }

    /// Kill the daemon and wait until it is gone.
    pub fn kill_daemon(&self) -> Result<()> {
        let pid = self.daemon()?.pid;
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).context("kill the daemon")?;
        self.gone(pid)
    }

    /// Wait until a killed process is gone. Its lock and its sockets are free only when the last of its threads is.
    pub fn gone(&self, pid: u32) -> Result<()> {
        let until = Instant::now() + COMMAND_LIMIT;
        let proc = std::path::PathBuf::from(format!("/proc/{pid}"));
        let runs = || {
            let threads = std::fs::read_dir(proc.join("task")).map_or(0, Iterator::count);
            threads > 1 || proc.join("fd/0").exists()
        };
        while runs() {
            self.check(Instant::now() < until, || format!("process {pid} was killed and runs on"))?;
            self.pause(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A line of the story, with the time since it began.
    pub fn say(&self, text: &str) {
        for line in text.lines() {
            println!("{STORY}{:7.2} s  {line}", self.began.elapsed().as_secs_f64());
        }
    }

    /// A heading.
    pub fn chapter(&self, text: &str) {
        println!("{STORY}");
        println!("{STORY}--- {text}");
    }

    /// A figure for the benchmark's table: printed as it is.
    pub fn figure(&self, text: &str) {
        println!("{STORY}{text}");
    }

    /// Run a program. What it had printed when the time was up is part of the error.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<Done> {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let run = async {
            let mut child = tokio::process::Command::new(program)
                .args(args)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .context(program)?;
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            let all =
                async { tokio::try_join!(drain(stdout, &mut out), drain(stderr, &mut err), child.wait()) };
            let stuck = async {
                tokio::time::sleep(STUCK_AFTER).await;
                println!("{STUCK}{program} {}", args.join(" "));
                std::future::pending().await
            };
            tokio::select! {
                ended = timeout(COMMAND_LIMIT, all) => ended.ok().transpose().context(program),
                never = stuck => never,
            }
        };
        let ended = self.wait(run)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let Some((_, _, status)) = ended else {
            return Err(format!(
                "{program} {} took longer than {COMMAND_LIMIT:?}, after: {} {}",
                args.join(" "),
                text(&out),
                text(&err)
            ));
        };
        Ok(Done { code: status.code().unwrap_or(-1), out: text(&out), err: text(&err) })
    }

    /// Run kmorphctl, show the command and what it printed, and insist on success.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        self.say(&format!("$ kmorphctl {}", args.join(" ")));
        let done = self.command("kmorphctl", args)?;
        for line in done.out.lines().chain(done.err.lines()) {
            println!("{STORY}             {line}");
        }
        if done.code == 0 {
            Ok(done.out)
        } else {
            Err(format!("kmorphctl {} ended with {}: {}", args.join(" "), done.code, done.err.trim()))
        }
    }

    /// Run kmorphctl and insist on this exit code and on these words in its message.
    pub fn ctl_fails(&self, args: &[&str], code: i32, words: &[&str]) -> Result<String> {
        self.say(&format!("$ kmorphctl {}", args.join(" ")));
        let done = self.command("kmorphctl", args)?;
        println!("{STORY}             {} (exit code {})", done.err.trim(), done.code);
        if done.code != code {
            return Err(format!(
                "kmorphctl {}: exit code {} instead of {code}: {}",
                args.join(" "),
                done.code,
                done.err
            ));
        }
        match words.iter().find(|w| !done.err.contains(**w)) {
            Some(missing) => {
                Err(format!("kmorphctl {}: {missing:?} is not in {:?}", args.join(" "), done.err))
            }
            None => Ok(done.err),
        }
    }

    async fn call<T: serde::de::DeserializeOwned>(request: &Request) -> Result<T> {
        let mut client = Client::connect(Path::new(SOCKET)).await.map_err(|e| e.message)?;
        timeout(COMMAND_LIMIT, client.call(request))
            .await
            .map_err(|_| format!("{request:?}: no answer"))?
            .map_err(|e| e.message)
    }

    /// An instance.
    pub fn status(&self, name: &str) -> Result<InstanceView> {
        self.wait(Self::call(&Request::Status { name: name.into() }))
    }

    /// Its heartbeat counters.
    pub fn heartbeat(&self, name: &str) -> Result<HeartbeatView> {
        self.wait(Self::call(&Request::Heartbeat { name: name.into() }))
    }

    /// The daemon.
    pub fn daemon(&self) -> Result<DaemonView> {
        self.wait(Self::call(&Request::DaemonStatus))
    }

    /// Follow recoveries from the start until `enough` says so; every step so far goes to it.
    pub fn follow(
        &self,
        limit: Duration,
        mut enough: impl FnMut(&[RecoveryStep]) -> bool,
    ) -> Result<Vec<RecoveryStep>> {
        let follow = async {
            let mut client = Client::connect(Path::new(SOCKET)).await.map_err(|e| e.message)?;
            let request = Request::RecoveryLog { filter: RecoveryLogArgs::default(), follow: true };
            client.start(&request).await.map_err(|e| e.message)?;
            let mut steps = Vec::new();
            loop {
                match client.next::<RecoveryStep, ()>().await.map_err(|e| e.message)? {
                    Next::Done(()) => return Err("the recovery log ended".to_string()),
                    Next::Item(step) => steps.push(step),
                }
                if enough(&steps) {
                    return Ok(steps);
                }
            }
        };
        self.wait(async { timeout(limit, follow).await })
            .map_err(|_| format!("no end of the recovery within {limit:?}"))?
    }

    /// Wait until the instance's `n`th recovery is done; its steps.
    pub fn recovered(&self, name: &str, n: usize, limit: Duration) -> Result<Vec<RecoveryStep>> {
        let mine = |s: &RecoveryStep| s.instance == name;
        let steps =
            self.follow(limit, |all| all.iter().filter(|s| mine(s) && s.recovered.is_some()).count() >= n)?;
        let last = steps.iter().rfind(|s| mine(s) && s.recovered.is_some()).ok_or("no last step")?;
        if last.recovered != Some(true) {
            return Err(format!("{name} was not recovered: {}", last.detail));
        }
        let incident = last.incident;
        Ok(steps.into_iter().filter(|s| s.incident == incident).collect())
    }

    /// Insist that an instance is healthy.
    pub fn healthy(&self, name: &str) -> Result<InstanceView> {
        let v = self.status(name)?;
        if v.state == InstanceState::Healthy {
            Ok(v)
        } else {
            Err(format!("{name} is {}: {}", v.state, v.reason))
        }
    }

    /// Wait until an instance is healthy: a daemon that has just started has to hear of it first.
    pub fn until_healthy(&self, name: &str) -> Result<InstanceView> {
        let until = Instant::now() + COMMAND_LIMIT;
        loop {
            match self.healthy(name) {
                Err(_) if Instant::now() < until => self.pause(Duration::from_millis(20)),
                result => return result,
            }
        }
    }

    /// One line to the workload of an instance, one line back.
    pub fn tool(&self, cid: u32, line: &str) -> Result<String> {
        self.wait(async {
            let what = format!("workload of CID {cid}: {line}");
            let talk = async {
                let mut stream = tool::open_raw(cid, line).await?;
                let mut answer = String::new();
                stream.read_line(&mut answer).await.context("read the answer")?;
                Result::Ok(answer.trim().to_string())
            };
            timeout(COMMAND_LIMIT, talk).await.map_err(|_| format!("{what}: no answer"))?.context(&what)
        })
    }

    /// Write an instance's definition as kerf does.
    pub fn define(&self, name: &str, id: u16, cpus: &[u32], memory_mib: u64) -> Result<()> {
        let cells: String = cpus.iter().map(|c| format!(" 0x0 {c:#x}")).collect();
        let bytes = memory_mib << 20;
        let dts = format!(
            "/dts-v1/;\n/ {{\n\tcompatible = \"multikernel-v1\";\n\tmodel = \"{name}\";\n\tid = <{id}>;\n\tresources {{\n\t\tcpus = \
             <{}>;\n\t\tmemory-bytes = <{:#x} {:#x}>;\n\t}};\n}};\n",
            cells.trim(),
            bytes >> 32,
            bytes & 0xffff_ffff
        );
        let dir = Path::new("/var/lib/kerf/instances");
        std::fs::create_dir_all(dir).context("create the folder of instances")?;
        std::fs::write(dir.join(format!("{name}.dts")), dts).context("write a definition")
    }

    /// Configure the daemon; `extra` is YAML.
    pub fn configure(&self, extra: &str) -> Result<()> {
        std::fs::create_dir_all("/etc/kmorph").context("create /etc/kmorph")?;
        std::fs::write("/etc/kmorph/kmorphd.conf", extra).context("write the configuration")
    }

    /// CPUs online in the primary, as Linux says: "0-3".
    pub fn online(&self) -> Result<String> {
        Ok(std::fs::read_to_string("/sys/devices/system/cpu/online")
            .context("read CPUs online")?
            .trim()
            .to_string())
    }

    /// Insist on a fact.
    pub fn check(&self, fact: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
        if fact { Ok(()) } else { Err(otherwise()) }
    }

    /// Lines of the primary's kernel log that must never be there.
    pub fn kernel_is_clean(&self) -> Result<()> {
        let out = Command::new("/bin/busybox").arg("dmesg").output().context("dmesg")?;
        const BAD: &[&str] = &[
            "BUG:",
            "WARNING:",
            "lockup",
            "Oops",
            "No irq handler",
            "stall on CPU",
            "hung_task",
            "general protection",
        ];
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        match text.lines().find(|l| BAD.iter().any(|b| l.contains(b))) {
            Some(line) => Err(format!("the primary's kernel log says: {line}")),
            None => Ok(()),
        }
    }
}
