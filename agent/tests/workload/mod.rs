//! What a test of workloads is written with: the example programs, the daemon's end of a morph, and the switch's end of
//! a session.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kmorph_platform::{InstanceId, Platform, Stream};
use kmorph_state::session::{CONFIRM, FRAME_LIMIT, Greeting, HEAD, Head, Welcome};
use kmp::io::Connection;
use kmp::message::{
    DIRECT, HeartbeatReq, Hello, Message, MorphCommit, MorphNegotiate, MorphRollback, MorphTransferState,
    MorphValidate, Reply, Role, Section, SectionDigest,
};
use kmp::session::Event;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::common::{Bench, LIMIT, Link, SILENCE, answer, hello, until};

const MORPH: u64 = 7;
/// The vsock port the examples serve on.
const PORT: u32 = 5000;

/// An example program.
pub struct Example {
    pub name: &'static str,
    command: Vec<PathBuf>,
}

/// Both, the C one compiled without a warning.
pub fn examples() -> [Example; 2] {
    static BUILT: OnceLock<tempfile::TempDir> = OnceLock::new();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("state/examples");
    let built = BUILT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let cc = std::process::Command::new("cc")
            .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .args([dir.path().join("counter"), sources.join("counter.c")])
            .output()
            .unwrap();
        assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
        dir
    });
    [
        Example { name: "counter.py", command: vec!["python3".into(), sources.join("counter.py")] },
        Example { name: "counter.c", command: vec![built.path().join("counter")] },
    ]
}

impl Example {
    /// The program, which ends with the test.
    pub fn start(&self, agent: &Path, clients: &Path) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).arg("--listen").arg(clients);
        command.env("KMORPH_STATE", agent).kill_on_drop(true);
        command
    }
}

/// A stand-in, a connection to its agent as a morph has it, and its workload.
pub struct Kernel {
    id: u16,
    daemon: Option<Link>,
    workload: Option<Child>,
}

impl Kernel {
    pub async fn boot(b: &Bench, id: u16) -> Kernel {
        b.boot(id, "").await;
        // It serves from here on.
        drop(b.connect(id).await);
        let stream = b.raw(id).await.unwrap();
        let wanted = Hello { role: Role::Bulk, ..hello(id, 1) };
        let daemon = Connection::connect(stream, wanted, || 1, LIMIT).await.unwrap().0;
        Kernel { id, daemon: Some(daemon), workload: None }
    }

    fn socket(&self, b: &Bench) -> PathBuf {
        b.dir.join(self.id.to_string()).join(kmp::stand_in::names::WORKLOADS)
    }

    /// Start an example in it.
    pub fn run(&mut self, b: &Bench, example: &Example) {
        let clients = b.dir.join(kmp::stand_in::names::port(self.id, PORT));
        self.workload = Some(example.start(&self.socket(b), &clients).spawn().unwrap());
    }

    /// Be a workload in it.
    pub async fn workload(&self, b: &Bench) -> UnixStream {
        UnixStream::connect(self.socket(b)).await.unwrap()
    }

    /// This kernel is the instance.
    pub async fn serves(&self, b: &Bench) {
        let mut control = b.connect(self.id).await;
        let beat = HeartbeatReq { metrics: false, guardian_ms: 0, serves: true };
        control.queue(1, &beat.into()).unwrap();
        answer(&mut control).await.unwrap();
    }

    /// Wait until its log says this.
    pub async fn logs(&self, b: &Bench, text: &str) {
        let says = async || {
            let log = b.process.console(InstanceId(self.id), 0).await.unwrap();
            log.records.iter().any(|r| r.text.contains(text))
        };
        until(says).await;
    }

    /// Another connection of the daemon.
    pub async fn call_again(&mut self, b: &Bench) {
        let stream = b.raw(self.id).await.unwrap();
        let wanted = Hello { role: Role::Bulk, ..hello(self.id, 1) };
        self.daemon = Some(Connection::connect(stream, wanted, || 1, LIMIT).await.unwrap().0);
    }

