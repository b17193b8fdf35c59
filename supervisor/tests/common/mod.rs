//! A daemon on the process platform, in a folder of its own.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use kmorph_control::{
    Client, DaemonView, InstanceView, Next, OpError, RecoveryLogArgs, RecoveryStep, Request, SpawnArgs,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// No test waits longer for anything.
pub const LIMIT: Duration = Duration::from_secs(60);
const DAEMON: &str = env!("CARGO_BIN_EXE_kmorphd");
const NAMES: [&str; 3] = ["one", "two", "three"];

/// The agent lies beside the daemon; it is built when it does not.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--locked", "-q", "-p", "kmorph-agent"])
            .status()
            .unwrap();
        assert!(built.success());
        Path::new(DAEMON).with_file_name("kmorph-agent")
    })
}

/// The folder; ends what a failed test left running.
pub struct Home(tempfile::TempDir);

impl Home {
    pub fn new(config: &str) -> Home {
        let home = Home(tempfile::tempdir().unwrap());
        std::fs::write(home.path("kernel-6.6"), "stands for a kernel").unwrap();
        std::fs::create_dir(home.path("instances")).unwrap();
        for (n, name) in NAMES.iter().enumerate() {
            let id = n + 1;
            let dts = format!(
                "/dts-v1/;\n/ {{ compatible = \"multikernel-v1\"; model = \"{name}\"; id = <{id}>;\n\
                 resources {{ cpus = <0x0 {id:#x}>; memory-bytes = <0x0 0x4000000>; }}; }};\n"
            );
            std::fs::write(home.path(&format!("instances/{name}.dts")), dts).unwrap();
        }
        home.configure(config);
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("kmorphd.sock")
    }

    pub fn mode(&self, name: &str, mode: u32) {
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    pub fn configure(&self, extra: &str) {
        let dir = self.0.path().display();
        let agent =
            if extra.contains("agent:") { String::new() } else { format!("agent: {}\n", agent().display()) };
        // A pulse every 50 ms is enough for stand-ins, and leaves the machine to the others.
        let policy = if extra.contains("policy:") {
            ""
        } else {
            "policy:\n  pulse-period: 50ms\n  pulse-misses: 20\n  restart-delay: 1ms\n  restart-intensity: 100\n"
        };
        let text = format!(
            "platform: process\nprocess:\n  dir: {dir}/run\n  cpus: 8\n  memory: 8G\n{agent}instances: {dir}/instances\nstate: {dir}/state\nmetrics: null\n{policy}{extra}"
        );
        std::fs::write(self.path("kmorphd.conf"), text).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(DAEMON);
        command.arg("--config").arg(self.path("kmorphd.conf")).arg("--socket").arg(self.socket());
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Start the daemon and wait until it answers.
    pub async fn start(&self) -> Daemon<'_> {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let child = self.command().stderr(log).spawn().unwrap();
        let daemon = Daemon { home: self, child };
        let limit = Instant::now() + LIMIT;
        while Client::connect(&self.socket()).await.is_err() {
            assert!(Instant::now() < limit, "no daemon: {}", self.log());
            sleep(Duration::from_millis(5)).await;
        }
        daemon
    }

    /// Start a daemon that ends by itself; what it said.
    pub async fn fails(&self) -> String {
        let out = timeout(LIMIT, self.command().stderr(Stdio::piped()).output()).await.unwrap().unwrap();
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Have a stand-in misbehave.
    pub fn fault(&self, id: u16, fault: &[&str]) {
        let out = std::process::Command::new(agent())
            .args(["fault", "--dir"])
            .arg(self.path("run"))
            .arg(id.to_string())
            .args(fault)
            .output()
            .unwrap();
        // One that crashes or hangs may not live to confirm the order.
        if !out.status.success() {
            eprintln!("fault {fault:?}: {}", String::from_utf8_lossy(&out.stderr));
        }
    }

    fn processes(&self) -> Vec<(i32, String)> {
        let run = self.path("run").display().to_string();
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
        all.filter_map(|pid: i32| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?.replace('\0', " ");
            (line.contains(" stand-in ") && line.contains(&run)).then_some((pid, line))
        })
        .collect()
    }

    /// Processes of stand-ins.
    pub fn stand_ins(&self) -> usize {
        self.processes().len()
    }

    /// The first process of a stand-in.
    pub fn pid(&self, id: u16) -> Option<i32> {
        let mine = format!("--id {id} ");
        self.processes().into_iter().filter(|(_, line)| line.contains(&mine)).map(|(pid, _)| pid).min()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// A daemon that runs.
pub struct Daemon<'a> {
    home: &'a Home,
    child: Child,
}

impl Daemon<'_> {
    pub async fn client(&self) -> Client {
        timeout(LIMIT, Client::connect(&self.home.socket())).await.unwrap().unwrap()
    }

    pub async fn call<T: DeserializeOwned>(&self, request: &Request) -> Result<T, OpError> {
        timeout(LIMIT, self.client().await.call(request)).await.unwrap()
    }

    pub async fn stream<T: DeserializeOwned>(&self, request: &Request) -> Vec<T> {
        let mut client = self.client().await;
        client.start(request).await.unwrap();
        let mut all = Vec::new();
        while let Next::Item(item) = timeout(LIMIT, client.next::<T, ()>()).await.unwrap().unwrap() {
            all.push(item);
        }
        all
    }

    pub async fn steps(&self) -> Vec<RecoveryStep> {
        self.stream(&Request::RecoveryLog { filter: RecoveryLogArgs::default(), follow: false }).await
    }

    pub async fn status(&self) -> DaemonView {
        self.call(&Request::DaemonStatus).await.unwrap()
    }

    pub async fn view(&self, name: &str) -> InstanceView {
        self.call(&Request::Status { name: name.into() }).await.unwrap()
    }

    /// Look until it is so.
    pub async fn until(&self, name: &str, so: impl Fn(&InstanceView) -> bool) -> InstanceView {
        let limit = Instant::now() + LIMIT;
        loop {
            let view = self.view(name).await;
            if so(&view) {
                return view;
            }
            assert!(Instant::now() < limit, "it never is: {view:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn spawn(&self, name: &str) -> InstanceView {
        let args = SpawnArgs {
            name: name.into(),
            kernel: self.home.path("kernel-6.6").display().to_string(),
            cmdline: None,
            initramfs: None,
            monitor: None,
            heartbeat_timeout_s: None,
            boot_timeout_s: None,
            wait: true,
            publish: vec![],
            handover_bytes: 0,
        };
        self.call(&Request::Spawn(args)).await.unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap() as i32), signal).unwrap();
    }

    async fn ended(mut self) -> ExitStatus {
        timeout(LIMIT, self.child.wait()).await.unwrap().unwrap()
    }

    /// kill -9.
    pub async fn kill(self) {
        self.signal(Signal::SIGKILL);
        self.ended().await;
    }

    pub async fn terminate(self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended().await
    }

    pub async fn stop(self, graceful: bool) {
        let () = self.call(&Request::DaemonStop { graceful }).await.unwrap();
        assert!(self.ended().await.success());
    }
}
