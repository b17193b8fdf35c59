//! Carrying out what the guardian decides.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_name;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::link::{self, Ear, LONG, Link};
use super::{Action, Event, State, step};
use crate::stage1::{self, Cmdline, First};
use crate::{clock, fork, kmsg, serve};

/// The agent that runs.
struct Ward {
    pid: Pid,
    ear: Ear,
    /// How it ended, when that was waited for already.
    ended: Option<WaitStatus>,
}

/// A guardian and its agent.
pub struct Keeper {
    state: State,
    ward: Option<Ward>,
    obeyed: bool,
}

impl Keeper {
    /// Starts the agent at its first [`Keeper::turn`].
    pub fn new() -> Keeper {
        Keeper { state: State::new(clock::now()), ward: None, obeyed: false }
    }

    /// Readable when there is something to do.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.ward.as_ref().map(|w| w.ear.file().as_fd())
    }

    /// When there is something to do without that.
    pub fn due(&self) -> Option<Duration> {
        self.state.due()
    }

    /// Whether the next [`Keeper::turn`] starts the agent.
    pub fn starts(&self, now: Duration) -> bool {
        self.ward.is_none() && self.state.due().is_some_and(|due| due <= now)
    }

    /// Whether the agent runs, as far as is known.
    pub fn runs(&self) -> bool {
        self.ward.as_ref().is_some_and(|w| w.ended.is_none())
    }

    /// Whether the agent has said since the last question that it follows an order.
    pub fn obeyed(&mut self) -> bool {
        std::mem::take(&mut self.obeyed)
    }

    /// Signal the agent, if it runs. It is our child and not waited for, so the number is its own.
    pub fn signal(&self, signal: Signal) {
        if let Some(Ward { pid, ended: None, .. }) = &self.ward
            && let Err(e) = kill(*pid, signal)
        {
            kmsg::log(kmsg::ERROR, &format!("guardian: cannot send {signal} to the agent: {e}"));
        }
    }

    /// Signal the agent and wait until it stands still or is gone: SIGSTOP and SIGKILL only.
    pub fn halt(&mut self, signal: Signal) {
        self.signal(signal);
        if let Some(Ward { pid, ended: ended @ None, .. }) = &mut self.ward {
            match waitpid(*pid, Some(WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Stopped(..)) => {}
                Ok(how) => *ended = Some(how),
                Err(e) => kmsg::log(kmsg::ERROR, &format!("guardian: cannot wait for the agent: {e}")),
            }
        }
    }

    /// Start no agent.
    pub fn hold(&mut self) {
        self.state = step(self.state, Event::Hold, clock::now()).0;
    }

    /// Start agents again; the next [`Keeper::turn`] does.
    pub fn release(&mut self) {
        self.state.release();
    }

    /// Look at the agent and do what is due. `body` is the agent; it runs in a process of its own. Must be
    /// called by a process with a single thread.
    pub fn turn(&mut self, now: Duration, mut body: impl FnMut(Link) -> i32) {
        let mut events = vec![Event::Tick];
        if let Some(ward) = &mut self.ward {
            let (heard, ended) = ward.ear.listen();
            self.obeyed |= heard.contains(&Event::Obeyed);
            events.splice(0..0, heard);
            if ended {
                let how = ward.ended.map_or_else(|| waitpid(ward.pid, None), Ok);
                kmsg::log(kmsg::ERROR, &format!("guardian: the agent ended: {how:?}"));
                self.ward = None;
                events.push(Event::Ended);
            }
        }
        for event in events {
            self.event(event, now, &mut body);
        }
    }

    fn event(&mut self, event: Event, now: Duration, body: &mut impl FnMut(Link) -> i32) {
        let (next, action) = step(self.state, event, now);
        self.state = next;
        match action {
            None => {}
            Some(Action::Kill) => {
                kmsg::log(kmsg::ERROR, "guardian: the agent is stuck and is killed");
                self.signal(Signal::SIGKILL);
            }
            Some(Action::Start) => {
                if let Err(e) = self.start(body) {
                    kmsg::log(kmsg::ERROR, &format!("guardian: cannot start the agent: {e}"));
                    self.state = step(self.state, Event::Ended, now).0;
                }
            }
        }
    }

    fn start(&mut self, body: &mut impl FnMut(Link) -> i32) -> nix::Result<()> {
        let restarts = self.state.restarts();
        let (ear, link) = link::make(self.state.told(), restarts)?;
        // The child must not keep the end it is listened to on, or its own end would not be heard.
        let mut ends = Some((ear, link));
        let pid = fork::child(|| match ends.take() {
            Some((ear, link)) => {
                drop(ear);
                body(link)
            }
            None => 1,
        })?;
        if let Some((ear, link)) = ends {
            drop(link);
            self.ward = Some(Ward { pid, ear, ended: None });
        }
        if restarts > 0 {
            kmsg::log(kmsg::INFO, &format!("guardian: agent started again, restart {restarts}"));
        }
        Ok(())
    }
}

/// The guardian of a real kernel's agent.
pub fn run(first: First, cmdline: &Cmdline) -> i32 {
    // The out-of-memory killer takes everything else first: a silent agent looks like a dead user space.
    if let Err(e) = std::fs::write(Path::new(stage1::PROC).join("self/oom_score_adj"), "-1000") {
        kmsg::log(kmsg::ERROR, &format!("cannot protect the agent from the OOM killer: {e}"));
    }
    // Whoever ends all processes politely does not mean this one; the agent takes the signals again.
    let polite: SigSet = [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT].into_iter().collect();
    if let Err(e) = polite.thread_block() {
        kmsg::log(kmsg::ERROR, &format!("guardian: cannot ignore signals: {e}"));
    }
    let mut first = Some(first);
    let mut keeper = Keeper::new();
    // Told apart from the agent in lists of processes; without it nothing is lost.
    let _ = set_name(c"kmorph-guardian");
    loop {
        keeper.turn(clock::now(), |link| {
            let _ = set_name(c"kmorph-agent");
            if let Err(e) = polite.thread_unblock() {
                kmsg::log(kmsg::ERROR, &format!("the agent ignores signals: {e}"));
            }
            serve::run(first.take(), cmdline, link)
        });
        // From here on only the agent can say that it is ready: its end must not be held open by us.
        first = None;
        let wait = keeper.due().map_or(LONG, |due| due.saturating_sub(clock::now()));
        let fd = keeper.fd();
        let mut fds: Vec<PollFd> = fd.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        // A signal that ends the wait early only makes for one more turn.
        let _ = poll(&mut fds, clock::poll_timeout(wait).unwrap_or(PollTimeout::MAX));
    }
}
