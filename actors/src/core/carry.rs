//! A client's connection that outlives kernels: which bytes each side has, so that none is lost or comes twice when
//! another kernel goes on with it. Bytes in, bytes out; no I/O.

use bytes::{Buf, BufMut, BytesMut};
use kmorph_state::session::{CONFIRM, FRAME_LIMIT, HEAD, Head, SessionError, Unconfirmed, WINDOW};

/// What is known of one connection.
#[derive(Debug)]
pub struct Carried {
    /// Bytes of the client that the service has not taken.
    sent: Unconfirmed,
    client_ended: bool,
    /// Bytes of the service that were taken off its connections.
    received: u64,
    /// Those of them the client has.
    delivered: u64,
    /// Those of them the service was told of.
    told: u64,
    service_ended: bool,
    /// Number of the next byte of the connection there is now.
    next: u64,
    /// To be written to the service.
    pub to_service: BytesMut,
    /// To be written to the client.
    pub to_client: BytesMut,
    /// Read from the service, not yet a whole frame.
    pub arriving: BytesMut,
}

impl Carried {
    /// A connection that has just been accepted.
    pub fn new() -> Carried {
        Carried {
            sent: Unconfirmed::after(0),
            client_ended: false,
            received: 0,
            delivered: 0,
            told: 0,
            service_ended: false,
            next: 0,
            to_service: BytesMut::new(),
            to_client: BytesMut::new(),
            arriving: BytesMut::new(),
        }
    }

    /// How many bytes may be read from the client now.
    pub fn room(&self) -> usize {
        if self.client_ended || self.service_ended || self.to_service.len() >= FRAME_LIMIT {
            return 0;
        }
        WINDOW.saturating_sub(self.sent.bytes().len()).min(FRAME_LIMIT)
    }

    /// Whether bytes of the service can be taken now: the client reads what there is.
    pub fn takes_more(&self) -> bool {
        self.to_client.len() < FRAME_LIMIT && !self.service_ended
    }

    /// The client sent this, or ended its direction with nothing.
    pub fn from_client(&mut self, bytes: &[u8]) {
        self.client_ended |= bytes.is_empty();
        self.sent.push(bytes);
        self.frame(bytes);
    }

    fn frame(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        loop {
            let (now, later) = rest.split_at(rest.len().min(FRAME_LIMIT));
            rest = later;
            let end = self.client_ended && rest.is_empty();
            let head = Head { length: now.len(), end, confirmed: self.delivered };
            self.told = self.delivered;
            self.to_service.put_slice(&head.encode());
            self.to_service.put_slice(now);
            if rest.is_empty() {
                return;
            }
        }
    }

    /// A service goes on with it: it has taken so many bytes, and sends from this one on.
    pub fn joined(&mut self, consumed: u64, from: u64) -> Result<(), SessionError> {
        self.sent.confirm(consumed)?;
        if from > self.received {
            // Between what the client was given and what is sent now there would be a hole.
            Unconfirmed::after(from).confirm(self.received)?;
        }
        (self.next, self.service_ended) = (from, false);
        self.arriving.clear();
        self.to_service.clear();
        // This one knows of no more than that.
        self.told = from.min(self.delivered);
        let again = self.sent.bytes().to_vec();
        if !again.is_empty() || self.client_ended || self.delivered - self.told >= CONFIRM {
            self.frame(&again);
        }
        Ok(())
    }

    /// Take the frames that have arrived.
    pub fn from_service(&mut self) -> Result<(), SessionError> {
        while self.takes_more()
            && let Some(head) = self.arriving.first_chunk::<HEAD>()
        {
            let head = Head::decode(*head)?;
            if self.arriving.len() < HEAD + head.length {
                return Ok(());
            }
            self.sent.confirm(head.confirmed)?;
            self.arriving.advance(HEAD);
            let bytes = self.arriving.split_to(head.length);
            // The client has these from the kernel before.
            let has = self.received.saturating_sub(self.next).min(bytes.len() as u64);
            self.next += bytes.len() as u64;
            self.received = self.received.max(self.next);
            self.to_client
                .put_slice(bytes.get(usize::try_from(has).unwrap_or(usize::MAX)..).unwrap_or_default());
            self.service_ended |= head.end;
        }
        Ok(())
    }

