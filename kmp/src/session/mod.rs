//! One connection from HELLO to BYE: bytes in, events and bytes out.

mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use bytes::BytesMut;

use crate::frame::{Decoder, EncodeError, Encoder, Header};
use crate::message::{
    Bye, ByeAck, Error as ErrorMessage, ErrorCode, Hello, HelloAck, Message, MessageError, Role,
};
use crate::version::{self, Versions};

pub use table::{Action, End, Input, PROTOCOL_ERROR, Phase, step};

/// What a session tells its owner.
#[derive(Clone, Debug, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "events are handled one at a time; a box would allocate for every heartbeat"
)]
pub enum Event {
    /// Messages flow.
    Open {
        /// Version agreed on.
        version: u16,
        /// Who is on the other side: in a client the server's identity, in a server the client's wish.
        peer: Hello,
    },
    /// A message arrived.
    Message {
        /// Header of its frame.
        header: Header,
        /// The message.
        message: Message,
    },
    /// A whole frame arrived whose payload this side cannot read. A server answers it with ERROR by itself.
    Unreadable {
        /// Header of the frame.
        header: Header,
        /// What is wrong.
        error: MessageError,
    },
    /// The connection is over; what is left in the output should still be written.
    Closed {
        /// How.
        end: End,
        /// For the operator.
        detail: String,
    },
}

/// A KMP connection without its byte stream.
#[derive(Debug)]
pub struct Session {
    local: Hello,
    server: bool,
    phase: Phase,
    decoder: Decoder,
    encoder: Encoder,
    out: BytesMut,
    events: VecDeque<Event>,
    /// Answer of the handshake being worked on.
    agreed: u16,
    refusal: ErrorMessage,
    detail: String,
    bye: Bye,
    bye_ack: ByeAck,
}

impl Session {
    /// The daemon's side. `target` says whom it wants: instance, incarnation and nonce of 0 match any.
    pub fn client(target: Hello) -> Session {
        Session::new(target, false, Phase::Idle)
    }

    /// The agent's side. `identity` says who it is; the connection is for what the client wants it for.
    pub fn server(identity: Hello) -> Session {
        Session::new(identity, true, Phase::AwaitHello)
    }

    fn new(mut local: Hello, server: bool, phase: Phase) -> Session {
        (local.min_version, local.max_version) = (Versions::OURS.min, Versions::OURS.max);
        let role = local.role;
        Session {
            local,
            server,
            phase,
            decoder: Decoder::new(role),
            encoder: Encoder::new(role),
            out: BytesMut::new(),
            events: VecDeque::new(),
            agreed: crate::VERSION,
            refusal: ErrorMessage::default(),
            detail: String::new(),
            bye: Bye::default(),
            bye_ack: ByeAck::default(),
        }
    }

    /// Where the connection is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Role of the connection.
    pub fn role(&self) -> Role {
        self.local.role
    }

