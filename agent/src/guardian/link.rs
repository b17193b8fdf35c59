//! The pipe from the agent to its guardian: messages of five bytes, which the kernel never splits.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Event, watchdog};

const PET: u8 = 1;
const TOLD: u8 = 2;
const OBEYED: u8 = 3;
const SIZE: usize = 5;

/// The agent's end.
pub struct Link {
    pipe: std::fs::File,
    told: AtomicU32,
    changed: Notify,
    /// How often the agent was started again.
    pub restarts: u32,
}

impl Link {
    /// Tell the guardian what kmorphd wants of it.
    pub fn tell(&self, guardian_ms: u32) {
        if self.told.swap(guardian_ms, Ordering::Relaxed) != guardian_ms {
            self.send(TOLD, guardian_ms);
            self.changed.notify_one();
        }
    }

    /// Pet the guardian for as long as this runtime turns and it wants to be petted.
    pub async fn pet(&self) -> Result<(), String> {
        loop {
            let Some(limit) = watchdog(self.told.load(Ordering::Relaxed)) else {
                self.changed.notified().await;
                continue;
            };
            self.send(PET, 0);
            // A new limit counts at once. Either way it is time to pet again.
            let _ = timeout(limit / 4, self.changed.notified()).await;
        }
    }

    /// A link nobody listens to.
    #[cfg(test)]
    pub fn unheard(restarts: u32) -> Link {
        make(0, restarts).unwrap().1
    }

    /// Tell a stand-in's kernel that its latest order is being followed.
    pub fn obeyed(&self) {
        self.send(OBEYED, 0);
    }

    fn send(&self, kind: u8, value: u32) {
        let mut message = [kind, 0, 0, 0, 0];
        message[1..].copy_from_slice(&value.to_le_bytes());
        // A full pipe means that the guardian is late and has enough to read; a closed one that it is gone.
        let _ = (&self.pipe).write(&message);
    }
}

/// The guardian's end.
pub struct Ear(std::fs::File);

/// Both ends. `told` is what the guardian knows already.
pub fn make(told: u32, restarts: u32) -> nix::Result<(Ear, Link)> {
    let (theirs, ours): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let link = Link { pipe: ours.into(), told: AtomicU32::new(told), changed: Notify::new(), restarts };
    Ok((Ear(theirs.into()), link))
}

impl Ear {
    /// To wait on.
    pub fn file(&self) -> &std::fs::File {
        &self.0
    }

    /// What was said; the flag is set when nobody will say anything any more.
    pub fn listen(&mut self) -> (Vec<Event>, bool) {
        let mut buf = [0; SIZE * 64];
        match self.0.read(&mut buf) {
            Ok(0) => (vec![], true),
            Ok(n) => (buf[..n].chunks_exact(SIZE).filter_map(read).collect(), false),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => (vec![], false),
            Err(_) => (vec![], true),
        }
    }
}

fn read(message: &[u8]) -> Option<Event> {
    let value = u32::from_le_bytes(message.get(1..SIZE)?.try_into().ok()?);
    match message[0] {
        PET => Some(Event::Petted),
        TOLD => Some(Event::Told(value)),
        OBEYED => Some(Event::Obeyed),
        _ => None,
    }
}

/// Longest sleep of a guardian with nothing to wait for.
pub const LONG: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_the_agent_says_is_heard() {
        let (mut ear, link) = make(0, 3).unwrap();
        assert_eq!(ear.listen(), (vec![], false));
        link.tell(0);
        link.tell(400);
        link.tell(400);
        assert_eq!(ear.listen(), (vec![Event::Told(400)], false));
        // Four times within the limit, and once for the news.
        let _ = timeout(Duration::from_millis(390), link.pet()).await;
        assert_eq!(ear.listen().0, vec![Event::Petted; 5]);
        link.tell(0);
        let _ = timeout(Duration::from_secs(60), link.pet()).await;
        assert_eq!(ear.listen().0, [Event::Told(0)], "nobody wants to be petted");
        drop(link);
        assert_eq!(ear.listen(), (vec![], true));
    }

    #[test]
    fn a_full_pipe_stops_nobody() {
        let (mut ear, link) = make(0, 0).unwrap();
        for _ in 0..100_000 {
            link.send(PET, 0);
        }
        while !ear.listen().0.is_empty() {}
        link.tell(7);
        assert_eq!(ear.listen().0, [Event::Told(7)]);
    }
}
