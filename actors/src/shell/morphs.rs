//! Morphs, as operators ask for them.

use std::path::PathBuf;
use std::time::Duration;

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{GroupMorph, MorphArgs, MorphGoal, MorphGroupArgs, MorphView};
use kmorph_platform::BootRequest;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::instance::Instance;
use super::morph::{self, MorphMsg, MorphReply, Wanted};
use super::tree::{ANSWER_LIMIT, Tree, gone, refused};
use crate::core::morph::Goal;
use crate::core::recovery;

/// Phases that one wish may go through, each with its limit.
const PHASES: u32 = 8;
/// How often a wish that nobody heard is said again, and after how long.
const UNHEARD: u32 = 5;
const AGAIN: Duration = Duration::from_millis(20);

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
            memory_bytes: args.memory_bytes,
        });
        if let Some(wanted) = &wanted {
            let plan = morph::plan_with_way(&self.env, &instance, wanted, args.dry_run).await;
            let (spec, growth) =
                plan.map_err(|why| OpError::new(ErrorKind::Busy, format!("instance {}: {why}", args.name)))?;
            let request = {
                let r = instance.record();
                BootRequest {
                    spec: spec.clone(),
                    incarnation: r.incarnation + 1,
                    kernel: wanted.kernel.clone(),
                    initramfs: wanted.initramfs.clone().or(r.initramfs.clone()),
                    cmdline: wanted.cmdline.clone().unwrap_or(r.cmdline.clone()),
                    pulse_period: r.policy.pulse_period,
                    growth: growth.clone(),
                }
            };
            // A standby has what it needs.
            if !morph::would_use(&self.env, &instance, wanted) {
                self.env.platform.check(&request).await.map_err(|e| refused(&args.name, &e))?;
            }
            if args.dry_run {
                return morph::dry_run(&instance, &spec, &growth);
            }
        }
        let limit = self.morph_limit(&instance);
        let mut tries = 0;
        loop {
            let wanted = wanted.clone();
            let go = |reply| MorphMsg::Go { goal, wanted, reply };
            let answer = self.morph_ask(&instance, limit, go).await;
            // The actor of the morph before was just ending, and has taken the wish along.
            let unheard = answer.as_ref().is_err_and(|e| e.kind == ErrorKind::Internal);
            if !unheard || instance.record().morph.is_some() || tries == UNHEARD {
                return answer;
            }
            tries += 1;
            sleep(AGAIN).await;
        }
    }

    /// Give a morph up. Returns when the old kernel goes on by itself.
    pub async fn morph_rollback(&self, name: &str) -> Result<MorphView, OpError> {
        let instance = self.instance(name).await?;
        let why = "an operator rolled it back".to_owned();
        let limit = self.morph_limit(&instance);
        self.morph_ask(&instance, limit, |reply| MorphMsg::Cancel { why, reply }).await
    }

    /// Morphs of a group's members. They go together: all are validated before the first is committed, and one that
    /// fails until then has all of them rolled back; or one by one. Members are taken in the order of the group; those that do not run
    /// are left out.
    pub async fn morph_group(&self, args: &MorphGroupArgs) -> Result<Vec<MorphView>, OpError> {
        let group = self.group(&args.group).await?;
        let members: Vec<String> = group.members.into_iter().map(|m| m.name).collect();
        let runs = |name: &&String| {
            let known = self.env.directory.get(name);
            known.is_some_and(|i| i.record().saved.phase == recovery::Phase::Monitoring)
        };
        let members: Vec<&String> = members.iter().filter(runs).collect();
        if members.is_empty() {
            let text = format!("group {}: no member runs", args.group);
            return Err(OpError::new(ErrorKind::Conflict, text));
        }
        let under_way = |name: &&&String| self.has_morph(name.as_str());
        if args.kernel.is_none() {
            let waiting: Vec<&String> = members.iter().filter(under_way).copied().collect();
            if waiting.is_empty() {
                let text = format!(
                    "group {0}: no morph is prepared: kmorphctl morph group {0} --kernel=...",
                    args.group
                );
                return Err(OpError::new(ErrorKind::Conflict, text));
            }
            // One that was undone by itself: they go together, or not at all.
            let missing = members.iter().find(|name| !under_way(name));
            if let (Some(name), GroupMorph::Validate | GroupMorph::Commit) = (missing, args.what) {
                let text = format!(
                    "group {0}: {name} has no morph (any more); roll the others back: kmorphctl morph group {0} --rollback",
                    args.group
                );
                return Err(OpError::new(ErrorKind::Conflict, text));
            }
            return match args.what {
                GroupMorph::Rollback => self.roll_all_back(&waiting).await,
                GroupMorph::Validate => self.validate_all(args, &waiting).await,
                GroupMorph::Commit => {
                    self.validate_all(args, &waiting).await?;
                    self.commit_all(args, &waiting).await
                }
            };
        }
        if let Some(name) = members.iter().find(|n| under_way(n)) {
            let text =
                format!("group {}: {name} has a morph under way: commit it or roll it back", args.group);
            return Err(OpError::new(ErrorKind::Conflict, text));
        }
        if let (true, Some(kernel)) = (args.one_by_one, &args.kernel) {
            return self.morph_one_by_one(&args.group, kernel, &members).await;
        }
        let valid = self.validate_all(args, &members).await?;
        match args.what {
            GroupMorph::Commit => self.commit_all(args, &members).await,
            GroupMorph::Validate | GroupMorph::Rollback => Ok(valid),
        }
    }

    fn has_morph(&self, name: &str) -> bool {
        self.env.directory.get(name).is_some_and(|i| i.record().morph.is_some())
    }

    /// Each after the other, so that the machine starts one kernel at a time.
    async fn validate_all(
        &self,
        args: &MorphGroupArgs,
        members: &[&String],
    ) -> Result<Vec<MorphView>, OpError> {
        let mut valid = vec![];
        for name in members {
            let go = MorphArgs {
                name: (*name).clone(),
                kernel: args.kernel.clone(),
                cmdline: None,
                initramfs: None,
                cpus: vec![],
                memory_bytes: None,
                goal: MorphGoal::Validate,
                dry_run: false,
            };
            match self.morph(go).await {
                Ok(view) => valid.push(view),
                Err(error) => {
                    // Those behind it, too, when they are prepared.
                    let others = members.iter().filter(|other| *other != name);
                    let done: Vec<&String> =
                        others.filter(|other| self.has_morph(other.as_str())).copied().collect();
                    let back = self.roll_all_back(&done).await;
                    let names: Vec<&str> = done.iter().map(|n| n.as_str()).collect();
                    let rest = match (names.is_empty(), back) {
                        (true, _) => "nothing was changed".to_owned(),
                        (false, Ok(_)) => format!("rolled back too: {}", names.join(", ")),
                        (false, Err(e)) => format!("not all of {} are rolled back: {e}", names.join(", ")),
                    };
                    let text = format!("group {}: {}; {rest}", args.group, error.message);
                    return Err(OpError::new(error.kind, text));
                }
            }
        }
        Ok(valid)
    }

    /// The last first: who depends on others goes before them, as in a restart of the rest.
    async fn roll_all_back(&self, members: &[&String]) -> Result<Vec<MorphView>, OpError> {
        let (mut views, mut failed) = (vec![], None);
        for name in members.iter().rev() {
            match self.morph_rollback(name).await {
                Ok(view) => views.push(view),
                Err(error) => failed = Some(error),
            }
        }
        views.reverse();
        failed.map_or(Ok(views), Err)
    }

    async fn commit_all(
        &self,
        args: &MorphGroupArgs,
        members: &[&String],
    ) -> Result<Vec<MorphView>, OpError> {
        let mut done: Vec<MorphView> = vec![];
        for (n, name) in members.iter().enumerate() {
            let go = MorphArgs {
                name: (*name).clone(),
                kernel: None,
                cmdline: None,
                initramfs: None,
                cpus: vec![],
                memory_bytes: None,
                goal: MorphGoal::Commit,
                dry_run: false,
            };
            match self.morph(go).await {
                Ok(view) => done.push(view),
                Err(error) => {
                    let rest: Vec<&String> = members.iter().skip(n + 1).copied().collect();
                    let back = self.roll_all_back(&rest).await;
                    let committed: Vec<&str> = done.iter().map(|v| v.name.as_str()).collect();
                    let mut text = format!("group {}: {}; ", args.group, error.message);
                    text += &match committed.as_slice() {
                        [] => "no member has the new kernel".to_owned(),
                        names => format!("these have the new kernel: {}", names.join(", ")),
                    };
                    if let Err(e) = back {
                        text += &format!("; not all others are rolled back: {e}");
                    }
                    return Err(OpError::new(ErrorKind::MorphFailed, text));
                }
            }
        }
        Ok(done)
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
