//! Inside an instance: a service that does what scenarios ask, one request a connection.
//!
//! The first line of a connection says what to do. Failing on purpose happens after the answer.

use std::ffi::CString;
use std::fs::File;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::time::Duration;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::{handover, pingpong};
use crate::{Context, Result};

/// Where vsock_check serves.
pub const CHECK_PORT: u32 = 7002;
/// Where it listens.
pub const PORT: u32 = 7000;
const CHUNK: usize = 64 << 10;
/// Longest time for a request from the command line.
const ASK_LIMIT: Duration = Duration::from_secs(2);
const LISTENS_WITHIN: Duration = Duration::from_secs(60);

/// Serve for ever.
pub fn serve() -> Result<()> {
    pingpong::listen(pingpong::PORT, None)?;
    let rt = tokio::runtime::Runtime::new().context("start tokio")?;
    rt.block_on(async {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).context("listen")?;
        println!("workload: serving on vsock port {PORT}");
        loop {
            let (stream, _) = listener.accept().await.context("accept")?;
            tokio::spawn(async move {
                if let Err(e) = one(stream).await {
                    println!("workload: {e}");
                }
            });
        }
    })
}

async fn one(stream: VsockStream) -> Result<()> {
    let mut stream = BufReader::with_capacity(CHUNK, stream);
    let mut line = String::new();
    stream.read_line(&mut line).await.context("read the request")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["release"] => {
            let release =
                nix::sys::utsname::uname().context("uname")?.release().to_string_lossy().into_owned();
            answer(&mut stream, &format!("{release} {}", online())).await
        }
        // What this kernel has, KiB.
        ["memory"] => {
            let info = std::fs::read_to_string("/proc/meminfo").context("meminfo")?;
            let total = info.lines().find_map(|l| l.strip_prefix("MemTotal:")).unwrap_or_default();
            answer(&mut stream, total.trim().trim_end_matches(" kB")).await
        }
        // What its agent says of the other instances.
        ["topology"] => {
            let address = SocketAddr::from_abstract_name("kmorph-topology").context("a name")?;
            let socket = std::os::unix::net::UnixStream::connect_addr(&address).context("topology")?;
            socket.set_nonblocking(true).context("topology")?;
            let mut lines = BufReader::new(UnixStream::from_std(socket).context("topology")?).lines();
            let line = lines.next_line().await.context("topology")?.unwrap_or_default();
            answer(&mut stream, &line).await
        }
        ["crash"] => {
            last_answer(&mut stream, "crashing").await?;
            std::fs::write("/proc/sysrq-trigger", "c").context("sysrq")
        }
        ["hang"] => {
            last_answer(&mut stream, "hanging").await?;
            hang()
        }
        ["reboot"] => {
            last_answer(&mut stream, "rebooting").await?;
            reboot(RebootMode::RB_AUTOBOOT).map(|_| ()).context("reboot")
        }
        ["kill-agent"] => {
            let pid = find("kmorph-agent")?;
            kill(Pid::from_raw(pid), Signal::SIGKILL).context("kill")?;
            answer(&mut stream, &format!("killed {pid}")).await
        }
        ["stop-agent"] => {
            let pid = find("kmorph-agent")?;
            kill(Pid::from_raw(pid), Signal::SIGSTOP).context("stop")?;
            answer(&mut stream, &format!("stopped {pid}")).await
        }
        // A process that takes a while to end, and says when it has.
        ["ends-slowly"] => {
            let script = "trap 'sleep 0.5; echo workload: ended in order >/dev/kmsg; exit' TERM; echo; while :; do sleep 1; done";
            let mut shell = std::process::Command::new("/bin/busybox");
            shell.args(["sh", "-c", script]).stdout(std::process::Stdio::piped());
            let mut said = shell.spawn().context("sh")?.stdout.ok_or("no output")?;
            std::io::Read::read_exact(&mut said, &mut [0u8]).context("the shell")?;
            answer(&mut stream, "waits").await
        }
        ["hog", seconds] => {
            let seconds: u64 = seconds.parse().context("seconds")?;
            std::thread::spawn(move || {
                let until = std::time::SystemTime::now() + Duration::from_secs(seconds);
                while std::time::SystemTime::now() < until {
                    std::hint::black_box(0);
                }
            });
            answer(&mut stream, "hogging").await
        }
        ["echo"] => {
            answer(&mut stream, "go").await?;
            let mut buf = vec![0; CHUNK];
            loop {
                let n = stream.read(&mut buf).await.context("read")?;
                if n == 0 {
                    return Ok(());
                }
                stream.write_all(&buf[..n]).await.context("write")?;
            }
        }
        // Take n bytes of the pattern, check each, answer with the number of wrong ones.
        ["sink", bytes] => {
            let bytes: u64 = bytes.parse().context("bytes")?;
            answer(&mut stream, "go").await?;
            let bad = check(&mut stream, bytes).await?;
            answer(&mut stream, &format!("{bad}")).await
        }
        // Give n bytes of the pattern.
        ["source", bytes] => {
            let bytes: u64 = bytes.parse().context("bytes")?;
            answer(&mut stream, "go").await?;
            give(&mut stream, bytes).await
        }
        // Take messages of a fixed size and answer each with one byte when it is whole.
        ["messages", size, count] => {
            let (size, count): (usize, u32) =
                (size.parse().context("size")?, count.parse().context("count")?);
            answer(&mut stream, "go").await?;
            let mut buf = vec![0; size];
            for _ in 0..count {
                stream.read_exact(&mut buf).await.context("read a message")?;
                stream.write_all(&buf[..1]).await.context("acknowledge")?;
            }
            Ok(())
        }
        // Check, from here, what stream sockets to another kernel promise.
        ["vsock-check", cid] => {
            let port = CHECK_PORT.to_string();
            let run = tokio::process::Command::new("/vsock_check").args(["run", cid, &port]).output();
            let out = run.await.context("vsock_check")?;
            let text = String::from_utf8_lossy(&out.stdout).lines().collect::<Vec<_>>().join("; ");
            answer(&mut stream, &format!("{} {text}", out.status.code().unwrap_or(-1))).await
        }
        // Try to bring a CPU online; the error's name.
        ["online", cpu] => {
            let cpu: u32 = cpu.parse().context("cpu")?;
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            let tried = tokio::task::spawn_blocking(move || std::fs::write(path, "1")).await;
            let text = match tried.context("online")? {
                Ok(()) => "online".into(),
                Err(e) => format!("{:?}", nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(0))),
            };
            answer(&mut stream, &text).await
        }
        ["find", name] => answer(&mut stream, &find(name)?.to_string()).await,
        // How many numbers a file has, from 1 on, one a line.
        ["numbers", path] => {
            let text = std::fs::read_to_string(path).context(path)?;
            let wrong = (1u64..).zip(text.lines()).find(|(n, line)| *line != n.to_string());
            let text = match wrong {
                Some((n, line)) => format!("{line:?} is where {n} belongs"),
                None => text.lines().count().to_string(),
            };
            answer(&mut stream, &text).await
        }
        // Have a process with this id.
        ["occupy", pid] => {
            let before: u32 = pid.parse().context("pid")?;
            let mut got = 0;
            // Others may take the id in between.
            for _ in 0..20 {
                std::fs::write("/proc/sys/kernel/ns_last_pid", (before - 1).to_string())
                    .context("ns_last_pid")?;
                let mut sleeps = std::process::Command::new("/bin/sleep");
                let mut child = sleeps.arg("3600").spawn().context("sleep")?;
                got = child.id();
                if got == before {
                    break;
                }
                child.kill().and_then(|()| child.wait()).context("end it")?;
            }
            answer(&mut stream, &got.to_string()).await
        }
        // Handover memory: what follows is for `handover`.
        ["handover", words @ ..] => {
            let words: Vec<String> = words.iter().map(|w| w.to_string()).collect();
            let done = tokio::task::spawn_blocking(move || handover::answer(&words)).await;
            answer(&mut stream, &done.context("handover")?).await
        }
        // Be a client of another kernel's workload.
        ["send", cid, bytes] => {
            let (cid, bytes): (u32, u64) = (cid.parse().context("cid")?, bytes.parse().context("bytes")?);
            let bad = send(cid, bytes).await?;
            answer(&mut stream, &format!("{bad}")).await
        }
        // Open and close many connections to another kernel's workload.
        ["churn", cid, count] => {
            let (cid, count): (u32, u32) = (cid.parse().context("cid")?, count.parse().context("count")?);
            for n in 0..count {
                churn(cid).await.context(&format!("connection {n}"))?;
            }
            answer(&mut stream, &format!("{count}")).await
        }
        other => answer(&mut stream, &format!("unknown request {other:?}")).await,
    }
}

