//! A session on a tokio byte stream.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::message::{Bye, ByeAck, Hello, Message};
use crate::session::{End, Event, Phase, SendError, Session};

/// Bytes read from the stream at a time: at first, enough for several heartbeats, and at most, after reads that
/// filled what there was.
const READ_SIZE: (usize, usize) = (1 << 10, 16 << 10);

/// A connection that did not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The stream ended or failed first.
    #[error("the connection was lost during HELLO: {0}")]
    Lost(String),
    /// One side refused the other: wrong instance, life, boot, role or version.
    #[error("HELLO was refused: {0}")]
    Refused(String),
    /// What came is not KMP.
    #[error("HELLO failed: {0}")]
    Protocol(String),
    /// It took too long.
    #[error("no HELLO exchange within {0:?}")]
    TimedOut(Duration),
}

/// A KMP connection.
///
/// Reading and writing go on together: while [`Connection::next`] is awaited, queued bytes are written.
/// Dropping the future of `next` or `flush` loses nothing.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    session: Session,
    clock: fn() -> u64,
    buf: Box<[u8]>,
    /// The stream failed; reported once the events before it are taken.
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Run `session` on `stream`. `clock` gives nanoseconds since boot for frame headers.
    pub fn new(stream: S, session: Session, clock: fn() -> u64) -> Connection<S> {
        Connection { stream, session, clock, buf: vec![0; READ_SIZE.0].into(), broken: false }
    }

    /// Open as client; `target` says whom it is meant for. Returns who answered.
    pub async fn connect(
        stream: S,
        target: Hello,
        clock: fn() -> u64,
        limit: Duration,
    ) -> Result<(Connection<S>, Hello), OpenError> {
        let mut connection = Connection::new(stream, Session::client(target), clock);
        connection.session.start(clock());
        let peer = connection.opened(limit).await?;
        Ok((connection, peer))
    }

    /// Open as server. Returns what the client asked for.
    pub async fn accept(
        stream: S,
        identity: Hello,
        clock: fn() -> u64,
        limit: Duration,
    ) -> Result<(Connection<S>, Hello), OpenError> {
        let mut connection = Connection::new(stream, Session::server(identity), clock);
        let peer = connection.opened(limit).await?;
        Ok((connection, peer))
    }

    async fn opened(&mut self, limit: Duration) -> Result<Hello, OpenError> {
        let exchange = async {
            let event = self.next().await;
            // HELLO_ACK, or the reason of a refusal, may not have left yet.
            let flushed = self.flush().await;
            (event, flushed)
        };
        let Ok((event, flushed)) = tokio::time::timeout(limit, exchange).await else {
            return Err(OpenError::TimedOut(limit));
        };
        match event {
            Event::Open { peer, .. } => match flushed {
                Ok(()) => Ok(peer),
                Err(e) => Err(OpenError::Lost(format!("write: {e}"))),
            },
            Event::Closed { end: End::Lost, detail } => Err(OpenError::Lost(detail)),
            Event::Closed { end: End::Refused | End::RefusedByPeer, detail } => {
                Err(OpenError::Refused(detail))
            }
            Event::Closed { detail, .. } => Err(OpenError::Protocol(detail)),
            Event::Message { header, .. } | Event::Unreadable { header, .. } => {
                Err(OpenError::Protocol(format!("message type {:#06x} came before it", header.msg_type)))
            }
        }
    }

    /// Where the connection is.
    pub fn phase(&self) -> Phase {
        self.session.phase()
    }

    /// Queue a message; it is written by [`Connection::next`] or [`Connection::flush`].
    pub fn queue(&mut self, sequence: u32, message: &Message) -> Result<(), SendError> {
        self.session.send(sequence, message, (self.clock)())
    }

    /// Bytes queued and not yet written.
    pub fn backlog(&mut self) -> usize {
        self.session.output().len()
    }

    /// Say BYE. [`Connection::next`] reports the end.
    pub fn close(&mut self, bye: Bye) {
        self.session.close(bye, (self.clock)());
    }

    /// Confirm the other side's BYE and write the confirmation.
    pub async fn confirm_bye(&mut self, ack: ByeAck) -> io::Result<()> {
        self.session.confirm_bye(ack, (self.clock)());
        self.flush().await
    }

    /// Write everything that is queued. Cancel safe.
    pub async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            ready!(self.poll_write_out(cx))?;
            Pin::new(&mut self.stream).poll_flush(cx)
        })
        .await
    }

    /// The next event. Cancel safe. After [`Event::Closed`] it reports the loss of the stream forever, so
    /// stop calling it.
    pub async fn next(&mut self) -> Event {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            // Writing first: the answer to what was just read should not wait for the owner.
            let wrote = if self.broken { Poll::Ready(Ok(())) } else { self.poll_write_out(cx) };
            if let Some(event) = self.session.poll() {
                return Poll::Ready(event);
            }
            if let Poll::Ready(Err(e)) = wrote {
                self.fail(format!("write: {e}"));
                continue;
            }
            if self.broken || self.session.phase() == Phase::Closed {
                return Poll::Ready(Event::Closed {
                    end: End::Lost,
                    detail: "the connection is over".into(),
                });
            }
            let mut buf = ReadBuf::new(&mut self.buf);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf)) {
                Ok(()) if buf.filled().is_empty() => self.fail("the other side closed the stream".into()),
                Ok(()) => {
                    let full = buf.remaining() == 0;
                    self.session.receive(buf.filled(), (self.clock)());
                    if full && self.buf.len() < READ_SIZE.1 {
                        self.buf = vec![0; self.buf.len() * 4].into();
                    }
                }
                Err(e) => self.fail(format!("read: {e}")),
            }
        }
    }

    fn fail(&mut self, why: String) {
        self.broken = true;
        self.session.lost(why, (self.clock)());
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let out: &mut BytesMut = self.session.output();
        while !out.is_empty() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, out))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            bytes::Buf::advance(out, n);
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Blob, HeartbeatReq, HeartbeatRsp, MorphTransferState, Role};

    const LIMIT: Duration = Duration::from_secs(1);

    fn clock() -> u64 {
        1
    }

    fn hello(incarnation: u64, role: Role) -> Hello {
        Hello { instance: 1, incarnation, role, ..Hello::default() }
    }

    async fn pair(role: Role) -> (Connection<tokio::io::DuplexStream>, Connection<tokio::io::DuplexStream>) {
        let (a, b) = tokio::io::duplex(64);
        let (c, s) = tokio::join!(
            Connection::connect(a, hello(2, role), clock, LIMIT),
            Connection::accept(b, hello(2, role), clock, LIMIT)
        );
        (c.unwrap().0, s.unwrap().0)
    }

    #[tokio::test(start_paused = true)]
    async fn request_and_answer_through_a_narrow_stream() {
        let (mut c, mut s) = pair(Role::Control).await;
        c.queue(4, &HeartbeatReq { metrics: true, ..Default::default() }.into()).unwrap();
        let server = async {
            let Event::Message { header, .. } = s.next().await else { panic!("no request") };
            s.queue(header.sequence, &HeartbeatRsp::default().into()).unwrap();
            s.flush().await.unwrap();
        };
        let (event, ()) = tokio::join!(c.next(), server);
        assert!(matches!(event, Event::Message { header, .. } if header.sequence == 4));
    }

    #[tokio::test(start_paused = true)]
    async fn both_sides_may_send_much_at_once() {
        let (mut c, mut s) = pair(Role::Bulk).await;
        let big: Message =
            MorphTransferState { data: Blob::from(vec![1; 300_000]), ..Default::default() }.into();
        c.queue(1, &big).unwrap();
        s.queue(1, &big).unwrap();
        let (x, y) = tokio::join!(async { (c.next().await, c.flush().await) }, async {
            (s.next().await, s.flush().await)
        });
        for (event, flushed) in [x, y] {
            assert!(matches!(event, Event::Message { message, .. } if message == big));
            flushed.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn opening_ends_in_time_and_says_why() {
        let (a, _silent) = tokio::io::duplex(1 << 12);
        let e = Connection::connect(a, hello(1, Role::Control), clock, LIMIT).await.unwrap_err();
        assert_eq!(e, OpenError::TimedOut(LIMIT));

        let (a, b) = tokio::io::duplex(1 << 12);
        drop(b);
        let e = Connection::accept(a, hello(1, Role::Control), clock, LIMIT).await.unwrap_err();
        assert!(matches!(e, OpenError::Lost(_)), "{e}");

        let (a, b) = tokio::io::duplex(1 << 12);
        let (c, s) = tokio::join!(
            Connection::connect(a, hello(1, Role::Control), clock, LIMIT),
            Connection::accept(b, hello(2, Role::Control), clock, LIMIT)
        );
        assert!(matches!(s.unwrap_err(), OpenError::Refused(t) if t.contains("incarnation is 1")));
        assert!(matches!(c.unwrap_err(), OpenError::Refused(t) if t.contains("incarnation is 1")));
    }

    #[tokio::test(start_paused = true)]
    async fn bye_and_its_confirmation() {
        let (mut c, mut s) = pair(Role::Control).await;
        c.close(Bye::default());
        let server = async {
            assert!(matches!(s.next().await, Event::Message { message: Message::Bye(_), .. }));
            s.confirm_bye(ByeAck::default()).await.unwrap();
        };
        let client = async {
            assert!(matches!(c.next().await, Event::Message { message: Message::ByeAck(_), .. }));
            assert!(matches!(c.next().await, Event::Closed { end: End::Local, .. }));
        };
        tokio::join!(client, server);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_dies_is_reported_once_as_lost() {
        let (mut c, s) = pair(Role::Control).await;
        drop(s);
        assert!(
            matches!(c.next().await, Event::Closed { end: End::Lost, detail } if detail.contains("closed the stream"))
        );
        assert_eq!(c.phase(), Phase::Closed);
    }
}
