//! Inside an instance: a store of numbers that survives the replacement of its kernel.

use kmorph_state::kv;
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::{Context, Result};

/// Where it listens.
pub const PORT: u32 = 7003;

/// Serve for ever.
pub fn serve(mib: usize) -> Result<()> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT).context("listen")?;
    println!("kv: {mib} MiB, on vsock port {PORT}");
    let service = kv::start(mib, |error| println!("kv: {error}")).context("the store")?;
    for stream in listener.incoming() {
        let (stream, service) = (stream.context("accept")?, service.clone());
        std::thread::spawn(move || {
            if let Err(error) = service.serve(&stream, &stream) {
                println!("kv: a session ended: {error}");
            }
        });
    }
    Ok(())
}

/// A client of it, on whatever carries bytes.
pub mod client {
    use std::time::Duration;

    use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
    use tokio::time::timeout;

    use crate::{Context, Result};

    /// Longest wait for an answer.
    const PATIENCE: Duration = Duration::from_secs(40);

    /// One connection.
    pub struct Client<S> {
        stream: BufReader<S>,
        /// Requests that were served when it was answered last.
        pub served: u64,
    }

    impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
        /// A connection that was made.
        pub fn new(stream: S) -> Client<S> {
            Client { stream: BufReader::new(stream), served: 0 }
        }

        async fn ask(&mut self, request: &str) -> Result<String> {
            self.stream.write_all(request.as_bytes()).await.context("ask")?;
            self.answer(request).await
        }

        async fn answer(&mut self, request: &str) -> Result<String> {
            let mut line = String::new();
            let read = timeout(PATIENCE, self.stream.read_line(&mut line));
            read.await.map_err(|_| format!("{request:?}: no answer"))?.context("read the answer")?;
            let (answer, served) = line
                .strip_suffix('\n')
                .and_then(|l| l.split_once(' '))
                .ok_or_else(|| format!("{request:?}: answered {line:?}"))?;
            let served: u64 = served.parse().context("the number of requests")?;
            if served <= self.served {
                return Err(format!("{request:?}: request {served} after {}", self.served));
            }
            self.served = served;
            Ok(answer.to_owned())
        }

        /// Set a key.
        pub async fn put(&mut self, key: u64, value: u64) -> Result<()> {
            match self.ask(&format!("put {key} {value}\n")).await?.as_str() {
                "ok" => Ok(()),
                other => Err(format!("put {key}: {other:?}")),
            }
        }

        /// Set keys to 0, many in one go.
        pub async fn clear(&mut self, keys: std::ops::Range<u64>) -> Result<()> {
            self.many("put", keys, 0).await
        }

        /// The same request for many keys in one go.
        pub async fn many(&mut self, what: &str, keys: std::ops::Range<u64>, value: u64) -> Result<()> {
            let requests: Vec<String> = keys.map(|key| format!("{what} {key} {value}\n")).collect();
            self.stream.write_all(requests.concat().as_bytes()).await.context("ask")?;
            for request in requests {
                self.answer(&request).await?;
            }
            Ok(())
        }

        /// What a key has.
        pub async fn get(&mut self, key: u64) -> Result<u64> {
            self.ask(&format!("get {key}\n")).await?.parse().context("a value")
        }
    }
}