async fn answer(stream: &mut BufReader<VsockStream>, text: &str) -> Result<()> {
    stream.write_all(format!("{text}\n").as_bytes()).await.context("answer")
}

/// What comes next ends this kernel, and whatever of it was not read by then: the answer is waited for to be read.
async fn last_answer(stream: &mut BufReader<VsockStream>, text: &str) -> Result<()> {
    answer(stream, text).await?;
    // Whoever asked closes the connection then. Nobody needs to.
    let _ = timeout(ASK_LIMIT, stream.read(&mut [0u8])).await;
    Ok(())
}

fn online() -> String {
    std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default().trim().to_string()
}

fn hang() -> Result<()> {
    let release = nix::sys::utsname::uname().context("uname")?.release().to_string_lossy().into_owned();
    let file = File::open(format!("/hang/{release}.ko")).context("open the hang module")?;
    let how = CString::new("how=hang").context("parameter")?;
    finit_module(&file, &how, ModuleInitFlags::empty()).context("load the hang module")
}

fn find(name: &str) -> Result<i32> {
    for entry in std::fs::read_dir("/proc").context("list processes")? {
        let entry = entry.context("list processes")?;
        if let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>()
            && pid != 1
            && std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim() == name
        {
            return Ok(pid);
        }
    }
    Err(format!("no process {name}"))
}

