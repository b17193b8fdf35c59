//! What operators notice of ten thousand instances: `list`, and requests from several clients.

use std::path::Path;
use std::time::{Duration, Instant};

use kmorph_control::{Client, DaemonView, InstanceState, InstanceView, Request};
use tokio::runtime::Runtime;

use crate::platform::spec;
use crate::{Context, Result, row};

const LISTS: usize = 10;
const CLIENTS: u16 = 8;
const ASKING: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// SPECIFICATION.md.
const LIST_LIMIT: Duration = Duration::from_secs(1);
/// SPECIFICATION.md.
const REQUEST_LIMIT: Duration = Duration::from_millis(50);

/// What was measured.
pub struct Control {
    list: Duration,
    bytes: usize,
    rate: f64,
    p50: Duration,
    p99: Duration,
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")
}

async fn client(socket: &Path) -> Result<Client> {
    Client::connect(socket).await.map_err(|e| e.to_string())
}

/// Wait until every instance serves; how long it took.
pub fn all_healthy(socket: &Path, count: u16, limit: Duration) -> Result<Duration> {
    let began = Instant::now();
    runtime()?.block_on(async {
        let mut seen = "no daemon".to_owned();
        while began.elapsed() < limit {
            let list = async { client(socket).await?.call(&Request::List).await.map_err(|e| e.to_string()) };
            match list.await {
                Ok::<Vec<InstanceView>, _>(all) => {
                    let healthy = all.iter().filter(|i| i.state == InstanceState::Healthy).count();
                    if healthy == usize::from(count) {
                        return Ok(began.elapsed());
                    }
                    seen = format!("{healthy} of {} instances serve", all.len());
                }
                Err(e) => seen = e,
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Err(format!("{seen} after {limit:?}"))
    })
}

/// How late the daemon's timers came, 99th percentile.
pub fn lag(socket: &Path) -> Result<Duration> {
    runtime()?.block_on(async {
        let view: DaemonView =
            client(socket).await?.call(&Request::DaemonStatus).await.map_err(|e| e.to_string())?;
        Ok(Duration::from_secs_f64(view.lag_p99_ms / 1e3))
    })
}

/// In which life each instance is.
pub fn lives(socket: &Path) -> Result<Vec<u64>> {
    runtime()?.block_on(async {
        let all: Vec<InstanceView> =
            client(socket).await?.call(&Request::List).await.map_err(|e| e.to_string())?;
        Ok(all.iter().map(|i| i.incarnation).collect())
    })
}

/// Ask the daemon while all instances beat.
pub fn measure(socket: &Path, count: u16) -> Result<Control> {
    runtime()?.block_on(async {
        let mut lists = Vec::new();
        let mut bytes = 0;
        let mut asking = client(socket).await?;
        for _ in 0..LISTS {
            let began = Instant::now();
            let all: Vec<InstanceView> = asking.call(&Request::List).await.map_err(|e| e.to_string())?;
            lists.push(began.elapsed());
            bytes = kmorph_control::encode(&all).map_err(|e| e.to_string())?.len();
        }
        lists.sort();
        let each = (0..CLIENTS).map(|n| async move {
            let mut asking = client(socket).await?;
            let (began, mut times) = (Instant::now(), Vec::new());
            for id in (0..).map(|i: u32| i * u32::from(CLIENTS) + u32::from(n)) {
                if began.elapsed() > ASKING {
                    break;
                }
                let name = spec(u16::try_from(id % u32::from(count)).unwrap_or(0) + 1).name;
                let asked = Instant::now();
                let view: InstanceView =
                    asking.call(&Request::Status { name: name.clone() }).await.map_err(|e| e.to_string())?;
                times.push(asked.elapsed());
                if view.name != name {
                    return Err(format!("asked for {name}, answered {}", view.name));
                }
            }
            Ok(times)
        });
        let began = Instant::now();
        let mut times: Vec<Duration> = futures::future::try_join_all(each).await?.concat();
        let rate = times.len() as f64 / began.elapsed().as_secs_f64();
        times.sort();
        let at = |q: f64| times.get((times.len() as f64 * q) as usize).copied().unwrap_or_default();
        Ok(Control { list: lists[LISTS / 2], bytes, rate, p50: at(0.5), p99: at(0.99) })
    })
}

impl Control {
    /// Print. False when a promise was not kept.
    pub fn table(&self, count: u16) -> bool {
        row(
            &format!("list of {count} instances, p50"),
            &format!("{:.0} ms, {} KiB", ms(self.list), self.bytes >> 10),
            &format!("<= {:.0} ms", ms(LIST_LIMIT)),
        );
        row(
            &format!("status requests, {CLIENTS} clients, while all beat"),
            &format!("{:.0}/s, p50 {:.2} ms, p99 {:.2} ms", self.rate, ms(self.p50), ms(self.p99)),
            &format!("p99 <= {:.0} ms", ms(REQUEST_LIMIT)),
        );
        self.list <= LIST_LIMIT && self.p99 <= REQUEST_LIMIT
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
