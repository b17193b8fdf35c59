//! Memory that both kernels of a morph have while state is copied: workloads of the old one write it, those of the new
//! one read it. It is made when there is state to copy, and given back when the morph is over.

use std::sync::Arc;
use std::time::Duration;

use kmorph_platform::{Platform, WINDOW};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::shell::instance::{Env, Instance};

/// Some dozens of pieces: neither side waits for the other as long as both go on.
const SIZE: u64 = 8 << 20;
/// Longest time for a kernel to confirm that it uses it no more.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// Between two tries to give one back.
const AGAIN: Duration = Duration::from_secs(1);

/// The key of a morph's window.
fn key(morph: u64) -> u64 {
    morph | WINDOW
}

/// Make one; its key, or 0 when state has to go another way.
pub(super) async fn open(env: &Env, old: &Instance, new: &Instance, morph: u64) -> u64 {
    let of = |i: &Instance| {
        let r = i.record();
        (r.spec.id, r.incarnation)
    };
    match env.platform.window_open(key(morph), SIZE, of(old), of(new)).await {
        Ok(()) => key(morph),
        Err(error) => {
            info!(instance = %old.name, %error, "state does not go through shared memory");
            0
        }
    }
}

/// The morph is over.
pub(super) async fn close(env: &Env, morph: u64) {
    if let Err(error) = env.platform.window_close(key(morph), CLOSE_LIMIT).await {
        warn!(morph, %error, "shared memory of a morph is not given back yet");
        tokio::spawn(give_back(env.platform.clone(), key(morph)));
    }
}

/// Give back what a daemon before this one left: there is no morph any more that uses it.
pub(crate) async fn sweep(platform: &Arc<dyn Platform>) {
    match platform.windows().await {
        Ok(keys) => keys.into_iter().for_each(|key| drop(tokio::spawn(give_back(platform.clone(), key)))),
        Err(error) => warn!(%error, "shared memory of morphs may be left from before"),
    }
}

/// A kernel that does not confirm does so later, or is fenced.
async fn give_back(platform: Arc<dyn Platform>, key: u64) {
    let mut said = String::new();
    while let Err(error) = platform.window_close(key, CLOSE_LIMIT).await {
        let error = error.to_string();
        if error != said {
            warn!(key, %error, "shared memory of a morph is not given back yet");
            said = error;
        }
        sleep(AGAIN).await;
    }
}