/// The pattern: every byte depends on its place, so a lost, doubled or moved one shows.
pub fn pattern(buf: &mut [u8], at: u64) {
    for (n, b) in buf.iter_mut().enumerate() {
        let i = at + n as u64;
        *b = (i.wrapping_mul(0x9e37_79b9) >> 13) as u8 ^ (i >> 8) as u8;
    }
}

/// Write `bytes` of the pattern.
pub async fn give<S: AsyncWriteExt + Unpin>(stream: &mut S, bytes: u64) -> Result<()> {
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(CHUNK as u64) as usize;
        pattern(&mut buf[..n], at);
        stream.write_all(&buf[..n]).await.context("write the pattern")?;
        at += n as u64;
    }
    Ok(())
}

/// Read `bytes` of the pattern; how many were wrong.
pub async fn check<S: AsyncReadExt + Unpin>(stream: &mut S, bytes: u64) -> Result<u64> {
    let (mut buf, mut want) = (vec![0; CHUNK], vec![0; CHUNK]);
    let (mut at, mut bad) = (0, 0);
    while at < bytes {
        let room = (bytes - at).min(CHUNK as u64) as usize;
        let n = stream.read(&mut buf[..room]).await.context("read the pattern")?;
        if n == 0 {
            return Err(format!("the stream ended after {at} of {bytes} bytes"));
        }
        pattern(&mut want[..n], at);
        bad += buf[..n].iter().zip(&want[..n]).filter(|(a, b)| a != b).count() as u64;
        at += n as u64;
    }
    Ok(bad)
}

/// Connect to a workload and say the first line; its first answer must be "go".
pub async fn open(cid: u32, line: &str) -> Result<BufReader<VsockStream>> {
    let mut stream = open_raw(cid, line).await?;
    let mut go = String::new();
    stream.read_line(&mut go).await.context("read the answer")?;
    if go.trim() == "go" { Ok(stream) } else { Err(format!("{line}: {go:?}")) }
}

/// Send the pattern to a workload's sink; how many bytes it found wrong.
pub async fn send(cid: u32, bytes: u64) -> Result<u64> {
    let mut stream = open(cid, &format!("sink {bytes}")).await?;
    give(&mut stream, bytes).await?;
    let mut bad = String::new();
    stream.read_line(&mut bad).await.context("read the verdict")?;
    bad.trim().parse().context("the verdict")
}

/// Get the pattern from a workload's source; how many bytes were wrong.
pub async fn receive(cid: u32, bytes: u64) -> Result<u64> {
    let mut stream = open(cid, &format!("source {bytes}")).await?;
    check(&mut stream, bytes).await
}

/// One request from the command line. A workload that does not listen at once is not there.
pub fn ask(cid: u32, line: &str) -> Result<()> {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    let asked = async {
        let connect = VsockStream::connect(VsockAddr::new(cid, PORT));
        let mut stream = BufReader::new(connect.await.context("connect")?);
        answer(&mut stream, line).await?;
        let mut said = String::new();
        stream.read_line(&mut said).await.context("read the answer")?;
        println!("{}", said.trim());
        Result::Ok(())
    };
    rt.block_on(async { timeout(ASK_LIMIT, asked).await.map_err(|_| "no answer".to_string())? })
}

/// One short connection: connect, echo a few bytes, close.
pub async fn churn(cid: u32) -> Result<()> {
    let mut stream = open(cid, "echo").await?;
    let mut buf = [0u8; 100];
    pattern(&mut buf, 7);
    stream.write_all(&buf).await.context("write")?;
    let mut back = [0u8; 100];
    stream.read_exact(&mut back).await.context("read")?;
    if back == buf { Ok(()) } else { Err("the echo differs".into()) }
}

/// Connect to a workload. It listens a moment after its kernel is healthy, and nothing but trying
/// tells when.
pub async fn dial(cid: u32) -> Result<VsockStream> {
    let until = Instant::now() + LISTENS_WITHIN;
    loop {
        match VsockStream::connect(VsockAddr::new(cid, PORT)).await {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > until => {
                return Err(format!("connect to the workload of CID {cid}: {e}"));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Connect to a workload and say the first line, without waiting for an answer.
pub async fn open_raw(cid: u32, line: &str) -> Result<BufReader<VsockStream>> {
    let mut stream = BufReader::with_capacity(CHUNK, dial(cid).await?);
    answer(&mut stream, line).await?;
    Ok(stream)
}
