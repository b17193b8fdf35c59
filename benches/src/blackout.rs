//! How long a client of a service waits while its kernel is replaced: on the process platform, where nothing is emulated.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kmorph_control::{
    BlackoutView, Client, InstanceView, MorphArgs, MorphGoal, MorphView, Request, SpawnArgs,
};
use kmorph_state::kv;

use crate::process::Running;
use crate::{Context, Result, row};

/// Names the environment variable with what stands for the vsock ports of a stand-in.
const PORTS: &str = "KMORPH_PORTS";
const PORT: u32 = 7003;
/// Between the requests of the client.
const PACE: Duration = Duration::from_micros(500);
const STARTS_WITHIN: Duration = Duration::from_secs(20);
/// Times the service is stopped and started, as one does without morphs.
const RESTARTS: usize = 5;
/// SPECIFICATION.md.
const PROMISE: Duration = Duration::from_millis(10);

/// The service, inside a stand-in.
pub fn serve(mib: usize) -> Result<()> {
    let ports = std::env::var(PORTS).context(PORTS)?;
    let path = format!("{ports}{PORT}");
    // One of an earlier start.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).context(&path)?;
    let service = kv::start(mib, |error| println!("{error}")).context("the store")?;
    for stream in listener.incoming() {
        let (stream, service) = (stream.context("accept")?, service.clone());
        std::thread::spawn(move || {
            if let Err(error) = service.serve(&stream, &stream) {
                println!("a session ended: {error}");
            }
        });
    }
    Ok(())
}

/// What a client sees: answers, each with the time since the one before.
#[derive(Default)]
struct Seen {
    gaps: Vec<(SystemTime, Duration)>,
    took: Vec<Duration>,
}

/// Ask at a constant rate until told to stop. Every answer has to be one more than the one before.
fn client(address: &str, stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    let stream = TcpStream::connect(address).context("connect")?;
    stream.set_nodelay(true).context("nodelay")?;
    stream.set_read_timeout(Some(STARTS_WITHIN)).context("timeout")?;
    let mut reader = BufReader::new(&stream);
    let (mut served, mut last, mut due) = (None, None, Instant::now());
    for n in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let asked = Instant::now();
        (&stream).write_all(format!("put {} {n}\n", n % 200).as_bytes()).context("ask")?;
        let mut line = String::new();
        reader.read_line(&mut line).context("read the answer")?;
        let now = Instant::now();
        let answer = line.trim_end().strip_prefix("ok ").and_then(|n| n.parse::<u64>().ok());
        let answer = answer.ok_or_else(|| format!("answered {line:?}"))?;
        if served.is_some_and(|s: u64| s + 1 != answer) {
            return Err(format!("request {answer} after {served:?}"));
        }
        served = Some(answer);
        seen.took.push(now - asked);
        seen.gaps.extend(last.map(|l: Instant| (SystemTime::now(), now - l)));
        last = Some(now);
        due = (due + PACE).max(now);
        while Instant::now() < due {
            std::hint::spin_loop();
        }
    }
    Ok(seen)
}

fn quantile(all: &mut [Duration], share: f64) -> Duration {
    all.sort_unstable();
    all.get(((all.len() as f64 - 1.0) * share) as usize).copied().unwrap_or_default()
}

struct Bench {
    home: tempfile::TempDir,
    daemon: Running,
    address: String,
    rt: tokio::runtime::Runtime,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn start() -> Result<Bench> {
        let home = tempfile::Builder::new().prefix("kmb").tempdir().context("a folder")?;
        let at = |name: &str| home.path().join(name);
        let me = std::env::current_exe().context("this program")?;
        let agent = me.with_file_name("kmorph-agent");
        if !agent.is_file() {
            return Err(format!("{} is missing: build kmorph-agent with the same profile", agent.display()));
        }
        for kernel in ["kernel-6.1.0", "kernel-6.12.0"] {
            std::fs::write(at(kernel), "stands for a kernel").context("kernel")?;
        }
        std::fs::create_dir(at("instances")).context("folder")?;
        let dts = "/dts-v1/;\n/ { compatible = \"multikernel-v1\"; model = \"store\"; id = <1>;\n\
                   resources { cpus = <0x0 0x1>; memory-bytes = <0x0 0x8000000>; };\n};\n";
        std::fs::write(at("instances/store.dts"), dts).context("definition")?;
        let text = format!(
            "platform: process\nprocess:\n  dir: {0}/run\n  cpus: 8\n  memory: 8G\nagent: {1}\ninstances: {0}/instances\nstate: {0}/state\nmetrics: null\npolicy:\n  restart-delay: 0s\n  restart-max-delay: 0s\n  restart-intensity: 1000\n",
            home.path().display(),
            agent.display(),
        );
        std::fs::write(at("conf"), text).context("configuration")?;
        let (conf, socket) = (at("conf").display().to_string(), at("sock").display().to_string());
        let args = ["daemon", "stand-ins", "0", &conf, &socket];
        let daemon = Running::start(&me, &args, &[("KMORPH_LOG", "warn")], &at("log"))?;
        let listener = TcpListener::bind("127.0.0.1:0").context("a free port")?;
        let address = listener.local_addr().context("its address")?.to_string();
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
        Ok(Bench { home, daemon, address, rt })
    }

