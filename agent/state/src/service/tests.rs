use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Counts bytes in its memory, and answers with the count; cannot take an `e`, and panics at a `p`.
struct Odd;

impl App for Odd {
    fn layout(&self) -> (&'static str, u32) {
        ("test,odd", 1)
    }

    fn take(&mut self, memory: &mut Memory, input: &[u8], answers: &mut Vec<u8>) -> Result<usize, String> {
        let count = memory.change(0, 1).ok_or("no memory")?;
        answers.push(b'0' + count[0] + 1);
        match input {
            [b'e', ..] => return Err("what is e?".into()),
            [b'p', ..] => panic!("p"),
            [b'm', rest @ ..] => return Ok(rest.len() + 2),
            _ => {}
        }
        count[0] += 1;
        Ok(1)
    }
}

/// The switch's end, and what becomes of the service's.
struct Client(UnixStream, JoinHandle<io::Result<()>>);

impl Client {
    fn join(service: &Arc<Service<Odd>>, id: u64, resume: bool) -> Client {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.write_all(Greeting { id, resume }.to_string().as_bytes()).unwrap();
        let service = service.clone();
        Client(ours, std::thread::spawn(move || service.serve(&theirs, &theirs)))
    }

    fn welcome(&mut self) -> Welcome {
        Welcome::parse(&line(&mut self.0).unwrap()).unwrap()
    }

    fn send(&mut self, bytes: &[u8]) {
        let head = Head { length: bytes.len(), end: false, confirmed: 0 };
        self.0.write_all(&[&head.encode()[..], bytes].concat()).unwrap();
    }

    fn receive(&mut self) -> (u64, Vec<u8>) {
        let mut head = [0; HEAD];
        self.0.read_exact(&mut head).unwrap();
        let head = Head::decode(head).unwrap();
        let mut bytes = vec![0; head.length];
        self.0.read_exact(&mut bytes).unwrap();
        (head.confirmed, bytes)
    }

    /// Hang up, and wait until the service has noticed.
    fn leave(self) -> std::thread::Result<io::Result<()>> {
        drop(self.0);
        self.1.join()
    }
}

fn service() -> Arc<Service<Odd>> {
    let service = Arc::new(Service::new("odd", Odd, 4096));
    service.activate().unwrap();
    service
}

fn sessions(service: &Service<Odd>) -> Vec<u64> {
    service.lock().clients.keys().copied().collect()
}

fn joined(service: &Arc<Service<Odd>>, id: u64) -> Client {
    let mut client = Client::join(service, id, false);
    assert_eq!(client.welcome(), Welcome::Ok { consumed: 0, from: 0 });
    client
}

fn until(what: impl Fn() -> bool) {
    let began = now();
    while !what() {
        assert!(began.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn what_was_taken_before_a_request_that_fails_is_answered_and_counts() {
    let service = service();
    for (n, wrong) in [(1, &b"aae"[..]), (2, b"aam")] {
        let mut client = joined(&service, n);
        client.send(wrong);
        let count = b'0' + 2 * (n as u8) - 1;
        assert_eq!(client.receive(), (2, vec![count, count + 1]));
        let error = client.leave().unwrap().unwrap_err().to_string();
        assert!(error == "what is e?" || error == "the service took more than there is", "{error}");
        assert!(sessions(&service).is_empty());
    }
    // As it is handed over when it is frozen before the connection has ended.
    for wrong in [b"aae", b"aap"] {
        let mut inner = service.lock();
        let greeting = Greeting { id: 9, resume: false };
        let connection = inner.announce(greeting);
        inner.attach(greeting, connection).unwrap();
        let (mut input, mut answers) = (wrong.to_vec(), vec![]);
        let turn = std::panic::AssertUnwindSafe(|| inner.turn(9, &mut input, false, &mut answers));
        let turned = std::panic::catch_unwind(turn);
        assert!(!matches!(turned, Ok(Ok(Turn { failed: None, .. }))));
        let session = &inner.clients[&9].session;
        assert_eq!((session.consumed, session.answers.bytes().len(), session.ended), (2, 2, false));
    }
}

/// Takes no bytes.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_session_ends_with_its_connection_however_that_ends() {
    let service = service();
    let greeting = Greeting { id: 1, resume: false }.to_string();
    assert!(service.serve(greeting.as_bytes(), Full).is_err(), "the welcome finds nobody");
    assert!(sessions(&service).is_empty());
    let mut client = joined(&service, 2);
    client.send(b"p");
    assert!(client.leave().is_err(), "it panicked");
    assert!(sessions(&service).is_empty());
}

#[test]
fn who_leaves_while_it_is_frozen_is_forgotten_when_it_goes_on() {
    let service = service();
    let (stays, leaves, lost) = (joined(&service, 1), joined(&service, 2), joined(&service, 3));
    service.freeze().unwrap();
    leaves.leave().unwrap().unwrap();
    lost.leave().unwrap().unwrap();
    assert_eq!(sessions(&service), [1, 2, 3], "they may go to another kernel");
    // One comes back, as it was not there that it went.
    let mut back = Client::join(&service, 3, true);
    until(|| !service.lock().clients[&3].left);
    service.thaw().unwrap();
    assert_eq!(sessions(&service), [1, 3]);
    assert_eq!(back.welcome(), Welcome::Ok { consumed: 0, from: 0 });
    back.send(b"a");
    assert_eq!(back.receive(), (1, b"1".to_vec()));
    stays.leave().unwrap().unwrap();
    back.leave().unwrap().unwrap();
    assert!(sessions(&service).is_empty());
}

#[test]
fn of_connections_that_waited_the_last_one_carries_the_session() {
    let service = service();
    let greeting = Greeting { id: 1, resume: false };
    let mut inner = service.lock();
    let (first, second) = (inner.announce(greeting), inner.announce(greeting));
    inner.attach(greeting, second).unwrap();
    assert!(inner.attach(greeting, first).is_err());
    assert_eq!(inner.clients[&1].carried_by, second);
}