    /// The daemon lets go of it.
    pub fn hang_up(&mut self) {
        self.daemon = None;
    }

    async fn message(&mut self) -> Message {
        match timeout(LIMIT, self.daemon.as_mut().unwrap().next()).await.unwrap() {
            Event::Message { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }

    fn say(&mut self, message: impl Into<Message>) {
        self.daemon.as_mut().unwrap().queue(1, &message.into()).unwrap();
    }

    /// The sections its workload offers, as soon as it serves.
    pub async fn offers(&mut self) -> Vec<Section> {
        let mut sections = vec![];
        until(async || {
            sections = self.negotiate(vec![]).await.0;
            !sections.is_empty()
        })
        .await;
        sections
    }

    pub async fn negotiate(&mut self, sections: Vec<Section>) -> (Vec<Section>, Reply) {
        let wait_ms = LIMIT.as_millis() as u64;
        self.say(MorphNegotiate { morph: MORPH, sections, wait_ms, ..Default::default() });
        match self.message().await {
            Message::MorphNegotiate(m) => (m.sections, m.reply.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    /// Everything sent in a round, how it ended, and the digests of what is frozen.
    pub async fn export(
        &mut self,
        round: u32,
        freeze: bool,
    ) -> (Vec<MorphTransferState>, Reply, Option<Vec<SectionDigest>>) {
        self.say(MorphTransferState { morph: MORPH, round, freeze, ..Default::default() });
        let mut pieces = vec![];
        loop {
            let Message::MorphTransferState(m) = self.message().await else { panic!("not a piece") };
            if !m.last {
                pieces.push(m);
                continue;
            }
            let end = m.reply.unwrap();
            let digests = match (freeze && end.ok).then_some(()) {
                Some(()) => match self.message().await {
                    Message::MorphValidate(v) => Some(v.digests),
                    other => panic!("{other:?}"),
                },
                None => None,
            };
            return (pieces, end, digests);
        }
    }

    /// What another kernel has to say to give it state directly; 0: it takes none.
    pub async fn lets_in(&mut self, sections: Vec<Section>) -> u64 {
        self.reads(sections, 0).await.0
    }

    /// The same with a window: its key, when it can be used.
    pub async fn reads(&mut self, sections: Vec<Section>, window: u64) -> (u64, u64) {
        let capabilities = vec![DIRECT.into()];
        let wait_ms = LIMIT.as_millis() as u64;
        let ask =
            MorphNegotiate { morph: MORPH, capabilities, sections, wait_ms, window, ..Default::default() };
        self.say(ask);
        match self.message().await {
            Message::MorphNegotiate(m) => {
                assert!(m.reply.as_ref().unwrap().ok, "{m:?}");
                (m.token, m.window)
            }
            other => panic!("{other:?}"),
        }
    }

    /// A round that is given to another kernel directly, if it lets that happen: pieces that came here, and the end.
    pub async fn give(
        &mut self,
        round: u32,
        peer: u16,
        token: u64,
        freeze: bool,
    ) -> (usize, MorphTransferState) {
        self.puts(round, peer, token, freeze, 0).await
    }

    /// The same through a window.
    pub async fn puts(
        &mut self,
        round: u32,
        peer: u16,
        token: u64,
        freeze: bool,
        window: u64,
    ) -> (usize, MorphTransferState) {
        let ask =
            MorphTransferState { morph: MORPH, round, peer, token, freeze, window, ..Default::default() };
        self.say(ask);
        self.ended().await
    }

    /// Have a round begin.
    pub async fn begins(&mut self, round: u32, peer: u16, token: u64, window: u64) {
        let ask = MorphTransferState { morph: MORPH, round, peer, token, window, ..Default::default() };
        self.say(ask);
        self.daemon.as_mut().unwrap().flush().await.unwrap();
    }

    /// How it ended, and pieces that came here.
    pub async fn ended(&mut self) -> (usize, MorphTransferState) {
        let mut came = 0;
        loop {
            match self.message().await {
                Message::MorphTransferState(m) if m.last => return (came, m),
                // How far it is, when pieces go another way.
                Message::MorphTransferState(m) if m.data.0.is_empty() => {}
                Message::MorphTransferState(_) => came += 1,
                other => panic!("{other:?}"),
            }
        }
    }

    /// The digests that follow a round with the workload standing still.
    pub async fn digests(&mut self) -> Vec<SectionDigest> {
        match self.message().await {
            Message::MorphValidate(v) => v.digests,
            other => panic!("{other:?}"),
        }
    }

    /// All of a round has been sent directly.
    pub async fn taken(&mut self, round: u32) -> Reply {
        self.say(MorphTransferState { morph: MORPH, round, last: true, direct: true, ..Default::default() });
        match self.message().await {
            Message::MorphTransferState(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// A round in which the workloads are throttled: by how much they are, and what the agent says of it.
    pub async fn throttle(&mut self, percent: u8) -> (Option<u8>, Reply) {
        let throttle = Some(percent);
        self.say(MorphTransferState { morph: MORPH, round: 1, throttle, ..Default::default() });
        loop {
            match self.message().await {
                Message::MorphTransferState(m) if m.last => return (m.throttle, m.reply.unwrap()),
                Message::MorphTransferState(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn import(&mut self, round: u32, pieces: Vec<MorphTransferState>) -> Reply {
        for piece in pieces {
            self.say(piece);
        }
        self.say(MorphTransferState { morph: MORPH, round, last: true, ..Default::default() });
        match self.message().await {
            Message::MorphTransferState(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The last round: what everything has come to.
    pub async fn import_last(&mut self, round: u32, pieces: Vec<MorphTransferState>) -> Vec<SectionDigest> {
        for piece in pieces {
            self.say(piece);
        }
        self.ends(round, false).await
    }

    /// All of the last round has been sent directly, or will be: what everything has come to.
    pub async fn taken_last(&mut self, round: u32) -> Vec<SectionDigest> {
        self.ends(round, true).await
    }

    async fn ends(&mut self, round: u32, direct: bool) -> Vec<SectionDigest> {
        let (last, freeze) = (true, true);
        self.say(MorphTransferState { morph: MORPH, round, last, direct, freeze, ..Default::default() });
        match self.message().await {
            Message::MorphTransferState(MorphTransferState { reply: Some(r), .. }) if r.ok => {}
            other => panic!("{other:?}"),
        }
        self.digests().await
    }

    /// What everything has come to.
    pub async fn validate(&mut self) -> MorphValidate {
        self.say(MorphValidate { morph: MORPH, ..Default::default() });
        match self.message().await {
            Message::MorphValidate(m) => m,
            other => panic!("{other:?}"),
        }
    }

    pub async fn commit(&mut self, serves: bool) -> Reply {
        self.say(MorphCommit { morph: MORPH, serves, reply: None });
        match self.message().await {
            Message::MorphCommit(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn roll_back(&mut self, serves: bool) -> Reply {
        self.say(MorphRollback { morph: MORPH, serves, ..Default::default() });
        match self.message().await {
            Message::MorphRollback(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

type Wire = BufReader<Box<dyn Stream>>;

/// The switch's end of a session.
pub struct Session {
    stream: Wire,
    id: u64,
    /// What the client sent, from the beginning.
    sent: Vec<u8>,
    /// What it has been given.
    have: u64,
    /// What of that was confirmed.
    told: u64,
    /// Number of the next byte of the connection.
    next: u64,
    /// Given, and not yet looked at.
    answers: Vec<u8>,
    over: bool,
}

impl Session {
    async fn greet(b: &Bench, kernel: u16, greeting: Greeting) -> Wire {
        // It may not listen yet.
        let mut stream = None;
        until(async || {
            stream = b.process.connect(InstanceId(kernel), 1, PORT).await.ok();
            stream.is_some()
        })
        .await;
        let mut stream = BufReader::new(stream.unwrap());
        stream.write_all(greeting.to_string().as_bytes()).await.unwrap();
        stream
    }

    fn on(stream: Wire, id: u64) -> Session {
        Session { stream, id, sent: vec![], have: 0, told: 0, next: 0, answers: vec![], over: false }
    }

    pub async fn begin(b: &Bench, kernel: u16) -> Session {
        let id = 0xfedc_ba98_7654_3210;
        let mut session = Session::on(Session::greet(b, kernel, Greeting { id, resume: false }).await, id);
        assert_eq!(Welcome::parse(&session.line().await), Ok(Welcome::Ok { consumed: 0, from: 0 }));
        session
    }

    /// Whether a session is known.
    pub async fn is_known(b: &Bench, kernel: u16, id: u64) -> bool {
        let mut session = Session::on(Session::greet(b, kernel, Greeting { id, resume: true }).await, id);
        Welcome::parse(&session.line().await).unwrap() != Welcome::Unknown
    }

    /// Be there when the next kernel begins to serve.
    pub async fn park(&self, b: &Bench, kernel: u16) -> Wire {
        Session::greet(b, kernel, Greeting { id: self.id, resume: true }).await
    }

    /// Go on there: what was not taken is sent again.
    pub async fn moves(&mut self, to: Wire) {
        self.stream = to;
        let welcome = Welcome::parse(&self.line().await).unwrap();
        let Welcome::Ok { consumed, from } = welcome else { panic!("the session is not known") };
        assert!(from <= self.have && consumed <= self.sent.len() as u64, "{welcome:?}");
        (self.next, self.over) = (from, false);
        for frame in self.sent.split_off(consumed as usize).chunks(FRAME_LIMIT) {
            self.send(frame).await;
        }
    }

    pub async fn line(&mut self) -> String {
        let mut line = String::new();
        timeout(LIMIT, self.stream.read_line(&mut line)).await.unwrap().unwrap();
        line
    }

    async fn frame(&mut self, bytes: &[u8], end: bool) {
        let head = Head { length: bytes.len(), end, confirmed: self.have };
        self.stream.write_all(&[&head.encode()[..], bytes].concat()).await.unwrap();
        self.sent.extend_from_slice(bytes);
        self.told = self.have;
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.frame(bytes, false).await;
    }

    pub async fn send_end(&mut self, bytes: &[u8]) {
        self.frame(bytes, true).await;
    }

    async fn receive(&mut self) {
        let mut head = [0; HEAD];
        timeout(LIMIT, self.stream.read_exact(&mut head)).await.unwrap().unwrap();
        let head = Head::decode(head).unwrap();
        assert!(head.confirmed <= self.sent.len() as u64, "{head:?}");
        let mut bytes = vec![0; head.length];
        timeout(LIMIT, self.stream.read_exact(&mut bytes)).await.unwrap().unwrap();
        let has = (self.have - self.next).min(bytes.len() as u64);
        self.next += bytes.len() as u64;
        self.have = self.have.max(self.next);
        self.answers.extend_from_slice(&bytes[has as usize..]);
        self.over |= head.end;
        if self.have - self.told >= CONFIRM {
            self.frame(&[], false).await;
        }
    }

    /// The next number.
    pub async fn answer(&mut self) -> u64 {
        loop {
            if let Some(end) = self.answers.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.answers.drain(..=end).collect();
                return String::from_utf8(line).unwrap().trim().parse().unwrap();
            }
            self.receive().await;
        }
    }

    pub async fn ask(&mut self) -> u64 {
        self.send(b"\n").await;
        self.answer().await
    }

    /// Whether the service says nothing for a while.
    pub async fn silent(&mut self) -> bool {
        timeout(SILENCE, self.stream.fill_buf()).await.is_err()
    }

    /// The switch lets go of it.
    pub fn leave(self) -> u64 {
        self.id
    }

    /// Whether the service says nothing more.
    pub async fn ended(&mut self) -> bool {
        while !self.over {
            self.receive().await;
        }
        self.answers.is_empty()
    }
}
