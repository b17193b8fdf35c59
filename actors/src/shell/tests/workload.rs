//! Workloads of scripted kernels: they count, and take their count along in a morph.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kmorph_platform::{InstanceId, Stream};
use kmorph_state::hook::{ExportError, Workload};
use kmorph_state::memory::Memory;
use kmorph_state::service::{App, Service};
use kmorph_state::wire::State;
use kmp::message::{
    Message, MorphCommit, MorphNegotiate, MorphPrepare, MorphRollback, MorphTransferState, MorphValidate,
    Reply, Section, SectionDigest, Topology,
};

use super::fake::Next;

/// Every byte of a client is answered with the count so far, eight bytes.
pub struct Count;

impl App for Count {
    fn layout(&self) -> (&'static str, u32) {
        ("test,count", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        if input.is_empty() {
            return Ok(0);
        }
        let cell = memory.change(0, 8).ok_or("no memory")?;
        let count = u64::from_le_bytes(cell.try_into().map_err(|_| "no cell")?) + 1;
        cell.copy_from_slice(&count.to_le_bytes());
        answers.extend_from_slice(&count.to_le_bytes());
        Ok(1)
    }
}

type Life = (InstanceId, u64);

struct One {
    service: Arc<Service<Count>>,
    /// It is gone: cut when its kernel is.
    clients: Vec<UnixStream>,
    offered: Vec<Section>,
    /// What came from the other kernel: the round, and what it comes to there.
    arrived: Option<(u32, Vec<SectionDigest>)>,
    /// It has taken over by itself.
    took_over: bool,
    alive: bool,
}

#[derive(Default)]
pub struct Workloads {
    on: AtomicBool,
    /// State goes from kernel to kernel, and the new one can take over by itself.
    directly: AtomicBool,
    all: Mutex<HashMap<Life, One>>,
    scripts: Mutex<HashMap<String, Vec<Next>>>,
    log: Mutex<Vec<String>>,
    killed: Mutex<Vec<Life>>,
    told: Mutex<HashMap<Life, Topology>>,
}

fn yes() -> Option<Reply> {
    Some(Reply { ok: true, detail: String::new() })
}

fn judged(done: Result<(), String>) -> Option<Reply> {
    match done {
        Ok(()) => yes(),
        Err(detail) => Some(Reply { ok: false, detail }),
    }
}

/// What comes of a message.
pub enum Outcome {
    Answers(Vec<Message>),
    /// The kernel dies of it.
    Dies,
    /// The connection is lost.
    Lost,
}

impl Workloads {
    /// Kernels that are booted from now on have one.
    pub fn switch_on(&self) {
        self.on.store(true, Ordering::SeqCst);
    }

    /// Their state goes from kernel to kernel.
    pub fn go_directly(&self) {
        self.directly.store(true, Ordering::SeqCst);
    }

    pub fn boot(&self, life: Life) {
        // A kernel that was removed again leaves its number to the next one.
        self.killed.lock().unwrap().retain(|l| *l != life);
        if self.on.load(Ordering::SeqCst) {
            let service = Arc::new(Service::new("count", Count, 64 << 10));
            let one = One {
                service,
                clients: vec![],
                offered: vec![],
                arrived: None,
                took_over: false,
                alive: true,
            };
            self.all.lock().unwrap().insert(life, one);
        }
    }

    pub fn end(&self, life: Life) {
        if let Some(one) = self.all.lock().unwrap().get_mut(&life) {
            one.alive = false;
            for client in one.clients.drain(..) {
                let _ = client.shutdown(Shutdown::Both);
            }
        }
    }

    /// kmorphd says which instances there are.
    pub fn hear(&self, life: Life, topology: Topology) {
        self.told.lock().unwrap().insert(life, topology);
    }

    /// What this kernel was told last.
    pub fn told(&self, life: Life) -> Topology {
        self.told.lock().unwrap().get(&life).cloned().unwrap_or_default()
    }

    pub fn kill(&self, life: Life) {
        self.killed.lock().unwrap().push(life);
        self.end(life);
    }

    pub fn killed(&self, life: Life) -> bool {
        self.killed.lock().unwrap().contains(&life)
    }

