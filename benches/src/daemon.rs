//! kmorphd as it is, over a farm.

use std::path::PathBuf;
use std::sync::Arc;

use kmorph_actors::{InstanceRecord, Policy, Store};
use kmorphd::{Args, Wrap};

use crate::platform::{Farm, INCARNATION, RELEASE, region, spec};
use crate::{Context, Result};

/// Instead of a farm: the process platform of the configuration, on which the instances run already.
const STAND_INS: &str = "stand-ins";

/// Run until asked to end.
pub fn run(dir: PathBuf, count: u16, config: PathBuf, socket: PathBuf) -> Result<()> {
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start tokio")?;
    let args = Args { config: Some(config), socket: Some(socket), check_config: false };
    let store = Box::new(move |store| remember(store, count));
    let wrap = if dir.as_os_str() == STAND_INS {
        Wrap { store, ..Wrap::default() }
    } else {
        Wrap { store, platform: Box::new(move |_| Arc::new(Farm::new(dir, count))) }
    };
    kmorphd::logs();
    rt.block_on(kmorphd::run(&args, wrap)).context("kmorphd")
}

/// What an earlier daemon would have left: every instance serves.
fn remember(store: Arc<dyn Store>, count: u16) -> Arc<dyn Store> {
    let fill = async {
        if !store.load_instances().await?.is_empty() {
            return Ok(Vec::new());
        }
        let save = |id| {
            let mut record = InstanceRecord::new(spec(id), Policy::default());
            record.incarnation = INCARNATION;
            record.release = RELEASE.into();
            record.region = Some(region(id));
            record.saved.phase = kmorph_actors::core::recovery::Phase::Monitoring;
            record.saved.held = true;
            let store = store.clone();
            async move { store.save_instance(&record).await }
        };
        futures::future::try_join_all((1..=count).map(save)).await
    };
    let filled = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(fill));
    if let Err(e) = filled {
        eprintln!("the journal was not filled: {e}");
    }
    store
}
