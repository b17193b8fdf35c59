use proptest::prelude::*;

use super::*;
use crate::message::{ByeReason, HeartbeatReq, HeartbeatRsp};

/// Next phase of every cell, one letter each: i h a o b p c, `.` for the phase it was in; then, behind it,
/// the number of actions. Columns in the order of `Input::ALL`.
const TABLE: [(Phase, &str); 7] = [
    //                    Start Hgood Hbad Agood Abad Bye ByeAck Error Msg BadFr Close Confirm Lost Deadline
    (Phase::Idle, "h1 c2 c2 c2 c2 c2 c2 c2 c2 c2 c1 .0 c1 c1"),
    (Phase::HelloSent, ".0 c2 c2 o1 c2 c2 c2 c1 c2 c2 c1 .0 c1 c1"),
    (Phase::AwaitHello, ".0 o2 c2 c2 c2 c2 c2 c1 c2 c2 c1 .0 c1 c1"),
    (Phase::Open, ".0 c2 c2 c2 c2 p1 c2 o1 o1 c2 b1 .0 c1 .0"),
    (Phase::ByeSent, ".0 c2 c2 c2 c2 b1 c2 b1 b1 c2 .0 .0 c1 c1"),
    (Phase::PeerBye, ".0 c2 c2 c2 c2 c2 c2 c2 c2 c2 c2 c2 c1 .0"),
    (Phase::Closed, ".0 .0 .0 .0 .0 .0 .0 .0 .0 .0 .0 .0 .0 .0"),
];

#[test]
fn every_cell_of_the_table() {
    for (phase, row) in TABLE {
        let cells: Vec<&str> = row.split(' ').collect();
        assert_eq!(cells.len(), Input::ALL.len());
        for (input, cell) in Input::ALL.into_iter().zip(cells) {
            let next = match &cell[..1] {
                "i" => Phase::Idle,
                "h" => Phase::HelloSent,
                "a" => Phase::AwaitHello,
                "o" => Phase::Open,
                "b" => Phase::ByeSent,
                "p" => Phase::PeerBye,
                "c" => Phase::Closed,
                _ => phase,
            };
            let (got, actions) = step(phase, input);
            assert_eq!(
                (got, actions.len().to_string().as_str()),
                (next, &cell[1..]),
                "{phase:?} x {input:?}"
            );
            let ends = actions.iter().filter(|a| matches!(a, Action::ReportClosed(_))).count();
            assert_eq!(ends == 1, got == Phase::Closed && phase != Phase::Closed, "{phase:?} x {input:?}");
        }
    }
}

#[test]
fn ends_say_who_did_it() {
    let end = |p, i| {
        step(p, i).1.iter().find_map(|a| if let Action::ReportClosed(e) = a { Some(*e) } else { None })
    };
    assert_eq!(end(Phase::HelloSent, Input::AckBad), Some(End::Refused));
    assert_eq!(end(Phase::AwaitHello, Input::HelloBad), Some(End::Refused));
    assert_eq!(end(Phase::HelloSent, Input::Error), Some(End::RefusedByPeer));
    assert_eq!(end(Phase::ByeSent, Input::ByeAck), Some(End::Local));
    assert_eq!(end(Phase::PeerBye, Input::ConfirmBye), Some(End::Peer));
    assert_eq!(end(Phase::Open, Input::Lost), Some(End::Lost));
    assert_eq!(end(Phase::Open, Input::Bye), None);
    assert_eq!(end(Phase::ByeSent, Input::Deadline), Some(End::TimedOut));
    assert_eq!(end(Phase::Open, Input::HelloGood), Some(End::Protocol));
}

fn hello(instance: u16, incarnation: u64, nonce: u64) -> Hello {
    Hello { instance, incarnation, boot_nonce: nonce, release: "6.12.0".into(), ..Hello::default() }
}

fn carry(from: &mut Session, to: &mut Session) {
    let bytes = from.output().split();
    to.receive(&bytes, 0);
}

fn pump(a: &mut Session, b: &mut Session) {
    while !a.output().is_empty() || !b.output().is_empty() {
        carry(a, b);
        carry(b, a);
    }
}

fn opened() -> (Session, Session) {
    let mut c = Session::client(hello(3, 7, 0));
    let mut s = Session::server(hello(3, 7, 0xfeed));
    c.start(1);
    pump(&mut c, &mut s);
    assert!(matches!(c.poll(), Some(Event::Open { version: 1, peer }) if peer.boot_nonce == 0xfeed));
    assert!(matches!(s.poll(), Some(Event::Open { version: 1, peer }) if peer.instance == 3));
    (c, s)
}

