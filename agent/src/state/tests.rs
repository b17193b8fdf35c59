mod undone;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kmorph_state::hook::{self, Workload};
use kmorph_state::memory::Memory;
use kmorph_state::service::{App, Service};
use kmorph_state::session::{Greeting, HEAD, Head, Welcome};
use kmorph_state::wire::State;
use kmp::io::Connection;
use kmp::message::{
    Hello, Message, MorphCommit, MorphNegotiate, MorphRollback, MorphTransferState, MorphValidate, Reply,
    Role, Section,
};
use kmp::session::Event;
use tokio::io::DuplexStream;
use tokio::task::AbortHandle;

use super::hook::introduce;
use super::{Broker, Over, Reach, is_morph, serve};

const PATIENCE: Duration = Duration::from_secs(20);

/// Counts what it is sent: a byte is added to the cell it names, which is the answer.
#[derive(Default)]
struct Cells {
    /// It cannot begin.
    fails: Arc<AtomicBool>,
}

impl App for Cells {
    fn layout(&self) -> (&'static str, u32) {
        ("test,cells", 2)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        let [cell, ..] = input else { return Ok(0) };
        let cell = memory.change(usize::from(*cell) * 9000, 1).ok_or("no such cell")?;
        cell[0] = cell[0].wrapping_add(1);
        answers.push(cell[0]);
        Ok(1)
    }

    fn begin(&mut self, _: &mut Memory) -> Result<(), String> {
        match self.fails.load(Ordering::SeqCst) {
            true => Err("no room".into()),
            false => Ok(()),
        }
    }
}

type Cell = Arc<Service<Cells>>;

/// A kernel with one workload, and the daemon's connection to its agent.
struct Kernel {
    service: Cell,
    fails: Arc<AtomicBool>,
    broker: Arc<Broker>,
    daemon: Connection<DuplexStream>,
    /// The workload's connection, until it is aborted.
    connected: AbortHandle,
}

fn hello(role: Role) -> Hello {
    Hello { instance: 1, incarnation: 1, role, ..Hello::default() }
}

async fn daemon(broker: &Arc<Broker>) -> Connection<DuplexStream> {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let broker = broker.clone();
    tokio::spawn(async move {
        let opened = Connection::accept(theirs, hello(Role::Control), || 1, PATIENCE).await;
        let mut c = opened.unwrap().0;
        while let Event::Message { header, message } = c.next().await {
            assert!(is_morph(&message));
            if let Err(Over(_)) = serve(&broker, &mut c, header.sequence, message).await {
                return;
            }
        }
    });
    Connection::connect(ours, hello(Role::Bulk), || 1, PATIENCE).await.unwrap().0
}

/// Connect a workload to the agent.
async fn hooked(broker: &Arc<Broker>, service: &Cell) -> AbortHandle {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let service = service.clone();
    std::thread::spawn(move || hook::serve(&*service, &ours, "test"));
    theirs.set_nonblocking(true).unwrap();
    let theirs = tokio::net::UnixStream::from_std(theirs).unwrap();
    let introduced = introduce(theirs).await.unwrap();
    broker.enter(introduced.hook());
    tokio::spawn(introduced.run()).abort_handle()
}

async fn kernel() -> Kernel {
    let broker = Arc::<Broker>::default();
    let (service, fails) = cells("cells");
    let connected = hooked(&broker, &service).await;
    let daemon = daemon(&broker).await;
    Kernel { service, fails, broker, daemon, connected }
}

fn cells(name: &str) -> (Cell, Arc<AtomicBool>) {
    let app = Cells::default();
    let fails = app.fails.clone();
    (Arc::new(Service::new(name, app, 2_000_000)), fails)
}

impl Kernel {
    async fn is(&self, state: State) {
        let all = async {
            while self.broker.hooks().iter().any(|h| h.state() != state) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, all).await.unwrap();
    }

