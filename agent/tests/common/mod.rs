//! A process platform in a folder of its own, and talking to its stand-ins.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kmorph_platform::process::{Process, ProcessConfig};
use kmorph_platform::{
    BootRequest, InstanceId, InstanceSpec, KernelState, Platform, PlatformEvent, PlatformEventKind, Stream,
};
use kmp::io::Connection;
use kmp::message::{HeartbeatReq, HeartbeatRsp, Hello, Message};
use kmp::session::Event;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

pub const AGENT: &str = env!("CARGO_BIN_EXE_kmorph-agent");
/// No test waits longer for anything.
pub const LIMIT: Duration = Duration::from_secs(20);
/// Silence that is taken for silence.
pub const SILENCE: Duration = Duration::from_millis(300);
const MIB: u64 = 1 << 20;

pub type Link = Connection<Box<dyn Stream>>;

/// A platform whose stand-ins end with it.
pub struct Bench {
    pub process: Arc<Process>,
    pub events: mpsc::Receiver<PlatformEvent>,
    pub dir: PathBuf,
    home: Home,
}

/// Holds the folder; ends whatever a failed test left in it.
pub struct Home(tempfile::TempDir);

impl Home {
    /// A daemon on this folder.
    pub async fn open(self, cpus: u32) -> Bench {
        let dir = self.0.path().join("run");
        let process = Process::open(config(&dir, cpus)).await.unwrap();
        let events = process.take_events().unwrap();
        Bench { process: Arc::new(process), events, dir, home: self }
    }
}

pub fn config(dir: &Path, cpus: u32) -> ProcessConfig {
    ProcessConfig { dir: dir.to_owned(), agent: AGENT.into(), cpus, memory: 256 << 30 }
}

impl Bench {
    pub async fn new(cpus: u32) -> Bench {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("kernel-6.6"), "stands for a kernel").unwrap();
        Home(temp).open(cpus).await
    }

    /// The daemon ends and another one takes over.
    pub async fn restart(self) -> Bench {
        let cpus = self.process.inventory().await.unwrap().cpus.len() as u32;
        self.vacate().open(cpus).await
    }

    /// The daemon ends; what it started stays.
    pub fn vacate(self) -> Home {
        self.home
    }

    pub fn kernel(&self) -> PathBuf {
        self.home.0.path().join("kernel-6.6")
    }

    /// Instance `id` on CPU `id`.
    pub fn request(&self, id: u16, cmdline: &str) -> BootRequest {
        BootRequest {
            spec: InstanceSpec {
                name: format!("i{id}"),
                id: InstanceId(id),
                cpus: vec![u32::from(id)],
                memory_bytes: 64 * MIB,
                memory_base: None,
            },
            incarnation: 1,
            kernel: self.kernel(),
            initramfs: None,
            cmdline: cmdline.into(),
            pulse_period: Duration::from_millis(10),
            growth: Default::default(),
        }
    }

    pub async fn boot(&self, id: u16, cmdline: &str) {
        self.process.boot(&self.request(id, cmdline)).await.unwrap();
    }

    /// The next event of an instance that `want` takes.
    pub async fn event<T>(&mut self, id: u16, want: impl Fn(&PlatformEventKind) -> Option<T>) -> T {
        let found = async {
            loop {
                let event = self.events.recv().await.expect("events go on");
                if event.id == InstanceId(id)
                    && let Some(found) = want(&event.kind)
                {
                    assert!(event.age < LIMIT, "{event:?}");
                    return found;
                }
            }
        };
        timeout(LIMIT, found).await.expect("the event came")
    }

    pub async fn ready(&mut self, id: u16) {
        self.event(id, |k| (*k == PlatformEventKind::Ready).then_some(())).await;
    }

    pub async fn parked(&mut self, id: u16) -> String {
        self.event(id, |k| match k {
            PlatformEventKind::Parked(how) => Some(how.clone()),
            _ => None,
        })
        .await
    }

    pub fn state(&self, id: u16) -> KernelState {
        self.process.pulse(InstanceId(id), 1).unwrap().state
    }

    /// Beats of the first CPU.
    pub fn beats(&self, id: u16) -> u64 {
        self.process.pulse(InstanceId(id), 1).unwrap().cpus.first().map_or(0, |c| c.count)
    }

    /// Whether the pulse moves within the time in which a silent one counts as silent.
    pub async fn beats_on(&self, id: u16) -> bool {
        let before = self.beats(id);
        let moved = until(async || self.beats(id) != before);
        timeout(SILENCE, moved).await.is_ok()
    }

    pub async fn raw(&self, id: u16) -> Result<Box<dyn Stream>, kmorph_platform::PlatformError> {
        self.process.connect(InstanceId(id), 1, kmp::PORT).await
    }

    /// Connect as soon as the agent listens, and say HELLO.
    pub async fn connect(&self, id: u16) -> Link {
        let attempt = async {
            loop {
                if let Ok(stream) = self.raw(id).await {
                    let opened =
                        Connection::connect(stream, hello(id, 1), || 1, Duration::from_millis(500)).await;
                    if let Ok((link, _)) = opened {
                        return link;
                    }
                }
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LIMIT, attempt).await.expect("the agent serves")
    }

    pub async fn fault(&self, id: u16, fault: &str) {
        let (ok, said) = fault_said(&self.dir, &id.to_string(), fault).await;
        assert!(ok, "{said}");
    }

    pub async fn fence(&self, id: u16) {
        let report = self.process.fence(InstanceId(id), 1).await.unwrap();
        assert!(report.complete && report.cpus.iter().all(|(_, stopped)| *stopped), "{report:?}");
    }

    pub async fn remove(&self, id: u16) {
        self.fence(id).await;
        self.process.reclaim(InstanceId(id), 1, true).await.unwrap();
    }

    /// The process ids of an instance, by its folder on their command lines.
    pub fn pids(&self, id: u16) -> Vec<u32> {
        pids(&self.dir.join(id.to_string()))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.0.path().join("run")).into_iter().flatten().flatten() {
            for pid in pids(&entry.path()) {
                // It may have ended meanwhile.
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
        }
    }
}

