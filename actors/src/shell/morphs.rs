//! Morphs, as operators ask for them.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{MorphArgs, MorphGoal, MorphView};
use kmorph_platform::BootRequest;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::instance::Instance;
use super::morph::{self, MorphMsg, MorphReply, Wanted};
use super::tree::{ANSWER_LIMIT, Tree, gone, refused};
use crate::core::morph::Goal;

/// Phases that one wish may go through, each with its limit.
const PHASES: u32 = 8;

impl Tree {
    /// Begin a morph, or go on with it. Returns when its goal is reached, or with an error when the old kernel goes on.
    pub async fn morph(&self, args: MorphArgs) -> Result<MorphView, OpError> {
        let instance = self.instance(&args.name).await?;
        let goal = match args.goal {
            MorphGoal::Prepare => Goal::Prepare,
            MorphGoal::Validate => Goal::Validate,
            MorphGoal::Commit => Goal::Commit,
        };
        let wanted = args.kernel.as_ref().map(|kernel| Wanted {
            kernel: PathBuf::from(kernel),
            initramfs: args.initramfs.as_ref().map(PathBuf::from),
            cmdline: args.cmdline.clone(),
            cpus: args.cpus.clone(),
        });
        if let Some(wanted) = &wanted {
            let spec = morph::plan(&self.env, &instance, wanted).await;
            let spec =
                spec.map_err(|why| OpError::new(ErrorKind::Busy, format!("instance {}: {why}", args.name)))?;
            let request = {
                let r = instance.record();
                BootRequest {
                    spec: spec.clone(),
                    incarnation: r.incarnation + 1,
                    kernel: wanted.kernel.clone(),
                    initramfs: wanted.initramfs.clone().or(r.initramfs.clone()),
                    cmdline: wanted.cmdline.clone().unwrap_or(r.cmdline.clone()),
                    pulse_period: r.policy.pulse_period,
                }
            };
            self.env.platform.check(&request).await.map_err(|e| refused(&args.name, &e))?;
            if args.dry_run {
                return morph::dry_run(&instance, &spec);
            }
        }
        let limit = self.morph_limit(&instance);
        self.morph_ask(&instance, limit, |reply| MorphMsg::Go { goal, wanted, reply }).await
    }

    /// Give a morph up. Returns when the old kernel goes on by itself.
    pub async fn morph_rollback(&self, name: &str) -> Result<MorphView, OpError> {
        let instance = self.instance(name).await?;
        let why = "an operator rolled it back".to_owned();
        let limit = self.morph_limit(&instance);
        self.morph_ask(&instance, limit, |reply| MorphMsg::Cancel { why, reply }).await
    }

    /// The morph that is under way.
    pub async fn morph_status(&self, name: &str) -> Result<MorphView, OpError> {
        let instance = self.instance(name).await?;
        self.morph_ask(&instance, ANSWER_LIMIT, MorphMsg::View).await
    }

    fn morph_limit(&self, instance: &Instance) -> Duration {
        let policy = instance.record().policy;
        (policy.morph_timeout + policy.boot_grace) * PHASES
            + policy.drain_timeout
            + self.env.config.effect_limit * 4
    }

    async fn morph_ask(
        &self,
        instance: &Instance,
        limit: Duration,
        message: impl FnOnce(MorphReply) -> MorphMsg,
    ) -> Result<MorphView, OpError> {
        let (reply, answer) = oneshot::channel();
        if !morph::send(instance, message(reply)) {
            return Err(gone("its actor"));
        }
        match timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(gone("the actor of its morph")),
            Err(_) => {
                let text = format!("instance {}: not done within {limit:?}; it goes on", instance.name);
                Err(OpError::new(ErrorKind::Timeout, text))
            }
        }
    }
}