    /// Bytes to write to the stream; take what was written off the front.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.out
    }

    /// The next event.
    pub fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Client: begin.
    pub fn start(&mut self, now_ns: u64) {
        self.input(Input::Start, now_ns, None);
    }

    /// Queue a message. Refused unless the connection is open (answers may still go out while the other
    /// side's BYE is being served).
    pub fn send(&mut self, sequence: u32, message: &Message, now_ns: u64) -> Result<(), SendError> {
        match self.phase {
            Phase::Open | Phase::PeerBye => {
                Ok(self.encoder.encode(message, sequence, now_ns, &mut self.out)?)
            }
            phase => Err(SendError::NotOpen { kind: message.kind(), phase }),
        }
    }

    /// End the connection with a BYE, or at once when it is not open.
    pub fn close(&mut self, bye: Bye, now_ns: u64) {
        self.bye = bye;
        self.detail = "closed by this side".into();
        self.input(Input::Close, now_ns, None);
    }

    /// Confirm the other side's BYE.
    pub fn confirm_bye(&mut self, ack: ByeAck, now_ns: u64) {
        self.bye_ack = ack;
        self.detail = "closed by the other side".into();
        self.input(Input::ConfirmBye, now_ns, None);
    }

    /// The stream ended or failed.
    pub fn lost(&mut self, why: impl Into<String>, now_ns: u64) {
        self.detail = why.into();
        self.input(Input::Lost, now_ns, None);
    }

    /// The handshake or the wait for BYE_ACK took too long.
    pub fn deadline(&mut self, now_ns: u64) {
        self.detail = format!("no answer in time while the connection was {:?}", self.phase);
        self.input(Input::Deadline, now_ns, None);
    }

    /// Bytes from the stream, in any pieces.
    pub fn receive(&mut self, mut bytes: &[u8], now_ns: u64) {
        while self.phase != Phase::Closed {
            match self.decoder.feed(&mut bytes) {
                Ok(None) => return,
                Ok(Some(frame)) => match Message::read(frame.header.msg_type, &frame.payload) {
                    Ok(message) => self.message(frame.header, message, now_ns),
                    Err(error) => self.unreadable(frame.header, error, now_ns),
                },
                Err(error) => {
                    self.detail = error.to_string();
                    self.input(Input::BadFrame, now_ns, None);
                }
            }
        }
    }

    fn message(&mut self, header: Header, message: Message, now_ns: u64) {
        let input = match &message {
            Message::Hello(hello) => match self.judge_client(hello) {
                Ok(version) => {
                    if self.phase == Phase::AwaitHello {
                        self.take_role(hello.role);
                    }
                    self.accept(version, Input::HelloGood)
                }
                Err(error) => self.refuse(error, Input::HelloBad),
            },
            Message::HelloAck(ack) => match self.judge_server(ack) {
                Ok(version) => self.accept(version, Input::AckGood),
                Err(error) => self.refuse(error, Input::AckBad),
            },
            Message::Bye(_) => Input::Bye,
            Message::ByeAck(_) => {
                self.detail = "closed by this side".into();
                Input::ByeAck
            }
            Message::Error(e) => {
                self.detail.clone_from(&e.message);
                Input::Error
            }
            _ => Input::Message,
        };
        self.input(input, now_ns, Some((header, message)));
    }

    fn unreadable(&mut self, header: Header, error: MessageError, now_ns: u64) {
        if !matches!(self.phase, Phase::Open | Phase::ByeSent) {
            self.detail = error.to_string();
            return self.input(Input::Message, now_ns, None);
        }
        // A client matches it to its request by sequence; a server tells the client.
        if self.server {
            let code = match error {
                MessageError::UnknownType(_) => ErrorCode::Unsupported,
                MessageError::Payload { .. } => ErrorCode::BadPayload,
            };
            self.put(header.sequence, &ErrorMessage::new(code, error.to_string()).into(), now_ns);
        }
        self.events.push_back(Event::Unreadable { header, error });
    }

    /// The client says what the connection is for.
    fn take_role(&mut self, role: Role) {
        self.local.role = role;
        self.decoder.set_role(role);
        self.encoder.set_role(role);
    }

    fn accept(&mut self, version: u16, input: Input) -> Input {
        self.agreed = version;
        input
    }

    fn refuse(&mut self, error: ErrorMessage, input: Input) -> Input {
        self.detail.clone_from(&error.message);
        self.refusal = error;
        input
    }

    /// Server: is this HELLO for me?
    fn judge_client(&self, hello: &Hello) -> Result<u16, ErrorMessage> {
        let theirs = Versions { min: hello.min_version, max: hello.max_version };
        let version = version::negotiate(Versions::OURS, theirs)
            .map_err(|e| ErrorMessage::new(ErrorCode::Version, e.to_string()))?;
        self.same_identity(hello.instance, hello.incarnation, hello.boot_nonce)?;
        Ok(version)
    }

    /// Client: is this the instance I wanted?
    fn judge_server(&self, ack: &HelloAck) -> Result<u16, ErrorMessage> {
        let theirs = Versions { min: ack.version, max: ack.version };
        let version = version::negotiate(Versions::OURS, theirs)
            .map_err(|e| ErrorMessage::new(ErrorCode::Version, e.to_string()))?;
        self.same_identity(ack.instance, ack.incarnation, ack.boot_nonce)?;
        if ack.role != self.local.role {
            let text =
                format!("the role is {:?} on the other side and {:?} on this one", ack.role, self.local.role);
            return Err(ErrorMessage::new(ErrorCode::WrongInstance, text));
        }
        Ok(version)
    }

    fn same_identity(&self, instance: u16, incarnation: u64, nonce: u64) -> Result<(), ErrorMessage> {
        let mine = &self.local;
        let differ = |a: u64, b: u64| a != 0 && b != 0 && a != b;
        let error = |what: &str, theirs: String, ours: String| {
            let text = format!("{what} is {theirs} on the other side and {ours} on this one");
            Err(ErrorMessage::new(ErrorCode::WrongInstance, text))
        };
        if differ(instance.into(), mine.instance.into()) {
            return error("the instance", instance.to_string(), mine.instance.to_string());
        }
        if differ(incarnation, mine.incarnation) {
            return error("the incarnation", incarnation.to_string(), mine.incarnation.to_string());
        }
        if differ(nonce, mine.boot_nonce) {
            return error("the boot nonce", format!("{nonce:#x}"), format!("{:#x}", mine.boot_nonce));
        }
        Ok(())
    }

    fn input(&mut self, input: Input, now_ns: u64, arrived: Option<(Header, Message)>) {
        let (next, actions) = step(self.phase, input);
        let was = std::mem::replace(&mut self.phase, next);
        let name = arrived.as_ref().map(|(_, m)| m.kind());
        let mut arrived = arrived;
        for action in actions {
            match action {
                Action::SendHello => self.put(0, &self.local.clone().into(), now_ns),
                Action::SendHelloAck => self.put(0, &self.hello_ack().into(), now_ns),
                Action::SendBye => self.put(0, &self.bye.clone().into(), now_ns),
                Action::SendByeAck => self.put(0, &self.bye_ack.clone().into(), now_ns),
                Action::SendRefusal => self.put(0, &self.refusal.clone().into(), now_ns),
                Action::SendProtocolError => {
                    if let Some(name) = name {
                        self.detail = format!("{name} is not allowed while the connection is {was:?}");
                    }
                    self.put(0, &ErrorMessage::new(PROTOCOL_ERROR, self.detail.clone()).into(), now_ns);
                }
                Action::ReportOpen => {
                    let versions = Versions { min: self.agreed, max: self.agreed };
                    self.decoder.set_versions(versions);
                    self.encoder.set_version(self.agreed);
                    if let Some(peer) = arrived.take().and_then(|(_, m)| peer_of(m)) {
                        self.events.push_back(Event::Open { version: self.agreed, peer });
                    }
                }
                Action::Deliver => {
                    if let Some((header, message)) = arrived.take() {
                        self.events.push_back(Event::Message { header, message });
                    }
                }
                Action::ReportClosed(end) => {
                    let detail = std::mem::take(&mut self.detail);
                    self.events.push_back(Event::Closed { end: *end, detail });
                }
            }
        }
    }

    fn hello_ack(&self) -> HelloAck {
        let l = self.local.clone();
        HelloAck {
            version: self.agreed,
            instance: l.instance,
            incarnation: l.incarnation,
            boot_nonce: l.boot_nonce,
            role: l.role,
            capabilities: l.capabilities,
            release: l.release,
        }
    }

    /// Queue a message of the session's own.
    fn put(&mut self, sequence: u32, message: &Message, now_ns: u64) {
        if let Err(error) = self.encoder.encode(message, sequence, now_ns, &mut self.out) {
            // Only a HELLO with a monstrous capability list can be too long: the stream must not stay silent.
            self.phase = Phase::Closed;
            self.events.push_back(Event::Closed { end: End::Protocol, detail: error.to_string() });
        }
    }
}

fn peer_of(message: Message) -> Option<Hello> {
    match message {
        Message::Hello(hello) => Some(hello),
        Message::HelloAck(a) => Some(Hello {
            min_version: a.version,
            max_version: a.version,
            instance: a.instance,
            incarnation: a.incarnation,
            boot_nonce: a.boot_nonce,
            role: a.role,
            capabilities: a.capabilities,
            release: a.release,
        }),
        _ => None,
    }
}

/// A message that was not queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The connection carries no messages now.
    #[error("{kind} cannot be sent while the connection is {phase:?}")]
    NotOpen {
        /// Message type.
        kind: crate::message::MessageType,
        /// Where the connection is.
        phase: Phase,
    },
    /// It does not make a frame.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}
