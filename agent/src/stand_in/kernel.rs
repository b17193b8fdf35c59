//! The first process of a stand-in: pulse, last words, faults, and the agent's guardian.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kmp::stand_in::{Control, MAX_CPUS, Notice, NoticeKind, State, names};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::{Pid, pipe2};

use super::fault::{Fault, Manner};
use super::user::User;
use super::{Args, agent};
use crate::guardian::Keeper;
use crate::{clock, kmsg};

/// A notice the daemon had no room for is sent again after this.
const AGAIN: Duration = Duration::from_millis(20);
/// How often the last words of a dead kernel are tried.
const LAST_TRIES: u32 = 250;

pub struct Kernel {
    args: Args,
    file: File,
    control: Control,
    next_beat: Duration,
    pulse_stopped: bool,
    faults: UnixDatagram,
    /// Ordered on the command line: when, what.
    ordered: VecDeque<(Duration, Fault)>,
    keeper: Keeper,
    user: Option<User>,
    /// Orders to the agent that runs.
    orders: Option<File>,
    /// Who waits to hear that a fault is there.
    asker: Option<SocketAddr>,
    notice: Option<Vec<u8>>,
    notices: UnixDatagram,
}

impl Kernel {
    /// Write the first beat and say so.
    pub fn start(args: Args) -> Result<Kernel, String> {
        let at = |name: &str| args.dir.join(name);
        let what = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
        let path = at(names::CONTROL);
        // Without append: the file is written over and over at its beginning.
        let file = OpenOptions::new().write(true).open(&path).map_err(|e| what(&path, e))?;
        let control = Control {
            state: State::Ready,
            instance: args.id,
            incarnation: args.incarnation,
            nonce: nonce()?,
            stamp_ns: clock::boot_ns(),
            start_ticks: start_ticks()?,
            pid: std::process::id(),
            text: String::new(),
            beats: vec![1; args.cpus],
        };
        let path = at(names::FAULT);
        let faults = UnixDatagram::bind(&path).map_err(|e| what(&path, e))?;
        let notices = UnixDatagram::unbound().map_err(|e| format!("a socket for notices: {e}"))?;
        for socket in [&faults, &notices] {
            socket.set_nonblocking(true).map_err(|e| format!("a socket: {e}"))?;
        }
        let now = clock::now();
        let (ordered, wrong) = Fault::of_cmdline(&args.cmdline);
        kmsg::log(
            kmsg::INFO,
            &format!(
                "stand-in {}: instance {}, incarnation {}, {} CPUs, {}",
                args.name, args.id, args.incarnation, args.cpus, args.release
            ),
        );
        kmsg::log(kmsg::INFO, &format!("Command line: {}", args.cmdline));
        for wrong in wrong {
            kmsg::log(kmsg::ERROR, &wrong);
        }
        let mut kernel = Kernel {
            next_beat: now + args.period,
            args,
            file,
            control,
            pulse_stopped: false,
            faults,
            ordered: ordered.into_iter().map(|(after, fault)| (now + after, fault)).collect(),
            keeper: Keeper::new(),
            user: None,
            orders: None,
            asker: None,
            notice: None,
            notices,
        };
        kernel.write();
        kernel.say(NoticeKind::Ready);
        kernel.user = User::start(&kernel.args.dir, kernel.args.id, &kernel.args.cmdline);
        Ok(kernel)
    }

    /// Until something ends it.
    pub fn run(mut self) -> ExitCode {
        loop {
            let now = clock::now();
            while self.ordered.front().is_some_and(|(at, _)| *at <= now) {
                if let Some((_, fault)) = self.ordered.pop_front() {
                    self.carry_out(fault);
                }
            }
            self.beat(now);
            self.send();
            self.guard();
            self.obeyed();
            self.wait();
            self.hear();
        }
    }

