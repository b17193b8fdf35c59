//! The connection's states as a pure table: which input in which phase does what.

use crate::message::ErrorCode;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Client that has not spoken yet.
    Idle,
    /// Client that waits for HELLO_ACK.
    HelloSent,
    /// Server that waits for HELLO.
    AwaitHello,
    /// Messages flow.
    Open,
    /// This side said BYE and waits for BYE_ACK.
    ByeSent,
    /// The other side said BYE; this side has yet to confirm.
    PeerBye,
    /// Over.
    Closed,
}

/// What can happen to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The client begins.
    Start,
    /// A HELLO this side accepts.
    HelloGood,
    /// A HELLO this side refuses.
    HelloBad,
    /// A HELLO_ACK this side accepts.
    AckGood,
    /// A HELLO_ACK this side refuses.
    AckBad,
    /// BYE arrived.
    Bye,
    /// BYE_ACK arrived.
    ByeAck,
    /// ERROR arrived.
    Error,
    /// Any other message arrived.
    Message,
    /// Bytes arrived that are not a frame.
    BadFrame,
    /// This side wants to end the connection.
    Close,
    /// This side has done what the other side's BYE asked for.
    ConfirmBye,
    /// The byte stream ended or failed.
    Lost,
    /// Opening or closing took too long.
    Deadline,
}

/// What the session does in answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send HELLO.
    SendHello,
    /// Send HELLO_ACK.
    SendHelloAck,
    /// Send BYE.
    SendBye,
    /// Send BYE_ACK.
    SendByeAck,
    /// Send ERROR with the reason the HELLO or HELLO_ACK was refused for.
    SendRefusal,
    /// Send ERROR with code `protocol`.
    SendProtocolError,
    /// Report that messages flow.
    ReportOpen,
    /// Hand the message to the owner.
    Deliver,
    /// Report the end.
    ReportClosed(End),
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// This side ended it, in order.
    Local,
    /// The other side ended it, in order.
    Peer,
    /// This side refused the other.
    Refused,
    /// The other side refused this one.
    RefusedByPeer,
    /// A message came in a phase that does not allow it, or a frame was damaged.
    Protocol,
    /// The byte stream ended without a BYE.
    Lost,
    /// Opening or closing took too long.
    TimedOut,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 7] = [
        Phase::Idle,
        Phase::HelloSent,
        Phase::AwaitHello,
        Phase::Open,
        Phase::ByeSent,
        Phase::PeerBye,
        Phase::Closed,
    ];
}

impl Input {
    /// Every input.
    pub const ALL: [Input; 14] = [
        Input::Start,
        Input::HelloGood,
        Input::HelloBad,
        Input::AckGood,
        Input::AckBad,
        Input::Bye,
        Input::ByeAck,
        Input::Error,
        Input::Message,
        Input::BadFrame,
        Input::Close,
        Input::ConfirmBye,
        Input::Lost,
        Input::Deadline,
    ];
}

/// The code an ERROR about a violation carries.
pub const PROTOCOL_ERROR: ErrorCode = ErrorCode::Protocol;

/// One step of a connection.
pub fn step(phase: Phase, input: Input) -> (Phase, &'static [Action]) {
    use Action as A;
    use Input as I;
    use Phase as P;

    const VIOLATION: (Phase, &[Action]) =
        (Phase::Closed, &[Action::SendProtocolError, Action::ReportClosed(End::Protocol)]);
    let stay: (Phase, &'static [Action]) = (phase, &[]);

    match (phase, input) {
        (P::Closed, _) => stay,
        // The same everywhere else.
        (_, I::Lost) => (P::Closed, &[A::ReportClosed(End::Lost)]),
        (_, I::BadFrame) => VIOLATION,

        (P::Idle, I::Start) => (P::HelloSent, &[A::SendHello]),
        (P::Idle | P::HelloSent | P::AwaitHello, I::Close) => (P::Closed, &[A::ReportClosed(End::Local)]),
        (P::Idle | P::HelloSent | P::AwaitHello | P::ByeSent, I::Deadline) => {
            (P::Closed, &[A::ReportClosed(End::TimedOut)])
        }

        (P::HelloSent, I::AckGood) => (P::Open, &[A::ReportOpen]),
        (P::HelloSent, I::AckBad) => (P::Closed, &[A::SendRefusal, A::ReportClosed(End::Refused)]),
        (P::HelloSent | P::AwaitHello, I::Error) => (P::Closed, &[A::ReportClosed(End::RefusedByPeer)]),

        (P::AwaitHello, I::HelloGood) => (P::Open, &[A::SendHelloAck, A::ReportOpen]),
        (P::AwaitHello, I::HelloBad) => (P::Closed, &[A::SendRefusal, A::ReportClosed(End::Refused)]),

        (P::Open, I::Message | I::Error) => (P::Open, &[A::Deliver]),
        (P::Open, I::Bye) => (P::PeerBye, &[A::Deliver]),
        (P::Open, I::Close) => (P::ByeSent, &[A::SendBye]),

        // Answers under way still arrive; both sides may say BYE at once.
        (P::ByeSent, I::Message | I::Error) => (P::ByeSent, &[A::Deliver]),
        (P::ByeSent, I::Bye) => (P::ByeSent, &[A::SendByeAck]),
        (P::ByeSent, I::ByeAck) => (P::Closed, &[A::Deliver, A::ReportClosed(End::Local)]),

        (P::PeerBye, I::ConfirmBye | I::Close) => (P::Closed, &[A::SendByeAck, A::ReportClosed(End::Peer)]),

        // Local calls that mean nothing now.
        (_, I::Start | I::Close | I::ConfirmBye | I::Deadline) => stay,
        // A message that the phase does not allow.
        (
            _,
            I::HelloGood | I::HelloBad | I::AckGood | I::AckBad | I::Bye | I::ByeAck | I::Error | I::Message,
        ) => VIOLATION,
    }
}