#[test]
fn a_whole_connection() {
    let (mut c, mut s) = opened();
    let request: Message = HeartbeatReq::default().into();
    c.send(5, &request, 0).unwrap();
    carry(&mut c, &mut s);
    assert!(
        matches!(s.poll(), Some(Event::Message { header, message }) if header.sequence == 5 && message == request)
    );
    s.send(5, &HeartbeatRsp::default().into(), 0).unwrap();
    carry(&mut s, &mut c);
    assert!(matches!(c.poll(), Some(Event::Message { header, .. }) if header.sequence == 5));

    c.close(Bye { reason: ByeReason::Terminate, grace_ms: 100 }, 0);
    assert!(matches!(c.send(6, &request, 0), Err(SendError::NotOpen { phase: Phase::ByeSent, .. })));
    carry(&mut c, &mut s);
    assert!(
        matches!(s.poll(), Some(Event::Message { message: Message::Bye(b), .. }) if b.reason == ByeReason::Terminate)
    );
    s.confirm_bye(ByeAck { detail: "synced".into() }, 0);
    carry(&mut s, &mut c);
    assert!(
        matches!(c.poll(), Some(Event::Message { message: Message::ByeAck(a), .. }) if a.detail == "synced")
    );
    assert!(matches!(c.poll(), Some(Event::Closed { end: End::Local, .. })));
    assert!(matches!(s.poll(), Some(Event::Closed { end: End::Peer, .. })));
}

#[test]
fn both_sides_may_say_bye_at_once() {
    let (mut c, mut s) = opened();
    c.close(Bye::default(), 0);
    s.close(Bye::default(), 0);
    pump(&mut c, &mut s);
    let ended = |x: &mut Session| {
        std::iter::from_fn(|| x.poll()).any(|e| matches!(e, Event::Closed { end: End::Local, .. }))
    };
    assert!(ended(&mut c) && ended(&mut s));
}

#[test]
fn the_wrong_instance_life_or_boot_is_refused_on_both_sides() {
    for (target, what) in [
        (hello(4, 7, 0), "the instance is 4 on the other side and 3 on this one"),
        (hello(3, 8, 0), "the incarnation is 8 on the other side and 7 on this one"),
        (hello(3, 7, 0xdead), "the boot nonce is 0xdead on the other side and 0xfeed on this one"),
    ] {
        let mut c = Session::client(target);
        let mut s = Session::server(hello(3, 7, 0xfeed));
        c.start(0);
        pump(&mut c, &mut s);
        assert_eq!(s.poll(), Some(Event::Closed { end: End::Refused, detail: what.into() }));
        assert_eq!(c.poll(), Some(Event::Closed { end: End::RefusedByPeer, detail: what.into() }));
    }
    // A server that does not check: the client does.
    for (target, what) in [
        (hello(3, 8, 0), "incarnation"),
        (Hello { role: Role::Bulk, ..hello(3, 7, 0) }, "the role is Control"),
    ] {
        let mut c = Session::client(target);
        c.start(0);
        c.output().clear();
        let mut bytes = BytesMut::new();
        let ack = HelloAck { version: 1, instance: 3, incarnation: 7, ..HelloAck::default() };
        Encoder::new(Role::Control).encode(&ack.into(), 0, 0, &mut bytes).unwrap();
        c.receive(&bytes, 0);
        assert!(
            matches!(c.poll(), Some(Event::Closed { end: End::Refused, detail }) if detail.contains(what))
        );
        assert!(!c.output().is_empty(), "the server is told");
    }
}

#[test]
fn the_client_says_what_the_connection_is_for() {
    let mut c = Session::client(Hello { role: Role::Bulk, ..hello(3, 7, 0) });
    let mut s = Session::server(hello(3, 7, 0xfeed));
    c.start(0);
    pump(&mut c, &mut s);
    assert_eq!((s.role(), c.phase(), s.phase()), (Role::Bulk, Phase::Open, Phase::Open));
    // Larger than what a control connection carries, both ways.
    let big: Message =
        crate::message::VmcoreData { data: vec![1; 300_000].into(), ..Default::default() }.into();
    c.send(1, &big, 0).unwrap();
    s.send(1, &big, 0).unwrap();
    pump(&mut c, &mut s);
    for x in [&mut c, &mut s] {
        assert!(
            std::iter::from_fn(|| x.poll())
                .any(|e| matches!(e, Event::Message { message, .. } if message == big))
        );
    }
}

