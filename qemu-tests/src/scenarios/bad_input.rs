//! Wrong input of every kind: one clear message, a documented exit code, nothing changed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kmp::message::Hello;
use kmp::session::Session;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use super::Scenario;
use crate::guest::{Guest, WORKLOAD};
use crate::host::MachineSpec;
use crate::{Context, Result};

pub const SCENARIO: Scenario = Scenario {
    name: "bad-input",
    about: "unknown names, taken CPUs, broken definitions, images and frames: clear messages, exit codes, no change",
    in_run: true,
    machine: MachineSpec::default,
    guest,
    limit: Duration::from_secs(120),
};

const SOCKET: &str = "/run/kmorph/kmorphd.sock";

fn guest(g: &Guest) -> Result<()> {
    let kernel = "--kernel=/boot/vmlinuz-6.1";
    let initramfs = format!("--initramfs={WORKLOAD}");
    g.chapter("without a daemon");
    g.ctl_fails(&["list"], 12, &["kmorphctl daemon start"])?;
    g.configure("pool:\n  reserved: yes please\n")?;
    g.ctl_fails(&["daemon", "start"], 6, &["kmorphd.conf", "pool"])?;
    g.configure("heartbeat:\n  timeuot: 5s\n")?;
    g.ctl_fails(&["daemon", "start"], 6, &["timeuot"])?;
    g.configure("{}\n")?;
    std::fs::create_dir_all("/run/kmorph").context("make the socket's folder")?;
    drop(std::os::unix::net::UnixListener::bind(SOCKET).context("leave a dead socket")?);
    g.ctl_fails(&["list"], 12, &["nobody listens"])?;

    g.chapter("a daemon takes the dead socket's place; a second one does not");
    g.define("one", 1, &[2], 128)?;
    g.define("same-cpu", 2, &[2], 128)?;
    g.define("boot-cpu", 3, &[0], 128)?;
    g.define("no-cpu", 4, &[77], 128)?;
    g.define("tiny", 5, &[3], 40)?;
    g.define("huge", 6, &[3], 4096)?;
    g.ctl(&["daemon", "start"])?;
    g.ctl_fails(&["daemon", "start"], 4, &["runs already"])?;
    let second = g.command("kmorphd", &["--socket", "/run/other.sock"])?;
    g.check(second.code == 4 && second.err.contains("runs already"), || {
        format!("a second daemon: {} {}", second.code, second.err)
    })?;

    g.chapter("names, definitions and resources");
    g.ctl_fails(&["status", "nobody"], 3, &["nobody"])?;
    g.ctl_fails(&["ping", "one"], 4, &["one"])?;
    g.ctl_fails(&["spawn", "nobody", kernel], 3, &["nobody", "/var/lib/kerf/instances"])?;
    g.ctl_fails(&["spawn", "../../etc/passwd", kernel], 6, &["name"])?;
    std::fs::write("/var/lib/kerf/instances/broken.dts", "/dts-v1/;\n/ { model = \"broken\"\n")
        .context("write")?;
    g.ctl_fails(&["spawn", "broken", kernel], 6, &["broken.dts"])?;
    g.ctl_fails(&["spawn", "boot-cpu", kernel], 6, &["CPU 0", "boot processor"])?;
    g.ctl_fails(&["spawn", "no-cpu", kernel], 6, &["CPU 77"])?;
    g.ctl_fails(&["spawn", "tiny", kernel, &initramfs], 6, &["at least", "MiB"])?;
    g.ctl_fails(&["spawn", "huge", kernel, &initramfs], 5, &["pool"])?;

    g.chapter("files");
    g.ctl_fails(&["spawn", "one", "--kernel=/none"], 3, &["/none"])?;
    g.ctl_fails(&["spawn", "one", "--kernel=/bin/busybox"], 6, &["/bin/busybox", "bzImage"])?;
    g.ctl_fails(&["spawn", "one", kernel, "--initramfs=/init"], 6, &["not an initramfs"])?;
    g.ctl_fails(&["spawn", "one", kernel, "--heartbeat-timeout=0"], 2, &["heartbeat-timeout"])?;

    g.chapter("a CPU that another instance has");
    g.ctl(&["spawn", "one", kernel, &initramfs])?;
    g.ctl_fails(&["spawn", "one", kernel, &initramfs], 4, &["one"])?;
    g.ctl_fails(&["spawn", "same-cpu", kernel, &initramfs], 5, &["CPU 2"])?;
    let echo = std::fs::write("/sys/devices/system/cpu/cpu2/online", "1");
    g.check(echo.is_err(), || "the primary could online a lent CPU".into())?;

    g.chapter("clients that break off and clients that send garbage");
    for bytes in [
        &b"\x00\x00"[..],
        &b"\xff\xff\xff\xff garbage"[..],
        &b"\x00\x00\x00\x05hello"[..],
        &b"GET / HTTP/1.1\r\n\r\n"[..],
    ] {
        let mut s = UnixStream::connect(SOCKET).context("connect")?;
        s.write_all(bytes).context("write")?;
        s.shutdown(std::net::Shutdown::Write).context("shut down")?;
        s.set_read_timeout(Some(Duration::from_secs(10))).context("set a limit")?;
        // Its answer is an error frame or nothing; what counts is that it closes and goes on.
        let mut rest = Vec::new();
        s.read_to_end(&mut rest).context("the daemon did not close the connection")?;
    }
    let lazy: Vec<UnixStream> =
        (0..50).map(|_| UnixStream::connect(SOCKET).context("connect")).collect::<Result<_>>()?;
    g.ctl(&["ping", "one"])?;
    drop(lazy);

    g.chapter("an agent that is sent what is not KMP");
    g.wait(garbage_to_agent())?;
    g.ctl(&["ping", "one"])?;
    let v = g.healthy("one")?;
    g.check(v.incarnation == 1, || format!("one was disturbed: {v:?}"))?;
    let missed = g.heartbeat("one")?.missed;
    g.check(missed == 0, || format!("one missed {missed} beats"))?;
    g.ctl(&["daemon", "stop", "--graceful"])?;
    g.check(g.online()? == "0-3", || "not all CPUs are back".into())?;
    g.kernel_is_clean()
}

/// Frames with a wrong magic, version, length and checksum: the agent closes each connection and
/// answers the next one.
async fn garbage_to_agent() -> Result<()> {
    let mut good = Vec::new();
    let mut session = Session::client(Hello { instance: 1, ..Hello::default() });
    session.start(1);
    good.extend_from_slice(session.output());
    type Damage = fn(&mut [u8]);
    let damages: [(&str, Damage); 4] = [
        ("magic", |f| f[0] ^= 1),
        ("version", |f| f[4] = 99),
        ("length", |f| f[12..16].copy_from_slice(&u32::MAX.to_le_bytes())),
        ("checksum", |f| f[24] ^= 1),
    ];
    for (what, damage) in damages {
        let mut frame = good.clone();
        damage(&mut frame);
        let mut s =
            VsockStream::connect(VsockAddr::new(3, kmp::PORT)).await.context("connect to the agent")?;
        AsyncWriteExt::write_all(&mut s, &frame).await.context("write")?;
        let mut rest = Vec::new();
        let end = timeout(Duration::from_secs(10), AsyncReadExt::read_to_end(&mut s, &mut rest)).await;
        // It may end in order or with a reset: what was sent after the mistake is not read.
        end.map_err(|_| format!("a frame with a wrong {what} did not end the connection"))?.ok();
    }
    Ok(())
}