    /// The client took so many bytes.
    pub fn delivered(&mut self, bytes: usize) {
        self.delivered += bytes as u64;
        if self.delivered - self.told >= CONFIRM {
            self.frame(&[]);
        }
    }

    /// The service has said everything, and the client has it.
    pub fn is_over(&self) -> bool {
        self.service_ended && self.to_client.is_empty()
    }
}

impl Default for Carried {
    fn default() -> Carried {
        Carried::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmorph_state::session::Session;
    use proptest::prelude::*;

    /// A service that answers every byte with two, and can be copied as a morph does.
    #[derive(Clone, Default)]
    struct Service {
        session: Session,
        arriving: Vec<u8>,
        input: Vec<u8>,
        /// Of which the frames were written.
        written: u64,
    }

    impl Service {
        fn read(&mut self, bytes: &[u8]) {
            self.arriving.extend_from_slice(bytes);
            while let Some(head) = self.arriving.first_chunk::<HEAD>() {
                let head = Head::decode(*head).unwrap();
                if self.arriving.len() < HEAD + head.length {
                    return;
                }
                self.session.answers.confirm(head.confirmed).unwrap();
                self.input.extend(self.arriving.drain(..HEAD + head.length).skip(HEAD));
            }
        }

        fn take(&mut self, most: usize) {
            for byte in self.input.drain(..most.min(self.input.len())).collect::<Vec<u8>>() {
                self.session.consumed += 1;
                self.session.answers.push(&[byte, !byte]);
            }
        }

        fn write(&mut self) -> Vec<u8> {
            let bytes = self.session.answers.since(self.written).to_vec();
            self.written = self.session.answers.end();
            let head = Head { length: bytes.len(), end: false, confirmed: self.session.consumed };
            [&head.encode()[..], &bytes].concat()
        }

        /// The session in another kernel; what was read and not taken is not there.
        fn moved(&self) -> Service {
            let session = self.session.clone();
            Service { written: session.answers.from(), session, ..Service::default() }
        }
    }

    #[derive(Clone, Debug)]
    enum Move {
        Client(u8),
        /// So many bytes get to the service.
        There(usize),
        Take(usize),
        Answer,
        /// So many bytes get to the client's connection.
        Back(usize),
        Deliver(usize),
        /// Another kernel goes on; so much of what was on the way back still comes before it does.
        Morph(usize),
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            (1u8..40).prop_map(Move::Client),
            (1usize..90).prop_map(Move::There),
            (1usize..30).prop_map(Move::Take),
            Just(Move::Answer),
            (1usize..90).prop_map(Move::Back),
            (1usize..60).prop_map(Move::Deliver),
            (0usize..90).prop_map(Move::Morph),
        ];
        proptest::collection::vec(one, 1..120)
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_comes_twice_however_often_kernels_change(moves in moves()) {
            let (mut c, mut s) = (Carried::new(), Service::default());
            let (mut said, mut heard, mut back) = (Vec::new(), Vec::new(), Vec::new());
            let mut next = 0u8;
            c.joined(0, 0).unwrap();
            let mut run = |c: &mut Carried, s: &mut Service, m: Move| {
                match m {
                    Move::Client(n) => {
                        let bytes: Vec<u8> = (0..n).map(|i| next.wrapping_add(i)).collect();
                        next = next.wrapping_add(n);
                        said.extend_from_slice(&bytes);
                        c.from_client(&bytes);
                    }
                    Move::There(n) => {
                        let n = n.min(c.to_service.len());
                        s.read(&c.to_service.split_to(n));
                    }
                    Move::Take(n) => s.take(n),
                    Move::Answer => back.extend(s.write()),
                    Move::Back(n) => {
                        c.arriving.extend_from_slice(&back.drain(..n.min(back.len())).collect::<Vec<u8>>());
                        c.from_service().unwrap();
                    }
                    Move::Deliver(n) => {
                        let bytes = c.to_client.split_to(n.min(c.to_client.len()));
                        heard.extend_from_slice(&bytes);
                        c.delivered(bytes.len());
                    }
                    Move::Morph(n) => {
                        // Everything the old one answered is in what the new one has.
                        let new = s.moved();
                        c.arriving.extend_from_slice(&back.drain(..n.min(back.len())).collect::<Vec<u8>>());
                        c.from_service().unwrap();
                        back.clear();
                        c.joined(new.session.consumed, new.session.answers.from()).unwrap();
                        *s = new;
                        // What the client may not have is said first.
                        back.extend(s.write());
                    }
                }
            };
            for m in moves {
                run(&mut c, &mut s, m);
            }
            for _ in 0..3 {
                for m in [Move::There(usize::MAX), Move::Take(usize::MAX), Move::Answer, Move::Back(usize::MAX), Move::Deliver(usize::MAX)] {
                    run(&mut c, &mut s, m);
                }
            }
            let want: Vec<u8> = said.iter().flat_map(|b| [*b, !*b]).collect();
            prop_assert_eq!(heard, want);
        }
    }