    async fn message(&mut self) -> Message {
        match tokio::time::timeout(PATIENCE, self.daemon.next()).await.unwrap() {
            Event::Message { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }

    async fn ask(&mut self, message: impl Into<Message>) -> Message {
        self.daemon.queue(1, &message.into()).unwrap();
        self.message().await
    }

    /// Everything sent in a round.
    async fn export(
        &mut self,
        round: u32,
        freeze: bool,
    ) -> (Vec<MorphTransferState>, Reply, Option<MorphValidate>) {
        let request = MorphTransferState { morph: 7, round, freeze, ..Default::default() };
        self.daemon.queue(1, &request.into()).unwrap();
        let mut pieces = vec![];
        loop {
            let Message::MorphTransferState(m) = self.message().await else { panic!("not a piece") };
            if !m.last {
                pieces.push(m);
                continue;
            }
            let end = m.reply.unwrap();
            let digests = match (freeze, end.ok) {
                (true, true) => match self.message().await {
                    Message::MorphValidate(v) => Some(v),
                    other => panic!("{other:?}"),
                },
                _ => None,
            };
            return (pieces, end, digests);
        }
    }

    async fn import(&mut self, round: u32, pieces: Vec<MorphTransferState>) -> Reply {
        for piece in pieces {
            self.daemon.queue(0, &piece.into()).unwrap();
        }
        let end = MorphTransferState { morph: 7, round, last: true, ..Default::default() };
        match self.ask(end).await {
            Message::MorphTransferState(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn negotiate(&mut self, sections: Vec<Section>) -> (Vec<Section>, Reply) {
        match self.ask(MorphNegotiate { morph: 7, sections, ..Default::default() }).await {
            Message::MorphNegotiate(m) => (m.sections, m.reply.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    async fn commit(&mut self, serves: bool) -> Reply {
        match self.ask(MorphCommit { morph: 7, serves, reply: None }).await {
            Message::MorphCommit(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    async fn roll_back(&mut self, serves: bool) -> Reply {
        match self.ask(MorphRollback { morph: 7, serves, ..Default::default() }).await {
            Message::MorphRollback(m) => m.reply.unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// The switch's end of a session.
struct Client {
    stream: UnixStream,
    id: u64,
    sent: u64,
    have: u64,
}

impl Client {
    fn join(service: &Cell, id: u64, resume: bool) -> UnixStream {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let service = service.clone();
        std::thread::spawn(move || service.serve(&theirs, &theirs));
        ours.write_all(Greeting { id, resume }.to_string().as_bytes()).unwrap();
        ours
    }

    fn welcome(stream: &mut UnixStream) -> Welcome {
        let (mut line, mut byte) = (String::new(), [0]);
        while byte[0] != b'\n' {
            stream.read_exact(&mut byte).unwrap();
            line.push(char::from(byte[0]));
        }
        Welcome::parse(&line).unwrap()
    }

    fn new(service: &Cell, id: u64) -> Client {
        let mut stream = Client::join(service, id, false);
        assert_eq!(Client::welcome(&mut stream), Welcome::Ok { consumed: 0, from: 0 });
        Client { stream, id, sent: 0, have: 0 }
    }

    fn send(&mut self, bytes: &[u8]) {
        let head = Head { length: bytes.len(), end: false, confirmed: self.have };
        self.stream.write_all(&head.encode()).unwrap();
        self.stream.write_all(bytes).unwrap();
        self.sent += bytes.len() as u64;
    }

    fn receive(&mut self) -> (Head, Vec<u8>) {
        let mut head = [0; HEAD];
        self.stream.read_exact(&mut head).unwrap();
        let head = Head::decode(head).unwrap();
        let mut bytes = vec![0; head.length];
        self.stream.read_exact(&mut bytes).unwrap();
        self.have += head.length as u64;
        (head, bytes)
    }

    fn ask(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.send(bytes);
        let mut all = vec![];
        while all.len() < bytes.len() {
            all.extend(self.receive().1);
        }
        all
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(f).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_clients_go_to_the_new_kernel_at_the_commit_and_not_before() {
    let (mut old, mut new) = (kernel().await, kernel().await);
    // Nobody serves before the daemon says who.
    old.is(State::New).await;
    old.broker.serves();
    old.is(State::Active).await;
    let service = old.service.clone();
    let mut client = blocking(move || {
        let mut client = Client::new(&service, 0xabc);
        assert_eq!(client.ask(&[1, 2, 1, 1]), [1, 1, 2, 3]);
        client
    })
    .await;

    let (offered, reply) = old.negotiate(vec![]).await;
    let names: BTreeMap<&str, (&str, u32)> =
        offered.iter().map(|s| (s.name.as_str(), (s.compatible.as_str(), s.version))).collect();
    assert_eq!(names["cells/memory"], ("test,cells", 2));
    assert_eq!((names.len(), reply.ok), (2, true));
    assert!(new.negotiate(offered).await.1.ok);

    let (pieces, reply, _) = old.export(0, false).await;
    let length: usize = pieces.iter().filter(|p| p.section == 0).map(|p| p.data.0.len()).sum();
    assert!(reply.ok && length == 2 * (4096 + 8), "two cells: {length}");
    assert!(new.import(0, pieces).await.ok);
    client = blocking(move || {
        assert_eq!(client.ask(&[200]), [1]);
        client
    })
    .await;
    let (pieces, ..) = old.export(1, false).await;
    let length: usize = pieces.iter().filter(|p| p.section == 0).map(|p| p.data.0.len()).sum();
    assert_eq!(length, 4096 + 8, "only what changed");
    assert!(new.import(1, pieces).await.ok);

    // A request that was sent and not taken when the old one froze is taken by the new one.
    let (pieces, reply, digests) = old.export(2, true).await;
    assert!(reply.ok);
    old.is(State::Frozen).await;
    client.send(&[1]);
    assert!(new.import(2, pieces).await.ok);
    let ask = MorphValidate { morph: 7, ..Default::default() };
    let Message::MorphValidate(MorphValidate { reply: Some(reply), digests: came, .. }) = new.ask(ask).await
    else {
        panic!("no digests")
    };
    assert!(reply.ok, "{reply:?}");
    assert_eq!((came.len(), came), (2, digests.unwrap().digests));

    // The connection that waits at the new one before the commit is answered after it.
    let (service, parked) = (new.service.clone(), client.id);
    let mut parked = blocking(move || Client::join(&service, parked, true)).await;
    assert!(new.commit(true).await.ok && old.commit(false).await.ok);
    new.is(State::Active).await;
    old.is(State::Retired).await;
    blocking(move || {
        assert_eq!(Client::welcome(&mut parked), Welcome::Ok { consumed: 5, from: 4 });
        // What it sends again has the client already.
        client.stream = parked;
        client.have = 4;
        assert_eq!(client.receive().1, [1]);
        assert_eq!(client.ask(&[1, 200]), [4, 2]);
    })
    .await;
    // Said again it changes nothing.
    assert!(new.commit(true).await.ok && old.commit(false).await.ok);
    let again = old.roll_back(true).await;
    assert!(again.ok, "a workload that retired is not thawed: {again:?}");
    assert_eq!(old.service.state(), State::Retired);
}

#[tokio::test(start_paused = true)]
async fn a_workload_that_could_not_begin_is_told_again_and_less_often_each_time() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let broker = Arc::<Broker>::default();
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let mut ours = BufReader::new(ours);
    ours.write_all(b"hello version=1 name=slow state=new\nready\n").await.unwrap();
    let introduced = introduce(theirs).await.unwrap();
    let hook = introduced.hook();
    broker.enter(hook.clone());
    tokio::spawn(introduced.run());
    let (mut told, mut last, mut waits) = (String::new(), tokio::time::Instant::now(), vec![]);
    for answer in ["error not yet\n", "error not yet\n", "error not yet\n", "ok\n"] {
        told.clear();
        let heartbeats = async {
            loop {
                broker.serves();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            read = ours.read_line(&mut told) => assert!(read.unwrap() > 0),
            () = heartbeats => {}
        }
        assert_eq!(told, "activate\n");
        waits.push(last.elapsed().as_secs());
        last = tokio::time::Instant::now();
        ours.write_all(answer.as_bytes()).await.unwrap();
    }
    assert_eq!(waits, [0, 1, 2, 4]);
    while hook.state() != State::Active {
        tokio::task::yield_now().await;
    }
    assert!(!hook.begins_again());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_morph_changes_nothing_for_the_clients_of_the_old_kernel() {
    let (mut old, mut new) = (kernel().await, kernel().await);
    old.broker.serves();
    old.is(State::Active).await;
    let service = old.service.clone();
    let mut client = blocking(move || {
        let mut client = Client::new(&service, 1);
        client.ask(&[3]);
        client
    })
    .await;
    let (offered, _) = old.negotiate(vec![]).await;
    assert!(new.negotiate(offered).await.1.ok);
    let (pieces, reply, _) = old.export(0, true).await;
    assert!(reply.ok && new.import(0, pieces).await.ok);
    client.send(&[3, 3]);
    // The agent is started anew: the workload stays frozen, and says so.
    hooked(&old.broker, &old.service).await;
    old.is(State::Frozen).await;
    old.daemon = daemon(&old.broker).await;
    assert!(old.roll_back(true).await.ok && new.roll_back(false).await.ok);
    old.is(State::Active).await;
    blocking(move || {
        let mut answers = vec![];
        while answers.len() < 2 {
            answers.extend(client.receive().1);
        }
        assert_eq!(answers, [2, 3]);
        assert_eq!(client.ask(&[3]), [4]);
    })
    .await;
    new.is(State::New).await;
}

/// Two kernels of a morph whose pieces go from the old one to the new one: everything is there but what changes from now
/// on.
async fn nearly_there(dir: &tempfile::TempDir) -> (Kernel, Kernel, u64) {
    let (mut old, mut new) = (kernel().await, kernel().await);
    for (kernel, id) in [(&old, 1), (&new, 2)] {
        kernel.broker.reaches(Reach::Folder(dir.path().to_owned(), id));
    }
    old.broker.serves();
    old.is(State::Active).await;
    let offers = old.ask(MorphNegotiate { morph: 7, ..Default::default() }).await;
    let Message::MorphNegotiate(MorphNegotiate { takes_over: true, sections, .. }) = offers else {
        panic!("{offers:?}")
    };
    let capabilities = vec![kmp::message::DIRECT.to_owned()];
    let agreed = new.ask(MorphNegotiate { morph: 7, capabilities, sections, ..Default::default() }).await;
    let Message::MorphNegotiate(MorphNegotiate { takes_over: true, token, .. }) = agreed else {
        panic!("{agreed:?}")
    };
    assert_ne!(token, 0);
    // A rehearsal: the old one goes on.
    let first = MorphTransferState { morph: 7, peer: 2, token, takes_over: true, ..Default::default() };
    assert!(old.end(first).await.direct);
    let end =
        MorphTransferState { morph: 7, last: true, direct: true, takes_over: true, ..Default::default() };
    let rehearsed = new.end(end).await;
    assert!(rehearsed.reply.unwrap().ok && !rehearsed.took_over);
    assert_eq!((old.service.state(), new.service.state()), (State::Active, State::New));
    (old, new, token)
}

impl Kernel {
    /// The end of a round.
    async fn end(&mut self, asked: MorphTransferState) -> MorphTransferState {
        match self.ask(asked).await {
            Message::MorphTransferState(m) if m.last => m,
            other => panic!("{other:?}"),
        }
    }

    /// Have it take over as soon as it has everything.
    fn takes_over(&mut self) -> impl Future<Output = MorphTransferState> {
        let (morph, round, yes) = (7, 1, true);
        self.end(MorphTransferState {
            morph,
            round,
            last: yes,
            direct: yes,
            freeze: yes,
            takes_over: yes,
            ..Default::default()
        })
    }

    /// Have it hand over to the other one.
    fn hands_over(&mut self, token: u64) -> impl Future<Output = MorphTransferState> {
        let (morph, round, peer, yes) = (7, 1, 2, true);
        self.end(MorphTransferState {
            morph,
            round,
            peer,
            token,
            freeze: yes,
            takes_over: yes,
            ..Default::default()
        })
    }

    /// Have it forget: whether it had taken over.
    async fn forgets(&mut self) -> bool {
        match self.ask(MorphRollback { morph: 7, ..Default::default() }).await {
            Message::MorphRollback(m) => {
                assert!(m.reply.unwrap().ok);
                m.took_over
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_takes_over_by_itself_when_it_has_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    // What it comes to is not what it came to in the rehearsal.
    let service = old.service.clone();
    blocking(move || assert_eq!(Client::new(&service, 5).ask(&[1]), [1])).await;
    let (took, gave) = tokio::join!(new.takes_over(), old.hands_over(token));
    assert!(took.took_over && took.reply.unwrap().ok);
    assert!(gave.direct && gave.reply.unwrap().ok);
    new.is(State::Active).await;
    old.is(State::Frozen).await;
    // Whoever asks is told, also another daemon, and it goes on.
    new.daemon = daemon(&new.broker).await;
    assert!(new.forgets().await);
    new.is(State::Active).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_was_told_to_forget_never_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    // Another daemon asks before everything is there.
    let mut asks = Kernel { daemon: daemon(&new.broker).await, ..kernel().await };
    let waits = tokio::spawn(async move {
        let took = new.takes_over().await;
        (new, took)
    });
    assert!(!asks.forgets().await);
    let gave = old.hands_over(token).await;
    let (new, took) = waits.await.unwrap();
    let why = took.reply.unwrap().detail;
    assert!(!took.took_over && why.contains("morph 7"), "{why}");
    assert!(gave.last);
    new.is(State::New).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_has_something_else_does_not_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, mut new, token) = nearly_there(&dir).await;
    // A page that nobody sent it.
    let mut page = 0u64.to_le_bytes().to_vec();
    page.extend([7; 4096]);
    let piece = MorphTransferState { morph: 7, round: 1, data: page.into(), ..Default::default() };
    new.daemon.queue(0, &piece.into()).unwrap();
    let (took, _) = tokio::join!(new.takes_over(), old.hands_over(token));
    let why = took.reply.unwrap().detail;
    assert!(!took.took_over && why.contains("section cells/memory differs from what was sent"), "{why}");
    new.is(State::New).await;
    assert!(!new.forgets().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_does_not_take_over_what_is_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (old, mut new, _) = nearly_there(&dir).await;
    // The other kernel is gone before it sends the end.
    let took = tokio::spawn(async move {
        let took = new.takes_over().await;
        (new, took)
    });
    old.broker.let_go();
    let (new, took) = took.await.unwrap();
    let why = took.reply.unwrap().detail;
    assert!(!took.took_over && why.contains("state comes no more"), "{why}");
    new.is(State::New).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_that_cannot_be_made_ends_the_round_in_words() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let (new, mut old) = (kernel().await, kernel().await);
    for (kernel, id) in [(&old, 1), (&new, 2)] {
        kernel.broker.reaches(Reach::Folder(dir.path().to_owned(), id));
    }
    let token = new.broker.take_directly(7);
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let mut ours = BufReader::new(ours);
    let hello =
        "hello version=1 name=odd state=active\nsection name=s version=1 size=1 compatible=c\nready\n";
    ours.write_all(hello.as_bytes()).await.unwrap();
    let introduced = introduce(theirs).await.unwrap();
    old.broker.enter(introduced.hook());
    tokio::spawn(introduced.run());
    tokio::spawn(async move {
        let mut line = String::new();
        while ours.read_line(&mut line).await.unwrap() > 0 {
            let answer = match line.split([' ', '\n']).next().unwrap() {
                "export" => "done\n",
                "digest" => "error no digest\n",
                _ => "ok\n",
            };
            ours.write_all(answer.as_bytes()).await.unwrap();
            line.clear();
        }
    });
    let (offered, _) = old.negotiate(vec![]).await;
    assert_eq!(offered[0].name, "odd/s");
    let gave = old.hands_over(token).await.reply.unwrap();
    assert!(!gave.ok && gave.detail.contains("no digest"), "{gave:?}");
    // The agent is as good as before.
    assert!(old.roll_back(true).await.ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_in_words() {
    let (mut old, mut new) = (kernel().await, kernel().await);
    // It offers nothing before it serves.
    assert!(old.negotiate(vec![]).await.0.is_empty());
    old.broker.serves();
    old.is(State::Active).await;
    let (offered, _) = old.negotiate(vec![]).await;
    for (change, want) in [
        (Section { name: "other/memory".into(), ..offered[0].clone() }, "no workload other has come"),
        (Section { name: "cells/heap".into(), ..offered[0].clone() }, "takes no section heap"),
        (Section { compatible: "else".into(), ..offered[0].clone() }, "takes no section memory (else)"),
        (Section { version: 3, ..offered[0].clone() }, "up to version 2, and is offered version 3"),
        (Section { name: "cells".into(), ..offered[0].clone() }, "has no workload"),
    ] {
        let (_, reply) = new.negotiate(vec![change]).await;
        assert!(!reply.ok && reply.detail.contains(want), "{reply:?}");
    }
    let (_, reply) = old.negotiate(offered.clone()).await;
    assert!(!reply.ok && reply.detail.contains("is active and takes no state"), "{reply:?}");
    // Rounds of a morph nobody agreed on.
    let (_, reply, _) = new.export(0, false).await;
    assert!(!reply.ok && reply.detail.contains("was not negotiated"), "{reply:?}");
    assert!(new.negotiate(offered).await.1.ok);
    for (piece, want) in [
        (MorphTransferState::default(), "is not pages with their places"),
        (MorphTransferState { section: 9, ..Default::default() }, "section 9 of 2"),
    ] {
        let piece = MorphTransferState { morph: 7, data: vec![1; 5000].into(), ..piece };
        let reply = new.import(0, vec![piece]).await;
        assert!(!reply.ok && reply.detail.contains(want), "{reply:?}");
    }
    let reply = new.import(0, vec![]).await;
    assert!(reply.ok, "what went wrong is said once: {reply:?}");
}