#[test]
fn another_version_is_refused_with_both_versions_in_the_text() {
    let mut s = Session::server(hello(3, 7, 1));
    let mut bytes = BytesMut::new();
    let mut encoder = Encoder::new(Role::Control);
    encoder.set_version(9);
    let future = Hello { min_version: 8, max_version: 9, ..hello(3, 7, 0) };
    encoder.encode(&future.into(), 0, 0, &mut bytes).unwrap();
    s.receive(&bytes, 0);
    let Some(Event::Closed { end: End::Refused, detail }) = s.poll() else { panic!("not refused") };
    assert!(detail.contains("this side speaks 1") && detail.contains("8 to 9"), "{detail}");
}

#[test]
fn an_unreadable_request_is_answered_and_the_connection_goes_on() {
    let (mut c, mut s) = opened();
    c.send(9, &HeartbeatReq::default().into(), 0).unwrap();
    let mut bytes = c.output().split();
    // Turn it into a type of a later version.
    bytes[6..8].copy_from_slice(&0x0777u16.to_le_bytes());
    let mut head = [0; 32];
    head.copy_from_slice(&bytes[..32]);
    let crc = crate::frame::checksum(&head, &bytes[32..]);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
    s.receive(&bytes, 0);
    assert!(matches!(s.poll(), Some(Event::Unreadable { error: MessageError::UnknownType(0x0777), .. })));
    carry(&mut s, &mut c);
    let Some(Event::Message { header, message: Message::Error(e) }) = c.poll() else { panic!("no answer") };
    assert_eq!((header.sequence, e.code), (9, ErrorCode::Unsupported));
    assert_eq!((c.phase(), s.phase()), (Phase::Open, Phase::Open));
}

#[test]
fn a_damaged_frame_ends_the_connection_and_both_sides_know_why() {
    let (mut c, mut s) = opened();
    c.send(1, &HeartbeatReq::default().into(), 0).unwrap();
    let mut bytes = c.output().split();
    bytes[33] ^= 4;
    s.receive(&bytes, 0);
    assert!(
        matches!(s.poll(), Some(Event::Closed { end: End::Protocol, detail }) if detail.contains("checksum"))
    );
    carry(&mut s, &mut c);
    assert!(
        matches!(c.poll(), Some(Event::Message { message: Message::Error(e), .. }) if e.code == ErrorCode::Protocol)
    );
}

proptest! {
    /// Whatever arrives in whatever pieces: no panic, at most one end, nothing after it.
    #[test]
    fn any_bytes_after_the_handshake(junk in prop::collection::vec(any::<u8>(), 0..300), cut in 1usize..40, real in 0usize..4) {
        let (mut c, mut s) = opened();
        for n in 0..real {
            c.send(n as u32, &HeartbeatReq::default().into(), 0).unwrap();
        }
        let mut bytes = c.output().split().to_vec();
        bytes.extend(&junk);
        for piece in bytes.chunks(cut) {
            s.receive(piece, 0);
        }
        let events: Vec<Event> = std::iter::from_fn(|| s.poll()).collect();
        let messages = events.iter().filter(|e| matches!(e, Event::Message { .. })).count();
        prop_assert_eq!(messages, real);
        let end = events.iter().position(|e| matches!(e, Event::Closed { .. }));
        prop_assert!(end.is_none_or(|at| at == events.len() - 1));
        prop_assert_eq!(end.is_some(), s.phase() == Phase::Closed);
    }

    /// Any sequence of inputs: closed stays closed, and the end is reported once.
    #[test]
    fn the_table_ends_once(inputs in prop::collection::vec(0usize..14, 0..40), server: bool) {
        let mut phase = if server { Phase::AwaitHello } else { Phase::Idle };
        let mut ends = 0;
        for i in inputs {
            let (next, actions) = step(phase, Input::ALL[i]);
            ends += actions.iter().filter(|a| matches!(a, Action::ReportClosed(_))).count();
            prop_assert!(phase != Phase::Closed || next == Phase::Closed);
            phase = next;
        }
        prop_assert_eq!(ends, usize::from(phase == Phase::Closed));
    }
}