    fn call<T: serde::de::DeserializeOwned>(&self, request: &Request) -> Result<T> {
        let until = Instant::now() + STARTS_WITHIN;
        self.rt.block_on(async {
            loop {
                match Client::connect(&self.path("sock")).await {
                    Ok(mut client) => return client.call(request).await.map_err(|e| e.message),
                    Err(e) if Instant::now() > until => return Err(e.message),
                    // It is starting.
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
    }

    fn spawn(&self, mib: usize) -> Result<()> {
        let me = std::env::current_exe().context("this program")?;
        let publish = format!("tcp:{}=vsock:{PORT},sessions", self.address);
        let args = SpawnArgs {
            name: "store".into(),
            kernel: self.path("kernel-6.1.0").display().to_string(),
            cmdline: Some(format!("init={} -- kv {mib}", me.display())),
            initramfs: None,
            monitor: None,
            heartbeat_timeout_s: None,
            boot_timeout_s: None,
            wait: true,
            publish: vec![publish.parse().context("publish")?],
            handover_bytes: 0,
        };
        self.call::<InstanceView>(&Request::Spawn(args)).map(drop)
    }

    fn morph(&self, kernel: &str) -> Result<BlackoutView> {
        let args = MorphArgs {
            name: "store".into(),
            kernel: Some(self.path(kernel).display().to_string()),
            cmdline: None,
            initramfs: None,
            cpus: vec![],
            memory_bytes: None,
            goal: MorphGoal::Commit,
            dry_run: false,
        };
        let view: MorphView = self.call(&Request::Morph(args))?;
        view.blackout.ok_or_else(|| format!("nothing stood still: {:?}", view.steps))
    }

    fn terminate(&self) -> Result<()> {
        self.call::<InstanceView>(&Request::Terminate { name: "store".into(), force: false }).map(drop)
    }
}

/// The longest gap between answers that touches the interruption.
fn seen_by_client(seen: &Seen, blackout: &BlackoutView) -> Duration {
    let at = |us| SystemTime::UNIX_EPOCH + Duration::from_micros(us);
    let (from, to) = (at(blackout.began_unix_us), at(blackout.began_unix_us + blackout.total_us));
    let touches = |(end, gap): &&(SystemTime, Duration)| *end >= from && *end - *gap <= to;
    seen.gaps.iter().filter(touches).map(|(_, gap)| *gap).max().unwrap_or_default()
}

/// Measure and print. False when the promise was not kept.
pub fn run(morphs: usize) -> Result<bool> {
    let bench = Bench::start()?;
    let measured = measure(&bench, morphs);
    // Whatever came of it, nothing runs on.
    let ended = bench.terminate();
    let kept = measured?;
    ended?;
    bench.daemon.end()?;
    Ok(kept)
}

fn measure(bench: &Bench, morphs: usize) -> Result<bool> {
    bench.spawn(1)?;
    // It answers when its agent knows it.
    client_once(&bench.address)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (address, stopped) = (bench.address.clone(), stop.clone());
    let asking = std::thread::spawn(move || client(&address, &stopped));
    let mut blackouts = vec![];
    for n in 0..morphs {
        blackouts.push(bench.morph(if n % 2 == 0 { "kernel-6.12.0" } else { "kernel-6.1.0" })?);
    }
    stop.store(true, Ordering::Relaxed);
    let mut seen = asking.join().map_err(|_| "the client ended by a mistake")??;
    let mut client: Vec<Duration> = blackouts.iter().map(|b| seen_by_client(&seen, b)).collect();
    let mut all: Vec<Duration> = blackouts.iter().map(|b| Duration::from_micros(b.total_us)).collect();
    let mut other: Vec<Duration> = seen.gaps.iter().map(|(_, gap)| *gap).collect();
    let request = quantile(&mut seen.took, 0.5);
    let worst = quantile(&mut client, 0.99);
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    row(
        &format!("longest gap of a client over {morphs} morphs"),
        &format!("p50 {:.2} ms, p99 {:.2} ms", ms(quantile(&mut client, 0.5)), ms(worst)),
        &format!("p99 <= {} ms", PROMISE.as_millis()),
    );
    row(
        "  the workload stands still",
        &format!("p50 {:.2} ms, p99 {:.2} ms", ms(quantile(&mut all, 0.5)), ms(quantile(&mut all, 0.99))),
        "",
    );
    let phase = |f: fn(&BlackoutView) -> u64| {
        let mut times: Vec<Duration> = blackouts.iter().map(|b| Duration::from_micros(f(b))).collect();
        format!("{:.2}", ms(quantile(&mut times, 0.5)))
    };
    row(
        "  freeze, copy, check, record, activate, p50",
        &[
            phase(|b| b.freeze_us),
            phase(|b| b.copy_us),
            phase(|b| b.check_us),
            phase(|b| b.record_us),
            phase(|b| b.activate_us),
        ]
        .join(", "),
        "",
    );
    row(
        "  a request; gap between any two answers, p99.9",
        &format!("{:.3} ms; {:.2} ms", ms(request), ms(quantile(&mut other, 0.999))),
        "",
    );
    let mut proxied = proxy_restarts(bench)?;
    let proxy = quantile(&mut proxied, 0.5);
    row(
        "  a proxy restart: the client waits for the next kernel, p50",
        &format!("{:.0} ms, {:.0} times the gap", ms(proxy), ms(proxy) / ms(quantile(&mut client, 0.5))),
        "",
    );
    let mut restarts = restarts(bench)?;
    let restart = quantile(&mut restarts, 0.5);
    row(
        "  the same service stopped and started, p50",
        &format!("{:.0} ms, {:.0} times the gap", ms(restart), ms(restart) / ms(quantile(&mut client, 0.5))),
        "",
    );
    Ok(worst <= PROMISE)
}

/// Ask on one connection after the other until told to stop; the longest time from one answer to the next. A connection
/// that is lost with its kernel is followed by one that waits for the next kernel.
fn client_again(address: &str, stop: &AtomicBool) -> Duration {
    let (mut longest, mut last) = (Duration::ZERO, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        if client_once(address).is_ok() {
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        std::thread::yield_now();
    }
    longest
}

/// What a client waits for when the kernel under the service is stopped and started behind the address it connects to.
fn proxy_restarts(bench: &Bench) -> Result<Vec<Duration>> {
    let mut all = vec![];
    for _ in 0..RESTARTS {
        let stop = Arc::new(AtomicBool::new(false));
        let (address, stopped) = (bench.address.clone(), stop.clone());
        client_once(&bench.address)?;
        let asking = std::thread::spawn(move || client_again(&address, &stopped));
        let recovered = bench.call::<InstanceView>(&Request::Recover { name: "store".into() });
        let answered = client_once(&bench.address);
        stop.store(true, Ordering::Relaxed);
        all.push(asking.join().map_err(|_| "the client ended by a mistake")?);
        recovered?;
        answered?;
    }
    Ok(all)
}

/// How long nobody answers when the service is stopped and started.
fn restarts(bench: &Bench) -> Result<Vec<Duration>> {
    let mut all = vec![];
    for _ in 0..RESTARTS {
        let began = Instant::now();
        bench.terminate()?;
        bench.spawn(1)?;
        client_once(&bench.address)?;
        all.push(began.elapsed());
    }
    Ok(all)
}

fn client_once(address: &str) -> Result<()> {
    let stream = TcpStream::connect(address).context("connect")?;
    (&stream).write_all(b"get 1\n").context("ask")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).context("read the answer")?;
    if line.is_empty() { Err("no answer".into()) } else { Ok(()) }
}
