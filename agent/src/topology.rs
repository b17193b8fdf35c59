//! Which kernels there are: kmorphd tells the agent, the agent tells whoever connects.

use std::sync::Arc;
use std::time::Duration;

use kmp::message::Topology;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::kmsg;
use crate::state::Address;

/// Where programs of an instance connect to be told.
pub const ADDRESS: &str = "@kmorph-topology";
/// Who listens at once.
const LISTENERS: usize = 64;
/// Who takes longer to read a line is not told any more.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// After an accept that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// What kmorphd said last, as a line of JSON; empty before it has said anything.
#[derive(Clone, Default)]
pub struct News(watch::Sender<Arc<str>>);

impl News {
    /// kmorphd says this.
    pub fn set(&self, topology: &Topology) {
        match serde_json::to_string(topology) {
            Ok(line) => drop(self.0.send_replace(format!("{line}\n").into())),
            Err(e) => kmsg::log(kmsg::ERROR, &format!("a topology that cannot be passed on: {e}")),
        }
    }
}

/// Give everybody who connects a line now, and another one with every change.
pub async fn tell(news: News, address: Address) {
    let listener = match address.bind() {
        Ok(listener) => listener,
        Err(e) => {
            return kmsg::log(kmsg::ERROR, &format!("nobody can be told the topology, {address:?}: {e}"));
        }
    };
    let places = Arc::new(Semaphore::new(LISTENERS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("nobody can be told the topology: {e}"));
                sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            kmsg::log(kmsg::ERROR, &format!("not told the topology: {LISTENERS} are told already"));
            continue;
        };
        let lines = news.0.subscribe();
        tokio::spawn(async move {
            one(stream, lines).await;
            drop(place);
        });
    }
}

async fn one(mut stream: UnixStream, mut lines: watch::Receiver<Arc<str>>) {
    let mut nothing = [0; 64];
    loop {
        let line = lines.borrow_and_update().clone();
        if !line.is_empty()
            && !matches!(timeout(READ_LIMIT, stream.write_all(line.as_bytes())).await, Ok(Ok(())))
        {
            return;
        }
        tokio::select! {
            changed = lines.changed() => if changed.is_err() { return },
            // What is said to us means nothing; that nobody is there any more does.
            read = stream.read(&mut nothing) => if matches!(read, Ok(0) | Err(_)) { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kmp::message::Neighbour;
    use tokio::io::{AsyncBufReadExt, BufReader};

    #[tokio::test]
    async fn who_connects_is_told_now_and_with_every_change() {
        let dir = std::env::temp_dir().join(format!("kmorph-topology-{}", std::process::id()));
        let news = News::default();
        let telling = tokio::spawn(tell(news.clone(), Address::Path(dir.clone())));
        let stream = timeout(READ_LIMIT, async {
            loop {
                match UnixStream::connect(&dir).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        });
        let mut lines = BufReader::new(stream.await.unwrap()).lines();
        for generation in [1, 2] {
            let instances = vec![Neighbour { name: "db".into(), cid: 4, ..Neighbour::default() }];
            let said = Topology { generation, instances };
            news.set(&said);
            let line = timeout(READ_LIMIT, lines.next_line()).await.unwrap().unwrap().unwrap();
            assert_eq!(serde_json::from_str::<Topology>(&line).unwrap(), said);
        }
        let mut late = BufReader::new(UnixStream::connect(&dir).await.unwrap()).lines();
        let line = timeout(READ_LIMIT, late.next_line()).await.unwrap().unwrap().unwrap();
        assert!(line.contains("\"generation\":2"), "{line}");
        telling.abort();
        std::fs::remove_file(&dir).unwrap();
    }
}