    /// What the next messages of these kinds do: "511 VALIDATE". "ACTIVATE": the workload cannot.
    pub fn script(&self, on: &str, next: Next) {
        self.scripts.lock().unwrap().entry(on.into()).or_default().push(next);
    }

    pub fn forget_scripts(&self) {
        self.scripts.lock().unwrap().clear();
    }

    /// Messages so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Kernels whose workload serves.
    pub fn serving(&self) -> Vec<u16> {
        let all = self.all.lock().unwrap();
        let mut ids: Vec<u16> = all
            .iter()
            .filter(|(_, one)| one.alive && one.service.state() == State::Active)
            .map(|((id, _), _)| id.0)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// A client of the kernel's service.
    pub fn connect(&self, life: Life) -> Option<Box<dyn Stream>> {
        let mut all = self.all.lock().unwrap();
        let one = all.get_mut(&life).filter(|one| one.alive)?;
        let (ours, theirs) = UnixStream::pair().unwrap();
        one.clients.push(theirs.try_clone().unwrap());
        let service = one.service.clone();
        std::thread::spawn(move || {
            let _ = service.serve(&theirs, &theirs);
            let _ = theirs.shutdown(Shutdown::Both);
        });
        ours.set_nonblocking(true).unwrap();
        Some(Box::new(tokio::net::UnixStream::from_std(ours).unwrap()))
    }

    /// Count once, as a client of this kernel would.
    pub fn count(&self, id: u16) -> u64 {
        let service = {
            let all = self.all.lock().unwrap();
            let one = all.iter().find(|((i, _), one)| i.0 == id && one.alive).expect("it has a workload");
            one.1.service.clone()
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serving = std::thread::spawn(move || service.serve(&theirs, &theirs).map(|()| theirs));
        let count = ask_once(ours);
        serving.join().unwrap().unwrap();
        count
    }

    pub fn heartbeat(&self, life: Life, serves: bool) {
        let all = self.all.lock().unwrap();
        if let Some(one) = all.get(&life).filter(|one| serves && one.service.state() == State::New) {
            one.service.activate().unwrap();
        }
    }

    pub async fn message(&self, life: Life, message: Message) -> Outcome {
        let name = message.kind().name().trim_start_matches("MORPH_").to_owned();
        let name = match &message {
            Message::MorphTransferState(m) if m.last && m.takes_over && m.freeze => "TAKE".into(),
            Message::MorphTransferState(m) if m.last => "END".into(),
            Message::MorphTransferState(m) if m.freeze => "FREEZE".into(),
            Message::MorphTransferState(m) if !m.data.0.is_empty() => "PIECE".into(),
            _ => name,
        };
        let on = format!("{} {name}", life.0);
        self.log.lock().unwrap().push(on.clone());
        let next = self.scripts.lock().unwrap().get_mut(&on).and_then(Vec::pop);
        let (mut partial, mut lost) = (false, None);
        match next {
            Some(Next::Die) => return Outcome::Dies,
            Some(Next::Fail(_)) => return Outcome::Lost,
            Some(Next::Block(gate)) => gate.notified().await,
            Some(Next::Partial(_)) => partial = true,
            Some(Next::Unanswered(gate)) => lost = Some(gate),
            Some(Next::Late(time)) => tokio::time::sleep(time).await,
            Some(Next::Panic) | None => {}
        }
        if let Message::MorphTransferState(m) = &message
            && m.last
            && m.direct
            && !self.arrives(life, m.round).await
        {
            return Outcome::Lost;
        }
        let refuses = on.ends_with("TAKE") && self.scripts.lock().unwrap().remove("ACTIVATE").is_some();
        let outcome = self.answer(life, message, partial, refuses);
        match lost {
            Some(gate) => {
                gate.notified().await;
                Outcome::Lost
            }
            None => outcome,
        }
    }

    /// Wait until a round has come from the other kernel; `false` when none comes any more.
    async fn arrives(&self, life: Life, round: u32) -> bool {
        loop {
            match self.all.lock().unwrap().get(&life) {
                Some(one) if one.alive && !one.offered.is_empty() => {
                    if one.arrived.as_ref().is_some_and(|(r, _)| *r >= round) {
                        return true;
                    }
                }
                _ => return false,
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    fn answer(&self, life: Life, message: Message, partial: bool, refuses: bool) -> Outcome {
        let mut all = self.all.lock().unwrap();
        let directly = self.directly.load(Ordering::SeqCst);
        match all.get_mut(&life) {
            Some(one) => {
                let mut answers = one.answer(message, directly, partial, refuses);
                let peer = answers.iter().find_map(|a| match a {
                    Message::MorphTransferState(m) if m.last && !m.direct && m.peer != 0 => Some(m.peer),
                    _ => None,
                });
                let to = peer.and_then(|p| all.iter_mut().find(|((id, _), one)| id.0 == p && one.alive));
                if let Some((_, to)) = to {
                    answers = to.takes(answers);
                }
                // Not everything that was sent is there.
                for answer in answers.iter_mut().filter(|_| partial) {
                    if let Message::MorphValidate(m) = answer {
                        m.digests[1].digest = vec![0].into();
                    }
                }
                Outcome::Answers(answers)
            }
            None => Outcome::Answers(stateless(message)),
        }
    }
}

/// What an agent answers that has no workloads.
fn stateless(message: Message) -> Vec<Message> {
    vec![match message {
        Message::MorphPrepare(m) => MorphPrepare { reply: yes(), ..m }.into(),
        Message::MorphNegotiate(m) => MorphNegotiate { sections: vec![], reply: yes(), ..m }.into(),
        Message::MorphCommit(m) => MorphCommit { reply: yes(), ..m }.into(),
        Message::MorphRollback(m) => MorphRollback { reply: yes(), ..m }.into(),
        other => panic!("not without state: {other:?}"),
    }]
}

impl One {
    fn answer(&mut self, message: Message, directly: bool, partial: bool, refuses: bool) -> Vec<Message> {
        let s = &self.service;
        match message {
            Message::MorphNegotiate(m) if m.sections.is_empty() => {
                let own = s.sections().into_iter().map(|s| Section {
                    compatible: s.compatible,
                    name: format!("count/{}", s.name),
                    size: s.size,
                    version: s.version,
                });
                self.offered = if s.state() == State::Active { own.collect() } else { vec![] };
                let sections = self.offered.clone();
                vec![MorphNegotiate { sections, takes_over: directly, reply: yes(), ..m }.into()]
            }
            Message::MorphNegotiate(m) => {
                let new = s.state() == State::New;
                self.offered.clone_from(&m.sections);
                let reply = judged(if new { Ok(()) } else { Err("it takes no state".into()) });
                let token = u64::from(directly);
                vec![MorphNegotiate { reply, token, takes_over: directly, ..m }.into()]
            }
            Message::MorphTransferState(m) if m.last => {
                let names: Vec<&str> =
                    self.offered.iter().map(|s| s.name.trim_start_matches("count/")).collect();
                let done = names.iter().try_for_each(|n| s.imported(n));
                let (morph, freeze) = (m.morph, m.freeze && done.is_ok());
                if m.takes_over && m.freeze {
                    return vec![self.take_over(m, partial, refuses)];
                }
                let mut out = vec![MorphTransferState { reply: judged(done), ..m }.into()];
                if freeze {
                    out.push(MorphValidate { morph, digests: self.digests(), reply: None }.into());
                }
                out
            }
            Message::MorphTransferState(m) if m.data.0.is_empty() => self.export(m),
            Message::MorphTransferState(m) => {
                let name = self.offered[m.section as usize].name.trim_start_matches("count/");
                s.import(name, m.offset, &kmorph_state::piece::Piece::from(&*m.data.0)).unwrap();
                vec![]
            }
            Message::MorphValidate(m) => {
                vec![MorphValidate { digests: self.digests(), reply: yes(), ..m }.into()]
            }
            Message::MorphCommit(m) => {
                let done = if m.serves { s.activate() } else { s.retire() };
                vec![MorphCommit { reply: judged(done), ..m }.into()]
            }
            Message::MorphRollback(m) => {
                let took_over = !m.serves && (self.took_over || s.state() == State::Active);
                let done = match (m.serves, took_over) {
                    (true, _) => s.thaw(),
                    (_, true) if s.state() == State::Active => Ok(()),
                    (_, true) => Err("no room".into()),
                    _ => s.discard(),
                };
                if !m.serves && !took_over {
                    self.offered.clear();
                }
                vec![MorphRollback { reply: judged(done), took_over, ..m }.into()]
            }
            other => stateless(other),
        }
    }

    /// Put what comes from another kernel in its place. What is said of that to the daemon.
    fn takes(&mut self, said: Vec<Message>) -> Vec<Message> {
        let (mut bytes, mut out, mut ended) = (0, vec![], None);
        for message in said {
            match message {
                Message::MorphTransferState(m) if !m.last => {
                    bytes += m.data.0.len() as u64;
                    self.answer(m.into(), true, false, false);
                }
                Message::MorphTransferState(m) => {
                    ended = Some(m.round);
                    out.push(MorphTransferState { direct: true, bytes, sent: bytes, ..m }.into());
                }
                Message::MorphValidate(m) => {
                    self.arrived = ended.map(|round| (round, m.digests.clone()));
                    out.push(m.into());
                }
                other => out.push(other),
            }
        }
        if let (Some(round), true) = (ended, self.arrived.as_ref().is_none_or(|(r, _)| Some(*r) != ended)) {
            self.arrived = Some((round, vec![]));
        }
        out
    }

    /// Serve, when everything is there.
    fn take_over(&mut self, m: MorphTransferState, partial: bool, refuses: bool) -> Message {
        let mut own = self.digests();
        if partial {
            own[1].digest = vec![0].into();
        }
        let sent = self.arrived.as_ref().map(|(_, digests)| digests);
        let wrong = self
            .offered
            .iter()
            .zip(&own)
            .enumerate()
            .find(|(n, (_, own))| sent.and_then(|s| s.get(*n)).is_none_or(|sent| sent != *own));
        let (took_over, done) = match wrong {
            Some((_, (section, _))) => {
                (false, Err(format!("section {} differs from what was sent", section.name)))
            }
            None if refuses => (true, Err("no room".into())),
            None => (true, self.service.activate()),
        };
        self.took_over = took_over;
        MorphTransferState { took_over, reply: judged(done), ..m }.into()
    }

    fn digests(&self) -> Vec<SectionDigest> {
        let digest = |(index, section): (usize, &Section)| {
            let digest = self.service.digest(section.name.trim_start_matches("count/")).unwrap();
            SectionDigest { section: index as u32, algorithm: String::new(), digest: digest.into() }
        };
        self.offered.iter().enumerate().map(digest).collect()
    }

    fn export(&self, m: MorphTransferState) -> Vec<Message> {
        let (morph, round) = (m.morph, m.round);
        if m.freeze {
            self.service.freeze().unwrap();
        }
        let mut out: Vec<Message> = vec![];
        for (index, section) in self.offered.iter().enumerate() {
            let mut sink = kmorph_state::piece::each(|offset, bytes| {
                let data = bytes.to_vec().into();
                let piece = MorphTransferState {
                    morph,
                    round,
                    section: index as u32,
                    offset,
                    data,
                    ..Default::default()
                };
                out.push(piece.into());
                Ok(())
            });
            let exported =
                self.service.export(section.name.trim_start_matches("count/"), round == 0, &mut sink);
            assert!(!matches!(exported, Err(ExportError::Io(_) | ExportError::Refused(_))));
        }
        out.push(MorphTransferState { last: true, reply: yes(), ..m }.into());
        if m.freeze {
            out.push(MorphValidate { morph, digests: self.digests(), reply: None }.into());
        }
        out
    }
}

/// The session protocol by hand: one byte, one answer.
fn ask_once(mut stream: UnixStream) -> u64 {
    use kmorph_state::session::{Greeting, HEAD, Head};
    use std::io::{Read, Write};
    let greeting = Greeting { id: rand::random(), resume: false };
    stream.write_all(greeting.to_string().as_bytes()).unwrap();
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte).unwrap();
    }
    stream.write_all(&Head { length: 1, end: false, confirmed: 0 }.encode()).unwrap();
    stream.write_all(b"+").unwrap();
    let (mut head, mut count) = ([0; HEAD], [0; 8]);
    stream.read_exact(&mut head).unwrap();
    stream.read_exact(&mut count).unwrap();
    u64::from_le_bytes(count)
}