    #[test]
    fn a_service_that_makes_no_sense_is_an_error() {
        let mut c = Carried::new();
        assert!(c.joined(1, 0).is_err(), "it took what was not sent");
        assert!(c.joined(0, 7).is_err(), "it leaves something out");
        c.joined(0, 0).unwrap();
        c.arriving.extend_from_slice(&[0xff; HEAD]);
        assert!(c.from_service().is_err());
        c.joined(0, 0).unwrap();
        c.arriving.extend_from_slice(&Head { confirmed: 5, ..Head::default() }.encode());
        assert!(c.from_service().is_err(), "it confirms what was not sent");
    }

    #[test]
    fn the_end_of_a_client_goes_along() {
        let mut c = Carried::new();
        c.joined(0, 0).unwrap();
        c.from_client(b"ab");
        c.from_client(b"");
        assert_eq!(c.room(), 0);
        c.joined(1, 0).unwrap();
        let head = Head::decode(*c.to_service.first_chunk().unwrap()).unwrap();
        assert_eq!((head, &c.to_service[HEAD..]), (Head { length: 1, end: true, confirmed: 0 }, &b"b"[..]));
        c.arriving.extend_from_slice(&Head { length: 1, end: true, confirmed: 2 }.encode());
        c.arriving.extend_from_slice(b"!");
        c.from_service().unwrap();
        assert!(!c.is_over());
        c.to_client.clear();
        c.delivered(1);
        assert!(c.is_over());
    }

    #[test]
    fn a_service_that_goes_on_hears_what_the_client_has_although_it_says_nothing() {
        let mut c = Carried::new();
        c.joined(0, 0).unwrap();
        for bytes in [FRAME_LIMIT, 10] {
            c.arriving.extend_from_slice(&Head { length: bytes, ..Head::default() }.encode());
            c.arriving.extend_from_slice(&vec![2; bytes]);
            c.from_service().unwrap();
            c.to_client.clear();
            c.delivered(bytes);
        }
        let all = FRAME_LIMIT as u64 + 10;
        let told =
            |c: &Carried| c.to_service.first_chunk().map(|head| Head::decode(*head).unwrap().confirmed);
        c.joined(0, 0).unwrap();
        assert_eq!(told(&c), Some(all));
        // One that knows already is not told.
        c.joined(0, all).unwrap();
        assert_eq!(told(&c), None);
    }

    #[test]
    fn nobody_has_to_hold_more_than_the_window() {
        let mut c = Carried::new();
        c.joined(0, 0).unwrap();
        let mut sent = 0;
        while c.room() > 0 {
            let bytes = vec![1; c.room()];
            c.from_client(&bytes);
            sent += bytes.len();
            c.to_service.clear();
        }
        assert_eq!(sent, WINDOW);
        c.arriving.extend_from_slice(&Head { confirmed: 10, ..Head::default() }.encode());
        c.from_service().unwrap();
        assert_eq!(c.room(), 10);
        for _ in 0..20 {
            c.arriving.extend_from_slice(&Head { length: FRAME_LIMIT, end: false, confirmed: 10 }.encode());
            c.arriving.extend_from_slice(&[2; FRAME_LIMIT]);
            c.from_service().unwrap();
        }
        assert_eq!(c.to_client.len(), FRAME_LIMIT);
        assert!(!c.takes_more());
    }
}