fn pids(dir: &Path) -> Vec<u32> {
    let needle = format!("stand-in\0--dir\0{}\0", dir.display());
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| e.ok()?.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &u32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|c| String::from_utf8_lossy(&c).contains(&needle))
        })
        .collect()
}

/// Look again and again until it holds.
pub async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let looks = async {
        while !holds().await {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, looks).await.expect("it came to hold");
}

pub fn hello(id: u16, incarnation: u64) -> Hello {
    Hello { instance: id, incarnation, ..Hello::default() }
}

/// Order a fault through the program itself: whether it was taken, and what it said.
pub async fn fault_said(dir: &Path, id: &str, fault: &str) -> (bool, String) {
    let output = tokio::process::Command::new(AGENT)
        .args(["fault", "--dir"])
        .arg(dir)
        .arg(id)
        .args(fault.split(' '))
        .output()
        .await
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

pub fn ask(link: &mut Link, sequence: u32, guardian_ms: u32) {
    link.queue(sequence, &HeartbeatReq { metrics: true, guardian_ms, serves: false }.into()).unwrap();
}

/// The answer to a heartbeat; `None` when the connection ended.
pub async fn answer(link: &mut Link) -> Option<(u32, HeartbeatRsp)> {
    loop {
        match timeout(LIMIT, link.next()).await.expect("something came") {
            Event::Message { header, message: Message::HeartbeatRsp(rsp) } => {
                return Some((header.sequence, rsp));
            }
            Event::Closed { .. } => return None,
            _ => {}
        }
    }
}

/// One heartbeat there and back.
pub async fn beat(link: &mut Link, sequence: u32) -> HeartbeatRsp {
    ask(link, sequence, 0);
    let (answered, rsp) = answer(link).await.expect("the connection stays");
    assert_eq!(answered, sequence);
    rsp
}

/// Whether nothing comes for a while.
pub async fn silent(link: &mut Link) -> bool {
    timeout(SILENCE, link.next()).await.is_err()
}

/// Seconds since then, for a measurement that is printed.
pub fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}