    fn wait(&self) {
        let now = clock::now();
        let dues = [
            (!self.pulse_stopped).then_some(self.next_beat),
            self.keeper.due(),
            self.ordered.front().map(|(at, _)| *at),
            self.notice.as_ref().map(|_| now + AGAIN),
        ];
        let wait =
            dues.into_iter().flatten().min().map_or(Duration::from_secs(3600), |d| d.saturating_sub(now));
        let mut fds = vec![PollFd::new(self.faults.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.keeper.fd().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        // A signal that ends the wait early only makes for one more turn.
        let _ = poll(&mut fds, clock::poll_timeout(wait).unwrap_or(PollTimeout::MAX));
    }

    fn beat(&mut self, now: Duration) {
        if self.pulse_stopped || now < self.next_beat {
            return;
        }
        self.next_beat += self.args.period;
        if self.next_beat <= now {
            // Late: beats that did not happen are not made up.
            self.next_beat = now + self.args.period;
        }
        if let Some(ended) = self.user.as_mut().and_then(User::ended) {
            self.user = None;
            kmsg::log(kmsg::ERROR, &format!("init ended: {ended:?}"));
        }
        for count in &mut self.control.beats {
            *count = count.wrapping_add(1);
        }
        self.write();
    }

    fn write(&mut self) {
        self.control.stamp_ns = clock::boot_ns();
        if let Err(e) = self.file.write_all_at(&self.control.encode(), 0) {
            kmsg::log(kmsg::ERROR, &format!("cannot write the control file: {e}"));
        }
    }

    /// Look after the agent.
    fn guard(&mut self) {
        let Kernel { keeper, args, control, orders, .. } = self;
        let now = clock::now();
        // Each agent has a pipe of its own: it begins with good manners.
        let mut theirs = None;
        if keeper.starts(now) {
            match pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) {
                Ok((read, write)) => (theirs, *orders) = (Some(read), Some(write.into())),
                Err(e) => kmsg::log(kmsg::ERROR, &format!("no pipe to the agent: {e}")),
            }
        }
        let kernel = Pid::this();
        keeper.turn(now, |link| {
            drop(orders.take());
            theirs.take().map_or(1, |theirs| agent::run(args, control.nonce, kernel, link, theirs))
        });
    }

    /// Tell who asked that the agent follows the order.
    fn obeyed(&mut self) {
        if self.keeper.obeyed() {
            self.answer("ok");
        }
    }

    /// Take one order from the fault socket.
    fn hear(&mut self) {
        let mut buf = [0; 512];
        let (n, from) = match self.faults.recv_from(&mut buf) {
            Ok(got) => got,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(e) => return kmsg::log(kmsg::ERROR, &format!("fault socket: {e}")),
        };
        self.asker = Some(from);
        let text = String::from_utf8_lossy(&buf[..n]);
        if let Some(cpus) = text.strip_prefix("grow ") {
            return self.grow(cpus);
        }
        match Fault::parse(&text) {
            Ok(fault) => self.carry_out(fault),
            Err(why) => self.answer(&why),
        }
    }

    /// Beat on more CPUs from now on.
    fn grow(&mut self, cpus: &str) {
        match cpus.parse::<usize>() {
            Ok(n) if (self.control.beats.len()..=MAX_CPUS).contains(&n) => {
                kmsg::log(kmsg::INFO, &format!("CPUs: {n}"));
                self.control.beats.resize(n, 1);
                self.write();
                self.answer("ok");
            }
            _ => {
                let has = self.control.beats.len();
                self.answer(&format!("it has {has} CPUs and cannot have {cpus:?}; {MAX_CPUS} are the most"));
            }
        }
    }

    fn answer(&mut self, text: &str) {
        if let Some(asker) = self.asker.take() {
            // Who asked may have gone.
            let _ = self.faults.send_to_addr(text.as_bytes(), &asker);
        }
    }

    /// Let a fault happen. Who asked for it is answered when it is there.
    fn carry_out(&mut self, fault: Fault) {
        kmsg::log(kmsg::INFO, &format!("fault: {fault:?}"));
        match fault {
            Fault::Panic(reason) => self.die(State::Panicked, NoticeKind::Panic, reason),
            Fault::Park(how) => self.die(State::Parked, NoticeKind::Parked, how),
            Fault::Crash => {
                // The agent goes with its kernel.
                self.answer("ok");
                if let Err(e) = raise(Signal::SIGKILL) {
                    kmsg::log(kmsg::ERROR, &format!("cannot crash: {e}"));
                }
            }
            Fault::Hang => self.stand_still(),
            Fault::AgentHang => self.keeper.halt(Signal::SIGSTOP),
            Fault::AgentExit { stay } => {
                if stay {
                    self.keeper.hold();
                }
                self.keeper.halt(Signal::SIGKILL);
            }
            Fault::NeverServe => self.keeper.hold(),
            Fault::PulseStop => self.pulse_stopped = true,
            Fault::Agent(manner) => {
                if !self.keeper.runs() {
                    return self.answer("the agent does not run, so it cannot misbehave");
                }
                return self.tell(manner);
            }
            Fault::Recover => {
                self.keeper.signal(Signal::SIGCONT);
                self.keeper.release();
                self.pulse_stopped = false;
                // An agent that is started anew has good manners already.
                if self.keeper.runs() {
                    return self.tell(Manner::Normal);
                }
            }
        }
        self.answer("ok");
    }

    fn tell(&mut self, manner: Manner) {
        if let Some(mut orders) = self.orders.as_ref()
            && let Err(e) = orders.write_all(&manner.encode())
        {
            kmsg::log(kmsg::ERROR, &format!("the agent cannot be told: {e}"));
        }
    }

    /// Last words, then nothing more.
    fn die(&mut self, state: State, kind: NoticeKind, text: String) {
        self.keeper.halt(Signal::SIGSTOP);
        kmsg::log(
            kmsg::EMERGENCY,
            &match state {
                State::Panicked => format!("Kernel panic - not syncing: {text}"),
                _ => format!("reboot: {text}"),
            },
        );
        self.control.state = state;
        self.control.text = text;
        self.write();
        self.say(kind);
        self.answer("ok");
        for _ in 0..LAST_TRIES {
            self.send();
            if self.notice.is_none() {
                break;
            }
            let _ = poll(&mut [], clock::poll_timeout(AGAIN).unwrap_or(PollTimeout::MAX));
        }
        self.stand_still();
    }

    /// Neither pulse nor agent nor an answer to any signal, until somebody kills the process.
    fn stand_still(&mut self) {
        self.keeper.halt(Signal::SIGSTOP);
        if let Err(e) = SigSet::all().thread_block() {
            kmsg::log(kmsg::ERROR, &format!("cannot ignore signals: {e}"));
        }
        self.answer("ok");
        loop {
            let _ = poll(&mut [], PollTimeout::NONE);
        }
    }

    fn say(&mut self, kind: NoticeKind) {
        let notice = Notice {
            kind,
            instance: self.args.id,
            incarnation: self.args.incarnation,
            stamp_ns: clock::boot_ns(),
            text: self.control.text.clone(),
        };
        self.notice = Some(notice.encode());
        self.send();
    }

    /// Send the notice that waits. When the daemon has no room it waits on; when there is no daemon, the next one
    /// looks at the control file.
    fn send(&mut self) {
        let Some(notice) = &self.notice else { return };
        let path: PathBuf = self.args.dir.join("..").join(names::EVENTS);
        match self.notices.send_to(notice, path) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            _ => self.notice = None,
        }
    }
}

fn nonce() -> Result<u64, String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| format!("/dev/urandom: {e}"))?;
    Ok(u64::from_le_bytes(bytes).max(1))
}

/// When this process started, in clock ticks since boot.
fn start_ticks() -> Result<u64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| format!("/proc/self/stat: {e}"))?;
    // Field 22; the name in brackets may contain anything, so count from its end.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| format!("/proc/self/stat has no start time: {stat}"))
}
