//! A service in a scripted kernel: it says which kernel it is, then echoes. Its connections are reset when the kernel
//! is stopped.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use kmorph_platform::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::watch;

use super::fake::Agent;

/// A stream whose end is an error when its kernel is gone, as a vsock's is.
struct Wire {
    inner: DuplexStream,
    reset: Arc<AtomicBool>,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        match polled {
            Poll::Ready(Ok(())) if buf.filled().len() == before && self.reset.load(Ordering::SeqCst) => {
                Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
            }
            other => other,
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

pub(super) fn connect(release: String, life: watch::Receiver<Agent>) -> Box<dyn Stream> {
    let (here, there) = tokio::io::duplex(4096);
    let reset = Arc::new(AtomicBool::new(false));
    tokio::spawn(serve(there, release, life, reset.clone()));
    Box::new(Wire { inner: here, reset })
}

async fn serve(
    mut stream: DuplexStream,
    release: String,
    mut life: watch::Receiver<Agent>,
    reset: Arc<AtomicBool>,
) {
    let echo = async {
        stream.write_all(format!("{release}\n").as_bytes()).await?;
        let mut buf = [0; 1024];
        loop {
            match stream.read(&mut buf).await? {
                0 => return io::Result::Ok(()),
                n => stream.write_all(&buf[..n]).await?,
            }
        }
    };
    tokio::select! {
        // A client that went away is no failure of the service.
        _ = echo => {}
        _ = life.wait_for(|a| *a == Agent::Never) => reset.store(true, Ordering::SeqCst),
    }
}
