//! The configuration in force, and taking up another one while the daemon runs.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kmorph_actors::Tree;
use kmorph_config::{Loaded, Paths, load};
use kmorph_control::{EventKind, OpError, ReloadView};
use tracing::{info, warn};

use crate::store::{Keep, SqliteStore};

/// The configuration in force and where it was read.
pub struct Configured {
    file: Option<PathBuf>,
    paths: Paths,
    loaded: Mutex<Loaded>,
    /// One reload at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Configured {
    /// Read it. Without a file, the default one when it is there.
    pub fn read(file: Option<PathBuf>, paths: Paths) -> Result<Configured, OpError> {
        let loaded = load(file.as_deref(), &paths)?;
        Ok(Configured { file, paths, loaded: Mutex::new(loaded), turn: tokio::sync::Mutex::new(()) })
    }

    /// What is in force.
    pub fn loaded(&self) -> MutexGuard<'_, Loaded> {
        // It is replaced as a whole, so a panic elsewhere left it whole.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files it was read from.
    pub fn files(&self) -> Vec<String> {
        self.loaded().files.iter().map(|f| f.display().to_string()).collect()
    }

    /// Read the files again and put what can be changed into force. All or nothing: a mistake anywhere leaves
    /// everything as it is.
    pub async fn reload(&self, tree: &Tree, store: &SqliteStore) -> Result<ReloadView, OpError> {
        let _turn = self.turn.lock().await;
        let new = load(self.file.as_deref(), &self.paths)?;
        let (policies, groups) = tree.reload(new.config.settings.clone()).await?;
        let restart_needed = self.loaded().config.restart_needed(&new.config);
        let view = ReloadView {
            files: new.files.iter().map(|f| f.display().to_string()).collect(),
            policies,
            groups,
            restart_needed,
        };
        let history = new.config.history;
        store.set_keep(Keep { steps: history.keep_steps, days: history.keep_days });
        // What needs a restart goes on as it was read at the start.
        let mut loaded = self.loaded();
        (loaded.config.settings, loaded.config.history) = (new.config.settings, history);
        (loaded.files, loaded.settings) = (new.files, new.settings);
        drop(loaded);
        info!(policies = view.policies.len(), groups = view.groups.len(), "configuration reloaded");
        for key in &view.restart_needed {
            warn!(%key, "was changed in the configuration and takes effect when kmorphd is restarted");
        }
        let effect = format!("{} settings and {} groups changed", view.policies.len(), view.groups.len());
        tree.announce(EventKind::Daemon, "the configuration was reloaded", &effect);
        Ok(view)
    }
}
