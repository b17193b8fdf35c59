//! Handover memory of instances: made before a kernel is started, shared with it, and given back when nobody needs it.

use std::time::Duration;

use kmorph_platform::{InstanceId, Platform, PlatformError};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::store::{Handover, InstanceRecord, Role};

/// Between two tries to give a region back that another kernel still maps.
const AGAIN: Duration = Duration::from_millis(50);
/// Longest time for a writer to confirm that it writes no more.
pub(crate) const REVOKE_LIMIT: Duration = Duration::from_millis(500);

/// What a record says of it, for one effect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    region: Handover,
    /// The instance is the region's; otherwise it is another one's, which is looked at.
    own: bool,
}

impl Use {
    pub(crate) fn of(record: &InstanceRecord) -> Option<Use> {
        record.handover.map(|region| Use { region, own: record.role == Role::Own })
    }

    /// Have a fresh region before a kernel is started. What the kernel before it left is forgotten: it may have died in
    /// the middle of a change.
    pub(crate) async fn before_boot(self, platform: &dyn Platform, limit: Duration) -> Result<(), String> {
        if !self.own {
            return Ok(());
        }
        let until = Instant::now() + limit;
        loop {
            let _ = self.destroy(platform).await;
            match platform.handover_create(self.region.key, self.region.bytes).await {
                Ok(range) => {
                    info!(key = self.region.key, base = range.base, size = range.size, "handover memory");
                    return Ok(());
                }
                // The other kernel of a morph that is being undone has it still.
                Err(PlatformError::Busy(_)) if Instant::now() < until => sleep(AGAIN).await,
                Err(error) => return Err(format!("handover memory: {error}")),
            }
        }
    }

    /// Let the kernel that was started map it.
    pub(crate) async fn after_boot(
        self,
        platform: &dyn Platform,
        id: InstanceId,
        incarnation: u64,
    ) -> Result<(), String> {
        let shared = async {
            platform.handover_share(self.region.key, id, incarnation).await?;
            if self.own {
                platform.handover_assign(self.region.key, Some(id), REVOKE_LIMIT).await?;
            }
            Ok::<(), PlatformError>(())
        };
        shared.await.map_err(|e| format!("handover memory: {e}"))
    }

    /// Its kernel is stopped and nothing runs on.
    pub(crate) async fn after_reclaim(self, platform: &dyn Platform) {
        if self.own
            && let Err(error) = self.destroy(platform).await
        {
            // It is tried again before the next start.
            warn!(key = self.region.key, %error, "handover memory is not given back yet");
        }
    }

    async fn destroy(self, platform: &dyn Platform) -> Result<(), PlatformError> {
        let there = platform.handover_list().await?.iter().any(|r| r.key == self.region.key);
        if there { platform.handover_destroy(self.region.key).await } else { Ok(()) }
    }
}
