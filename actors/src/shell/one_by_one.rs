//! Morphs of a group's members, one after the other, each with its clients moved to the others before.

use kmorph_control::error::{ErrorKind, OpError};
use kmorph_control::views::{EventKind, MorphArgs, MorphGoal, MorphView};
use tokio::time::Instant;

use super::log::Draft;
use super::tree::Tree;

/// What is asked for a member.
fn to(name: &str, kernel: Option<String>, goal: MorphGoal) -> MorphArgs {
    MorphArgs {
        name: name.to_owned(),
        kernel,
        cmdline: None,
        initramfs: None,
        cpus: vec![],
        memory_bytes: None,
        goal,
        dry_run: false,
    }
}

impl Tree {
    /// Each member is prepared, validated and committed before the next begins, so that there have to be CPUs and memory
    /// for one. When one fails, those before it get their former kernel back, with the same state.
    pub(super) async fn morph_one_by_one(
        &self,
        group: &str,
        kernel: &str,
        members: &[&String],
    ) -> Result<Vec<MorphView>, OpError> {
        let mut done: Vec<MorphView> = vec![];
        let mut former: Vec<(&str, String)> = vec![];
        for name in members {
            let known = self.env.directory.get(name);
            let runs = known.map(|i| i.record().kernel.display().to_string());
            let before = runs.ok_or_else(|| OpError::new(ErrorKind::NotFound, format!("{name} is gone")))?;
            match self.morph_member(name, kernel).await {
                Ok(view) => {
                    done.push(view);
                    former.push((name, before));
                }
                Err(error) => {
                    let text =
                        format!("group {group}: {}; {}", error.message, self.morph_back(&former).await);
                    return Err(OpError::new(error.kind, text));
                }
            }
        }
        Ok(done)
    }

    /// The last first. What became of them, in words.
    async fn morph_back(&self, former: &[(&str, String)]) -> String {
        let (mut back, mut left) = (vec![], vec![]);
        for (name, kernel) in former.iter().rev() {
            match self.morph_member(name, kernel).await {
                Ok(_) => back.push(*name),
                Err(error) => left.push(format!("{name} ({})", error.message)),
            }
        }
        match (back.is_empty(), left.is_empty()) {
            (true, true) => "no member has the new kernel".to_owned(),
            (false, true) => format!("these were morphed back to their former kernel: {}", back.join(", ")),
            (true, false) => format!("these still have the new kernel: {}", left.join("; ")),
            (false, false) => format!(
                "these were morphed back to their former kernel: {}; these still have the new one: {}",
                back.join(", "),
                left.join("; ")
            ),
        }
    }

    /// One member: the new kernel is validated while the old one serves, then its clients are moved away, then it takes
    /// over.
    async fn morph_member(&self, name: &str, kernel: &str) -> Result<MorphView, OpError> {
        self.morph(to(name, Some(kernel.to_owned()), MorphGoal::Validate)).await?;
        self.move_away(name).await;
        let committed = self.morph(to(name, None, MorphGoal::Commit)).await;
        self.env.switch.away(name, false);
        committed
    }

    /// New connections go to other members that are reached by the same address; those that are there have time to end.
    async fn move_away(&self, name: &str) {
        if !self.env.switch.away(name, true) {
            // Nobody else would take them.
            self.env.switch.away(name, false);
            return;
        }
        let limit =
            self.env.directory.get(name).map_or_else(Default::default, |i| i.record().policy.drain_timeout);
        let began = Instant::now();
        let left = self.env.switch.emptied(name, limit).await;
        let text = format!(
            "new connections go to others of its group; {left} are left after {:.1?}",
            began.elapsed()
        );
        let incarnation = self.env.directory.get(name).map_or(0, |i| i.record().incarnation);
        let draft = Draft::new(EventKind::Notice, text).effect("its new kernel takes over");
        self.env.log.say(draft.of(name, self.env.group_of(name), incarnation));
    }
}
