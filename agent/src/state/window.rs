//! Memory that both kernels of a morph have: workloads of the old one write pieces there, those of the new one read them.
//! Agents only say where.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use kmorph_state::wire::Order;
use tokio::time::timeout;

use super::direct::Freed;
use super::hook::{Answer, Hook};
use super::serve::ANSWER_LIMIT;
use super::{Broker, Plan};
use crate::kmsg;

/// Parts of workloads begin at multiples of this.
const ALIGN: u64 = 4096;

/// Have a workload use a window; when it cannot, the log says why.
async fn give(hook: &Hook, window: Option<(u64, Arc<File>)>, from: u64, size: u64) {
    let given = timeout(ANSWER_LIMIT, hook.give_window(window, from, size)).await;
    if let Err(why) = given.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_LIMIT:?}"))) {
        kmsg::log(kmsg::ERROR, &format!("workload {} has no shared memory: {why}", hook.name));
    }
}

impl Broker {
    /// Have workloads that take state read it out of this window. Its key, if that can be done.
    pub(super) async fn read_window(&self, morph: u64, key: u64) -> u64 {
        self.lock().window = None;
        let (Some(reach), Ok(plan)) = (self.reach.get().filter(|_| key != 0), self.plan(morph)) else {
            return 0;
        };
        let file = match reach.window(key) {
            Ok((file, _)) => Arc::new(file),
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("state does not come through shared memory: {e}"));
                return 0;
            }
        };
        self.lock().window = Some(file.clone());
        for hook in plan.hooks() {
            // Those that cannot get pieces that were read for them.
            give(&hook, Some((key, file.clone())), 0, 0).await;
        }
        key
    }

    /// Have workloads that give state write it into this window; 0: into none.
    pub(super) async fn write_window(&self, plan: &Plan, key: u64) {
        let hooks = plan.hooks();
        let opened = match self.reach.get().filter(|_| key != 0) {
            Some(_) if hooks.iter().all(|h| h.has_window_of(key)) => return,
            Some(reach) => reach.window(key).map(Some),
            None => Ok(None),
        };
        let window = match opened {
            Ok(window) => window.map(|(file, size)| (Arc::new(file), size)),
            Err(e) => {
                kmsg::log(kmsg::ERROR, &format!("state does not go through shared memory: {e}"));
                None
            }
        };
        let size = window.as_ref().map_or(0, |(_, size)| *size);
        let part = size / (hooks.len().max(1) as u64) / ALIGN * ALIGN;
        for (n, hook) in (0u64..).zip(&hooks) {
            // The pieces of one that cannot come with its answers.
            give(hook, window.as_ref().map(|(file, _)| (key, file.clone())), n * part, part).await;
        }
    }

    /// Tells workloads which of their pieces the other kernel has taken.
    pub(super) fn frees(self: &Arc<Self>, morph: u64) -> impl Fn(Freed) + Send + 'static {
        let broker = Arc::downgrade(self);
        move |Freed { section, place }| {
            let found = broker.upgrade().and_then(|b| b.section(morph, section).ok());
            if let Some((hook, _)) = found {
                hook.tell(Order::Freed { place });
            }
        }
    }

    /// Have a workload take a piece that is in the window. Nothing is read there any more when that is answered, or at
    /// once when there is no answer to come.
    pub(super) async fn placed(
        &self,
        morph: u64,
        section: u32,
        offset: u64,
        bytes: u32,
        place: u64,
    ) -> Option<Answer> {
        if self.has_failed() {
            return None;
        }
        let taken = async {
            let (hook, name) = self.section(morph, section)?;
            if hook.has_window() {
                let take = hook.say(Order::Take { section: name, offset, bytes, place });
                let late = |_| Err(format!("workload {} takes no state", hook.name));
                return timeout(ANSWER_LIMIT, take).await.unwrap_or_else(late).map(Some);
            }
            let file = self.lock().window.clone().ok_or("a piece is in a window that there is not")?;
            let mut data = vec![0; bytes as usize];
            file.read_exact_at(&mut data, place).map_err(|e| format!("shared memory: {e}"))?;
            self.piece(morph, section, offset, Bytes::from(data)).await;
            Ok::<_, String>(None)
        };
        taken.await.unwrap_or_else(|why| {
            self.fail(why);
            None
        })
    }
}
